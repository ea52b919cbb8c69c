"""The decoder's operations: values from the textbook, hand-written gradients from finite differences of it."""
from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.trainer import textbook
from trainer import ops

BATCH, TIME, HEADS, HEAD = 2, 5, 2, 4
VOCAB, WIDTH = 7, 6
rng = np.random.default_rng(0)
TOKENS = rng.integers(0, VOCAB, 11)
QKV = rng.standard_normal((BATCH * TIME, 3 * HEADS * HEAD)) * 2


def _textbook_attention(qkv):
    return textbook.attention(qkv.reshape(BATCH, TIME, -1), HEADS).reshape(BATCH * TIME, -1)


# The operation, the same from the textbook in float64, and arguments to differentiate in.
CASES = {
    "embed": (lambda table: ops.embed(table, jnp.asarray(TOKENS)), lambda table: table[TOKENS], (rng.standard_normal((VOCAB, WIDTH)),)),
    "rms_norm": (ops.rms_norm, lambda x, gain: textbook.rms_norm(x, gain[None]), (rng.standard_normal((9, WIDTH)) * 3, rng.standard_normal(WIDTH))),
    "rms_norm of nearly nothing": (ops.rms_norm, lambda x, gain: textbook.rms_norm(x, gain[None]), (rng.standard_normal((3, WIDTH)) * 1e-3, np.ones(WIDTH))),
    "swiglu": (ops.swiglu, textbook.swiglu, (rng.standard_normal((9, 2 * WIDTH)) * 4,)),
    "attention": (lambda qkv: ops.rotary_attention(qkv, BATCH, HEADS), _textbook_attention, (QKV,)),
    "cross_entropy": (
        lambda logits: ops.cross_entropy(logits, jnp.asarray(TOKENS)), lambda logits: textbook.cross_entropy(logits, TOKENS),
        (rng.standard_normal((11, VOCAB)) * 5,),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_value_is_the_textbooks(name):
    op, oracle, args = CASES[name]
    found, expected = jax.jit(op)(*(jnp.float32(a) for a in args)), oracle(*args)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6 * np.max(np.abs(expected)))


@pytest.mark.parametrize("name", CASES)
def test_gradient_is_a_finite_difference(name):
    """Every entry of every gradient, against central differences of the float64 textbook."""
    op, oracle, args = CASES[name]
    shape = oracle(*args).shape
    weights = np.random.default_rng(1).standard_normal(shape)
    value = lambda *a: jnp.sum(op(*a) * jnp.float32(weights))  # noqa: E731
    grads = jax.jit(jax.grad(value, tuple(range(len(args)))))(*(jnp.float32(a) for a in args))
    for position, grad in enumerate(grads):
        expected = np.empty(args[position].shape)
        for index in np.ndindex(expected.shape):
            step = 1e-5 * max(1e-3, abs(args[position][index]))
            values = []
            for sign in (1, -1):
                moved = [a.copy() for a in args]
                moved[position][index] += sign * step
                values.append(np.sum(oracle(*moved) * weights))
            expected[index] = (values[0] - values[1]) / (2 * step)
        np.testing.assert_allclose(grad, expected, rtol=2e-4, atol=2e-6 * np.max(np.abs(expected)))


def test_attention_does_not_see_the_future():
    """Outputs up to a position stay the same bits when all later positions change."""
    attention = jax.jit(lambda qkv: ops.rotary_attention(qkv, BATCH, HEADS))
    before = np.asarray(attention(jnp.float32(QKV))).reshape(BATCH, TIME, -1)
    for position in range(TIME - 1):
        changed = QKV.reshape(BATCH, TIME, -1).copy()
        changed[:, position + 1 :] = rng.standard_normal(changed[:, position + 1 :].shape) * 9
        after = np.asarray(attention(jnp.float32(changed.reshape(QKV.shape)))).reshape(BATCH, TIME, -1)
        np.testing.assert_array_equal(after[:, : position + 1], before[:, : position + 1])
        assert np.all(np.any(after[:, position + 1 :] != before[:, position + 1 :], axis=(1, 2)))


@pytest.mark.parametrize("size", [1e4, 1e30])
def test_huge_logits_and_scores_stay_finite(size):
    """Softmax subtracts the maximum: large numbers give large losses, never inf - inf."""
    logits = jnp.float32([[size, 0.0, -size], [-size, size, 0.0]])
    losses, grads = jax.value_and_grad(lambda x: jnp.sum(ops.cross_entropy(x, jnp.array([1, 1]))))(logits)
    assert losses == np.float32(size)
    np.testing.assert_array_equal(grads, [[1.0, -1.0, 0.0], [0.0, 0.0, 0.0]])
    out = ops.rotary_attention(jnp.float32(QKV * np.sqrt(size)), BATCH, HEADS)
    assert np.all(np.isfinite(out))
