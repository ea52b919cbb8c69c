"""From overrides to frozen configs: presets, overrides, identity, sweeps. (What is refused, and how: tests/test_bitlaw.py.)"""
from __future__ import annotations

import dataclasses
import re
import subprocess
import sys

import pytest
from hydra import compose
from omegaconf import OmegaConf

import formats
import trainer
from trainer.cli import sweep_configs
from trainer.sweep.options import LaunchOptions
from trainer.config import Composer, config_dir, hydra_ready, run_id, trunk_id
from trainer.config.policies import build_format

BASE = ("model=25k", "data=synthetic", "steps=100")
DIGEST = "0" * 64


def test_model_names_are_non_embedding_parameters():
    """Every size has, to 15 %, the number of non-embedding parameters that its name says, and no two are alike."""
    units = {"": 1, "k": 1e3, "m": 1e6}
    found = {}
    names = [path.stem for path in (config_dir() / "model").glob("*.yaml")]
    for name, config in zip(names, _configs([[f"model={name}"] for name in names])):
        model = config.model
        per_layer = 4 * model.d_model**2 + 3 * model.d_model * model.d_ff + 2 * model.d_model
        found[name] = model.num_layers * per_layer + model.d_model
        number, unit = re.fullmatch(r"(\d+)([km]?)", name).groups()
        assert found[name] == pytest.approx(int(number) * units[unit], rel=0.15), name
    assert {"2k", "25k", "1m", "100m"} <= found.keys() and len(set(found.values())) == len(found)


# Preset and overrides -> (format, bits, granularity) of weights, activations and output gradients in their first product.
ROLES = {
    ("float32",): (None, None, None),
    ("bfloat16",): (None, None, None),
    ("int",): (("integer", 8, "channel"), ("integer", 8, "token"), None),
    ("int3",): (("integer", 3, "channel"), ("integer", 3, "token"), None),
    ("int", "precision.bits=5"): (("integer", 5, "channel"), ("integer", 5, "token"), None),
    ("int4", "precision.weights.bits=5"): (("integer", 5, "channel"), ("integer", 4, "token"), None),
    ("fp8",): (("minifloat", None, "tensor"), ("minifloat", None, "tensor"), ("minifloat", None, "tensor")),
    ("mxfp4",): (("mxfp4", None, None), ("mxfp4", None, None), ("mxfp4", None, None)),
    ("mxfp4", "precision.activations.format=mxfp8_e4m3"): (("mxfp4", None, None), ("mxfp8_e4m3", None, None), ("mxfp4", None, None)),
    ("float32", "precision.weights.format=int6"): (("int6", None, None), None, None),
}


@pytest.mark.parametrize("overrides", ROLES, ids=" ".join)
def test_presets_and_overrides(overrides):
    precision = trainer.config(*BASE, f"precision={overrides[0]}", *overrides[1:]).precision
    roles = (precision.weights, precision.activations, precision.output_gradients)
    found = tuple(None if role.first is None else (role.first.format, role.first.bits, role.first.granularity) for role in roles)
    assert found == ROLES[overrides]
    assert precision.dot_dtype == ("bfloat16" if overrides[0] == "bfloat16" else "float32")


def _sources(*overrides):
    precision = trainer.config(*BASE, *overrides).precision
    return [None if q is None else q.source for role in (precision.weights, precision.activations, precision.output_gradients) for q in role.both], precision


def test_one_key_changes_the_source_and_nothing_else():
    """precision.source is that of every quantizer without one of its own; format, rounding and granularity stay."""
    _, before = _sources("precision=fp8")
    for source in ("current", "delayed", "static"):
        found, after = _sources("precision=fp8", f"precision.source={source}")
        assert found == [source] * 6
        assert dataclasses.replace(after.weights.first, source="current") == before.weights.first
        assert (after.history, after.history_choice) == ((1024, "max") if source == "delayed" else (None, None))
    found, precision = _sources("precision=nvfp4", "precision.source=delayed", "precision.weights.source=static", "precision.weights.static_rms=0.5",
                                "precision.output_gradients.wgrad.source=current", "precision.history=7", "precision.history_choice=most_recent")  # fmt: skip
    assert found == ["static", "static", "delayed", "delayed", "delayed", "current"]
    assert (precision.weights.second.static_rms, precision.history, precision.history_choice) == (0.5, 7, "most_recent")
    assert _sources("precision=fp8", "precision.source=none")[1].weights.first.granularity is None


