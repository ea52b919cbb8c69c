"""Accuracies of few questions: Bayesian intervals of one proportion, and of two models on the same questions.

Normal-theory error bars are too short below a few hundred questions, and have no length at all at 0 or n right (Bowyer, Aitchison and
Ivanova 2025, "Don't Use the CLT in LLM Evals With Fewer Than a Few Hundred Datapoints", arXiv 2503.01747). One proportion is theirs:
a uniform prior, so the posterior is Beta(1 + s, 1 + n - s). Two models on the same questions have four outcomes per question (both right,
only one, only the other, neither); here these have a uniform Dirichlet prior, whose posterior needs no sampling. (The paper puts a Gaussian
copula with unknown correlation in its place and samples; the posteriors differ by the prior alone.)
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.special import betainc, betaincinv

POINTS = 2000  # of the quadrature over the share of questions on which the models differ


@dataclass(frozen=True)
class Proportion:
    """value: s/n; low, high: equal-tailed credible interval at `level`."""

    value: float
    low: float
    high: float
    level: float


@dataclass(frozen=True)
class Paired:
    """A against B on the same questions. difference: of the observed accuracies, A - B; low, high: credible interval of the true difference
    at `level`; better: posterior probability that A is the more accurate."""

    difference: float
    low: float
    high: float
    better: float
    level: float


def proportion(successes: int, trials: int, level: float = 0.95) -> Proportion:
    """The proportion of successes and its interval. ValueError unless 0 <= successes <= trials, trials >= 1, 0 < level < 1."""
    if not 0 <= successes <= trials or trials < 1 or not 0 < level < 1:
        raise ValueError(f"proportion: successes={successes}, trials={trials}, level={level}: need 0 <= successes <= trials >= 1 and 0 < level < 1")
    tail = 0.5 * (1.0 - level)
    low, high = betaincinv(1 + successes, 1 + trials - successes, [tail, 1.0 - tail])
    return Proportion(successes / trials, float(low), float(high), level)


def paired(a: Sequence[bool], b: Sequence[bool], level: float = 0.95) -> Paired:
    """a, b: [questions], whether each model was right. ValueError for unequal lengths, none, or values other than 0 and 1.

    With p10 and p01 the shares of questions that only A or only B gets right, the posterior of (p11, p10, p01, p00) is Dirichlet(1 + counts), so
    u = p10 + p01 is Beta(2 + n10 + n01, 2 + n11 + n00), r = p10/u is Beta(1 + n10, 1 + n01), they are independent, and the difference of
    the accuracies is u (2 r - 1).
    """
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape or a.ndim != 1 or not a.size:
        raise ValueError(f"paired: the models need the same questions in the same order; got {a.shape} and {b.shape}")
    if not (np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all()):
        raise ValueError("paired: answers must be 0 or 1, one per question; average repeated answers elsewhere")
    if not 0 < level < 1:
        raise ValueError(f"paired: level={level}: need 0 < level < 1")
    only_a, only_b = int(((a == 1) & (b == 0)).sum()), int(((a == 0) & (b == 1)).sum())
    alike = a.size - only_a - only_b
    u = betaincinv(2 + only_a + only_b, 2 + alike, (np.arange(POINTS) + 0.5) / POINTS)  # equal shares of the posterior of u

    def below(difference: float) -> float:
        """P(true difference <= difference)."""
        return float(np.mean(betainc(1 + only_a, 1 + only_b, np.clip(0.5 + 0.5 * difference / u, 0.0, 1.0))))

    tail = 0.5 * (1.0 - level)
    low, high = (brentq(lambda d, share=share: below(d) - share, -1.0, 1.0, xtol=1e-10) for share in (tail, 1.0 - tail))
    return Paired((only_a - only_b) / a.size, low, high, 1.0 - float(betainc(1 + only_a, 1 + only_b, 0.5)), level)
