"""`scaling.fit`: the published refit, planted truth, honest intervals, held-out rows, identification, refusals, files."""
from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import brentq

import scaling
from scaling.laws import Law, amplitude, exponent
from scaling.observations import observe
from tests.scaling import fake_runs

LARGEST = "N = max(N) OVER ()"


def test_epoch_refit(epoch):
    """The optimum of the stated objective (Besiroglu et al.'s notebook prints the same constants)."""
    fit = scaling.fit(law="chinchilla", **epoch)
    assert fit.metrics["rows"] == 240 and fit.metrics["dropped"] == {"where row_number() OVER (ORDER BY loss DESC) > 5": 5}
    assert fit.metrics["objective"] == pytest.approx(0.0010182740178, abs=1e-12)
    for name, value, digits in (("A", 477.83, 0.01), ("B", 2143.4, 0.05), ("E", 1.81722, 1e-5), ("alpha", 0.34731, 1e-5), ("beta", 0.36717, 1e-5)):
        assert fit.params[name] == pytest.approx(value, abs=digits)
    assert fit.converged and fit.metrics["starts_agree"] == fit.metrics["starts"]
    assert fit.metrics["condition_number"] == pytest.approx(_condition_of_centred_terms(fit, epoch), rel=1e-3)


def _condition_of_centred_terms(fit, epoch) -> float:
    """Of J'J by finite differences, in the logs of the terms' means and the exponents."""
    columns = observe(epoch["table"], scaling.laws["chinchilla"], epoch["columns"], epoch["where"]).columns

    def log_loss(z):
        terms = [columns["N"] ** -z[3], columns["D"] ** -z[4], np.ones_like(columns["N"])]
        return np.log(sum(np.exp(z[k]) * term / term.mean() for k, term in enumerate(terms)))

    p = fit.params
    means = [(columns["N"] ** -p["alpha"]).mean(), (columns["D"] ** -p["beta"]).mean(), 1.0]
    z = np.array([*np.log([p["A"] * means[0], p["B"] * means[1], p["E"]]), p["alpha"], p["beta"]])
    jacobian = np.stack([(log_loss(z + step) - log_loss(z - step)) / 2e-5 for step in 1e-5 * np.eye(5)], axis=1)
    return float(np.linalg.cond(jacobian) ** 2)


def test_epoch_refit_in_the_least_absolute_limit_is_the_published_row(epoch):
    fit = scaling.fit(law="chinchilla", loss="lad", **epoch)
    assert fit.converged
    published = scaling.laws["chinchilla"].published["epoch"]
    for name, digits in (("A", 0.3), ("B", 1.5), ("E", 5e-4), ("alpha", 5e-5), ("beta", 5e-5)):
        assert fit.params[name] == pytest.approx(published[name], abs=digits)


def test_all_245_points_move_the_data_exponent(epoch):
    fit = scaling.fit(law="chinchilla", **epoch | {"where": None})
    assert fit.params["beta"] == pytest.approx(0.453, abs=1e-3) and fit.params["B"] == pytest.approx(12_846, rel=1e-3)


def test_bootstrap_errors_are_the_published_ones(epoch):
    """Standard errors of 4000 row resamples: A 125, B 1293, E .03, alpha .02, beta .02; ours resample cells with weights."""
    fit = scaling.fit(law="chinchilla", bootstrap=300, **epoch)
    draws = fit.draws[:, [fit.free.index(name) for name in ("E", "alpha", "beta")]]
    sd = np.exp(draws[:, 0]).std(), draws[:, 1].std(), draws[:, 2].std()
    np.testing.assert_allclose(sd, (0.026, 0.0151, 0.0207), rtol=0.2)  # of 4000 resamples at this optimum
    low, high = fit.intervals["beta"]
    assert low < 0.3658 < high


@pytest.mark.parametrize(("cut", "rows", "rmse_nats"), [(1e20, 104, 0.0267), (3e20, 63, 0.0287), (1e21, 23, 0.0282)])
def test_epoch_held_out_by_compute(epoch, cut, rows, rmse_nats):
    fit = scaling.fit(law="chinchilla", holdout=f'"Training FLOP" > {cut}', **epoch)
    score = fit.metrics["held_out"]
    assert score["rows"] == rows and score["rmse_nats"] == pytest.approx(rmse_nats, abs=1e-4)
    assert score["covered"] >= 0.75  # 0.13 to 0.28 with the interval of the mean, 0.65 to 0.76 with residual noise added


