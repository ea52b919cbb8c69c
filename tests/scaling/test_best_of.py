"""Expected best and worst of k runs, and pass@k, against enumeration of all subsets in exact fractions."""
from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest

import scaling

LOSSES = [3.25, 3.5, 2.75, 4.0, 3.25, 3.125, 6.5]  # dyadic, one tie, one outlier


@pytest.mark.parametrize("k", range(1, 8))
def test_every_subset_in_fractions(k):
    subsets = list(itertools.combinations(map(Fraction, LOSSES), k))
    for function, pick in ((scaling.best_of, min), (scaling.worst_of, max)):
        exact = sum(pick(subset) for subset in subsets) / len(subsets)
        assert function(LOSSES, k) == pytest.approx(float(exact), rel=1e-15)


def test_the_mean_over_samples_is_the_truth_and_that_of_the_plug_in_is_not():
    """All 3^4 samples of four runs from three equally likely losses: the unbiased estimate's mean is E[min of 2] of the population,
    exactly; that with replacement is too high by the chance of drawing one run twice."""
    population = [Fraction(1), Fraction(2), Fraction(5)]
    truth = sum(min(pair) for pair in itertools.product(population, repeat=2)) / 9
    samples = list(itertools.product(population, repeat=4))
    unbiased = sum(Fraction(scaling.best_of([float(x) for x in sample], 2)).limit_denominator(1000) for sample in samples) / len(samples)
    plug_in = sum(sum(min(pair) for pair in itertools.product(sample, repeat=2)) / 16 for sample in samples) / len(samples)
    assert unbiased == truth == Fraction(16, 9)
    assert plug_in - truth == Fraction(1, 4) * (sum(population) / 3 - truth)


def test_curve_runs_from_the_mean_to_the_lowest_and_stays_exact_for_many_runs():
    curve = scaling.best_of_curve(LOSSES)
    assert curve[0] == pytest.approx(np.mean(LOSSES), rel=1e-15) and curve[-1] == 2.75 and (np.diff(curve) < 0).all()
    many = np.random.default_rng(0).permutation(np.arange(1.0, 1001.0))  # E[min of k of 1..n] = (n + 1)/(k + 1), German tanks
    for k in (1, 7, 500, 1000):
        assert scaling.best_of(many, k) == pytest.approx(1001 / (k + 1), rel=1e-12)
        assert scaling.worst_of(many, k) == pytest.approx(1001 - 1001 / (k + 1), rel=1e-12)


@pytest.mark.parametrize(("k", "samples", "correct"), [(1, 7, 3), (3, 7, 3), (5, 7, 3), (7, 7, 1), (2, 5, 0), (2, 5, 5)])
def test_pass_at_k_counts_the_subsets_with_a_right_answer(k, samples, correct):
    answers = [True] * correct + [False] * (samples - correct)
    subsets = list(itertools.combinations(answers, k))
    assert scaling.pass_at(k, samples, correct) == pytest.approx(float(Fraction(sum(map(any, subsets)), len(subsets))), rel=1e-15)


@pytest.mark.parametrize(("losses", "k", "told"), [(LOSSES, 0, "k=0"), (LOSSES, 8, "1 to 7"), ([1.0, float("nan")], 1, "1 of 2"), (LOSSES, 1.5, "k=1.5")])
def test_refusals(losses, k, told):
    with pytest.raises(ValueError, match=told):
        scaling.best_of(losses, k)
