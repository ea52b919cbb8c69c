"""What a precision cannot be is refused in one line that names the key, its value and what is accepted."""
from __future__ import annotations

import re

import pytest

from trainer.config import Composer, hydra_ready

BASE = ("model=25k", "data=synthetic", "steps=100")  # d_model 32, d_ff 88

# Name -> (overrides, what the one line names: key and value, the reason, what is accepted).
REFUSED = {
    "transform of one operand": (
        ["mxfp4", "precision.weights.forward.format=mxfp4", "precision.weights.forward.transform=hadamard"],
        "precision=mxfp4", "in forward activations have no transform and weights have hadamard in blocks of 32", "the same transform",
    ),
    "another block in wgrad": (
        ["mxfp4", "precision.activations.wgrad.format=mxfp4", "precision.activations.wgrad.transform=hadamard",
         "precision.activations.wgrad.transform_block=16"],
        "precision=mxfp4", "in wgrad activations have hadamard in blocks of 16 and output_gradients have no", "the same transform",
    ),
    "block larger than the dimension": (
        ["fp8_tiles"],
        "precision.weights.block=128", "larger than model.d_model = 32", "precision.pad=true",
    ),
    "pad=false": (
        ["mxfp4", "precision.pad=false"],
        "precision.weights.block=32", "does not divide model.d_ff = 88 and precision.pad=false", "a divisor",
    ),
    "rotation with pad=false": (
        ["quartet", "precision.pad=false"],
        "precision.weights.block=32", "does not divide model.d_ff = 88", "a divisor",
    ),
    "chained without format": (
        ["float32", "precision.weights.second=chained"],
        "precision.weights.second=chained", "no format in forward", "both products",
    ),
    "chained without a second format": (
        ["int8", "precision.activations.second=chained", "precision.activations.wgrad.format=float32"],
        "precision.activations.second=chained", "no format in wgrad", "both products",
    ),
    "gradient of output gradients": (
        ["quartet", "precision.output_gradients.gradient=clipped"],
        "precision.output_gradients.gradient=clipped", "nothing is differentiated", "straight_through",
    ),
    "trust with a minifloat": (
        ["fp8", "precision.activations.gradient=trust"],
        "precision.activations", "gradient='trust' needs", "clipped",
    ),
    "unknown place": (
        ["fp8", "precision.exemptions={nowhere: high}"],
        "precision.exemptions.nowhere", "'nowhere' is no place", "first1, last2, layer0",
    ),
    "unknown site": (
        ["fp8", "precision.exemptions={last1.nowhere: high}"],
        "precision.exemptions.last1.nowhere", "no place", "qkv, attention_out, gate_up, down",
    ),
    "no such layer": (
        ["fp8", "precision.exemptions={layer9: high}"],
        "precision.exemptions.layer9", "names no layer", "layer0 to layer1",
    ),
    "unknown precision": (
        ["fp8", "precision.exemptions={last1: nosuch}"],
        "precision.exemptions.last1=nosuch", "no such precision", "high",
    ),
    "delayed exemption": (
        ["fp8", "precision.exemptions={last1: fp8_delayed}"],
        "precision.exemptions.last1=fp8_delayed", "delayed", "current scales",
    ),
    "exemption with exemptions": (
        ["fp8", "precision.exemptions={last1: nvfp4_recipe}"],
        "precision.exemptions.last1=nvfp4_recipe", "has exemptions", "high",
    ),
    "rotated embedding": (
        ["fp8", "precision.exemptions={embedding: quartet}"],
        "precision.exemptions.embedding=quartet", "an embedding has one", "no transform",
    ),
    "native blocks": (
        ["mxfp4", "precision.execution=native"],
        "precision.execution=native", "forward multiplies weights", "execution=emulated",
    ),
    "native with one operand": (
        ["int8", "precision.execution=native"],
        "precision.execution=native", "output_gradients in float32", "execution=emulated",
    ),
    "native rows shared": (
        ["fp8_rowwise", "precision.execution=native", "precision.weights.second=shared"],
        "precision.execution=native", "dgrad multiplies weights", "second=fresh",
    ),
    "delayed transform": (
        ["fp8_delayed", "precision.weights.transform=hadamard", "precision.activations.transform=hadamard"],
        "precision.weights", "source='delayed' with a transform", "current",
    ),
    "least error over devices": (
        ["int", "precision.activations.granularity=tensor", "precision.activations.amax=mse"],
        "precision.activations.amax=mse", "may be split over devices", "rms",
    ),
    "percentile over devices": (
        ["int8_tensor", "precision.output_gradients.amax=percentile"],
        "precision.output_gradients.amax=percentile", "may be split over devices", "granularity=token",
    ),
    "percentile of ranges": (
        ["int8_fake_quant", "precision.activations.source=current", "precision.activations.amax=percentile"],
        "precision.activations.amax=percentile", "may be split over devices", "rms",
    ),
    "least error of tokens read afresh": (
        ["int_rowwise", "precision.activations.amax=mse"],
        "precision.activations.amax=mse", "may be split over devices", "second=shared",
    ),
    "least error of attention": (
        ["kv", "precision.kv.granularity=tensor", "precision.kv.amax=mse"],
        "precision.kv.amax=mse", "may be split over devices", "rms",
    ),
    "nine bits in bfloat16": (
        ["quest", "precision.bits=9", "precision.dot_dtype=bfloat16"],
        "precision.dot_dtype=bfloat16", "would round weights again", "float32",
    ),
    "levels of nf4 in bfloat16": (
        ["float32", "precision.weights.format=nf4", "precision.dot_dtype=bfloat16"],
        "precision.dot_dtype=bfloat16", "would round weights again", "float32",
    ),
    "logarithms in bfloat16": (
        ["float32", "precision.weights.format=lns8", "precision.dot_dtype=bfloat16"],
        "precision.dot_dtype=bfloat16", "would round weights again", "float32",
    ),
    "block of keys and values": (
        ["float32", "precision.kv.format=mxfp4"],
        "precision.kv.block=32", "larger than the head width (model.d_model / model.num_heads) = 8", "precision.pad=true",
    ),
    "block of scores": (
        ["float32", "precision.scores.format=mxfp8_e4m3", "seq_len=16"],
        "precision.scores.block=32", "larger than seq_len = 16", "precision.pad=true",
    ),
    "block of probabilities with pad=false": (
        ["float32", "precision.probabilities.format=mxfp8_e4m3", "seq_len=48", "precision.pad=false"],
        "precision.probabilities.block=32", "does not divide seq_len = 48", "a divisor",
    ),
    "block of an exempt place's attention": (
        ["float32", "precision.exemptions={last1.attention: mxkv}"],
        "precision.exemptions.last1.attention=mxkv: kv.block=32", "larger than the head width", "precision.pad=true",
    ),
    "bits of luq": (
        ["luq", "precision.bits=8"],
        "precision.bits=8", "nothing in precision=luq has a width that it sets", "precision.weights.bits",
    ),
    "bits of bitnet": (
        ["bitnet", "precision.bits=4"],
        "precision.bits=4", "nothing in precision=bitnet has a width that it sets", "precision.weights.bits",
    ),
    "bits that roles override": (
        ["int", "precision.bits=6", "precision.weights.bits=3", "precision.activations.bits=4"],
        "precision.bits=6", "nothing in precision=int has a width that it sets", "precision.weights.bits",
    ),
    "plain float32 state": (
        ["float32", "precision.scaled_state=false"],
        "precision.scaled_state=false", "no part of the state is held in float16 or bfloat16", "precision.master_weights",
    ),
    "FP8 state without scales": (
        ["fp8_state", "precision.scaled_state=false"],
        "precision.scaled_state=false", "no part of the state is held in float16 or bfloat16", "precision.master_weights",
    ),
    "float32 state emulated": (
        ["fp8", "precision.storage=emulated"],
        "precision.storage=emulated", "all of the state is float32 already", "precision.master_weights=bfloat16",
    ),
    "block of a Hadamard": (
        ["quartet", "precision.weights.transform_block=24"],
        "precision.weights", "transform_block=24 with transform=hadamard", "2, 4, 8, 16",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def composer(tmp_path_factory):
    """One for all: a quarter of the time. With a folder of the user's that has one precision more."""
    folder = tmp_path_factory.mktemp("configs")
    (folder / "precision").mkdir()
    (folder / "precision" / "mxkv.yaml").write_text("defaults: [schema]\nname: mxkv\nkv: {format: mxfp4}\n")
    with hydra_ready(str(folder)) as extra:
        yield Composer(extra)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, composer):
    (preset, *overrides), key, reason, accepted = REFUSED[name]
    with pytest.raises(ValueError) as found:
        composer.freeze([*BASE, f"precision={preset}", *overrides])
    said = str(found.value)
    assert "\n" not in said and said.startswith(key) and reason in said
    assert accepted in re.split("accepted[^:;]*: ", said, maxsplit=1)[1]


def test_accepted(composer):
    """The counterparts: what differs from a refusal by one key passes."""
    for overrides in (["mxfp4", "precision.pad=false", "model.d_ff=96"], ["fp8_tiles", "precision.pad=true"],
                      ["fp8_rowwise", "precision.execution=native"],
                      ["int", "precision.activations.amax=mse"], ["int", "precision.weights.granularity=tensor", "precision.weights.amax=mse"],
                      ["nvfp4", "precision.activations.format=float4_e2m1fn", "precision.activations.granularity=block", "precision.activations.block=16",
                       "precision.activations.two_level=true", "precision.activations.amax=mse"],
                      ["quest", "precision.dot_dtype=bfloat16"], ["quest", "precision.bits=8", "precision.dot_dtype=bfloat16"],
                      ["bitnet", "precision.dot_dtype=bfloat16"], ["int", "precision.bits=1", "precision.dot_dtype=bfloat16"],
                      ["float32", "precision.kv.format=mxfp4", "precision.pad=true"], ["float32", "precision.scores.format=mxfp4", "seq_len=32"],
                      ["int", "precision.weights.bits=3", "precision.activations.bits=4"], ["bitnet", "precision.bits=8"], ["quest", "precision.bits=3"],
                      ["bf16_stochastic", "precision.scaled_state=false"], ["collage_light", "precision.storage=emulated"],
                      ["adam8bit", "precision.storage=emulated"],
                      ["fp8", "precision.exemptions={last1.down: high, embedding: int8}"]):  # fmt: skip
        composer.freeze([*BASE, f"precision={overrides[0]}", *overrides[1:]])


def test_pad_reaches_exemptions(composer):
    """precision.pad says what becomes of dimensions that blocks do not divide, wherever the blocks are."""
    composer.freeze([*BASE, "precision=int8", "precision.pad=true", "precision.exemptions={last1: fp8_tiles}"])
    with pytest.raises(ValueError, match=r"does not divide model\.d_ff = 88"):
        composer.freeze([*BASE, "precision=int8", "precision.pad=false", "precision.exemptions={last1: mxfp4}"])
