"""From the largest magnitude of a block to its scale.

A block with no normal float32 (zeros, subnormals) has scale 1 under "exact" and the smallest power of two, 2**-127,
under the other rules; a block with a NaN or an infinity has scale NaN; for the float32 identity the scale is always 1.
"""

from __future__ import annotations

import enum

import jax.numpy as jnp
import numpy as np

from formats import bits as fb
from formats.elements import Element
from formats.rounding import round_to


class Rule(enum.Enum):
    """From amax to scale, m = largest value of the element. exact: amax / m. The others are powers of two, as exponents:
    floor: floor(log2 amax) - floor(log2 m); ceil: ceil(log2 amax) - floor(log2 m); rceil: ceil(log2(amax / m));
    even: as floor, of amax rounded (half up) to the element's mantissa bits."""

    EXACT = "exact"
    FLOOR = "floor"
    CEIL = "ceil"
    RCEIL = "rceil"
    EVEN = "even"


def hides(amax, element: Element):
    """bool: the block holds a NaN or an infinity, and its format would hide it; then the whole block is NaN."""
    return ~jnp.isfinite(amax) & ~element.unbounded


def exact_scale(amax, element: Element, scale_element: Element | None):
    """float32 amax / max_value, rounded to scale_element (to nearest, never to zero), within 2**-126 .. 2**126.

    The bounds keep scale and reciprocal normal in float32. Beyond them (amax above 2**126 with a largest value below 4)
    values saturate.
    """
    # compared in integers: whether a subnormal amax reads as zero depends on the backend
    one = (fb.to_pattern(amax) < fb.SMALLEST_NORMAL) | element.unbounded
    # Selects before the division: XLA turns a / (shared b) into a * (1 / b), an ulp off, but does not see that this b is
    # shared; and what follows a division it computes once per value instead of once per scale.
    amax = jnp.where(hides(amax, element), np.float32(np.nan), jnp.where(one, np.float32(1.0), amax))
    scale = amax / jnp.where(one, np.float32(1.0), element.max_value)
    smallest = np.float32(2.0**-126)
    if scale_element is not None:
        scale = round_to(scale, scale_element)
        smallest = fb.to_value(jnp.maximum(fb.power_of_two(scale_element.quantum_exp), fb.SMALLEST_NORMAL))
        scale, smallest = jnp.where(one, np.float32(1.0), scale), jnp.where(one, np.float32(1.0), smallest)
    return jnp.clip(scale, smallest, np.float32(2.0**126))


def shared_exponent(amax, element: Element, rule: Rule):
    """int32 exponent of a block's power-of-two scale, -127 .. 127 (E8M0), by integer arithmetic on amax's pattern; no
    higher than lets the largest value times the scale be a float32 (ceil, rceil and even could ask for one more).

    Never floor(log2 amax): float32 log2 is one too large an ulp below a power of two. 0 for the float32 identity.
    """
    bits, top = fb.to_pattern(amax), fb.to_pattern(element.max_value)
    subnormal = bits < fb.SMALLEST_NORMAL
    if rule is Rule.EVEN:
        bits = bits + ((np.int32(1) << (23 - element.man_bits)) >> 1)
    exponent = (bits >> 23) - (top >> 23)
    mantissa = bits & np.int32(0x7FFFFF)
    if rule is Rule.CEIL:
        exponent = exponent + (mantissa > 0).astype(jnp.int32)
    elif rule is Rule.RCEIL:
        exponent = exponent + (mantissa > (top & np.int32(0x7FFFFF))).astype(jnp.int32)
    # subnormals are one with zero, whatever the backend made of them in the maximum
    exponent = jnp.where(subnormal, -127, exponent)
    highest = jnp.minimum(254 - (top >> 23), 127)
    return jnp.where(element.unbounded, 0, jnp.clip(exponent, -127, highest))
