"""One training step: bit for bit the same as one without quantizers, the textbook's to float32, and the same however it is cut up.

Shapes: B batch, T time, N = B*T tokens, D model width, V vocabulary.
"""
from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import trainer
from tests.trainer import textbook
from trainer import model as decoder
from trainer import ops, step
from trainer.optimizers import OptimizerNumbers
from trainer.precision import PrecisionPolicy
from trainer.schedules import ScheduleNumbers

MODEL = decoder.ModelConfig(num_layers=2, d_model=8, num_heads=2, d_ff=12, vocab_size=11)
STRUCTURE = step.StepStructure(MODEL, "adamw", "wsd", batch_size=4, seq_len=6)
TOKENS = np.random.default_rng(0).integers(0, 11, (3, 4, 7)).astype(np.int32)  # steps, B, T + 1
LR, BETA1, BETA2, EPS, DECAY, CLIP = 0.01, 0.9, 0.95, 1e-8, 0.1, 0.3
WARMUP = 2


def _hyper(policy=PrecisionPolicy(), lr=LR, clip=CLIP, decay=DECAY, margin=2.0):
    numbers = OptimizerNumbers(*(np.float32(x) for x in (lr, BETA1, BETA2, EPS, decay, clip)))
    schedule = ScheduleNumbers(np.int32(100), np.int32(WARMUP), np.int32(20), np.float32(0.0))
    return step.Hyper(numbers, schedule, policy, np.array([0, 5], np.uint32), np.float32(margin))


@partial(jax.jit, static_argnums=0)
def _init(structure, hyper):
    return step.init(structure, hyper)


@partial(jax.jit, static_argnums=0)
def _step(structure, state, tokens, hyper):
    return step.step(structure, decoder.blueprint(structure.model)[0], state, tokens, hyper)


@partial(jax.jit, static_argnums=0)
def _gradients(structure, params, tokens, policy, key=np.zeros(2, np.uint32)):
    return step.loss_and_gradients(structure, decoder.blueprint(structure.model)[0], params, tokens, policy, key)


def _close(found, expected, tolerance):
    """Every leaf's difference is small in norm: |found - expected| <= tolerance |expected|."""
    for (path, one), other in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        assert np.linalg.norm(one - other) <= tolerance * np.linalg.norm(other), (path, np.linalg.norm(one - other) / np.linalg.norm(other))


# --- against a step without quantizers, bit for bit -------------------------------------------------------------------


@jax.custom_vjp
def _matmul(x, w):
    return lax.dot_general(x, w, (((1,), (0,)), ((), ())), precision=lax.Precision.HIGHEST)


def _matmul_bwd(saved, g):
    x, w = saved
    dots = partial(lax.dot_general, precision=lax.Precision.HIGHEST)
    return dots(g, w, (((1,), (1,)), ((), ()))), dots(x, g, (((0,), (0,)), ((), ())))


_matmul.defvjp(lambda x, w: (_matmul(x, w), (x, w)), _matmul_bwd)


def _plain_loss(params, tokens_BT1):
    """The decoder by hand: products, no policy, no quantizer, no module."""
    inputs, targets = tokens_BT1[:, :-1], tokens_BT1[:, 1:].reshape(-1)
    h = ops.embed(params["embedding"], inputs.reshape(-1)) * MODEL.d_model**0.5
    stacked = params["layers"]
    pieces = {name: lax.split(leaf, (1,) * MODEL.num_layers, axis=0) for name, leaf in stacked.items()}
    for i in range(MODEL.num_layers):
        layer = {name: piece[i].reshape(piece[i].shape[1:]) for name, piece in pieces.items()}
        qkv = _matmul(ops.rms_norm(h, layer["attention_norm"]), layer["qkv"])
        h = h + _matmul(ops.rotary_attention(qkv, inputs.shape[0], MODEL.num_heads), layer["attention_out"])
        h = h + _matmul(ops.swiglu(_matmul(ops.rms_norm(h, layer["mlp_norm"]), layer["gate_up"])), layer["down"])
    h = ops.rms_norm(h, params["final_norm"]) * MODEL.d_model**-0.5
    return jnp.mean(ops.cross_entropy(_matmul(h, params["embedding"].T), targets))


def _plain_optimizer(o, params):
    decayed = {"embedding": True, "final_norm": False, "layers": {name: "norm" not in name for name in params["layers"]}}
    return optax.chain(optax.scale_by_adam(o.beta1, o.beta2, o.eps), optax.add_decayed_weights(o.weight_decay, mask=decayed))


