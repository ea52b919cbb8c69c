"""The one rounding core: integer arithmetic on the float32 bit pattern, for every element, width, mode and block scale.

The low `shift` bits of a magnitude's pattern lie below the spacing of the element: rounding adds the mode's increment
(0 .. 2**shift - 1) and clears them; a carry walks into the exponent by itself. Below the element's quantum the result is
zero or the quantum. A power-of-two scale moves the grid, not the values; then patterns are "extended": the exponent field
runs below zero, float32 subnormals are normalised like everything else, and moving is one addition. No float arithmetic:
exact in subnormals of the target and of float32, also where the backend flushes them.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from formats import bits as fb
from formats.elements import Element
from formats.modes import (
    Draw,
    Overflow,
    Rounding,
    StochasticRule,
    as_float32,
    by_mode,
    carries,
    parse,
    parse_rounding,
    random_increment,
)


def round_to(x, element, *, rounding="nearest_even", overflow="saturate", sr_bits=None, sr_rule="full", random_bits=None):
    """x rounded to the values of an element (Element, Codebook or Logarithmic), as an array like x.

    x: float32, float16 or bfloat16 of any shape (the result is cast back to its dtype). An Element's fields are scalars or
    broadcast against x at equal rank. rounding: a mode, or the `mode_number` of a deterministic one, which may be traced.
    random_bits: uint32 like x, for the stochastic modes only. sr_rule="full": the probability of going up is exactly the dropped
    fraction (below the quantum, that fraction truncated to a multiple of 2**-31); "A", "B", "C" with sr_bits=k: see
    `StochasticRule`. stochastic_equal goes up or down with probability 1/2.

    nearest_even ties go to the even significand; without mantissa bits that is the larger power of two (as ml_dtypes'
    float8_e8m0fnu; P3109 goes by the code instead), and to_odd goes to the smaller one. NaN stays NaN, also where the format has no code for it: a diverged
    tensor must show. overflow: see `Overflow`; under "ieee" modes that round inward stop at the largest, to_odd does not.
    """
    rounding, overflow = parse_rounding(rounding), parse(Overflow, overflow)
    draw = Draw.of(sr_bits, sr_rule, rounding)
    random = isinstance(rounding, Rounding) and rounding.random
    if random != (random_bits is not None):
        raise ValueError(f"random_bits must be given exactly for the stochastic modes, got rounding={getattr(rounding, 'value', 'a number')!r}")
    v = as_float32(x)
    if not isinstance(element, Element) and not hasattr(element, "round"):
        raise ValueError(f"element={element!r} must be an element format such as formats.minifloat(4, 3); quantize takes names and scales")
    if isinstance(element, Element) and overflow is Overflow.SATURATE and rounding is Rounding.NEAREST_EVEN and _known_whole(element):
        y = _nearest_whole(v, element)
    elif isinstance(element, Element):
        y = fb.to_value(round_pattern(fb.to_pattern(v), element, rounding, overflow, draw, random_bits))
    else:
        y = element.round(v, rounding, overflow, draw, random_bits)
    return y.astype(jnp.asarray(x).dtype)


class _Grid(NamedTuple):
    """An element as patterns: its quantum, half of that, its largest positive and negative magnitudes."""

    man_bits: jax.Array
    quantum_exp: jax.Array
    quantum: jax.Array
    half: jax.Array
    high: jax.Array
    low: jax.Array
    extended: bool  # whether patterns are extended ones

    @staticmethod
    def of(element: Element) -> _Grid:
        """The element's own grid, in plain patterns."""
        quantum = fb.power_of_two(element.quantum_exp)
        half = jnp.where(element.quantum_exp > -126, quantum - fb.SMALLEST_NORMAL, quantum >> 1)  # 0 for half of 2**-149
        # Far above the float32 subnormals, which are less than 2**-31 of the quantum then, plain patterns are extended ones.
        far = not fb.is_traced(element.quantum_exp) and bool(np.all(element.quantum_exp >= -90))
        return _Grid(element.man_bits, element.quantum_exp, quantum, half, *_limits(element), extended=far)

    @staticmethod
    def moved(element: Element, exponent) -> _Grid:
        """That grid times 2**exponent, in extended patterns: a few additions per block."""
        quantum_exp = element.quantum_exp + exponent
        quantum = (quantum_exp + 127) << 23
        high, low = (jnp.where(limit == 0, fb.EXTENDED_ZERO, fb.to_extended(limit) + (exponent << 23))
                     for limit in _limits(element))
        return _Grid(element.man_bits, quantum_exp, quantum, quantum - fb.SMALLEST_NORMAL, high, low, extended=True)

    def field(self, pattern):
        """Biased exponent of the significand's unit 2**23."""
        return pattern >> 23 if self.extended else jnp.maximum(pattern >> 23, 1)

    @property
    def headroom(self):
        """Free bits above the significand of what lies below the quantum, in 31: more under a subnormal quantum."""
        return 7 if self.extended else jnp.clip(-118 - self.quantum_exp, 7, 31)

    def leading(self, pattern):
        """Position of the leading bit: 23, or less in a float32 subnormal (it matters to targets with normals there)."""
        # that of float(pattern), which is never subnormal
        return 23 if self.extended else jnp.minimum(fb.to_pattern(pattern.astype(jnp.float32)) >> 23, 150) - 127


