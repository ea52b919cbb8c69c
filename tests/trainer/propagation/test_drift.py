"""Programs whose exponents say more than their data: deep nets, saturated derivatives, zeros and masks, at unit scale and far from it."""
from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from trainer import ScaledArray, propagate_scales, scaled, unscaled

X = np.float32([0.5, -1.0, 2.0])


def at(data, exponent):
    return ScaledArray(jnp.asarray(data, jnp.float32), jnp.int32(exponent))


def test_gradients_of_a_deep_net_with_gelu():
    """20 pre-norm layers; without measuring, the term with x^3 in the derivative takes all gradients below float32's range."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4, 64)).astype(np.float32)
    weights = (rng.standard_normal((20, 64, 64)) * (2 / 64) ** 0.5).astype(np.float32)

    def layer(h, w):
        normed = h * lax.rsqrt(jnp.mean(h * h, -1, keepdims=True) + 1e-6)
        return h + 0.1 * jax.nn.gelu(normed @ w), None

    gradients = jax.grad(lambda weights, x: jnp.mean(lax.scan(layer, x, weights)[0] ** 2))
    want = gradients(weights, x)
    for data_dtype, near in ((None, 1e-6), ("float16", 0.01)):
        got = unscaled(propagate_scales(gradients, data_dtype=data_dtype)(at(weights, 0), at(x, 0)))
        assert np.linalg.norm(got - want) <= near * np.linalg.norm(want)


@pytest.mark.parametrize("data_dtype, exponent", [(None, 50), ("float16", 10)])
def test_a_saturated_derivative(data_dtype, exponent):
    got = propagate_scales(jax.grad(lambda x: jax.nn.gelu(x).sum()), data_dtype=data_dtype)(at(X, exponent))
    np.testing.assert_array_equal(unscaled(got), [1.0, 0.0, 1.0])


@pytest.mark.parametrize("data_dtype", [None, "float16"])
@pytest.mark.parametrize("masked", [-1e9, -1e30, float(np.finfo(np.float32).min), -np.inf])
@pytest.mark.parametrize("logits", [np.zeros(3, np.float32), X * 2.0**-20, X])
def test_masks_mask_whatever_the_scale(logits, masked, data_dtype):
    def program(x):
        return jax.nn.softmax(jnp.where(np.array([True, True, False]), x, masked))

    got = unscaled(propagate_scales(program, data_dtype=data_dtype)(scaled(logits)))
    np.testing.assert_allclose(got, program(logits), atol=1e-3)
    assert got[2] == 0


def test_scaled_arrays_far_from_unit_scale_are_held_narrowly():
    for exponent in (-60, -30, 30, 60):
        got = propagate_scales(lambda x: x * 1.0, data_dtype="float16")(at(X * np.float32(2.0**-exponent), exponent))
        assert got.data.dtype == jnp.float16
        np.testing.assert_array_equal(unscaled(got), X)


QUOTIENTS = {
    "where": (lambda z, x: jnp.where(z == 0, x, x / z), X),
    "minimum": (lambda z, x: jnp.minimum(1 / z, 5.0) + 0 * x, [5.0, 5.0, 5.0]),
    "concatenate": (lambda z, x: jnp.concatenate([1 / z, x])[3:], X),
    "scatter": (lambda z, x: (1 / z).at[:3].set(x), X),
    "where, of a root": (lambda z, x: jnp.where(z > 0, lax.rsqrt(z), x), X),
    "max": (lambda z, x: jnp.maximum(x, -1 / z), X),
}


@pytest.mark.parametrize("name", QUOTIENTS)
def test_what_was_divided_by_zeros_leaves_others_alone(name):
    program, want = QUOTIENTS[name]
    for zeros in (scaled(np.zeros(3, np.float32)), at(np.zeros(3), 60), at(np.zeros(3), -60)):
        np.testing.assert_array_equal(unscaled(propagate_scales(program)(zeros, at(X, 0))), want)


@pytest.mark.parametrize("exponent", [0, 30, 60, 100])
@pytest.mark.parametrize("centred", [False, True])
def test_a_row_of_zeros_keeps_the_epsilon_of_its_norm(centred, exponent):
    def norm(x_ND):
        x_ND = x_ND - jnp.mean(x_ND, -1, keepdims=True) if centred else x_ND
        return x_ND * lax.rsqrt(jnp.mean(x_ND * x_ND, -1, keepdims=True) + 1e-6)

    rows = np.float32([[2, 2, 2] if centred else [0, 0, 0], [1, 2, -3]])
    got = unscaled(propagate_scales(norm)(at(rows, exponent)))
    np.testing.assert_array_equal(got[0], [0, 0, 0])
    np.testing.assert_allclose(got[1], rows[1] / np.sqrt(14 / 3), rtol=1e-6)


def test_zeros_at_a_large_scale_leave_sums_alone():
    assert unscaled(propagate_scales(lambda a: jnp.mean((a - 1) ** 2))(at([0.0, 0.0], 120))) == 1
    np.testing.assert_array_equal(unscaled(propagate_scales(lambda a: a + 1.0)(at([0.0, 0.0], 60))), [1.0, 1.0])
