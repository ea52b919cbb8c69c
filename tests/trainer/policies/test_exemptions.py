"""Places with a precision of their own: the last block kept high, one site alone, the head, the embedding."""
from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import trainer
from tests.trainer import numpy_quantizers as nq
from tests.trainer.policies.networks import policy
from trainer import describe
from trainer.model import SITES, Call, ModelConfig, blueprint, next_token_losses

LAYERS, VOCAB = 2, 19


@functools.cache
def _program(scan_layers: bool):
    config = ModelConfig(LAYERS, 16, 2, 24, VOCAB, tied_head=False, scan_layers=scan_layers)
    graphdef, _ = blueprint(config)
    return jax.jit(lambda params, tokens, which: jnp.mean(next_token_losses(graphdef, params, tokens, Call(which))))


@functools.cache
def _params():
    _, shapes = blueprint(ModelConfig(LAYERS, 16, 2, 24, VOCAB, tied_head=False))
    rng = np.random.default_rng(17)
    return jax.tree.map(lambda leaf: (rng.standard_normal(leaf.shape) * 0.3).astype(np.float32), shapes)


@functools.cache
def _plain_loss(*overrides, scan_layers=False) -> float:
    return _loss(*overrides, params=_params(), scan_layers=scan_layers)


def _loss(name, *overrides, params=None, scan_layers=False) -> float:
    if params is None:
        return _plain_loss(name, *overrides, scan_layers=scan_layers)
    tokens = np.random.default_rng(16).integers(0, VOCAB, (4, 9))
    which = policy(name, f"model.num_layers={LAYERS}", *overrides)
    return float(_program(scan_layers)(params, tokens, which))


@pytest.mark.parametrize("scan_layers", [pytest.param(False, marks=pytest.mark.slow), True], ids=["unrolled", "scanned"])
def test_last_block_kept_high(scan_layers):
    """The loss is that of float32 with the other blocks alone quantized, to the bit, and neither's without exemptions."""
    kept = _loss("int3", "precision.exemptions={last1: high}", scan_layers=scan_layers)
    assert kept == _loss("float32", "precision.exemptions={layer0: int3}", scan_layers=scan_layers)
    assert all(abs(kept - _loss(name)) > 1e-4 for name in ("int3", "float32"))


WEIGHTS_ONLY = ("precision.weights.format=integer", "precision.weights.bits=3", "precision.weights.granularity=channel")


def _with_quantized(**places):
    """The parameters with some of them as numpy's int3 per channel makes them: site -> layer."""
    params = {**_params(), "layers": dict(_params()["layers"])}
    for site, layer in places.items():
        stacked = np.array(params["layers"][site])
        stacked[layer] = nq.integer(3, "vector")(stacked[layer], 0)
        params["layers"][site] = jnp.asarray(stacked)
    return params


@pytest.mark.parametrize(("exemptions", "quantized", "scan_layers"), [
    ({"last1": "high", "attention_out": "high", "gate_up": "high", "down": "high"}, {"qkv": 0}, False),
    ({"first1": "high", "qkv": "high", "last1.gate_up": "high", "attention_out": "high"}, {"down": 1}, True),
    ({"layer0": "high"}, dict.fromkeys(SITES, 1), False),
], ids=["first1.qkv", "last1.down", "layer1"])  # fmt: skip
def test_a_place_alone(exemptions, quantized, scan_layers):
    """Only the weights that no exemption names are quantized: float32 with those weights quantized by numpy beforehand."""
    listed = ", ".join(f"{place}: {name}" for place, name in exemptions.items())
    found = _loss("float32", *WEIGHTS_ONLY, f"precision.exemptions={{{listed}}}", scan_layers=scan_layers)
    expected = _loss("float32", params=_with_quantized(**quantized), scan_layers=scan_layers)
    assert found == pytest.approx(expected, rel=1e-6)
    assert abs(found - _loss("float32", scan_layers=scan_layers)) > 3e-5


def test_first_qkv_as_the_only_place():
    """`first1.qkv: int3` is int3 with everything else high, activations included, to the bit."""
    alone = _loss("float32", "precision.exemptions={first1.qkv: int3}")
    assert alone == _loss("int3", "precision.exemptions={last1: high, attention_out: high, gate_up: high, down: high}")
    assert abs(alone - _loss("float32")) > 3e-5


