"""The figures of a report, as matplotlib Figures: pure functions of runs and fits, no pyplot, no global state.

Losses are nats per token throughout. Sizes are told apart by colour from light to dark, precisions by colour from warm (narrow) to black
(unquantized); held-out runs are hollow. Lines are the fitted law where there is one, else they join the measured points.
"""
from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from scaling.result import Fit
from scaling.searches import Search
from scaling.statistics import UNQUANTIZED_BITS, Gap, Run

INK, FAINT = "#222222", "#d9d9d9"
STYLE = {
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 9.0, "axes.titlesize": 9.5, "axes.labelsize": 9.0,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#777777", "axes.linewidth": 0.8, "axes.labelcolor": INK,
    "axes.titlelocation": "left", "axes.grid": True, "grid.color": "#ececec", "grid.linewidth": 0.7, "axes.axisbelow": True,
    "xtick.color": "#555555", "ytick.color": "#555555", "xtick.labelsize": 8.0, "ytick.labelsize": 8.0, "text.color": INK,
    "legend.frameon": False, "legend.fontsize": 8.0, "lines.linewidth": 1.3, "svg.fonttype": "none", "figure.dpi": 96,
}
MARKERS = "osD^vPX*"
DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))


def style():
    """Context in which figures must be made and saved."""
    return matplotlib.rc_context(STYLE)


def to_svg(figure: Figure, name: str) -> str:
    """The figure as an inline <svg> element; `name` salts the ids, which keeps those of several figures on one page apart and the
    file reproducible; ids that nothing refers to (axes_1, patch_2, alike in every figure) are left out."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg"):]
    head, rest = text[:text.index(">")], text[text.index(">"):]
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    wanted = set(re.findall(r'(?:href="|url\()#([^")]+)', rest))
    rest = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in wanted else "", rest)
    return f'{head} role="img" aria-label="{name}"{rest}'


def count_label(value: float) -> str:
    """2304 -> "2.3k", 1.5e6 -> "1.5M"."""
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:g}"


def size_colours(sizes: Sequence[float]) -> dict[float, tuple]:
    """Light to dark blue-green with size."""
    shades = matplotlib.colormaps["YlGnBu"](np.linspace(0.40, 0.98, max(len(sizes), 2)))
    return {size: tuple(shade) for size, shade in zip(sorted(sizes), shades[-len(sizes):], strict=True)}


def precision_colours(runs: Sequence[Run]) -> dict[str, tuple]:
    """Precision -> colour, narrowest first: warm to violet; unquantized ones are black and greys."""
    widths = {run.precision: run.bits for run in runs}
    narrow = sorted((name for name, bits in widths.items() if math.isfinite(bits)), key=lambda name: (widths[name], name))
    wide = sorted(name for name, bits in widths.items() if not math.isfinite(bits))
    shades = matplotlib.colormaps["plasma"](np.linspace(0.78, 0.12, max(len(narrow), 1)))
    greys = ["#111111", "#666666", "#999999", "#bbbbbb"]
    return dict(zip(narrow, map(tuple, shades), strict=False)) | {name: greys[min(i, 3)] for i, name in enumerate(wide)}


def _panels(count: int, width: float = 9.6, height: float = 3.1, most: int = 4, sharey: bool = True) -> tuple[Figure, list]:
    """A figure with `count` panels in rows of at most `most`; unused ones are removed."""
    columns = min(count, most)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(width if columns > 1 else 6.6, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=sharey).ravel()
    for axis in axes[count:]:
        axis.remove()
    return figure, list(axes[:count])


class _BitAxis:
    """Bits on a linear axis; unquantized runs stand two units right of the widest, beyond a gap, labelled with their name."""

    def __init__(self, runs: Sequence[Run]):
        self.finite = sorted({run.bits for run in runs if math.isfinite(run.bits)})
        self.end = (self.finite[-1] if self.finite else 4.0) + max(1.5, 0.25 * (len(self.finite) and self.finite[-1] - self.finite[0]))
        self.reference = next((run.precision for run in runs if not math.isfinite(run.bits)), None)

    def place(self, bits: float) -> float:
        return bits if math.isfinite(bits) else self.end

    def grid(self) -> np.ndarray:
        return np.linspace(self.finite[0] - 0.15, self.finite[-1] + 0.3, 120)

    def dress(self, axis) -> None:
        ticks, labels = list(self.finite), [f"{bits:g}" for bits in self.finite]
        if self.reference:
            ticks, labels = [*ticks, self.end], [*labels, self.reference]
            axis.axvline(0.5 * (self.end + (self.finite or [self.end - 2])[-1]), color="#bbbbbb", lw=0.8, ls=(0, (2, 3)))
        axis.set_xticks(ticks, labels)
        axis.set_xlabel("width of quantized operands (bits)")


def _curve(fit: Fit | None, n_params: float, tokens, bits):
    """The law's loss, or None when there is no single curve over bits to draw."""
    if fit is None or not fit.one_knob:
        return None
    with np.errstate(all="ignore"):
        return fit.law.predict(fit.params, N=np.asarray(n_params, float), D=np.asarray(tokens, float), **fit.at_width(np.asarray(bits, float)))


