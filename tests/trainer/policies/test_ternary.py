"""BitNet b1.58 against its paper: weights, activations, extra norms, and the ramp that brings quantization in layer after layer."""
from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import formats
import trainer
from tests.trainer import textbook
from tests.trainer.policies.numpy_integers import Lsq, first_step, largest_code
from trainer import model as decoder
from trainer import step
from trainer.linear import linear
from trainer.optimizers import OptimizerNumbers
from trainer.precision import PrecisionPolicy, Ramp
from trainer.scales import Site
from trainer.schedules import ScheduleNumbers

CHEAP = {"xla_backend_optimization_level": 0}  # compiling is what these tests cost
MODEL = decoder.ModelConfig(num_layers=1, d_model=8, num_heads=2, d_ff=12, vocab_size=11, extra_norm=True)
TOKENS = np.random.default_rng(0).integers(0, 11, (2, 7)).astype(np.int32)  # B, T + 1
NORMS = ("qkv_norm", "attention_out_norm", "gate_up_norm", "down_norm")

# --- the layer ------------------------------------------------------------------------------------------------------------------------------


def ternary(w):
    """RoundClip(W / mean|W|, -1, 1) mean|W| (Ma et al. 2024, equations 1 to 3)."""
    gamma = np.mean(np.abs(w))
    return np.clip(np.rint(w / gamma), -1, 1) * gamma


def int8_tokens(x):
    """Absmax of every token."""
    scale = np.max(np.abs(x), axis=-1, keepdims=True) / 127
    return np.rint(x / scale) * scale


def _tensors(seed=0):
    rng = np.random.default_rng(seed)
    return tuple(rng.standard_normal(shape).astype(np.float32) * size for shape, size in (((24, 20), 1.0), ((20, 12), 0.3), ((24, 12), 1.0)))


@partial(jax.jit, compiler_options=CHEAP)
def products(x, w, g, which, site):
    y, backward = jax.vjp(lambda x, w: linear(x, w, which, site=site), x, w)
    return y, *backward(g)


@pytest.mark.parametrize("blend", [None, 0.3])
def test_the_layer_equals_numpy(blend):
    """Forward reads the quantized tensors, backward the same ones, straight-through; part of the way x + blend (q(x) - x)."""
    x, w, g = _tensors()
    x_q, w_q = int8_tokens(x.astype(np.float64)), ternary(w.astype(np.float64))
    assert len(np.unique(w_q)) == 3
    if blend is not None:
        x_q, w_q = x + blend * (x_q - x), w + blend * (w_q - w)
    found = products(x, w, g, trainer.policy("bitnet"), Site(blend=None if blend is None else jnp.float32(blend)))
    for one, other in zip(found, (x_q @ w_q, g @ w_q.T, x_q.T @ g)):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)


def _numpy_logits(params, tokens, gains, quantized=True):
    """One block with a norm before every projection."""
    layer = {name: value[0] for name, value in params["layers"].items() if name != "extra_norms"}
    to_x, to_w = (int8_tokens, ternary) if quantized else (lambda x: x, lambda w: w)

    def project(x, name):
        return to_x(textbook.rms_norm(x, gains[f"{name}_norm"])) @ to_w(layer[name])

    h = params["embedding"][tokens] * 8**0.5
    qkv = project(textbook.rms_norm(h, layer["attention_norm"]), "qkv")
    h = h + project(textbook.attention(qkv, 2), "attention_out")
    h = h + project(textbook.swiglu(project(textbook.rms_norm(h, layer["mlp_norm"]), "gate_up")), "down")
    return textbook.rms_norm(h, params["final_norm"]) @ params["embedding"].T / 8**0.5


@partial(jax.jit, compiler_options=CHEAP)
def _logits(params, tokens, which):
    return decoder.apply(decoder.blueprint(MODEL)[0], params, tokens, decoder.Call(which))


