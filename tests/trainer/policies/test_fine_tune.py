"""`init_from`: a run that starts from another one's parameters; its identity, what is refused, and that it resumes like any other."""
from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import trainer
from tests.trainer import conftest, tiny
from tests.trainer.tiny import OF_THE_LAUNCH, TINY
from trainer import checkpoint, cohort, stored
from trainer import model as decoder
from trainer.cli import sweep_configs
from trainer.config import run_id
from trainer.fine_tune import given_params
from trainer.optimizers import OptimizerNumbers
from trainer.records import RunFolder
from trainer.sweep import execute, make_plan

BASE = [override for override in TINY if not override.startswith(("precision", "probe"))] + ["probe=false", "host_devices=1", "checkpoint.keep=9"]
FINE = ["precision=bitnet_finetune", "precision.ramp_steps=4", "schedule=constant"]
pytestmark = pytest.mark.usefixtures("one_device")


def _train(*overrides) -> tuple[RunFolder, dict]:
    """(folder, record) of one run."""
    configs, _ = sweep_configs([*BASE, *overrides])
    plan = make_plan(configs)
    execute(plan, quiet=True)
    (run,) = plan.runs
    return run.folder, run.folder.record()


def _params(folder: RunFolder) -> dict[str, np.ndarray]:
    return checkpoint.leaves(folder.checkpoints, "params/")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Five steps in float32."""
    patch = pytest.MonkeyPatch()
    patch.setattr(conftest.plan, "choose_layout", lambda *_: cohort.Layout(1, 1, "map"))
    patch.setattr(conftest.execute, "Program", tiny.shared_program)
    folder, record = _train("precision=float32", "steps=5", f"runs_dir={tmp_path_factory.mktemp('source')}")
    patch.undo()
    assert record["status"] == "done" and record["steps"] == 5
    return folder


def _without_launch(folder: RunFolder):
    rows = [{name: value for name, value in row.items() if name != "wall_s"} for row in folder.metrics()]
    record = {name: value for name, value in folder.record().items() if name not in OF_THE_LAUNCH}
    return record, rows, {name: leaf.tobytes() for name, leaf in checkpoint.leaves(folder.checkpoints, "").items()}


def test_parameters_arrive_unchanged(tmp_path, source):
    """With a learning rate of 0 they stay what they were; the gains that the source lacks are 1. The source's files are not touched."""
    before = {path: path.read_bytes() for path in source.path.rglob("*") if path.is_file()}
    folder, record = _train(*FINE, "steps=5", "optimizer.lr=0", f"init_from={source.path}", f"runs_dir={tmp_path}")
    assert record["status"] == "done"
    found, expected = _params(folder), _params(source)
    assert found.keys() - expected.keys() == {f"layers/extra_norms/{name}_norm" for name in ("qkv", "attention_out", "gate_up", "down")}
    for name, leaf in found.items():
        np.testing.assert_array_equal(leaf, expected.get(name, np.ones_like(leaf)))
    assert before == {path: path.read_bytes() for path in source.path.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["collage_light", "bf16_stochastic"])
def test_weights_of_another_format_start_from_the_source(tmp_path, source, precision):
    """Nothing is trained yet (lr 0): two bfloat16 words hold the source's float32 to 16 bits, one word the nearest bfloat16 (stochastic: one
    of the two around it)."""
    folder, record = _train(f"precision={precision}", "steps=1", "optimizer.lr=0", "schedule=constant", f"init_from={source.path}", f"runs_dir={tmp_path}")
    assert record["status"] == "done"
    first, second = _params(folder), {name: leaf for name, leaf in checkpoint.leaves(folder.checkpoints, "opt_state/").items() if "delta" in name}
    for name, expected in _params(source).items():
        low = [leaf for path, leaf in second.items() if path == f"delta/{name}"]
        assert len(low) == (precision == "collage_light")
        found = first[name].astype(np.float64) + sum(leaf.astype(np.float64) for leaf in low)
        ulp = np.maximum(np.abs(expected), 2.0**-126) * 2.0**-7
        np.testing.assert_array_less(np.abs(found - expected), ulp * (2.0**-8 if low else 1.0) + 1e-30)


