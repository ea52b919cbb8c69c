"""Static scales (unit scaling): against plain numpy, and sizes that the model tells.

Shapes: N tokens (rows), K inputs, M outputs.
"""
from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import trainer
from tests.trainer import numpy_quantizers as nq
from tests.trainer.products import FP8, K, M, N, assert_products, products
from trainer import model as decoder
from trainer import step
from trainer.linear import linear
from trainer.precision import ROLES
from trainer.scales import Site, nearest_power_of_two

MODEL = decoder.ModelConfig(num_layers=1, d_model=8, num_heads=2, d_ff=12, vocab_size=11)
STRUCTURE = step.StepStructure(MODEL, "adamw", "constant", batch_size=4, seq_len=6)
TOKENS = np.random.default_rng(0).integers(0, 11, (4, 7)).astype(np.int32)


@partial(jax.jit, static_argnames="accumulate")
def _gradients(params, policy, accumulate=1):
    structure = dataclasses.replace(STRUCTURE, accumulate=accumulate)
    return step.loss_and_gradients(structure, decoder.blueprint(MODEL)[0], params, TOKENS, policy, np.zeros(2, np.uint32))


def test_the_power_of_two_next_to_a_size():
    """By logarithm; what lies in the middle, as 32**-0.5 does, goes up."""
    x = np.exp(np.random.default_rng(0).uniform(-40, 40, 10000)).astype(np.float32)
    np.testing.assert_array_equal(nearest_power_of_two(jnp.asarray(x)), np.exp2(np.round(np.log2(x.astype(np.float64)))))
    odd = np.float32(2.0) ** np.arange(-60, 60) * np.float32(2**0.5)
    np.testing.assert_array_equal(nearest_power_of_two(jnp.asarray(odd)), np.float32(2.0) ** np.arange(-59, 61))
    assert nearest_power_of_two(jnp.float32(32**-0.5)) == 0.25


RMS = {"weights": 0.09, "activations": 1.0, "output_gradients": 3e-4}
STATIC = [f"precision.{role}.static_rms={rms}" for role, rms in RMS.items()]
POWERS = {"weights": 2.0**-3, "activations": 1.0, "output_gradients": 2.0**-12}
INTEGERS = [f"precision.{role}.{key}" for role in RMS for key in ("format=integer", "bits=4", "granularity=tensor")]
CLIP_4 = 0.352 * 7  # Max 1960, table II: the uniform quantizer of 15 levels best for N(0, 1) has steps of 0.352 to 0.354
CASES = {
    "fp8": (["fp8"], {role: nq.minifloat(FP8[role], amax=POWERS[role] * nq.ELEMENTS[FP8[role]][1]) for role in ROLES}),
    "nvfp4": (["nvfp4"], {role: nq.nvfp4(amax=POWERS[role] * 448 * 6) for role in ROLES}),
    **{f"scale rule {rule}": (["fp8", *(f"precision.{role}.scale_rule={rule}" for role in ROLES)],
                              {role: nq.minifloat(FP8[role], amax=POWERS[role] * nq.ELEMENTS[FP8[role]][1]) for role in ROLES})
       for rule in ("floor", "ceil", "rceil", "even")},
}  # fmt: skip


def _tensors():
    rng = np.random.default_rng(3)
    shapes = {"activations": (N, K), "weights": (K, M), "output_gradients": (N, M)}
    return [(rng.standard_normal(shape) * RMS[role]).astype(np.float32) for role, shape in shapes.items()]


@pytest.mark.parametrize("name", CASES)
def test_minifloats_see_values_of_size_one(name):
    """The scale (of the tensor, with two levels) is the power of two next to the expected size, whatever the tensor holds."""
    overrides, quantize = CASES[name]
    policy = trainer.policy(*overrides, "precision.source=static", *STATIC)
    x, w, dy = _tensors()
    for factor in (1.0, 50.0):  # beyond the element's range: clipped
        *found, seen = products(x * np.float32(factor), w, dy, policy, {})
        assert seen == {}
        assert_products(found, x * np.float32(factor), w, dy, quantize)