def test_one_key_changes_the_granularity():
    """precision.granularity takes the place of every role's own."""
    policy = trainer.policy("int4", "precision.granularity=tensor")
    assert policy.weights.first.format.granularity is policy.activations.first.format.granularity is formats.Granularity.TENSOR
    block = trainer.policy("fp8", "precision.granularity=block").output_gradients.first.format
    assert (block.block, block.two_level, block.scale_element) == (32, False, None)
    block = trainer.policy("fp8", "precision.granularity=block", "precision.block=16", "precision.two_level=true", "precision.source=delayed")
    assert (block.weights.first.format.block, block.weights.first.format.two_level, block.weights.first.source) == (16, True, "delayed")
    assert float(block.weights.first.format.scale_element.max_value) == 448


REFUSED = {
    ("fp8", "source=guessed"): ["precision.source=guessed", "accepted: current", "delayed", "static", "none"],
    ("mxfp8", "source=delayed"): ["precision.source=delayed", "mxfp8", "no scale of the whole tensor", "source=current"],
    ("mxfp8", "source=none"): ["precision.source=none", "mxfp8", "accepted: current"],
    ("nvfp4", "source=none"): ["precision.source=none", "accepted: current, delayed, static"],
    ("int4", "source=static"): ["precision.source=static", "granularity=channel", "granularity=tensor"],
    ("int4", "source=current", "activations.source=delayed"): ["precision.activations.source=delayed", "granularity=token", "granularity=tensor"],
    ("fp8", "source=delayed", "granularity=block"): ["precision.source=delayed", "two_level=true"],
    ("float32", "source=delayed"): ["precision.source=delayed", "precision=float32"],
    ("mxfp8", "granularity=tensor"): ["precision.granularity=tensor", "precision=mxfp8"],
    ("fp8", "block=16"): ["precision.block=16", "precision.granularity=block"],
    ("fp8", "weights.static_rms=0.1"): ["precision.weights.static_rms=0.1", "source is current", "source=static"],
    ("fp8", "source=static", "weights.static_rms=0"): ["precision.weights.static_rms=0", "2**-100"],
    ("fp8", "source=delayed", "history=0"): ["precision.history=0", "1 to "],
    ("fp8", "source=delayed", "history_choice=mean"): ["precision.history_choice=mean", "max, most_recent"],
}  # fmt: skip


@pytest.mark.parametrize("overrides", REFUSED, ids=" ".join)
def test_sources_are_refused_in_one_line(overrides):
    with pytest.raises(ValueError) as caught:
        trainer.config(*BASE, f"precision={overrides[0]}", *(f"precision.{own}" for own in overrides[1:]))
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in REFUSED[overrides])


def test_one_gemm_can_differ():
    """A key of one product is overlaid on the role's; a format of its own starts from nothing."""
    precision = trainer.config(*BASE, "precision=int4", "precision.weights.dgrad.bits=8", "precision.activations.wgrad.format=float8_e5m2",
                               "precision.output_gradients.wgrad.format=int8").precision  # fmt: skip
    assert (precision.weights.first.bits, precision.weights.second.bits) == (4, 8)
    assert precision.weights.second == dataclasses.replace(precision.weights.first, bits=8)
    assert precision.activations.first.bits == 4 and precision.activations.second.format == "float8_e5m2"
    assert precision.activations.second.bits is precision.activations.second.granularity is None
    assert precision.output_gradients.first is None and precision.output_gradients.second.format == "int8"


def test_formats_of_presets():
    """What the presets' formats are, in numbers: largest value of element and where scales lie."""
    fp8 = trainer.config(*BASE, "precision=fp8").precision
    assert (float(build_format(fp8.weights.first).element.max_value), float(build_format(fp8.output_gradients.first).element.max_value)) == (448, 57344)
    mx = {name: build_format(trainer.config(*BASE, f"precision={name}").precision.weights.first) for name in ("mxfp4", "mxfp6", "mxfp8")}
    assert {name: (float(f.element.max_value), f.block) for name, f in mx.items()} == {"mxfp4": (6, 32), "mxfp6": (7.5, 32), "mxfp8": (448, 32)}
    assert isinstance(build_format(trainer.config(*BASE, "precision.weights.format=int4", "precision.weights.source=none").precision.weights.first), formats.Element)


