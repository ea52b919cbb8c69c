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

INNER_CUTS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # quantiles of scale below which an inner fit is trained
MARGIN = 2.6  # (3.18 / 1.96)^2: what a variance known to three degrees of freedom costs at 95 %
NEAR = 0.1  # mean ln factor beyond the inner fit, below which a cut tells no rate
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

    s^2 (J'WJ)^-1 with W the weights and s^2 the weighted residual variance, that of a row of weight 1, times the price of the
    Huber loss under Gaussian residuals, E[psi^2] / (s E[psi'])^2: pi/2 for small delta, 1 for least squares (Huber 1964).
    """
    low, high = problem.bounds()
    residuals, jacobian = (part[0] for part in problem.jacobian(z_F[None]))
    root = np.sqrt(problem.row_weights) * np.ones(residuals.size)
    residuals, jacobian = root * residuals, root[:, None] * jacobian
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
    with np.errstate(invalid="ignore"):  # infinite deviations of a direction that no row sees
        scatter = problem.slopes_of_centre(z_F) @ scatter
    return Spread(scatter, sd, dof, condition,
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


def deviance_scale(delta: float, sd: float) -> float:
    """What twice a rise of the objective is divided by to be chi-squared: E[psi^2] / E[psi'] under Gaussian residuals of deviation `sd`.

    sd^2 for least squares; in general the scale of the robust likelihood-ratio (tau) test, Hampel et al. 1986, section 7.2.
    """
    if sd == 0.0 or np.isinf(delta):
        return sd * sd
    return huber_price(delta, sd) * math.erf(delta / sd / math.sqrt(2.0)) * sd * sd


def bootstrap(problem: Problem, z_F: np.ndarray, cells: np.ndarray, delta: float, count: int, seed: int,
              progress: Callable[[int, int], None] | None = None) -> np.ndarray:
    """[count, F] plain coordinates of refits on resampled cells, each warm-started at the optimum.

    cells: [R] integer, rows of one (N, D) cell share it and are resampled together: they share that cell's deviation from the law.
    Every cell gets an exponential weight (the Bayesian bootstrap, Rubin 1981) instead of a count: with the nine cells of a small
    design, one multinomial resample in twelve loses a whole size, and its exponents mean nothing. Priors are drawn anew with their
    deviation, as runs are: held where they are, they would make draws narrower than what they know.
    """
    rng = np.random.default_rng(seed)
    num_cells = int(cells.max()) + 1
    draws = []
    for start in range(0, count, CHUNK):
        size = min(CHUNK, count - start)
        weights = rng.exponential(size=(size, num_cells))
        weights *= num_cells / weights.sum(axis=1, keepdims=True)
        z_SF, _, _ = minimise(problem, np.repeat(z_F[None], size, axis=0), weights[:, cells], delta, prior_shift_SF=problem.prior_noise(size, rng))
        draws.append(problem.plain(z_SF))
        if progress:
            progress(start + size, count)
    return np.concatenate(draws)


def cell_index(columns: dict[str, np.ndarray], names: tuple[str, ...]) -> np.ndarray:
    """[R] integers: rows equal in all of `names` share one."""
    return np.unique(np.stack([columns[name] for name in names], axis=1), axis=0, return_inverse=True)[1].reshape(-1)


def discrepancy(problem: Problem, z_F: np.ndarray, delta: float, required: tuple[str, ...], condition: float) -> float:
    """How fast the law drifts away from the runs beyond the data: standard deviation of ln loss at one e-fold (a factor of 2.718).

    The variance of a prediction grows with ln(factor beyond the fitted range), as of a random walk. Its rate is calibrated inside the
    data on leave-largest-compute-out residuals (as CRUDE, Zelikman et al. 2020, arXiv 2005.12496, does on held-out residuals). Rate of a
    cut: (mean squared error - residual variance of the whole fit - mean variance of the refit's own predictions) / mean ln factor, at
    least 0: what neither scatter nor too few rows explain. The mean over the cuts is used, times MARGIN: the errors of one cut share their
    sign and the cuts their runs, so that six cuts which agree are still few looks. 0 when no cut is left.

    How it was chosen and where it was confirmed: docs/intervals.md; `python -m benchmarks.intervals` prints the numbers.
    """
    noise = spread(problem, z_F, delta).residual_sd ** 2
    rates = [max(float(np.mean(errors**2 - variance)) - noise, 0.0) / float(np.mean(distance))
             for errors, distance, variance in inner_splits(problem, z_F, delta, required, condition)]
    return math.sqrt(MARGIN * np.mean(rates)) if rates else 0.0


def inner_splits(problem: Problem, z_F: np.ndarray, delta: float, required: tuple[str, ...],
                 condition: float) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(errors of ln loss, ln of the factor beyond the fitted range, variance of ln of the law's value there by the covariance of the refit)
    of the rows above each inner cut, predicted by a refit of those below.

    A cut is a quantile of scale: the product of the required inputs, which for N and D is the compute. A refit conditioned a hundred
    times worse than the whole design says nothing about the law and is left out; so is a cut that splits one budget, where the rows above it
    are hardly beyond those below.
    """
    scale = sum(np.log(problem.columns[name]) for name in required)
    below_CR = np.array([scale <= np.quantile(scale, cut) for cut in INNER_CUTS])
    below_CR = below_CR[~below_CR.all(axis=1) & (below_CR.sum(axis=1) >= len(problem.free) + 3)]
    # One batch: rows above a cut have weight 0.
    refits_CF = problem.plain(minimise(problem, np.repeat(z_F[None], len(below_CR), axis=0), below_CR.astype(np.float64), delta)[0])
    found = []
    for keep, plain_F in zip(below_CR, refits_CF, strict=True):
        inner, outer = problem.rows(keep), problem.rows(~keep)
        around = spread(inner, inner.centred(plain_F[None])[0], delta)
        if around.condition > 100.0 * condition:
            continue
        errors, variance = _predicted(outer, plain_F, around.scatter)
        distance = _beyond(inner, outer, required)
        if np.isfinite(errors).all() and np.isfinite(variance).all() and np.mean(distance) >= NEAR:
            found.append((errors, distance, variance))
    return found


def _predicted(problem: Problem, plain_F: np.ndarray, scatter_FF: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[R] errors of ln loss at plain coordinates, and [R] the variance of the predictions there by their covariance (delta method). Both as of rows of
    weight 1: an error times the root of its row's weight scatters as those do."""
    z_F = problem.centred(plain_F[None])[0]
    errors, jacobian = (part[0] for part in problem.jacobian(z_F[None]))
    with np.errstate(invalid="ignore"):
        slopes = jacobian @ np.linalg.solve(problem.slopes_of_centre(z_F), scatter_FF)
    return np.sqrt(problem.row_weights) * errors, problem.row_weights * (slopes**2).sum(axis=1)


def _beyond(inner: Problem, outer: Problem, required: tuple[str, ...]) -> np.ndarray:
    """[R] ln of the largest factor by which a required input, or their product, of `outer` lies outside its range in `inner`; at least 0."""
    logs, reached = ([np.log(problem.columns[name]) for name in required] for problem in (inner, outer))
    pairs = zip([*logs, sum(logs)], [*reached, sum(reached)], strict=True)
    return np.max([np.maximum(np.maximum(there - here.max(), here.min() - there), 0.0) for here, there in pairs], axis=0)
