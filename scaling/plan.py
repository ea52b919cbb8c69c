"""`scaling.plan`: the size, the data and the precision that a fitted law calls best under a budget, with intervals from the fit's resamples."""
from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from scaling import costs
from scaling.costs import PRICED_WIDTHS, CostModel
from scaling.laws import Law
from scaling.optimum import Budget, Choices, Optimum, Sweep, optimise, optimise_all
from scaling.problem import constants
from scaling.reach import MAX_REACH, reaches, refuse_far
from scaling.result import Fit

SIMULATED = 200  # draws from the linearised covariance
ENOUGH = 20  # resamples fewer than these give no quantiles
EDGE = 1e-6  # of a width: nearer to the end of the search than this is at the end
Resample = tuple[Mapping[str, float], Optimum]


@dataclass(frozen=True)
class Range:
    """A number with its interval at the fit's level; low = high = value for what was given."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4g}" + ("" if self.low == self.high else f" [{self.low:.4g}, {self.high:.4g}]")


@dataclass(frozen=True)
class Row:
    """The best that one precision can do. N (parameters), D (tokens), loss (nats per token; inf when nothing fits), share: of the
    resamples in which this precision is the best, None when widths were searched between these rows."""

    name: str
    N: float
    D: float
    loss: float
    share: float | None


@dataclass(frozen=True)
class Plan:
    """What to train. N (parameters), D (tokens), tokens_per_param, bits (of the operands that were searched; None when none were): with
    intervals over the resamples of the fit. precision: the law's inputs besides N and D, and the widths of costs. loss: in `unit`,
    with the interval that one such run is expected to fall in. cost: training and inference, FLOP of 16 bits; device_seconds: at the
    dense peak, None when the cost model is of no device. critical_tokens: the tokens from which more of them harm (D_crit), None when
    the law has none. frontier: the best of each precision, under a memory limit the iso-memory frontier. reach: N, D, compute -> by what
    factor they lie outside of the fitted range, and that in words. notes: what to know before believing it.
    """

    law: str
    model: CostModel
    compute: float | None
    level: float
    N: Range
    D: Range
    tokens_per_param: Range
    bits: Range | None
    precision: Mapping[str, object]
    loss: Range
    unit: str
    cost: float
    device_seconds: float | None
    critical_tokens: Range | None
    frontier: tuple[Row, ...]
    reach: Mapping[str, tuple[float, str]]
    notes: tuple[str, ...]


def plan(fit: Fit, *, compute: float | None = None, cost_model: str | CostModel = "bits", fix: Mapping[str, object] | None = None,
         bits: Iterable[float] | None = None, precisions: Mapping[str, Mapping[str, object]] | None = None, inference_tokens: float = 0.0,
         memory: float | None = None, extrapolate: bool = False) -> Plan:
    """The N, D and precision with the lowest loss within a budget, by the law and constants of `fit`.

    compute: of training and inference together, in FLOP of 16 bits. cost_model: see `scaling.costs`. fix: holds N (parameters), D
    (tokens), inputs of the law or widths that only costs depend on (weights_bits, ...). bits: widths to choose from; otherwise any width
    within those trained, or the cost model's own. precisions: name -> law inputs and widths of costs, instead of widths alone, for
    laws of another kind of input. inference_tokens: to be served, at 2 N FLOP each (Sardana et al. 2023, arXiv 2401.00448). memory: of
    the weights, bytes, N weights_bits/8 at most. extrapolate: answer beyond 30 times the fitted range of N, D or compute, and say so.

    Intervals are the hull of the quantiles over the bootstrap resamples of the fit and over 200 draws from its linearised covariance.
    ValueError, one line: for a budget that bounds nothing or that nothing fits, an unknown name, a law that needs what is not given, a
    fit whose design identifies nothing, and an optimum too far outside of what was trained.
    """
    fix = dict(fix or {})
    budget = _budget(compute, cost_model, fix, inference_tokens, memory)
    choices, names = _choices(fit, budget.model, fix, bits, precisions)
    best = optimise(fit.law, fit.params, budget, choices)
    if not math.isfinite(best.loss):
        raise ValueError(f"plan: nothing fits the budget ({_told(budget)}) at a finite loss; allow more, or fix less")
    at = {"N": best.N, "D": best.D} | {name: value for name, value in best.precision.items() if name in fit.law.inputs}
    if not extrapolate:
        refuse_far(fit.ranges, at, "plan")
    predicted = fit.predict(**at, extrapolate=True)  # refuses a fit that identifies nothing; its distance has been judged
    resampled = _resample(fit, budget, choices)
    swept = () if precisions else _swept(fit, fix)
    found = _intervals(fit, best, resampled, swept, budget)
    cost = float(budget.cost(best.N, best.D, best.precision))
    return Plan(fit.label, budget.model, budget.compute, fit.level, **found, precision=best.precision,
                loss=Range(best.loss, float(predicted.low), float(predicted.high)), unit=fit.law.unit, cost=cost,
                device_seconds=budget.model.seconds(cost), frontier=_frontier(fit, budget, choices, names, resampled, extrapolate),
                reach=reaches(fit.ranges, at), notes=tuple(_notes(fit, budget, best, choices, swept)))


def _budget(compute, model, fix: dict, inference_tokens: float, memory) -> Budget:
    """The budget, N and D taken out of `fix`. ValueError for numbers that are not positive, or when something stays without a bound."""
    given = {"compute": compute, "memory": memory, "N": fix.pop("N", None), "D": fix.pop("D", None)}
    for name, value in given.items():
        if value is not None and not (isinstance(value, (int, float, np.number)) and 0 < value < math.inf):
            raise ValueError(f"plan: {name}={value}: need a positive finite number")
    if not 0 <= inference_tokens < math.inf:
        raise ValueError(f"plan: inference_tokens={inference_tokens}: need a number of at least 0")
    if compute is None and (given["D"] is None or (given["N"] is None and memory is None)):
        raise ValueError("plan: nothing bounds the training; give compute (FLOP), or fix D and either N or memory (bytes)")
    return Budget(costs.cost_model(model), compute, float(inference_tokens), memory, given["N"], given["D"])


def _swept(fit: Fit, fix: Mapping) -> tuple[str, ...]:
    """Inputs in bits that the fit has constants for and that are not given: they share the width that is searched."""
    return tuple(operand.input for operand in fit.law.operands
                 if operand.input.endswith("bits") and operand.parameters[0] in fit.params and operand.input not in fix)


def _choices(fit: Fit, model: CostModel, fix: Mapping, bits, precisions) -> tuple[Choices, list[str]]:
    """What precisions to choose from, and the names of those in a list."""
    law = fit.law
    known = {*law.inputs, *PRICED_WIDTHS} - {"N", "D"}
    for name in {*fix, *(name for inputs in (precisions or {}).values() for name in inputs)}:
        if name not in known:
            raise ValueError(f"plan: {name!r} is no input of law {law.name} and no width of costs; accepted: N, D, {', '.join(sorted(known))}")
    for name, value in fix.items():
        if not isinstance(value, str) and not value > 0 and name.endswith("bits"):
            raise ValueError(f"plan: {name}={value}: need a positive number of bits")
    swept = _swept(fit, fix)
    if precisions and bits is not None:
        raise ValueError("plan: bits and precisions exclude each other: a precision says its own widths")
    choices: Choices = [dict(fix)]
    names = [""]
    if precisions:
        choices, names = [dict(fix) | dict(inputs) for inputs in precisions.values()], list(precisions)
    elif bits is not None or swept:
        choices, names = _width_choices(fit, model, fix, swept, None if bits is None else list(bits))
    optional = {operand.input for operand in law.operands}
    given = choices.at(16.0) if isinstance(choices, Sweep) else {name: 0 for name in set.intersection(*map(set, choices))}
    missing = [name for name in law.inputs if name not in {"N", "D", *optional, *given}]
    if missing:
        raise ValueError(f"plan: law {law.name} also needs {', '.join(missing)}: fix them, or give precisions that hold them")
    return choices, names


def _width_choices(fit: Fit, model: CostModel, fix: Mapping, swept: tuple[str, ...], bits: list | None) -> tuple[Choices, list[str]]:
    """The widths asked for, those at which the price jumps, or all, within those trained."""
    if not swept:
        given = ", ".join(f"{name}={fix[name]:g}" for name in fit.at_width(1.0) if name in fix)
        raise ValueError(f"plan: bits={bits}: {fit.label} has no width left to choose; " +
                         (f"fixed are {given}: leave one of them free, or bits out" if given else f"it sees {', '.join(fit.law.inputs)}"))
    if bits is not None and not (bits and all(isinstance(b, (int, float)) and 0 < b < math.inf for b in bits)):
        raise ValueError(f"plan: bits={bits}: need positive numbers of bits")
    low = max(fit.ranges.get(name, (0.0, math.inf))[0] for name in swept)
    high = min(fit.ranges.get(name, (0.0, math.inf))[1] for name in swept)
    if low > high:
        raise ValueError(f"plan: {', '.join(swept)} were trained at no common width; fix all but one of them, or give bits")
    if bits is None and not model.widths:
        return Sweep(swept, low, high, dict(fix)), []
    widths = bits if bits is not None else [width for width in model.widths if low <= width <= high]
    if not widths:
        raise ValueError(f"plan: cost model {model.name} has rates at {', '.join(f'{w:g}' for w in model.widths)} bits, none of them within "
                         f"the widths trained, {low:g} to {high:g}: give bits")
    return [dict(fix) | dict.fromkeys(swept, float(width)) for width in widths], [f"{width:g} bits" for width in widths]


def _resample(fit: Fit, budget: Budget, choices: Choices) -> list[list[Resample]]:
    """(constants, optimum) of each draw from the linearised covariance, and, when the fit has them, of each of its resamples."""
    noise = np.random.default_rng(0).standard_t(max(int(fit.metrics["dof"]), 1), size=(SIMULATED, fit.scatter.shape[1]))
    kinds = [fit.coordinates + noise @ fit.scatter.T] + ([fit.draws] if len(fit.draws) > ENOUGH else [])
    drawn = [[constants(fit.law, fit.free, fit.ties, fit.fixed, draw) for draw in draws] for draws in kinds]
    return [list(zip(several, optimise_all(fit.law, several, budget, choices), strict=True)) for several in drawn]


def _intervals(fit: Fit, best: Optimum, resampled: list[list[Resample]], swept: tuple[str, ...], budget: Budget) -> dict:
    """Range of every number of the plan: the hull of the quantiles over each kind of resample, since each alone can be too narrow (see
    `Fit.estimate`). What a resample does not tell counts as infinite."""
    def over(function: Callable[[Mapping, Optimum], float | None]) -> Range | None:
        value = function(fit.params, best)
        if value is None:
            return None
        tail, ends = 0.5 * (1.0 - fit.level), []
        for several in resampled:
            values = np.array([function(params, optimum) for params, optimum in several], dtype=np.float64)
            ends.append(np.quantile(np.where(np.isnan(values), np.inf, values), [tail, 1.0 - tail], method="closest_observation"))
        low, high = np.min(ends, axis=0)[0], np.max(ends, axis=0)[1]
        return Range(float(value), float(low), float(high))

    found = {
        "N": over(lambda p, o: o.N), "D": over(lambda p, o: o.D), "tokens_per_param": over(lambda p, o: o.D / o.N),
        "bits": over(lambda p, o: o.precision[swept[0]]) if swept else None,
        "critical_tokens": over(lambda p, o: critical_tokens(fit.law, p, o.N, o.precision)),
    }
    for name in ("N", "D"):  # what was given has no interval, and the rounding of a search no meaning
        if getattr(budget, name) is not None:
            found[name] = Range(*3 * (getattr(budget, name),))
    return found


def critical_tokens(law: Law, params: Mapping[str, float], N: float, precision: Mapping) -> float | None:
    """D_crit: the tokens from which more of them raise the loss, by the law's functional `critical_tokens` at N parameters and the given
    precision. None when the law has no such functional, or it needs an input that is not given."""
    function = law.functionals.get("critical_tokens")
    if function is None:
        return None
    known = {"N": N, **{name: value for name, value in precision.items() if name in law.inputs}}
    accepted = list(inspect.signature(function).parameters.values())[1:]
    if not any(p.kind is p.VAR_KEYWORD for p in accepted):
        known = {name: value for name, value in known.items() if name in {p.name for p in accepted}}
    if any(p.default is p.empty and p.name not in known for p in accepted if p.kind is not p.VAR_KEYWORD):
        return None
    return float(function(params, **known))


def _frontier(fit: Fit, budget: Budget, choices: Choices, names: list[str], resampled, extrapolate: bool) -> tuple[Row, ...]:
    """The best of each precision of the list, or of the whole widths of a sweep up to 16 bits. Those too far out are left out."""
    listed, shares = choices, None
    if isinstance(choices, Sweep):
        widths = range(math.ceil(choices.low), math.floor(min(choices.high, 16.0)) + 1)
        listed, names = [choices.at(float(width)) for width in widths], [f"{width} bits" for width in widths]
    elif len(choices) == 1:
        return ()
    else:
        chosen = [optimum.precision for _, optimum in resampled[-1]]  # of the bootstrap, where there is one
        shares = [sum(precision == choice for precision in chosen) / len(chosen) for choice in choices]
    rows = []
    for i, (name, precision) in enumerate(zip(names, listed, strict=True)):
        optimum = optimise(fit.law, fit.params, budget, [precision])
        far = any(factor > MAX_REACH for factor, _ in reaches(fit.ranges, {"N": optimum.N, "D": optimum.D}).values())
        if math.isfinite(optimum.loss) and (extrapolate or not far):
            rows.append(Row(name, optimum.N, optimum.D, optimum.loss, shares[i] if shares else None))
    return tuple(rows)


def _notes(fit: Fit, budget: Budget, best: Optimum, choices: Choices, swept: tuple[str, ...]) -> list[str]:
    """Remarks on an optimum that is there for another reason than the law's, or that the runs cannot vouch for."""
    notes = []
    for name, value in best.precision.items():
        low, high = fit.ranges.get(name, (0.0, math.inf))
        if name in PRICED_WIDTHS and name not in fit.law.inputs:
            notes.append(f"law {fit.law.name} does not see {name}: it changes the cost and not the loss")
        elif not isinstance(value, str) and not low <= min(value, _neutral(fit.law, name)) <= high:
            notes.append(f"{name} = {value:g} lies outside of what was trained, {low:g} to {high:g}")
    if isinstance(choices, Sweep) and swept:
        width = best.precision[swept[0]]
        for end, word in ((choices.low, "fewer"), (choices.high, "more")):
            if abs(width - end) <= EDGE * end:
                notes.append(f"the best width is at the end of those trained, {end:g} bits: {word} may be better still")
    if len(swept) > 1 and not fit.one_knob:
        each = ",".join(f"{name}={width}" for name, width in zip(swept, (4, 8, 16), strict=False))
        notes.append(f"{', '.join(swept)} share one width here; for widths of their own --fix {each}, or to choose among several a --precision "
                     f"NAME:{each} for each (in Python fix, precisions)")
    notes += budget.model.doubts_of(best.precision)
    spent = float(budget.cost(best.N, best.D, best.precision))
    if budget.compute is not None and spent < 0.999 * budget.compute:
        notes.append(f"{spent / budget.compute:.3g} of the budget is spent: " + ("N and D are given" if budget.N and budget.D else
                     "the law says that more tokens would raise the loss, or that memory ends the size"))
    limit = critical_tokens(fit.law, fit.params, best.N, best.precision)
    if limit is not None and best.D > limit * (1 + 1e-6):
        notes.append(f"D is {best.D / limit:.3g} times the critical {limit:.4g} tokens: fewer would give a lower loss")
    return notes


def _neutral(law: Law, name: str) -> float:
    return next((operand.neutral for operand in law.operands if operand.input == name), math.inf)


def _told(budget: Budget) -> str:
    """The limits of a budget in words."""
    limits = {"compute": "FLOP", "memory": "bytes", "N": "parameters", "D": "tokens"}
    told = [f"{name} {getattr(budget, name):g} {unit}" for name, unit in limits.items() if getattr(budget, name) is not None]
    return ", ".join(told + ([f"inference of {budget.inference_tokens:g} tokens"] if budget.inference_tokens else []))
