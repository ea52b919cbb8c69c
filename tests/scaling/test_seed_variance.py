"""The decomposition of the variance of losses: planted parts, exact small cases, run tables."""
from __future__ import annotations

import numpy as np
import pytest

import scaling
from scaling.statistics import finished_runs, seed_noise
from tests.scaling import fake_runs

CELL, SEED, ERROR = 0.30, 0.02, 0.015  # standard deviations


def _planted(rng, num_cells, common=False):
    counts = rng.integers(1, 6, num_cells)
    cells = np.repeat(np.arange(num_cells), counts)
    errors = ERROR * rng.uniform(0.5, 1.5, cells.size)
    noise = rng.standard_normal() * errors if common else rng.standard_normal(cells.size) * errors
    losses = 3.0 + CELL * rng.standard_normal(num_cells)[cells] + SEED * rng.standard_normal(cells.size) + noise
    return losses, cells.tolist(), errors


def test_planted_parts_come_back_without_bias():
    """400 tables of 30 unequal cells, seed 0: means of the estimates within four standard errors of what was planted."""
    rng = np.random.default_rng(0)
    found = [scaling.variance_parts(*_planted(rng, 30), same_tokens=False) for _ in range(400)]
    for name, truth in (("between_cells", CELL**2), ("between_seeds", SEED**2), ("evaluation", ERROR**2 * (1 + 1 / 12))):
        values = np.array([getattr(parts, name) for parts in found])
        assert values.mean() == pytest.approx(truth, abs=4 * values.std() / 20)
        assert truth == pytest.approx(values.mean(), rel=0.1)  # and the standard error is small enough to tell


def test_evaluation_on_the_same_tokens_is_not_taken_off():
    """An error common to all runs shifts them together: taking it off would understate the seeds by more than half."""
    rng = np.random.default_rng(1)
    tables = [_planted(rng, 40, common=True) for _ in range(200)]
    kept = np.mean([scaling.variance_parts(*one).between_seeds for one in tables])
    taken_off = np.mean([scaling.variance_parts(*one, same_tokens=False).between_seeds for one in tables])
    assert kept == pytest.approx(SEED**2, rel=0.06) and taken_off < 0.5 * SEED**2


def test_interval_of_the_variance_within_covers():
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(2000):
        losses = 2.0 + rng.standard_normal(9) * SEED
        parts = scaling.variance_parts(losses, ["a", "a", "a", "b", "b", "b", "c", "c", "c"])
        covered += parts.within_low <= SEED**2 <= parts.within_high
    assert covered / 2000 == pytest.approx(0.95, abs=0.015)


def test_balanced_case_by_hand():
    parts = scaling.variance_parts([1.0, 3.0, 6.0, 8.0], ["a", "a", "b", "b"], [0.5] * 4, same_tokens=False)
    assert (parts.within, parts.evaluation, parts.between_seeds) == (2.0, 0.25, 1.75)  # squares 1+1+1+1 over 2; 0.5^2
    assert parts.between_cells == pytest.approx((25.0 - 2.0) / 2)  # mean square between: 2 (2.5^2 + 2.5^2)/1
    assert (parts.dof, parts.cells, parts.runs) == (2, 2, 4)


def test_what_is_negative_is_cut_and_said():
    parts = scaling.variance_parts([1.0, 1.1, 1.1, 1.0], ["a", "a", "b", "b"], [0.5] * 4, same_tokens=False)
    assert parts.between_seeds == 0.0 == parts.between_cells and len([note for note in parts.notes if "cut at zero" in note]) == 2


def test_run_table_agrees_with_the_pooled_seed_noise(tmp_path):
    folder = fake_runs.write_runs(tmp_path / "runs", sizes={"2k": 2_304, "5k": 5_120}, seeds=3, noise=0.02)
    runs = scaling.table(folder)
    parts, noise = scaling.seed_variance(folder), seed_noise(finished_runs(runs))
    assert parts.within == pytest.approx(noise.sd**2, rel=1e-12) and parts.dof == noise.dof == 48 and parts.cells == 24
    assert parts.evaluation == pytest.approx(0.004**2) and parts.between_seeds == parts.within
    independent = scaling.seed_variance(folder, same_tokens=False)
    assert independent.between_seeds == pytest.approx(parts.within - 0.004**2)
    bare = fake_runs.rows(seeds=2)
    assert any("no standard errors" in note for note in scaling.seed_variance(bare).notes)
    assert scaling.seed_variance(bare | {"loss_std_err": np.full(bare["loss"].size, 0.001)}).evaluation == pytest.approx(1e-6)


def test_refusals():
    with pytest.raises(ValueError, match="train more seeds"):
        scaling.variance_parts([1.0, 2.0], ["a", "b"])
    with pytest.raises(ValueError, match="equally long"):
        scaling.variance_parts([1.0, 2.0], ["a"])
    with pytest.raises(ValueError, match="finite"):
        scaling.variance_parts([1.0, float("inf")], ["a", "a"])
    with pytest.raises(ValueError, match="train more seeds"):
        scaling.seed_variance(fake_runs.rows(seeds=1))
