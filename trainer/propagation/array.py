"""Arrays that carry a power of two beside their data, and the exact arithmetic of powers of two that everything here is built on.

XLA flushes float32 subnormals and its exp2 and log2 are off by an ulp, so powers are made from exponent bits and read from them.
"""
from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# The exponent of an array that is all zero: so low that any other one wins when two are aligned ("zero has any scale").
ZERO_EXPONENT = -(1 << 14)
_BIAS, _MANTISSA_BITS = 127, 23
_LOWEST, _HIGHEST = -126, 127  # exponents of normal float32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ScaledArray:
    """The values data * 2**exponent; a pytree of two leaves, so it passes jit, vmap, scan and checkpoints as it is.

    data: a floating-point array. exponent: int32, one for the whole array (shape []) or one for each leading index (a shape that
    data.shape starts with), as layers stacked for `scan` and members of a `vmap` need it.
    """

    data: jax.Array
    exponent: jax.Array

    @property
    def shape(self):
        return self.data.shape

    @property
    def ndim(self) -> int:
        return self.data.ndim

    @property
    def size(self) -> int:
        return self.data.size

    @property
    def dtype(self):
        """That of the data."""
        return self.data.dtype

    def __array__(self, dtype=None, copy=None):
        return np.array(unscaled(self), dtype=dtype, copy=copy)


def is_scaled(x) -> bool:
    """True for a ScaledArray: the `is_leaf` of tree functions that shall not look inside."""
    return isinstance(x, ScaledArray)


def is_float(x) -> bool:
    """True for arrays and numbers of a floating-point dtype."""
    return jnp.issubdtype(jnp.result_type(x), jnp.floating)


def pow2(exponent) -> jax.Array:
    """2**exponent as float32 for int32 exponents, exact; clamped to the normal range [2**-126, 2**127]."""
    return _pow2_inside(lax.clamp(np.int32(_LOWEST), exponent, np.int32(_HIGHEST)))


def _pow2_inside(exponent) -> jax.Array:
    """2**exponent for exponents of the normal range."""
    biased = lax.add(exponent, lax.full_like(exponent, _BIAS))
    return lax.bitcast_convert_type(lax.shift_left(biased, lax.full_like(biased, _MANTISSA_BITS)), jnp.float32)


def two_factors(exponent) -> tuple[jax.Array, jax.Array]:
    """Two float32 powers of two whose product is 2**exponent, clamped to [2**-252, 2**254]: one alone cannot bring 2**100 down by 200."""
    exponent = lax.clamp(np.int32(2 * _LOWEST), exponent, np.int32(2 * _HIGHEST))
    half = lax.shift_right_arithmetic(exponent, lax.full_like(exponent, 1))
    return _pow2_inside(half), _pow2_inside(lax.sub(exponent, half))


def floor_log2(x) -> jax.Array:
    """floor(log2 |x|) of float32, int32, exact also for subnormals; ZERO_EXPONENT for 0, and 0 for what is not finite."""
    magnitude = lax.bitcast_convert_type(x, jnp.int32) & 0x7FFFFFFF
    biased = magnitude >> _MANTISSA_BITS
    subnormal = (31 - lax.clz(magnitude)) + (_LOWEST - _MANTISSA_BITS)
    exponent = jnp.where(biased == 0, subnormal, biased - _BIAS)
    return jnp.where(magnitude == 0, ZERO_EXPONENT, jnp.where(biased == 255, 0, exponent))


def trailing(exponent, ndim: int):
    """An exponent for each leading index, shaped to broadcast against data of `ndim` dimensions."""
    return exponent.reshape(exponent.shape + (1,) * (ndim - exponent.ndim)) if exponent.ndim else exponent


def shift(x, exponent):
    """x * 2**exponent for float32 or float64 x; exact unless the result leaves the normal range. `exponent`: int, or int32 array
    that broadcasts against the leading dimensions of x."""
    if isinstance(exponent, int):
        if exponent == 0:
            return x
        steps = [max(_LOWEST, min(_HIGHEST, exponent))]
        if exponent != steps[0]:
            steps.append(max(_LOWEST, min(_HIGHEST, exponent - steps[0])))
        for step in steps:
            x = x * x.dtype.type(2.0**step)
        return x
    exponent = trailing(exponent, x.ndim)
    first, second = two_factors(exponent)
    return times(times(x, first), second)


def times(x, factor):
    """x times a factor of its rank or a scalar."""
    factor = factor if factor.dtype == x.dtype else factor.astype(x.dtype)
    return lax.mul(x, factor if factor.shape == x.shape else jnp.broadcast_to(factor, x.shape) if factor.ndim else lax.broadcast(factor, x.shape))


