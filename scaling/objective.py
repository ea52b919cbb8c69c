"""What a fit minimises: a sum over rows of Huber losses of ln predicted - ln observed, plus the priors' penalty.

Shapes: S starts, R rows, F coordinates.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from scaling.problem import Problem


@dataclass(frozen=True)
class Pull:
    """Holds each start near a value of some function of the coordinates: adds stiffness/2 (value(z) - target)^2 to the objective.

    value: [S, F] -> [S]; slopes: [S, F] -> [S, F]; target: [S].
    """

    value: Callable[[np.ndarray], np.ndarray]
    slopes: Callable[[np.ndarray], np.ndarray]
    target: np.ndarray
    stiffness: float

    def penalty(self, z_SF: np.ndarray) -> np.ndarray:
        """[S]; inf where the function has no value."""
        lost_S = 0.5 * self.stiffness * (self.value(z_SF) - self.target) ** 2
        return np.where(np.isnan(lost_S), np.inf, lost_S)

    def derivatives(self, z_SF: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[S, F] and [S, F, F]: slope of the penalty and its Gauss-Newton curvature."""
        slopes_SF = self.slopes(z_SF)
        away_S = self.value(z_SF) - self.target
        return self.stiffness * away_S[:, None] * slopes_SF, self.stiffness * slopes_SF[:, :, None] * slopes_SF[:, None, :]


@dataclass(frozen=True)
class Objective:
    """What each start of a batch minimises. weights: [S, R], besides the problem's own, or 1; shift: [S, R] added to the observed ln loss, for
    starts that see other losses; prior_shift: [S, F] added to the means of the priors; pull: what holds each start besides. A row of weight 0 may
    be one for which the law has no value."""

    problem: Problem
    delta: float
    weights: np.ndarray | float = 1.0
    shift: np.ndarray | None = None
    prior_shift: np.ndarray | None = None
    pull: Pull | None = None

    def only(self, chosen: np.ndarray) -> Objective:
        """That of the starts `chosen`."""
        return replace(self, weights=self.weights[chosen] if np.ndim(self.weights) else self.weights,
                       shift=None if self.shift is None else self.shift[chosen],
                       prior_shift=None if self.prior_shift is None else self.prior_shift[chosen],
                       pull=None if self.pull is None else replace(self.pull, target=self.pull.target[chosen]))

    def from_shift(self, z_SF: np.ndarray) -> np.ndarray:
        """[S, F]: coordinates as the unshifted priors see them."""
        return z_SF if self.prior_shift is None else z_SF - self.prior_shift

    def at(self, z_SF: np.ndarray) -> np.ndarray:
        """[S]: the value."""
        residuals_SR = self.problem.residuals(z_SF)
        lost_SR = huber(residuals_SR if self.shift is None else residuals_SR - self.shift, self.delta)
        if not np.all(self.weights):
            lost_SR = np.where(self.weights > 0.0, lost_SR, 0.0)
        total_S = (self.problem.row_weights * self.weights * lost_SR).sum(axis=1)
        if self.problem.priors:
            total_S = total_S + self.problem.penalty(self.from_shift(z_SF))
        return total_S if self.pull is None else total_S + self.pull.penalty(z_SF)


def objective_of(problem: Problem, z_SF: np.ndarray, delta: float) -> np.ndarray:
    """[S]: the objective of a fit at the coordinates of each start."""
    return Objective(problem, delta).at(z_SF)


def huber(residuals: np.ndarray, delta: float) -> np.ndarray:
    """r^2/2 within delta, delta(|r| - delta/2) outside (scipy.special.huber); delta = inf is least squares."""
    size = np.abs(residuals)
    if np.isinf(delta):
        return 0.5 * size * size
    return np.where(size <= delta, 0.5 * size * size, delta * (size - 0.5 * delta))