@pytest.mark.parametrize("name", ["bitnet", "float32"])
@pytest.mark.parametrize("ones", [True, False])
def test_a_block_equals_numpy(name, ones):
    """Fresh gains are 1, and each multiplies what its own projection reads."""
    params = decoder.init_params(MODEL, jax.random.key(3))
    assert {norm: leaf.shape for norm, leaf in params["layers"]["extra_norms"].items()} == dict(zip(NORMS, ((1, 8), (1, 8), (1, 8), (1, 12))))
    assert all(np.all(leaf == 1) for leaf in params["layers"]["extra_norms"].values())
    if not ones:
        rng = np.random.default_rng(1)
        params["layers"]["extra_norms"] = {norm: np.exp(rng.normal(size=leaf.shape)).astype(np.float32)
                                           for norm, leaf in params["layers"]["extra_norms"].items()}
    exact = jax.tree.map(np.float64, params)
    gains = {norm: leaf[0] for norm, leaf in exact["layers"]["extra_norms"].items()}
    expected = _numpy_logits(exact, TOKENS[:, :-1], gains, name == "bitnet").reshape(-1, 11)
    np.testing.assert_allclose(_logits(params, TOKENS[:, :-1], trainer.policy(name)), expected, rtol=1e-4, atol=1e-5)


# --- the ramp -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stagger", [0, 3])
@pytest.mark.parametrize("from_output", [True, False])
def test_the_ramp_is_linear_and_staggered(stagger, from_output):
    """clip((t - t_l) / T, 0, 1), the first layer at once; exactly 1 from `length` on, and not before."""
    ramp, layers, steps = Ramp(np.float32(7), np.float32(stagger), from_output), 4, 7
    for t in range(20):
        places = np.arange(layers)[::-1] if from_output else np.arange(layers)
        np.testing.assert_allclose(ramp.blend(t, layers), np.clip((t - places * stagger) / steps, 0, 1), rtol=1e-6)
    end = int(ramp.length(layers))
    assert end == steps + 3 * stagger
    assert np.all(np.asarray(ramp.blend(end, layers)) == 1) and np.min(ramp.blend(end - 1, layers)) < 1


ENDS = {
    "bitnet": ("bitnet",), "int_rowwise": ("int_rowwise",), "int8_fake_quant": ("int8_fake_quant",),
    "clipped at 2 bits": ("int_rowwise", "precision.bits=2",
                          *(f"precision.{role}.{key}" for role in ("weights", "activations") for key in ("amax=rms", "gradient=clipped"))),
}  # fmt: skip


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("blend", [0.0, 1.0])
def test_at_its_ends_a_ramp_is_nothing_or_all_of_the_quantizer(name, blend):
    """Bit for bit what float32 gives at 0, and at 1 what the policy without a ramp gives: forward and backward."""
    tensors, which = _tensors(), trainer.policy(*ENDS[name])
    seen = {"activations": jnp.asarray([1.0, 1.5], jnp.float32)} if name == "int8_fake_quant" else {}
    found = products(*tensors, which, Site(seen, blend=jnp.float32(blend)))
    expected = products(*tensors, which, Site(seen)) if blend == 1.0 else products(*tensors, PrecisionPolicy(), Site())
    for one, other in zip(found, expected):
        np.testing.assert_array_equal(one, other)


