"""Arithmetic on float32 bit patterns, in integers only.

XLA on CPU flushes float32 subnormals in every float operation (`exp2(-127)` is 0, `x / 2**-127` is inf), so a number
that may be subnormal is never touched by a float instruction here: it is an int32 "pattern" (the 31 magnitude bits).
Each function works on Python ints and numpy values (catalogue entries are made at import, before any backend exists)
and on traced jax scalars alike.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

MAGNITUDE = np.int32(0x7FFFFFFF)
SIGN = np.int32(-0x80000000)
INFINITY = np.int32(0x7F800000)
NAN = np.int32(0x7FC00000)
SMALLEST_NORMAL = np.int32(0x00800000)
MIN_EXPONENT = -149  # of the smallest float32 subnormal


def is_traced(*values) -> bool:
    """True if any value is a jax array or tracer (then jnp does the arithmetic, else numpy)."""
    return any(isinstance(value, jax.Array) for value in values)


def to_pattern(value):
    """float32 -> int32 of the same bits (sign included)."""
    if is_traced(value):
        return lax.bitcast_convert_type(value, jnp.int32)
    return np.asarray(value, np.float32).view(np.int32)[()]


def to_value(pattern):
    """int32 pattern -> float32 of the same bits."""
    if is_traced(pattern):
        return lax.bitcast_convert_type(pattern, jnp.float32)
    return np.asarray(pattern, np.int32).view(np.float32)[()]


def highest_bit(n):
    """floor(log2(n)) of int32 0 < n < 2**24, through the exact conversion to float32 (an integer is never subnormal)."""
    n = jnp.asarray(n, jnp.int32) if is_traced(n) else np.asarray(n, np.int32)
    return (to_pattern(n.astype(np.float32)) >> 23) - 127


def pattern(n, exponent):
    """Pattern of n * 2**exponent for an int32 0 <= n <= 2**24; INFINITY above the float32 range.

    Below the float32 grid (multiples of 2**-149) low bits of n are dropped; no caller asks for that.
    """
    xp = jnp if is_traced(n, exponent) else np
    n, exponent = xp.asarray(n, np.int32), xp.asarray(exponent, np.int32)
    top = highest_bit(n)
    normal = to_pattern(n.astype(np.float32)) + (xp.clip(exponent, -126 - top, 127 - top) << 23)
    up = xp.clip(exponent - MIN_EXPONENT, 0, 23)
    down = xp.clip(MIN_EXPONENT - exponent, 0, 31)
    subnormal = (n << up) >> down
    result = xp.where(top + exponent < -126, subnormal, xp.where(top + exponent > 127, INFINITY, normal))
    result = xp.where(n == 0, np.int32(0), result)
    return result if xp is jnp else np.int32(result)


def power_of_two(exponent):
    """Pattern of 2**exponent, -149 <= exponent <= 127; exact where float `exp2` flushes."""
    xp = jnp if is_traced(exponent) else np
    exponent = xp.asarray(exponent, np.int32)
    one = xp.asarray(1, np.int32)
    return xp.where(exponent < -126, one << xp.clip(exponent - MIN_EXPONENT, 0, 23), (exponent + 127) << 23)


def largest(man_bits):
    """Pattern of the largest finite float32 that has man_bits mantissa bits."""
    xp = jnp if is_traced(man_bits) else np
    man_bits = xp.asarray(man_bits, np.int32)
    one = xp.asarray(1, np.int32)
    return np.int32(254 << 23) | (((one << man_bits) - 1) << (23 - man_bits))


# Extended patterns let the exponent field run below zero, where subnormals are normalised. float(n) of a subnormal's
# pattern n is 2**149 times the subnormal; such integers convert exactly and are never subnormal as floats.
_LIFT = np.int32(149 << 23)
EXTENDED_ZERO = -_LIFT  # far below every other number, the smallest of which has field -22
_INTEGERS = np.float32(2.0**23)  # n + 2**23 has n in its mantissa, for n < 2**23


def to_extended(magnitude):
    """Extended pattern of an int32 pattern."""
    lifted = to_pattern(jnp.asarray(magnitude).astype(jnp.float32)) - _LIFT
    return jnp.where(magnitude < SMALLEST_NORMAL, lifted, magnitude)


def from_extended(extended):
    """Pattern of an extended pattern that is zero or a multiple of 2**-149."""
    subnormal = to_pattern(to_value(extended + _LIFT) + _INTEGERS) - to_pattern(_INTEGERS)  # conversion to int costs more
    return jnp.where(extended < SMALLEST_NORMAL, subnormal, extended)


def scale_exact(value, exponent):
    """value * 2**exponent (float32, int32) by integers: exact also where either is a float32 subnormal. The product must be zero,
    infinite, NaN or a multiple of 2**-149 below 2**128."""
    bits = to_pattern(value)
    magnitude = bits & MAGNITUDE
    moved = from_extended(to_extended(magnitude) + (exponent << 23))
    return to_value((bits & SIGN) | jnp.where((magnitude == 0) | (magnitude >= INFINITY), magnitude, moved))
