"""Law-free statistics against scipy and hand computation."""
from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

import scaling
from scaling.analysis import with_run_columns
from scaling.statistics import finished_runs, indistinct, mean_interval, paired_gaps, reference_precision, seed_noise
from tests.scaling import fake_runs


def runs_of(**columns):
    return finished_runs(with_run_columns(scaling.table(columns)))


def test_mean_interval_is_scipys():
    values = [0.1, 0.3, 0.2, 0.25]
    expected = scipy.stats.t.interval(0.95, 3, loc=np.mean(values), scale=scipy.stats.sem(values))
    assert mean_interval(values) == pytest.approx((np.mean(values), *expected))
    assert math.isnan(mean_interval([1.0])[1])


def test_pairs_match_in_size_tokens_and_seed():
    runs = runs_of(n_params=[1, 1, 1, 1, 2], tokens=[9, 9, 9, 8, 9], seed=[0, 0, 1, 0, 0], weights_bits=[4, 32, 32, 32, 4],
                   precision=["int4", "float32", "float32", "float32", "int4"], loss=[2.5, 2.0, 1.0, 1.5, 2.2])
    (gap,) = paired_gaps(runs)
    assert gap.values == (0.5,) and gap.bits == 4 and math.isnan(gap.low)
    assert paired_gaps(runs, 2) == []


PAIR = {"n_params": [1, 1], "tokens": [9, 9], "seed": [0, 0], "weights_bits": [4, 32], "precision": ["int4", "float32"], "loss": [2.5, 2.0]}


@pytest.mark.parametrize(("differing", "pairs"), [
    ({"data": ["a", "b"], "data_sha256": ["f0", "f0"]}, 1),  # one text under two names
    ({"data": ["a", "a"], "data_sha256": ["f0", "f1"]}, 0),
    ({"data": ["a", "a"], "data_sha256": [None, None]}, 1),
    ({"data": ["a", "b"]}, 0),
    ({"batch_tokens": [64, 128]}, 0),
    ({"cooldown_steps": [10, 20]}, 0),
    ({"cooldown_steps": [10, None]}, 0),
    ({"lr_rule": ["mup", "constant"]}, 0),
    ({"lr": [0.1, 0.2]}, 0),
    ({"schedule": ["wsd", "cosine"]}, 0),
    ({"wall_s": [1.0, 2.0]}, 1),
])
def test_pairs_match_in_data_batch_and_schedule(differing, pairs):
    assert sum(len(gap.values) for gap in paired_gaps(runs_of(**PAIR | differing))) == pairs


def test_loss_gaps_are_those_of_a_join():
    """A table with names of its own, a join of it with itself, and scipy's interval."""
    rng = np.random.default_rng(3)
    cells = [(size, tokens, seed, width) for size in (1e6, 4e6) for tokens in (2e7, 8e7) for seed in range(4) for width in (3, 4, 8, 32)]
    kept = [cells[i] for i in rng.permutation(len(cells))[:50]]  # some runs have no partner
    size, tokens, seed, width = (np.array(values) for values in zip(*kept, strict=True))
    mine = {"size": size, "toks": tokens, "seed": seed, "width": width.astype(float), "final": 2.0 + rng.random(50), "family": rng.choice(["x", "y"], 50)}
    columns = {"N": "size", "D": "toks", "loss": "final", "weights_bits": "width"}
    for where in (None, "family = 'x'"):
        gaps = scaling.loss_gaps(mine, columns=columns, where=where)
        rows = scaling.table(mine).filter(where or "true")
        joined = _joined(rows)
        assert len(gaps) == len(joined) > 1
        for gap, (bits, differences) in zip(gaps, joined, strict=True):
            assert gap.bits == bits and sorted(gap.values) == pytest.approx(sorted(differences))
            assert (gap.low, gap.high) == pytest.approx(scipy.stats.t.interval(0.95, len(differences) - 1, np.mean(differences),
                                                                               scipy.stats.sem(differences)), nan_ok=True)
    one_size = scaling.loss_gaps(mine, columns=columns, n_params=4e6)
    assert sum(len(gap.values) for gap in one_size) == sum(len(values) for _, values in _joined(scaling.table(mine).filter("size = 4e6")))
    with pytest.raises(ValueError, match="a run table needs n_params, tokens, loss; this one has size, "):
        scaling.loss_gaps(mine)


def _joined(rows):
    """(width, differences) by SQL."""
    return rows.query("runs", "SELECT a.width, list(a.final - b.final) FROM runs a JOIN runs b USING (size, toks, seed) "
                              "WHERE a.width < 16 AND b.width >= 16 GROUP BY ALL ORDER BY a.width").fetchall()


