"""How far a point lies outside the data of a fit: the fitted range of every input, and of the scale N*D."""
from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from scaling.laws import Law


def fitted_ranges(law: Law, columns: Mapping[str, np.ndarray], required: tuple[str, ...]) -> dict[str, tuple[float, float]]:
    """(low, high) of every input and of the product of the required ones; operands count up to their neutral width."""
    neutral = {operand.input: operand.neutral for operand in law.operands}
    seen = {name: np.minimum(values, neutral.get(name, np.inf)) for name, values in columns.items()}
    seen["*".join(required)] = np.prod([columns[name] for name in required], axis=0)
    return {name: (float(values.min()), float(values.max())) for name, values in seen.items()}


def extrapolation(law: Law, ranges: Mapping[str, tuple[float, float]], columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """Largest factor by which an input, or the scale N*D, lies outside its fitted range; broadcast shape, at least 1.

    An operand beyond its neutral width counts as that width; one that was always neutral has no range.
    """
    factors = [np.ones(())]
    neutral = {operand.input: operand.neutral for operand in law.operands}
    for name, (low, high) in ranges.items():
        values = np.minimum(math.prod(columns.get(part, math.inf) for part in name.split("*")), neutral.get(name, math.inf))
        factors.append(np.maximum(np.maximum(values / high, low / values), 1.0))
    return np.max(np.broadcast_arrays(*factors), axis=0)
