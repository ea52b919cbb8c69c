"""Every preset composes, freezes and builds; names do not touch identities; what a precision cannot be is refused in one line."""
from __future__ import annotations

import re

import jax
import pytest

import trainer
from trainer import build
from trainer.config import Composer, hydra_ready, run_id
from trainer.config.compose import config_dir
from trainer.config.freeze import freeze

BASE = ("model=25k", "data=synthetic", "steps=2000", "precision.pad=true")
PRESETS = sorted(path.stem for path in (config_dir() / "precision").glob("*.yaml"))


@pytest.fixture(scope="module")
def composer():
    with hydra_ready() as extra:
        yield Composer(extra)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_composes_freezes_and_builds(name, composer):
    """Its own name only labels it: the same keys under another name are the same run, and the policy is the same tree."""
    config = composer.freeze([*BASE, f"precision={name}"])
    assert config.precision.name == name
    renamed = freeze(composer.config([*BASE, f"precision={name}", "precision.name=another"]))
    assert renamed.precision.name == "another" and run_id(renamed, "data") == run_id(config, "data")
    assert run_id(config, "data") == run_id(composer.freeze([*BASE, f"precision={name}"]), "data") != run_id(config, "other data")
    one, other = build.hyper(config).policy, build.hyper(renamed).policy
    assert jax.tree.structure(one) == jax.tree.structure(other) and jax.tree.leaves(one) == jax.tree.leaves(other)
    structure = build.step_structure(config, 256)
    assert structure.model.extra_norm == name.startswith("bitnet") and (structure.model.learned != ()) == (name == "lsq")


# Name -> (overrides, what the line names: key and value, and what is accepted).
REFUSED = {
    "rounding without a format": (["float32", "precision.master_rounding=stochastic"],
                                  "precision.master_rounding=stochastic", "master_weights=bfloat16"),
    "adam rounding without a format": (["float32", "precision.adam_rounding=stochastic"], "precision.adam_rounding=stochastic", "adam_m=bfloat16"),
    "unknown master": (["float32", "precision.master_weights=nosuch"], "precision.master_weights=nosuch", "bfloat16"),
    "unknown moment": (["float32", "precision.adam_v=nosuch"], "precision.adam_v=nosuch", "blockwise8"),
    "blockwise8 weights": (["float32", "precision.master_weights=blockwise8"], "precision.master_weights=blockwise8", "float8_e4m3fn"),
    "blocks of weights": (["float32", "precision.master_weights=mxfp8_e4m3"], "precision.master_weights=mxfp8_e4m3", "float8_e4m3fn"),
    "unknown rounding": (["bf16_stochastic", "precision.master_rounding=nosuch"], "precision.master_rounding=nosuch", "stochastic"),
    "rounding that blockwise8 lacks": (["adam8bit", "precision.adam_rounding=toward_zero"], "precision.adam_rounding=toward_zero", "nearest_even"),
    "unknown arithmetic": (["float32", "precision.optimizer_arithmetic=nosuch"], "precision.optimizer_arithmetic=nosuch", "collage_light"),
    "unknown storage": (["float32", "precision.storage=nosuch"], "precision.storage=nosuch", "emulated"),
    "arithmetic with moments": (["collage_light", "precision.adam_m=float8_e4m3fn"], "precision.adam_m=float8_e4m3fn",
                                "optimizer_arithmetic=collage_light", "null"),
    "kv under scale propagation": (["kv", "precision.data_dtype=float16"], "precision.kv=integer", "data_dtype=float16", "float32"),
    "kv with a transform": (["kv", "precision.kv.transform=hadamard"], "precision.kv", "no transform"),
    "kv delayed": (["kv", "precision.kv.granularity=tensor", "precision.kv.source=delayed"], "precision.kv", "source current or none"),
    "kv of trust": (["kv", "precision.kv.gradient=trust"], "precision.kv", "straight_through or clipped"),
    "ramp with a transform": (["quest", "precision.ramp_steps=10"], "precision.ramp_steps=10", "transform", "none of them"),
    "ramp in native products": (["int8_native", "precision.ramp_steps=10"], "precision.ramp_steps=10", "native", "none of them"),
    "stagger without ramp": (["bitnet", "precision.ramp_stagger=10"], "precision.ramp_stagger=10", "ramp_steps"),
    "unknown order": (["bitnet_finetune", "precision.ramp_order=sideways"], "precision.ramp_order=sideways", "output, input"),
    "zero point and clipped": (["int8_fake_quant", "precision.activations.gradient=clipped"], "precision.activations", "zero_point=True", "trust"),
    "learned channels": (["lsq", "precision.weights.granularity=channel"], "precision.weights.source=learned",
                         "granularity=channel", "granularity=tensor"),
    "learned gradients": (["lsq", "precision.output_gradients.format=integer", "precision.output_gradients.bits=8",
                           "precision.output_gradients.source=learned"],
                          "precision.output_gradients", "learned", "accepted"),
    "learned and read afresh": (["lsq", "precision.weights.second=fresh"], "precision.weights", "learned", "accepted"),
    "learned and ramped": (["lsq", "precision.ramp_steps=10"], "precision.ramp_steps=10", "accepted"),
    "no bits": (["int_rowwise", "precision.bits=0"], "precision.weights.bits=0", "1 to 16"),
    "17 bits": (["int_rowwise", "precision.bits=17"], "precision.weights.bits=17", "1 to 16"),
    "no bits of kv": (["kv", "precision.bits=0"], "precision.kv.bits=0", "1 to 16"),
    "32 bits of midrise": (["quest", "precision.bits=32"], "precision.weights.bits=32", "1 to 16"),
    "averages under scale propagation": (["int8_fake_quant", "precision.data_dtype=float16"], "source=ema", "data_dtype=float16", "current"),
    "learned under scale propagation": (["lsq", "precision.data_dtype=float16"], "source=learned", "data_dtype=float16", "current"),
    "decay of 1": (["int8_fake_quant", "precision.ema_decay=1"], "precision.ema_decay=1.0", "not including, 1"),
    # What an exemption would not do is not taken in silence.
    "exemption with norms": (["float32", "precision.exemptions={last1: bitnet}"], "precision.exemptions.last1=bitnet", "accepted"),
    "exemption with a ramp": (["float32", "precision.exemptions={last1: bitnet_finetune}"], "precision.exemptions.last1=bitnet_finetune", "accepted"),
    "ramp of kv": (["kv", "precision.ramp_steps=10"], "precision.ramp_steps=10", "accepted"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line(name, composer):
    """ValueError that names key, value and what is accepted."""
    (preset, *overrides), *words = REFUSED[name]
    with pytest.raises(ValueError) as caught:
        composer.freeze([*BASE[:3], f"precision={preset}", *overrides])
    line = str(caught.value)
    assert "\n" not in line and "accepted" in line and all(re.search(re.escape(word), line) for word in words), line


def test_a_policy_of_every_preset_can_be_asked_for():
    """From Python, for tensors of any size."""
    for name in ("quest", "int8_fake_quant", "bitnet", "kv"):
        assert isinstance(trainer.policy(name), trainer.PrecisionPolicy)
