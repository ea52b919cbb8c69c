"""Learned step size quantization (LSQ, Esser et al. 2020): the scale of a quantizer is a parameter.

What is trained is the step over the one that it started from, so that it begins at 1 whatever the tensor's size and one learning rate suits
all. Adam does not see the factor; plain gradient descent would.
"""
from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

MEAN_OVER_RMS = np.float32((2 / np.pi) ** 0.5)  # of Gaussian data


def initial_step(rms, largest) -> jax.Array:
    """2 <|v|> / sqrt(Q_P) (section 2.1), of Gaussian data of that RMS; largest: Q_P, the largest code. float32."""
    return 2 * MEAN_OVER_RMS * jnp.asarray(rms, jnp.float32) / jnp.sqrt(jnp.asarray(largest, jnp.float32))


def step_gradient(gradient, x, values, step, element, num_features: int) -> jax.Array:
    """The gradient of the step from that of the quantized tensor, all [A, B] (equations 3 and section 2.2): inside the range what rounding
    added, outside of it the end of the range, times 1 / sqrt(num_features Q_P). num_features: of weights all, of activations those of a token."""
    low, high = element.limits
    v = x / step
    slope = jnp.where((v <= low) | (v >= high), values, values - v)
    return jnp.sum(gradient * slope) * (1 / jnp.sqrt(num_features * jnp.asarray(high, jnp.float32)))
