"""What the derivative of a quantizer is: named by the caller, never the rule that an implicit cast would give.

Integer arithmetic on bit patterns has derivative zero and a cast to a narrow dtype narrows the cotangent; training needs neither.
"""

from __future__ import annotations

import dataclasses
import enum
from functools import partial

import jax
import jax.numpy as jnp

from formats.catalogue import resolve
from formats.modes import parse


class Gradient(enum.Enum):
    """straight_through: the cotangent passes unchanged, and never in the narrow type; clipped: it is zero where x lies beyond the
    largest or smallest value (at its scale), unchanged elsewhere; none: it is zero."""

    STRAIGHT_THROUGH = "straight_through"
    CLIPPED = "clipped"
    NONE = "none"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedGradient:
    """The cotangent is quantized itself, with a format, rounding and overflow of its own (QPyTorch, Zhang et al. 2019). key: as in
    `quantize`, for the stochastic modes; its leaves (widths, key) may be traced. Reverse mode only."""

    format: object  # a name becomes the format
    key: jax.Array | None = None
    rounding: str = dataclasses.field(default="nearest_even", metadata={"static": True})
    overflow: str = dataclasses.field(default="saturate", metadata={"static": True})

    def __post_init__(self):
        if isinstance(self.format, str):
            object.__setattr__(self, "format", resolve(self.format))


def parse_gradient(value) -> Gradient | QuantizedGradient:
    """The `Gradient` of a name; a `QuantizedGradient` passes."""
    if isinstance(value, QuantizedGradient):
        return value
    if value == "quantized":
        raise ValueError("gradient='quantized' does not say how: pass formats.QuantizedGradient('float8_e5m2', rounding=..., key=...)")
    return parse(Gradient, value)


@jax.custom_jvp
def pass_through(x, y):
    """y, with the derivative of x."""
    del x
    return y


@pass_through.defjvp
def _pass_through_jvp(primals, tangents):
    return primals[1], tangents[0]


@jax.custom_jvp
def pass_inside(x, y, inside):
    """y, with the derivative of x where inside (bool like x), zero elsewhere."""
    del x, inside
    return y


@pass_inside.defjvp
def _pass_inside_jvp(primals, tangents):
    _, y, inside = primals
    return y, jnp.where(inside, tangents[0], jnp.zeros_like(tangents[0]))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def pass_quantized(quantize, x, y, gradient: QuantizedGradient):
    """y; the cotangent of x is that of y, quantized by quantize(cotangent, gradient)."""
    del quantize, x, gradient
    return y


def _pass_quantized_fwd(quantize, x, y, gradient):
    del quantize, x
    return y, gradient


def _pass_quantized_bwd(quantize, gradient, g):
    zeros = jax.tree.map(lambda leaf: None, gradient)
    return quantize(g, gradient), jnp.zeros_like(g), zeros


pass_quantized.defvjp(_pass_quantized_fwd, _pass_quantized_bwd)
