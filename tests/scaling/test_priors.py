"""Priors in refits: profile, resamples and coverage against the formulas of generalised ridge regression, on a law linear in its coordinates."""
from __future__ import annotations

import json
import math
from dataclasses import dataclass

import numpy as np
import pytest
import scipy.stats

import scaling
from scaling.coverage import uniform_distance
from tests.scaling import straight

COUNT = 4000
TOLERANCE = 4 * math.sqrt(2 / COUNT)  # four standard errors of a sample variance
MEAN, SD = 0.303, 0.0008  # of the prior on alpha: as precise as 24 rows, two of its deviations off


@dataclass(frozen=True)
class Ridge:
    """Least squares of y on X with a Gaussian on the second constant: minimises |y - X b|^2 + unit ((b_2 - MEAN)/SD)^2. unit: residual
    variance without the prior. bread: inverse of X'X + P, with P_22 = unit/SD^2."""

    x: np.ndarray
    bread: np.ndarray
    b: np.ndarray
    unit: float
    residuals: np.ndarray

    @property
    def variance(self) -> float:
        return float(self.residuals @ self.residuals) / (len(self.x) - 2)


def ridge(table) -> Ridge:
    y, x = np.log(table["loss"]), np.stack([np.ones(len(table["N"])), -np.log(table["N"])], axis=1)
    unit = float(np.sum((y - x @ np.linalg.lstsq(x, y, rcond=None)[0]) ** 2)) / (len(y) - 2)
    precision = np.diag([0.0, unit / SD**2])
    bread = np.linalg.inv(x.T @ x + precision)
    b = bread @ (x.T @ y + precision @ [0.0, MEAN])
    return Ridge(x, bread, b, unit, y - x @ b)


def fitted(table, **options):
    return scaling.fit(table, straight.power, loss="least_squares", priors={"alpha": (MEAN, SD)}, **options)


def test_the_profile_is_that_of_ridge_regression(tmp_path):
    """b_2 -+ t s sqrt((X'X + P)^-1_22), and so for the mean response; from the file of the fit as well."""
    table = straight.runs()
    fit, by_hand = fitted(table), ridge(table)
    plain = scaling.fit(table, straight.power, loss="least_squares")
    assert fit.params["alpha"] == pytest.approx(by_hand.b[1], rel=1e-9) and abs(fit.params["alpha"] - plain.params["alpha"]) > 5e-4
    t = scipy.stats.t.ppf(0.975, 22)
    for one in (fit, scaling.load(fit.save(tmp_path / "FIT.json"), straight.power)):
        alpha = scaling.profile(one, table, "alpha").estimate
        half = t * math.sqrt(by_hand.variance * by_hand.bread[1, 1])
        assert (alpha.low, alpha.high) == pytest.approx((by_hand.b[1] - half, by_hand.b[1] + half), rel=1e-7)
        at = np.array([1.0, -math.log(1e6)])
        mean = scaling.profile(one, table, lambda p: p["A"] / 1e6 ** p["alpha"]).estimate
        half = t * math.sqrt(by_hand.variance * at @ by_hand.bread @ at)
        assert (math.log(mean.low), math.log(mean.high)) == pytest.approx((at @ by_hand.b - half, at @ by_hand.b + half), rel=1e-7)


def test_wild_draws_are_those_of_ridge_regression():
    """About the optimum with covariance (X'X + P)^-1 (X' diag(e^2/(1 - h)) X + P SD^2 P) (X'X + P)^-1: HC2 with the prior as one more row,
    which takes leverage from the ends of these six."""
    table = straight.runs(rows=6)
    by_hand = ridge(table)
    draws = scaling.resample(fitted(table), table, COUNT, "wild", seed=2).draws
    leverage = np.einsum("ri,ij,rj->r", by_hand.x, by_hand.bread, by_hand.x)
    scores = by_hand.x * (by_hand.residuals / np.sqrt(1.0 - leverage))[:, None]
    middle = scores.T @ scores + np.diag([0.0, (by_hand.unit / SD) ** 2])
    expected = by_hand.bread @ middle @ by_hand.bread
    assert np.cov(draws.T).ravel() == pytest.approx(expected.ravel(), rel=TOLERANCE)
    assert np.all(np.abs(draws.mean(axis=0) - by_hand.b) < 4.0 * np.sqrt(np.diag(expected) / COUNT))


def test_cell_draws_know_no_more_than_the_prior():
    """With a deviation of the prior a tenth of the rows' own the draws scatter as the prior does; held at its mean, they would by a tenth of that."""
    table = straight.runs()
    sd = 0.1 * float(np.linalg.norm(scaling.fit(table, straight.power, loss="least_squares").scatter[1]))
    fit = scaling.fit(table, straight.power, loss="least_squares", priors={"alpha": (0.3, sd)}, bootstrap=COUNT)
    assert fit.draws[:, 1].std() == pytest.approx(sd, rel=0.05)


def test_intervals_with_a_prior_cover():
    """The prior is drawn about the truth as the runs are, so that Student's interval is right but for the scale of the prior, known from the
    same residuals: 400 simulations, 3.5 standard errors. Priors held at the truth cover 99.8 %; held where they are, 90 %, with ranks all on one
    side."""
    table = straight.runs()
    made = scaling.coverage(fitted(table), table, 400, ["A", "alpha"], seed=3)
    assert all(abs(share - 0.95) < 3.5 * made.standard_error for share in made.covered.values()), made.covered
    assert all(uniform_distance(ranks) < 1.2 * made.band for ranks in (*made.ranks.values(), made.tarp))


def test_a_file_without_the_weight_is_refused(tmp_path):
    table = straight.runs()
    path = fitted(table).save(tmp_path / "FIT.json")
    body = json.loads(path.read_text())
    del body["metrics"]["prior_weight"]
    path.write_text(json.dumps(body))
    with pytest.raises(ValueError, match="power was fitted with priors and saved before their weight was: refits need it; fit again"):
        scaling.profile(scaling.load(path, straight.power), table, "alpha")


@pytest.mark.parametrize("options", [{"loss": "least_squares"}, {"delta": 0.003}, {"delta": 0.02}, {}])
def test_a_prior_as_precise_as_the_rows_meets_them_half_way(options):
    """Two standard errors off. Under the default delta of 0.001, a tenth of the scatter, rows weigh as absolute deviations: in steps, so within a third."""
    table = straight.runs(rows=60)
    plain = scaling.fit(table, straight.power, **options)
    error = plain.estimate("alpha").relative_se * plain.params["alpha"]
    pulled = scaling.fit(table, straight.power, priors={"alpha": (plain.params["alpha"] + 2.0 * error, error)}, **options)
    moved = (pulled.params["alpha"] - plain.params["alpha"]) / (2.0 * error)
    assert moved == pytest.approx(0.5, abs=0.02 if options.get("loss") or options.get("delta") == 0.02 else 0.17)
