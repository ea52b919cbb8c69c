"""Profile likelihood: the interval of a constant, or of any number derived from the constants, by refits that are held to its values.

Unlike the linearised interval it follows the curvature of the law, and it says so when a direction of the design never closes.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from scaling.objective import Pull, objective_of
from scaling.problem import Problem
from scaling.refits import problem_of
from scaling.result import Estimate, Fit
from scaling.solve import WARM, minimise
from scaling.table import Source
from scaling.uncertainty import deviance_scale, spread

STEPS = (0.5, 1.0, 1.5, 2.5, 8.0)  # in units of the linearised half-width, to either side
STIFFNESS = 1e3  # of the pull, in units of the profile's own curvature; any will do, for the point reached is on the profile
REFINEMENTS = 2
TOLERANCE = 1e-8  # relative gain of a round at which a refit stalls: the point reached is on the profile to that


@dataclass(frozen=True)
class Profile:
    """estimate: the value with its profile interval. values [n], deviance [n]: points of the curve; the interval is where the deviance is
    below `cut`, the squared Student quantile."""

    estimate: Estimate
    values: np.ndarray
    deviance: np.ndarray
    cut: float


def profile(fit: Fit, table: Source, name: str | Callable, **columns) -> Profile:
    """Profile of what `fit.estimate` takes: a parameter, a functional (at `columns`), or a function of the constants.

    table: the one that `fit` was fitted to; ValueError for another.

    Deviance: 2 (objective held to the value - objective) / scale, with the scale of the residuals (`deviance_scale`); below the square of
    Student's quantile lies the interval, which is exact where ln loss is linear in the coordinates and residuals are Gaussian. An end that
    no refit out to eight linearised half-widths reaches is infinite (0 for the low end of a positive value), and the reason says so.
    """
    problem, z_F, delta = problem_of(fit, table)
    estimate = fit.estimate(name, **columns)
    along = _quantity(fit, problem, name, columns)
    start = along.value(z_F[None])[0]
    covariance, noise = _covariance(problem, z_F, delta)
    slope = along.slopes(z_F[None], covariance)[0]
    error = math.sqrt(max(float(slope @ covariance @ slope), 0.0))
    if not (0.0 < error < math.inf and math.isfinite(start)):
        flat = replace(estimate, reason=estimate.reason or "does not vary within this design")
        return Profile(flat, np.zeros(0), np.zeros(0), fit.quantile**2)
    curve = _Curve(problem, along, z_F, delta, covariance, slope, error, deviance_scale(delta, noise), fit.metrics["objective"])
    values, roots = curve.at(start + fit.quantile * error * np.array([sign * step for sign in (-1, 1) for step in STEPS]))
    ends = []
    for sign in (-1.0, 1.0):
        for _ in range(REFINEMENTS):
            end = _crossing(start, values, roots, fit.quantile, sign)
            if math.isfinite(end):
                value, root = curve.at(np.array([end]))
                values, roots = np.append(values, value), np.append(roots, root)
        ends.append(_crossing(start, values, roots, fit.quantile, sign))
    order = np.argsort(values)
    back = np.exp if along.logarithmic else np.asarray
    closed = all(map(math.isfinite, ends))
    with np.errstate(over="ignore"):
        low, high = (float(back(end)) for end in ends)
    width = 0.5 * (ends[1] - ends[0]) / fit.quantile
    relative = width if along.logarithmic else width / (1.0 if along.absolute else abs(start) or 1.0)
    open_side = "below" if math.isfinite(ends[1]) else "above"
    reason = estimate.reason if closed else f"not identified by this design (its profile does not close {open_side})"
    stated = replace(estimate, low=low, high=high, relative_se=relative, reason=reason)
    return Profile(stated, back(values[order]), roots[order] ** 2, fit.quantile**2)


@dataclass(frozen=True)
class _Quantity:
    """A number of the constants as a function of z, in logs when it is positive."""

    of_constants: Callable[[np.ndarray], float]
    logarithmic: bool
    absolute: bool

    def value(self, z_SF: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):
            values = np.array([float(self.of_constants(z)) for z in z_SF])
            return np.log(values) if self.logarithmic else values

    def slopes(self, z_SF: np.ndarray, covariance: np.ndarray) -> np.ndarray:
        """[S, F] by central differences of a thousandth of each coordinate's standard error."""
        steps = np.diag(np.clip(1e-3 * np.sqrt(np.diag(covariance)), 1e-7, 1e-3))
        plus, minus = (self.value((z_SF[:, None, :] + sign * steps).reshape(-1, len(steps))) for sign in (1.0, -1.0))
        return (plus - minus).reshape(len(z_SF), -1) / (2.0 * np.diag(steps))


def _quantity(fit: Fit, problem: Problem, name: str | Callable, columns: dict) -> _Quantity:
    function, unit = fit.quantity(name, columns)
    with np.errstate(all="ignore"):
        value = float(function(fit.params))
    return _Quantity(lambda z_F: function(fit.constants_at(problem.plain(z_F[None])[0])), unit is None and value > 0.0, unit is not None)


def _covariance(problem: Problem, z_F: np.ndarray, delta: float) -> tuple[np.ndarray, float]:
    """[F, F] linearised covariance of z, and the residual standard deviation."""
    around = spread(problem, z_F, delta)
    scatter = np.linalg.solve(problem.slopes_of_centre(z_F), around.scatter)
    return scatter @ scatter.T, around.residual_sd


@dataclass(frozen=True)
class _Curve:
    """The profile: `at` refits with the quantity pulled to targets [S] and gives the values reached and the roots of their deviance."""

    problem: Problem
    along: _Quantity
    z: np.ndarray
    delta: float
    covariance: np.ndarray
    slope: np.ndarray
    error: float
    scale: float
    lowest: float

    def at(self, targets_S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        move = self.covariance @ self.slope / self.error**2
        starts = self.z + (targets_S - self.along.value(self.z[None]))[:, None] * move
        pull = Pull(self.along.value, lambda z: self.along.slopes(z, self.covariance), targets_S, STIFFNESS * self.scale / self.error**2)
        z_SF, *_ = minimise(self.problem, starts, 1.0, self.delta, pull=pull, tolerance=TOLERANCE, damping=WARM)
        objective_S = objective_of(self.problem, z_SF, self.delta)
        return self.along.value(z_SF), np.sqrt(2.0 * np.maximum(objective_S - self.lowest, 0.0) / self.scale)


def _crossing(start: float, values: np.ndarray, roots: np.ndarray, quantile: float, sign: float) -> float:
    """Where the root of the deviance first passes `quantile` on one side: linear between points, as it is where the law is linear."""
    side = (sign * (values - start) > 0.0) & np.isfinite(values) & np.isfinite(roots)
    order = np.argsort(sign * values[side])
    x, y = np.append(start, values[side][order]), np.append(0.0, roots[side][order])
    beyond = np.flatnonzero(y >= quantile)
    if not beyond.size:
        return sign * math.inf
    i = int(beyond[0])
    return float(x[i - 1] + (quantile - y[i - 1]) / (y[i] - y[i - 1]) * (x[i] - x[i - 1]))
