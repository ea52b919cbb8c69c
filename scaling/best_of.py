"""What the best or the worst of k runs is expected to be, from n >= k runs (other seeds, other learning rates), without bias.

The smallest of k values drawn with replacement from n observed ones, the plug-in of Dodge et al. 2019, is biased: it can draw the same run
twice. Averaging over all subsets of k different runs is not (Tang et al. 2020, "Showing Your Work Doesn't Always Work", section 4.2):

    E[min of k] = sum_i C(n-i, k-1)/C(n, k) x_(i),    E[max of k] = sum_i C(i-1, k-1)/C(n, k) x_(i),    x_(1) <= ... <= x_(n)

Beyond n nothing can be said without a model, so k > n is refused.
"""
from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def best_of(losses: Sequence[float], k: int) -> float:
    """Expected lowest of k runs, in the unit of `losses`. ValueError unless 1 <= k <= number of losses, all finite. For scores that are
    better when higher, the best is `worst_of`."""
    values = _sorted(losses, k)
    return float(np.dot(_weights(values.size, k)[::-1], values))


def worst_of(losses: Sequence[float], k: int) -> float:
    """Expected highest of k runs; see `best_of`."""
    values = _sorted(losses, k)
    return float(np.dot(_weights(values.size, k), values))


def best_of_curve(losses: Sequence[float]) -> np.ndarray:
    """[n]: `best_of` for k = 1 (the mean) to n (the lowest): what a search of k runs would have found."""
    return np.array([best_of(losses, k) for k in range(1, len(losses) + 1)])


def pass_at(k: int, samples: int, correct: int) -> float:
    """Unbiased pass@k, 1 - C(n-c, k)/C(n, k), from `samples` answers of which `correct` are right (Chen et al. 2021, arXiv 2107.03374,
    equation 1). ValueError unless 1 <= k <= samples and 0 <= correct <= samples."""
    if not (1 <= k <= samples and 0 <= correct <= samples):
        raise ValueError(f"pass@k: k={k}, samples={samples}, correct={correct}: need 1 <= k <= samples and 0 <= correct <= samples")
    missed = math.comb(samples - correct, k)
    return (math.comb(samples, k) - missed) / math.comb(samples, k)  # whole numbers: no cancellation


def _weights(n: int, k: int) -> np.ndarray:
    """[n]: how much of the expected highest of k each value is, in ascending order; quotients of whole numbers, correctly rounded."""
    total = math.comb(n, k)
    return np.array([math.comb(i, k - 1) / total for i in range(n)])


def _sorted(losses: Sequence[float], k: int) -> np.ndarray:
    values = np.sort(np.asarray(losses, dtype=np.float64))
    if values.ndim != 1 or not np.isfinite(values).all():
        raise ValueError(f"losses: must be a list of finite numbers; {int((~np.isfinite(values)).sum())} of {values.size} are not")
    if int(k) != k or not 1 <= k <= values.size:
        raise ValueError(f"k={k}: must be a whole number from 1 to {values.size}, the number of runs; more would need a model of the runs not made")
    return values
