"""The one rounding core: integer arithmetic on the float32 bit pattern, for every element, width, mode and block scale.

A magnitude is handled as its "extended" pattern: the float32 pattern with the exponent field let run below zero, so that
float32 subnormals are normalised like everything else. Its low `shift` bits lie below the spacing of the element: rounding
adds the mode's increment (0 .. 2**shift - 1) and clears them; a carry walks into the exponent by itself. Below the
element's quantum the result is zero or the quantum. A power-of-two scale moves the grid, by one addition to its numbers.
No float arithmetic: exact in subnormals of the target and of float32, also where the backend flushes them.
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
    """How a value between two representable ones goes to one of them (IEEE 754 names where it has one)."""

    NEAREST_EVEN = "nearest_even"
    NEAREST_AWAY = "nearest_away"
    NEAREST_ZERO = "nearest_zero"
    TOWARD_ZERO = "toward_zero"
    TOWARD_POSITIVE = "toward_positive"
    TOWARD_NEGATIVE = "toward_negative"
    TO_ODD = "to_odd"
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
    """x rounded to the values of `element`, as an array like x.

    x: float32, float16 or bfloat16 of any shape (the result is cast back to its dtype). element: fields are scalars or
    broadcast against x at equal rank. random_bits: uint32 like x, for rounding="stochastic" only: the probability of
    going up is exactly the dropped fraction (below the quantum, that fraction truncated to a multiple of 2**-31).

    nearest_even ties go to the even significand; without mantissa bits that is the larger power of two (as ml_dtypes'
    float8_e8m0fnu; P3109 goes by the code instead). NaN stays NaN, also where the format has no code for it: a diverged
    tensor must show. overflow="saturate": beyond the range, infinities included, the largest value of that sign;
    "ieee": inf where the format has it, else NaN, else the largest value; modes that round inward stop at the largest.
    """
    rounding, overflow = parse(Rounding, rounding), parse(Overflow, overflow)
    if (random_bits is not None) != (rounding is Rounding.STOCHASTIC):
        raise ValueError(f"random_bits must be given exactly when rounding='stochastic', got rounding={rounding.value!r}")
    x_bits = fb.to_pattern(as_float32(x))
    y_bits = round_pattern(x_bits, element, rounding, overflow, random_bits)
    return fb.to_value(y_bits).astype(jnp.asarray(x).dtype)


def round_pattern(x_bits, element: Element, rounding: Rounding, overflow: Overflow, random_bits=None, exponent=None):
    """`round_to` on int32 float32-patterns. With exponent (int32, -127 .. 127, broadcasting against x_bits) the grid and
    its range are those of the element times 2**exponent; its largest value must then be below 2**128."""
    magnitude = x_bits & fb.MAGNITUDE
    extended = _extended(magnitude)
    quantum_exp = element.quantum_exp
    high, low = _extended(fb.to_pattern(element.max_value)), _extended(fb.to_pattern(element.min_value) & fb.MAGNITUDE)
    if exponent is not None:
        quantum_exp = quantum_exp + exponent
        high, low = (jnp.where(limit == _ZERO, _ZERO, limit + (exponent << 23)) for limit in (high, low))
    if random_bits is not None:
        random_bits = lax.bitcast_convert_type(random_bits, jnp.int32)
    limit = jnp.where(x_bits >= 0, high, low)
    rounded = _round_extended(extended, x_bits, element.man_bits, quantum_exp, rounding, random_bits)
    above_zero = _reaches_quantum(extended, x_bits, quantum_exp, rounding, random_bits)
    smallest = fb.to_pattern(element.min_magnitude)
    y_bits = (x_bits & fb.SIGN) | jnp.where(above_zero, _standard(jnp.minimum(rounded, limit)), smallest)
    y_bits = jnp.where(y_bits == fb.SIGN, jnp.where(element.signed_zero, fb.SIGN, smallest), y_bits)
    if overflow is Overflow.IEEE:
        special = jnp.where(element.has_inf, fb.INFINITY, jnp.where(element.has_nan, fb.NAN, 0))
        beyond = (rounded > limit) & (special != 0) & (_leaves_range(x_bits, rounding) | (magnitude == fb.INFINITY))
        y_bits = jnp.where(beyond, (x_bits & fb.SIGN) | special, y_bits)
        y_bits = jnp.where((x_bits <= 0) & (smallest > 0), fb.NAN, y_bits)
    return jnp.where(magnitude > fb.INFINITY, x_bits, y_bits)


# Patterns of float(n) for n = pattern of a subnormal; their value is 2**149 times the subnormal's. An integer converts to a
# float and back exactly and is never subnormal, so this conversion, alone among float operations, is safe.
_LIFT = np.int32(149 << 23)
_ZERO = -_LIFT  # what becomes of zero: far below every other number (the smallest has field -22)


def _extended(magnitude):
    """Extended pattern of a float32 pattern."""
    lifted = fb.to_pattern(jnp.asarray(magnitude).astype(jnp.float32)) - _LIFT
    return jnp.where(magnitude < fb.SMALLEST_NORMAL, lifted, magnitude)


def _standard(extended):
    """float32 pattern of an extended pattern that is zero or a multiple of 2**-149."""
    subnormal = fb.to_value(extended + _LIFT).astype(jnp.int32)
    return jnp.where(extended < fb.SMALLEST_NORMAL, subnormal, extended)


def _leaves_range(x_bits, rounding: Rounding):
    """bool: whether a finite value past the largest one overflows (IEEE 754-2019 section 7.4: not if rounded inward)."""
    if rounding is Rounding.TOWARD_POSITIVE:
        return x_bits >= 0
    if rounding is Rounding.TOWARD_NEGATIVE:
        return x_bits < 0
    return rounding is not Rounding.TOWARD_ZERO


def _round_extended(extended, x_bits, man_bits, quantum_exp, rounding: Rounding, random_bits):
    """Extended pattern rounded on the element's grid, its range ignored (infinity stays); below the quantum, the quantum."""
    lifted = jnp.maximum(extended, (quantum_exp + 127) << 23)
    shift = jnp.maximum(23 - man_bits, quantum_exp + 150 - (lifted >> 23))
    shift = shift & 31  # it is 0 .. 23; the mask tells the compiler
    mask = (np.int32(1) << shift) - 1
    odd = ((lifted | fb.SMALLEST_NORMAL) >> shift) & 1  # the last kept bit; the implicit one if that is all that is kept
    return (lifted + _increment(rounding, x_bits, mask, odd, random_bits)) & ~mask


