"""The solver: batched Levenberg-Marquardt on the robust objective from the starts of `scaling.starts`, in float64 numpy.

Objective: sum over rows of weight * Huber_delta(ln predicted - ln observed), plus the priors' penalty; the sum, not the mean, because
the mean made the published Chinchilla fit stop early (Besiroglu et al. 2024). delta = inf is least squares, a tiny one least absolute
deviations. Shapes: S starts, R rows, K terms, F coordinates.
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.optimize

from scaling.objective import Objective, Pull, huber, objective_of
from scaling.problem import Problem
from scaling.starts import POLISHED, candidates

MAX_ROUNDS = 400
COLD, WARM = 1e-2, 1e-3  # first damping: with less of it, fewer cold starts find the optimum; with more, refits take a round longer
STALLED = 1e-13  # relative gain of a round below which a start has stalled
SCIPY_ROUNDS = 2000
FEW, MORE = 3, 4  # where fewer starts than FEW agree, MORE times as many are polished
AGAIN = 8  # fresh starts beside a guess
EQUAL, APART = 1e-10, 1e-3  # relative difference of objectives that are one, and of coordinates that are two
MANY_ROWS = 3000
SOFT = 1e-3  # share of the IRLS curvature that keeps the Huber loss's own Hessian regular where few rows are within delta
ROUNDING = 1e-24  # objective of a row below which its residual is rounding (a relative error of 1e-12), as of runs made from the law itself
CONVERGED = 1e-7  # expected relative decrease of the objective by one more step, below which a fit has converged


@dataclass(frozen=True)
class Solution:
    """z: [F] coordinates; objective; gradient: largest |projected gradient| over the coordinates; decrease: expected relative
    decrease of the objective by one more full step (0 at the optimum); rounds; starts: polished; agree: of these, within 1e-6;
    ends: [agree, F] where they ended: a flat objective (an even number of runs per cell under a tiny delta) has many ends."""

    z: np.ndarray
    objective: float
    gradient: float
    decrease: float
    rounds: int
    starts: int
    agree: int
    ends: np.ndarray

    @property
    def converged(self) -> bool:
        return bool(self.decrease < CONVERGED)


def solve(problem: Problem, delta: float, guesses_SF: np.ndarray | None = None) -> Solution:
    """The best optimum found from the starts (and `guesses_SF`, coordinates to polish as well)."""
    starts = _starts(problem, delta)
    if guesses_SF is not None:
        starts = np.concatenate([starts, guesses_SF])
    if not len(starts):
        raise ValueError(f"law {problem.law.name}: no start gives a finite loss in all {problem.log_loss.size} rows; check the inputs' units")
    rounding = problem.log_loss.size * ROUNDING
    z_SF, objective, rounds = minimise(problem, starts, 1.0, delta)
    agree = _agreeing(objective, rounding)
    if agree < FEW and len(problem.nonlinear) > 2 and problem.law.combine is None:  # a rugged design: look further before believing it
        starts = np.concatenate([z_SF[[np.argmin(objective)]], candidates(problem, delta, MORE * POLISHED)])
        z_SF, objective, rounds = minimise(problem, starts, 1.0, delta)
        agree = _agreeing(objective, rounding)
    best = int(np.argmin(objective))
    ends = z_SF[objective <= objective[best] * (1.0 + 1e-6) + rounding]
    return _finished(problem, delta, z_SF[best], float(objective[best]), rounds, len(starts), ends)


def solve_again(problem: Problem, delta: float, guess_F: np.ndarray) -> Solution:
    """The same where the optimum of nearly the same problem is known: from there and from a few fresh starts, until FEW of them agree.
    Where they do not, the guess is one more start of `solve`. Where the objective is flat, so that any end is as good, the end is that of `solve`."""
    if problem.log_loss.size > MANY_ROWS:
        return solve(problem, delta, guess_F[None])
    starts = np.concatenate([guess_F[None], candidates(problem, delta, AGAIN)])
    z_SF, objective, rounds = minimise(problem, starts, 1.0, delta, enough=FEW)
    rounding = problem.log_loss.size * ROUNDING
    agreed = objective <= objective.min() * (1.0 + 1e-6) + rounding
    if not np.isfinite(objective).any() or agreed.sum() < FEW:
        return solve(problem, delta, guess_F[None])
    best, equal = int(np.argmin(objective)), objective <= objective.min() * (1.0 + EQUAL) + rounding
    if np.ptp(z_SF[equal], axis=0).max() > APART:
        return solve(problem, delta)
    return _finished(problem, delta, z_SF[best], float(objective[best]), rounds, len(starts), z_SF[agreed])


def _finished(problem: Problem, delta: float, z: np.ndarray, lowest: float, rounds: int, starts: int, ends: np.ndarray) -> Solution:
    """The best end, after what is left to do from there, with what is said about it."""
    if rounds == MAX_ROUNDS:  # the curved valley of a design that identifies little can take a thousand
        (z,), (lowest,), more = minimise(problem, z[None], 1.0, delta, rounds=5 * MAX_ROUNDS)
        rounds += more
    gradient, decrease = stationarity(problem, z, delta)
    if decrease >= CONVERGED:
        z, lowest = by_scipy(problem, z, delta)
        gradient, decrease = stationarity(problem, z, delta)
    return Solution(z, float(lowest), gradient, decrease, rounds, starts, len(ends), ends)


def _starts(problem: Problem, delta: float) -> np.ndarray:
    """The starts; of more than MANY_ROWS, the MORE lowest ends of a fit of every k-th row, which spares most of the work on all."""
    count = problem.log_loss.size
    if count <= MANY_ROWS:
        return candidates(problem, delta)
    few = problem.rows(np.arange(0, count, -(-count // MANY_ROWS)))
    ends, objective, _ = minimise(few, candidates(few, delta), 1.0, delta)
    return problem.centred(few.plain(ends[np.argsort(objective, kind="stable")[:MORE]])) if len(ends) else ends


def _agreeing(objective: np.ndarray, rounding: float) -> int:
    """How many starts ended within 1e-6 of the best, or within what rounding makes of runs that lie on the law."""
    return int(np.sum(objective <= objective.min() * (1.0 + 1e-6) + rounding))


def by_scipy(problem: Problem, z_F: np.ndarray, delta: float) -> tuple[np.ndarray, float]:
    """SciPy's L-BFGS-B from z_F with the exact gradient: the fallback where Levenberg-Marquardt stalls, and the independent check.

    -> the better of its end and z_F, and the objective there.
    """
    low, high = problem.bounds()
    own = problem.row_weights

    def value_and_slope(z_F):
        residuals, jacobian = (part[0] for part in problem.jacobian(z_F[None]))
        if not np.isfinite(residuals).all():
            return 1e300, np.zeros_like(z_F)
        value = (own * huber(residuals, delta)).sum() + problem.penalty(z_F[None])[0]
        return value / start, ((own * np.clip(residuals, -delta, delta)) @ jacobian + problem.penalty_slopes(z_F[None])[0][0]) / start

    start = 1.0
    start = max(float(value_and_slope(z_F)[0]), 1e-300)  # scaled: an objective of 1e-3 would meet the default tolerances at once
    found = scipy.optimize.minimize(value_and_slope, z_F, jac=True, method="L-BFGS-B", bounds=list(zip(low, high, strict=True)),
                                    options={"ftol": 1e-15, "gtol": 1e-10, "maxiter": SCIPY_ROUNDS, "maxcor": 30})
    return (found.x, float(found.fun) * start) if found.fun < 1.0 else (z_F, start)


def minimise(problem: Problem, starts_SF: np.ndarray, weights_SR: np.ndarray | float, delta: float, rounds: int | None = None,
             enough: int | None = None, *, shift_SR: np.ndarray | None = None, prior_shift_SF: np.ndarray | None = None,
             pull: Pull | None = None, tolerance: float = STALLED, damping: float = COLD) -> tuple[np.ndarray, np.ndarray, int]:
    """Levenberg-Marquardt with two Hessians (see `_normal_equations`), all starts at once; of the two steps the lower one counts.
    -> [S, F], objective [S] with the pull, rounds used.

    weights_SR: row weights besides the problem's own, [S, R] or one number (a bootstrap resample is a row of counts). shift_SR: what each start
    adds to the observed ln losses (a resample of the residuals); prior_shift_SF: to the means of the priors. pull: what holds each start
    besides (a profile). A start leaves the batch when three rounds in a row improve it by less than `tolerance` relative. damping: the first,
    relative to the Hessian's diagonal; WARM where starts are near their optima. Steps are clipped to the bounds; a step that raises the
    objective is not taken. enough: all leave when the lowest one has and that many agree with it.
    """
    low, high = problem.bounds()
    z_SF = np.clip(starts_SF, low, high)
    posed = Objective(problem, delta, weights_SR, shift_SR, prior_shift_SF, pull)
    objective = posed.at(z_SF)
    damping, stalled = np.full(len(z_SF), damping), np.zeros(len(z_SF), dtype=int)
    active = np.flatnonzero(np.isfinite(objective))
    used, rounds = 0, MAX_ROUNDS if rounds is None else rounds
    while active.size and used < rounds:
        used += 1
        z, left = z_SF[active], posed.only(active)
        gradient, *hessians = _normal_equations(left, z, low, high)
        diagonal = np.einsum("sff->sf", hessians[0])
        floor = 1e-12 * diagonal.max(axis=1, keepdims=True) + 1e-300
        ridge = (damping[active, None] * (diagonal + floor) + floor)[:, :, None] * np.eye(z.shape[1])
        steps = [np.linalg.solve(hessian + ridge, gradient[:, :, None])[:, :, 0] for hessian in hessians]
        trials = [np.clip(z - step, low, high) for step in steps]
        trial, value = _lowest(trials, [left.at(trial) for trial in trials])
        better = value < objective[active]
        gain = np.where(better, (objective[active] - value) / objective[active].clip(1e-300), 0.0)
        z_SF[active[better]], objective[active[better]] = trial[better], value[better]
        damping[active] = np.clip(np.where(better, damping[active] * 0.2, damping[active] * 5.0), 1e-12, 1e12)
        stalled[active] = np.where(gain < tolerance, stalled[active] + 1, 0)
        active = active[stalled[active] < 3]
        if enough and stalled[np.argmin(objective)] >= 3 and np.sum(objective <= objective.min() * (1.0 + 1e-6)) >= enough:
            break
    return z_SF, objective, used


def _lowest(trials: list[np.ndarray], values: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(trial [S, F], objective [S]) of the lowest of the trials of every start."""
    trial, value = trials[0], values[0]
    for other, its in zip(trials[1:], values[1:], strict=True):
        lower = its < value
        trial, value = np.where(lower[:, None], other, trial), np.where(lower, its, value)
    return trial, value


