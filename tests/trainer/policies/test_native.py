"""execution=native: the same products in a dtype that holds the narrow numbers, integers summed in int32, floats in float32.

Shapes: N tokens, K inputs, M outputs.
"""
from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

import trainer
from tests.trainer.policies.networks import policy

N, K, M = 48, 40, 56

INT8_TENSOR = ("precision.granularity=tensor", "precision.output_gradients.format=integer", "precision.output_gradients.bits=8")
INT8_ROWS = ("precision.output_gradients.format=integer", "precision.output_gradients.bits=8", "precision.output_gradients.granularity=token",
             *(f"precision.{role}.second=fresh" for role in ("weights", "activations", "output_gradients")))  # fmt: skip
CASES = {
    "int8 tensor": ("int8", INT8_TENSOR, "int8", "int8"), "int8 rows": ("int8", INT8_ROWS, "int8", "int8"),
    "fp8": ("fp8", (), "float8_e4m3fn", "float8_e5m2"), "fp8_rowwise": ("fp8_rowwise", (), "float8_e4m3fn", "float8_e5m2"),
}  # fmt: skip


def _products(x, w, g, which):
    y, backward = jax.vjp(lambda x, w: trainer.linear(x, w, which), x, w)
    return (y, *backward(g))


def _dots(jaxpr):
    """(dtypes of both operands, dtype of the result) of every product, also of inner jaxprs."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield (*(str(v.aval.dtype) for v in eqn.invars), str(eqn.outvars[0].aval.dtype))
        for inner in jaxprs_in_params(eqn.params):
            yield from _dots(inner)


@pytest.mark.parametrize("name", CASES)
def test_products_are_native_and_equal_emulated(name):
    """The jaxpr multiplies the narrow dtypes and nothing else. Integers: sums of 7-bit products stay below 2^24, so that emulated float32
    is exact too, and both are equal to the bit; fp8: to the order of float32 sums."""
    preset, overrides, forward, gradient = CASES[name]
    native, emulated = (policy(preset, *overrides, *more) for more in (("precision.execution=native",), ()))
    rng = np.random.default_rng(20)
    x, w, g = ((rng.standard_normal(shape) * np.exp(rng.uniform(-1, 1, (shape[0], 1)))).astype(np.float32) for shape in ((N, K), (K, M), (N, M)))
    total = "int32" if forward == "int8" else "float32"
    dots = list(_dots(jax.make_jaxpr(_products)(x, w, g, native).jaxpr))
    assert dots == [(forward, forward, total), (gradient, forward, total), (forward, gradient, total)]
    assert all(dot == ("float32",) * 3 for dot in _dots(jax.make_jaxpr(_products)(x, w, g, emulated).jaxpr))
    product = jax.jit(_products)
    for one, other, left, right in zip(product(x, w, g, native), product(x, w, g, emulated), (x, g, x.T), (w, w.T, g)):
        assert one.dtype == jnp.float32
        if forward == "int8":
            assert np.array_equal(one, other)
        assert np.max(np.abs(one - other)) <= 1e-6 * np.max(np.abs(left) @ np.abs(right))
        assert np.linalg.norm(one - left @ right) > 1e-3 * np.linalg.norm(one)  # they are quantized