def test_planted_precision_law_is_within_its_intervals():
    fit = scaling.fit(fake_runs.rows(noise=0.003), "kumar:tied", holdout=LARGEST, bootstrap=100)
    truth = {name: value for name, value in fake_runs.TRUTH.items() if name != "gamma"}
    for name, value in truth.items():
        low, high = fit.intervals[name]
        assert low < value < high
    assert fit.ties == {"gamma_a": "gamma_w", "n_a": "n_w", "beta": "alpha"}
    assert fit.params["gamma_a"] == fit.params["gamma_w"] and "gamma_kv" not in fit.params
    assert any("activations_bits equals weights_bits" in note for note in fit.metrics["notes"])
    gap = fit.estimate("loss_gap", N=24_576, weights_bits=3, activations_bits=3)
    assert gap.identified and gap.low < fake_runs.true_loss(24_576, 1e6, 3) - fake_runs.true_loss(24_576, 1e6, 32) < gap.high


def test_planted_law_with_separate_operands_and_offsets():
    """Kumar's own constants on a design that varies each operand alone: all of gamma_w, gamma_a and the optimum come back."""
    p = scaling.laws["kumar"].published["kumar"]
    n, d, w, a = (x.ravel() for x in np.meshgrid([3e7, 6e7, 1.1e8, 2.2e8], [1.5e9, 6e9, 2.6e10], [3.0, 4, 6, 8, 32], [4.0, 5, 6, 8, 32]))
    loss = scaling.laws["kumar"].predict(p, N=n, D=d, weights_bits=w, activations_bits=a) * np.exp(
        1e-5 * np.random.default_rng(0).standard_normal(n.size))
    fit = scaling.fit({"N": n, "D": d, "weights_bits": w, "activations_bits": a, "loss": loss}, "kumar", delta=1.0)
    for name in ("alpha", "beta", "gamma_w", "n_w", "gamma_a", "n_a", "E"):
        assert fit.params[name] == pytest.approx(p[name], rel=0.02)
    assert fit.one_knob is False and set(fit.at_width(4.0)) == {"weights_bits", "activations_bits"}


def test_held_out_rows_are_never_fitted():
    table = fake_runs.rows()
    largest = table["n_params"] == table["n_params"].max()
    table["loss"] = np.where(largest, table["loss"] * 1.5, table["loss"])
    whole = scaling.fit(table, "kumar:tied+plain", holdout="n_params = 24576")
    small = scaling.fit({name: values[~largest] for name, values in table.items()}, "kumar:tied+plain")
    assert whole.params == small.params and whole.metrics["objective"] == small.metrics["objective"]
    assert whole.metrics["held_out"]["rows"] == 12 and whole.metrics["held_out"]["bias"] < -0.3
    assert whole.metrics["held_out"]["covered"] == 0.0  # its own error must not have widened its own interval
    assert whole.metrics["discrepancy"] > 0.3 > small.metrics["discrepancy"]  # but it widens what is predicted next


def test_row_order_does_not_matter():
    table = fake_runs.rows()
    order = np.random.default_rng(1).permutation(len(table["loss"]))
    shuffled = {name: values[order] for name, values in table.items()}
    assert scaling.fit(table, "kumar:tied", bootstrap=20).params == scaling.fit(shuffled, "kumar:tied", bootstrap=20).params


def test_prediction_intervals_widen_with_distance_and_refuse_the_unknown():
    fit = scaling.fit(fake_runs.rows(), "kumar:tied+plain", holdout=LARGEST)
    near = fit.predict(N=5_120, D=1.5e6, weights_bits=4, activations_bits=4)
    far = fit.predict(N=1e6, D=1e9, weights_bits=4, activations_bits=4, extrapolate=True)
    assert near.extrapolated == 1.0 and far.extrapolated > 100
    assert near.low < near.mean_low < near.loss < near.mean_high < near.high
    assert (far.high - far.low) / far.loss > 2 * (near.high - near.low) / near.loss
    assert fit.predict(N=[5_120, 1e4], D=[[1e6], [2e6]]).loss.shape == (2, 2)
    with pytest.raises(ValueError, match="needs gamma_kv"):
        fit.predict(N=1e4, D=1e6, kv_bits=4)