def _normal_equations(posed: Objective, z_SF, low, high) -> tuple[np.ndarray, ...]:
    """Projected gradient [S, F] and Gauss-Newton Hessians [S, F, F]; coordinates held by a bound get an identity row.

    First that of IRLS, the curvature of parabolas that lie above the Huber losses: safe, but too large where few rows are within delta, so
    that its steps converge linearly (97 rounds on the Chinchilla points). Then, for a finite delta, that of the Huber loss itself, which has
    none outside delta (24 rounds with both).
    """
    problem, delta = posed.problem, posed.delta
    residuals_SR, jacobian_SRF = problem.jacobian(z_SF)
    if posed.shift is not None:
        residuals_SR = residuals_SR - posed.shift
    if not np.all(posed.weights):
        seen_SR = np.broadcast_to(posed.weights > 0.0, residuals_SR.shape)
        residuals_SR, jacobian_SRF = np.where(seen_SR, residuals_SR, 0.0), np.where(seen_SR[:, :, None], jacobian_SRF, 0.0)
    irls_SR = problem.row_weights * posed.weights
    if np.isfinite(delta):
        size = np.maximum(np.abs(residuals_SR), 1e-300)
        irls_SR = irls_SR * np.minimum(1.0, delta / size)
    weighted = np.asarray(irls_SR)[..., None] * jacobian_SRF
    gradient = np.einsum("srf,sr->sf", weighted, residuals_SR)
    hessians = [np.matmul(weighted.transpose(0, 2, 1), jacobian_SRF)]
    if np.isfinite(delta):
        own = np.where((size <= delta)[:, :, None], weighted, SOFT * weighted)
        hessians.append(np.matmul(own.transpose(0, 2, 1), jacobian_SRF))
    if problem.priors:
        first, second = problem.penalty_slopes(posed.from_shift(z_SF))
        gradient, hessians = gradient + first, [hessian + np.diag(second) for hessian in hessians]
    if posed.pull is not None:
        first, second = posed.pull.derivatives(z_SF)
        gradient, hessians = gradient + first, [hessian + second for hessian in hessians]
    held = ((z_SF <= low) & (gradient > 0)) | ((z_SF >= high) & (gradient < 0))
    gradient = np.where(held, 0.0, gradient)
    pair, identity = held[:, :, None] | held[:, None, :], np.eye(z_SF.shape[1])
    return gradient, *(np.where(pair, identity, hessian) for hessian in hessians)


def stationarity(problem: Problem, z_F: np.ndarray, delta: float) -> tuple[float, float]:
    """(largest |projected gradient|, expected relative decrease by one more undamped step) at z_F.

    Directions that the design does not see (1e-10 of the largest curvature) are left out: along them rounding noise promises any
    decrease. The condition number tells of them.
    """
    low, high = problem.bounds()
    gradient, hessian, *_ = _normal_equations(Objective(problem, delta), z_F[None], low, high)
    objective = objective_of(problem, z_F[None], delta)[0]
    gain = 0.5 * float(gradient[0] @ np.linalg.lstsq(hessian[0], gradient[0], rcond=1e-10)[0])
    return float(np.abs(gradient).max()), gain / max(float(objective), problem.log_loss.size * ROUNDING)
