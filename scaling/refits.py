"""The problem that a fit solved, again from its table: where refits (profiles, resamples, simulations) start."""
from __future__ import annotations

import numpy as np

from scaling.objective import objective_of
from scaling.observations import Observations, observe
from scaling.priors import posed_with
from scaling.problem import Problem
from scaling.result import Fit
from scaling.table import Source


def observed_of(fit: Fit, table: Source) -> Observations:
    """The rows that `fit` saw in the table that it was fitted to, by its own columns and filters."""
    asked = fit.metrics
    return observe(table, fit.law, dict(asked["columns"]), asked["where"], asked["holdout"], asked["weights"])


def problem_of(fit: Fit, table: Source) -> tuple[Problem, np.ndarray, float]:
    """(problem, z [F], delta) that `fit` solved, from the table it was fitted to: its columns, its filters, its held-out rows left out.

    ValueError when the table is not the one: another number of rows is fitted, or the objective is another.
    """
    observed = observed_of(fit, table)
    columns, loss = observed.rows(~observed.held)
    if loss.size != fit.metrics["rows"]:
        raise ValueError(f"table: {loss.size} rows to fit, but {fit.label} was fitted to {fit.metrics['rows']}; give the table of the fit")
    if fit.metrics["priors"] and "prior_weight" not in fit.metrics:
        raise ValueError(f"{fit.label} was fitted with priors and saved before their weight was: refits need it; fit again")
    if fit.metrics["base"]:
        raise ValueError(f"{fit.label} was fitted in two stages (base {fit.metrics['base']}): refits would fit all constants at once; fit without base")
    problem = Problem(fit.law, fit.law.complete(columns), np.log(loss), fit.free, fit.ties, fit.fixed, observed.fitted_weights)
    if fit.metrics["priors"]:
        problem = posed_with(problem, fit.metrics["priors"], fit.metrics["prior_weight"])
    delta = float("inf") if fit.metrics["loss"] == "least_squares" else float(fit.metrics["delta"])
    z_F = problem.centred(np.asarray(fit.coordinates)[None])[0]
    objective = float(objective_of(problem, z_F[None], delta)[0])
    if not abs(objective - fit.metrics["objective"]) <= 1e-6 * max(objective, 1e-12):
        raise ValueError(f"table: {fit.label} has objective {fit.metrics['objective']:.6g} on its table and {objective:.6g} on this one; "
                         "give the table of the fit")
    return problem, z_F, delta
