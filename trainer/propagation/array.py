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
BIAS, _MANTISSA_BITS = 127, 23
_LOWEST, _HIGHEST = -126, 127  # exponents of normal float32
_INFINITE = 0x7F800000
_HEADROOM = 6  # no data of a narrow dtype starts above 2**7, whose square is a float16, as is itself an E4M3


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
    return pow2_of_biased(lax.add(exponent, like(exponent, BIAS)))


def pow2_of_biased(biased, lowest: int = 1) -> jax.Array:
    """2**(biased - 127) as float32 for int32, exact; clamped to the normal range, or with lowest=0 to zero at its lower end."""
    biased = lax.clamp(np.int32(lowest), biased, np.int32(_HIGHEST + BIAS))
    return lax.bitcast_convert_type(lax.shift_left(biased, like(biased, _MANTISSA_BITS)), jnp.float32)


def like(x, number: int):
    """An int32 number as an argument of lax operations beside x."""
    return lax.broadcast(np.int32(number), x.shape) if x.shape else np.int32(number)


def _pow2_inside(exponent) -> jax.Array:
    """2**exponent for exponents of the normal range."""
    biased = lax.add(exponent, like(exponent, BIAS))
    return lax.bitcast_convert_type(lax.shift_left(biased, like(biased, _MANTISSA_BITS)), jnp.float32)


def two_factors(exponent) -> tuple[jax.Array, jax.Array]:
    """Two float32 powers of two whose product is 2**exponent, clamped to [2**-252, 2**254]: one alone cannot bring 2**100 down by 200."""
    exponent = lax.clamp(np.int32(2 * _LOWEST), exponent, np.int32(2 * _HIGHEST))
    half = lax.shift_right_arithmetic(exponent, like(exponent, 1))
    return _pow2_inside(half), _pow2_inside(lax.sub(exponent, half))


def floor_log2(x) -> jax.Array:
    """floor(log2 |x|) of float32 or float64, int32, exact also for float32's subnormals; ZERO_EXPONENT for 0, and 0 for what is not finite."""
    if x.dtype.itemsize > 4:
        return jnp.where(x == 0, ZERO_EXPONENT, jnp.where(jnp.isfinite(x), jnp.frexp(x)[1] - 1, 0))
    magnitude = lax.bitcast_convert_type(x, jnp.int32) & 0x7FFFFFFF
    biased = magnitude >> _MANTISSA_BITS
    subnormal = (31 - lax.clz(magnitude)) + (_LOWEST - _MANTISSA_BITS)
    exponent = jnp.where(biased == 0, subnormal, biased - BIAS)
    return jnp.where(magnitude == 0, ZERO_EXPONENT, jnp.where(biased == 255, 0, exponent))


def trailing(exponent, ndim: int):
    """An exponent for each leading index, shaped to broadcast against data of `ndim` dimensions."""
    return exponent.reshape(exponent.shape + (1,) * (ndim - exponent.ndim)) if exponent.ndim else exponent


def shift(x, exponent):
    """x * 2**exponent for float32 or float64 x; exact unless the result leaves the normal range. `exponent`: int, or int32 array
    that broadcasts against the leading dimensions of x."""
    if x.dtype.itemsize > 4:
        return jnp.ldexp(x, exponent if isinstance(exponent, int) else trailing(exponent, x.ndim))
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


