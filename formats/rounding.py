"""The one rounding core: integer arithmetic on the float32 bit pattern, for every element, width and mode.

A magnitude is a 24-bit significand times a power of two. Its low `shift` bits lie below the spacing of the element, so
rounding adds the mode's increment (0 .. 2**shift - 1) and clears them; a carry walks into the exponent by itself.
Below the element's quantum (shift > 23) the result is 0 or the quantum. Nothing here is a float operation: exact in
subnormals of the target and of float32, also where the backend flushes them.
"""

from __future__ import annotations

import enum

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from formats import bits as fb
from formats.elements import Element


class Rounding(enum.Enum):
    """How a value between two representable ones goes to one of them."""

    NEAREST_EVEN = "nearest_even"
    STOCHASTIC = "stochastic"


class Overflow(enum.Enum):
    """What becomes of a value beyond the largest: the largest, or what IEEE 754 and ml_dtypes do (inf or NaN)."""

    SATURATE = "saturate"
    IEEE = "ieee"


def parse(kind: type[enum.Enum], value):
    """The member of `kind` named by a string (members pass through); ValueError lists what is accepted."""
    try:
        return kind(value)
    except ValueError:
        accepted = ", ".join(member.value for member in kind)
        raise ValueError(f"{kind.__name__.lower()}={value!r} must be one of {accepted}") from None


def as_float32(x):
    """x as float32 (float16 and bfloat16 are exact there); ValueError for any other dtype."""
    x = jnp.asarray(x)
    if x.dtype not in (jnp.float32, jnp.float16, jnp.bfloat16):
        raise ValueError(f"x has dtype {x.dtype}; float32, float16 or bfloat16 is needed")
    return x.astype(jnp.float32)


def round_to(x, element: Element, *, rounding="nearest_even", overflow="saturate", random_bits=None):
    """The values of `element` nearest to (or drawn around) x, as an array like x.

    x: float32, float16 or bfloat16 of any shape (the result is cast back to its dtype). element: fields are scalars or
    broadcast against x at equal rank. random_bits: uint32 like x, for rounding="stochastic" only, of which as many low
    bits as were dropped are used (at most 31: a probability is a multiple of 2**-31).

    nearest_even ties go to the even significand; without mantissa bits that is the larger power of two (as ml_dtypes'
    float8_e8m0fnu; P3109 goes by the code instead). NaN stays NaN, also where the format has no code for it: a diverged
    tensor must show. overflow="saturate": beyond the range, infinities included, the largest value of that sign;
    "ieee": inf where the format has it, else NaN, else the largest value.
    """
    rounding, overflow = parse(Rounding, rounding), parse(Overflow, overflow)
    if (random_bits is not None) != (rounding is Rounding.STOCHASTIC):
        raise ValueError(f"random_bits must be given exactly when rounding='stochastic', got rounding={rounding.value!r}")
    x_bits = lax.bitcast_convert_type(as_float32(x), jnp.int32)
    if random_bits is not None:
        random_bits = lax.bitcast_convert_type(random_bits, jnp.int32)
    limits = (fb.to_pattern(element.max_value), fb.to_pattern(element.min_value) & fb.MAGNITUDE)
    y_bits = round_pattern(x_bits, element, limits, rounding, overflow, random_bits)
    return lax.bitcast_convert_type(y_bits, jnp.float32).astype(jnp.asarray(x).dtype)


def round_pattern(x_bits, element: Element, limits, rounding: Rounding, overflow: Overflow, random_bits=None):
    """`round_to` on int32 patterns. limits: patterns of the largest positive and the largest negative magnitude
    (apart from `element`, because a block's limit may be subnormal in float32, where float arithmetic would lose it)."""
    magnitude = x_bits & fb.MAGNITUDE
    sign = x_bits & fb.SIGN
    rounded = _round_magnitude(magnitude, element, rounding, random_bits)
    limit = jnp.where(sign == 0, *limits)
    clipped = jnp.minimum(rounded, limit)
    sign = jnp.where((clipped != 0) | element.signed_zero, sign, 0)
    smallest = fb.to_pattern(element.min_magnitude)  # 0, but for the format without a zero
    y_bits = sign | jnp.maximum(clipped, smallest)
    if overflow is Overflow.IEEE:
        special = jnp.where(element.has_inf, fb.INFINITY, jnp.where(element.has_nan, fb.NAN, 0))
        over = (x_bits & fb.SIGN) | jnp.maximum(special, limit)
        y_bits = jnp.where((rounded > limit) & (special != 0), over, y_bits)
        y_bits = jnp.where((x_bits <= 0) & (smallest > 0), fb.NAN, y_bits)
    return jnp.where(magnitude > fb.INFINITY, x_bits, y_bits)


def _round_magnitude(magnitude, element: Element, rounding: Rounding, random_bits):
    """Magnitude patterns rounded on the element's grid, its range ignored (an infinity stays one)."""
    field = jnp.maximum(magnitude >> 23, 1)
    significand = magnitude - ((field - 1) << 23)
    # a float32 subnormal has its leading bit lower down; matters to targets with normals below 2**-126 (e8m0, E8 fnuz)
    top = jnp.where(magnitude < fb.SMALLEST_NORMAL, fb.highest_bit(magnitude), 23)
    shift = jnp.maximum(top - element.man_bits, element.quantum_exp + 150 - field)
    kept = jnp.minimum(shift, 31)
    mask = (np.int32(1) << kept) - 1
    if rounding is Rounding.STOCHASTIC:
        increment = random_bits & mask
        # a fraction of more than 31 bits keeps the 31 leading ones
        fraction = significand >> jnp.minimum(shift - kept, 31)
    else:
        last = (significand >> kept) & 1
        increment = (mask + last) >> 1  # half - 1 + last, and 0 when nothing is dropped
        fraction = significand  # shift > 31 is far below half a quantum either way
    below_quantum = jnp.where(fraction > mask - increment, fb.power_of_two(element.quantum_exp), 0)
    return jnp.where(shift > 23, below_quantum, (magnitude + increment) & ~mask)
