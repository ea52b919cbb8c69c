"""How well a fit predicts: residuals, runs that it never saw, and the fan of its intervals beyond the data."""
from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from scaling.figures.sheet import COMPUTE, Rows, baseline, drawn, entry, frontier, held_entry, legend_above, loss_axis, rows_of, sheet, told
from scaling.plots import MARKERS
from scaling.result import Fit
from scaling.table import Source

GROUPS = ("#1f5a7a", "#b3611e", "#4c8c6b", "#8a4f7d", "#c2a83e", "#5d5d5d", "#7fb2d6", "#d6897f")
STEPS = 80
NEAR = 1.2  # runs within this factor of a path of constant D/N are drawn beside it


@drawn
def residuals(fit: Fit, runs: Source) -> Figure:
    """ln(observed/predicted) of every run in percent against 6 N D; a colour and a mark for each precision where there are at most eight;
    band: two residual standard deviations of the fitted runs."""
    rows = rows_of(fit, runs, "residuals")
    with np.errstate(all="ignore"):
        error = 100.0 * np.log(rows.loss / fit.law.predict(fit.params, **rows.inputs))
    figure, axis = sheet()
    sd = 100.0 * float(fit.metrics["residual_sd"])
    axis.axhspan(-2.0 * sd, 2.0 * sd, color="#e9e9e9", lw=0, zorder=0)
    axis.axhline(0.0, color="#888888", lw=0.8, zorder=1)
    groups = _groups(fit, rows)
    for (label, mine), colour, marker in zip(groups, GROUPS, MARKERS, strict=False):
        for chosen, face in ((mine & ~rows.held, colour), (mine & rows.held, "white")):
            if chosen.any():
                axis.plot(rows.compute[chosen], error[chosen], marker, color=colour, markerfacecolor=face, ms=3.2, mew=0.8,
                          label=label if face is colour else None)
    axis.set_xscale("log")
    axis.set_xlabel(COMPUTE)
    axis.set_ylabel("ln(observed/predicted) (%)")
    handles = axis.get_legend_handles_labels()[0] if len(groups) > 1 else []
    handles.append(entry(f"±2 sd of the fitted ({sd:.2g} %)", color="#dddddd", lw=5))
    factors = [factor.input for factor in fit.law.factors]
    legend_above(figure, handles + ([held_entry()] if rows.held.any() else []), ":".join(factors) if len(factors) > 1 and len(groups) > 1 else None)
    return figure


def _groups(fit: Fit, rows: Rows) -> list[tuple[str, np.ndarray]]:
    """(precision in words, its rows [R]); all in one where there are none or more than eight."""
    names = [name for name in fit.law.inputs if name not in ("N", "D")]
    kinds = list(dict.fromkeys(zip(*(rows.inputs[name].tolist() for name in names), strict=True))) if names else []
    if not 1 < len(kinds) <= len(GROUPS):
        return [("", np.ones(rows.loss.shape, dtype=bool))]
    each = [dict(zip(names, kind, strict=True)) for kind in sorted(kinds, key=str)]
    shared = [name for name in names if len({str(at[name]) for at in each}) == 1]
    return [(_short({k: v for k, v in at.items() if k not in shared}, fit), rows.like(at)) for at in each]


def _short(at: Mapping[str, object], fit: Fit) -> str:
    """`told`, with one number for operands that are all alike."""
    operands = {operand.input for operand in fit.law.operands}
    if len(at) > 1 and set(at) <= operands and len(set(at.values())) == 1 and told(at, fit.law):
        kind = {name.rpartition("_")[2] for name in at}
        value = next(iter(at.values()))
        return f"{value:g} bits" if kind == {"bits"} else f"error {value:.3g}"
    if set(at) <= {factor.input for factor in fit.law.factors}:
        return ":".join(map(str, at.values()))
    return told(at, fit.law) or "unquantized"


