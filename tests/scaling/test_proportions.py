"""Bayesian intervals of accuracies: scipy's posteriors, and simulated coverage, each with its seed."""
from __future__ import annotations

import functools

import numpy as np
import pytest
from scipy import stats

import scaling


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (10, 10), (3, 10), (140, 200)])
def test_proportion_is_the_beta_posterior(successes, trials):
    found = scaling.proportion(successes, trials, 0.9)
    low, high = stats.beta(1 + successes, 1 + trials - successes).interval(0.9)
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-12)
    assert found.value == successes / trials and found.low < (1 + successes) / (2 + trials) < found.high


def test_proportion_covers_and_the_normal_interval_does_not():
    """Truths from the prior, n = 20, seed 0: 95 % coverage is exact in theory (its standard error here is 0.3 %); the CLT's is far below."""
    rng = np.random.default_rng(0)
    truth = rng.uniform(size=5000)
    right = rng.binomial(20, truth)
    intervals = {s: scaling.proportion(s, 20) for s in range(21)}
    covered = np.mean([intervals[s].low <= t <= intervals[s].high for s, t in zip(right, truth, strict=True)])
    share = right / 20
    normal = np.mean(np.abs(share - truth) <= 1.96 * np.sqrt(share * (1 - share) / 20))
    assert covered == pytest.approx(0.95, abs=0.012) and normal < 0.91


def test_paired_is_the_dirichlet_posterior():
    """Against 400,000 draws of the posterior itself, seed 1."""
    a = np.repeat([1, 1, 0, 0], [12, 7, 2, 4])
    b = np.repeat([1, 0, 1, 0], [12, 7, 2, 4])
    found = scaling.paired(a, b, 0.9)
    draws = np.random.default_rng(1).dirichlet((13, 8, 3, 5), 400_000)
    difference = draws[:, 1] - draws[:, 2]
    assert found.difference == pytest.approx(5 / 25)
    assert (found.low, found.high) == pytest.approx(np.quantile(difference, [0.05, 0.95]), abs=1.5e-3)
    assert found.better == pytest.approx(np.mean(difference > 0), abs=2e-3)
    other = scaling.paired(b, a, 0.9)
    assert (other.low, other.high, other.better) == pytest.approx((-found.high, -found.low, 1 - found.better), abs=1e-8)


@functools.cache
def _interval(only_a, only_b, alike):
    """The interval depends on these three counts alone, so that few of the simulated tables need a new one."""
    found = scaling.paired([1] * only_a + [0] * only_b + [1] * alike, [0] * only_a + [1] * only_b + [1] * alike)
    return found.low, found.high


def _coverage(tables, truths):
    intervals = np.array([_interval(only_a, only_b, both + none) for both, only_a, only_b, none in tables.tolist()])
    return np.mean((intervals[:, 0] <= truths) & (truths <= intervals[:, 1]))


def test_paired_covers():
    """4000 truths from the prior, 15 questions each, seed 2: 95 % of them are covered, as theory says (standard error 0.34 %)."""
    rng = np.random.default_rng(2)
    truths = rng.dirichlet(np.ones(4), 4000)
    assert _coverage(np.array([rng.multinomial(15, truth) for truth in truths]), truths[:, 1] - truths[:, 2]) == pytest.approx(0.95, abs=0.012)


def test_paired_covers_two_fixed_models():
    """Accuracies 0.8 and 0.7 that mostly agree, 20 questions, seed 3: at least nominal less 3 standard errors."""
    tables = np.random.default_rng(3).multinomial(20, (0.65, 0.15, 0.05, 0.15), 4000)
    assert _coverage(tables, 0.1) > 0.95 - 3 * 0.0034


@pytest.mark.parametrize(("call", "told"), [(lambda: scaling.proportion(3, 2), "successes=3"), (lambda: scaling.paired([1], [1, 0]), "same questions"),
                                            (lambda: scaling.paired([0.5], [1]), "0 or 1"), (lambda: scaling.paired([], []), "same questions")])
def test_refusals(call, told):
    with pytest.raises(ValueError, match=told):
        call()
