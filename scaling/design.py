"""Which runs to train next: how much a candidate is expected to shrink the interval of one quantity, per unit of what it costs.

In the coordinates of a fit, scatter W W' is the covariance s^2 (J'J)^-1 of its constants (times the price of a Huber loss, see
`scaling.uncertainty`). A further run at x adds the row g = d ln L(x)/d coordinates, and a scalar quantity q with gradient h has then the
variance of the linearised normal model (Fedorov 1972, "Theory of Optimal Experiments"; MacKay 1992, "Information-based objective
functions", section 4):

    var = |W'h|^2   becomes   |W'h|^2 - (W'h . W'g)^2 / (s^2 + |W'g|^2)

The loss that the run will have does not enter: only where it lies does. Both W'h and W'g are central differences along the columns of W,
one tenth of a standard deviation to each side, so the law and the quantity may be any functions.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from scaling.costs import cost_model
from scaling.problem import constants
from scaling.result import Fit
from scaling.uncertainty import huber_price

STEP = 0.1  # standard deviations
SILENT = 1e-9  # relative: what differences leave of a half-width that a run does not change

Quantity = str | Callable[[Mapping[str, float]], float]


@dataclass(frozen=True)
class Suggestion:
    """One run to train. columns: N (parameters), D (tokens), bits. cost: in the caller's unit (seconds or FLOP). half_width: of the
    quantity's interval, in its own unit, expected once this run and those suggested before it are there; before: without this one.
    index: its place among the candidates. gain: (before - half_width)/cost, the quantity's unit per unit of cost."""

    columns: Mapping[str, float]
    cost: float
    before: float
    half_width: float
    index: int

    @property
    def gain(self) -> float:
        return (self.before - self.half_width) / self.cost


def next_runs(fit: Fit, candidates: Sequence[Mapping[str, float]], quantity: Quantity, *, at: Mapping[str, float] | None = None,
              cost: Sequence[float] | Callable[[Mapping], float] | None = None, shared: Sequence[tuple[Hashable, float]] | None = None,
              count: int | None = None, again: bool = True) -> list[Suggestion]:
    """Candidates by the expected reduction of the interval of `quantity` per unit of cost, the best first.

    candidates: law inputs of each run that could be trained: {"N": 1e6, "D": 2e7, "weights_bits": 4}. quantity: a constant or
    functional of the law at `at` ("optimal_bits", "optimal_params" at {"compute": 1e21}), "loss" (nats per token, predicted at `at`), or
    a function of the constants. cost: one number for each candidate, or a function of its inputs, in seconds or FLOP; 6 N D FLOP when
    not given. shared: for each candidate (what, cost), a cost on top that those of the same `what` pay once together, as the compiling of a
    program. count: None ranks each candidate by itself; a number chooses that many one after the other, each given those before it
    (a candidate may be chosen again, as another seed, unless `again` is False).

    ValueError, one line: no candidates, a cost that is not positive, a quantity that the fit does not have, that is a name or not finite, or of
    which no candidate can tell anything, or a fit whose design leaves a direction without any variance estimate.
    """
    if not candidates:
        raise ValueError("next_runs: candidates is empty; give at least one run that could be trained, as a mapping of inputs")
    if count is not None and not count >= 1:
        raise ValueError(f"next_runs: count={count}: need at least 1, or None to rank every candidate")
    if fit.metrics["base"]:
        raise ValueError(f"next_runs: {fit.label} was fitted in two stages (base {fit.metrics['base']}), so that a run tells its own stage alone; "
                         "fit without base")
    if not np.isfinite(fit.scatter).all():
        raise ValueError(f"next_runs: {fit.label} has constants without a finite standard error (condition number "
                         f"{fit.metrics['condition_number']:.1e}): its rows must first identify every constant at all")
    costs = _costs(candidates, cost)
    owners, once_C = ([owner for owner, _ in shared], np.array([extra for _, extra in shared])) if shared else (None, np.zeros(len(candidates)))
    target_K = _slopes(fit, _function(fit, quantity, dict(at or {})), lambda _: f"quantity {quantity}")
    rows_CK = _rows(fit, candidates)
    noise = _run_variance(fit)
    covariance_KK = np.eye(len(target_K))  # in units of the fit's standard deviations: before any new run
    _refuse_silent(fit, quantity, dict(at or {}), *_expected(fit, target_K, rows_CK, covariance_KK, noise))
    if count is None:
        before, after_C = _expected(fit, target_K, rows_CK, covariance_KK, noise)
        costs = costs + once_C
        order = np.argsort(-(before - after_C) / costs, kind="stable")
        return [Suggestion(dict(candidates[i]), float(costs[i]), before, float(after_C[i]), int(i)) for i in order]
    chosen = []
    left_C = np.ones(len(candidates), dtype=bool)
    for _ in range(count if again else min(count, len(candidates))):
        before, after_C = _expected(fit, target_K, rows_CK, covariance_KK, noise)
        best = int(np.argmax(np.where(left_C, (before - after_C) / (costs + once_C), -np.inf)))
        left_C[best] = again
        chosen.append(Suggestion(dict(candidates[best]), float(costs[best] + once_C[best]), before, float(after_C[best]), best))
        if owners:
            once_C = np.where([owner == owners[best] for owner in owners], 0.0, once_C)
        towards_K = covariance_KK @ rows_CK[best]
        covariance_KK = covariance_KK - np.outer(towards_K, towards_K) / (noise + rows_CK[best] @ towards_K)
    return chosen


