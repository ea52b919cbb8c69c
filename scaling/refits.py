"""Refits of a solved problem: to other losses on the same runs, or along a constraint. Batched Levenberg-Marquardt in float64.

`solve.minimise` changes the weights of the rows; here the observed losses themselves differ from refit to refit (wild bootstrap, simulated
truth), or the refit is pulled to a value of some function of the constants (profiles). Shapes: S refits, R rows, F free coordinates.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from scaling.observations import Observations, observe
from scaling.objective import huber
from scaling.problem import Problem
from scaling.result import Fit
from scaling.table import Source

ROUNDS = 200


@dataclass(frozen=True)
class Pull:
    """Adds stiffness/2 * (value(z) - target)^2 to the objective. value: [S, F] -> [S]; slopes: [S, F] -> [S, F]; target: [S]."""

    value: Callable[[np.ndarray], np.ndarray]
    slopes: Callable[[np.ndarray], np.ndarray]
    target: np.ndarray
    stiffness: float


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
    if fit.metrics["base"]:
        raise ValueError(f"{fit.label} was fitted in two stages (base {fit.metrics['base']}): refits would fit all constants at once; fit without base")
    if fit.metrics["priors"]:
        raise ValueError(f"{fit.label} was fitted with priors on {', '.join(fit.metrics['priors'])}: refits would need them too; fit without")
    problem = Problem(fit.law, fit.law.complete(columns), np.log(loss), fit.free, fit.ties, fit.fixed, observed.fitted_weights)
    delta = float("inf") if fit.metrics["loss"] == "least_squares" else float(fit.metrics["delta"])
    z_F = problem.centred(np.asarray(fit.coordinates)[None])[0]
    objective = float(_objective(problem, z_F[None], delta, 0.0)[0])
    if not abs(objective - fit.metrics["objective"]) <= 1e-6 * max(objective, 1e-12):
        raise ValueError(f"table: {fit.label} has objective {fit.metrics['objective']:.6g} on its table and {objective:.6g} on this one; "
                         "give the table of the fit")
    return problem, z_F, delta


def refit(problem: Problem, starts_SF: np.ndarray, delta: float, log_loss_SR: np.ndarray | None = None,
          pull: Pull | None = None, tolerance: float = 1e-12) -> tuple[np.ndarray, np.ndarray]:
    """[S, F] optima near the starts, and their objectives [S] (without the pull). log_loss_SR: what each refit sees instead of the losses.

    Starts are warm, so that a local search is enough: it ends when three rounds in a row gain less than `tolerance` relative.
    """
    low, high = problem.bounds()
    z_SF = np.clip(starts_SF, low, high)
    shift_SR = np.zeros((len(z_SF), problem.log_loss.size)) if log_loss_SR is None else log_loss_SR - problem.log_loss
    active, damping, stalled = np.arange(len(z_SF)), np.full(len(z_SF), 1e-3), np.zeros(len(z_SF), dtype=int)

    def total(z, rows):
        return _objective(problem, z, delta, shift_SR[rows]) + (0.0 if pull is None else _pulled(pull, z, rows))

    value = total(z_SF, active)
    for _ in range(ROUNDS):
        step = _step(problem, z_SF[active], delta, shift_SR[active], damping[active], pull, active, (low, high))
        trial = np.clip(z_SF[active] - step, low, high)
        new = total(trial, active)
        better = new < value[active]
        gain = np.where(better, (value[active] - new) / np.maximum(value[active], 1e-300), 0.0)
        z_SF[active[better]], value[active[better]] = trial[better], new[better]
        damping[active] = np.clip(np.where(better, 0.2, 5.0) * damping[active], 1e-12, 1e12)
        stalled[active] = np.where(gain < tolerance, stalled[active] + 1, 0)
        active = active[stalled[active] < 3]
        if not active.size:
            break
    return z_SF, _objective(problem, z_SF, delta, shift_SR)


def _objective(problem: Problem, z_SF, delta, shift_SR) -> np.ndarray:
    return (problem.row_weights * huber(problem.residuals(z_SF) - shift_SR, delta)).sum(axis=1)


def _pulled(pull: Pull, z_SF, rows) -> np.ndarray:
    return 0.5 * pull.stiffness * (pull.value(z_SF) - pull.target[rows]) ** 2


def _step(problem: Problem, z_SF, delta, shift_SR, damping_S, pull, rows, bounds) -> np.ndarray:
    """[S, F] damped Gauss-Newton step on the reweighted squares."""
    residuals_SR, jacobian_SRF = problem.jacobian(z_SF)
    residuals_SR = residuals_SR - shift_SR
    weights_SR = problem.row_weights * np.minimum(1.0, delta / np.maximum(np.abs(residuals_SR), 1e-300))
    weighted = weights_SR[:, :, None] * jacobian_SRF
    gradient = np.einsum("srf,sr->sf", weighted, residuals_SR)
    hessian = np.matmul(weighted.transpose(0, 2, 1), jacobian_SRF)
    if pull is not None:
        slopes = pull.slopes(z_SF)
        gradient = gradient + pull.stiffness * (pull.value(z_SF) - pull.target[rows])[:, None] * slopes
        hessian = hessian + pull.stiffness * slopes[:, :, None] * slopes[:, None, :]
    held = ((z_SF <= bounds[0]) & (gradient > 0)) | ((z_SF >= bounds[1]) & (gradient < 0))
    eye = np.eye(z_SF.shape[1])
    hessian = np.where(held[:, :, None] | held[:, None, :], eye, hessian)
    diagonal = np.einsum("sff->sf", hessian)
    floor = 1e-12 * diagonal.max(axis=1, keepdims=True) + 1e-300
    damped = hessian + (damping_S[:, None] * (diagonal + floor) + floor)[:, :, None] * eye
    return np.linalg.solve(damped, np.where(held, 0.0, gradient)[:, :, None])[:, :, 0]