def _limits(element: Element):
    return fb.to_pattern(element.max_value), fb.to_pattern(element.min_value) & fb.MAGNITUDE


def round_pattern(x_bits, element: Element, rounding, overflow: Overflow, draw: Draw = Draw(), random_bits=None, exponent=None,
                  subnormals: bool = True):
    """`round_to` on int32 float32-patterns. With exponent (int32, -127 .. 127, broadcasting against x_bits) the grid and
    its range are those of the element times 2**exponent; its largest value must then be below 2**128. subnormals=False, of
    such grids, takes float32 subnormals for zeros: right if the quantum is at least 2**-90."""
    if random_bits is not None:
        random_bits = lax.bitcast_convert_type(random_bits, jnp.int32)
    magnitude = x_bits & fb.MAGNITUDE
    extend = exponent is not None and subnormals
    grid = _Grid.of(element) if exponent is None else _Grid.moved(element, exponent)
    pattern = fb.to_extended(magnitude) if extend else magnitude
    symmetric = _known_symmetric(element)
    limit = grid.high if symmetric else jnp.where(x_bits >= 0, grid.high, grid.low)
    rounded = by_mode(rounding, lambda mode: _round_from_quantum(pattern, x_bits, grid, mode, draw, random_bits))
    clipped = jnp.minimum(rounded, limit)
    clipped = fb.from_extended(clipped) if extend else clipped if symmetric else jnp.maximum(clipped, 0)
    above_zero = by_mode(rounding, lambda mode: _reaches_quantum(pattern, x_bits, grid, mode, draw, random_bits))
    y_bits = jnp.where(above_zero, clipped, 0)
    if symmetric:
        smallest, y_bits = np.int32(0), (x_bits & fb.SIGN) | y_bits
    else:
        smallest = fb.to_pattern(element.min_magnitude)
        sign = x_bits & jnp.where(element.signed | element.signed_zero, fb.SIGN, 0)
        y_bits = sign | jnp.maximum(y_bits, smallest)
        y_bits = jnp.where(y_bits == fb.SIGN, jnp.where(element.signed_zero, fb.SIGN, smallest), y_bits)
    if overflow is not Overflow.SATURATE:
        special = jnp.where(element.has_inf, fb.INFINITY, jnp.where(element.has_nan, fb.NAN, 0))
        beyond = magnitude == fb.INFINITY
        if overflow is Overflow.IEEE:
            leaves = by_mode(rounding, lambda mode: _leaves_range(x_bits, mode))
            beyond = beyond | ((rounded > limit) & leaves)
            y_bits = jnp.where((x_bits <= 0) & (smallest > 0), fb.NAN, y_bits)
        y_bits = jnp.where(beyond & (special != 0), (x_bits & fb.SIGN) | special, y_bits)
    return jnp.where(magnitude > fb.INFINITY, x_bits, y_bits)


def _known_symmetric(element: Element) -> bool:
    """Whether widths are concrete and those of a format with both zeros and the same range on either side, as most are: fewer steps."""
    if fb.is_traced(element.max_value, element.min_value, element.signed_zero, element.min_magnitude):
        return False
    both = (element.max_value == -element.min_value) & element.signed_zero & (element.min_magnitude == 0)
    return bool(np.all(both))


