"""second=moved: INT8 as qwix and AQT train, against numpy, in both executions; and what it cannot be combined with."""
from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import trainer

RNG = np.random.default_rng(3)
X, W, G = (RNG.standard_normal(shape).astype(np.float32) * np.float32(size) for shape, size in (((24, 12), 1.0), ((12, 20), 0.3), ((24, 20), 0.01)))


def _int8(x, dim):
    """(whole numbers, scale that is constant along dim)."""
    scale = np.max(np.abs(x), axis=dim, keepdims=True) / np.float32(127)
    return np.rint(x / scale), scale


@pytest.mark.parametrize("execution", ["native", "emulated"])
def test_a_layer_equals_numpy(execution):
    policy = trainer.policy("int8_moved", f"precision.execution={execution}")
    y, back = jax.vjp(lambda x, w: trainer.linear(x, w, policy), jnp.asarray(X), jnp.asarray(W))
    (xq, xs), (wq, ws) = _int8(X, 1), _int8(W, 0)
    into_dgrad, into_wgrad = _int8(G * ws, 1), _int8(G * xs, 0)
    expected = (xq @ wq * xs * ws, into_dgrad[0] @ wq.T * into_dgrad[1], xq.T @ into_wgrad[0] * into_wgrad[1])
    for found, wanted in zip((y, *back(jnp.asarray(G))), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=2e-6, atol=2e-6 * np.abs(wanted).max())
    kept = jax.vjp(lambda x, w: trainer.linear(x, w, trainer.policy("int8_native")), jnp.asarray(X), jnp.asarray(W))[1](jnp.asarray(G))
    assert not np.allclose(kept[1], expected[2], rtol=1e-4)


def test_products_are_of_integers():
    policy = trainer.policy("int8_moved")
    jaxpr = str(jax.make_jaxpr(jax.grad(lambda x, w: jnp.sum(trainer.linear(x, w, policy) ** 2), (0, 1)))(X, W))
    assert jaxpr.count("preferred_element_type=int32") == 3


@pytest.mark.parametrize("overrides, words", [
    (["precision=int8", "precision.weights.second=moved"], ["precision.weights.second=moved", "output_gradients.second=fresh"]),
    (["precision=int8_moved", "precision.output_gradients.second=moved"], ["precision.output_gradients.second=moved", "shared, fresh, chained"]),
    (["precision=mxfp8", "precision.weights.second=moved"], ["precision.weights.second=moved", "tensor, a channel or a token"]),
    (["precision=int8_moved", "precision.weights.dgrad.bits=4"], ["precision.weights.second=moved: its two products"]),
])  # fmt: skip
def test_refusals(overrides, words):
    with pytest.raises(ValueError) as caught:
        trainer.config("model=25k", "steps=5", *overrides)
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words), caught.value
