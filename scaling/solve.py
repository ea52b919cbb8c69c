"""The solver: starts by variable projection, then batched Levenberg-Marquardt on the robust objective, in float64 numpy.

Objective: sum over rows of weight * Huber_delta(ln predicted - ln observed); the sum, not the mean, because the mean made the
published Chinchilla fit stop early (Besiroglu et al. 2024). Amplitudes are linear once the rest is known, so starts are a low-discrepancy
set over the nonlinear parameters alone with the amplitudes projected out, and every start has all of its terms alive: the "local
minima" of the published 4500-start recipe are starts with a dead term. Shapes: S starts, R rows, K terms, F coordinates.
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from scaling.problem import Problem

NUM_STARTS = {1: 256, 2: 1024}
MANY_STARTS = 4096  # more than two nonlinear parameters
POLISHED = 16
MAX_ROUNDS = 400
CHUNK = 4_000_000  # numbers per array: 32 MB


@dataclass(frozen=True)
class Solution:
    """z: [F] coordinates; objective; gradient: largest |projected gradient| over the coordinates; decrease: expected relative
    decrease of the objective by one more full step (0 at the optimum); rounds; starts: polished; agree: of these, within 1e-6."""

    z: np.ndarray
    objective: float
    gradient: float
    decrease: float
    rounds: int
    starts: int
    agree: int

    @property
    def converged(self) -> bool:
        return bool(self.decrease < 1e-7)


def huber(residuals: np.ndarray, delta: float) -> np.ndarray:
    """r^2/2 within delta, delta(|r| - delta/2) outside (scipy.special.huber); delta = inf is least squares."""
    size = np.abs(residuals)
    if np.isinf(delta):
        return 0.5 * size * size
    return np.where(size <= delta, 0.5 * size * size, delta * (size - 0.5 * delta))


def solve(problem: Problem, delta: float, guesses_SF: np.ndarray | None = None) -> Solution:
    """The best optimum found from the starts (and `guesses_SF`, coordinates to polish as well)."""
    starts = candidates(problem, delta)
    if guesses_SF is not None:
        starts = np.concatenate([starts, guesses_SF])
    if not len(starts):
        raise ValueError(f"law {problem.law.name}: no start gives a finite loss in all {problem.log_loss.size} rows; check the inputs' units")
    z_SF, objective, rounds = minimise(problem, starts, np.ones((1, problem.log_loss.size)), delta)
    best = int(np.argmin(objective))
    agree = int(np.sum(objective <= objective[best] * (1.0 + 1e-6) + 1e-300))
    z, lowest = z_SF[best], float(objective[best])
    if rounds == MAX_ROUNDS:  # the curved valley of a design that identifies little can take a thousand
        ones = np.ones((1, problem.log_loss.size))
        (z,), (lowest,), more = minimise(problem, z[None], ones, delta, rounds=5 * MAX_ROUNDS)
        rounds += more
    gradient, decrease = stationarity(problem, z, delta)
    return Solution(z, float(lowest), gradient, decrease, rounds, len(starts), agree)


def low_discrepancy(count: int, dims: int) -> np.ndarray:
    """[count, dims] points of the additive recurrence in the unit cube (R. Roberts' R_d: powers of the generalised golden ratio)."""
    ratio = 2.0
    for _ in range(60):
        ratio = (1.0 + ratio) ** (1.0 / (dims + 1))
    steps = ratio ** -np.arange(1.0, dims + 1.0)
    return (0.5 + np.arange(1, count + 1)[:, None] * steps) % 1.0


def candidates(problem: Problem, delta: float) -> np.ndarray:
    """[<= POLISHED, F]: the best half by objective, the rest spread over the ranks, so that agreement means something."""
    low, high = problem.bounds()
    dims = len(problem.nonlinear)
    count = NUM_STARTS.get(dims, MANY_STARTS) if dims else 1
    z_SF = np.zeros((count, len(problem.free)))
    if dims:
        index = [problem.free.index(name) for name in problem.nonlinear]
        z_SF[:, index] = low[index] + (high - low)[index] * low_discrepancy(count, dims)
    size = max(1, CHUNK // (problem.log_loss.size * len(problem.law.amplitudes)))
    scored = [_project(problem, z_SF[at:at + size], delta, low, high) for at in range(0, count, size)]
    z_SF, objective = (np.concatenate(parts) for parts in zip(*scored, strict=True))
    order = np.argsort(objective, kind="stable")[:int(np.isfinite(objective).sum())]
    half = POLISHED // 2
    spread = order[half::max(1, (len(order) - half) // half)][:half]
    return z_SF[np.concatenate([order[:half], spread])]


def _project(problem: Problem, z_SF: np.ndarray, delta: float, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fills in amplitudes by weighted linear least squares (weights 1/loss: the log residual to first order) and scores by objective.

    A negative amplitude is replaced by a small live one (a hundredth of the mean loss) instead of being thrown away: the
    polish can take the term to zero, but cannot bring a dead one back.
    """
    index = [problem.free.index(name) for name in problem.amplitudes]
    with np.errstate(all="ignore"):
        logs_SKR = problem.log_terms(problem.theta(z_SF))
        scaled_SKR = np.exp(logs_SKR - problem.centre(logs_SKR)[:, :, None] - problem.log_loss)
        free = np.array([name in problem.amplitudes for name in problem.law.amplitudes])
        known = sum((problem.fixed[name] * scaled_SKR[:, k] for k, name in enumerate(problem.law.amplitudes) if not free[k]), 0.0)
        basis_SKR = scaled_SKR[:, free]
        usable = np.isfinite(basis_SKR).all(axis=(1, 2))
        basis_SKR[~usable] = 0.0
        gram = np.einsum("skr,slr->skl", basis_SKR, basis_SKR)
        ridge = 1e-12 * np.einsum("skk->s", gram)[:, None, None] * np.eye(len(index)) + 1e-300 * np.eye(len(index))
        right = np.einsum("skr,sr->sk", basis_SKR, np.broadcast_to(1.0 - known, (len(z_SF), problem.log_loss.size)))
        solved = np.linalg.solve(gram + ridge, right[:, :, None])[:, :, 0]
    live = 0.01 * np.exp(problem.log_loss).mean()
    z_SF[:, index] = np.log(np.where(solved > 0.0, solved, live))
    z_SF = np.clip(z_SF, low, high)
    objective = huber(problem.residuals(z_SF), delta).sum(axis=1)
    return z_SF, np.where(usable, objective, np.inf)


def minimise(problem: Problem, starts_SF: np.ndarray, weights_SR: np.ndarray, delta: float,
             rounds: int | None = None) -> tuple[np.ndarray, np.ndarray, int]:
    """Levenberg-Marquardt on iteratively reweighted squares, all starts at once. -> [S, F], objective [S], rounds used.

    weights_SR: row weights, [S, R] or [1, R] (a bootstrap resample is a row of counts). A start leaves the batch when three rounds in
    a row improve it by less than 1e-13 relative. Steps are clipped to the bounds; a step that raises the objective is not taken.
    """
    low, high = problem.bounds()
    z_SF = np.clip(starts_SF, low, high)
    weights_SR = np.broadcast_to(weights_SR, (len(z_SF), problem.log_loss.size))
    objective = (weights_SR * huber(problem.residuals(z_SF), delta)).sum(axis=1)
    damping, stalled = np.full(len(z_SF), 1e-2), np.zeros(len(z_SF), dtype=int)
    active = np.flatnonzero(np.isfinite(objective))
    used, rounds = 0, MAX_ROUNDS if rounds is None else rounds
    while active.size and used < rounds:
        used += 1
        z, w = z_SF[active], weights_SR[active]
        gradient, hessian = _normal_equations(problem, z, w, delta, low, high)
        diagonal = np.einsum("sff->sf", hessian)
        floor = 1e-12 * diagonal.max(axis=1, keepdims=True) + 1e-300
        damped = hessian + (damping[active, None] * (diagonal + floor) + floor)[:, :, None] * np.eye(z.shape[1])
        step = np.linalg.solve(damped, gradient[:, :, None])[:, :, 0]
        trial = np.clip(z - step, low, high)
        value = (w * huber(problem.residuals(trial), delta)).sum(axis=1)
        better = value < objective[active]
        gain = np.where(better, (objective[active] - value) / objective[active].clip(1e-300), 0.0)
        z_SF[active[better]], objective[active[better]] = trial[better], value[better]
        damping[active] = np.clip(np.where(better, damping[active] * 0.2, damping[active] * 5.0), 1e-12, 1e12)
        stalled[active] = np.where(gain < 1e-13, stalled[active] + 1, 0)
        active = active[stalled[active] < 3]
    return z_SF, objective, used


def _normal_equations(problem: Problem, z_SF, weights_SR, delta, low, high) -> tuple[np.ndarray, np.ndarray]:
    """Projected gradient [S, F] and IRLS Gauss-Newton Hessian [S, F, F]; coordinates held by a bound get an identity row."""
    residuals_SR, jacobian_SRF = problem.jacobian(z_SF)
    size = np.maximum(np.abs(residuals_SR), 1e-300)
    irls_SR = weights_SR * np.minimum(1.0, delta / size)
    weighted = irls_SR[:, :, None] * jacobian_SRF
    gradient = np.einsum("srf,sr->sf", weighted, residuals_SR)
    hessian = np.matmul(weighted.transpose(0, 2, 1), jacobian_SRF)
    held = ((z_SF <= low) & (gradient > 0)) | ((z_SF >= high) & (gradient < 0))
    gradient = np.where(held, 0.0, gradient)
    hessian = np.where(held[:, :, None] | held[:, None, :], np.where(np.eye(z_SF.shape[1], dtype=bool), 1.0, 0.0), hessian)
    return gradient, hessian


def stationarity(problem: Problem, z_F: np.ndarray, delta: float) -> tuple[float, float]:
    """(largest |projected gradient|, expected relative decrease by one more undamped step) at z_F.

    Directions that the design does not see (1e-10 of the largest curvature) are left out: along them rounding noise promises any
    decrease. The condition number tells of them.
    """
    low, high = problem.bounds()
    weights = np.ones((1, problem.log_loss.size))
    gradient, hessian = _normal_equations(problem, z_F[None], weights, delta, low, high)
    objective = huber(problem.residuals(z_F[None]), delta).sum()
    gain = 0.5 * float(gradient[0] @ np.linalg.lstsq(hessian[0], gradient[0], rcond=1e-10)[0])
    return float(np.abs(gradient).max()), gain / max(float(objective), 1e-300)
