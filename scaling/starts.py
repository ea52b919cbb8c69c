"""Where fits start. Every start has all of its terms alive: the "local minima" of the published 4500-start recipe are dead terms.

A plain sum of terms is linear in its amplitudes, so its starts are a low-discrepancy set over the nonlinear parameters alone, with the
amplitudes projected out. Where terms make the loss in another way, starts are Sobol points in a box of all coordinates: amplitudes are
there as centred logs, so the box is small (2000 of 2000 random starts in such a box reach the Chinchilla optimum).
Shapes: S starts, R rows, K terms, F coordinates.
"""
from __future__ import annotations

import numpy as np

from scaling.objective import objective_of
from scaling.problem import Problem

NUM_STARTS = {1: 256, 2: 512}
MANY_STARTS = 4096  # more than two nonlinear parameters
POLISHED = 16
BOX_STARTS, BOX_POLISHED = 1024, 48  # of a law that is no plain sum
CHUNK = 4_000_000  # numbers per array: 32 MB


def low_discrepancy(count: int, dims: int) -> np.ndarray:
    """[count, dims] points of the additive recurrence in the unit cube (R. Roberts' R_d: powers of the generalised golden ratio)."""
    ratio = 2.0
    for _ in range(60):
        ratio = (1.0 + ratio) ** (1.0 / (dims + 1))
    steps = ratio ** -np.arange(1.0, dims + 1.0)
    return (0.5 + np.arange(1, count + 1)[:, None] * steps) % 1.0


def candidates(problem: Problem, delta: float, polished: int | None = None) -> np.ndarray:
    """[<= polished, F]: the best half by objective, the rest spread over the ranks, so that agreement means something."""
    if problem.law.combine is not None:
        return _in_a_box(problem, delta, polished or BOX_POLISHED)
    low, high = problem.bounds()
    dims = len(problem.nonlinear)
    count = NUM_STARTS.get(dims, MANY_STARTS) if dims else 1
    z_SF = np.zeros((count, len(problem.free)))
    if dims:
        index = [problem.free.index(name) for name in problem.nonlinear]
        box_low, box_high = problem.box()
        z_SF[:, index] = box_low[index] + (box_high - box_low)[index] * low_discrepancy(count, dims)
    size = max(1, CHUNK // (problem.log_loss.size * len(problem.law.amplitudes)))
    scored = [_project(problem, z_SF[at:at + size], delta, low, high) for at in range(0, count, size)]
    z_SF, objective = (np.concatenate(parts) for parts in zip(*scored, strict=True))
    return _best_and_spread(z_SF, objective, polished or POLISHED)


def _best_and_spread(z_SF: np.ndarray, objective: np.ndarray, count: int) -> np.ndarray:
    """At most `count` starts of finite objective: half of them the best, half spread over the ranks."""
    order = np.argsort(objective, kind="stable")[:int(np.isfinite(objective).sum())]
    half = count // 2
    spread = order[half::max(1, (len(order) - half) // half)][:half]
    return z_SF[np.concatenate([order[:half], spread])]


def _in_a_box(problem: Problem, delta: float, polished: int) -> np.ndarray:
    """Starts of a law that is no plain sum: scrambled Sobol points (fixed seed) over all coordinates."""
    from scipy.stats.qmc import Sobol  # half a second to import, which plain sums need not pay

    low, high = problem.box()
    unit = Sobol(len(low), seed=0).random(BOX_STARTS)
    size = max(1, CHUNK // (problem.log_loss.size * (len(problem.law.amplitudes) + 1)))
    z_SF = low + (high - low) * unit
    objective = np.concatenate([objective_of(problem, z_SF[at:at + size], delta) for at in range(0, BOX_STARTS, size)])
    return _best_and_spread(z_SF, objective, polished)


def _project(problem: Problem, z_SF: np.ndarray, delta: float, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fills in amplitudes by weighted linear least squares (weights 1/loss: the log residual to first order) and scores by objective.

    A negative amplitude is replaced by a small live one (a hundredth of the geometric mean of the losses) instead of being thrown away: the
    polish can take the term to zero, but cannot bring a dead one back.
    """
    index = [problem.free.index(name) for name in problem.amplitudes]
    with np.errstate(all="ignore"):
        logs_SKR = problem.log_terms(problem.theta(z_SF))
        scaled_SKR = problem.parts(logs_SKR)[0] * np.exp(-problem.log_loss)
        free = np.array([name in problem.amplitudes for name in problem.law.amplitudes])
        known = sum((problem.fixed[name] * scaled_SKR[:, k] for k, name in enumerate(problem.law.amplitudes) if not free[k]), 0.0)
        basis_SKR = scaled_SKR[:, free]
        usable = np.isfinite(basis_SKR).all(axis=(1, 2))
        basis_SKR[~usable] = 0.0
        gram = np.einsum("skr,slr->skl", basis_SKR, basis_SKR)
        ridge = 1e-12 * np.einsum("skk->s", gram)[:, None, None] * np.eye(len(index)) + 1e-300 * np.eye(len(index))
        right = np.einsum("skr,sr->sk", basis_SKR, np.broadcast_to(1.0 - known, (len(z_SF), problem.log_loss.size)))
        solved = np.linalg.solve(gram + ridge, right[:, :, None])[:, :, 0]
    live = 0.01 * np.exp(problem.level)
    z_SF[:, index] = np.log(np.where(solved > 0.0, solved, live))
    z_SF = np.clip(z_SF, low, high)
    objective = objective_of(problem, z_SF, delta)
    return z_SF, np.where(usable, objective, np.inf)