@jax.jit
def _plain_step(params, opt_state, index, tokens, o):
    """Loss, gradients, clipping, AdamW with warm-up, and no update where the loss is not finite, by hand."""
    loss, grads = jax.value_and_grad(_plain_loss)(params, tokens)
    norm = jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(grads)))
    grads = jax.tree.map(lambda g: g * jnp.minimum(1.0, o.clip_norm / norm), grads)
    with jax.numpy_dtype_promotion("standard"):
        updates, updated = _plain_optimizer(o, params).update(grads, opt_state, params)
    lr = o.lr * jnp.minimum((index + 1.0) / WARMUP, 1.0)
    after = jax.tree.map(lambda p, u: p - lr * u, params, updates), updated
    params, opt_state = jax.tree.map(lambda new, old: jnp.where(jnp.isfinite(loss), new, old), after, (params, opt_state))
    return params, opt_state, loss


@pytest.mark.parametrize("policy", ["float32", "int at 32 bits"])
def test_float32_equals_the_hand_written_step_bitwise(policy):
    """Without quantizers, or with widths that mean float32, three steps give the loss and parameters of the step by hand."""
    hyper = _hyper(PrecisionPolicy() if policy == "float32" else trainer.policy("int", "precision.bits=32"))
    state = _init(STRUCTURE, hyper)
    params = jax.tree.map(jnp.array, state.params)
    opt_state = _plain_optimizer(hyper.optimizer, params).init(params)
    for index, tokens in enumerate(TOKENS):
        state, metrics = _step(STRUCTURE, state, tokens, hyper)
        params, opt_state, loss = _plain_step(params, opt_state, np.float32(index), tokens, hyper.optimizer)
        assert metrics.loss == loss
        jax.tree.map(np.testing.assert_array_equal, state.params, params)


# --- against the textbook ---------------------------------------------------------------------------------------------


@jax.jit
def _plain_autodiff(params, tokens):
    return jax.value_and_grad(lambda p: textbook.loss(p, tokens, MODEL.num_heads, jnp))(params)


def _textbook_gradients(params, tokens):
    """Plain autodiff of the textbook model in float64."""
    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        value, grads = _plain_autodiff(jax.tree.map(lambda p: jnp.asarray(np.asarray(p), jnp.float64), params), jnp.asarray(tokens))
        return float(value), jax.tree.map(np.asarray, grads)


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_equal_plain_autodiff(tied):
    """Loss and every gradient of the float32 model: plain autodiff of the textbook's in float64, to 1e-5."""
    structure = dataclasses.replace(STRUCTURE, model=dataclasses.replace(MODEL, tied_head=tied))
    params = _init(structure, _hyper()).params
    loss, grads = _gradients(structure, params, TOKENS[0], PrecisionPolicy())
    expected, expected_grads = _textbook_gradients(params, TOKENS[0])
    assert float(loss) == pytest.approx(expected, rel=1e-6)
    _close(grads, expected_grads, 1e-5)


def test_three_steps_equal_the_textbook():
    """Clipping, warm-up, AdamW and what is decayed, each from its formula in numpy, on gradients of the textbook."""
    hyper = _hyper()
    state = _init(STRUCTURE, hyper)
    params = jax.tree.map(np.float64, state.params)
    mean = jax.tree.map(np.zeros_like, params)
    square = jax.tree.map(np.zeros_like, params)
    for index, tokens in enumerate(TOKENS):
        state, metrics = _step(STRUCTURE, state, tokens, hyper)
        loss, grads = _textbook_gradients(params, tokens)
        norm = np.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(grads)))
        lr = LR * min(1.0, (index + 1) / WARMUP)
        np.testing.assert_allclose([*map(float, metrics[:3])], [loss, norm, lr], rtol=1e-5)
        assert norm > 1.1 * CLIP  # clipping is at work

        def update(path, p, g, m, s):
            decay = 0.0 if path[-1].key.endswith("norm") else DECAY
            return textbook.adamw(p, g * min(1.0, CLIP / norm), m, s, index, lr, BETA1, BETA2, EPS, decay)

        moved = jax.tree_util.tree_map_with_path(update, params, grads, mean, square)
        params, mean, square = (jax.tree.map(lambda _, t: t[i], params, moved) for i in range(3))
    assert int(state.step) == len(TOKENS)
    _close(state.params, params, 1e-5)


