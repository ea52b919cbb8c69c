"""What precision costs: loss against bits, and the efficiency of each scheme against its bits or its error."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from scaling.figures.sheet import Rows, baseline, drawn, held_entry, legend_above, loss_axis, rows_of, sheet, told, unit_levels
from scaling.laws.parameters import Factor
from scaling.plots import MARKERS, count_label, size_colours
from scaling.result import Fit
from scaling.table import Source

GRID = 100
BAND = 25  # points at which the interval of a curve is worked out
WIDEST, SMALLEST = 16.0, 1e4  # of a curve up to the unquantized: bits, and how far its error goes down
ERROR, BITS = "relative error on Gaussian data (MSE)", "width (bits)"


@drawn
def bits_curves(fit: Fit, runs: Source, D: float | None = None, vary: Sequence[str] | None = None, at: Mapping[str, object] | None = None) -> Figure:
    """Loss against the width of the operands, one curve per size, at D tokens (left out: where most widths of most sizes were trained).

    vary: the inputs that share the width, left out all widths that the fit knows; the others stay as in `at`, left out unquantized. For
    a law of layouts the width is 1 + E + M, runs are of any layout and the curve is that of the best (real-valued) one. Unquantized runs
    and the law there stand apart on the right.
    """
    rows = rows_of(fit, runs, "bits_curves")
    width, inputs, vary = _widths(fit, rows, vary)
    at = {name: value for name, value in baseline(fit, rows, at).items() if name not in vary}
    mine = rows.like(at) & ~np.isnan(width)
    if not mine.any():
        raise ValueError(f"bits_curves: no run has one width for {', '.join(vary)}" + (f" and {told(at, fit.law)}" if told(at, fit.law) else "")
                         + "; give vary=, the inputs whose width varies together, or at=")
    D = _budget(rows, width, mine) if D is None else D
    mine &= np.abs(np.log(rows.D / D)) < 0.01
    finite = np.unique(width[mine & np.isfinite(width)])
    if finite.size < 2:
        raise ValueError(f"bits_curves: {finite.size} width(s) trained at D={D:g} tokens; a curve needs two (budgets: {_some(np.unique(rows.D))})")
    end = finite[-1] + max(1.5, 0.25 * (finite[-1] - finite[0]))
    apart = np.isinf(width)
    figure, axis = sheet(3.0)
    grid = np.linspace(finite[0], finite[-1], GRID)
    sizes = np.unique(rows.N[mine])[::-1]
    for (size, colour), marker in zip(size_colours(sizes.tolist()).items(), MARKERS * len(sizes), strict=False):
        axis.plot(grid, fit.law.predict(fit.params, N=size, D=D, **at, **inputs(grid)), color=colour, label=f"{count_label(size)} parameters")
        own = mine & (rows.N == size)
        if (own & apart).any():
            axis.plot([end - 0.4, end + 0.4], [fit.law.predict(fit.params, N=size, D=D, **at, **inputs(np.inf))] * 2, color=colour)
        for chosen, face in ((own & ~rows.held, colour), (own & rows.held, "white")):
            axis.plot(np.where(apart, end, width)[chosen], rows.loss[chosen], marker, color=colour, markerfacecolor=face, ms=3.8, mew=0.9)
    ticks = {bits: f"{bits:g}" for bits in finite} | ({end: "unquantized"} if (mine & apart).any() else {})
    axis.set_xticks(list(ticks), list(ticks.values()))
    loss_axis(axis, fit.law)
    axis.set_xlabel(BITS)
    words = [f"{count_label(D)} tokens", told(at, fit.law), "curves: best layout" if "man_bits" in vary else ""]
    axis.set_title(", ".join(filter(None, words)))
    legend_above(figure, axis.get_legend_handles_labels()[0][::-1] + ([held_entry()] if (mine & rows.held).any() else []))
    return figure


def _widths(fit: Fit, rows: Rows, vary: Sequence[str] | None) -> tuple[np.ndarray, Callable, tuple[str, ...]]:
    """(width [R], NaN where operands differ and inf where none is quantized; width -> inputs; the names of these)."""
    if {"exp_bits", "man_bits"} <= set(fit.law.inputs):
        def layout(bits):
            man = fit.law.functionals["best_man_bits_real"](fit.params, bits)
            return {"exp_bits": bits - 1.0 - man, "man_bits": man}
        return 1.0 + rows.inputs["exp_bits"] + rows.inputs["man_bits"], layout, ("exp_bits", "man_bits")
    known = [name for name in fit.at_width(1.0) if name.endswith("_bits")]
    vary = tuple(vary or known)
    if not vary or not set(vary) <= set(known):
        raise ValueError(f"bits_curves: {', '.join(vary) or fit.label} is no width that this fit knows; it knows {', '.join(known) or 'none'}")
    operands = {operand.input: operand for operand in fit.law.operands}
    columns = np.array([np.where(operands[name].touched(rows.inputs[name]), rows.inputs[name], np.inf) for name in vary])
    width = np.where((columns == columns[0]).all(axis=0), columns[0], np.nan)
    return width, lambda bits: dict.fromkeys(vary, bits), vary


def _budget(rows: Rows, width: np.ndarray, mine: np.ndarray) -> float:
    """Where most pairs of size and width were trained, the largest of these."""
    budgets = np.unique(rows.D[mine])
    at = {D: mine & (rows.D == D) for D in budgets}
    return float(max(budgets, key=lambda D: (len(set(zip(rows.N[at[D]], width[at[D]], strict=True))), D)))


def _some(values: np.ndarray) -> str:
    shown = ", ".join(f"{value:g}" for value in values[:8])
    return shown + (f" and {values.size - 8} more" if values.size > 8 else "")


@drawn
def effective_parameters(fit: Fit, x: Mapping[str, float] | None = None, xlabel: str = "", curve: Fit | None = None) -> Figure:
    """Efficiency, N_eff/N (D_eff/D), with its interval: a point per scheme of a law with names of schemes, against x[scheme] or in a row of
    names; a curve of a law that knows it as a function of bits or of the quantizer's error.

    x: scheme -> number, schemes that it lacks are left out. curve: another fit, drawn over the points of `fit`; what its axis means, x means.
    """
    known = fit if "efficiency" in fit.law.functionals else curve
    if known is not None and "efficiency" not in known.law.functionals:
        raise ValueError(f"effective_parameters: law {known.law.name} has no efficiency curve; kumar, mse_efficiency have one")
    if known is not fit and not _efficiencies(fit):
        raise ValueError(f"effective_parameters: law {fit.law.name} has no efficiencies; quartet, free_efficiency, kumar, mse_efficiency have")
    figure, axis = sheet()
    places = _points(axis, fit, x) if _efficiencies(fit) else []
    if known is not None:
        if _efficiencies(fit) and x is None:
            raise ValueError("effective_parameters: a curve needs x=, the bits or the error of every scheme, beside the points")
        _efficiency_curve(axis, known, places)
    axis.axhline(1.0, color="#888888", lw=0.8, zorder=0)
    axis.set_ylim(bottom=0.0)
    axis.set_ylabel(_efficiency_of(fit))
    axis.set_xlabel(xlabel or axis.get_xlabel())
    axis.legend()
    return figure


def _efficiencies(fit: Fit) -> list[Factor]:
    """The columns of names whose levels have an efficiency; an amplitude or an exponent of a level is none."""
    return [factor for factor in fit.law.factors if factor.kind == "scale"]


def _efficiency_of(fit: Fit) -> str:
    kinds = {"N": r"$N_{\mathrm{eff}}/N$", "D": r"$D_{\mathrm{eff}}/D$"}
    names = [kinds.get(factor.parameter[-1], kinds["N"]) for factor in _efficiencies(fit)] or [kinds["N"]]
    return "efficiency " + ", ".join(dict.fromkeys(names))


def _points(axis, fit: Fit, x: Mapping[str, float] | None) -> list[float]:
    """Draws the efficiencies of every factor; returns their places."""
    shown = [(factor, level) for factor in _efficiencies(fit) for level in fit.law.levels[factor.input]
             if level not in unit_levels(fit, factor) and (x is None or level in x)]
    if not shown:
        raise ValueError(f"effective_parameters: x names none of the schemes {', '.join(_levels(fit))}")
    shown.sort(key=lambda pair: (pair[0].parameter[-1] != "N", fit.params[pair[0].name(pair[1])]))  # sizes first, then data
    for i, factor in enumerate(_efficiencies(fit)):
        own = [(k if x is None else float(x[level]), fit.estimate(factor.name(level))) for k, (one, level) in enumerate(shown) if one is factor]
        if own:
            at, found = [place for place, _ in own], [estimate for _, estimate in own]
            value = np.array([estimate.value for estimate in found])
            sides = [value - [estimate.low for estimate in found], np.array([estimate.high for estimate in found]) - value]
            axis.errorbar(at, value, yerr=np.maximum(sides, 0.0), fmt=MARKERS[i], color=("#1f5a7a", "#b3611e")[i % 2], ms=4.2, lw=1.0,
                          capsize=2.0, label=_label(fit, factor), zorder=3)
    if x is None:
        names = [f"{factor.input} {level}" if len(_efficiencies(fit)) > 1 else level for factor, level in shown]
        axis.set_xticks(range(len(shown)), names, rotation=35 if len(shown) > 4 else 0, ha="right" if len(shown) > 4 else "center")
        axis.set_xlim(-0.6, len(shown) - 0.4)
        axis.grid(False, axis="x")
    return [] if x is None else [float(x[level]) for _, level in shown]


def _levels(fit: Fit) -> list[str]:
    return list(dict.fromkeys(level for factor in _efficiencies(fit) for level in fit.law.levels[factor.input]))


def _label(fit: Fit, factor: Factor) -> str:
    what = {"effN": "forward", "effD": "backward"}.get(factor.parameter, "per scheme")
    return f"{what}, {fit.level:.0%} interval"


def _efficiency_curve(axis, fit: Fit, places: Sequence[float]) -> None:
    """N_eff/N with all operands that the fit knows at one width or one error, over its own range and that of the points."""
    names = list(fit.at_width(1.0))
    errors = all(name.endswith("_mse") for name in names)
    trained = [fit.ranges[name] for name in names if name in fit.ranges]  # one end is that of unquantized runs: an error of 0, 32 bits
    ends = [*places, *(end for low, high in trained for end in ((max(low, high / SMALLEST), high) if errors else (low, min(high, WIDEST))))]
    if len(set(ends)) < 2:
        raise ValueError(f"effective_parameters: the fit of {fit.label} was trained at one width or error only")
    space = np.geomspace if errors else np.linspace
    grid, coarse = space(min(ends), max(ends), GRID), space(min(ends), max(ends), BAND)
    efficiency = fit.law.functionals["efficiency"]
    axis.plot(grid, [float(efficiency(fit.params, **fit.at_width(v))) for v in grid], color="#333333",
              label=f"{fit.law.name.replace('_', ' ')}, {fit.level:.0%} interval")
    band = [fit.estimate("efficiency", **fit.at_width(v)) for v in coarse]
    axis.fill_between(coarse, [one.low for one in band], [one.high for one in band], color="#333333", alpha=0.13, lw=0)
    if errors:
        axis.set_xscale("log")
    axis.set_xlabel(ERROR if errors else BITS)
