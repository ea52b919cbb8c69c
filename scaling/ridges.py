"""Which constants a design does not tell apart: directions of its covariance, and pairs."""
from __future__ import annotations

import numpy as np

from scaling.laws import Law

OPEN = 0.5  # relative standard deviation along a direction, above which it is a ridge
MINOR = 0.2  # loadings of a unit direction that are not told
PLATEAU = 0.05  # relative distance between ends of equal objective, above which the objective is flat
TOGETHER = 0.95  # correlation above which two constants are not separately known


def ridges(law: Law, free: tuple[str, ...], coordinates_F: np.ndarray, scatter_FC: np.ndarray) -> list[dict]:
    """[{"sd": relative standard deviation, "direction": {name: loading}}], the widest first.

    Eigen-directions of the covariance of relative changes: of the logarithms of positive constants, of exponents and offsets in units of
    their own size (offsets near 0: of 1).
    """
    logarithmic = np.array([law.parameter(name).logarithmic for name in free], dtype=bool)
    kinds = [law.parameter(name).kind for name in free]
    sizes = np.array([max(abs(value), 1.0) if kind == "offset" else abs(value) or 1.0 for kind, value in zip(kinds, coordinates_F, strict=True)])
    relative = scatter_FC / np.where(logarithmic, 1.0, sizes)[:, None]
    if not np.isfinite(relative).all():
        return []
    directions, spread, _ = np.linalg.svd(relative, full_matrices=False)
    return [{"sd": float(sd), "direction": {name: float(load) for name, load in zip(free, direction, strict=True) if abs(load) >= MINOR}}
            for sd, direction in zip(spread, directions.T, strict=True) if sd > OPEN]


def undetermined(law: Law, free: tuple[str, ...], ends_SF: np.ndarray) -> dict[str, float]:
    """{name: relative range} of constants in which starts of one objective end more than 5 % apart. ends_SF: plain coordinates.

    Least absolute deviations have such plateaus: with four runs in each cell, every curve between the middle two is a median.
    """
    apart = np.ptp(ends_SF, axis=0)
    sizes = [1.0 if law.parameter(name).logarithmic else abs(value) or 1.0 for name, value in zip(free, ends_SF[0], strict=True)]
    return {name: float(width / size) for name, width, size in zip(free, apart, sizes, strict=True) if width / size > PLATEAU}


def confounded(free: tuple[str, ...], scatter_FC: np.ndarray) -> list[tuple[str, str, float]]:
    """[(name, name, correlation)] of pairs that the design hardly tells apart, the closest first. Amplitudes are uncentred here."""
    covariance = scatter_FC @ scatter_FC.T
    deviations = np.sqrt(np.diag(covariance))
    if not np.isfinite(covariance).all():
        return []
    pairs = []
    for i, j in zip(*np.triu_indices(len(free), 1), strict=True):
        if deviations[i] * deviations[j] > 0:
            correlation = float(covariance[i, j] / (deviations[i] * deviations[j]))
            if abs(correlation) > TOGETHER:
                pairs.append((free[i], free[j], correlation))
    return sorted(pairs, key=lambda pair: -abs(pair[2]))


def told(metrics: dict) -> list[str]:
    """The same as sentences, for a page or a terminal."""
    lines = [f"ridge, open to {ridge['sd']:.0%}: " + ", ".join(f"{name} {load:+.2f}" for name, load in ridge["direction"].items())
             for ridge in metrics.get("ridges", ())]
    pairs = metrics.get("confounded", ())
    if pairs:
        lines.append("not separately known: " + "; ".join(f"{a} and {b} (correlation {c:+.3f})" for a, b, c in pairs))
    flat = metrics.get("undetermined")
    if flat:
        lines.append("the objective is flat: starts that reach it end apart in " + ", ".join(f"{name} ({width:.0%})" for name, width in flat.items())
                     + "; use a larger delta, or a law that tells the rows of a cell apart")
    return lines