def _expected(fit: Fit, target_K: np.ndarray, rows_CK: np.ndarray, covariance_KK: np.ndarray, noise: float) -> tuple[float, np.ndarray]:
    """Half-width of the quantity's interval now, and [C] after each candidate alone."""
    towards_CK = rows_CK @ covariance_KK
    now = float(target_K @ covariance_KK @ target_K)
    shrunk_C = (towards_CK @ target_K) ** 2 / (noise + np.einsum("ck,ck->c", towards_CK, rows_CK))
    return fit.quantile * math.sqrt(now), fit.quantile * np.sqrt(np.maximum(now - shrunk_C, 0.0))


def _refuse_silent(fit: Fit, quantity: Quantity, at: dict, before: float, after_C: np.ndarray) -> None:
    """ValueError when no candidate shrinks the half-width of the quantity: also where none of the constants that have an error moves it."""
    if np.any(before - after_C > SILENT * before):
        return
    told = f"no candidate is expected to shrink its half-width, {before:.4g}" if before else "no constant with an error moves it near this fit"
    reason = "" if quantity == "loss" else fit.estimate(quantity, **({} if callable(quantity) else at)).reason
    raise ValueError(f"next_runs: no candidate can tell anything of {getattr(quantity, '__name__', quantity)}: {told}{reason and f' ({reason})'}")


def _run_variance(fit: Fit) -> float:
    """Variance of ln loss of one further run about the law, as the fit weighs it: s^2 times the price of its Huber loss."""
    delta = math.inf if fit.metrics["loss"] == "least_squares" else float(fit.metrics["delta"])
    deviation = float(fit.metrics["residual_sd"])
    return deviation**2 * huber_price(delta, deviation)


def _costs(candidates: Sequence[Mapping], cost) -> np.ndarray:
    """[C], positive and finite."""
    if cost is None:
        short = next((candidate for candidate in candidates if not {"N", "D"} <= set(candidate)), None)
        if short is not None:
            raise ValueError(f"next_runs: candidate {dict(short)}: needs N and D for a cost of 6 N D FLOP; or give cost")
        model = cost_model("flops")
        costs = [model.training(candidate["N"], candidate["D"]) for candidate in candidates]
    else:
        costs = [cost(candidate) for candidate in candidates] if callable(cost) else list(cost)
    costs = np.asarray(costs, dtype=np.float64)
    if costs.shape != (len(candidates),):
        raise ValueError(f"next_runs: {costs.size} costs for {len(candidates)} candidates: give one for each")
    bad = np.flatnonzero(~((costs > 0) & np.isfinite(costs)))
    if bad.size:
        raise ValueError(f"next_runs: the cost of candidate {dict(candidates[bad[0]])} is {costs[bad[0]]:g}: need a positive finite number")
    return costs


def _function(fit: Fit, quantity: Quantity, at: dict) -> Callable[[Mapping], float]:
    """params -> the quantity."""
    if callable(quantity):
        return quantity
    if quantity == "loss":
        return lambda p: float(fit.law.predict(p, **at))
    function, _ = fit.quantity(quantity, at)
    named = function(fit.params)
    if isinstance(named, str):
        raise ValueError(f"next_runs: quantity {quantity} is a name ({named}), which has no interval to shrink; give a constant, or "
                         "a functional that is a number")
    return lambda p: float(function(p))


def _rows(fit: Fit, candidates: Sequence[Mapping]) -> np.ndarray:
    """[C, K]: slopes of ln loss at every candidate; those with the same inputs are predicted at once."""
    rows_CK = np.zeros((len(candidates), fit.scatter.shape[1]))
    for names in dict.fromkeys(tuple(candidate) for candidate in candidates):
        there = [i for i, candidate in enumerate(candidates) if tuple(candidate) == names]
        columns = {name: np.array([candidates[i][name] for i in there]) for name in names}
        rows_CK[there] = _slopes(fit, lambda p, columns=columns: np.log(fit.law.predict(p, **columns)),
                                 lambda i: f"candidate {dict(candidates[there[i]])}").T
    return rows_CK


def _slopes(fit: Fit, function: Callable[[Mapping], float | np.ndarray], what: Callable[[int], str]) -> np.ndarray:
    """[K], or [K, C] of a function with C values: change of `function` per standard deviation along each column of the scatter. ValueError
    when value i is not finite, which what(i) names."""
    def value(coordinates: np.ndarray) -> float | np.ndarray:
        return function(constants(fit.law, fit.free, fit.ties, fit.fixed, coordinates))

    with np.errstate(all="ignore"):
        slopes = np.array([value(fit.coordinates + STEP * column) - value(fit.coordinates - STEP * column) for column in fit.scatter.T]) / (2 * STEP)
    bad = ~np.isfinite(slopes).all(axis=0)
    if bad.any():
        raise ValueError(f"next_runs: {what(int(np.argmax(bad)))} is not finite near the fitted constants: the law diverges there")
    return slopes
