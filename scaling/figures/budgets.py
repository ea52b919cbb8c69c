"""Loss against compute with the frontier, and isoFLOP parabolas (Hoffmann et al. 2022, arXiv 2203.15556, Approaches 1 and 2)."""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from scaling.figures.sheet import (
    COMPUTE,
    MAX_LISTED,
    baseline,
    drawn,
    entry,
    frontier,
    held_entry,
    legend_above,
    log_ticks,
    loss_axis,
    rows_of,
    sheet,
    size_marks,
    told,
)
from scaling.plots import size_colours
from scaling.result import Fit
from scaling.table import Source

SAME = 0.1  # budgets this near each other, in ln(6 N D), are one
MIN_SIZES = 4  # at a budget: a parabola has three constants
MOST = 7  # budgets drawn


@dataclass(frozen=True)
class Parabola:
    """loss = c0 + c1 u + c2 u^2, u = ln(N/N_middle), least squares over the runs of one budget. compute: their geometric mean, FLOP;
    N, loss: [R]; vertex: (N, loss) of the minimum, None when it lies outside of the sizes or the parabola opens downwards."""

    compute: float
    N: np.ndarray
    loss: np.ndarray
    middle: float
    coefficients: tuple[float, float, float]
    vertex: tuple[float, float] | None

    def __call__(self, N):
        return np.polynomial.polynomial.polyval(np.log(np.asarray(N) / self.middle), self.coefficients)


@drawn
def loss_against_compute(fit: Fit, runs: Source, at: Mapping[str, object] | None = None) -> Figure:
    """Loss against 6 N D: the runs, the law's curve of each size where sizes are few, and the frontier, the law's lowest loss at a compute.

    at: the law's other inputs, for curves and frontier ({"forward": "FP4"}); left out, the baseline. Runs at others are grey dots.
    """
    rows = rows_of(fit, runs, "loss_against_compute")
    at = baseline(fit, rows, at)
    figure, axis = sheet()
    mine = rows.like(at)
    size_marks(figure, axis, rows.compute, rows.loss, rows.N, rows.held, ~mine)
    span = np.geomspace(rows.compute.min(), rows.compute.max(), 120)
    sizes = np.unique(rows.N[mine])
    if sizes.size <= MAX_LISTED:
        for size, colour in size_colours(sizes.tolist()).items():
            own = rows.compute[mine & (rows.N == size)]
            curve = np.geomspace(own.min(), own.max(), 60)
            axis.plot(curve, fit.law.predict(fit.params, N=size, D=curve / 6.0 / size, **at), color=colour, lw=0.9, zorder=2)
    _, lowest = frontier(fit, span, at)
    line, = axis.plot(span, lowest, color="#b3261e", lw=1.5, zorder=4, label="frontier of the law")
    line.set_gid("frontier")
    axis.set_xscale("log")
    loss_axis(axis, fit.law)
    axis.set_xlabel(COMPUTE)
    words = told(at, fit.law)
    if words:
        axis.set_title(f"curves: {words}")
    handles = axis.get_legend_handles_labels()[0] + ([held_entry()] if rows.held.any() else [])
    axis.legend(handles=handles, loc="upper right")
    return figure


def parabolas(N: np.ndarray, D: np.ndarray, loss: np.ndarray, budgets: Sequence[float] | None = None) -> list[Parabola]:
    """One for every budget (6 N D within 10 %) with at least four sizes, by rising compute. N, D, loss: [R]. budgets: FLOP; left out,
    found in the runs, the seven with most runs.

    Approach 2 of Hoffmann et al. 2022. Its vertices are biased where the sizes are wide apart or off-centre (arXiv 2603.22339).
    """
    logs = np.log(6.0 * N * D)
    centres = _budgets(logs) if budgets is None else [math.log(budget) for budget in budgets]
    groups = [(centre, np.abs(logs - centre) <= (0.5 * SAME if budgets is None else SAME)) for centre in centres]
    groups = [(centre, inside) for centre, inside in groups if np.unique(N[inside]).size >= MIN_SIZES]
    if not groups:
        raise ValueError(f"isoflop: no budget (6 N D within {SAME:.0%}) has {MIN_SIZES} sizes or more; "
                         + ("an isoFLOP sweep trains several sizes at each" if budgets is None
                            else f"given: {', '.join(f'{b:g}' for b in budgets)} FLOP"))
    if budgets is None:
        groups = sorted(sorted(groups, key=lambda group: -group[1].sum())[:MOST], key=lambda group: group[0])
    return [_parabola(N[inside], loss[inside], float(np.exp(logs[inside].mean()))) for _, inside in groups]