def wide(x):
    """x in the dtype that rules compute in: float32, or x's own where that is wider."""
    return x if x.dtype.itemsize >= 4 else x.astype(jnp.float32)


def normalized(x32):
    """(x / 2**k, k) with the largest magnitude in [1, 2), for float32 x with subnormals; k is int32, ZERO_EXPONENT if all is zero."""
    magnitude = lax.bitcast_convert_type(x32, jnp.int32) & 0x7FFFFFFF
    top = lax.bitcast_convert_type(jnp.max(magnitude, initial=0), jnp.float32)
    exponent = floor_log2(top)
    down = jnp.where(exponent == ZERO_EXPONENT, 0, -exponent)
    # A subnormal's bits are an integer count of 2**-149; arithmetic on the float itself would see zero.
    from_bits = shift(magnitude.astype(jnp.float32), down + (_LOWEST - _MANTISSA_BITS))
    from_bits = jnp.where(lax.bitcast_convert_type(x32, jnp.int32) < 0, -from_bits, from_bits)
    is_subnormal = (magnitude >> _MANTISSA_BITS) == 0
    return jnp.where(is_subnormal, from_bits, shift(x32, down)), exponent


def _scale_leaf(x, exponent, leading: int, dtype):
    if is_scaled(x) or not is_float(x):
        return x
    x = jnp.asarray(x)
    if leading:
        if x.ndim < leading:
            raise ValueError(f"leading={leading} needs arrays of at least as many dimensions; got one of shape {x.shape}")
        one = lambda y, e: _scale_leaf(y, e, leading - 1, dtype)  # noqa: E731
        return jax.vmap(one, in_axes=(0, None))(x, exponent)
    dtype = jnp.dtype(dtype or x.dtype)
    if exponent is not None:
        exponent = jnp.asarray(exponent, jnp.int32)
        return ScaledArray(shift(wide(x), -exponent).astype(dtype), exponent)
    if x.dtype.itemsize > 4:
        top = jnp.max(jnp.abs(x), initial=0)
        exponent = floor_log2(top.astype(jnp.float32))
        return ScaledArray(shift(x, jnp.where(exponent == ZERO_EXPONENT, 0, -exponent)).astype(dtype), exponent)
    y, top = normalized(wide(x))
    below = floor_log2(jnp.sqrt(jnp.mean(y * y))) if x.size else jnp.int32(0)
    below = jnp.where(top == ZERO_EXPONENT, 0, below)
    return ScaledArray(shift(y, -below).astype(dtype), top + below)


def scaled(tree, exponent=None, *, leading: int = 0, dtype=None):
    """The floating-point arrays of a tree as ScaledArrays; integers, booleans, keys and ScaledArrays pass through.

    exponent: the int32 exponent, by default the one that brings the data's RMS into [1, 2) (all-zero arrays get ZERO_EXPONENT,
    which gives way to any other scale). leading: how many leading dimensions have an exponent for each index. dtype: of the data,
    by default that of the array. Exact, also for subnormals, where dtype holds the array's digits.
    """
    return jax.tree.map(lambda x: _scale_leaf(x, exponent, leading, dtype), tree, is_leaf=is_scaled)


def _unscale_leaf(x, dtype):
    if not is_scaled(x):
        return x
    data = wide(jnp.asarray(x.data))
    exponent = trailing(jnp.asarray(x.exponent, jnp.int32), data.ndim)
    value = shift(data, exponent)
    if data.dtype == jnp.float32:
        # What is below the normal range is put together from its bits: XLA's product would be flushed to zero.
        units = jnp.round(shift(jnp.abs(data), exponent + (_MANTISSA_BITS - _LOWEST)))
        tiny = units < 2.0**_MANTISSA_BITS
        bits = jnp.where(tiny, units, 0.0).astype(jnp.int32) | (lax.bitcast_convert_type(data, jnp.int32) & jnp.int32(-(2**31)))
        value = jnp.where(tiny, lax.bitcast_convert_type(bits, jnp.float32), value)
    return value if dtype is None else value.astype(dtype)


def unscaled(tree, dtype=None):
    """The values of the ScaledArrays of a tree; everything else passes through. In float32 (float64 for float64 data), whatever the
    dtype of the data, because its range is what the exponent was for; `dtype` asks for another. Values beyond the range become
    infinite or zero; float32 subnormals are exact."""
    return jax.tree.map(lambda x: _unscale_leaf(x, dtype), tree, is_leaf=is_scaled)