@pytest.mark.parametrize("bootstrap", [0, 60])
def test_a_design_of_two_sizes_and_budgets_states_nothing(bootstrap):
    table = fake_runs.rows(sizes={"2k": 2_304, "5k": 5_120}, budgets=(600_000, 3_800_000))
    fit = scaling.fit(table, "kumar:plain", bootstrap=bootstrap)
    assert fit.metrics["condition_number"] > 1e10
    assert not any(fit.identified(name) for name in fit.params if name not in fit.fixed)
    assert "not identified by this design (condition number" in str(fit.estimate("alpha"))
    with pytest.raises(ValueError, match="not identified by this design"):
        fit.predict(N=1e4, D=1e6)
    three = scaling.fit(fake_runs.rows(budgets=fake_runs.BUDGETS), "kumar:tied+plain", holdout=LARGEST)
    assert three.metrics["condition_number"] < 1e5 and all(three.identified(name) for name in ("alpha", "E", "gamma_w"))


def test_an_optimum_outside_the_widths_trained_is_not_stated():
    fit = scaling.fit(fake_runs.rows(), "kumar:tied+plain")
    estimate = fit.estimate("optimal_bits")  # 1.2564 gamma = 1.76 bits by the truth; 3 bits is the narrowest run
    assert not estimate.identified and "outside the weights_bits and activations_bits trained, 3 to 32" in estimate.reason


@pytest.mark.parametrize("operand", ["activations_bits", "kv_bits"])
def test_an_optimum_is_told_for_whichever_operand_was_narrow(operand):
    """It had been held against the widths of the weights, which were all 32. With gamma 1 and n 1 the optimum P solves e^(P-1) = P + 1."""
    n, d, bits = (part.ravel() for part in np.meshgrid([1e6, 3e6, 1e7, 3e7], [1e8, 3e8, 1e9], [2.0, 3.0, 4.0, 6.0, 32.0], indexing="ij"))
    effective = n * np.where(bits < 32, 1 - np.exp(1.0 - bits), 1.0)
    loss = (40 / effective**0.3 + 60 / d**0.3 + 1.0) * np.exp(0.001 * np.random.default_rng(0).standard_normal(n.size))
    told = scaling.fit({"N": n, "D": d, operand: bits, "loss": loss}, "kumar:tied", loss="least_squares").estimate("optimal_bits")
    truth = brentq(lambda p: math.exp(p - 1) - p - 1, 1.5, 4.0)
    assert told.identified and told.low < truth < told.high < told.low + 0.5


@pytest.mark.slow
def test_intervals_cover_the_truth():
    """Nominal 95 % over 20 simulated designs: at least 16 (15 or fewer would happen once in 400 if coverage were right)."""
    hits = {name: 0 for name in ("E", "alpha", "gamma_w", "run")}
    for seed in range(20):
        fit = scaling.fit(fake_runs.rows(rng_seed=seed), "kumar:tied+plain")
        for name in ("E", "alpha", "gamma_w"):
            low, high = fit.intervals[name]
            hits[name] += low < fake_runs.TRUTH[name.split("_")[0]] < high
        new = fake_runs.true_loss(5_120, 1e6, 4) * math.exp(0.004 * np.random.default_rng(1000 + seed).standard_normal())
        predicted = fit.predict(N=5_120, D=1e6, weights_bits=4, activations_bits=4)
        hits["run"] += bool(predicted.low < new < predicted.high)
    assert all(count >= 16 for count in hits.values()), hits


def test_known_entropy_can_be_held():
    fit = scaling.fit(fake_runs.rows(), "kumar:tied", fixed={"E": fake_runs.TRUTH["E"]})
    assert fit.params["E"] == fake_runs.TRUTH["E"] and "E" not in fit.free
    assert fit.estimate("alpha").relative_se < scaling.fit(fake_runs.rows(), "kumar:tied").estimate("alpha").relative_se / 2


def test_saved_fits_predict_the_same(tmp_path):
    fit = scaling.fit(fake_runs.rows(), "kumar:tied+plain", holdout=LARGEST, bootstrap=30)
    again = scaling.load(fit.save(tmp_path / "FIT.json"))
    json.loads((tmp_path / "FIT.json").read_text(), parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))
    at = {"N": 1e5, "D": 1e7, "weights_bits": 4, "activations_bits": 4}
    for name in ("loss", "low", "high"):
        assert getattr(again.predict(**at), name) == getattr(fit.predict(**at), name)
    assert again.estimate("bits_for_gap", N=1e4, gap=0.01) == fit.estimate("bits_for_gap", N=1e4, gap=0.01)
    assert again.metrics["held_out"] == fit.metrics["held_out"] and again.ties == fit.ties


