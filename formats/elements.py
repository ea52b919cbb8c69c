"""What one number can be: minifloats, integers and fixed point as one family of grids.

An `Element` says: near x the representable values are 2**max(e(x) - man_bits, quantum_exp) apart, e(x) = floor(log2|x|),
between min_value and max_value. For a minifloat quantum_exp is the exponent of its smallest subnormal; an integer has
quantum 1 (quantum_exp 0), fixed point 2**-fraction_bits; float32 itself is (23, -149, unbounded).

Every field is a number and a pytree leaf (there is no static part), so all elements share one treedef: they can be
stacked and vmapped, and one compiled program serves int3, float8_e4m3fn and float32 alike.
"""

from __future__ import annotations

import dataclasses
import operator

import jax
import jax.numpy as jnp
import numpy as np

from formats import bits as fb

VARIANTS = ("ieee", "fn", "fnuz")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Element:
    """The set of values of one number. All fields are scalars (numpy, or jax where widths are traced).

    exp_bits, man_bits: int32, stored field widths (an integer of b bits: 0 and b-1 signed, b unsigned).
    quantum_exp: int32, log2 of the smallest spacing. max_value, min_value: float32, largest and most negative finite
    value; max_value = inf marks the float32 identity, which nothing overflows. has_inf, has_nan, signed_zero: bool,
    whether the format has such codes. min_magnitude: float32, 0, or the smallest value of a format that has no zero.
    """

    exp_bits: jax.Array | np.int32
    man_bits: jax.Array | np.int32
    quantum_exp: jax.Array | np.int32
    max_value: jax.Array | np.float32
    min_value: jax.Array | np.float32
    has_inf: jax.Array | np.bool_
    has_nan: jax.Array | np.bool_
    signed_zero: jax.Array | np.bool_
    min_magnitude: jax.Array | np.float32

    @property
    def bits(self):
        """int32: stored width, sign bit included."""
        return self.exp_bits + self.man_bits + self.signed.astype(np.int32)

    @property
    def signed(self):
        """bool: whether there are negative values (by the sign bit: the smallest may be a float32 subnormal)."""
        return fb.to_pattern(self.min_value) < 0

    @property
    def limits(self):
        """float32: the most negative and the largest value."""
        return self.min_value, self.max_value

    @property
    def has_zero(self):
        """bool: whether 0 is a value of the format (by the pattern: the smallest value may be a float32 subnormal)."""
        return fb.to_pattern(self.min_magnitude) == 0

    @property
    def unbounded(self):
        """bool: the float32 identity, whose scale is always exactly 1."""
        return self.max_value == np.float32(np.inf)


def whole(key: str, value, low: int, high: int):
    """An int32 from a Python/numpy integer (checked: low..high) or an integer jax scalar (passed through)."""
    if isinstance(value, jax.Array):
        if not jnp.issubdtype(value.dtype, jnp.integer):
            raise ValueError(f"{key} must be an integer, got dtype {value.dtype}")
        return value.astype(jnp.int32)
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{key}={value!r} must be an integer from {low} to {high}") from None
    if not low <= number <= high:
        raise ValueError(f"{key}={number} must be an integer from {low} to {high}")
    return np.int32(number)


def _flag(value):
    return value if isinstance(value, jax.Array) else np.bool_(value)