def _known_whole(element: Element) -> bool:
    """Whether it is known to be an integer: of its widths, its largest and smallest value alone may be traced."""
    zeros = (element.exp_bits, element.quantum_exp, element.min_magnitude)
    return not fb.is_traced(*zeros, element.signed_zero) and not any(np.any(field) for field in zeros)


def _nearest_whole(v, element: Element):
    """The same as by patterns, in two thirds of the time: by the processor's instruction for the nearest integer."""
    y = jnp.clip(lax.round(v, lax.RoundingMethod.TO_NEAREST_EVEN), element.min_value, element.max_value)
    if not np.all(element.signed_zero):
        y = jnp.where((y == 0) & ~element.signed_zero, np.float32(0.0), y)
    return jnp.where(jnp.isnan(v), v, y)  # as it was: the instruction makes a signalling NaN quiet


def _leaves_range(x_bits, mode: Rounding):
    """bool: whether a finite value past the largest one overflows (IEEE 754-2019 section 7.4: not if rounded inward)."""
    if mode is Rounding.TOWARD_POSITIVE:
        return x_bits >= 0
    if mode is Rounding.TOWARD_NEGATIVE:
        return x_bits < 0
    return mode is not Rounding.TOWARD_ZERO


def _round_from_quantum(pattern, x_bits, grid: _Grid, mode: Rounding, draw: Draw, random_bits):
    """Pattern rounded on the grid, its range ignored (infinity stays); the quantum for all below it."""
    lifted = jnp.maximum(pattern, grid.quantum)
    shift = jnp.maximum(grid.leading(lifted) - grid.man_bits, grid.quantum_exp + 150 - grid.field(lifted))
    shift = shift & 31  # it is 0 .. 23; the mask tells the compiler
    mask = (np.int32(1) << shift) - 1
    if mode.random:
        increment = random_increment(mode, draw, random_bits, lifted | fb.SMALLEST_NORMAL, shift)
    else:
        # the last kept bit; the implicit one if that is all that is kept
        odd = ((lifted | fb.SMALLEST_NORMAL) >> shift) & 1
        increment = _increment(mode, x_bits, mask, odd)
    return (lifted + increment) & ~mask


def _increment(mode: Rounding, x_bits, mask, odd):
    """What is added before the bits under `mask` are cleared; 0 wherever the mask is 0."""
    match mode:
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


def _reaches_quantum(pattern, x_bits, grid: _Grid, mode: Rounding, draw: Draw, random_bits):
    """bool: False where x goes to zero: True at or above the quantum, the mode's choice below it, False for zero."""
    nonzero = x_bits & fb.MAGNITUDE != 0
    match mode:
        case Rounding.NEAREST_EVEN | Rounding.NEAREST_ZERO:
            return pattern > grid.half
        case Rounding.NEAREST_AWAY:
            return (pattern >= grid.half) & nonzero
        case Rounding.TOWARD_ZERO:
            return pattern >= grid.quantum
        case Rounding.TOWARD_POSITIVE:
            return jnp.where(x_bits >= 0, nonzero, pattern >= grid.quantum)
        case Rounding.TOWARD_NEGATIVE:
            return jnp.where(x_bits >= 0, pattern >= grid.quantum, nonzero)
        case Rounding.TO_ODD:
            return nonzero
    return (pattern >= grid.quantum) | (nonzero & carries(mode, draw, random_bits, _fraction(pattern, grid, mode, draw)))


def _fraction(pattern, grid: _Grid, mode: Rounding, draw: Draw):
    """x / quantum of an x below the quantum in units of 2**-31, truncated (anything where x is not below it). What has to see
    the truncated rest finds it in the last bit: rule C its ties, equal chances whether x is zero."""
    field = grid.field(pattern)
    significand = (pattern - ((field - 1) << 23)) << grid.headroom
    away = jnp.minimum(grid.quantum_exp + 119 + grid.headroom - field, 31) & 31
    fraction = significand >> away
    if mode is Rounding.STOCHASTIC_EQUAL or draw.rule is StochasticRule.C:
        fraction = fraction | (fraction << away != significand).astype(jnp.int32)
    return fraction