def test_a_law_of_ones_own_gets_everything():
    mine = Law(name="size_only", about="A/N^alpha + E", cite="none", inputs=("N",),
               parameters=(amplitude("A"), amplitude("E"), exponent("alpha")),
               log_terms=lambda p, x: (-p["alpha"] * np.log(x["N"]), 0.0), functionals={"twice": lambda p: 2 * p["alpha"]})
    n = np.geomspace(1e3, 1e6, 12)
    loss = (30.0 * n**-0.4 + 1.5) * np.exp(1e-3 * np.random.default_rng(0).standard_normal(12))
    fit = scaling.fit({"params": n, "loss": loss}, mine, columns={"N": "params"}, holdout="N > 5e5", bootstrap=30)
    assert fit.params["alpha"] == pytest.approx(0.4, abs=0.02) and fit.estimate("twice").value == 2 * fit.params["alpha"]
    assert fit.metrics["held_out"]["rows"] == 2


GOOD = {"N": [1e3, 2e3, 4e3] * 3, "D": [1e5] * 3 + [2e5] * 3 + [4e5] * 3, "loss": [3.0, 2.8, 2.7, 2.9, 2.7, 2.5, 2.6, 2.4, 2.2]}


@pytest.mark.parametrize(("change", "options", "message"), [
    ({"loss": None}, {}, "law chinchilla needs loss; the table has N, D"),
    ({"loss": [math.nan] + [2.0] * 8}, {}, 'loss ("loss") is missing or NaN in 1 of 9 rows'),
    ({"loss": [0.0] + [2.0] * 8}, {}, 'loss ("loss") is zero in 1 of 9 rows'),
    ({"loss": [-1.0] + [2.0] * 8}, {}, 'loss ("loss") is negative in 1 of 9 rows'),
    ({"N": [math.inf] + [1e3] * 8}, {}, 'N ("N") is infinite in 1 of 9 rows'),
    ({"N": [1e3] * 9}, {}, "N is 1000 in every fitted row"),
    ({"loss": [2.0] * 9}, {}, "loss is 2 in every fitted row"),
    ({"weights_bits": [4.0] * 9}, {"law": "kumar"}, "weights_bits is 4 in every fitted row"),
    ({"N": ["a"] * 9}, {}, "N (\"N\") is text in 9 of 9 rows, such as 'a'; law chinchilla needs numbers"),
    ({"loss": [2.0] * 8}, {}, "table: columns must be one-dimensional and equally long"),
    ({}, {"where": "N > 1e9"}, "no rows left to fit: 9 in the table, 9 dropped (where N > 1e9)"),
    ({}, {"where": "D = 1e5"}, "3 rows cannot fit the 5 free parameters of law chinchilla (A, B, E, alpha, beta)"),
    ({}, {"where": "N = 1e3 AND D = 1e5"}, "1 row cannot fit"),
    ({}, {"where": "nothing > 1"}, 'where nothing > 1: Binder Error: Referenced column "nothing" not found'),
    ({}, {"holdout": "N > 1e9"}, "holdout='N > 1e9' selects no row of 9"),
    ({}, {"holdout": "N > 0"}, "holdout='N > 0' selects every row of 9"),
    ({}, {"columns": {"P": "N"}}, "columns: 'P' is no input of law chinchilla; it takes N, D, loss"),
    ({}, {"ties": {"gamma": "alpha"}}, "ties: gamma=alpha: 'gamma' is no constant of law chinchilla; it has A, B, E, alpha, beta"),
    ({}, {"ties": {"A": "B"}}, "ties: A is an amplitude; amplitudes can be fixed, not tied"),
    ({}, {"loss": "cauchy"}, "loss='cauchy': unknown; use huber, least_squares or lad"),
    ({}, {"delta": 0.0}, "delta=0.0"),
])
def test_refusals_are_one_line(change, options, message):
    table = {name: values for name, values in (GOOD | change).items() if values is not None}
    with pytest.raises(ValueError) as error:
        scaling.fit(table, options.pop("law", "chinchilla"), **options)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


