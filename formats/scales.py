"""From the largest magnitude of a block to its scale.

A block with no normal float32 (zeros, subnormals) has scale 1 under "exact" and the smallest power of two, 2**-127,
under the other rules; a block with a NaN or an infinity has scale NaN; for the float32 identity the scale is always 1.
"""

from __future__ import annotations

import enum

import jax
import jax.numpy as jnp
import numpy as np

from formats import bits as fb
from formats.elements import Element
from formats.modes import parse
from formats.rounding import round_to


class Rule(enum.Enum):
    """From amax to scale, m = largest value of the element. exact: amax / m. The others are powers of two, as exponents:
    floor: floor(log2 amax) - floor(log2 m); ceil: ceil(log2 amax) - floor(log2 m); rceil: ceil(log2(amax / m));
    even: as floor, of amax rounded (half up) to the element's mantissa bits; rfloor: floor(log2(amax / m)); rround: log2(amax / m) to
    the nearest integer (up from about an ulp around the middle, 2**(1/2)). QuEST and Quartet speak of the scale amax / m itself, and
    their released code floors it."""

    EXACT = "exact"
    FLOOR = "floor"
    CEIL = "ceil"
    RCEIL = "rceil"
    EVEN = "even"
    RFLOOR = "rfloor"
    RROUND = "rround"


def hides(amax, element):
    """bool: the block holds a NaN or an infinity, and its format would hide it; then the whole block is NaN."""
    return ~jnp.isfinite(amax) & ~element.unbounded


POWER_RULES = (Rule.FLOOR, Rule.CEIL, Rule.RCEIL, Rule.EVEN, Rule.RFLOOR, Rule.RROUND)  # numbers are written in checkpoints: append only
_SQRT2, _ONE = np.float32(2**0.5), np.int32(0x3F800000)


def rule_number(rule):
    """int32 place of a power-of-two rule in `POWER_RULES`, None for "exact"; an integer array, maybe traced, passes through."""
    if isinstance(rule, (jax.Array, np.integer)):
        if not jnp.issubdtype(rule.dtype, jnp.integer):
            raise ValueError(f"rule has dtype {rule.dtype}; a name or an integer rule number is needed")
        return rule.astype(np.int32)
    rule = parse(Rule, rule)
    return None if rule is Rule.EXACT else np.int32(POWER_RULES.index(rule))


def exact_scale(amax, element, scale_element: Element | None, tensor_scale=None):
    """float32 amax / max_value, rounded to scale_element (to nearest, never to zero), within 2**-126 .. 2**126.

    The bounds keep scale and reciprocal normal in float32. Beyond them (amax above 2**126 with a largest value below 4)
    values saturate. tensor_scale: float32, what the scale itself is relative to (NVFP4): then amax / max_value / tensor_scale, both
    quotients in float32, is rounded.
    """
    # compared in integers: whether a subnormal amax reads as zero depends on the backend
    one = (fb.to_pattern(amax) < fb.SMALLEST_NORMAL) | element.unbounded
    # Selects before the division: XLA turns a / (shared b) into a * (1 / b), an ulp off, but does not see that this b is
    # shared; and what follows a division it computes once per value instead of once per scale.
    amax = jnp.where(hides(amax, element), np.float32(np.nan), jnp.where(one, np.float32(1.0), amax))
    scale = amax / jnp.where(one, np.float32(1.0), element.max_value)
    if tensor_scale is not None:
        scale = jnp.where(one, np.float32(1.0), scale)  # between two divisions: XLA turns (a / b) / c into a / (b c)
        scale = scale / jnp.where(one, np.float32(1.0), tensor_scale)
    smallest = np.float32(2.0**-126)
    if scale_element is not None:
        scale = round_to(scale, scale_element)
        smallest = fb.to_value(jnp.maximum(fb.power_of_two(scale_element.quantum_exp), fb.SMALLEST_NORMAL))
        scale, smallest = jnp.where(one, np.float32(1.0), scale), jnp.where(one, np.float32(1.0), smallest)
    return jnp.clip(scale, smallest, np.float32(2.0**126))


def affine_scale(low, high, element: Element):
    """(scale, zero): float32 (high - low) / (max_value - min_value) and the code of zero, round(min_value - low / scale) to nearest
    even, within the element. low <= 0 <= high; where both are 0 (or subnormal) the scale is 1; NaN or infinity: NaN scale."""
    spread = high - low
    one = ~(jnp.abs(spread) >= np.float32(2.0**-126)) & jnp.isfinite(spread)
    spread = jnp.where(one, np.float32(1.0), jnp.where(jnp.isfinite(spread), spread, np.float32(np.nan)))
    scale = spread / jnp.where(one, np.float32(1.0), element.max_value - element.min_value)
    scale = jnp.clip(scale, np.float32(2.0**-126), np.float32(2.0**126))
    zero = jnp.clip(element.min_value - jnp.round(low / scale), element.min_value, element.max_value)
    return scale, jnp.where(jnp.isfinite(zero), zero, 0.0)


def shared_exponent(amax, element, number):
    """int32 exponent of a block's power-of-two scale, -127 .. 127 (E8M0), by integer arithmetic on amax's pattern; no
    higher than lets the largest value times the scale be a float32 (some rules could ask for one more).

    number: int32 place of the rule in `POWER_RULES`, may be traced. Never floor(log2 amax): float32 log2 is one too large an ulp
    below a power of two. 0 for the float32 identity.
    """
    bits, top = fb.to_pattern(amax), fb.to_pattern(element.max_value)
    subnormal = bits < fb.SMALLEST_NORMAL
    if isinstance(element, Element):
        half = (np.int32(1) << (23 - element.man_bits)) >> 1
        bits = bits + jnp.where(number == POWER_RULES.index(Rule.EVEN), half, 0)
    mantissa = bits & np.int32(0x7FFFFF)
    ceil, rceil = number == POWER_RULES.index(Rule.CEIL), number == POWER_RULES.index(Rule.RCEIL)
    top_mantissa = top & np.int32(0x7FFFFF)
    up = (ceil & (mantissa > 0)) | (rceil & (mantissa > top_mantissa))
    down = (number == POWER_RULES.index(Rule.RFLOOR)) & (mantissa < top_mantissa)
    # log2 of the quotient of the two mantissas, from -1 to 1, against -1/2 and 1/2
    one = fb.to_value(top_mantissa | _ONE)
    value, rround = fb.to_value(mantissa | _ONE), number == POWER_RULES.index(Rule.RROUND)
    up, down = up | (rround & (value >= one * _SQRT2)), down | (rround & (value * _SQRT2 < one))
    exponent = (bits >> 23) - (top >> 23) + up.astype(jnp.int32) - down.astype(jnp.int32)
    # subnormals are one with zero, whatever the backend made of them in the maximum
    exponent = jnp.where(subnormal, -127, exponent)
    highest = jnp.minimum(254 - (top >> 23), 127)
    return jnp.where(element.unbounded, 0, jnp.clip(exponent, -127, highest))
