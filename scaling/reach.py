"""How far a prediction or a plan lies outside of the runs that a law was fitted to, and the refusal to go more than 30 times beyond."""
from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

MAX_REACH = 30.0
UNITS = {"N": "parameters", "D": "tokens", "compute": "FLOP"}
ADVICE = "--extrapolate, or extrapolate=True in Python, goes further"


def reaches(ranges: Mapping[str, tuple[float, float]], columns: Mapping) -> dict[str, tuple[float, str]]:
    """N, D, compute -> (factor, sentence) of those of them that lie outside of their fitted range. Compute is 6 N D.

    ranges: `fit.ranges`, low and high of each input and of N*D. columns: inputs; of arrays, the farthest value counts.
    """
    seen = {name: (np.asarray(columns[name], dtype=np.float64), *ranges[name]) for name in ("N", "D") if name in columns and name in ranges}
    if len(seen) == 2 and "N*D" in ranges:
        with np.errstate(over="ignore"):
            compute = 6.0 * seen["N"][0] * seen["D"][0]
        seen["compute"] = (compute, *(6.0 * end for end in ranges["N*D"]))
    found = {}
    for name, (values, low, high) in seen.items():
        with np.errstate(all="ignore"):  # 0 and infinity are told as such
            far = np.ravel(np.maximum(values / high, low / values))
        worst = int(np.argmax(np.where(np.isnan(far), math.inf, far))) if far.size else None
        if worst is not None and not far[worst] <= 1.0 + 1e-9:
            value = float(np.ravel(values)[worst])
            found[name] = (float(far[worst]), f"{name} = {value:.4g} {UNITS[name]} is {far[worst]:.3g} times {'above' if value > high else 'below'} "
                           f"the fitted range, {low:.4g} to {high:.4g}")
    return found


def refuse_far(ranges: Mapping[str, tuple[float, float]], columns: Mapping, what: str) -> None:
    """ValueError, one line, when N, D or compute lies more than 30 times outside of its fitted range."""
    far = [sentence for factor, sentence in reaches(ranges, columns).values() if not factor <= MAX_REACH * (1.0 + 1e-9)]
    if far:
        raise ValueError(f"{what}: {'; '.join(far)}; at most {MAX_REACH:g} times is answered ({ADVICE})")
