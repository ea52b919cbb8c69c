"""Coverage by simulation: calibrated where theory says so, and off by what theory says where the stated error is wrong."""
from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

import scaling
from scaling import figures
from scaling.coverage import Coverage, uniform_distance
from tests.scaling import fake_runs, straight


def test_least_squares_on_gaussian_scatter_is_calibrated():
    """400 simulations, standard error of a share 1.1 %; Student's interval is exact here, so 3.5 of them. Seeds 0 and 1."""
    table = straight.runs(rows=12)
    fit = scaling.fit(table, straight.power, loss="least_squares")
    made = scaling.coverage(fit, table, 400, {"A": {}, "alpha": {}}, seed=1)
    assert made.standard_error == pytest.approx(np.sqrt(0.95 * 0.05 / 400)) and set(made.covered) == {"A", "alpha", "a new run"}
    assert all(abs(share - 0.95) < 3.5 * made.standard_error for share in made.covered.values())
    assert all(uniform_distance(ranks) < 1.2 * made.band for ranks in (*made.ranks.values(), made.tarp))


def test_scatter_that_is_not_gaussian_is_found_out():
    """Absolute deviations on Laplace scatter of scale b: their standard error is b in units where the stated one is sqrt(pi/2) sqrt(2) b =
    1.77 b, so the nominal 95 % cover 99.95 % and the ranks pile up at the middle."""
    table = straight.runs(rows=200, noise=lambda rng, x: rng.laplace(scale=0.01, size=x.size))
    fit = scaling.fit(table, straight.power, delta=1e-6)
    made = scaling.coverage(fit, table, 200, ["alpha"])
    assert made.covered["alpha"] >= 0.985
    assert min(uniform_distance(made.ranks["alpha"]), uniform_distance(made.tarp)) > made.band
    expected = np.max(np.abs(scipy.stats.norm.cdf(np.linspace(-3, 3, 999) / 1.77) - scipy.stats.norm.cdf(np.linspace(-3, 3, 999))))
    assert uniform_distance(made.ranks["alpha"]) == pytest.approx(expected, abs=made.band)
    assert "off by more than 3 standard errors" in " ".join(made.lines()) or made.covered["alpha"] < 1 - 0.05 + 3 * made.standard_error


def test_weighted_rows_scatter_as_their_weights_say():
    """Runs of weight 4 and 1/4, whose residuals had been shuffled: intervals that are exact were called too narrow."""
    weights = np.where(np.arange(40) % 2, 4.0, 0.25)
    table = straight.runs(rows=40, noise=lambda rng, x: 0.01 * rng.standard_normal(x.size) / np.sqrt(weights)) | {"w": weights}
    made = scaling.coverage(scaling.fit(table, straight.power, weights="w", loss="least_squares"), table, 400, {"A": {}, "alpha": {}}, seed=1)
    assert all(abs(share - 0.95) < 3.0 * made.standard_error for share in made.covered.values())


def test_the_figure_draws_the_distribution_of_the_ranks():
    """The black line is the empirical distribution function of the TARP ranks; the band has the Kolmogorov-Smirnov distance on either side."""
    found = Coverage(0.95, 4, {}, {"alpha": np.array([0.5, 0.1, 0.9, 0.3])}, np.array([0.2, 0.8, 0.4, 0.6]))
    axis = figures.calibration(found).axes[0]
    x, y = max(axis.lines, key=lambda line: line.get_linewidth()).get_data()
    assert x.tolist() == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0] and y.tolist() == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    assert len(axis.lines) == 3


def test_distance_is_scipys():
    values = np.random.default_rng(0).beta(2, 3, 50)
    assert uniform_distance(values) == pytest.approx(scipy.stats.kstest(values, "uniform").statistic, abs=1e-14)


@pytest.mark.slow
def test_precision_law_with_functionals():
    """The design of the demo, 120 simulations: every number that it identifies is covered within 3.5 standard errors (2 %) of 95 %."""
    table = fake_runs.rows()
    fit = scaling.fit(table, "kumar:tied+plain", loss="least_squares")
    made = scaling.coverage(fit, table, 120, {name: {} for name in ("alpha", "E", "gamma_w")} | {"loss_gap": {"N": 24_576, "weights_bits": 3.0}})
    assert all(abs(share - 0.95) < 3.5 * made.standard_error for share in made.covered.values()), made.covered
    default = scaling.coverage(fit, table, 20)
    assert "optimal_bits" in default.covered and "loss_gap" not in default.covered and "optimal_exponent" not in default.covered
    assert len(default.lines()) == len(default.covered) + 2


def test_refusals():
    table = straight.runs()
    fit = scaling.fit(table, straight.power)
    with pytest.raises(ValueError, match="simulations=3: need at least 20"):
        scaling.coverage(fit, table, 3)
    with pytest.raises(ValueError, match="no such parameter or functional"):
        scaling.coverage(fit, table, names=["beta"])
