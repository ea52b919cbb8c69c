"""Fits in two stages, as Quartet's (arXiv 2505.14669, appendix): some rows fit all constants that they determine, which are then held while
the rest is fitted to all rows. The second stage inherits the uncertainty of the first.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from scaling.laws import Law
from scaling.observations import Observations
from scaling.pose import pose
from scaling.priors import with_priors
from scaling.problem import Problem, constants
from scaling.solve import Solution, solve, solve_again
from scaling.uncertainty import Spread


@dataclass(frozen=True)
class Stage:
    """A problem and its solution."""

    problem: Problem
    solution: Solution

    @property
    def coordinates(self) -> np.ndarray:
        """[F]: plain coordinates of the optimum."""
        return self.problem.plain(self.solution.z[None])[0]

    @property
    def params(self) -> dict[str, float]:
        """Every constant of this stage, fitted, tied or held."""
        problem = self.problem
        return constants(problem.law, problem.free, problem.ties, problem.fixed, self.coordinates)


def solve_stage(problem: Problem, delta: float, priors: Mapping[str, tuple[float, float]] | None, guess: Mapping[str, float] | None = None) -> Stage:
    """One stage. priors: see `scaling.fit`. guess: constants of nearly the same problem, which spare most of the starts. ValueError for a law that
    loses a derivative."""
    problem.check_derivatives()
    if priors:
        return Stage(*with_priors(problem, delta, priors))
    if guess is None or not set(problem.free) <= set(guess):
        return Stage(problem, solve(problem, delta))
    plain_F = np.array([problem.law.parameter(name).coordinate(guess[name]) for name in problem.free])
    return Stage(problem, solve_again(problem, delta, problem.centred(plain_F[None])[0]))


def first_stage(law: Law, observed: Observations, ties: Mapping, fixed: Mapping, priors: Mapping | None, delta: float,
                base: str) -> tuple[Stage, list[str]]:
    """(the fit to the rows of `base` that are not held out, converged or not; notes on them)."""
    rows = observed.only(observed.base & ~observed.held)
    try:
        problem, notes = pose(law, rows, ties, fixed)
        stage = solve_stage(problem, delta, priors)
    except ValueError as error:
        raise ValueError(f"base={base!r}: {error}") from None
    return stage, [f"rows where {base}: {note}" for note in notes]


def after(earlier: Spread, around: Spread) -> Spread:
    """What is said of a second stage, knowing that the first spent constants on some of its rows: fewer degrees of freedom, so a larger variance, and
    a design that is no better than the worse of the two."""
    dof = around.dof - sum(np.any(earlier.scatter != 0.0, axis=1))
    factor = np.sqrt(around.dof / dof) if dof > 0 else 1.0
    return replace(around, dof=int(dof), residual_sd=float(around.residual_sd * factor), scatter=around.scatter * factor,
                   condition=max(earlier.condition, around.condition), at_bound=(*earlier.at_bound, *around.at_bound))


@dataclass(frozen=True)
class Joined:
    """Both stages as one fit: names of what was fitted in either, and scatter [F, K] and draws [S, F] of all of it."""

    free: tuple[str, ...]
    ties: dict[str, str]
    fixed: dict[str, float]
    coordinates: np.ndarray
    scatter: np.ndarray
    draws: np.ndarray


def joined(first: Stage, second: Stage, scatters: tuple[np.ndarray, np.ndarray], draws: tuple[np.ndarray, np.ndarray]) -> Joined:
    """The constants of both stages with their joint covariance, to first order.

    The second stage's optimum moves with what is held: by G = -(J2'J2)^-1 J2'J1, J1 and J2 the (weighted) Jacobian of its
    residuals by the constants of the first and of the second stage. So its covariance is its own and G V1 G' (the two-step
    estimator of Murphy and Topel 1985, with stages whose scatter is independent).
    """
    early, late = first.problem, second.problem
    free = (*early.free, *late.free)
    fixed = {name: value for name, value in late.fixed.items() if name not in early.free and name not in early.ties}
    ties = dict(early.ties) | dict(late.ties)
    both = replace(late, free=free, ties=ties, fixed=fixed, priors={})
    coordinates = np.concatenate([first.coordinates, second.coordinates])
    z_F = both.centred(coordinates[None])[0]
    jacobian = both.jacobian(z_F[None])[1][0] @ np.linalg.inv(both.slopes_of_centre(z_F))
    jacobian = jacobian * (np.sqrt(late.row_weights) * np.ones(len(jacobian)))[:, None]
    count = len(early.free)
    moves = -np.linalg.pinv(jacobian[:, count:]) @ jacobian[:, :count]  # [F2, F1]
    with np.errstate(invalid="ignore"):
        inherited = moves @ np.where(np.isfinite(scatters[0]), scatters[0], 0.0)
    scatter = np.block([[scatters[0], np.zeros((count, scatters[1].shape[1]))], [inherited, scatters[1]]])
    drawn = np.concatenate([draws[0], draws[1] + (draws[0] - first.coordinates) @ moves.T], axis=1) if len(draws[0]) else np.zeros((0, len(free)))
    return Joined(free, ties, fixed, coordinates, scatter, drawn)
