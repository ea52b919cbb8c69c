"""The entry: any tensor to any format, with a gradient that the caller names."""

from __future__ import annotations

import jax

from formats.blocks import Manner, apply, inside_range
from formats.catalogue import resolve
from formats.gradients import Gradient, QuantizedGradient, parse_gradient, pass_inside, pass_quantized, pass_through
from formats.modes import Rounding


def quantize(x, format, *, rounding="nearest_even", overflow="saturate", key=None, sr_bits=None, sr_rule="full", random_bits=None,
             gradient="straight_through", amax=None, scale=None):
    """x rounded to the values of a format: an array of x's shape and dtype that holds only representable values.

    x: float32, float16 or bfloat16. format: an element format (Element, Codebook, Logarithmic), a Scaled or a catalogue name; an
    element has no hidden scale (int4 of 0.02 is 0). rounding: see `Rounding`; a deterministic mode may be given by its
    `mode_number`, traced. The stochastic modes take either key (a PRNG key or uint32[2], hashed with the element's index in x) or
    random_bits (uint32 like x); sr_bits=k with sr_rule "A", "B" or "C" use the k low bits of them (`StochasticRule`).
    overflow: see `Overflow`. gradient: straight_through | clipped | none (`Gradient`), or a `QuantizedGradient`. amax, scale:
    given ones in place of those of x, shaped like the scales (`split`). ValueError for anything else.
    """
    fmt, gradient = resolve(format), parse_gradient(gradient)
    manner = Manner.of(rounding, overflow, sr_bits, sr_rule)
    given = {"key": key, "random_bits": random_bits, "amax": amax, "scale": scale}
    number, mode = (None, manner.rounding) if isinstance(manner.rounding, Rounding) else (manner.rounding, None)
    y = _apply(x, fmt, number, given, mode, manner.overflow, sr_bits, manner.draw.rule)
    match gradient:
        case Gradient.NONE:
            return y
        case Gradient.STRAIGHT_THROUGH:
            return pass_through(x, y)
        case Gradient.CLIPPED:
            return pass_inside(x, y, inside_range(x, fmt, amax=amax, scale=scale))
        case QuantizedGradient():
            return pass_quantized(_cotangent, x, y, gradient)


def _cotangent(g, gradient: QuantizedGradient):
    return quantize(g, gradient.format, rounding=gradient.rounding, overflow=gradient.overflow, key=gradient.key, gradient="none")


def _applied(x, fmt, number, given, mode, overflow, sr_bits, sr_rule):
    rounding = mode if number is None else number
    return apply(x, fmt, rounding=rounding, overflow=overflow, sr_bits=sr_bits, sr_rule=sr_rule, **given)


# One program a call also outside jit, where forty separate operations would each move the array. Widths stay arguments.
_apply = jax.jit(_applied, static_argnums=(4, 5, 6, 7), inline=True)
