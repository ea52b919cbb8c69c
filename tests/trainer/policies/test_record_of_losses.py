"""The columns of a record that tell what low precision did: of integers of three widths, in one cohort, against gradients computed here."""
from __future__ import annotations

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.trainer.tiny import TINY, shared_program
from trainer import build, checkpoint, cohort, scales, step
from trainer import model as decoder
from trainer.cli import sweep_configs
from trainer.data import validation_windows
from trainer.precision import ROLES, PrecisionPolicy
from trainer.sweep import make_plan

pytestmark = pytest.mark.slow
BASE = [override for override in TINY if not override.startswith(("precision", "probe"))]
BITS = (2, 8, 32)
DID = ("updates_per_ulp", "gradient_cosine", "gradient_magnitude",
       "weights_bytes_per_param", "moments_bytes_per_param", "peak_bytes_per_param")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Bits -> planned run, trained for eight steps."""
    patch = pytest.MonkeyPatch()
    patch.setattr(importlib.import_module("trainer.sweep.plan"), "choose_layout", lambda *_: cohort.Layout(1, 1, "map"))
    patch.setattr(importlib.import_module("trainer.sweep.execute"), "Program", shared_program)
    overrides = [*BASE, "precision=int8_tensor", f"precision.bits={','.join(map(str, BITS))}", "precision.output_gradients.rounding=nearest_even",
                 "steps=8", f"runs_dir={tmp_path_factory.mktemp('runs')}"]
    plan = make_plan(sweep_configs(overrides)[0])
    outcome = importlib.import_module("trainer.sweep").execute(plan, quiet=True)
    patch.undo()
    assert not outcome.failed and len(plan.cohorts) == 1
    return {run.config.precision.weights.first.bits: run for run in plan.runs}


def test_columns_are_filled_and_plausible(runs):
    records = {bits: run.folder.record() for bits, run in runs.items()}
    assert all(record[name] is not None for record in records.values() for name in DID)
    for bits, record in records.items():
        assert record["edq"] is record["lost_updates"] is None and record["updates_per_ulp"] > 100  # float32 weights: nothing that could be lost
        assert record["weights_bytes_per_param"] == pytest.approx(4) and record["moments_bytes_per_param"] == pytest.approx(8, rel=0.02)
        assert 12 < record["peak_bytes_per_param"] < 1000
        shares = [record[f"{role}_{what}"] for role in ROLES for what in ("underflow", "overflow")]
        assert all(share is None for share in shares) if bits == 32 else all(0 <= share <= 1 for share in shares)
    cosine = [records[bits]["gradient_cosine"] for bits in BITS]
    assert cosine[0] < cosine[1] - 1e-3 < cosine[1] < cosine[2] == 1 and cosine[1] > 0.98 and records[32]["gradient_magnitude"] == 1
    assert records[2]["weights_underflow"] > records[8]["weights_underflow"] and records[2]["activations_underflow"] > 0.3
    assert records[8]["weights_overflow"] == 0  # the scale is that of the amax


@pytest.mark.parametrize("bits", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_gradients_are_compared_as_the_record_says(runs, bits):
    """Cosine and <g, exact> / |exact|^2 of one micro-batch of validation windows at the final parameters, in float64."""
    run = runs[bits]
    structure = dataclasses.replace(run.structure, accumulate=1)
    stored = checkpoint.leaves(run.folder.checkpoints, "params/")
    shapes = decoder.blueprint(structure.model)[1]
    params = jax.tree_util.tree_map_with_path(lambda path, _: jnp.asarray(stored[jax.tree_util.keystr(path, simple=True, separator="/")]), shapes)
    windows = validation_windows(run.dataset.validation, run.config.eval_sequences, structure.seq_len)[: structure.batch_size].astype(np.int32)
    graphdef, key = decoder.blueprint(structure.model)[0], np.zeros(2, np.uint32)

    def gradients(policy):
        found = jax.jit(lambda params: step.differentiate(structure, graphdef, params, windows, policy, key, None, scales.Site())[1],
                        compiler_options={"xla_backend_optimization_level": 0})(params)
        return np.concatenate([np.ravel(leaf).astype(np.float64) for leaf in jax.tree.leaves(found)])

    found, exact = gradients(build.hyper(run.config).policy), gradients(PrecisionPolicy())
    record = run.folder.record()
    assert record["gradient_cosine"] == pytest.approx(found @ exact / np.linalg.norm(found) / np.linalg.norm(exact), abs=2e-4)
    assert record["gradient_magnitude"] == pytest.approx(found @ exact / (exact @ exact), rel=2e-3)


def test_logged_steps_tell_the_same(runs):
    """The record's columns are means over the logged steps of the last quarter."""
    folder = runs[8].folder
    last = [row for row in folder.metrics() if "updates_per_ulp" in row and row["step"] > 6]
    assert [row["step"] for row in last] == [7, 8]
    assert folder.record()["updates_per_ulp"] == pytest.approx(np.mean([row["updates_per_ulp"] for row in last]), rel=1e-6)
    assert not any("edq" in row or "lost" in row for row in last)