def test_embedding_and_head():
    """Not quantized unless an exemption says so; then their rows, to the loss of a table that numpy quantized, and the head's product."""
    plain, blocks = _loss("float32"), _loss("int3")
    with_head, with_table = (_loss("float32", f"precision.exemptions={{{place}: int4}}") for place in ("head", "embedding"))
    rounded = {name: jnp.asarray(nq.integer(4, "vector")(np.asarray(_params()[name]), 1), jnp.float32) for name in ("embedding", "head")}
    assert with_table == pytest.approx(_loss("float32", params={**_params(), "embedding": rounded["embedding"]}), rel=1e-6)
    assert len({plain, blocks, with_head, with_table}) == 4
    assert min(abs(plain - with_head), abs(plain - with_table)) > 3e-5
    assert all(_loss("float32", f"precision.exemptions={{{place}: int8}}") != plain for place in ("head", "embedding"))
    # The head sees int4 rows of the table and int4 tokens: with only its weights rounded beforehand the loss is another.
    assert with_head != _loss("float32", params={**_params(), "head": rounded["head"]})


def test_later_exemptions_win():
    assert _loss("int3", "precision.exemptions={last2: high, layer0: int3}") == _loss("float32", "precision.exemptions={layer0: int3}")


@pytest.mark.slow
def test_attention_follows_the_place_of_its_block():
    """A place without a site is the block with its attention; "attention" alone leaves the linear layers as they are."""
    int3 = ("precision.kv.format=integer", "precision.kv.bits=3", "precision.kv.granularity=token")
    kept = _loss("float32", *int3, "precision.exemptions={last1: high}")
    assert kept == _loss("float32", *int3, "precision.exemptions={last1.attention: high}")
    everywhere, nowhere = _loss("float32", *int3), _loss("float32")
    assert len({kept, everywhere, nowhere}) == 3
    assert _loss("float32", *int3, "precision.exemptions={attention: high}") == nowhere
    first = _loss("float32", "precision.exemptions={layer0.attention: kv}")
    assert first not in (nowhere, everywhere) and first == _loss("kv", "precision.exemptions={layer1.attention: high}")


# --- names and columns ----------------------------------------------------------------------------------------------------------------------


def _folder(path, bits: int) -> str:
    (path / "precision").mkdir(parents=True)
    (path / "precision" / "mine.yaml").write_text(f"defaults: [int, _self_]\nname: mine\nbits: {bits}\n")
    return str(path)


def test_a_place_can_have_a_precision_of_ones_own(tmp_path):
    """From --config-dir, that of the folder at hand: two folders may call different ones by one name."""
    for bits in (3, 5):
        config = trainer.config("precision=int8", "steps=10", "precision.exemptions={last1: mine}", config_dir=_folder(tmp_path / str(bits), bits))
        ((where, there),) = config.precision.exemptions
        assert (where, there.name, there.weights.first.bits) == ("last1", "mine", bits)
    with pytest.raises(ValueError, match="precision.exemptions.last1=mine: no such precision"):
        trainer.config("precision=int8", "steps=10", "precision.exemptions={last1: mine}")


BLOCK = 3 * 16 * 16 + 16 * 16 + 2 * 16 * 24 + 16 * 24
HEAD = VOCAB * 16
FRACTIONS = {
    "int8": (["int8"], 2 * BLOCK, None),
    "float32": (["float32"], 0, None),
    "the preset's own": (["nvfp4_recipe"], BLOCK, "last1:high"),
    "the head alone": (["float32", "precision.exemptions={head: int8}"], HEAD, "head:int8"),
    "high and head": (["int8", "precision.exemptions={last1: high, head: int4}"], BLOCK + HEAD, "last1:high,head:int4"),
    "one site": (["float32", "precision.exemptions={last1.down: fp8}"], 16 * 24, "last1.down:fp8"),
    "the later wins": (["int8", "precision.exemptions={last2: high, layer0.qkv: int8}"], 3 * 16 * 16, "last2:high,layer0.qkv:int8"),
    "attention is no weight": (["int8", "precision.exemptions={attention: high}"], 2 * BLOCK, "attention:high"),
    "float32 by its width": (["int", "precision.bits=32"], 0, None),
    "the embedding is read, not multiplied": (["float32", "precision.exemptions={embedding: int8}"], 0, "embedding:int8"),
}  # fmt: skip


@pytest.mark.parametrize("name", FRACTIONS)
def test_quantized_fraction_and_exemptions_of_a_record(name):
    """Counted by hand."""
    overrides, quantized, exemptions = FRACTIONS[name]
    spec = trainer.config(*(f"precision={o}" if "=" not in o else o for o in overrides), "model=25k", "steps=10").precision
    model = ModelConfig(LAYERS, 16, 2, 24, VOCAB)
    assert describe.quantized_fraction(spec, model) == quantized / (2 * BLOCK + HEAD)
    assert describe.exemptions_name(spec) == exemptions
