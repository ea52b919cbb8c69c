"""What rounding loses, role by role, from the run table: the shares of values that became zero or lay beyond the range of their format."""
from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from scaling.plots import INK
from scaling.statistics import Run, columns_of

ROLES = ("weights", "activations", "output_gradients", "kv", "scores", "probabilities")
KINDS = ("underflow", "overflow")
TITLES = ("share that became zero", "share beyond the range")
MAX_ROWS = 40
SMALLEST = 1e-6  # below this a share has the palest colour; the number in the cell is exact


def role_losses(runs: Sequence[Run], relation) -> dict[str, np.ndarray]:
    """precision -> [2, 6]: underflow and overflow by ROLES, means over the runs that quantize the role; NaN where none does. Precisions with no
    share at all are left out; narrow ones first. relation: the run table, by run_id."""
    columns = columns_of(relation)
    row_of = {str(run_id): i for i, run_id in enumerate(columns["run_id"])}
    found = defaultdict(list)
    for run in sorted(runs, key=lambda run: (run.bits, run.precision)):
        row = row_of[run.run_id]
        told = [[columns[name][row] if (name := f"{role}_{kind}") in columns else None for role in ROLES] for kind in KINDS]
        found[run.precision].append([[np.nan if share is None else float(share) for share in shares] for shares in told])
    means = {}
    for precision, shares in found.items():
        shares_R26 = np.array(shares)
        known_26 = ~np.isnan(shares_R26)
        if known_26.any():
            counts_26 = known_26.sum(axis=0)
            sums_26 = np.where(known_26, shares_R26, 0.0).sum(axis=0)
            means[precision] = np.where(counts_26 > 0, sums_26 / np.maximum(counts_26, 1), np.nan)
    return means


def figure(means: dict[str, np.ndarray]) -> Figure:
    """A panel for each kind: a row for each precision, a column for each role that any of them quantizes; empty: not quantized."""
    shown = dict(list(means.items())[:MAX_ROWS])
    kept = [i for i in range(len(ROLES)) if any(not np.isnan(shares[:, i]).all() for shares in shown.values())]
    made = Figure(figsize=(9.6, 1.2 + 0.27 * len(shown)), layout="constrained")
    panels = made.subplots(1, 2, sharey=True)
    norm, shades = matplotlib.colors.LogNorm(SMALLEST, 1.0, clip=True), matplotlib.colormaps["YlOrRd"]
    for kind, (axis, title) in enumerate(zip(panels, TITLES, strict=True)):
        axis.grid(False)
        axis.set_title(title)
        for row, shares in enumerate(shown.values()):
            for column, role in enumerate(kept):
                share = shares[kind, role]
                if np.isnan(share):
                    continue
                face = shades(norm(share)) if share > 0 else "#f7f7f7"
                axis.add_patch(matplotlib.patches.Rectangle((column - 0.48, row - 0.45), 0.96, 0.9, color=face, lw=0))
                dark = share > 0.01
                axis.text(column, row, _told(share), ha="center", va="center", fontsize=7.5, color="white" if dark else INK)
        axis.set_xticks(range(len(kept)), [ROLES[i].replace("output_", "output\n") for i in kept])
        axis.set_xlim(-0.6, len(kept) - 0.4)
        axis.set_ylim(len(shown) - 0.4, -0.6)
        axis.tick_params(length=0)
        for side in axis.spines.values():
            side.set_visible(False)
    panels[0].set_yticks(range(len(shown)), list(shown))
    return made


def _told(share: float) -> str:
    """0.0123 -> "1.2%", 3e-6 -> "3e-06"."""
    return "0" if share == 0 else f"{share:.2g}" if share < 1e-4 else f"{share:.2%}" if share < 0.1 else f"{share:.0%}"
