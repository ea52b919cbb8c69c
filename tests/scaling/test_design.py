"""The next runs to train: expected intervals against those of refits with the run added, and against repeated simulation."""
from __future__ import annotations

import re

import numpy as np
import pytest

import scaling
from scaling.cli import run
from scaling.laws import laws
from tests.scaling import fake_runs

NOISE = 0.004
STRAIGHT = {"bits": {"float32": 32.0}, "noise": NOISE}
CANDIDATES = [{"N": n, "D": d} for n in (2_304, 24_576, 200_000) for d in (600_000, 3_800_000, 30_000_000)]
QUANTITIES = [("alpha", {}), ("E", {}), ("optimal_exponent", {}), ("optimal_params", {"compute": 1e13}), ("loss", {"N": 1e5, "D": 1e7})]


def with_runs(table, runs, loss):
    """The table with a row for each of `runs` added, of the given losses."""
    more = {"n_params": [r["N"] for r in runs], "tokens": [r["D"] for r in runs], "loss": loss}
    more |= {name: [r.get(name, 32.0) for r in runs] for name in ("weights_bits", "activations_bits")}
    return {name: np.concatenate([table[name], values]) for name, values in more.items()}


def standard_error(fit, name, at):
    """Linearised, per unit of the residual deviation."""
    if name == "loss":
        predicted = fit.predict(**at, extrapolate=True)
        return float(np.log(predicted.mean_high / predicted.loss)) * float(predicted.loss) / fit.quantile / fit.metrics["residual_sd"]
    estimate = fit.estimate(name, **at)
    return estimate.relative_se * abs(estimate.value) / fit.metrics["residual_sd"]


@pytest.mark.parametrize(("loss", "tolerance"), [pytest.param("least_squares", 2e-4, marks=pytest.mark.slow), ("huber", 4e-3)])
def test_expected_intervals_are_those_of_refits(loss, tolerance):
    """A run added at its predicted loss leaves the constants where they are; the refit's own covariance then has the row that was
    expected. Huber: the price follows the residual deviation, which a run without error lowers."""
    table = fake_runs.rows(**STRAIGHT, seeds=2)
    fit = scaling.fit(table, "chinchilla", loss=loss)
    for name, at in QUANTITIES:
        before = standard_error(fit, name, at)
        for suggestion in scaling.next_runs(fit, CANDIDATES, name, at=at):
            run = suggestion.columns
            again = scaling.fit(with_runs(table, [run], [float(fit.law.predict(fit.params, **run))]), "chinchilla", loss=loss)
            assert suggestion.before == pytest.approx(before * fit.metrics["residual_sd"] * fit.quantile, rel=1e-3)
            assert suggestion.half_width / suggestion.before == pytest.approx(standard_error(again, name, at) / before, abs=tolerance), (name, run)


def test_a_batch_is_what_a_refit_with_all_of_it_has():
    table = fake_runs.rows(**STRAIGHT, seeds=2)
    fit = scaling.fit(table, "chinchilla", loss="least_squares")
    batch = scaling.next_runs(fit, CANDIDATES, "optimal_exponent", count=4, cost=[1.0] * len(CANDIDATES))
    assert all(later.before == pytest.approx(earlier.half_width) for earlier, later in zip(batch, batch[1:], strict=False))
    runs = [suggestion.columns for suggestion in batch]
    again = scaling.fit(with_runs(table, runs, [float(fit.law.predict(fit.params, **r)) for r in runs]), "chinchilla", loss="least_squares")
    expected = standard_error(again, "optimal_exponent", {}) / standard_error(fit, "optimal_exponent", {})
    assert batch[-1].half_width / batch[0].before == pytest.approx(expected, abs=1e-3)
    alone = scaling.next_runs(fit, CANDIDATES, "optimal_exponent", cost=[1.0] * len(CANDIDATES))
    assert alone[0] == batch[0] and len({tuple(run.items()) for run in runs}) > 1  # the same run again soon tells less than another


@pytest.mark.slow
def test_expected_intervals_are_those_of_simulation():
    """40 worlds with other noise: the spread of ln N_opt falls, when the three best runs or the worst one are trained in each, in the
    expected ratios, within what 40 worlds can tell of a ratio of deviations (15 %)."""
    at, cost = {"compute": 1e13}, [1.0] * len(CANDIDATES)
    fit = scaling.fit(fake_runs.rows(**STRAIGHT, seeds=2), "chinchilla", loss="least_squares")
    best = scaling.next_runs(fit, CANDIDATES, "optimal_params", at=at, cost=cost, count=3)
    worst = scaling.next_runs(fit, CANDIDATES, "optimal_params", at=at, cost=cost)[-1]
    expected = [best[-1].half_width / best[0].before, worst.half_width / worst.before]
    assert expected[0] < 0.6 and expected[1] > 0.9  # so that the comparison tells something
    worlds = np.array([_world(seed, [s.columns for s in best], worst.columns, at) for seed in range(40)])
    spread = worlds.std(axis=0)
    assert spread[1:] / spread[0] == pytest.approx(expected, abs=0.15)


