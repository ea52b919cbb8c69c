"""Bootstrap draws for a fit that is already there: whole cells reweighted, or the wild bootstrap of residuals with random signs."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from scaling.problem import Problem
from scaling.refits import problem_of
from scaling.result import Fit
from scaling.solve import WARM, minimise
from scaling.table import Source
from scaling.uncertainty import CHUNK, bootstrap, cell_index, share_inside, spread

KINDS = ("cells", "wild")


def resample(fit: Fit, table: Source, count: int = 200, kind: str = "wild", seed: int = 0,
             progress: Callable[[int, int], None] | None = None) -> Fit:
    """`fit` with `count` new draws, and with the intervals of its constants made from them. table: the one that it was fitted to.

    kind: "cells", what `scaling.fit(bootstrap=...)` does, or "wild" (see `wild`). ValueError for another kind, a count below 1, or a table
    that is not the fit's.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: unknown; use {' or '.join(KINDS)}")
    if count < 1:
        raise ValueError(f"count={count}: need at least 1")
    problem, z_F, delta = problem_of(fit, table)
    cells = cell_index(problem.columns, fit.law.measures)
    draws = {"cells": bootstrap, "wild": wild}[kind](problem, z_F, cells, delta, count, seed, progress)
    fresh = replace(fit, draws=draws, metrics={**fit.metrics, "bootstrap": count, "resampled": kind})
    estimates = {name: fresh.estimate(name) for name in fit.intervals}
    return replace(fresh, intervals={name: (e.low, e.high) for name, e in estimates.items()})


def wild(problem: Problem, z_F: np.ndarray, cells: np.ndarray, delta: float, count: int, seed: int,
         progress: Callable[[int, int], None] | None = None) -> np.ndarray:
    """[count, F] plain coordinates of refits to the law's values plus the residuals, each cell's with one random sign.

    Keeps every run of the design and lets the scatter differ from run to run (Wu 1986); one sign per cell keeps what its runs share
    (Cameron, Gelbach and Miller 2008). Signs are the weights that are also right for absolute deviations, the limit of a small delta
    (Feng, He and Hu 2011). Residuals are divided by sqrt(1 - leverage), so that with least squares the covariance is HC2.
    With G cells there are 2^G resamples: below ten cells, prefer the cell bootstrap. Priors are drawn about the fitted values with their own
    deviation, so that draws know no more of a constant than rows and prior do.
    """
    rng = np.random.default_rng(seed)
    residuals, jacobian = (part[0] for part in problem.jacobian(z_F[None]))
    root_R = np.sqrt(problem.row_weights) * np.ones(residuals.size)
    around = spread(problem, z_F, delta)
    rows = np.concatenate([root_R[:, None] * jacobian, problem.prior_rows(share_inside(delta, around.residual_sd))])
    orthogonal = np.linalg.svd(rows, full_matrices=False)[0][:residuals.size]
    leverage = np.minimum((orthogonal**2).sum(axis=1), 1.0 - 1e-6)
    scatter_R = residuals / np.sqrt(1.0 - leverage)
    about, draws = problem.priors_about(z_F), []
    for start in range(0, count, CHUNK):
        size = min(CHUNK, count - start)
        signs = rng.choice([-1.0, 1.0], size=(size, int(cells.max()) + 1))
        z_SF, *_ = minimise(about, np.repeat(z_F[None], size, axis=0), 1.0, delta, shift_SR=residuals + signs[:, cells] * scatter_R,
                             prior_shift_SF=problem.prior_noise(size, rng), damping=WARM)
        draws.append(problem.plain(z_SF))
        if progress:
            progress(start + size, count)
    return np.concatenate(draws)