@pytest.mark.slow
def test_a_fine_tuned_run_resumes_like_any_other(tmp_path, source):
    """Stopped within its ramp (what came after the checkpoint is gone) and started again: the bits of a run that was never stopped."""
    overrides = (*FINE, "steps=5", "checkpoint.every_steps=2", "steps_per_dispatch=2", f"init_from={source.path}")
    whole, _ = _train(*overrides, f"runs_dir={tmp_path / 'whole'}")
    stopped = RunFolder(tmp_path / "stopped" / "adhoc" / whole.path.name)
    shutil.copytree(whole.path, stopped.path)
    (stopped.path / "record.json").unlink()
    for step in checkpoint.steps(stopped.checkpoints):
        if step > 2:
            shutil.rmtree(stopped.checkpoints / str(step))
    assert checkpoint.steps(stopped.checkpoints) == [2]
    again, record = _train(*overrides, f"runs_dir={tmp_path / 'stopped'}")
    assert again.path == stopped.path and record["status"] == "done"
    assert _without_launch(again) == _without_launch(whole)
    assert np.any(_params(whole)["embedding"] != _params(source)["embedding"])


# --- what sources are held as -----------------------------------------------------------------------------------------------------------------

MODEL = decoder.ModelConfig(num_layers=2, d_model=8, num_heads=2, d_ff=12, vocab_size=11)
HELD = {
    "float16": ("precision.master_weights=float16",), "plain bfloat16": ("precision.master_weights=bfloat16", "precision.scaled_state=false"),
    "collage_light": ("precision.optimizer_arithmetic=collage_light",), "kahan": ("precision.optimizer_arithmetic=kahan", "precision.storage=emulated"),
}  # fmt: skip


def _state(params, *overrides):
    """A state with these parameters, as a checkpoint of such a run has it."""
    which = trainer.policy("float32", *overrides)
    numbers = OptimizerNumbers(*(np.float32(x) for x in (1e-3, 0.9, 0.95, 1e-8, 0.0, 1.0)))
    optimizer = stored.optimizer("adamw", numbers, 1e-3, True, which, np.zeros(2, np.uint32)) if overrides[0].startswith("precision.opt") else None
    begun = stored.initial(params, which, np.zeros(2, np.uint32))
    return {"params": stored.held_params(begun, which), "opt_state": () if optimizer is None else optimizer.init(begun)}


@pytest.mark.parametrize("name", HELD)
def test_parameters_are_read_whatever_they_are_held_as(tmp_path, name):
    """Scaled pairs, with an exponent for each layer, are data * 2**exponent; a second word is added. The layers differ by 2**40 in size."""
    rng = np.random.default_rng(5)
    params = jax.tree.map(lambda x: jnp.asarray(rng.uniform(0.5, 1.0, x.shape), jnp.float32), decoder.blueprint(MODEL)[1])
    params["layers"]["down"] = params["layers"]["down"] * jnp.float32([1.0, 2.0**-40])[:, None, None]
    checkpoint.save(tmp_path / "checkpoints", 1, _state(params, *HELD[name]))
    digits = {"float16": 11, "plain bfloat16": 8}.get(name, 16)
    found, expected = given_params(MODEL, str(tmp_path)), decoder.by_path(params)
    assert found.keys() == expected.keys()
    for path, leaf in found.items():
        assert leaf.dtype == np.float32
        np.testing.assert_allclose(leaf, expected[path], rtol=2.0**-digits)
    assert digits == 16 or any(np.max(np.abs(leaf / expected[path] - 1)) > 2.0 ** -(digits + 2) for path, leaf in found.items())


def test_codes_are_refused_for_what_they_are(tmp_path):
    params = jax.tree.map(lambda x: jnp.ones(x.shape, jnp.float32), decoder.blueprint(MODEL)[1])
    checkpoint.save(tmp_path / "checkpoints", 1, _state(params, "precision.master_weights=float8_e4m3fn"))
    with pytest.raises(ValueError, match="holds embedding as codes and scales") as found:
        given_params(MODEL, str(tmp_path))
    assert "\n" not in str(found.value) and "storage=emulated" in str(found.value)