@pytest.mark.parametrize(("text", "message"), [(None, "no such file"), ("{", "not a fit"), ("[]", "not a fit of this version"), ('{"a": 1}', "not a fit of this")])
def test_unreadable_fits_are_refused(tmp_path, text, message):
    path = tmp_path / "FIT.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message):
        scaling.load(path)


def test_confounded_designs_are_named():
    n = np.repeat([1e3, 2e3, 4e3, 8e3], 2)
    table = {"N": n, "D": 20 * n * np.tile([1.0, 1.05], 4), "loss": 30 * n**-0.4 + 1.5}
    notes = scaling.fit(table, "chinchilla").metrics["notes"]
    assert any("N and D move together" in note for note in notes)


def test_rows_that_are_not_done_are_dropped_and_counted():
    table = fake_runs.rows()
    status = np.full(len(table["loss"]), "done", dtype=object)
    status[:3], table["loss"][:3] = "diverged", np.nan
    fit = scaling.fit(table | {"status": status}, "kumar:tied")
    assert fit.metrics["rows"] == 45 and fit.metrics["dropped"] == {"status is not done": 3}


def test_an_unconverged_fit_states_nothing(epoch):
    """Python's face as well: no constant, no functional, no prediction, no plan."""
    fit = scaling.fit(law="chinchilla", **epoch)
    broken = replace(fit, metrics=dict(fit.metrics) | {"converged": False})
    for name, columns in (("alpha", {}), ("optimal_params", {"compute": 1e21})):
        assert fit.identified(name, **columns) and "did not converge" in broken.estimate(name, **columns).reason
    for ask in (lambda: broken.predict(N=1e9, D=1e10), lambda: scaling.plan(broken, compute=1e21)):
        with pytest.raises(ValueError, match="did not converge"):
            ask()


def test_widths_that_are_none_and_widths_where_the_law_diverges():
    fit = scaling.fit(fake_runs.rows(noise=0.003), "kumar:tied")
    for bad in (math.nan, -3.0):
        with pytest.raises(ValueError, match=f"weights_bits is {bad:g}: must be a positive number"):
            fit.predict(N=1e4, D=1e6, weights_bits=bad)
    predicted = fit.predict(N=1e4, D=1e6, weights_bits=np.array([0.0, 4.0]))
    assert predicted.loss[0] == predicted.low[0] == predicted.high[0] == math.inf and 0 < predicted.low[1] < predicted.loss[1] < predicted.high[1] < math.inf


def test_what_follows_from_a_constant_on_its_bound_is_not_stated():
    """A beta that has no error of its own: a = beta/(alpha + beta) was told with the error of alpha alone, .877 +- .002 for a truth of .514."""
    n = np.geomspace(1e6, 1e9, 12)
    loss = (400 / n**0.34 + 400 / (20 * n) ** 0.28 + 1.7) * np.exp(0.01 * np.random.default_rng(3).standard_normal(12))
    fit = scaling.fit({"N": n, "D": 20 * n, "loss": loss}, "chinchilla", fixed={"E": 1.7, "alpha": 0.34})
    fit = replace(fit, metrics=dict(fit.metrics) | {"at_bound": ["beta"]}, scatter=np.where(np.array(fit.free)[:, None] == "beta", 0.0, fit.scatter))
    told = fit.estimate("optimal_exponent")
    assert not told.identified and "follows from beta, which ended on its bound" in told.reason


def test_an_input_that_was_always_zero_has_no_distance_to_go_by(epoch):
    """Mantissa bits of 0 in every run tell nothing of 7: no factor bounds how far that is."""
    sun = scaling.laws["sun"]
    fit = replace(scaling.fit(law="chinchilla", **epoch), law=sun, params=dict(sun.published["sun"]), ranges={"exp_bits": (2.0, 5.0), "man_bits": (0.0, 0.0)})
    assert fit._extrapolation({"exp_bits": np.array(4.0), "man_bits": np.array([0.0, 7.0])}).tolist() == [1.0, math.inf]
    assert fit.discrepancy_at(np.array([1.0, math.inf])).tolist() == [0.0, math.inf]


def test_unconverged_fits_say_so(monkeypatch):
    monkeypatch.setattr("scaling.solve.MAX_ROUNDS", 1)
    monkeypatch.setattr("scaling.solve.SCIPY_ROUNDS", 1)
    assert not scaling.fit(fake_runs.rows(noise=0.05), "kumar").converged
