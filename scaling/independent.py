"""A fit checked by other means: SciPy's trust-region solver on the law's own `predict`, with finite differences, from starts of its own.

Nothing is shared with the solver but the law and the rows: no projection, no centred terms, no derivatives of ours, and other starts.
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.optimize

from scaling.refits import observed_of, problem_of
from scaling.result import Fit
from scaling.solve import ROUNDING
from scaling.table import Source

STARTS = 8
SPREAD = 3.0  # standard deviations of the starts about the optimum


@dataclass(frozen=True)
class Check:
    """lowest: SciPy's objective; ratio: over the fit's, below 1 when the fit missed a lower one; apart: the largest distance between the constants of
    the two, in standard errors; within: how many of `starts` ended within 1e-6 of the lower of the two."""

    lowest: float
    ratio: float
    apart: float
    within: int
    starts: int

    @property
    def agrees(self) -> bool:
        """Whether SciPy reached the fit's objective, and none below it, at the same constants to a hundredth of a standard error."""
        return abs(self.ratio - 1.0) <= 1e-6 and self.apart <= 0.01

    def __str__(self) -> str:
        return (f"scipy least_squares from {self.starts} starts: objective {self.lowest:.10g}, {self.ratio - 1.0:+.1e} relative to the "
                f"fit's, constants within {self.apart:.2g} standard errors, {self.within} of the starts"
                + ("" if self.agrees else "; it does not confirm the fit"))


def scipy_check(fit: Fit, table: Source, seed: int = 0) -> Check:
    """Minimises the objective of `fit` on its table again. ValueError for another table, and for what SciPy does not have beside a Huber loss: weights
    of rows, and priors, whose loss is another than the rows'."""
    problem, _, delta = problem_of(fit, table)
    if problem.priors:
        raise ValueError(f"{fit.label} has priors on {', '.join(problem.priors)}, which are no rows of scipy's least_squares; check a fit without")
    observed = observed_of(fit, table)
    columns, _ = observed.rows(~observed.held)
    if problem.weights is not None and np.isfinite(delta):
        raise ValueError(f"{fit.label}: scipy's least_squares has no Huber loss of weighted rows; fit by least squares, or without weights")
    root = np.sqrt(problem.row_weights)
    bounds = np.array([(-np.inf, np.inf) if parameter.multiplies else (parameter.coordinate(parameter.low), parameter.coordinate(parameter.high))
                       for parameter in map(fit.law.parameter, fit.free)], dtype=np.float64).T

    def errors(coordinates: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):
            found = root * (np.log(fit.law.predict(fit.constants_at(coordinates), **columns)) - problem.log_loss)
        return np.where(np.isfinite(found), found, 1e3)  # a place where the law has no value is no place to stay

    how = {"loss": "linear"} if np.isinf(delta) else {"loss": "huber", "f_scale": delta}
    inside = bounds[0] + 1e-9, bounds[1] - 1e-9
    rng, ends = np.random.default_rng(seed), []
    for _ in range(STARTS):
        start = np.clip(fit.coordinates + SPREAD * fit.scatter @ rng.standard_normal(fit.scatter.shape[1]), *inside)
        found = scipy.optimize.least_squares(errors, start, jac="3-point", bounds=bounds, x_scale="jac", ftol=1e-15, xtol=1e-15, gtol=1e-15,
                                             max_nfev=2000, **how)
        ends.append((float(found.cost), found.x))
    lowest, best = min(ends, key=lambda end: end[0])
    rounding = problem.log_loss.size * ROUNDING  # of runs that lie on the law both objectives are rounding, and their ratio nothing
    own, lowest, spread = float(fit.metrics["objective"]) + rounding, lowest + rounding, np.linalg.norm(fit.scatter, axis=1)
    apart = float(np.max(np.abs(best - fit.coordinates)[spread > 0] / spread[spread > 0], initial=0.0))
    return Check(lowest, lowest / own, apart, sum(value + rounding <= min(lowest, own) * (1.0 + 1e-6) for value, _ in ends), STARTS)