# --- identity -------------------------------------------------------------------------------------------------------------------------------


def _id(*overrides):
    return run_id(trainer.config(*BASE, *FINE, "steps=5", *overrides), "data")


def _copy(source, to, **changes) -> Path:
    """The source's folder elsewhere, with other values in its record."""
    shutil.copytree(source.path, to)
    (to / "record.json").write_text(json.dumps(source.record() | changes))
    return to


def test_identity_is_that_of_the_source_run_and_not_its_path(tmp_path, source):
    """The same run elsewhere, under another folder name, by another way of writing its path: the same identity. Another run, also in a folder
    of the same name, or none: another one."""
    copy, renamed = _copy(source, tmp_path / "moved" / source.path.name), _copy(source, tmp_path / "renamed")
    other = _copy(source, tmp_path / "other" / source.path.name, run_id="0123456789abcdef")
    mine = _id(f"init_from={source.path}")
    assert mine == _id(f"init_from={copy}") == _id(f"init_from={copy}/") == _id(f"init_from={renamed}")
    assert len({mine, _id(f"init_from={other}"), _id()}) == 3
    identity = json.dumps(trainer.config(*BASE, *FINE, "steps=5", f"init_from={renamed}").identity())
    assert source.record()["run_id"] in identity and "renamed" not in identity and str(source.path.parent) not in identity


def test_identity_does_not_depend_on_the_working_directory(source, monkeypatch):
    """`init_from=.` inside of the source's folder is the source."""
    mine = _id(f"init_from={source.path}")
    monkeypatch.chdir(source.path)
    assert _id("init_from=.") == mine


# --- what is refused ------------------------------------------------------------------------------------------------------------------------


def _error(tmp_path, *overrides) -> str:
    """The one line of a run that cannot begin: at configuration, or when its parameters are read."""
    try:
        folder, record = _train("steps=5", f"runs_dir={tmp_path / 'runs'}", *overrides)
    except ValueError as error:
        assert "\n" not in str(error)
        return str(error)
    assert record["status"] == "failed"
    return (folder.path / "error.txt").read_text().strip().splitlines()[-1]


def test_a_missing_source_is_refused(tmp_path):
    for path in (tmp_path / "nowhere", tmp_path):
        assert f"init_from={path} has no checkpoints; accepted: the folder of a run" in _error(tmp_path, *FINE, f"init_from={path}")


@pytest.mark.parametrize("status", ["failed", "diverged"])
def test_a_source_that_did_not_end_well_is_refused(tmp_path, source, status):
    folder = _copy(source, tmp_path / "source", status=status)
    assert f"init_from={folder} has status={status}" in _error(tmp_path, *FINE, f"init_from={folder}")
    (folder / "record.json").write_text("{")
    assert f"init_from={folder} has a record.json that is no record" in _error(tmp_path, *FINE, f"init_from={folder}")


def test_a_damaged_source_is_refused(tmp_path, source):
    """Every checkpoint of it is damaged."""
    copy = tmp_path / source.path.name
    shutil.copytree(source.path, copy)
    for path in (copy / "checkpoints").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:-1])
    assert f"init_from={copy} has no whole checkpoint" in _error(tmp_path, *FINE, f"init_from={copy}")


@pytest.mark.parametrize("overrides, words", [
    (["model.d_ff=14"], ["layers/down float32[1, 12, 8]", "float32[1, 14, 8]"]),
    (["model.d_ff=14", "model.num_layers=2"], ["layers/", "float32[2, "]),
])
def test_a_source_of_another_shape_is_refused(tmp_path, source, overrides, words):
    line = _error(tmp_path, *FINE, *overrides, f"init_from={source.path}")
    assert all(word in line for word in [f"init_from={source.path} has", "accepted: a run of the same model", *words]), line
