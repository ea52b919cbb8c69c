"""The gallery of precisions: what each costs in loss, in time of emulation and in memory, against the unquantized runs that it is paired with."""
from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from scaling import page
from scaling.plots import FAINT, INK
from scaling.statistics import Run, columns_of, indistinct, mean_interval, reference_precision

MEASURED = ("tokens_per_s", "weights_bytes_per_param", "moments_bytes_per_param", "peak_bytes_per_param", "gradient_cosine",
            "gradient_magnitude", "edq", "lost_updates")


@dataclass(frozen=True)
class Exhibit:
    """One precision. gap, low, high: loss minus the reference's over matched pairs and its 95 % (Student) interval, nats per token, NaN for
    the interval of one pair; cost: median of the pairs' times per token over the reference's; the rest: means over its runs, None where
    no run tells."""

    precision: str
    pairs: int
    gap: float
    low: float
    high: float
    cost: float | None
    weights_bytes: float | None
    moments_bytes: float | None
    peak_bytes: float | None
    cosine: float | None
    magnitude: float | None
    edq: float | None
    lost: float | None


def exhibits(runs: Sequence[Run], relation) -> list[Exhibit]:
    """An Exhibit for every precision that has a matched reference run, the smallest gap first. relation: the run table, by run_id."""
    columns = columns_of(relation)
    found = {str(run_id): {name: columns[name][i] for name in MEASURED if name in columns} for i, run_id in enumerate(columns["run_id"])}
    reference = reference_precision(list(runs))
    ambiguous = {run.run_id for run in indistinct(list(runs))}
    chosen = [run for run in runs if run.run_id not in ambiguous]
    base = {(run.setting, run.seed): run for run in chosen if run.precision == reference}
    pairs = defaultdict(list)
    for run in chosen:
        if run.precision != reference and (run.setting, run.seed) in base:
            pairs[run.precision].append((run, base[run.setting, run.seed]))
    return sorted((_exhibit(name, matched, found) for name, matched in pairs.items()), key=lambda exhibit: exhibit.gap)


def _exhibit(precision: str, matched: list[tuple[Run, Run]], found: dict[str, dict]) -> Exhibit:
    gap, low, high = mean_interval([run.loss - base.loss for run, base in matched])
    speeds = [(found[base.run_id].get("tokens_per_s"), found[run.run_id].get("tokens_per_s")) for run, base in matched]
    costs = [theirs / own for theirs, own in speeds if theirs and own]

    def mean(name):
        values = [value for run, _ in matched if (value := found[run.run_id].get(name)) is not None]
        return statistics.fmean(values) if values else None

    return Exhibit(precision, len(matched), gap, low, high, statistics.median(costs) if costs else None, *(mean(name) for name in MEASURED[1:]))


def figure(shown: Sequence[Exhibit], noise: float | None) -> Figure:
    """Gap with its interval, cost of emulation, bytes per parameter: a row for each precision. noise: sd of a difference of two seeds' losses."""
    made = Figure(figsize=(9.6, 1.1 + 0.24 * len(shown)), layout="constrained")
    gaps, costs, sizes = made.subplots(1, 3, sharey=True, width_ratios=(2.2, 1, 1))
    rows = range(len(shown))
    if noise is not None:
        gaps.axvspan(-noise, noise, color=FAINT, lw=0, alpha=0.6)
    gaps.axvline(0, color=INK, lw=0.8)
    for row, exhibit in zip(rows, shown, strict=True):
        if math.isfinite(exhibit.low):
            gaps.plot([exhibit.low, exhibit.high], [row, row], color="#3b6ea5", lw=1.6, solid_capstyle="butt")
        gaps.plot(exhibit.gap, row, "o", color="#1f3f66", ms=4)
    linear = max(0.01, 2 * (noise or 0.0))
    gaps.set_xscale("symlog", linthresh=linear, linscale=0.6)
    gaps.set_xlabel(f"loss above the reference (nats/token; linear within ±{linear:.2g})")
    gaps.set_yticks(rows, [exhibit.precision for exhibit in shown])
    gaps.set_ylim(len(shown) - 0.4, -0.6)
    costs.plot([exhibit.cost or math.nan for exhibit in shown], rows, "o", color="#8a4f7d", ms=4)
    costs.axvline(1, color=INK, lw=0.8)
    costs.set_xlabel("time over the reference's")
    weights, moments = ([getattr(exhibit, part) or 0.0 for exhibit in shown] for part in ("weights_bytes", "moments_bytes"))
    sizes.barh(rows, weights, color="#4c8c6b", height=0.62, label="weights")
    sizes.barh(rows, moments, left=weights, color="#b7d3c2", height=0.62, label="optimizer")
    sizes.set_xlabel("bytes per parameter")
    sizes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, borderaxespad=0.1)
    for axis in (costs, sizes):
        axis.tick_params(labelleft=False)
    return made


def table(shown: Sequence[Exhibit], reference: str) -> str:
    """The same and more as numbers."""

    def cell(value, spec):
        return "–" if value is None or not math.isfinite(value) else format(value, spec)

    rows = [(e.precision, e.pairs, f"{e.gap:+.4f}", "one pair" if math.isnan(e.low) else f"{e.low:+.4f} to {e.high:+.4f}", cell(e.cost, ".2f"),
             cell(e.weights_bytes, ".2f"), cell(e.moments_bytes, ".2f"), cell(e.peak_bytes, ".1f"), cell(e.cosine, ".4f"),
             cell(e.magnitude, ".4f"), cell(e.edq, ".3f"), cell(e.lost, ".1%"))
            for e in shown]
    header = ("precision", "pairs", f"gap to {reference}", "95% interval", "time ratio", "bytes: weights", "optimizer", "peak",
              "gradient cosine", "magnitude",
              "EDQ", "updates lost")
    return page.table(header, rows, (1, 2, 4, 5, 6, 7, 8, 9, 10, 11))