def _mean_line(runs: Sequence[Run], x) -> tuple[list[float], list[float]]:
    """x, and the mean loss there, in the order of x: seeds share a place."""
    places = sorted({x(run) for run in runs})
    return places, [float(np.mean([run.loss for run in runs if x(run) == place])) for place in places]


def _scatter(axis, runs: Sequence[Run], x, y, held: set[str], marker: str, colour) -> None:
    """One mark per run at (x(run), y(run)); hollow for those in `held`. Two artists at most: drawing time goes by artists."""
    for chosen, face in (([r for r in runs if r.run_id not in held], colour), ([r for r in runs if r.run_id in held], "white")):
        if chosen:
            axis.plot([x(r) for r in chosen], [y(r) for r in chosen], marker, color=colour, markerfacecolor=face, ms=4.5)


def loss_against_bits(runs: Sequence[Run], fit: Fit | None, held: set[str]) -> Figure:
    """One panel per token budget, one colour per size; points are runs, lines the law. Without a law over bits: lines join the runs in which
    the same operands are narrow, a dash for each set of them."""
    scale = _BitAxis(runs)
    dashes = dict(zip(dict.fromkeys(_narrow(run) for run in sorted(runs, key=lambda run: -len(_narrow(run))) if _narrow(run)),
                      DASHES * len(runs), strict=False))
    budgets = sorted({run.tokens for run in runs})[-4:]
    colours = size_colours(sorted({run.n_params for run in runs}))
    figure, axes = _panels(len(budgets))
    for axis, budget in zip(axes, budgets, strict=True):
        axis.set_title(f"{count_label(budget)} tokens")
        for (n, colour), marker in zip(colours.items(), MARKERS * len(colours), strict=False):
            chosen = [run for run in runs if run.tokens == budget and run.n_params == n]
            curve = _curve(fit, n, budget, scale.grid()) if scale.finite else None
            if curve is None:
                for operands, dash in dashes.items():
                    axis.plot(*_mean_line([run for run in chosen if _narrow(run) == operands], lambda run: run.bits), color=colour, lw=0.9, ls=dash)
            else:
                axis.plot(scale.grid(), curve, color=colour, lw=1.1)
                axis.plot([scale.end - 0.3, scale.end + 0.3], [_curve(fit, n, budget, np.inf)] * 2, color=colour, lw=1.1)
            _scatter(axis, chosen, lambda run: scale.place(run.bits), lambda run: run.loss, held, marker, colour)
        scale.dress(axis)
    axes[0].set_ylabel("validation loss (nats/token)")
    joined = dashes if fit is None or not fit.one_knob else {}
    _legend(figure, [(count_label(n), colour, marker) for (n, colour), marker in zip(colours.items(), MARKERS * 9, strict=False)],
            "parameters", held, joined if len(joined) > 1 else {})
    return figure