def test_runs_that_nothing_tells_apart_are_in_no_pair():
    """Two int4 runs of one seed (say, of other block sizes): neither order in the table may decide which one counts."""
    columns = {"run_id": ["a", "b", "c", "d", "e"], "n_params": [1] * 5, "tokens": [9] * 5, "seed": [0, 0, 0, 1, 1],
               "weights_bits": [4, 4, 32, 4, 32], "precision": ["int4", "int4", "float32", "int4", "float32"], "loss": [2.5, 2.9, 2.0, 2.7, 2.1]}
    runs = runs_of(**columns)
    (gap,) = paired_gaps(runs)
    assert gap.values == pytest.approx((0.6,)) and {run.run_id for run in indistinct(runs)} == {"a", "b"}
    noise = seed_noise(runs)
    assert noise.groups == 1 and noise.sd == pytest.approx(0.1 / math.sqrt(2))  # float32 alone: 2.0 and 2.1
    twice = runs_of(**{name: values + values for name, values in columns.items()} | {"run_id": ["a", "a2", "c", "d", "e"] * 2})
    assert {run.run_id for run in indistinct(twice)} == {"a", "a2"}  # a run that is in the table twice is no rival of itself


def test_exempt_places_tell_runs_apart():
    """int4 with its last block high is another precision than int4; float32 with an int8 head is no reference. A preset's own places, which all
    of its runs have, are not spelled out."""
    columns = {"run_id": list("abcdef"), "n_params": [1] * 6, "tokens": [9] * 6, "seed": [0] * 6, "weights_bits": [4, 4, 4, 32, 32, 4],
               "precision": ["int4", "int4", "int4", "float32", "float32", "nvfp4_recipe"], "loss": [2.5, 2.3, 2.4, 2.0, 2.1, 2.2],
               "exemptions": [None, "last1:high", "last1:high,head:int8", None, "head:int8", "last1:high"]}
    runs = runs_of(**columns)
    assert indistinct(runs) == [] and reference_precision(runs) == "float32"
    gaps = {gap.precision: gap.mean for gap in paired_gaps(runs)}
    assert gaps == pytest.approx({"int4": 0.5, "int4(last1:high)": 0.3, "int4(last1:high,head:int8)": 0.4, "nvfp4_recipe": 0.2})
    alone = runs_of(**{name: values[4:] for name, values in columns.items()})
    assert reference_precision(alone) == "float32(head:int8)"
    assert {run.run_id for run in indistinct(runs_of(**columns | {"exemptions": [None] * 6}))} == set("abcde")


def test_reference_is_float32_or_the_commonest_wide_one():
    widths = {"n_params": [1, 1, 1], "tokens": [1, 1, 1], "loss": [1.0, 1.0, 1.0], "weights_bits": [16, 16, 4]}
    assert reference_precision(runs_of(**widths, precision=["bfloat16", "bfloat16", "int4"])) == "bfloat16"
    assert reference_precision(runs_of(**widths, precision=["bfloat16", "float32", "int4"])) == "float32"
    assert reference_precision(runs_of(**widths | {"weights_bits": [4, 4, 4]}, precision=["int4"] * 3)) is None


def test_quantized_gradients_count_as_quantized():
    (run,) = runs_of(n_params=[1], tokens=[1], loss=[1.0], output_gradients_bits=[8], precision=["mixed"])
    assert run.quantized and run.bits == 8 and run.widths == {"weights_bits": math.inf, "activations_bits": math.inf, "kv_bits": math.inf}


def test_seed_noise_pools_groups():
    table = fake_runs.rows(noise=0.01, seeds=4)
    groups = (table["loss"].reshape(-1, 4) - table["loss"].reshape(-1, 4).mean(axis=1, keepdims=True)) ** 2
    noise = seed_noise(runs_of(**table))
    assert noise.dof == 3 * len(groups) and noise.groups == len(groups) and noise.sd == pytest.approx(math.sqrt(groups.sum() / noise.dof))
    assert seed_noise(runs_of(**fake_runs.rows(seeds=1))) is None


def test_runs_without_a_final_loss_are_left_out(demo_runs):
    runs = finished_runs(scaling.table(demo_runs))
    assert len(runs) == 46 and all(math.isfinite(run.loss) for run in runs)


def test_one_name_at_several_widths_is_several_precisions():
    """A sweep over the bits of one preset may call all of its runs `int`."""
    table = fake_runs.rows(sizes={"2k": 2_304}) | {"precision": ["int"] * 12}
    runs = runs_of(**table)
    assert reference_precision(runs) == "int/unquantized"
    assert [(gap.precision, gap.bits, len(gap.values)) for gap in paired_gaps(runs)] == [("int/3", 3.0, 3), ("int/4", 4.0, 3), ("int/6", 6.0, 3)]
