"""The derivative of a quantizer is what the caller names."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import formats

X = jnp.linspace(-10.0, 10.0, 41)
G = jnp.cos(X) * 3


def _vjp(fmt, **how):
    _, pull = jax.vjp(lambda x: formats.quantize(x, fmt, **how), X)
    return pull(G)[0]


def test_straight_through_and_none():
    np.testing.assert_array_equal(_vjp("float4_e2m1fn"), G)
    np.testing.assert_array_equal(_vjp("float4_e2m1fn", gradient="none"), jnp.zeros_like(G))


@pytest.mark.parametrize(("fmt", "low", "high"), [
    ("float4_e2m1fn", -6, 6), ("int4_full", -8, 7), ("nf4", -1, 1), ("lns8", -1, 1), (formats.scaled("int4", amax="rms", amax_at=1.0), -5.92, 5.92),
    (formats.block("float4_e2m1fn", 41, rule="floor"), -12, 12)])
def test_clipped_is_zero_where_values_saturate(fmt, low, high):
    """amax of X is 10 and its RMS 5.916: floor gives the block scale 2 (largest value 12)."""
    want = np.where((np.asarray(X) >= low) & (np.asarray(X) <= high), G, 0.0)
    np.testing.assert_array_equal(_vjp(fmt, gradient="clipped"), want)
    _, tangent = jax.jvp(lambda x: formats.quantize(x, fmt, gradient="clipped"), (X,), (G,))
    np.testing.assert_array_equal(tangent, want)


def test_quantized_cotangents_have_a_format_of_their_own():
    key = jnp.array([1, 2], jnp.uint32)
    coarse = formats.QuantizedGradient("float8_e5m2")
    np.testing.assert_array_equal(_vjp("int4", gradient=coarse), formats.quantize(G, "float8_e5m2"))
    noisy = formats.QuantizedGradient(formats.scaled("int4"), rounding="stochastic", key=key)
    want = formats.quantize(G, formats.scaled("int4"), rounding="stochastic", key=key)
    np.testing.assert_array_equal(jax.jit(lambda: _vjp("int4", gradient=noisy))(), want)
    assert not np.array_equal(want, G)


def test_quantized_without_a_format_is_refused():
    with pytest.raises(ValueError, match="pass formats.QuantizedGradient"):
        formats.quantize(X, "int4", gradient="quantized")
