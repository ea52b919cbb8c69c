"""Fits in two stages: what the first sees, and whether the second's intervals hold the uncertainty of both."""
from __future__ import annotations

import numpy as np
import pytest

import scaling

BASE = "forward = 'BF16' AND backward = 'BF16'"
TRUTH = {"A": 42.0, "alpha": 0.42, "B": 330.0, "beta": 0.38, "E": 1.05, "gamma": 1.0}
EFFICIENCIES = {"BF16": 1.0, "FP4": 0.64}


def runs(seed: int, noise: float = 0.005) -> dict[str, np.ndarray]:
    """5 sizes x 4 lengths x 2 forward schemes of Quartet's law with gamma 1, noise of ln loss Gaussian."""
    N, D, kind = (part.ravel() for part in np.meshgrid([3e3, 1e4, 3e4, 1e5, 3e5], [3e5, 1e6, 3e6, 1e7], [0, 1], indexing="ij"))
    forward = np.array(["BF16", "FP4"])[kind.astype(int)]
    effective = N * np.array([EFFICIENCIES[name] for name in forward])
    loss = TRUTH["A"] / effective ** TRUTH["alpha"] + TRUTH["B"] / D ** TRUTH["beta"] + TRUTH["E"]
    loss = loss * np.exp(noise * np.random.default_rng(seed).standard_normal(N.size))
    return {"N": N, "D": D, "forward": forward, "backward": np.full(N.size, "BF16"), "loss": loss}


def two_stages(table, **options):
    return scaling.fit(table, "quartet", base=BASE, loss="least_squares", fixed={"gamma": 1.0}, **options)


def test_the_first_stage_sees_no_held_out_run():
    """The constants are those of a fit to the baseline runs that are left, and what the held-out runs lost changes none of them."""
    table = runs(0)
    held = table["N"] == table["N"].max()
    fit = two_stages(table, holdout="N = max(N) OVER ()")
    alone = scaling.fit({name: values[~held & (table["forward"] == "BF16")] for name, values in table.items()}, "chinchilla", loss="least_squares")
    for name in ("A", "alpha", "B", "beta", "E"):
        assert fit.params[name] == pytest.approx(alone.params[name], rel=1e-6)
    other = two_stages(table | {"loss": np.where(held, 2 * table["loss"], table["loss"])}, holdout="N = max(N) OVER ()")
    assert other.params == fit.params and "16 rows" in fit.metrics["notes"][0]


def test_constants_of_the_first_stage_have_its_intervals():
    """Their errors are those of the stage alone; a prediction of a baseline run has an interval with a width."""
    table = runs(0)
    fit = two_stages(table)
    alone = scaling.fit({name: values[table["forward"] == "BF16"] for name, values in table.items()}, "chinchilla", loss="least_squares")
    for name in ("alpha", "beta", "E"):
        assert fit.estimate(name).relative_se == pytest.approx(alone.estimate(name).relative_se, rel=1e-3)
    assert fit.estimate("optimal_exponent").relative_se == pytest.approx(alone.estimate("optimal_exponent").relative_se, rel=1e-3)
    here, there = (one.predict(N=1e5, D=3e6, **columns) for one, columns in ((fit, {"forward": "BF16", "backward": "BF16"}), (alone, {})))
    assert np.log(here.mean_high / here.loss) / fit.quantile == pytest.approx(np.log(there.mean_high / there.loss) / alone.quantile, rel=1e-3)
    assert fit.metrics["bic"] == pytest.approx(40 * np.log(fit.metrics["rmse"] ** 2) + 6 * np.log(40))


def test_a_base_that_selects_nothing():
    with pytest.raises(ValueError, match="base=.*selects no row of the 32 that are fitted"):
        two_stages(runs(0) | {"forward": np.where(runs(0)["N"] < 3e5, "FP4", "BF16")}, holdout="N = max(N) OVER ()")


def test_refits_are_refused():
    with pytest.raises(ValueError, match="fitted in two stages"):
        scaling.resample(two_stages(runs(0)), runs(0), 10)
    with pytest.raises(ValueError, match="a run tells its own stage alone"):
        scaling.next_runs(two_stages(runs(0)), [{"N": 1e4, "D": 1e6, "forward": "FP4", "backward": "BF16"}], "alpha")


@pytest.mark.slow
def test_the_error_of_the_second_stage_is_that_of_simulations():
    """Over 60 simulated tables the efficiency scatters as the fits say; by the second stage alone it would be half of that."""
    fits = [two_stages(runs(seed)) for seed in range(60)]
    logs = np.log([fit.params["effN[FP4]"] for fit in fits])
    stated = np.mean([fit.estimate("effN[FP4]").relative_se for fit in fits])
    assert np.std(logs) == pytest.approx(stated, rel=0.25)  # a deviation from 60 is known to 9 %
    covered = [fit.estimate("effN[FP4]").low <= 0.64 <= fit.estimate("effN[FP4]").high for fit in fits]
    assert np.mean(covered) > 0.87
    drawn = two_stages(runs(0), bootstrap=200)
    assert np.std(np.log([drawn.constants_at(draw)["effN[FP4]"] for draw in drawn.draws])) == pytest.approx(stated, rel=0.4)


def test_a_first_stage_that_identifies_nothing_says_so():
    """Baseline runs at one D/N: their constants are as unknown with a second stage as without."""
    n = np.geomspace(1e6, 1e9, 8)
    N, D, scheme = np.concatenate([n, n, n]), np.concatenate([20 * n, 20 * n, 200 * n]), np.repeat(["bf16", "fp4", "fp4"], 8)
    loss = (400 / (N * np.where(scheme == "fp4", 0.6, 1.0)) ** 0.34 + 400 / D**0.34 + 1.7) * np.exp(5e-3 * np.random.default_rng(0).standard_normal(N.size))
    table = {"N": N, "D": D, "scheme": scheme, "loss": loss}
    alone = scaling.fit(table, "chinchilla", where="scheme = 'bf16'")
    both = scaling.fit(table, "free_efficiency", base="scheme = 'bf16'")
    assert not alone.identified("alpha") and not both.identified("alpha")
    assert both.metrics["condition_number"] >= alone.metrics["condition_number"] > 1e6
    assert any("N and D move together" in note for note in both.metrics["notes"])


def test_the_second_stage_counts_the_constants_of_the_first():
    """All rows less all constants, in the residual deviation and in the errors that it scales."""
    table = runs(0)
    fit = two_stages(table)
    assert fit.metrics["dof"] == 40 - 6
    predicted = scaling.laws["quartet"].at_levels(fit.law.levels).predict(fit.params, **{name: table[name] for name in fit.law.inputs})
    errors = np.log(predicted / table["loss"])
    assert fit.metrics["residual_sd"] == pytest.approx(np.sqrt(np.sum(errors**2) / 34), rel=1e-9)
