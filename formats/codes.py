"""The codes of grid elements: the bit patterns that hardware, ml_dtypes and the OCP specifications give to values.

Minifloats are sign | exponent field | mantissa, integers two's complement, float8_e8m0fnu a biased exponent, float32 itself. Integer
arithmetic on patterns throughout: a target's subnormals may be float32 subnormals, which XLA on CPU would flush.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax

from formats import bits as fb
from formats.elements import Element


def stored_bits(element: Element) -> int:
    """Width of a code, sign included. ValueError if the element's widths are traced."""
    if fb.is_traced(element.bits):
        raise ValueError("codes of an element with traced widths have no fixed size; give concrete widths")
    return int(element.bits)


def to_codes(y, element: Element, width: int):
    """Codes of float32 values that the element has (as rounding leaves them): uint8, uint16 or uint32 like y, by width (1..32).

    NaN is the quiet NaN of the format, its sign kept (IEEE variants), its one NaN (fn, fnuz, e8m0), or code 0 where it has none.
    """
    bits = fb.to_pattern(y)
    magnitude = bits & fb.MAGNITUDE
    codes = jnp.where(element.has_zero, _grid_code(y, bits, magnitude, element), magnitude >> 23)
    codes = jnp.where(element.unbounded, bits, codes)
    dtype = jnp.uint8 if width <= 8 else jnp.uint16 if width <= 16 else jnp.uint32
    return lax.bitcast_convert_type(codes, jnp.uint32).astype(dtype)


def from_codes(codes, element: Element):
    """float32 values of codes (unsigned integers of any width; bits above the element's are ignored)."""
    codes = lax.bitcast_convert_type(codes.astype(jnp.uint32), jnp.int32)
    field = codes & 255
    power = jnp.where(field == 255, fb.NAN, jnp.where(field == 0, fb.SMALLEST_NORMAL >> 1, field << 23))
    pattern = jnp.where(element.has_zero, _grid_pattern(codes, element), power)
    return fb.to_value(jnp.where(element.unbounded, codes, pattern))


def _fields(element: Element):
    """(bits below the sign, bias, whether codes are integers rather than sign and magnitude)."""
    below = element.exp_bits + element.man_bits
    return below, 1 - element.man_bits - element.quantum_exp, ~(element.signed_zero | element.has_nan)


def _ones(count):
    """int32 with so many low bits set, 0 .. 32."""
    return jnp.where(count < 32, ~(np.int32(-1) << jnp.minimum(count, 31)), -1)


def _normal_floats(element: Element) -> bool:
    """Whether every value of the element is known to be a normal float32 or zero, so that float arithmetic on it is exact."""
    return not fb.is_traced(element.quantum_exp) and -126 <= element.quantum_exp <= 100


def _multiples(y, magnitude, element: Element):
    """(|y| / quantum as int32, right below 2**24 quanta; pattern of |y| with its exponent field, below zero for float32 subnormals)."""
    if _normal_floats(element) and not fb.is_traced(element.man_bits) and element.man_bits <= 23:
        integers = fb.power_of_two(element.quantum_exp + 23)  # this sum has the multiple in its mantissa; conversion costs more
        return fb.to_pattern(jnp.abs(y) + fb.to_value(integers)) - integers, magnitude
    if _normal_floats(element):
        return (jnp.abs(y) * fb.to_value(fb.power_of_two(-element.quantum_exp))).astype(jnp.int32), magnitude
    extended = fb.to_extended(magnitude)
    away = 23 + 127 + element.quantum_exp - (extended >> 23)
    multiple = ((extended & (fb.SMALLEST_NORMAL - 1)) | fb.SMALLEST_NORMAL) >> jnp.clip(away, 0, 31)
    return jnp.where(magnitude == 0, 0, multiple), extended


def _grid_code(y, bits, magnitude, element: Element):
    below, bias, whole = _fields(element)
    multiple, extended = _multiples(y, magnitude, element)
    # normals: drop mantissa bits, rebias; what lies below is a multiple of the quantum
    normal = (extended >> (23 - element.man_bits)) - ((127 - bias) << element.man_bits)
    code = jnp.where(whole | (normal < (np.int32(1) << element.man_bits)), multiple, normal)
    sign = lax.shift_right_logical(bits, jnp.broadcast_to(31 - below, bits.shape)) & (np.int32(1) << below)
    top = _ones(element.exp_bits) << element.man_bits  # the exponent field of IEEE infinities
    quiet = sign | top | ((np.int32(1) << element.man_bits) >> 1)
    alone = jnp.where(element.signed_zero, sign | _ones(below), np.int32(1) << below)
    nan = jnp.where(element.has_nan, jnp.where(element.has_inf, quiet, alone), 0)
    special = jnp.where(magnitude > fb.INFINITY, nan, sign | top)
    negated = jnp.where(bits < 0, -code, code) & _ones(below + 1)
    if not fb.is_traced(element.has_inf) and not element.has_inf:
        return jnp.where(magnitude > fb.INFINITY, nan, jnp.where(whole, negated, sign | code))
    return jnp.where(magnitude >= fb.INFINITY, special, jnp.where(whole, negated, sign | code))


def _grid_pattern(codes, element: Element):
    below, bias, whole = _fields(element)
    negative = ((codes >> below) & 1 != 0) & element.signed
    low = codes & _ones(below)
    low = jnp.where(whole & negative, (np.int32(1) << below) - low, low)
    field = low >> element.man_bits
    normal = (low << (23 - element.man_bits)) + ((127 - bias) << 23)
    if _normal_floats(element):
        multiple = fb.to_pattern(low.astype(jnp.float32) * fb.to_value(fb.power_of_two(element.quantum_exp)))
        pattern = jnp.where(whole | (field == 0), multiple, normal)
    else:
        multiple = fb.to_pattern(low.astype(jnp.float32)) + (element.quantum_exp << 23)
        pattern = jnp.where(low == 0, 0, fb.from_extended(jnp.where(whole | (field == 0), multiple, normal)))
    top = _ones(element.exp_bits)
    infinite = element.has_inf & (field == top)
    nan_alone = jnp.where(element.signed_zero, low == _ones(below), (low == 0) & negative)
    nan = jnp.where(element.has_inf, infinite & (low != top << element.man_bits), element.has_nan & nan_alone)
    pattern = jnp.where(nan, fb.NAN, jnp.where(infinite, fb.INFINITY, pattern))
    return pattern | jnp.where(negative & ~(nan & ~element.has_inf), fb.SIGN, 0)