def test_integers_are_clipped_where_gaussian_data_want_it():
    policy = trainer.policy("float32", *INTEGERS, "precision.source=static", *STATIC)
    clips = {role: float(getattr(policy, role).first.static_clip) for role in ROLES}
    assert clips == {role: pytest.approx(CLIP_4, rel=6e-3) for role in ROLES}
    x, w, dy = _tensors()
    quantize = {role: nq.integer(4, "tensor", amax=np.float32(RMS[role]) * np.float32(clips[role])) for role in ROLES}
    assert_products(products(x, w, dy, policy, {})[:3], x, w, dy, quantize)


def test_the_width_that_means_float32_has_no_scale():
    policy = trainer.policy("int", "precision.bits=32", "precision.granularity=tensor", "precision.source=static", *STATIC[:2])
    x, w, dy = _tensors()
    jax.tree.map(np.testing.assert_array_equal, products(x, w, dy, policy, {}), products(x, w, dy, trainer.policy("float32"), {}))


@pytest.mark.slow
def test_the_model_says_how_large_tensors_are():
    """Weights as they are initialised, activations 1, gradients one over the tokens of a step, however it is cut up: what saying the same by
    hand gives, bit for bit."""
    model = decoder.ModelConfig(num_layers=4, d_model=32, num_heads=2, d_ff=88, vocab_size=11)
    params = jax.tree.map(np.asarray, jax.jit(partial(decoder.init_params, model))(jax.random.key(0)))
    for name, std in zip(decoder.SITES, model.init_stds, strict=True):
        assert np.std(params["layers"][name]) == pytest.approx(std, rel=0.05)
    fp8, by_hand, other = (trainer.policy("fp8", "precision.source=static", "precision.weights.source=none", *own) for own in (
        [], ["precision.activations.static_rms=1", f"precision.output_gradients.static_rms={1 / (4 * 6)}"],
        ["precision.activations.static_rms=1", "precision.output_gradients.static_rms=1e9"]))  # fmt: skip
    params = jax.jit(partial(decoder.init_params, MODEL))(jax.random.key(1))
    loss, grads = _gradients(params, fp8)
    jax.tree.map(np.testing.assert_array_equal, (loss, grads), _gradients(params, by_hand))
    assert np.all(np.asarray(_gradients(params, other)[1]["layers"]["qkv"]) == 0)
    split_loss, split_grads = _gradients(params, fp8, accumulate=2)
    assert float(split_loss) == pytest.approx(float(loss), rel=2e-6)
    for one, two in zip(jax.tree.leaves(grads), jax.tree.leaves(split_grads)):
        assert np.linalg.norm(one - two) <= 2e-6 * np.linalg.norm(one)


def test_static_widths_and_sizes_are_numbers_of_the_program():
    """Members of a cohort may differ in them: one structure, stacked leaves."""
    policies = [trainer.policy("int", f"precision.bits={bits}", "precision.granularity=tensor", "precision.source=static",
                               f"precision.weights.static_rms={rms}") for bits, rms in ((4, 0.1), (8, 0.2), (32, 0.3))]  # fmt: skip
    assert len({jax.tree.structure(policy) for policy in policies}) == 1
    stacked = jax.tree.map(lambda *xs: np.stack(xs), *policies)
    x, w, dy = _tensors()
    expected = {"activations": np.float32(1.0)}
    both = jax.jit(jax.vmap(lambda policy: linear(x, w, policy, site=Site(expected=expected))))(stacked)
    for policy, one in zip(policies, both):
        np.testing.assert_allclose(linear(x, w, policy, site=Site(expected=expected)), one, rtol=1e-5, atol=1e-6)


def test_static_elsewhere_needs_a_size():
    x, w = jnp.ones((4, 4)), jnp.ones((4, 4))
    apply = trainer.dot_general(trainer.policy("fp8", "precision.source=static"))
    with pytest.raises(ValueError, match=r"source='static' needs the RMS.*static_rms="):
        apply(x, w, (((1,), (0,)), ((), ())))
    apply = trainer.dot_general(trainer.policy("fp8", "precision.source=static", *STATIC))
    np.testing.assert_array_equal(apply(x, w, (((1,), (0,)), ((), ()))), np.full((4, 4), 4.0))
