"""Searches over a hyper-parameter in a run table: what the best of k of its runs is expected to be (`scaling.best_of`).

A cell is all that runs share besides the tuned columns and the seed: size, tokens, data, precision, and the rest of their schedule. Runs of one cell
and one seed that differ in a tuned column are a search. A search of k runs, drawn from those made, is expected to end at `best_of(losses, k)`; how
fast that falls says whether a method was tuned enough to be compared (Dodge et al. 2019; Tang et al. 2020).
"""
from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from scaling.best_of import best_of_curve
from scaling.statistics import GROUP, columns_of, finished_runs

TUNED = ("lr",)


@dataclass(frozen=True)
class Search:
    """One cell. curve: [k] expected lowest loss (nats per token) of k runs, k from 1 (the mean) to all runs of the seed that has the fewest, the mean
    over the seeds; seeds: how many searches that is; best: the tuned values of the lowest loss, the mean over the seeds that have them; runs:
    finished ones that count; diverged: of the cell, in no curve, though a search would have paid for them; repeated: left out, since others of
    their seed have the same tuned values."""

    n_params: float
    tokens: float
    precision: str
    curve: np.ndarray
    best: tuple
    seeds: int
    runs: int
    diverged: int
    repeated: int


def searches(relation, tuned: Sequence[str] = TUNED) -> list[Search]:
    """The searches of a run table over the columns `tuned`, by size, tokens and precision; empty when no cell has two values of them. `seed` may be
    one of them: then the seeds themselves are searched. ValueError for a column that the table lacks."""
    columns = columns_of(relation)
    unknown = next((name for name in tuned if name not in columns), None)
    if unknown or not tuned:
        raise ValueError(f"tuned: {unknown!r} is no column of the table; it has {', '.join(columns)}" if unknown else "tuned: name at least "
                         "one column")
    row_of = {str(name or i): i for i, name in enumerate(columns["run_id"] if "run_id" in columns else [None] * len(relation))}
    kept = [i for i, name in enumerate(GROUP) if name not in tuned]
    cells: dict[tuple, dict] = defaultdict(lambda: defaultdict(dict))
    raw = {}
    for run in finished_runs(relation):
        row = row_of[run.run_id]
        values = tuple(columns[name][row] for name in tuned)
        if not any(value is None for value in values):
            cell = run.n_params, run.tokens, run.precision, run.corpus, tuple(run.group[i] for i in kept)
            cells[cell][None if "seed" in tuned else run.seed][run.run_id] = (values, run.loss)
            raw[cell] = _raw(columns, row, tuned)
    lost = Counter(_raw(columns, row, tuned) for row, status in enumerate(columns.get("status", [])) if status == "diverged")
    found = [_search(cell, by_seed, lost[raw[cell]]) for cell, by_seed in cells.items()]
    return sorted((search for search in found if search), key=lambda search: (search.n_params, search.tokens, search.precision))


def _raw(columns: dict[str, list], row: int, tuned: Sequence[str]) -> tuple:
    """What tells the cells of diverged runs, which have no loss, apart."""
    names = ("n_params", "tokens", "precision", "data", "data_sha256", *GROUP)
    return tuple(columns[name][row] for name in names if name in columns and name not in tuned)


def _search(cell: tuple, by_seed: dict, diverged: int) -> Search | None:
    curves, losses, repeated = [], defaultdict(list), 0
    for runs in by_seed.values():
        counts = Counter(values for values, _ in runs.values())
        alone = {values: loss for values, loss in runs.values() if counts[values] == 1}
        repeated += len(runs) - len(alone)
        if len(alone) > 1:
            curves.append(best_of_curve(list(alone.values())))
            for values, loss in alone.items():
                losses[values].append(loss)
    if not curves:
        return None
    common = [values for values in losses if len(losses[values]) == max(map(len, losses.values()))]
    best = min(common, key=lambda values: float(np.mean(losses[values])))
    length = min(map(len, curves))
    return Search(*cell[:3], np.mean([curve[:length] for curve in curves], axis=0), best, len(curves), sum(map(len, losses.values())),
                  diverged, repeated)


def shown_counts(longest: int) -> list[int]:
    """1, 2, 4, 8, ... below `longest`: the k that a table shows beside the largest."""
    return [2**power for power in range(longest.bit_length()) if 2**power < longest]
