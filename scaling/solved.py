"""A law solved on a table: the half of a fit that has nothing to do with intervals, which is all that a held-out error needs."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from scaling.eligible import eligible
from scaling.laws import Law, resolve
from scaling.observations import Observations, observe
from scaling.pose import pose
from scaling.priors import with_priors
from scaling.problem import Problem, constants
from scaling.solve import Solution, solve, solve_again
from scaling.table import Source, quote

LOSSES = ("huber", "least_squares", "lad")
LAD_DELTA = 1e-6  # of the Huber loss that stands for least absolute deviations: residuals are a thousand times larger


@dataclass(frozen=True)
class Solved:
    """What was solved and on which rows; label: the law with its variants; reach: the delta that the solver used; notes: for the reader."""

    problem: Problem
    solution: Solution
    observed: Observations
    label: str
    reach: float
    notes: list[str]

    @property
    def params(self) -> dict[str, float]:
        """The constants at the optimum."""
        p = self.problem
        return constants(p.law, p.free, p.ties, p.fixed, p.plain(self.solution.z[None])[0])


def solved(table: Source, law: str | Law, *, columns: Mapping[str, str] | None = None, where: str | None = None, holdout: str | None = None,
           loss: str = "huber", delta: float = 1e-3, ties: Mapping[str, str] | None = None, fixed: Mapping[str, float] | None = None,
           base: str | None = None, priors: Mapping[str, tuple[float, float]] | None = None, weights: str | None = None,
           guess: Mapping[str, float] | None = None) -> Solved:
    """The optimum; arguments are those of `scaling.fit`. guess: constants of nearly the same problem, which spare most of the starts.

    ValueError, one line, for whatever cannot be fitted.
    """
    if not isinstance(law, (str, Law)):
        raise ValueError(f"law={law!r}: give the name of a law, a formula, or a Law")
    if loss not in LOSSES:
        raise ValueError(f"loss={loss!r}: unknown; use huber, least_squares or lad")
    if not delta > 0:
        raise ValueError(f"delta={delta}: need delta > 0")
    resolved, variant_ties, variant_fixed, label = resolve(law, tuple(columns or ()))
    ties, fixed, notes = variant_ties | dict(ties or {}), variant_fixed | dict(fixed or {}), []
    if base:
        held, told = _first_stage(table, resolved, columns, where, holdout, base, {"loss": loss, "delta": delta, "ties": ties, "fixed": fixed,
                                                                                   "priors": priors, "weights": weights})
        fixed, priors, notes = held | fixed, None, [told]
    observed = observe(table, resolved, columns, where, holdout, weights)
    problem, more = pose(resolved, observed, ties, fixed)
    reach = {"huber": delta, "least_squares": float("inf"), "lad": LAD_DELTA}[loss]
    start = None if guess is None or priors else _coordinates(problem, guess)
    if priors:
        problem, solution = with_priors(problem, reach, priors)
    else:
        solution = solve(problem, reach) if start is None else solve_again(problem, reach, start)
    if solution.agree == 1:
        more.append(f"only one of {solution.starts} starts ended at this optimum: a lower one may exist")
    return Solved(problem, solution, observed, label, reach, notes + more)


def _first_stage(table: Source, law: Law, columns, where, holdout, base: str, options: Mapping) -> tuple[dict[str, float], str]:
    """(the constants that the rows of `base` alone determine, a note that says so). Held-out rows take no part in this stage either."""
    if holdout:
        table, where = eligible(table, columns, where, holdout), None
        columns = {name: quote(name) for name in columns or {}}
    first = solved(table, law, columns=columns, where=f"({where}) AND ({base})" if where else base, **options)
    rows, free = first.problem.log_loss.size, first.problem.free
    if not first.solution.converged:
        raise ValueError(f"base={base!r}: the fit of these {rows} rows did not converge, so nothing can be held at it")
    return first.params, f"{', '.join(free)} are held at their fit to the {rows} rows where {base}"


def _coordinates(problem: Problem, params: Mapping[str, float]) -> np.ndarray | None:
    """[F] the solver's coordinates of these constants; None when they lack one that is free here."""
    if not set(problem.free) <= set(params):
        return None
    plain_F = np.array([problem.law.parameter(name).coordinate(params[name]) for name in problem.free])
    return problem.centred(plain_F[None])[0]


def errors_of(predicted: np.ndarray, loss: np.ndarray) -> dict[str, float]:
    """Number of rows; rms, mean and largest error of ln predicted - ln observed; rms of predicted - observed."""
    errors = np.log(predicted) - np.log(loss)
    return {"rows": int(loss.size), "rmse": float(np.sqrt(np.mean(errors**2))), "bias": float(np.mean(errors)),
            "worst": float(errors[np.argmax(np.abs(errors))]), "rmse_nats": float(np.sqrt(np.mean((predicted - loss) ** 2)))}
