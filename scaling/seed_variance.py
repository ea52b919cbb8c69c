"""Where the spread of final losses comes from: between cells, between seeds of one cell, and the finite evaluation set.

A cell is all that runs share but the seed (size, tokens, precision, data, schedule). loss = cell + seed + evaluation noise; the parts are the
moment estimates of a one-way random-effects analysis of variance with unequal groups (Searle, Casella and McCulloch 1992, "Variance
Components", section 3.6), unbiased before they are cut at zero.
"""
from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import chdtri

from scaling.statistics import columns_of, finished_runs, indistinct
from scaling.table import Source, table


@dataclass(frozen=True)
class VarianceParts:
    """Variances in squared units of the loss. between_cells: of the cells' true means; between_seeds: of runs of one cell, evaluation noise
    taken off where it is independent between runs; evaluation: mean square of the standard errors, NaN when unknown; within: of runs of one cell as
    observed, with its interval (chi-square, `level`); dof: degrees of freedom of `within`; notes: what was cut, or not known."""

    between_cells: float
    between_seeds: float
    evaluation: float
    within: float
    within_low: float
    within_high: float
    dof: int
    cells: int
    runs: int
    level: float
    notes: tuple[str, ...]


def variance_parts(losses: Sequence[float], cells: Sequence[Hashable], std_errors: Sequence[float] | None = None, same_tokens: bool = True,
                   level: float = 0.95) -> VarianceParts:
    """The decomposition. losses, std_errors: [runs], the latter of the evaluation alone; cells: [runs], equal for runs of one cell.

    same_tokens: every run was evaluated on the same tokens. Then the evaluation's error is common to all runs and is no part of their
    spread, so nothing is taken off; how far it is common is unknown, so the standard errors are reported and not used. ValueError
    when no cell has two runs.
    """
    values = np.asarray(losses, dtype=np.float64)
    errors = None if std_errors is None else np.asarray(std_errors, dtype=np.float64)
    if values.ndim != 1 or len(cells) != values.size or (errors is not None and errors.shape != values.shape):
        raise ValueError(f"losses, cells and std_errors must be equally long; got {values.shape}, {len(cells)}, "
                         f"{None if errors is None else errors.shape}")
    if not np.isfinite(values).all() or (errors is not None and not (errors >= 0).all()):
        raise ValueError("losses must be finite and std_errors at least zero; leave other runs out")
    order = {cell: i for i, cell in enumerate(dict.fromkeys(cells))}
    index = np.array([order[cell] for cell in cells])
    counts = np.bincount(index)
    dof = values.size - counts.size
    if dof < 1:
        raise ValueError(f"no cell has two runs ({counts.size} cells, {values.size} runs), so the variance between seeds is unknown; train "
                         "more seeds")
    means = np.bincount(index, values) / counts
    within = float(((values - means[index]) ** 2).sum() / dof)
    # E[sum of squares within] = dof * seeds + sum over runs of (1 - 1/n_cell) se^2, whatever the sizes of the cells.
    evaluation = float("nan") if errors is None else float(((1.0 - 1.0 / counts[index]) * errors**2).sum() / dof)
    notes = []
    seeds = within
    if errors is None:
        notes.append("no standard errors of the evaluation: its noise is counted as variance between seeds")
    elif same_tokens:
        notes.append("all runs were evaluated on the same tokens: the evaluation's error is common to them and not taken off")
    else:
        seeds = _cut(within - evaluation, "between seeds", notes)
    cells_variance = math.nan
    if counts.size > 1:
        per_cell = (values.size - float((counts**2).sum()) / values.size) / (counts.size - 1)
        between = float((counts * (means - values.mean()) ** 2).sum() / (counts.size - 1))
        cells_variance = _cut((between - within) / per_cell, "between cells", notes)
    tail = 0.5 * (1.0 - level)
    low, high = (dof * within / float(chdtri(dof, share)) for share in (tail, 1.0 - tail))
    return VarianceParts(cells_variance, seeds, evaluation, within, low, high, dof, counts.size, values.size, level, tuple(notes))


def seed_variance(source: Source, same_tokens: bool = True, level: float = 0.95) -> VarianceParts:
    """`variance_parts` of a run table: cells as in `scaling.statistics` (setting and precision), standard errors from loss_std_err. Runs that
    differ in nothing that a column names are left out, and so are standard errors that any run lacks."""
    relation = table(source)
    runs = finished_runs(relation)
    left_out = {run.run_id for run in indistinct(runs)}
    kept = list({(run.setting, run.precision, run.seed): run for run in runs if run.run_id not in left_out}.values())
    if not kept:
        raise ValueError(f"no finished run with a size, tokens and a loss among {len(runs)} rows")
    columns = columns_of(relation)
    stated = columns.get("loss_std_err", [None] * len(relation))
    names = columns.get("run_id", [None] * len(relation))
    known = {str(name or i): error for i, (name, error) in enumerate(zip(names, stated, strict=True))}  # named as finished_runs does
    errors = [known.get(run.run_id) for run in kept]
    usable = None if any(error is None or not math.isfinite(error) for error in errors) else errors
    return variance_parts([run.loss for run in kept], [(run.setting, run.precision) for run in kept], usable, same_tokens, level)


def _cut(variance: float, name: str, notes: list[str]) -> float:
    if variance < 0:
        notes.append(f"the variance {name} came out at {variance:.3g} and is cut at zero: the data do not show it")
    return max(variance, 0.0)
