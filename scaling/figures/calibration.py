"""Whether a fit's intervals hold what they should, as `scaling.coverage` simulated it."""
from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from scaling.coverage import Coverage
from scaling.figures.errors import GROUPS
from scaling.figures.sheet import drawn, entry, legend_above, sheet
from scaling.plots import INK


@drawn
def calibration(found: Coverage) -> Figure:
    """Share of the simulations in which the truth has at most a rank, against the rank: on the diagonal where the stated uncertainty is right,
    S-shaped where it is too wide, its mirror image where it is too narrow. Black: all constants at once (TARP); thin: each of at
    most eight; band: holds 95 % of the curves of a calibrated fit."""
    figure, axis = sheet()
    rank = np.linspace(0.0, 1.0, 201)
    axis.fill_between(rank, np.clip(rank - found.band, 0.0, 1.0), np.clip(rank + found.band, 0.0, 1.0), color="#e9e9e9", lw=0, zorder=0)
    axis.plot(rank, rank, color="#888888", lw=0.8, zorder=1)
    handles = []
    for (name, ranks), colour in zip(found.ranks.items(), GROUPS, strict=False):
        axis.step(*_shares(ranks), where="post", color=colour, lw=0.9)
        handles.append(entry(name, color=colour, lw=0.9))
    axis.step(*_shares(found.tarp), where="post", color=INK, lw=1.6)
    axis.set_xlim(0.0, 1.0)
    axis.set_ylim(0.0, 1.0)
    axis.set_xlabel("rank of the truth")
    axis.set_ylabel("share of the simulations")
    legend_above(figure, [entry("all constants (TARP)", color=INK, lw=1.6), *handles, entry("95 % if calibrated", color="#e0e0e0", lw=5)])
    return figure


def _shares(ranks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The empirical distribution function, from 0 to 1."""
    return np.concatenate([[0.0], np.sort(ranks), [1.0]]), np.concatenate([[0.0], np.arange(1, ranks.size + 1) / ranks.size, [1.0]])