def test_parameter_counts():
    """num_params and num_params_total count what init makes; matmul_params the weights that a policy quantizes."""
    for tied in (True, False):
        model = dataclasses.replace(MODEL, tied_head=tied)
        shapes = decoder.blueprint(model)[1]
        sizes = {jax.tree_util.keystr(path): leaf.size for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)}
        assert sum(sizes.values()) == model.num_params_total
        assert sum(n for name, n in sizes.items() if "embedding" not in name and "head" not in name) == model.num_params
        assert sum(n for name, n in sizes.items() if "layers" in name and "norm" not in name) == model.matmul_params()


# --- learning rates and clipping --------------------------------------------------------------------------------------


def test_mup_scales_hidden_learning_rates_by_width():
    """Adam's first update is lr in size wherever the gradient is not tiny: lr * base / width in hidden matrices and head, lr in
    embedding and gains (Yang et al. 2022, table 3)."""
    model = dataclasses.replace(MODEL, tied_head=False, mup_base_width=32)
    structure = dataclasses.replace(STRUCTURE, model=model)
    hyper = _hyper(lr=1e-3, decay=0.0)
    state = _init(structure, hyper)
    before = jax.tree.map(np.array, state.params)
    after = _step(structure, state, TOKENS[0], hyper)[0].params
    first_lr = 1e-3 / WARMUP
    for path, old in jax.tree_util.tree_leaves_with_path(before):
        name = path[-1].key
        new = {"layers": after["layers"], **after}[path[0].key] if len(path) == 1 else after["layers"][name]
        expected = first_lr * (32 / 8 if name in ("qkv", "attention_out", "gate_up", "down", "head") else 1)
        assert np.max(np.abs(np.asarray(new) - old)) == pytest.approx(expected, rel=1e-2), name


@pytest.mark.parametrize("clip", [0.01, 1e9, np.inf])
def test_clipping_bounds_the_gradient_norm(clip):
    """The first moment after one step is (1 - beta1) times the clipped gradient; the metric is the norm before clipping."""
    hyper = _hyper(clip=clip)
    state, metrics = _step(STRUCTURE, _init(STRUCTURE, hyper), TOKENS[0], hyper)
    moment = np.sqrt(sum(np.sum(np.float64(m) ** 2) for m in jax.tree.leaves(state.opt_state[0].mu)))
    assert moment / (1 - BETA1) == pytest.approx(min(clip, float(metrics.grad_norm)), rel=1e-5)
    assert float(metrics.grad_norm) > 0.1


def test_a_bad_loss_freezes_the_run():
    """Beyond the first loss by the margin, or not finite: no update, the step is named, and nothing changes ever after."""
    hyper = _hyper(margin=0.5)
    state, metrics = _step(STRUCTURE, _init(STRUCTURE, hyper), TOKENS[0], hyper)
    assert int(state.diverged_step) == -1 and int(state.step) == 1
    worse = dataclasses.replace(state, first_loss=metrics.loss - 1.0)
    broken = dataclasses.replace(state, params={**state.params, "final_norm": state.params["final_norm"] * jnp.nan})
    for bad in (worse, broken):
        after, _ = _step(STRUCTURE, bad, TOKENS[1], hyper)
        assert int(after.diverged_step) == 1 and int(after.step) == 1
        jax.tree.map(np.testing.assert_array_equal, (after.params, after.opt_state), (bad.params, bad.opt_state))


# --- the same step cut up otherwise -----------------------------------------------------------------------------------


STOCHASTIC = ["float32", *(f"precision.weights.{value}" for value in ("format=integer", "bits=4", "rounding=stochastic"))]


@pytest.mark.parametrize("change", ["scan_layers", "remat", "scan_layers and remat"])
def test_same_gradients_with_layers_scanned_or_rematerialised(change):
    """Only the order of sums changes; each layer has the same random bits, and has them again when it is computed again."""
    model = dataclasses.replace(MODEL, **{name: True for name in change.split(" and ")})
    _same_gradients(dataclasses.replace(STRUCTURE, model=model), trainer.policy(*STOCHASTIC))


@pytest.mark.parametrize("policy", [["int4"], ["float32", "precision.output_gradients.format=float8_e5m2", "precision.output_gradients.source=none"]])
def test_accumulated_gradients_equal_those_of_one_batch(policy):
    """Micro-batches change the order of sums only, also where gradients are rounded at their own size: a token's and a channel's
    scale, and the gradient that is rounded, do not depend on how the batch is cut."""
    _same_gradients(dataclasses.replace(STRUCTURE, accumulate=2), trainer.policy(*policy))


def _same_gradients(structure, policy):
    params = _init(STRUCTURE, _hyper()).params
    key = np.array([1, 2], np.uint32)
    _close(_gradients(structure, params, TOKENS[0], policy, key), _gradients(STRUCTURE, params, TOKENS[0], policy, key), 2e-6)