def _narrow(run: Run) -> str:
    """Which operands of a run are quantized: "weights, activations"; empty for none."""
    return ", ".join(name.removesuffix("_bits") for name, bits in run.widths.items() if bits < UNQUANTIZED_BITS)


def gap_against_bits(runs: Sequence[Run], gaps_by_size: dict[float, list[Gap]], fit: Fit | None, level: float, level_name: str) -> Figure:
    """Loss minus the reference's against bits, logarithmic, per size: mean of matched pairs, the law and its interval; and the level below
    which a gap counts as none."""
    scale = _BitAxis(runs)
    colours = size_colours(sorted(gaps_by_size))
    figure, (axis,) = _panels(1, height=3.6)
    for i, ((n, gaps), marker) in enumerate(zip(sorted(gaps_by_size.items()), MARKERS * 9, strict=False)):
        side = 0.035 * (i - 0.5 * (len(gaps_by_size) - 1))  # keeps the sizes apart at a width
        positive = [gap for gap in gaps if gap.mean > 0]
        axis.plot([gap.bits + side for gap in positive], [gap.mean for gap in positive], marker, color=colours[n], ms=5, label=count_label(n))
        pairs = [(gap.bits + side, value) for gap in gaps for value in gap.values if value > 0]
        axis.plot(*zip(*pairs, strict=True), marker, color=colours[n], ms=2.2, alpha=0.55)
        if fit is not None and fit.one_knob:
            grid = scale.grid()
            axis.plot(grid, [fit.law.functionals["loss_gap"](fit.params, N=n, **fit.at_width(bits)) for bits in grid], color=colours[n])
    if fit is not None and fit.one_knob and fit.identified("loss_gap", N=max(gaps_by_size), **fit.at_width(scale.finite[0])):
        grid = scale.grid()[::8]
        band = [fit.estimate("loss_gap", N=max(gaps_by_size), **fit.at_width(bits)) for bits in grid]
        axis.fill_between(grid, [e.low for e in band], [e.high for e in band], color=colours[max(gaps_by_size)], alpha=0.13, lw=0)
    axis.axhline(level, color="#aa3333", lw=1.0, ls=(0, (4, 3)))
    axis.annotate(level_name, (0.01, level), xycoords=("axes fraction", "data"), xytext=(0, 3), textcoords="offset points", color="#aa3333",
                  fontsize=8)
    axis.set_yscale("log")
    axis.set_ylim(bottom=max(axis.get_ylim()[0], level / 20.0))
    axis.set_xticks(scale.finite, [f"{bits:g}" for bits in scale.finite])
    axis.set_xlabel("width of quantized operands (bits)")
    axis.set_ylabel("loss above the reference (nats/token)")
    axis.legend(title="parameters", alignment="left")
    return figure


def loss_against_tokens(runs: Sequence[Run], fit: Fit | None, held: set[str]) -> Figure:
    """One panel per size, one colour per precision; logarithmic tokens."""
    sizes = sorted({run.n_params for run in runs})[-8:]
    colours = precision_colours(runs)
    figure, axes = _panels(len(sizes))
    for axis, n in zip(axes, sizes, strict=True):
        axis.set_title(f"{count_label(n)} parameters")
        for (name, colour), marker in zip(colours.items(), MARKERS * 9, strict=False):
            chosen = sorted((run for run in runs if run.n_params == n and run.precision == name), key=lambda run: run.tokens)
            if not chosen:
                continue
            grid = np.geomspace(chosen[0].tokens, chosen[-1].tokens, 40)
            curve = _curve(fit, n, grid, chosen[0].bits)
            x, y = (grid, curve) if curve is not None else _mean_line(chosen, lambda run: run.tokens)
            axis.plot(x, y, color=colour, lw=1.1)
            _scatter(axis, chosen, lambda run: run.tokens, lambda run: run.loss, held, marker, colour)
        _log_tokens(axis, [run.tokens for run in runs if run.n_params == n])
    for axis in axes[::4]:
        axis.set_ylabel("validation loss (nats/token)")
    _legend(figure, [(name, colour, marker) for (name, colour), marker in zip(colours.items(), MARKERS * 9, strict=False)], "precision", held)
    return figure


