"""How far a fit can be trusted: covariance and conditioning of the design, cell bootstrap, and what held-out scale adds.

Everything is in the solver's coordinates; `scatter` is a matrix W with W W' the covariance of the plain coordinates.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from scaling.problem import Problem
from scaling.solve import minimise

INNER_CUTS = (0.5, 0.65, 0.8)  # quantiles of scale below which an inner fit is trained
CHUNK = 128  # bootstrap resamples per batch


@dataclass(frozen=True)
class Spread:
    """scatter: [F, F]; residual_sd: of ln loss about the law; dof: rows minus parameters; condition: of J'J in centred logs;
    at_bound: free parameters that ended on a bound (a dead term, an exponent at the edge), left out of all of the former."""

    scatter: np.ndarray
    residual_sd: float
    dof: int
    condition: float
    at_bound: tuple[str, ...]


def spread(problem: Problem, z_F: np.ndarray, delta: float) -> Spread:
    """Linearised covariance at the optimum.

    s^2 (J'J)^-1 with s^2 the residual variance, times the price of the Huber loss under Gaussian residuals,
    E[psi^2] / (s E[psi'])^2: pi/2 for small delta, 1 for least squares (Huber 1964).
    """
    low, high = problem.bounds()
    residuals, jacobian = (part[0] for part in problem.jacobian(z_F[None]))
    inside = (z_F > low + 1e-6) & (z_F < high - 1e-6)
    moving = inside & ~problem.dead(z_F)
    dof = len(residuals) - int(moving.sum())
    sd = math.sqrt(float(residuals @ residuals) / max(dof, 1))
    jacobian = np.concatenate([jacobian, problem.prior_rows(share_inside(delta, sd))])
    _, singular, right = np.linalg.svd(jacobian[:, moving], full_matrices=False)
    condition = float((singular[0] / singular[-1]) ** 2) if singular[-1] > 0 else math.inf
    scatter = np.zeros((len(problem.free), len(problem.free)))
    with np.errstate(divide="ignore", invalid="ignore"):
        columns = sd * math.sqrt(huber_price(delta, sd)) * right.T / singular
    scatter[np.ix_(moving, np.flatnonzero(moving))] = np.where(np.isfinite(columns), columns, np.inf)
    return Spread(problem.slopes_of_centre(z_F) @ scatter, sd, dof, condition,
                  tuple(name for name, free in zip(problem.free, moving, strict=True) if not free))


def share_inside(delta: float, sd: float) -> float:
    """Share of Gaussian residuals of deviation `sd` that are within `delta`: E[psi'] of the Huber loss."""
    return 1.0 if sd == 0.0 or np.isinf(delta) else math.erf(delta / sd / math.sqrt(2.0))


def huber_price(delta: float, sd: float) -> float:
    """Variance of a Huber estimate over that of least squares when residuals are Gaussian with deviation `sd`."""
    if sd == 0.0 or np.isinf(delta):
        return 1.0
    k = delta / sd
    inside = math.erf(k / math.sqrt(2.0))
    density = math.exp(-0.5 * k * k) / math.sqrt(2.0 * math.pi)
    return (inside - 2.0 * k * density + k * k * (1.0 - inside)) / inside ** 2


def bootstrap(problem: Problem, z_F: np.ndarray, cells: np.ndarray, delta: float, count: int, seed: int,
              progress: Callable[[int, int], None] | None = None) -> np.ndarray:
    """[count, F] plain coordinates of refits on resampled cells, each warm-started at the optimum.

    cells: [R] integer, rows of one (N, D) cell share it and are resampled together: they share that cell's deviation from the law.
    Every cell gets an exponential weight (the Bayesian bootstrap, Rubin 1981) instead of a count: with the nine cells of a small
    design, one multinomial resample in twelve loses a whole size, and its exponents mean nothing.
    """
    rng = np.random.default_rng(seed)
    num_cells = int(cells.max()) + 1
    draws = []
    for start in range(0, count, CHUNK):
        size = min(CHUNK, count - start)
        weights = rng.exponential(size=(size, num_cells))
        weights *= num_cells / weights.sum(axis=1, keepdims=True)
        z_SF, _, _ = minimise(problem, np.repeat(z_F[None], size, axis=0), weights[:, cells], delta)
        draws.append(problem.plain(z_SF))
        if progress:
            progress(start + size, count)
    return np.concatenate(draws)


def cell_index(columns: dict[str, np.ndarray], names: tuple[str, ...]) -> np.ndarray:
    """[R] integers: rows equal in all of `names` share one."""
    return np.unique(np.stack([columns[name] for name in names], axis=1), axis=0, return_inverse=True)[1].reshape(-1)


def discrepancy(problem: Problem, z_F: np.ndarray, delta: float, required: tuple[str, ...], condition: float) -> float:
    """Extra standard deviation of ln loss that a prediction beyond the data needs, measured inside the data.

    For each cut, the rows below that quantile of scale (the product of the required inputs, for N and D the compute) are refitted and
    the rows above predicted. What the errors exceed the refit's own spread and residual by is the law's discrepancy out of range; the
    largest over the cuts is returned. A refit conditioned a hundred times worse than the whole design says nothing about the law and
    is left out. 0 when no cut is left.
    """
    scale = sum(np.log(problem.columns[name]) for name in required)
    plain = problem.plain(z_F[None])
    worst = 0.0
    for cut in INNER_CUTS:
        keep = scale <= np.quantile(scale, cut)
        if keep.all() or keep.sum() < len(problem.free) + 3:
            continue
        inner = problem.rows(keep)
        z_inner = minimise(inner, inner.centred(plain), np.ones((1, int(keep.sum()))), delta)[0][0]
        inner_spread = spread(inner, z_inner, delta)
        if inner_spread.condition > 100.0 * condition:
            continue
        errors, variance = _held_errors(inner, z_inner, inner_spread, problem.rows(~keep))
        if np.isfinite(errors).all():
            worst = max(worst, float(np.mean(errors**2) - np.mean(variance)))
    return math.sqrt(worst)


def _held_errors(inner: Problem, z_F: np.ndarray, inner_spread: Spread, outer: Problem) -> tuple[np.ndarray, np.ndarray]:
    """Errors of ln loss of the refit `z_F` of `inner` on the rows of `outer`, and their variance by the refit's own account."""
    plain = inner.plain(z_F[None])[0]

    def log_loss(coordinates: np.ndarray) -> np.ndarray:
        return outer.residuals(outer.centred(coordinates[None]))[0] + outer.log_loss

    with np.errstate(all="ignore"):
        gradients = np.stack([log_loss(plain + 0.1 * column) - log_loss(plain - 0.1 * column) for column in inner_spread.scatter.T]) / 0.2
    variance = (np.where(np.isfinite(gradients), gradients, 0.0) ** 2).sum(axis=0) + inner_spread.residual_sd**2
    return log_loss(plain) - outer.log_loss, variance
