"""The solver against scipy, finite differences and planted truth."""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.optimize
import scipy.special

from scaling.laws import laws
from scaling.objective import Pull, huber
from scaling.observations import observe
from scaling.problem import Problem
from scaling.solve import WARM, minimise, solve
from scaling.starts import candidates, low_discrepancy
from tests.scaling import fake_runs, straight


def kumar_problem(**design) -> Problem:
    observed = observe(fake_runs.rows(**design), laws["kumar"])
    ties = {"gamma_a": "gamma_w", "n_a": "n_w"}
    return Problem(laws["kumar"], observed.columns, np.log(observed.loss), ("A", "B", "E", "alpha", "beta", "gamma_w", "n_w"), ties, {})


def test_huber_is_scipys():
    r = np.linspace(-3, 3, 1001)
    np.testing.assert_allclose(huber(r, 0.3), scipy.special.huber(0.3, r), rtol=1e-14, atol=1e-16)
    np.testing.assert_array_equal(huber(r, np.inf), 0.5 * r * r)


def test_low_discrepancy_points_fill_the_cube():
    points = low_discrepancy(4096, 3)
    assert points.shape == (4096, 3) and points.min() >= 0 and points.max() < 1
    counts = np.histogramdd(points, bins=(4, 4, 4), range=[(0, 1)] * 3)[0]
    assert counts.min() >= 50 and counts.max() <= 78  # 64 expected; random points would spread over 40 to 90


def test_jacobian_is_that_of_finite_differences():
    problem = kumar_problem()
    z = candidates(problem, 1e-3)[:3]
    residuals, jacobian = problem.jacobian(z)
    np.testing.assert_allclose(residuals, problem.residuals(z), rtol=1e-12)
    for i in range(z.shape[1]):
        step = np.zeros(z.shape[1])
        step[i] = 1e-6
        by_difference = (problem.residuals(z + step) - problem.residuals(z - step)) / 2e-6
        np.testing.assert_allclose(jacobian[:, :, i], by_difference, rtol=1e-5, atol=1e-8)


def test_plain_and_centred_coordinates_are_inverse():
    problem = kumar_problem()
    z = candidates(problem, 1e-3)
    np.testing.assert_allclose(problem.centred(problem.plain(z)), z, rtol=1e-12)


@pytest.mark.parametrize("delta", [1e-3, np.inf])
def test_noise_free_truth_is_recovered(delta):
    problem = kumar_problem(noise=0.0)
    truth = fake_runs.TRUTH
    solution = solve(problem, delta)
    plain = dict(zip(problem.free, problem.plain(solution.z[None])[0], strict=True))
    for name in ("A", "B", "E"):
        assert np.exp(plain[name]) == pytest.approx(truth[name], rel=1e-3)
    assert plain["alpha"] == pytest.approx(truth["alpha"], rel=1e-3)
    assert np.exp(plain["gamma_w"]) == pytest.approx(truth["gamma"], rel=1e-3)
    assert solution.objective < 1e-11


def test_scipy_finds_nothing_lower():
    problem = kumar_problem(noise=0.01)
    solution = solve(problem, 1e-3)
    assert solution.converged and solution.agree >= 4
    low, high = problem.bounds()

    def objective(z):
        return scipy.special.huber(1e-3, problem.residuals(z[None])[0]).sum()

    rng = np.random.default_rng(0)
    for start in [solution.z, *(solution.z + 0.05 * rng.standard_normal((4, solution.z.size)))]:
        found = scipy.optimize.minimize(objective, np.clip(start, low, high), method="L-BFGS-B", bounds=list(zip(low, high, strict=True)),
                                        options={"ftol": 1e-15, "gtol": 1e-12, "maxiter": 2000})
        assert found.fun >= solution.objective * (1 - 1e-8)


def test_weights_count_rows():
    """A resample given as weights has the optimum of the table that repeats its rows."""
    problem = kumar_problem(noise=0.01)
    rng = np.random.default_rng(3)
    counts = rng.multinomial(problem.log_loss.size, np.full(problem.log_loss.size, 1 / problem.log_loss.size))
    best = solve(problem, np.inf)
    z, objective, _ = minimise(problem, best.z[None], counts[None].astype(float), np.inf)
    repeated = problem.rows(np.repeat(np.arange(counts.size), counts))
    other = solve(repeated, np.inf)
    assert objective[0] == pytest.approx(other.objective, rel=1e-9)
    np.testing.assert_allclose(problem.plain(z)[0][3:6], repeated.plain(other.z[None])[0][3:6], rtol=1e-4)


@pytest.mark.parametrize("delta", [3e-3, np.inf])
def test_shifted_losses_are_those_of_another_table(delta):
    """Starts that see other losses end where a fit of a table with these losses does; a row of weight 0 keeps its place."""
    problem = kumar_problem(noise=0.01)
    shift = 0.01 * np.random.default_rng(4).standard_normal((3, problem.log_loss.size))
    best, weights = solve(problem, delta), np.ones_like(shift)
    weights[2, ::7] = 0.0
    z, objective, _ = minimise(problem, np.repeat(best.z[None], 3, axis=0), weights, delta, shift_SR=shift, damping=WARM)
    for one, lowest, moved, kept in zip(z, objective, shift, weights > 0, strict=True):
        other = replace(problem, log_loss=problem.log_loss + moved).rows(kept)
        found = solve(other, delta)
        assert lowest == pytest.approx(found.objective, rel=1e-9)
        np.testing.assert_allclose(problem.plain(one[None])[0][3:6], other.plain(found.z[None])[0][3:6], rtol=1e-4)


@pytest.mark.parametrize("delta", [1e-3, np.inf])
def test_a_pull_is_part_of_the_objective(delta):
    """Each start ends at the minimum of the objective and its pull to its own target, that of scipy's Nelder-Mead; it is infinite without a value."""
    table = straight.runs()
    problem = Problem(straight.power, {"N": table["N"]}, np.log(table["loss"]), ("A", "alpha"), {}, {})
    best = solve(problem, delta)

    def value(z):  # curved, and without a value beyond alpha = 0.5
        with np.errstate(invalid="ignore"):
            return np.sqrt(0.5 - z[:, 1]) + z[:, 0]

    def slopes(z):
        return np.stack([np.ones(len(z)), -0.5 / np.sqrt(0.5 - z[:, 1])], axis=1)

    pull = Pull(value, slopes, value(best.z[None]) + np.array([-0.05, 0.02]), 3.0)
    z, objective, _ = minimise(problem, np.repeat(best.z[None], 2, axis=0), 1.0, delta, pull=pull)
    for one, lowest, target in zip(z, objective, pull.target, strict=True):
        def total(at, target=target):
            r = problem.residuals(at[None])[0]
            return (0.5 * r @ r if np.isinf(delta) else scipy.special.huber(delta, r).sum()) + 1.5 * (value(at[None])[0] - target) ** 2

        found = scipy.optimize.minimize(total, best.z, method="Nelder-Mead", options={"xatol": 1e-11, "fatol": 1e-18, "maxiter": 5000})
        assert lowest == pytest.approx(found.fun, rel=1e-8) and lowest == pytest.approx(total(one), rel=1e-12)
        np.testing.assert_allclose(one, found.x, atol=1e-6)
    assert pull.penalty(np.array([[1.0, 0.6], [1.0, 0.4]])).tolist()[0] == np.inf
