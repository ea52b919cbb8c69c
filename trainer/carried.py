"""Training with scales carried beside the data: where scale propagation meets the step.

The forward and backward pass run under `propagate_scales`, with all data in the policy's `data_dtype` and no loss scale. What lives
between steps (master weights, Adam's moments) may be kept as narrow ScaledArrays; the optimizer computes in float32.
"""
from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from trainer.precision import PrecisionPolicy
from trainer.propagation import ScaledArray, floor_log2, is_scaled, pow2, propagate_scales, shift, unscaled
from trainer.propagation.rescale import Statistic, to_unit

STACKED = "layers"  # parameters below this key have a leading dimension of layers, and a scale for each
TOP = 13  # moments are stored with their largest value at 2**13: float16 reaches from there down to 2**-24


def under_policy(function: Callable, policy: PrecisionPolicy) -> Callable:
    """function(params, *args), whose floating-point results are float32, run as the policy says: plainly, or with scales carried.
    The params passed in may be ScaledArrays; arrays that function closes over stay as they are."""
    if policy.data_dtype is None:
        return lambda params, *args: function(unscaled(params), *args)
    # `_with_scales` and `stored_params` have brought the data to unit scale.
    transformed = propagate_scales(function, data_dtype=policy.data_dtype, unit_inputs=True)
    return lambda params, *args: _flushed(transformed(_with_scales(params, policy.data_dtype), *args))


def _flushed(tree):
    """As `unscaled`, but what is below the normal range of float32 becomes zero: an optimizer that comes after would flush it anyway."""
    return jax.tree.map(lambda x: shift(x.data.astype(jnp.float32), x.exponent) if is_scaled(x) else x, tree, is_leaf=is_scaled)


def _with_scales(params, dtype=None):
    """Parameters, float32 whose squares are normal numbers, as ScaledArrays with the RMS of the data in [1, 2), stacked layers with one
    exponent each; those that are ScaledArrays stay."""

    def scale(path, x):
        if is_scaled(x):
            return x
        data, exponent = to_unit(x, Statistic.RMS, 1 if path[0].key == STACKED else 0)
        return ScaledArray(data if dtype is None else data.astype(dtype), exponent)

    return jax.tree_util.tree_map_with_path(scale, params, is_leaf=is_scaled)


def stored_params(params, policy: PrecisionPolicy):
    """float32 parameters as the state holds them."""
    return params if policy.master_weights is None else _with_scales(params, policy.master_weights)


def stored_moments(opt_state, policy: PrecisionPolicy):
    """A float32 optimizer state as the state holds it: Adam's first (`mu`) and second (`nu`) moments as ScaledArrays."""
    dtypes = {"mu": policy.adam_m, "nu": policy.adam_v}

    def store(path, x):
        dtype = next((dtypes[key.name] for key in path if getattr(key, "name", None) in dtypes), None)
        if dtype is None:
            return x
        stacked = any(getattr(key, "key", None) == STACKED for key in path)
        data, exponent = (jax.vmap(_to_top) if stacked else _to_top)(x)
        return ScaledArray(data.astype(dtype), exponent)

    return jax.tree_util.tree_map_with_path(store, opt_state)


def _to_top(x):
    """float32 (data, exponent) with the largest magnitude of the data in [2**TOP, 2**(TOP + 1)): second moments of one tensor differ by
    many powers of two, and one that is flushed to zero divides its update by epsilon."""
    exponent = floor_log2(jnp.max(jnp.abs(x), initial=0))
    exponent = jnp.where(jnp.max(jnp.abs(x), initial=0) > 0, exponent - TOP, 0)
    half = -exponent // 2
    return x * pow2(half) * pow2(-exponent - half), exponent