@pytest.mark.parametrize("length, steps", [("steps=7", 7), ("tokens=8000", 125), ("tokens=8031", 125), ("tokens=1", 1), ("tokens_per_param=10", 266)])
def test_length_in_steps_tokens_or_tokens_per_parameter(length, steps):
    """64 tokens a step; `2k` has 2 layers, d 8, f 24: 2 * (4 * 64 + 3 * 192 + 16) + 8 = 1704 parameters, and 1704 * 10 / 64 = 266.25."""
    config = trainer.config("model=2k", "data=synthetic", "batch_size=4", "seq_len=16", length)
    assert config.steps == steps and config.tokens == steps * 64


def test_warm_up_gives_way_in_a_short_run():
    schedule = trainer.config(*BASE, "steps=50", "schedule.warmup_steps=45", "schedule.cooldown_fraction=0.2").schedule
    assert (schedule.warmup_steps, schedule.cooldown_steps) == (40, 10)


# --- identity ---------------------------------------------------------------------------------------------------------

SAME = ["runs_dir=elsewhere", "sweep=other", "log_every=3", "telemetry_every=7", "steps_per_dispatch=2", "host_devices=1", "sharding=fsdp", "checkpoint.every_steps=5", "eval.every_steps=5",
        "logger=wandb", "model.name=mine", "batch_size=16", "data.tokens=5000"]  # fmt: skip
OTHER = ["seed=1", "steps=101", "optimizer.lr=0.01", "precision.bits=5", "precision.weights.bits=5", "model.d_ff=44", "model.remat=true", "batch_size=8",
         "accumulate=2", "seq_len=64", "schedule=cosine", "schedule.final_factor=0.1", "eval.sequences=8", "divergence_margin=3"]  # fmt: skip


def _configs(overrides):
    """A config for each list of overrides, composed in one go."""
    with hydra_ready():
        composer = Composer()
        return [composer.freeze([*BASE, *own]) for own in overrides]


def test_identity_is_what_numbers_depend_on():
    """Where and how a run is carried out, and what presets are called, is not in its id; everything else is, each with its own. Of
    the data the id holds the content's hash, and not how it was asked for."""
    int4 = ["precision=int", "precision.bits=4"]
    mine, named, *rest = [run_id(c, DIGEST) for c in _configs([int4, ["precision=int4"], *([*int4, own] for own in SAME + OTHER)])]
    assert {named, *rest[: len(SAME)]} == {mine}
    assert len({mine, *rest[len(SAME) :]}) == 1 + len(OTHER)
    config = trainer.config(*BASE)
    assert run_id(config, DIGEST) != run_id(config, "1" * 64)


def test_sources_are_part_of_the_identity_and_unset_ones_are_not():
    """Runs of before keep their id: keys that came later count where they say something."""
    for own in ([], ["precision=fp8"], ["precision=int4"]):
        assert not {"static_rms", "two_level", "history"} & set(re.findall(r"\w+", str(trainer.config(*BASE, *own).identity())))
    delayed = ["precision=fp8", "precision.source=delayed"]
    static = ["precision=fp8", "precision.source=static"]
    ids = [run_id(c, DIGEST) for c in _configs([["precision=fp8"], delayed, [*delayed, "precision.history=8"], [*delayed, "precision.history_choice=most_recent"],
                                                static, [*static, "precision.weights.static_rms=0.1"]])]  # fmt: skip
    assert len(set(ids)) == len(ids)
    same = [run_id(c, DIGEST) for c in _configs([["precision=fp8", "precision.source=current"], ["precision=fp8", "precision.history=8"], [*delayed, "precision.history=1024"]])]
    assert same == [ids[0], ids[0], ids[1]]


def test_trunks():
    """WSD runs that differ in length or cool-down share a trunk; those that differ in anything else, and other schedules, do not."""
    same = [["steps=300"], ["schedule.cooldown_fraction=0.4"], ["schedule.final_factor=0.1"]]
    other = [["seed=1"], ["optimizer.lr=0.01"], ["schedule.warmup_steps=3"], ["batch_size=8"], ["precision=int4"], ["schedule=cosine"],
             ["schedule=cosine", "steps=300"]]  # fmt: skip
    mine, *rest = [trunk_id(c, DIGEST) for c in _configs([[], *same, *other])]
    assert set(rest[: len(same)]) == {mine} and len({mine, *rest[len(same) :]}) == 1 + len(other)


# --- composition ------------------------------------------------------------------------------------------------------

OVERRIDES = [
    ["steps=5"],
    ["model=6k", "precision=int", "precision.bits=3", "steps=5", "optimizer.lr=1e-3"],
    ["precision=mxfp4", "precision.weights.rounding=stochastic", "steps=5", "optimizer.clip_norm=null", "plugins=[os,sys]"],
    ["data=file", "data.paths=[a b.txt,'c,d']", "tokens=1e6", "eval.every_steps=10", "runs_dir='0012'"],
]


