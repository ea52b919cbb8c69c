"""What the figures share: the paper's style, one column of it, the rows of a fit, its baseline, and colours."""
from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from scaling.laws import Law
from scaling.laws.parameters import BASELINES
from scaling.optimum import zoom
from scaling.plots import INK, STYLE, count_label, size_colours
from scaling.refits import observed_of
from scaling.result import Fit
from scaling.table import Source

WIDTH, HEIGHT = 3.4, 2.7
"""Inches: a column of the usual two-column styles, so that the type is printed as large as it is set."""
PAPER = STYLE | {"font.size": 7.5, "axes.titlesize": 8.0, "axes.labelsize": 8.0, "xtick.labelsize": 7.0, "ytick.labelsize": 7.0,
                 "legend.fontsize": 7.0, "legend.title_fontsize": 7.0, "lines.linewidth": 1.2, "pdf.fonttype": 42, "savefig.dpi": 200,
                 "xtick.color": INK, "ytick.color": INK, "legend.handlelength": 1.4, "legend.borderaxespad": 0.2}
MAX_LISTED = 8  # sizes in a legend; more are told by a colour bar
COMPUTE = "training compute 6ND (FLOP)"


@dataclass(frozen=True)
class Rows:
    """The runs of a fit, [R] each: inputs of the law by name, loss (nats per token), held (not fitted)."""

    inputs: Mapping[str, np.ndarray]
    loss: np.ndarray
    held: np.ndarray

    @property
    def N(self) -> np.ndarray:
        return self.inputs["N"]

    @property
    def D(self) -> np.ndarray:
        return self.inputs["D"]

    @property
    def compute(self) -> np.ndarray:
        """6 N D, FLOP."""
        return 6.0 * self.N * self.D

    def like(self, at: Mapping[str, object]) -> np.ndarray:
        """[R] bool: the rows whose inputs are those of `at`."""
        same = np.ones(self.loss.shape, dtype=bool)
        for name, value in at.items():
            same &= self.inputs[name] == value
        return same


def rows_of(fit: Fit, runs: Source, what: str) -> Rows:
    """The rows that `fit` was made from. ValueError when the law has no N and D to draw against."""
    if not {"N", "D"} <= set(fit.law.inputs):
        raise ValueError(f"{what}: needs a law of N and D; {fit.law.name} takes {', '.join(fit.law.inputs)}")
    observed = observed_of(fit, runs)
    operands = {operand.input: operand for operand in fit.law.operands}  # beyond its neutral width a run is as untouched as any
    inputs = {name: values if name not in operands else np.where(operands[name].touched(values), values, operands[name].untouched)
              for name, values in observed.columns.items()}
    return Rows(inputs, observed.loss, observed.held)


def baseline(fit: Fit, rows: Rows | None, at: Mapping[str, object] | None = None) -> dict[str, object]:
    """A value for every input of the law besides N and D: of `at` where given, else unquantized, the level of efficiency 1, the
    commonest in `rows`. ValueError for a name that the law does not take, and for a value that nothing tells."""
    given, made = dict(at or {}), {}
    unknown = next((name for name in given if name not in fit.law.inputs or name in ("N", "D")), None)
    if unknown:
        others = [name for name in fit.law.inputs if name not in ("N", "D")]
        raise ValueError(f"at: {unknown!r} is none of the other inputs of law {fit.law.name}: {', '.join(others) or 'it has none'}")
    operands = {operand.input: operand for operand in fit.law.operands}
    factors = {factor.input: factor for factor in fit.law.factors}
    for name in (name for name in fit.law.inputs if name not in ("N", "D")):
        if name in given:
            made[name] = operands[name].numbers(given[name]).item() if name in operands else given[name]
        elif name in operands:
            made[name] = operands[name].untouched
        else:
            levels = unit_levels(fit, factors[name]) if name in factors else []
            if rows is None and not levels:
                raise ValueError(f"at: law {fit.law.name} has no baseline of {name}; give at={{{name!r}: ...}}, or the table of the fit")
            if levels:
                made[name] = levels[0]
                continue
            values, counts = np.unique(rows.inputs[name], return_counts=True)
            made[name] = values[np.argmax(counts)].item()
    return made


def unit_levels(fit: Fit, factor) -> list[str]:
    """The levels of a factor whose efficiency is 1, or whose added term is 0, by definition: fixed ones first, then those named as baselines."""
    levels, plain = fit.law.levels.get(factor.input, ()), 0.0 if factor.multiplies else 1.0
    return ([level for level in levels if fit.fixed.get(factor.name(level)) == plain]
            or [level for level in levels if level.lower() in BASELINES])


def told(at: Mapping[str, object], law: Law) -> str:
    """`at` in words, untouched operands left out: "forward FP8, backward FP8"; empty when nothing is left."""
    neutral = {operand.input: operand.untouched for operand in law.operands}
    return ", ".join(f"{name.replace('_', ' ')} {value:.4g}" if isinstance(value, (int, float)) else f"{name.replace('_', ' ')} {value}"
                     for name, value in at.items() if value != neutral.get(name))


def frontier(fit: Fit, compute: np.ndarray, at: Mapping[str, object]) -> tuple[np.ndarray, np.ndarray]:
    """(N, loss), [C] each: the size of the lowest loss at 6 N D = compute (FLOP) and that loss."""
    compute = np.atleast_1d(np.asarray(compute, dtype=np.float64))
    pairs = compute / 6.0

    def loss(log_N_CG):
        with np.errstate(all="ignore"):
            found = fit.law.predict(fit.params, N=np.exp(log_N_CG), D=pairs[:, None] / np.exp(log_N_CG), **at)
        return np.where(np.isnan(found), np.inf, found)

    log_N = zoom(loss, np.zeros(compute.shape), np.log(pairs))
    return np.exp(log_N), loss(log_N[:, None])[:, 0]


