"""Wild and cell bootstrap: the covariance that theory says, and intervals of derived numbers taken from the draws."""
from __future__ import annotations

import numpy as np
import pytest

import scaling
from tests.scaling import fake_runs, straight

COUNT = 4000
TOLERANCE = 4 * np.sqrt(2 / COUNT)  # four standard errors of a sample variance


@pytest.mark.parametrize("copies", [1, 3])
def test_wild_covariance_is_the_sandwich(copies):
    """Least squares on a linear law, scatter that grows to both ends of the line: (X'X)^-1 (sum over cells of u u') (X'X)^-1, u = X_c' e_c with
    e / sqrt(1 - leverage): HC2, and its form for cells of several rows."""
    table = straight.runs(rows=36, noise=lambda rng, x: 0.002 * np.exp(0.6 * np.abs(x - 10.5)) * rng.standard_normal(x.size), copies=copies)
    fit = scaling.fit(table, straight.power, loss="least_squares")
    draws = scaling.resample(fit, table, COUNT, "wild", seed=3).draws
    x, y = np.log(table["N"]), np.log(table["loss"])
    design = np.stack([np.ones_like(x), -x], axis=1)
    bread = np.linalg.inv(design.T @ design)
    residuals = y - design @ (bread @ design.T @ y)
    scores = design * (residuals / np.sqrt(1 - np.einsum("ri,ij,rj->r", design, bread, design)))[:, None]
    cells = np.array([scores[x == value].sum(axis=0) for value in np.unique(x)])
    sandwich = bread @ cells.T @ cells @ bread
    ours = np.cov(draws.T)[1, 1]
    assert ours == pytest.approx(sandwich[1, 1], rel=TOLERANCE)
    equal = bread[1, 1] * np.sum(residuals**2) / (x.size - 2)
    assert ours > 1.3 * equal  # the scatter is not equal, and the linearised covariance does not know
    assert np.abs(draws.mean(axis=0) - fit.coordinates)[1] < 4 * np.sqrt(ours / COUNT)


@pytest.mark.slow
def test_wild_agrees_with_the_cell_bootstrap_on_even_scatter():
    """Absolute deviations in effect (delta 1e-5), 120 cells: both estimate one standard error. 600 draws: 3 % each, tolerance 25 % for what
    the two differ by on one table."""
    table = straight.runs(rows=120, seed=2)
    fit = scaling.fit(table, straight.power, delta=1e-5)
    sd = [scaling.resample(fit, table, 600, kind, seed=1).draws[:, 1].std() for kind in ("wild", "cells")]
    assert sd[0] == pytest.approx(sd[1], rel=0.25)


def test_functionals_from_draws():
    """The interval of D/N is the hull of the delta method and the percentiles of the same number in the draws."""
    table = fake_runs.rows(bits={"float32": 32.0}, seeds=3, noise=0.01)
    fit = scaling.resample(scaling.fit(table, "chinchilla"), table, 200, "wild")
    assert fit.metrics["bootstrap"] == 200 and fit.metrics["resampled"] == "wild" and len(fit.draws) == 200

    def per_param(p, compute):
        n = (p["alpha"] * p["A"] / (p["beta"] * p["B"])) ** (1 / (p["alpha"] + p["beta"])) * (compute / 6) ** (p["beta"] / (p["alpha"] + p["beta"]))
        return compute / 6 / n**2

    named = [dict(zip(fit.free, np.append(np.exp(draw[:3]), draw[3:]), strict=True)) for draw in fit.draws]
    values = np.sort([per_param(p, 1e12) for p in named])
    estimate = fit.estimate("optimal_tokens_per_param", compute=1e12)
    assert estimate.value == pytest.approx(per_param(fit.params, 1e12))
    assert estimate.low <= values[5] and estimate.high >= values[-6]
    a, b = fit.params["alpha"], fit.params["beta"]
    gradient = np.array([0, 0, 0, -b, a]) / (a + b) ** 2  # of a = beta / (alpha + beta)
    linear = scaling.fit(table, "chinchilla").estimate("optimal_exponent")
    assert linear.relative_se * linear.value == pytest.approx(np.sqrt(gradient @ fit.scatter @ fit.scatter.T @ gradient), rel=1e-3)


@pytest.mark.parametrize(("options", "message"), [({"kind": "jackknife"}, "kind='jackknife': unknown; use cells or wild"),
                                                  ({"count": 0}, "count=0: need at least 1")])
def test_refusals(options, message):
    table = straight.runs()
    with pytest.raises(ValueError, match=message):
        scaling.resample(scaling.fit(table, straight.power), table, **options)
