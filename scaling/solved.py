"""A law solved on a table: the half of a fit that has nothing to do with intervals, which is all that a held-out error needs."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real

import numpy as np

from scaling.laws import Law, resolve
from scaling.observations import Observations, observe
from scaling.pose import pose
from scaling.stages import Stage, first_stage, solve_stage
from scaling.table import Source

LOSSES = ("huber", "least_squares", "lad")
LAD_DELTA = 1e-6  # of the Huber loss that stands for least absolute deviations: residuals are a thousand times larger


@dataclass(frozen=True)
class Solved:
    """What was solved and on which rows. first: the stage before the last one, or None; label: the law with its variants; delta:
    Huber's, as the solver used it: inf for least squares, tiny for absolute values; notes: for the reader."""

    last: Stage
    first: Stage | None
    observed: Observations
    label: str
    delta: float
    notes: list[str]

    @property
    def converged(self) -> bool:
        """Whether every stage did."""
        return all(stage.solution.converged for stage in (self.first, self.last) if stage)

    @property
    def params(self) -> dict[str, float]:
        """Every constant: fitted in either stage, tied or fixed."""
        return self.last.params


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
    if not (isinstance(delta, Real) and delta > 0):
        raise ValueError(f"delta={delta!r}: need a positive number")
    twice = next((name for name in ties or () if name in (fixed or {})), None)
    if twice:
        raise ValueError(f"ties: {twice}={ties[twice]}: {twice} is also fixed, at {fixed[twice]:g}; give one of the two")
    resolved, variant_ties, variant_fixed, label = resolve(law, tuple(columns or ()))
    ties, fixed = variant_ties | dict(ties or {}), variant_fixed | dict(fixed or {})
    observed = observe(table, resolved, columns, where, holdout, weights, base)
    delta = {"huber": delta, "least_squares": float("inf"), "lad": LAD_DELTA}[loss]
    first, told = first_stage(resolved, observed, ties, fixed, priors, delta, base) if base else (None, [])
    problem, notes = pose(resolved, observed, ties, first.params | fixed if first else fixed)
    last = solve_stage(problem, delta, None if first else priors, guess)
    if first:
        rows, agree = first.problem.log_loss.size, first.solution.agree
        told.append(f"{', '.join(first.problem.free)} were fitted to the {rows} rows where {base} ({agree} of {first.solution.starts} starts agree) and "
                    "held for the others")
        notes = [*reversed(told), *notes]
    if last.solution.agree == 1:
        notes.append(f"only one of {last.solution.starts} starts ended at this optimum: a lower one may exist")
    return Solved(last, first, observed, label, delta, notes)


def errors_of(predicted: np.ndarray, loss: np.ndarray) -> dict[str, float]:
    """Number of rows; rms, mean and largest error of ln predicted - ln observed; rms of predicted - observed."""
    errors = np.log(predicted) - np.log(loss)
    return {"rows": int(loss.size), "rmse": float(np.sqrt(np.mean(errors**2))), "bias": float(np.mean(errors)),
            "worst": float(errors[np.argmax(np.abs(errors))]), "rmse_nats": float(np.sqrt(np.mean((predicted - loss) ** 2)))}