def drawn(function: Callable[..., Figure]) -> Callable[..., Figure]:
    """Makes the figure in the paper's style, whatever the caller's is."""
    @functools.wraps(function)
    def styled(*args, **kwargs):
        with matplotlib.rc_context(PAPER):
            return function(*args, **kwargs)
    return styled


def sheet(height: float = HEIGHT):
    """(figure, axis): one panel, one column wide."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axis = figure.subplots()
    plain(axis)
    return figure, axis


def plain(axis) -> None:
    """Ticks are made when the figure is saved, by then in the caller's style, so theirs is set here."""
    for which in ("x", "y"):
        axis.tick_params(axis=which, which="both", labelsize=PAPER["xtick.labelsize"], color="#777777", labelcolor=INK)
        axis.tick_params(axis=which, which="minor", length=1.5)
    axis.grid(True, color=PAPER["grid.color"], lw=PAPER["grid.linewidth"])


def log_ticks(axis, which: str, values, most: int = 5) -> None:
    """A logarithmic axis with ticks at the values themselves where they are few, else at 1, 2, 5 of as many decades as there are."""
    values = np.unique(np.asarray(values, dtype=np.float64))
    low, high = values[0], values[-1]
    (axis.set_xscale if which == "x" else axis.set_yscale)("log")
    if values.size > most:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        steps = (1, 2, 5) if high / low < 30 else (1,)
        ticks = np.array([step * 10.0**power for power in decades for step in steps])
        values = ticks[(ticks >= low / 1.05) & (ticks <= high * 1.05)]
        values = values[:: math.ceil(values.size / 6) or 1]
    if values.size >= 2:
        (axis.set_xticks if which == "x" else axis.set_yticks)(values, [count_label(value) for value in values])
        (axis.xaxis if which == "x" else axis.yaxis).set_minor_formatter(matplotlib.ticker.NullFormatter())


def loss_axis(axis, law: Law, which: str = "y") -> None:
    """A logarithmic axis of losses, which hardly span a decade: plain numbers on it, and the law's unit beside it."""
    (axis.set_xlabel if which == "x" else axis.set_ylabel)(f"loss ({law.unit})")
    (axis.set_xscale if which == "x" else axis.set_yscale)("log")
    side = axis.xaxis if which == "x" else axis.yaxis
    side.set_major_locator(matplotlib.ticker.LogLocator(subs=[1.0]))
    side.set_minor_locator(matplotlib.ticker.MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    for formatter in (side.set_major_formatter, side.set_minor_formatter):
        formatter(matplotlib.ticker.StrMethodFormatter("{x:g}"))
    axis.tick_params(axis=which, which="minor", length=3.5)


def size_marks(figure: Figure, axis, x, y, N, held, faint=None) -> None:
    """Marks at (x, y), [R], coloured by size N; hollow where `held`, grey where `faint`. A legend where sizes are few, else a colour bar."""
    faint = np.zeros(len(x), dtype=bool) if faint is None else faint
    if faint.any():
        axis.plot(x[faint], y[faint], ".", color="#c4c4c4", ms=3.5, zorder=1, label="other precisions")
    sizes = np.unique(N[~faint])
    if sizes.size <= MAX_LISTED:
        for size, colour in size_colours(sizes.tolist()).items():
            label = f"{count_label(size)} parameters"
            for chosen, face in ((~held, colour), (held, "white")):
                mine = chosen & (N == size) & ~faint
                if mine.any():
                    axis.plot(x[mine], y[mine], "o", color=colour, markerfacecolor=face, ms=3.8, mew=0.9, zorder=3, label=label)
                    label = None
        return
    norm, shades = matplotlib.colors.LogNorm(sizes[0], sizes[-1]), matplotlib.colormaps["YlGnBu"]
    shades = matplotlib.colors.LinearSegmentedColormap.from_list("sizes", shades(np.linspace(0.35, 1.0, 64)))
    colours = shades(norm(N))
    for chosen, faces in ((~held & ~faint, colours), (held & ~faint, np.ones_like(colours))):
        if chosen.any():
            axis.scatter(x[chosen], y[chosen], s=9, facecolors=faces[chosen], edgecolors=colours[chosen], linewidths=0.8, zorder=3)
    bar = figure.colorbar(matplotlib.cm.ScalarMappable(norm, shades), ax=axis, pad=0.02, aspect=30)
    bar.set_label("parameters N")
    bar.outline.set_visible(False)
    ticks = 10.0 ** np.arange(math.ceil(math.log10(sizes[0])), math.floor(math.log10(sizes[-1])) + 1)
    bar.set_ticks(ticks, labels=[count_label(tick) for tick in ticks])
    bar.ax.minorticks_off()
    bar.ax.tick_params(labelsize=PAPER["ytick.labelsize"])


def legend_above(figure: Figure, handles: list, title: str | None = None) -> None:
    """A legend in two columns above the panel, where it covers no data."""
    figure.legend(handles=handles, loc="outside upper left", ncols=2, columnspacing=1.0, title=title, alignment="left")


def held_entry() -> matplotlib.lines.Line2D:
    """The legend's mark of held-out runs."""
    return entry("held out", color="#666666", marker="o", ls="", markerfacecolor="white", ms=3.8)


def entry(label: str, **how) -> matplotlib.lines.Line2D:
    """A line of a legend."""
    return matplotlib.lines.Line2D([], [], label=label, **how)
