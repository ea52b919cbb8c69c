"""What a fit minimises: a sum over rows of Huber losses of ln predicted - ln observed, plus the priors' penalty."""
from __future__ import annotations

import numpy as np

from scaling.problem import Problem


def objective_of(problem: Problem, z_SF: np.ndarray, delta: float, weights_SR: np.ndarray | float = 1.0) -> np.ndarray:
    """[S]: the objective; `weights_SR` multiply the problem's own. A row of weight 0 may be one for which the law has no value."""
    lost_SR = huber(problem.residuals(z_SF), delta)
    if not np.all(weights_SR):
        lost_SR = np.where(weights_SR > 0.0, lost_SR, 0.0)
    total_S = (problem.row_weights * weights_SR * lost_SR).sum(axis=1)
    return total_S + problem.penalty(z_SF) if problem.priors else total_S


def huber(residuals: np.ndarray, delta: float) -> np.ndarray:
    """r^2/2 within delta, delta(|r| - delta/2) outside (scipy.special.huber); delta = inf is least squares."""
    size = np.abs(residuals)
    if np.isinf(delta):
        return 0.5 * size * size
    return np.where(size <= delta, 0.5 * size * size, delta * (size - 0.5 * delta))
