"""Profile likelihood: exact where ln loss is linear, the constrained optimum elsewhere, and open where the design closes nothing."""
from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.integrate
import scipy.optimize
import scipy.special
import scipy.stats

import scaling
from scaling.refits import problem_of
from scaling.uncertainty import deviance_scale
from tests.scaling import fake_runs, straight


def test_exact_in_the_linear_case():
    """Student's interval of the slope and of the mean response, from scipy's regression."""
    table = straight.runs()
    fit = scaling.fit(table, straight.power, loss="least_squares")
    x, y = np.log(table["N"]), np.log(table["loss"])
    line = scipy.stats.linregress(x, y)
    t = scipy.stats.t.ppf(0.975, len(x) - 2)
    alpha = scaling.profile(fit, table, "alpha").estimate  # in logs of alpha, which moves no end of a profile
    assert (alpha.low, alpha.high) == pytest.approx((-line.slope - t * line.stderr, -line.slope + t * line.stderr), rel=1e-6)

    def at_a_million(p):
        return p["A"] / 1e6 ** p["alpha"]

    s = math.sqrt(np.sum((y - line.intercept - line.slope * x) ** 2) / (len(x) - 2))
    reach = t * s * math.sqrt(1 / len(x) + (math.log(1e6) - x.mean()) ** 2 / np.sum((x - x.mean()) ** 2))
    value = math.exp(line.intercept + line.slope * math.log(1e6))
    mean = scaling.profile(fit, table, at_a_million).estimate
    assert (mean.low, mean.high) == pytest.approx((value * math.exp(-reach), value * math.exp(reach)), rel=1e-6)
    assert mean.name == "at_a_million" and (fit.estimate(at_a_million).low, mean.value) == pytest.approx((mean.low, value), rel=1e-6)


@pytest.mark.parametrize(("loss", "name"), [("least_squares", "optimal_exponent"), ("least_squares", "E"), ("huber", "optimal_exponent")])
def test_ends_are_constrained_optima_of_scipy(loss, name):
    """At both ends scipy's constrained minimum has the deviance of the cut, 2 (f - f0) / scale = t^2."""
    table = fake_runs.rows(bits={"float32": 32.0}, seeds=3, budgets=(3e5, 6e5, 1.5e6, 3.8e6))
    fit = scaling.fit(table, "chinchilla", loss=loss, delta=5e-3)
    made = scaling.profile(fit, table, name)
    problem, z, delta = problem_of(fit, table)
    scale = deviance_scale(delta, fit.metrics["residual_sd"])
    function, _ = fit.quantity(name, {})

    def objective(z):
        r = problem.residuals(z[None])[0]
        return 1e4 * (0.5 * r @ r if math.isinf(delta) else scipy.special.huber(delta, r).sum())

    for end in (made.estimate.low, made.estimate.high):
        held = {"type": "eq", "fun": lambda z, end=end: np.log(function(fit.constants_at(problem.plain(z[None])[0])) / end)}
        found = scipy.optimize.minimize(objective, z, method="SLSQP", constraints=[held], options={"ftol": 1e-14, "maxiter": 500})
        assert 2 * (found.fun - objective(z)) / 1e4 / scale == pytest.approx(fit.quantile**2, rel=5e-3)
    assert made.cut == pytest.approx(fit.quantile**2) and np.all(np.diff(made.values) >= 0) and made.deviance.min() < made.cut < made.deviance.max()


@pytest.mark.parametrize("delta", [1e-3, 1e-2, 0.1])
def test_scale_of_the_deviance_is_the_integral(delta):
    density = scipy.stats.norm(scale=0.02).pdf
    square = scipy.integrate.quad(lambda r: np.clip(r, -delta, delta) ** 2 * density(r), -0.3, 0.3, points=[-delta, delta], limit=200)[0]
    inside = scipy.integrate.quad(density, -delta, delta)[0]
    assert deviance_scale(delta, 0.02) == pytest.approx(square / inside, rel=1e-6)
    assert deviance_scale(math.inf, 0.02) == 4e-4


def test_a_direction_that_never_closes_is_said():
    table = fake_runs.rows(sizes={"2k": 2_304, "5k": 5_120}, budgets=(600_000, 3_800_000), bits={"float32": 32.0}, seeds=2)
    fit = scaling.fit(table, "chinchilla")
    estimate = scaling.profile(fit, table, "E").estimate
    assert not estimate.identified and "not identified by this design" in estimate.reason


def test_another_table_is_refused():
    table = straight.runs()
    fit = scaling.fit(table, straight.power)
    with pytest.raises(ValueError, match="12 rows to fit, but power was fitted to 24; give the table of the fit"):
        scaling.profile(fit, straight.runs(rows=12), "alpha")
    with pytest.raises(ValueError, match="give the table of the fit"):
        scaling.profile(fit, straight.runs(seed=1), "alpha")
    with pytest.raises(ValueError, match="no such parameter or functional"):
        scaling.profile(fit, table, "beta")
    kumar = scaling.fit(fake_runs.rows(), "kumar:tied+plain")
    with pytest.raises(ValueError, match="bits_for_gap of law kumar takes N, gap; given: nothing"):
        kumar.estimate("bits_for_gap")


def test_a_saved_fit_and_its_table_are_enough(tmp_path, demo_runs):
    fit = scaling.fit(demo_runs, "kumar:tied+plain", holdout="N = max(N) OVER ()")
    again = scaling.load(fit.save(tmp_path / "FIT.json"))
    ours, theirs = (scaling.profile(one, demo_runs, "alpha").estimate for one in (fit, again))
    assert ours == theirs and ours.low < fake_runs.TRUTH["alpha"] < ours.high