def _increment(rounding: Rounding, x_bits, mask, odd, random_bits):
    """What is added before the bits under `mask` are cleared; 0 wherever the mask is 0."""
    match rounding:
        case Rounding.NEAREST_EVEN:
            return (mask + odd) >> 1
        case Rounding.NEAREST_AWAY:
            return (mask + 1) >> 1
        case Rounding.NEAREST_ZERO:
            return mask >> 1
        case Rounding.TOWARD_ZERO:
            return jnp.zeros_like(mask)
        case Rounding.TOWARD_POSITIVE:
            return jnp.where(x_bits >= 0, mask, 0)
        case Rounding.TOWARD_NEGATIVE:
            return jnp.where(x_bits >= 0, 0, mask)
        case Rounding.TO_ODD:
            return jnp.where(odd != 0, 0, mask)
        case Rounding.STOCHASTIC:
            return random_bits & mask


def _reaches_quantum(extended, x_bits, quantum_exp, rounding: Rounding, random_bits):
    """bool: False where x goes to zero: True at or above the quantum, the mode's choice below it, False for zero."""
    quantum = (quantum_exp + 127) << 23
    half = quantum - fb.SMALLEST_NORMAL
    match rounding:
        case Rounding.NEAREST_EVEN | Rounding.NEAREST_ZERO:
            return extended > half
        case Rounding.NEAREST_AWAY:
            return extended >= half
        case Rounding.TOWARD_ZERO:
            return extended >= quantum
        case Rounding.TOWARD_POSITIVE:
            return jnp.where(x_bits >= 0, x_bits > 0, extended >= quantum)
        case Rounding.TOWARD_NEGATIVE:
            return jnp.where(x_bits >= 0, extended >= quantum, x_bits != fb.SIGN)
        case Rounding.TO_ODD:
            return (x_bits & fb.MAGNITUDE) > 0
        case Rounding.STOCHASTIC:
            # x / quantum in units of 2**-31, against 31 random bits
            significand = (extended & np.int32(0x7FFFFF)) | fb.SMALLEST_NORMAL
            away = jnp.minimum(quantum_exp + 126 - (extended >> 23), 31) & 31  # anything where x is not below the quantum
            chance = (significand << 7) >> away
            return (extended >= quantum) | ((random_bits & fb.MAGNITUDE) < chance)
