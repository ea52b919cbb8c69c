"""What to train next, and when to stop, for one question: the decisions of `bitlaw answer`. Pure: cells and fits in, cells and verdicts out.

A cell is a run that could be trained: the inputs of the law there and what it costs. A question is a number that follows from a law's
constants, and how narrow its interval has to be. `first` chooses a design before there is a law, `propose` by what each cell is expected
to do for the interval per unit of its cost (`scaling.design`), `verdict` says what a fit answers and whether that is narrow enough.

Of many looks, the one that stops is the one whose residuals happened to be small: a search that ends at its first narrow 95 % interval
is right less often (docs/answer.md has the numbers). So the intervals here are the 98 % ones, stated as 95 %: PRICE is the share of a
single look's tail that they leave out.
"""
from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from scaling.design import next_runs
from scaling.laws import Law
from scaling.result import Fit

MOST = 8  # runs of a round: enough to fill a cohort, few enough that the next fit still has a say
ROUND_SHARE = 0.25  # of what is left of the budget that a round may take
FIRST_SHARE = 0.5  # of the budget that the first design may take
PRICE = 0.4  # of the tail of a single look that an interval leaves out when the first narrow one ends the search
SPARE = 2  # runs of the first design beyond the constants of the law
LOSSES = ("loss", "loss_gap", "irreducible_loss")  # in the law's own unit
UNITS = {"optimal_params": "parameters", "optimal_tokens_per_param": "tokens per parameter", "critical_tokens": "tokens"}


@dataclass(frozen=True)
class Cell:
    """A run that could be trained. key: by which whoever trains knows it; columns: inputs of a law; cost: seconds, or FLOP; setup: the same
    unit, spent once on all cells of the same `program`: compiling."""

    key: str
    columns: Mapping[str, float | str]
    cost: float
    program: Hashable = None
    setup: float = 0.0


def total_cost(cells: Sequence[Cell]) -> float:
    """Of training these cells together: every run, and every program once."""
    return sum(cell.cost for cell in cells) + sum({cell.program: cell.setup for cell in cells}.values())


@dataclass(frozen=True)
class Question:
    """quantity: a constant or functional of a law, or "loss", at `at`. until: half-width of its interval below which it is answered, in
    the unit of the quantity, or, with `relative`, as a share of its value."""

    quantity: str
    at: Mapping[str, float]
    until: float
    relative: bool = False


@dataclass(frozen=True)
class Verdict:
    """What one fit says. low, high: the interval, which covers at `level` also when it is the first narrow one. half_width: (high
    - low)/2; limit: below which it is narrow, both in the quantity's unit. reason: why the fit does not tell the quantity, empty
    when it does. law: label of the fit; runs: its rows."""

    value: float
    low: float
    high: float
    limit: float
    reason: str
    law: str
    runs: int
    level: float = 0.95

    @property
    def half_width(self) -> float:
        return 0.5 * (self.high - self.low)

    @property
    def narrow(self) -> bool:
        return not self.reason and self.half_width < self.limit

    def __str__(self) -> str:
        return self.reason or f"{self.value:.4g}, {self.level:.0%} interval {self.low:.4g} to {self.high:.4g}, half-width {self.half_width:.3g}"


