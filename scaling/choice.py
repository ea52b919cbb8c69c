"""A number's interval has a twin for names: how often each is the answer among the constants that the data allow ("E4M3" among layouts)."""
from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

SIMULATED = 1000  # draws from the linearised covariance


@dataclass(frozen=True)
class Choice:
    """What a functional names, by the fitted constants. shares: name -> share of the draws in which it is the answer, the largest first;
    `reason` is empty when the design identifies the constants."""

    name: str
    value: str
    shares: Mapping[str, float]
    reason: str

    @property
    def identified(self) -> bool:
        return not self.reason

    def __str__(self) -> str:
        told = ", ".join(f"{name} {share:.0%}" for name, share in self.shares.items())
        return f"{self.value} (of the draws: {told})" if self.identified else self.reason


def choice(fit, name: str, function: Callable[[Mapping], str], reason: str) -> Choice:
    """The name that `function` of the constants of `fit` gives, and its rivals in draws from the linearised covariance (the same each time)
    and in the bootstrap resamples; of the two shares of a name the one that is less sure counts."""
    normal = np.random.default_rng(0).standard_normal((SIMULATED, fit.scatter.shape[1]))
    value = function(fit.params)
    shares = [_shares(fit, function, rows) for rows in (fit.coordinates + normal @ fit.scatter.T, fit.draws) if len(rows) > 20]
    least = min(shares, key=lambda found: found.get(value, 0.0))
    return Choice(name, value, least, reason)


def _shares(fit, function: Callable[[Mapping], str], rows_DF: np.ndarray) -> dict[str, float]:
    with np.errstate(all="ignore"):
        counts = Counter(function(fit.constants_at(row)) for row in rows_DF)
    return {name: count / len(rows_DF) for name, count in counts.most_common()}