def test_a_ramp_blends_the_gradient_of_a_learned_step():
    """d/ds of x + blend (q(x, s) - x) is blend times that of q: the codes, not the blended tensor, tell how far a value was rounded. (Or such
    a pair of keys is refused.)"""
    x, w, g = _tensors()
    expected_rms, bits, blend = {"weights": np.float32(0.3), "activations": np.float32(1.0)}, 4, 0.5
    try:
        which = trainer.policy("lsq", "precision.ramp_steps=1")
    except ValueError:
        return

    @partial(jax.jit, compiler_options=CHEAP)
    def slopes(x, w, g, learned):
        def total(learned):
            return jnp.sum(linear(x, w, which, site=Site(expected=expected_rms, learned=learned, blend=jnp.float32(blend))) * g)

        return jax.grad(total)(learned)

    steps = {role: first_step(rms, bits) for role, rms in expected_rms.items()}
    q_x, q_w = Lsq(x.astype(np.float64), steps["activations"], bits), Lsq(w.astype(np.float64), steps["weights"], bits)
    x_q, w_q = x + blend * (q_x.value - x), w + blend * (q_w.value - w)
    found = slopes(x, w, g, {role: jnp.float32(1.0) for role in expected_rms})
    for role, slope, size in (("activations", np.sum((g @ w_q.T) * q_x.slope), x.shape[1]), ("weights", np.sum((x_q.T @ g) * q_w.slope), w.size)):
        assert float(found[role]) == pytest.approx(blend * slope * steps[role] / np.sqrt(size * largest_code(bits)), rel=1e-4)


@pytest.mark.slow
def test_a_step_blends_by_its_own_number():
    """Two layers from the output with a stagger of 2: the losses of steps 0 to 5 are those of the blends that the formula gives."""
    model = replace(MODEL, num_layers=2)
    structure = step.StepStructure(model, "adamw", "constant", batch_size=2, seq_len=6)
    which = replace(trainer.policy("bitnet"), ramp=Ramp(np.float32(2), np.float32(2), True))
    numbers = OptimizerNumbers(*(np.float32(x) for x in (0.01, 0.9, 0.95, 1e-8, 0.1, 1.0)))
    schedule = ScheduleNumbers(np.int32(9), np.int32(0), np.int32(2), np.float32(0.0))
    hyper = step.Hyper(numbers, schedule, which, np.zeros(2, np.uint32), np.float32(9.0))
    graphdef = decoder.blueprint(model)[0]
    by_hand = decoder.Call(trainer.policy("bitnet"))

    @partial(jax.jit, compiler_options=CHEAP)
    def both(state, blend):
        call = replace(by_hand, sites=Site(blend=jnp.broadcast_to(blend[:, None], (2, 4))))
        return step.step(structure, graphdef, state, TOKENS, hyper), jnp.mean(decoder.next_token_losses(graphdef, state.params, TOKENS, call))

    state, losses = step.init(structure, hyper), []
    for blend in ([0, 0], [0, 0.5], [0, 1], [0.5, 1], [1, 1], [1, 1]):  # the last layer first
        (state, metrics), expected = both(state, jnp.asarray(blend, jnp.float32))
        assert float(metrics.loss) == pytest.approx(float(expected), rel=1e-6)
        losses.append(float(expected))
    assert len(set(losses)) == 6


BASE = ("model=25k", "data=synthetic")


@pytest.mark.parametrize("steps, stagger, fits", [(10, 0, True), (9, 0, False), (12, 2, True), (11, 2, False)])
def test_a_ramp_longer_than_the_run_is_refused(steps, stagger, fits):
    """25k has two layers."""
    overrides = (*BASE, "precision=bitnet_finetune", "precision.ramp_steps=10", f"precision.ramp_stagger={stagger}", f"steps={steps}")
    if fits:
        assert trainer.config(*overrides).precision.ramp_stagger == stagger
        return
    with pytest.raises(ValueError, match="precision.ramp_steps=10.*accepted: a ramp within it") as caught:
        trainer.config(*overrides)
    assert "\n" not in str(caught.value)


def test_both_orders_are_keys():
    """bitnet_finetune begins at the output; `input` turns it round."""
    for order, from_output in ((), True), (("precision.ramp_order=input",), False):
        assert trainer.policy("bitnet_finetune", "precision.ramp_steps=1", *order).ramp.from_output is from_output


def test_the_scale_is_never_zero():
    """A matrix of zeros stays zeros and gives no NaN."""
    zeros = jnp.zeros((4, 4), jnp.float32)
    assert not np.any(formats.quantize(zeros, trainer.policy("bitnet").weights.first.format))
    assert not np.any(products(zeros, zeros, zeros, trainer.policy("bitnet"), Site())[0])