def check_quantity(question: Question, laws: Sequence[Law]) -> tuple[Question, str]:
    """The question as these laws take it, and a remark. An input in `at` that the laws know and this quantity does not depend on is left
    out, and the remark says so. ValueError, one line, for an unknown quantity, or an `at` that lacks an input or has an unknown one.
    """
    name, at = question.quantity, dict(question.at)
    law = next((law for law in laws if name == "loss" or name in law.names or name in law.functionals), None)
    if law is None:
        known = dict.fromkeys(itertools.chain(["loss"], *((*law.functionals, *law.names) for law in laws)))
        raise ValueError(f"{name!r} is no quantity of law {laws[0].name}; it has {', '.join(known)}")
    needed, accepted = _takes(law, name)
    known = {*law.inputs, *itertools.chain.from_iterable(_takes(law, one)[1] for one in law.functionals)}
    unknown = next((key for key in at if key not in accepted and key not in known), None)
    missing = [key for key in needed if key not in at]
    if unknown or missing:
        what = f"--at {unknown}={at[unknown]:g}: unknown" if unknown else f"{name} needs --at {','.join(f'{key}=...' for key in missing)}"
        raise ValueError(f"{what}; {name} of law {law.name} takes {', '.join(accepted) or 'nothing'}")
    unused = [key for key in at if key not in accepted]
    remark = f"{name} of law {law.name} does not depend on {', '.join(unused)}" if unused else ""
    return replace(question, at={key: value for key, value in at.items() if key in accepted}), remark


