"""The map of forward:backward precisions of Quartet (Castro et al. 2025, arXiv 2505.14669, Figure 1b, c), from `scaling.regions`."""
from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from scaling.figures.sheet import baseline, drawn, log_ticks, rows_of, sheet
from scaling.reach import MAX_REACH
from scaling.regions import BUDGETS, Scheme, regions
from scaling.result import Fit
from scaling.table import Source

COLOURS = ("#d9d9d9", "#a9c9e0", "#f3c58f", "#b7d7b0", "#e3b3b3", "#cdbbe0", "#e6e08f", "#9fd5d1")
CELLS = 240
LABELLED = 0.03  # of the map: smaller regions are in a legend


@drawn
def region_map(fit: Fit, schemes: Sequence[Scheme], N_max: tuple[float, float] = (1e7, 1e11), tokens_per_param: tuple[float, float] = (10.0, 3000.0),
               runs: Source | None = None, at: Mapping[str, object] | None = None, budget: str = BUDGETS[0], extrapolate: bool = True) -> Figure:
    """Which scheme has the lowest loss at a budget of inference, N_max (parameters), and of training, N_max D_max (D_max/N_max: tokens per
    parameter); `budget` "training": with the size given and only the training paid. The base precision's law is that of `fit` at `at`, left
    out its baseline. runs: the table of the fit, whose cells are then drawn: beyond them the map extrapolates. extrapolate: False leaves
    white what lies more than 30 times beyond the fitted range.
    """
    if not 1 <= len(schemes) <= len(COLOURS):
        raise ValueError(f"region_map: {len(schemes)} schemes; give 1 to {len(COLOURS)}")
    rows = rows_of(fit, runs, "region_map") if runs is not None else None
    at = baseline(fit, rows, at)
    sizes, ratios = np.geomspace(*N_max, CELLS), np.geomspace(*tokens_per_param, CELLS)
    best = regions(base_loss(fit, fit.params, at), schemes, sizes, ratios[:, None], budget)
    shown = np.ones(best.shape, dtype=bool) if extrapolate else within_reach(fit, schemes, sizes, ratios[:, None], budget)
    if not shown.any():
        raise ValueError("region_map: the whole map lies more than 30 times beyond the fitted runs; extrapolate=True draws it")
    figure, axis = sheet()
    axis.grid(False)
    shades = matplotlib.colors.ListedColormap(COLOURS[:len(schemes)])
    axis.pcolormesh(sizes, ratios, np.ma.masked_array(best, ~shown), cmap=shades, vmin=-0.5, vmax=len(schemes) - 0.5, shading="nearest",
                    rasterized=True)
    log_ticks(axis, "x", sizes)
    log_ticks(axis, "y", ratios)
    small = []
    for i, scheme in enumerate(schemes):
        inside = (best == i) & shown
        if inside.mean() >= LABELLED:
            row, column = _middle(inside)
            axis.text(sizes[column], ratios[row], scheme.name, ha="center", va="center", fontsize=8.0, zorder=5,
                      bbox={"facecolor": COLOURS[i], "edgecolor": "none", "pad": 1.5})
            axis.contour(sizes, ratios, inside.astype(float), levels=[0.5], colors="#555555", linewidths=0.7)
        elif inside.any():
            small.append(matplotlib.patches.Patch(color=COLOURS[i], label=scheme.name))
    if (~shown).mean() >= LABELLED:
        row, column = _middle(~shown)
        axis.text(sizes[column], ratios[row], f"more than {MAX_REACH:g}x\nbeyond the runs", ha="center", va="center", fontsize=6.5, color="#777777")
    if small:
        axis.legend(handles=small, loc="lower right", frameon=True)
    if rows is not None:
        axis.plot(rows.N, rows.D / rows.N, ".", color="#222222", ms=2.5, zorder=6)
    axis.set_xlim(*N_max)
    axis.set_ylim(*tokens_per_param)
    both = budget == BUDGETS[0]
    axis.set_xlabel("parameters $N_{max}$ (inference budget)" if both else "parameters N")
    axis.set_ylabel("tokens per parameter $D_{max}/N_{max}$" if both else "tokens per parameter D/N")
    axis.set_title("scheme (forward:backward) of the lowest loss")
    return figure


def base_loss(fit: Fit, params: Mapping[str, float], at: Mapping[str, object]):
    """The loss of the base precision as `scaling.regions` takes it; a scheme's own inputs replace those of `at`."""
    return lambda N, D, **inputs: fit.law.predict(params, N=N, D=D, **{**at, **inputs})


def within_reach(fit: Fit, schemes: Sequence[Scheme], N_max, ratio, budget: str) -> np.ndarray:
    """Where no scheme has a training more than 30 times outside of the fitted range of N, D or N D; bool of the broadcast shape."""
    inside = np.ones(np.broadcast_shapes(np.shape(N_max), np.shape(ratio)), dtype=bool)
    for larger, longer in (scheme.growth(budget) for scheme in schemes):
        N, D = N_max * larger, N_max * ratio * longer
        for name, value in (("N", N), ("D", D), ("N*D", N * D)):
            low, high = fit.ranges.get(name, (0.0, np.inf))
            inside &= (value >= low / MAX_REACH * (1 - 1e-9)) & (value <= high * MAX_REACH * (1 + 1e-9))
    return inside


def _middle(inside: np.ndarray) -> tuple[int, int]:
    """(row, column) of the cell of a region that is farthest from its edge and from the map's."""
    left, depth = np.pad(inside, 1), np.zeros(inside.shape, dtype=int)
    while left.any():  # peels the region from outside, a cell a round
        depth += left[1:-1, 1:-1]
        left[1:-1, 1:-1] &= left[:-2, 1:-1] & left[2:, 1:-1] & left[1:-1, :-2] & left[1:-1, 2:]
    row, column = np.unravel_index(int(np.argmax(depth)), depth.shape)
    return int(row), int(column)