def _budgets(logs: np.ndarray) -> list[float]:
    """Centres of windows of width SAME, the fullest first, each run in one of them."""
    left, centres = np.sort(logs), []
    while left.size:
        counts = np.searchsorted(left, left + SAME, side="right") - np.arange(left.size)
        start = int(np.argmax(counts))
        centres.append(float(left[start] + 0.5 * SAME))
        left = np.delete(left, slice(start, start + counts[start]))
    return centres


def _parabola(N: np.ndarray, loss: np.ndarray, compute: float) -> Parabola:
    middle = float(np.exp(np.log(N).mean()))
    c = np.polynomial.polynomial.polyfit(np.log(N / middle), loss, 2)
    vertex = None
    if c[2] > 0:
        best = middle * math.exp(-0.5 * c[1] / c[2])
        if N.min() <= best <= N.max():
            vertex = (best, float(c[0] - 0.25 * c[1] ** 2 / c[2]))
    return Parabola(compute, N, loss, middle, tuple(map(float, c)), vertex)


@drawn
def isoflop(fit: Fit, runs: Source, budgets: Sequence[float] | None = None, at: Mapping[str, object] | None = None) -> Figure:
    """Loss against N at equal compute: the runs, a parabola in ln N per budget (dashed) with its vertex, and the law's curve (solid) with
    its optimum. at: the law's other inputs; only runs there are used. budgets: FLOP, see `parabolas`."""
    rows = rows_of(fit, runs, "isoflop")
    at = baseline(fit, rows, at)
    mine = rows.like(at)
    made = parabolas(rows.N[mine], rows.D[mine], rows.loss[mine], budgets)
    figure, axis = sheet(3.0)
    shades = matplotlib.colormaps["viridis"](np.linspace(0.9, 0.1, len(made)))
    for parabola, colour in zip(made, shades, strict=True):
        grid = np.geomspace(parabola.N.min() / 1.1, parabola.N.max() * 1.1, 100)
        axis.plot(parabola.N, parabola.loss, "o", color=colour, ms=2.8, label=_flops(parabola.compute))
        axis.plot(grid, parabola(grid), color=colour, lw=0.8, ls=(0, (3, 2)))
        axis.plot(grid, fit.law.predict(fit.params, N=grid, D=parabola.compute / 6.0 / grid, **at), color=colour, lw=1.1)
        if parabola.vertex:
            axis.plot(*parabola.vertex, "x", color="#b3261e", ms=5, mew=1.4, zorder=5)
    sizes, lowest = frontier(fit, np.array([parabola.compute for parabola in made]), at)
    line, = axis.plot(sizes, lowest, "D-", color="#222222", ms=2.8, lw=0.8, zorder=4)
    line.set_gid("frontier")
    log_ticks(axis, "x", rows.N[mine])
    loss_axis(axis, fit.law)
    axis.set_xlabel("parameters N")
    budgets_legend = figure.legend(*_unique(axis), loc="outside right upper", title="6ND (FLOP)", alignment="left", handletextpad=0.3)
    budgets_legend.set_zorder(6)
    kinds = [entry("law", color="#555555", lw=1.1), entry("parabola", color="#555555", lw=0.8, ls=(0, (3, 2))),
             entry(_vertices(made), color="#b3261e", marker="x", ls="", ms=5, mew=1.4),
             entry("optimum of the law", color="#222222", marker="D", lw=0.8, ms=2.8)]
    legend_above(figure, kinds)
    return figure


def _unique(axis) -> tuple[list, list]:
    handles, labels = axis.get_legend_handles_labels()
    return handles[::-1], labels[::-1]


def _flops(value: float) -> str:
    return f"{value:.1e}".replace("e+", "e")


def _vertices(made: Sequence[Parabola]) -> str:
    """The legend of the vertices, with the slope of ln N over ln C through them when there are three: Approach 2's exponent a."""
    points = [(math.log(one.compute), math.log(one.vertex[0])) for one in made if one.vertex]
    if len(points) < 3:
        return "vertex"
    return f"vertex ($N \\propto C^{{{np.polyfit(*zip(*points, strict=True), 1)[0]:.2f}}}$)"
