"""Training with scales carried beside the data: where scale propagation meets the step.

The forward and backward pass run under `propagate_scales`, with all data in the policy's `data_dtype` and no loss scale. What lives
between steps (master weights, Adam's moments) may be kept as narrow ScaledArrays, whose exponents are then the ones that are carried.
"""
from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from trainer import scaled_state, stored
from trainer.precision import PrecisionPolicy
from trainer.propagation import is_scaled, propagate_scales, shift


def under_policy(function: Callable, policy: PrecisionPolicy) -> Callable:
    """function(params, *args), whose floating-point results are float32, run as the policy says: plainly, or with scales carried.
    The params passed in may be ScaledArrays; arrays that function closes over stay as they are."""
    if policy.data_dtype is None:
        return lambda params, *args: function(stored.wide(params), *args)
    # `with_scales` has brought the data to unit scale.
    transformed = propagate_scales(function, data_dtype=policy.data_dtype, unit_inputs=True)
    return lambda params, *args: _flushed(transformed(scaled_state.with_scales(stored.narrow_only(params), policy.data_dtype), *args))


def _flushed(tree):
    """As `unscaled`, but what is below the normal range of float32 becomes zero: an optimizer that comes after would flush it anyway."""
    return jax.tree.map(lambda x: shift(x.data.astype(jnp.float32), x.exponent) if is_scaled(x) else x, tree, is_leaf=is_scaled)
