"""The entry: any tensor to any format, with a gradient that the caller names."""

from __future__ import annotations

import enum

import jax

from formats.blocks import Scaled, apply
from formats.catalogue import get
from formats.elements import Element
from formats.modes import Overflow, Rounding, parse


class Gradient(enum.Enum):
    """straight_through: the cotangent passes unchanged, and never in the narrow type; none: it is zero."""

    STRAIGHT_THROUGH = "straight_through"
    NONE = "none"


def quantize(x, format: Element | Scaled | str, *, rounding="nearest_even", overflow="saturate", key=None,
             random_bits=None, gradient="straight_through"):
    """x rounded to the values of a format: an array of x's shape and dtype that holds only representable values.

    x: float32, float16 or bfloat16. format: an Element, a Scaled or a catalogue name; an element has no hidden scale
    (int4 of 0.02 is 0). rounding: nearest_even, or stochastic with either key (a PRNG key or uint32[2]) or random_bits
    (uint32 like x). overflow: saturate | ieee. gradient: straight_through | none. ValueError for anything else.
    """
    gradient = parse(Gradient, gradient)
    fmt = get(format) if isinstance(format, str) else format
    if not isinstance(fmt, (Element, Scaled)):
        raise ValueError(f"format={fmt!r} must be a catalogue name, a formats.Element or a formats.Scaled")
    y = _apply(x, fmt, rounding=parse(Rounding, rounding), overflow=parse(Overflow, overflow), key=key,
               random_bits=random_bits)
    return _pass_through(x, y) if gradient is Gradient.STRAIGHT_THROUGH else y


# One program a call also outside jit, where forty separate operations would each move the array. Widths stay arguments.
_apply = jax.jit(apply, static_argnames=("rounding", "overflow"), inline=True)


@jax.custom_jvp
def _pass_through(x, y):
    """y, with the derivative of x."""
    del x
    return y


@_pass_through.defjvp
def _pass_through_jvp(primals, tangents):
    return primals[1], tangents[0]