def minifloat(exp_bits, man_bits, variant: str = "ieee", bias=None) -> Element:
    """A signed float with exp_bits (0..8) and man_bits (0..23), either of which may be traced; at least 2 bits.

    variant (ml_dtypes suffixes): "ieee" keeps the top exponent for inf and NaN; "fn" is finite, and its top code is NaN
    if the format is wider than 6 bits, a number otherwise (OCP: float8_e4m3fn has a NaN, float6 and float4 have none);
    "fnuz" is finite, NaN sits on the code of -0. bias: None is 2**(exp_bits-1) - 1, for "fnuz" 2**(exp_bits-1).
    exp_bits = 0: only the subnormals, multiples of 2**(1-bias-man_bits), bias 0, no inf. Beyond the float32 range
    (exp_bits = 8 "fn") values stop at the largest float32 that fits. ValueError for anything else.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant={variant!r} must be one of {', '.join(VARIANTS)}")
    exp_bits, man_bits = whole("exp_bits", exp_bits, 0, 8), whole("man_bits", man_bits, 0, 23)
    traced = fb.is_traced(exp_bits, man_bits, bias)
    xp = jnp if traced else np
    one = xp.asarray(1, np.int32)
    half = (one << exp_bits) >> 1
    if bias is None:
        bias = half if variant == "fnuz" else xp.maximum(half - 1, 0)
    else:
        bias = whole("bias", bias, -100, 300)
    finite = variant != "ieee"
    has_inf = (exp_bits > 0) if not finite else xp.asarray(False)
    has_nan = {"ieee": has_inf & (man_bits > 0), "fn": exp_bits + man_bits > 5, "fnuz": xp.asarray(True)}[variant]
    top_code_is_nan = (has_nan if variant == "fn" else xp.asarray(False)).astype(np.int32)
    field = (one << exp_bits) - (1 if finite else 2)
    man = (one << man_bits) - 1 - top_code_is_nan
    # with no mantissa bits the NaN takes the whole top exponent (man is -1 there)
    field, man = xp.maximum(field - (man < 0).astype(np.int32), 0), xp.maximum(man, 0)
    leading = xp.where(field > 0, one << man_bits, 0)
    top = fb.pattern(man + leading, xp.maximum(field, 1) - bias - man_bits)
    top = xp.where(top >= fb.INFINITY, fb.largest(man_bits), top)
    if not traced and (top == 0 or exp_bits + man_bits == 0):
        raise ValueError(f"exp_bits={exp_bits}, man_bits={man_bits}, variant={variant!r} holds no number but zero")
    if not traced and 1 - bias - man_bits > 127:
        raise ValueError(f"bias={bias} puts every value of the format above the float32 range")
    max_value = fb.to_value(top if traced else np.int32(top))
    quantum_exp = xp.clip(1 - bias - man_bits, fb.MIN_EXPONENT, 127).astype(np.int32)
    return Element(exp_bits, man_bits, quantum_exp, max_value, -max_value, _flag(has_inf), _flag(has_nan),
                   np.bool_(variant != "fnuz"), np.float32(0.0))


def integer(bits, signed: bool = True, symmetric: bool = True, fraction_bits=0) -> Element:
    """Integers of `bits` (2..24 signed, 1..24 unsigned; may be traced), times 2**-fraction_bits (fixed point).

    signed, symmetric: -(2**(bits-1)-1) .. 2**(bits-1)-1; signed, not symmetric: from -2**(bits-1); unsigned:
    0 .. 2**bits-1. No infinities, no NaN code, no negative zero.
    """
    bits = whole("bits", bits, 2 if signed else 1, 24)
    fraction_bits = whole("fraction_bits", fraction_bits, -100, 100)
    xp = jnp if fb.is_traced(bits, fraction_bits) else np
    one = xp.asarray(1, np.int32)
    man_bits = bits - 1 if signed else bits
    top = fb.to_value(fb.pattern((one << man_bits) - 1, -fraction_bits))
    bottom = -top if symmetric else -fb.to_value(fb.pattern(one << man_bits, -fraction_bits))
    return Element(np.int32(0), man_bits, -fraction_bits, top, bottom if signed else np.float32(0.0),
                   np.bool_(False), np.bool_(False), np.bool_(False), np.float32(0.0))


def identity() -> Element:
    """float32: rounding to it returns every bit pattern unchanged, and a scale for it is exactly 1."""
    infinity = np.float32(np.inf)
    return Element(np.int32(8), np.int32(23), np.int32(fb.MIN_EXPONENT), infinity, -infinity,
                   np.bool_(True), np.bool_(True), np.bool_(True), np.float32(0.0))


def power_of_two() -> Element:
    """float8_e8m0fnu: 2**-127 .. 2**127 and NaN, unsigned, no zero (OCP MX v1.0 section 5.4.1).

    As in ml_dtypes ties go up, and what lies between 2**-127 and 2**-126 goes to 2**-126: the grid ends at the smallest
    normal float32 (quantum_exp -126), and 2**-127 stands where other formats have their zero.
    """
    return Element(np.int32(8), np.int32(0), np.int32(-126), np.float32(2.0**127), np.float32(0.0),
                   np.bool_(False), np.bool_(True), np.bool_(False), np.float32(2.0**-127))