def _takes(law: Law, name: str) -> tuple[list[str], list[str]]:
    """(names that the quantity needs, names that it accepts)."""
    if name == "loss":
        return [column for column in law.inputs if column not in law.optional], list(law.inputs)
    if name not in law.functionals:
        return [], []
    parameters = list(inspect.signature(law.functionals[name]).parameters.values())[1:]
    free = any(p.kind is p.VAR_KEYWORD for p in parameters)
    named = [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    more = [column for column in law.inputs if column not in ("N", "D")] if free else []
    return [p.name for p in named if p.default is p.empty], [p.name for p in named] + more


def unit(question: Question, law: Law) -> str:
    """The unit of the quantity; "" for what has none, or of which none is known."""
    answered = law.answers.get(question.quantity, "")
    if answered.endswith("_bits") or question.quantity.endswith("_bits"):
        return "bits"
    if question.quantity in LOSSES:
        return law.unit
    return law.parameter(question.quantity).unit if question.quantity in law.names else UNITS.get(question.quantity, "")


def verdict(fit: Fit, question: Question) -> Verdict:
    """What the fit answers, with the interval of a search that may stop here (PRICE). The interval of "loss" is that of the law's
    value with the law's discrepancy where `at` is out of range; it is refused (ValueError) more than 30 times out of it."""
    promised, fit = fit.level, replace(fit, level=1.0 - PRICE * (1.0 - fit.level))
    if question.quantity == "loss":
        predicted = fit.predict(**question.at)
        beyond = fit.quantile * float(fit.discrepancy_at(predicted.extrapolated))
        half_width = math.hypot(math.log(float(predicted.mean_high / predicted.loss)), beyond)
        value = float(predicted.loss)
        low, high, reason = value * math.exp(-half_width), value * math.exp(half_width), ""
    else:
        estimate = fit.estimate(question.quantity, **question.at)
        value, low, high, reason = estimate.value, estimate.low, estimate.high, estimate.reason
    # a loss within the data is the other constants' too
    held = "" if question.quantity == "loss" else fit.on_bound(fit.quantity(question.quantity, question.at)[0])
    if held:
        reason = reason or f"not identified by this design ({question.quantity} follows from {held}, which ended on its bound)"
    if not all(map(math.isfinite, (value, low, high))):
        reason = reason or f"not identified by this design (interval {low:.3g} to {high:.3g})"
    limit = question.until * abs(value) if question.relative else question.until
    return Verdict(float(value), float(low), float(high), limit, reason, fit.label, int(fit.metrics["rows"]), promised)


def first(cells: Sequence[Cell], count: int, budget: float) -> list[Cell]:
    """A design to begin with: corners and middle of the axes, then whatever lies farthest from what is chosen, `count` cells at least. Of
    the expensive cells so many are left out that the rest takes half of the budget, or, where that cannot be, all of it; [] when the
    budget does not carry `count` cells."""
    for share in (FIRST_SHARE, 1.0):
        for dearest in sorted({cell.cost for cell in cells}, reverse=True):
            affordable = [cell for cell in cells if cell.cost <= dearest]
            chosen = spread_out(affordable, [], count, corners=True)
            if len(chosen) >= min(count, len(cells)) and total_cost(chosen) <= share * budget:
                return chosen
    return []


def spread_out(cells: Sequence[Cell], there: Sequence[Mapping], count: int, corners: bool = False) -> list[Cell]:
    """`count` cells far from each other and from the columns of runs that are `there`: each the farthest from its nearest neighbour so far
    (Kennard and Stone 1969), on the ranks of the values along every axis. corners: begin with the cells nearest to all corners and the middle."""
    if not cells:
        return []
    points_CA, there_TA = _ranks(cells, there)
    chosen: list[int] = []
    targets = [np.full(points_CA.shape[1], 0.5)]
    if corners and points_CA.shape[1] <= 4:
        targets = [np.array(corner) for corner in itertools.product((0.0, 1.0), repeat=points_CA.shape[1])] + targets
    if corners or not there:
        for target in targets:
            nearest = int(np.argmin(((points_CA - target) ** 2).sum(axis=1)))
            if nearest not in chosen:
                chosen.append(nearest)
    while len(chosen) < min(count, len(cells)):
        taken_TA = np.concatenate([there_TA, points_CA[chosen]])
        distance_C = ((points_CA[:, None] - taken_TA[None]) ** 2).sum(axis=2).min(axis=1)
        distance_C[chosen] = -1.0  # a second seed is better than the same run again
        chosen.append(int(np.argmax(distance_C)))
    return [cells[i] for i in chosen]


def _ranks(cells: Sequence[Cell], there: Sequence[Mapping]) -> tuple[np.ndarray, np.ndarray]:
    """[C, A] and [T, A]: places of the values of each axis that varies, 0 to 1; axes that always move together count once."""
    rows = [cell.columns for cell in cells] + list(there)
    found = []
    for name in cells[0].columns:
        levels = sorted({row[name] for row in rows})
        places = tuple(levels.index(row[name]) / max(len(levels) - 1, 1) for row in rows)
        if len(levels) > 1 and places not in found:
            found.append(places)
    points = np.array(found).T.reshape(len(rows), len(found))
    return points[:len(cells)], points[len(cells):]


def propose(fit: Fit, question: Question, cells: Sequence[Cell], there: Sequence[Mapping], budget: float) -> list[Cell]:
    """The cells of the next round, from those not trained yet; [] when none can be paid from what is left of the budget.

    One after the other, each by the most that the interval is expected to shrink per unit of cost given those before it, until the
    expected half-width is well below the limit, the round takes a quarter of the budget, or has MOST runs. Where the fit cannot say what a
    run would do (a constant without a finite error, or on its bound), cells far from those that are `there` are taken instead.
    """
    affordable = [cell for cell in cells if total_cost([cell]) <= budget]
    if not affordable:
        return []
    now = verdict(fit, question)
    try:
        ranked = next_runs(fit, [cell.columns for cell in affordable], question.quantity, at=question.at, again=False,
                           cost=[cell.cost for cell in affordable], shared=[(cell.program, cell.setup) for cell in affordable],
                           count=min(MOST, len(affordable)))
    except ValueError:  # the linearised model has nothing to say
        ranked = []
    if not ranked or not ranked[0].half_width < ranked[0].before:
        order, expected = spread_out(affordable, there, MOST), [math.inf] * MOST
    else:
        order, expected = [affordable[one.index] for one in ranked], [one.half_width for one in ranked]
    goal = 0.0 if now.reason else 0.8 * now.limit * min(1.0, ranked[0].before / now.half_width) if ranked else 0.0
    chosen = []
    for cell, half_width in zip(order, expected, strict=False):
        if chosen and total_cost([*chosen, cell]) > max(ROUND_SHARE * budget, total_cost(chosen[:1])):
            break
        chosen.append(cell)
        if half_width <= goal:
            break
    return chosen