def normalized(x, leading: int = 0, slack: int = 0):
    """(x / 2**k, k) with the largest finite magnitude in [1, 2), for each index of so many leading dimensions of float32 or float64 x,
    exact; k is int32, ZERO_EXPONENT where all is zero. slack: k from 0 up to this are left at 0."""
    if not x.size:
        return x, jnp.full(x.shape[:leading], ZERO_EXPONENT, jnp.int32)
    if x.dtype.itemsize > 4:
        k = floor_log2(jnp.max(jnp.abs(x), axis=tuple(range(leading, x.ndim)), where=jnp.isfinite(x), initial=0))
        k = jnp.where((k >= 0) & (k <= slack), 0, k)
        return shift(x, jnp.where(k == ZERO_EXPONENT, 0, -k)), k
    bits = lax.bitcast_convert_type(x, jnp.int32)
    magnitude = lax.bitwise_and(bits, like(bits, 0x7FFFFFFF))
    finite = lax.select(lax.lt(magnitude, like(bits, _INFINITE)), magnitude, like(bits, 0))
    top = lax.reduce_max(finite, tuple(range(leading, x.ndim)))
    biased = lax.shift_right_logical(top, like(top, _MANTISSA_BITS))
    of_subnormal = lax.sub(like(top, 31 + _LOWEST - _MANTISSA_BITS + BIAS), lax.clz(top))
    biased = lax.select(lax.eq(biased, like(top, 0)), of_subnormal, biased)
    biased = lax.min(biased, like(top, 2 * BIAS - 1))  # 2**-127 is no normal number: the largest ones come to [2, 4)
    if slack:
        biased = lax.select(lax.eq(lax.clamp(np.int32(BIAS), biased, np.int32(BIAS + slack)), biased), like(top, BIAS), biased)
    # A subnormal's bits are an integer count of 2**-149; arithmetic on the float itself would see zero.
    down = pow2_of_biased(lax.sub(like(top, 2 * BIAS), biased))
    of_counts = pow2_of_biased(lax.sub(like(top, 2 * BIAS + _LOWEST - _MANTISSA_BITS), biased), lowest=0)
    counts = lax.convert_element_type(magnitude, jnp.float32)
    counts = lax.select(lax.lt(bits, like(bits, 0)), lax.neg(counts), counts)
    is_subnormal = lax.lt(magnitude, like(bits, 1 << _MANTISSA_BITS))
    data = lax.select(is_subnormal, times(counts, trailing(of_counts, x.ndim)), times(x, trailing(down, x.ndim)))
    return data, lax.select(lax.eq(top, like(top, 0)), like(top, ZERO_EXPONENT), lax.sub(biased, like(top, BIAS)))


def brought_near(x, leading: int, slack: int):
    """(x / 2**k, k) with the largest magnitude within 2**-slack and 2**(slack + 1), for each index of so many leading dimensions of float32
    or float64 x; int32 k is 0 where it is there already, and where all is zero or something is not finite. Cheaper than `normalized`."""
    top = lax.reduce_max(lax.abs(x), tuple(range(leading, x.ndim)))
    biased = lax.shift_right_logical(lax.bitcast_convert_type(top.astype(jnp.float32), jnp.int32), like(top, _MANTISSA_BITS))
    stays = lax.eq(lax.clamp(np.int32(BIAS - slack), biased, np.int32(BIAS + slack)), biased)
    stays = lax.bitwise_or(stays, lax.eq(lax.clamp(np.int32(1), biased, np.int32(2 * BIAS)), biased) ^ True)
    k = lax.select(stays, like(top, 0), lax.min(lax.sub(biased, like(top, BIAS)), like(top, -_LOWEST)))  # 2**-127 is no normal number
    return times(x, trailing(pow2_of_biased(lax.sub(like(top, BIAS), k)), x.ndim)), k


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
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"scaled: dtype={dtype.name}; accepted: a floating-point dtype")
    if exponent is not None:
        if not jnp.issubdtype(jnp.result_type(exponent), jnp.integer):
            raise ValueError(f"scaled: exponent={exponent}; accepted: integers (the value is data * 2**exponent)")
        exponent = jnp.asarray(exponent, jnp.int32)
        return ScaledArray(shift(wide(x), -exponent).astype(dtype), exponent)
    y, top = normalized(wide(x))
    below = floor_log2(jnp.sqrt(jnp.mean(y * y))) if x.size else jnp.int32(0)
    if dtype.itemsize < 4:
        below = jnp.maximum(below, -_HEADROOM)
    below = jnp.where(top == ZERO_EXPONENT, 0, below)
    return ScaledArray(shift(y, -below).astype(dtype), top + below)


def scaled(tree, exponent=None, *, leading: int = 0, dtype=None):
    """The floating-point arrays of a tree as ScaledArrays; integers, booleans, keys and ScaledArrays pass through.

    exponent: the int32 exponent, by default the one that brings the data's RMS into [1, 2), or in a narrow dtype its largest magnitude
    below 2**7, if that is lower (all-zero arrays get ZERO_EXPONENT, which gives way to any other scale). leading: how many leading
    dimensions have an exponent for each index. dtype: of the data, by default that of the array. Exact, also for subnormals, where dtype
    holds the array's digits.
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