def fit_against_data(runs: Sequence[Run], predicted: dict[str, float], held: set[str]) -> Figure:
    """Left: observed against predicted loss. Right: relative residual against compute 6 N D. Every run is in `predicted`."""
    colours = precision_colours(runs)
    figure = Figure(figsize=(9.6, 3.7), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.0, 1.25])
    for (name, colour), marker in zip(colours.items(), MARKERS * 9, strict=False):
        chosen = [run for run in runs if run.precision == name]
        _scatter(left, chosen, lambda run: predicted[run.run_id], lambda run: run.loss, held, marker, colour)
        _scatter(right, chosen, lambda run: 6.0 * run.n_params * run.tokens,
                 lambda run: 100.0 * math.log(run.loss / predicted[run.run_id]), held, marker, colour)
    ends = [min(*predicted.values(), *(run.loss for run in runs)), max(*predicted.values(), *(run.loss for run in runs))]
    left.plot(ends, ends, color="#888888", lw=0.9, zorder=0)
    left.set_xlabel("predicted loss (nats/token)")
    left.set_ylabel("observed loss (nats/token)")
    right.axhline(0.0, color="#888888", lw=0.9)
    right.set_xscale("log")
    right.set_xlabel("training compute 6ND (FLOP)")
    right.set_ylabel("observed over predicted (%)")
    _legend(figure, [(name, colour, marker) for (name, colour), marker in zip(colours.items(), MARKERS * 9, strict=False)], "precision", held)
    return figure


def best_of_k(found: Sequence[Search], runs: Sequence[Run]) -> Figure:
    """Expected lowest loss of k runs of each search: one panel per size, precisions by colour, token budgets by width of the line."""
    sizes = sorted({search.n_params for search in found})[-8:]
    budgets = sorted({search.tokens for search in found})
    colours = {name: colour for name, colour in precision_colours(runs).items() if any(search.precision == name for search in found)}
    figure, axes = _panels(len(sizes), sharey=False)
    for axis, n in zip(axes, sizes, strict=True):
        axis.set_title(f"{count_label(n)} parameters")
        for search in (search for search in found if search.n_params == n):
            width = 0.9 + 1.3 * budgets.index(search.tokens) / max(len(budgets) - 1, 1)
            axis.plot(range(1, len(search.curve) + 1), search.curve, "o-", color=colours[search.precision], lw=width, ms=3.2)
        axis.set_xlabel("runs in the search, k")
        axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(6, integer=True))
    for axis in axes[::4]:
        axis.set_ylabel("expected lowest loss (nats/token)")
    _legend(figure, [(name, colour, "o") for name, colour in colours.items()], "precision", set())
    return figure


def training_curves(curves: dict[str, tuple[np.ndarray, np.ndarray]], runs: Sequence[Run], ended_badly: dict[str, tuple]) -> Figure:
    """Training loss against tokens: one panel per size, the longest run of each precision. curves: run_id -> (tokens, loss);
    ended_badly: run_id -> (n_params, precision) of runs that diverged, drawn red with a cross at their end."""
    sizes = sorted({run.n_params for run in runs} | {n for n, _ in ended_badly.values()})[-8:]
    colours = precision_colours(runs)
    figure, axes = _panels(len(sizes))
    for axis, n in zip(axes, sizes, strict=True):
        axis.set_title(f"{count_label(n)} parameters")
        for name, colour in colours.items():
            mine = [run for run in runs if run.n_params == n and run.precision == name and run.run_id in curves]
            if mine:
                longest = max(mine, key=lambda run: (run.tokens, -run.seed))
                axis.plot(*curves[longest.run_id], color=colour, lw=1.0)
        for run_id, (size, _) in ended_badly.items():
            if size == n and run_id in curves and len(curves[run_id][0]):
                tokens, loss = curves[run_id]
                axis.plot(tokens, loss, color="#cc2222", lw=0.9, ls=(0, (3, 2)))
                axis.plot(tokens[-1], loss[-1], "x", color="#cc2222", ms=6, mew=1.6)
        axis.set_xscale("log")
        axis.set_xlabel("tokens")
    for axis in axes[::4]:
        axis.set_ylabel("training loss (nats/token)")
    _legend(figure, [(name, colour, "") for name, colour in colours.items()], "precision", set())
    return figure


