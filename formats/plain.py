"""Rounding to nearest in numpy, of concrete formats: for numbers that are wanted before JAX may run (it then keeps the devices it finds)."""

from __future__ import annotations

import numpy as np

from formats.codebooks import Codebook
from formats.logarithmic import Logarithmic
from formats.midrise import Midrise


def nearest(x: np.ndarray, element) -> np.ndarray:
    """float64 x, finite, to the nearest value of an element without traced widths, saturating; ties to even on grids, elsewhere up."""
    low, high = (float(limit) for limit in element.limits)
    if isinstance(element, Midrise):
        return np.clip(np.floor(x) + 0.5, low, high)
    if isinstance(element, Codebook):
        levels = np.asarray(element.levels, np.float64)
        return levels[np.searchsorted((levels[:-1] + levels[1:]) / 2, x, side="right")]
    size = np.abs(x)
    if isinstance(element, Logarithmic):
        with np.errstate(divide="ignore"):
            place = np.clip(np.rint(-element.gamma * np.log2(size)), 0, int(element.last_code))
        return np.where(x < 0, -1.0, 1.0) * np.exp2(-place / element.gamma)
    ulp = np.exp2(np.maximum(np.frexp(size)[1] - 1 - int(element.man_bits), int(element.quantum_exp)).astype(np.float64))
    return np.clip(np.rint(x / ulp) * ulp, low, high)