@pytest.mark.parametrize("overrides", OVERRIDES)
def test_composing_once_equals_hydra(overrides):
    """Plain values set in a copy give what Hydra composes from all overrides, also when the composer has composed others before."""
    with hydra_ready():
        composer = Composer()
        for others in OVERRIDES:
            composer.config(others)
        found = composer.config(overrides)
        assert OmegaConf.to_container(found, resolve=True) == OmegaConf.to_container(compose("train", overrides=overrides), resolve=True)


def test_config_dir_adds_groups(tmp_path):
    """A folder laid out like configs/ adds choices to groups and sweeps by name; the built-in ones stay."""
    (tmp_path / "precision").mkdir()
    (tmp_path / "precision" / "mine.yaml").write_text("defaults: [int, _self_]\nname: mine\nbits: 7\n")
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "both.yaml").write_text("runs:\n  - precision=mine,int4 model=2k steps=3\n")
    config = trainer.config(*BASE, "precision=mine", config_dir=str(tmp_path))
    assert (config.precision.name, config.precision.weights.first.bits, config.model.name) == ("mine", 7, "25k")
    configs, _ = sweep_configs(["sweep=both"], str(tmp_path))
    assert [c.precision.name for c in configs] == ["mine", "int4"]


# --- sweeps -----------------------------------------------------------------------------------------------------------


def test_swept_keys_multiply():
    configs, launch = sweep_configs([*BASE, "seed=range(3)", "precision=int", "precision.bits=3,4", "optimizer.lr=choice(0.1,0.2)", "dry_run=true"])
    found = [(c.seed, c.precision.weights.first.bits, c.optimizer.lr) for c in configs]
    assert found == [(s, b, lr) for s in range(3) for b in (3, 4) for lr in (0.1, 0.2)]
    assert {c.options.sweep for c in configs} == {"adhoc"} and launch == LaunchOptions(dry_run=True)


def test_lines_of_a_sweep_are_added(tmp_path):
    """A sweep is the union of its lines; a key on the command line replaces that key in every line."""
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "two.yaml").write_text("runs:\n  - model=2k steps=3 seed=0,1\n  - model=6k steps=3,6 seed=7\n")
    configs, _ = sweep_configs(["sweep=two"], str(tmp_path))
    assert [(c.model.name, c.steps, c.seed) for c in configs] == [("2k", 3, 0), ("2k", 3, 1), ("6k", 3, 7), ("6k", 6, 7)]
    configs, _ = sweep_configs(["sweep=two", "steps=9", "seed=5,6", "batch_size=8"], str(tmp_path))
    assert [(c.model.name, c.steps, c.seed, c.batch_size) for c in configs] == [(m, 9, s, 8) for m in ("2k", "6k") for s in (5, 6)]
    assert {c.options.sweep for c in configs} == {"two"}


def test_the_demo_identifies_its_law():
    """What the demo must hold: 4 sizes of 2k to 25k, 3 budgets each as branches of one trunk, 4 precisions, all on real text."""
    configs, _ = sweep_configs(["sweep=demo"])
    per_size: dict = {}
    for c in configs:
        if c.seed == 0:
            per_size.setdefault(c.model.name, set()).add((c.precision.weights.first.bits, c.steps))
        assert c.data.name == "stdlib" and c.schedule.name == "wsd" and c.precision.weights.first.bits == c.precision.activations.first.bits
    assert per_size.keys() >= {"2k", "6k", "14k", "25k"}
    for name, designs in per_size.items():
        bits, steps = {b for b, _ in designs}, {s for _, s in designs}
        assert bits >= {3, 4, 6, 32} and len(steps) >= 3 and len(designs) == len(bits) * len(steps), name
    assert len({trunk_id(c, DIGEST) for c in configs}) * 3 == len(configs)


def test_composing_starts_no_backend():
    """JAX keeps the devices that it starts with: no preset may start it before the run says how many it wants."""
    script = """
from jax._src import xla_bridge
from trainer.config import Composer, hydra_ready
from trainer.config.compose import config_dir
with hydra_ready() as extra:
    composer = Composer(extra)
    for path in sorted((config_dir() / "precision").glob("*.yaml")):
        if path.stem != "schema":
            composer.freeze([f"precision={path.stem}", "steps=2000", "precision.pad=true"])
            assert not xla_bridge.backends_are_initialized(), path.stem
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=config_dir().parent)