def heat_maps(steps: Sequence[int], places: Sequence[str], exponent: dict[str, np.ndarray], underflow: dict[str, np.ndarray]) -> Figure:
    """One column per role. Above: log2 of the scale in use by layer and site (rows, from the first layer down) and step (columns), each
    role with colours of its own; below: the share of values that became zero, white for none. Arrays [places, steps], NaN: not measured."""
    height = max(1.5, 0.14 * len(places))
    figure = Figure(figsize=(3.2 * len(exponent) + 1.2, 2 * height + 1.0), layout="constrained")
    axes = figure.subplots(2, len(exponent), squeeze=False, sharex=True, sharey=True)
    shares = matplotlib.colors.LogNorm(1e-6, 1.0)
    for column, (role, values) in zip(axes.T, exponent.items(), strict=True):
        low, high = np.nanmin(values), np.nanmax(values)
        room = max(0.5 - 0.5 * (high - low), 0.0)  # a scale that hardly moves has one colour
        grids = (column[0].imshow(values, cmap="viridis", vmin=low - room, vmax=high + room, aspect="auto", interpolation="nearest"),
                 column[1].imshow(np.where(underflow[role] > 0, underflow[role], np.nan), cmap="YlOrRd", norm=shares, aspect="auto",
                                  interpolation="nearest"))
        for axis, grid, label in zip(column, grids, ("log2 of the scale", "share that became 0"), strict=True):
            axis.grid(False)
            bar = figure.colorbar(grid, ax=axis, pad=0.02)
            bar.outline.set_visible(False)
            if role == list(exponent)[-1]:
                bar.set_label(label)
        column[0].set_title(role.replace("_", " "))
        column[1].set_xlabel("step")
        shown = np.unique(np.linspace(0, len(steps) - 1, min(5, len(steps))).round().astype(int))
        column[1].set_xticks(shown, [str(steps[i]) for i in shown])
    every = math.ceil(len(places) / 32)
    for axis in axes[:, 0]:
        axis.set_yticks(range(0, len(places), every), places[::every], fontsize=7.0)
    return figure


def _log_tokens(axis, values: list[float]) -> None:
    """A log axis whose ticks are the budgets themselves when there are few."""
    axis.set_xscale("log")
    axis.set_xlabel("tokens")
    budgets = sorted(set(values))
    if len(budgets) <= 4:
        axis.set_xticks(budgets, [count_label(budget) for budget in budgets])
        axis.minorticks_off()
        axis.set_xlim(budgets[0] / 1.35, budgets[-1] * 1.35)


def _legend(figure: Figure, entries: list[tuple], title: str, held: set[str], dashes: Mapping[str, str | tuple] = MappingProxyType({})) -> None:
    """One legend beside all panels; `entries`: (label, colour, marker); dashes: label -> line style."""
    handles = [matplotlib.lines.Line2D([], [], color=colour, marker=marker or None, ms=5, label=label) for label, colour, marker in entries]
    if held:
        handles.append(matplotlib.lines.Line2D([], [], color="#666666", marker="o", ls="", markerfacecolor="white", label="held out"))
    handles += [matplotlib.lines.Line2D([], [], color="#666666", ls=dash, label=label) for label, dash in dashes.items()]
    figure.legend(handles=handles, title=title, loc="outside right upper", alignment="left")