@drawn
def held_out(fit: Fit, runs: Source) -> Figure:
    """Held-out runs: ln(observed/predicted) in percent against 6 N D, over the interval of one run there (bars); red where it fell outside.
    ValueError when nothing was held out."""
    rows = rows_of(fit, runs, "held_out")
    held = rows.held
    if not held.any():
        raise ValueError("held_out: nothing was held out of this fit; fit with holdout=, such as \"N = max(N) OVER ()\"")
    at = {name: values[held] for name, values in rows.inputs.items()}
    predicted = fit.predict(**at, extrapolate=True)
    error, low, high = (100.0 * np.log(part / predicted.loss) for part in (rows.loss[held], predicted.low, predicted.high))
    outside = (error < low) | (error > high)
    figure, axis = sheet()
    axis.axhline(0.0, color="#888888", lw=0.8, zorder=0)
    axis.vlines(rows.compute[held], low, high, color="#b9cad6", lw=1.6, zorder=1)
    for chosen, colour, label in ((~outside, "#1f5a7a", "inside"), (outside, "#b3261e", "outside")):
        axis.plot(rows.compute[held][chosen], error[chosen], "o", color=colour, ms=3.2, zorder=3, label=f"{label}: {int(chosen.sum())}")
    edge = 6.0 * fit.ranges["N*D"][1]
    if edge < rows.compute[held].max():
        axis.axvline(edge, color="#555555", lw=0.8, ls=(0, (3, 2)), label="largest fitted")
    axis.set_xscale("log")
    axis.set_xlabel(COMPUTE)
    axis.set_ylabel("ln(observed/predicted) (%)")
    axis.set_title(f"{int(held.sum())} held-out runs, rms error {np.sqrt(np.mean(error**2)):.2f} %")
    handles = axis.get_legend_handles_labels()[0]
    handles.insert(2, entry(f"{fit.level:.0%} interval of a run", color="#b9cad6", lw=1.6))
    legend_above(figure, handles)
    return figure


@drawn
def interval_fan(fit: Fit, runs: Source, factor: float = 10.0, levels: Sequence[float] = (0.5, 0.8, 0.95), tokens_per_param: float | None = None,
                 at: Mapping[str, object] | None = None) -> Figure:
    """Predicted loss of one run against 6 N D with its intervals at `levels`, from the smallest run to `factor` times the largest fitted one.

    Along the law's frontier, or at a constant number of tokens per parameter; then runs within 20 % of it are drawn, else all. at: the law's
    other inputs, left out the baseline. Intervals are those of `fit.predict`: of the constants, of runs, and beyond the data of the law.
    """
    if not factor >= 1.0 or not all(0.0 < level < 1.0 for level in levels):
        raise ValueError(f"interval_fan: factor={factor:g}, levels={tuple(levels)}: need factor >= 1 and levels between 0 and 1")
    rows = rows_of(fit, runs, "interval_fan")
    at = baseline(fit, rows, at)
    edge = 6.0 * fit.ranges["N*D"][1]
    compute = np.geomspace(rows.compute.min(), max(edge * factor, rows.compute.max()), STEPS)
    N = frontier(fit, compute, at)[0] if tokens_per_param is None else np.sqrt(compute / 6.0 / tokens_per_param)
    where = {"N": N, "D": compute / 6.0 / N} | at
    figure, axis = sheet()
    handles = []
    for level, shade in zip(sorted(levels, reverse=True), np.linspace(0.14, 0.42, len(levels)), strict=True):
        predicted = dataclasses.replace(fit, level=level).predict(**where, extrapolate=True)
        handles.insert(0, axis.fill_between(compute, predicted.low, predicted.high, color="#1f5a7a", alpha=shade, lw=0, label=f"{level:.0%} of runs"))
    path = "frontier of the law" if tokens_per_param is None else f"{tokens_per_param:g} tokens per parameter"
    handles.insert(0, axis.plot(compute, fit.law.predict(fit.params, **where), color="#12354a", lw=1.3, label=path)[0])
    mine = rows.like(at) & (True if tokens_per_param is None else np.abs(np.log(rows.D / rows.N / tokens_per_param)) <= np.log(NEAR))
    for chosen, face, label in ((mine & ~rows.held, "#666666", "fitted runs"), (mine & rows.held, "white", "held-out runs")):
        if chosen.any():
            handles += axis.plot(rows.compute[chosen], rows.loss[chosen], "o", color="#666666", markerfacecolor=face, ms=2.8, mew=0.7, label=label)
    handles.append(axis.axvline(edge, color="#555555", lw=0.8, ls=(0, (3, 2)), label="largest fitted"))
    axis.set_xscale("log")
    loss_axis(axis, fit.law)
    axis.set_xlabel(COMPUTE)
    words = told(at, fit.law)
    legend_above(figure, handles, words or None)
    return figure
