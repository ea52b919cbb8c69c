"""State as narrow ScaledArrays: one exponent for a tensor, for every layer where layers are stacked."""
from __future__ import annotations

import jax
import jax.numpy as jnp

from trainer.propagation import ScaledArray, floor_log2, is_scaled, pow2
from trainer.propagation.rescale import Statistic, to_unit

STACKED = "layers"  # parameters below this key have a leading dimension of layers, and a scale for each
TOP = 13  # moments are stored with their largest value at 2**13: float16 reaches from there down to 2**-24


def with_scales(params, dtype=None):
    """Parameters, float32 whose squares are normal numbers, as ScaledArrays with the RMS of the data in [1, 2), stacked layers with one
    exponent each; those that are ScaledArrays stay."""

    def scale(path, x):
        if is_scaled(x):
            return x
        data, exponent = to_unit(x, Statistic.RMS, 1 if path[0].key == STACKED else 0)
        return ScaledArray(data if dtype is None else data.astype(dtype), exponent)

    return jax.tree_util.tree_map_with_path(scale, params, is_leaf=is_scaled)


def scaled_moments(opt_state, dtypes: dict[str, str | None]):
    """A float32 optimizer state with the moments `mu` and `nu` as ScaledArrays, where dtypes names one for them."""

    def store(path, x):
        dtype = next((dtypes.get(key.name) for key in path if getattr(key, "name", None) in dtypes), None)
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