def _world(seed, best, worst, at):
    """ln N_opt of a simulated table, of the same with the runs `best`, and of the same with the run `worst`."""
    table, rng = fake_runs.rows(**STRAIGHT, seeds=2, rng_seed=seed), np.random.default_rng([7, seed])
    found = []
    for runs in ([], best, [worst]):
        losses = [fake_runs.true_loss(r["N"], r["D"], 32.0) * np.exp(NOISE * rng.standard_normal()) for r in runs]
        fit = scaling.fit(with_runs(table, runs, losses), "chinchilla", loss="least_squares")
        found.append(np.log(fit.law.functionals["optimal_params"](fit.params, **at)))
    return found


def test_cost_decides_between_equals():
    fit = scaling.fit(fake_runs.rows(noise=NOISE), "kumar:tied+plain")
    candidates = [{"N": 5_120, "D": 1e6, "weights_bits": bits, "activations_bits": bits} for bits in (2.5, 3.0, 4.0, 32.0)]
    by_width = scaling.next_runs(fit, candidates, "gamma_w", cost=lambda run: 10.0)
    assert [s.columns["weights_bits"] for s in by_width[:2]] == [2.5, 3.0]  # where the efficiency is steepest
    assert all(s.half_width > 0.97 * s.before for s in by_width[2:])
    dear = scaling.next_runs(fit, candidates, "gamma_w", cost=[1e6, 1.0, 1.0, 1.0])
    assert dear[0].columns["weights_bits"] == 3.0 and dear[-1].columns["weights_bits"] == 2.5
    assert dear[0].gain == pytest.approx((dear[0].before - dear[0].half_width) / 1.0)
    flop = {s.columns["weights_bits"]: s.cost for s in scaling.next_runs(fit, candidates, "gamma_w")}
    assert set(flop.values()) == {6 * 5_120 * 1e6}


def test_any_function_of_the_constants_is_a_quantity():
    fit = scaling.fit(fake_runs.rows(**STRAIGHT), "chinchilla")
    named = scaling.next_runs(fit, CANDIDATES, "optimal_exponent")
    by_hand = scaling.next_runs(fit, CANDIDATES, lambda p: p["beta"] / (p["alpha"] + p["beta"]))
    assert [s.columns for s in named] == [s.columns for s in by_hand]
    assert [s.gain for s in named] == pytest.approx([s.gain for s in by_hand])


@pytest.mark.parametrize(("candidates", "quantity", "options", "message"), [
    ([], "alpha", {}, "candidates is empty"), (CANDIDATES, "gamma_w", {}, "'gamma_w': law chinchilla has no such parameter or functional"),
    (CANDIDATES, "alpha", {"cost": [1.0]}, "1 costs for 9 candidates"), (CANDIDATES, "alpha", {"cost": lambda run: 0.0}, "need a positive finite number"),
    (CANDIDATES, "alpha", {"count": 0}, "count=0: need at least 1"), ([{"N": 1e4}], "alpha", {"cost": [1.0]}, "law chinchilla needs D"),
    (CANDIDATES, lambda p: np.nan, {}, "is not finite near the fitted constants"),
    (CANDIDATES, "optimal_params", {}, "optimal_params of law chinchilla takes compute, cost_per_pair (may be left out); given: nothing"),
    ([{"N": 1e4}], "alpha", {}, "candidate {'N': 10000.0}: needs N and D for a cost of 6 N D FLOP"),
])
def test_refusals(candidates, quantity, options, message):
    fit = scaling.fit(fake_runs.rows(**STRAIGHT), "chinchilla")
    with pytest.raises(ValueError, match=re.escape(message)):
        scaling.next_runs(fit, candidates, quantity, **options)


