"""The three products of a linear layer, compiled, and what they must be: shared by the tests of scales.

Shapes: N tokens (rows), K inputs, M outputs.
"""
from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from trainer.linear import linear
from trainer.scales import Meter, Site

N, K, M = 32, 48, 40
FP8 = {"weights": "e4m3fn", "activations": "e4m3fn", "output_gradients": "e5m2"}


@partial(jax.jit, static_argnames="rows")
def products(x, w, dy, policy, remembered, rows=None):
    """y, dx, dw, and the amax that the meter saw, by role."""
    meter = Meter({role: jnp.float32(0.0) for role in remembered})

    def product(x, w, meter):
        return linear(x, w, policy, rows=rows, site=Site(remembered, meter=meter))

    y, backward = jax.vjp(product, jnp.asarray(x), jnp.asarray(w), meter)
    dx, dw, seen = backward(jnp.asarray(dy))
    return y, dx, dw, seen.ranges


def assert_products(found, x, w, dy, quantize):
    """y, dx, dw are the products of what numpy's quantizers (role, contracted dim) give, to what float32 accumulation allows."""
    def q(role, tensor, contract):
        return quantize[role](tensor, contract)

    pairs = ((q("activations", x, 1), q("weights", w, 0)), (q("output_gradients", dy, 1), q("weights", w, 1).T),
             (q("activations", x, 0).T, q("output_gradients", dy, 0)))  # fmt: skip
    for what, got, (left, right) in zip(("y", "dx", "dw"), found, pairs):
        error, size = np.abs(np.asarray(got, np.float64) - left @ right), np.abs(left) @ np.abs(right)
        assert np.all(error <= 2e-6 * size), what