@pytest.mark.parametrize(("truth", "law", "quantity", "message"), [
    ({}, "kumar:tied+plain", "optimal_exponent", "no candidate can tell anything of optimal_exponent: no constant with an error moves it"),  # 1/2
    ({"gamma": 40.0}, "kumar:tied+plain", "optimal_bits", "(not identified by this design (optimal_bits follows from gamma_w, which ended on its bound))"),
])
def test_a_quantity_of_which_no_run_can_tell_anything_is_refused(truth, law, quantity, message):
    fit = scaling.fit(fake_runs.rows(truth=fake_runs.TRUTH | truth), law)
    for count in (None, 2):
        with pytest.raises(ValueError, match=re.escape(message)):
            scaling.next_runs(fit, [{"N": 1e4, "D": 1e6, "weights_bits": 4.0}, {"N": 2e4, "D": 1e6}], quantity, count=count)


def of_layouts():
    """A fit of the law of Sun et al. to a few layouts."""
    law = laws["sun"]
    rows = np.array([(n, d, e, m) for n in (4e7, 1e8, 2e8, 6e8) for d in (1e10, 3e10, 1e11) for e, m in ((2, 1), (4, 3), (5, 2), (8, 7))]).T
    columns = dict(zip(("N", "D", "exp_bits", "man_bits"), rows, strict=True)) | {"block": np.resize([32.0, 128.0], rows.shape[1])}
    noise = np.exp(0.003 * np.random.default_rng(0).standard_normal(rows.shape[1]))
    table = columns | {"loss": law.predict(law.published["sun"], **columns) * noise}
    return scaling.fit(table, "sun", loss="least_squares"), table


def test_a_name_has_no_interval_to_shrink_or_to_cover():
    fit, table = of_layouts()
    candidate = {"N": 1e8, "D": 1e10, "exp_bits": 4.0, "man_bits": 3.0, "block": 32.0}
    with pytest.raises(ValueError, match="next_runs: quantity best_layout is a name .E3M4., which has no interval to shrink; give a constant"):
        scaling.next_runs(fit, [candidate], "best_layout", at={"bits": 8.0})
    with pytest.raises(ValueError, match="coverage: best_layout is a name .E3M4., which has no interval; give constants"):
        scaling.coverage(fit, table, 20, {"best_layout": {"bits": 8.0}})


def test_command_line_ranks_as_next_runs_does(tmp_path, capsys):
    """A grid of candidates with a common width; costs of the model asked for; the order and the numbers of the library."""
    fit = scaling.fit(fake_runs.rows(), "kumar:tied+plain")
    path = str(fit.save(tmp_path / "FIT.json"))
    assert run("plan", [path, "--next", "gamma_w", "--candidates", "N=5e3,2e4", "D=1e6,4e6", "bits=3,6", "--cost-model", "bits"]) == 0
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    candidates = [{"N": n, "D": d, "weights_bits": w, "activations_bits": w} for n in (5e3, 2e4) for d in (1e6, 4e6) for w in (3.0, 6.0)]
    expected = scaling.next_runs(fit, candidates, "gamma_w", cost=[6 * c["N"] * c["D"] * c["weights_bits"] / 16 for c in candidates])
    assert len(rows) == 8 and [[float(cell) for cell in row[:4]] for row in rows] == [list(one.columns.values()) for one in expected]
    assert [float(row[6]) for row in rows] == pytest.approx([one.half_width for one in expected], rel=1e-3)
    assert run("plan", [path, "--next", "loss", "--at", "N=1e5,D=1e7", "--candidates", "N=2e4", "D=4e6", "--count", "2"]) == 0
    assert capsys.readouterr().out.count("4.8e+11") == 2


@pytest.mark.parametrize(("argv", "message"), [
    (["--next", "alpha"], "--candidates: also needs N, D: N=1e6,2e6 D=2e7,4e7"),
    (["--next", "alpha", "--candidates", "N=1e4", "D=1e6", "width=3"], "--candidates width=3: not NAME=V1,V2 of a name among N, D, weights_bits"),
    (["--next", "alpha", "--candidates", "N=1e4,-2", "D=1e6"], "--candidates N=1e4,-2: -2.0 is no positive number"),
    (["--next", "alpha", "--candidates", "N=1e4", "D=1e6", "weights_bits=4", "bits=8"], "--candidates: weights_bits and bits are both given; bits stands for "
     "weights_bits, activations_bits, so give one or the other"),
    (["--next", "alpha", "--candidates", "N=1e9", "D=1e6"], "plan --next: N = 1e+09 parameters is"),
    (["--next", "alpha", "--memory", "9"], "plan: --memory belongs to a plan, not to --next"),
    (["--candidates", "N=1e4"], "plan: --candidates belongs to --next: it says nothing here"),
])
def test_command_line_refusals(tmp_path, argv, message, capsys):
    path = str(scaling.fit(fake_runs.rows(), "kumar:tied+plain").save(tmp_path / "FIT.json"))
    assert run("plan", [path, *argv]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
