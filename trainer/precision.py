"""What happens to each operand of a linear layer's three matrix products.

    forward  y  = x  w        reads activations and weights
    dgrad    dx = dy w^T      reads output_gradients and weights
    wgrad    dw = x^T dy      reads activations and output_gradients

A `PrecisionPolicy` names a `Quantizer` (or None: left in float32) for each of the six operands. Policies are pytrees: widths are
leaves and may be traced or stacked over the members of a cohort; everything structural is static.
"""
from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum

import jax

import formats
from formats import Rounding

ROLES = ("weights", "activations", "output_gradients")
GEMMS = {"weights": ("forward", "dgrad"), "activations": ("forward", "wgrad"), "output_gradients": ("dgrad", "wgrad")}


class Source(str, Enum):
    """Where a quantizer's scale comes from."""

    CURRENT = "current"  # amax of the tensor at hand
    NONE = "none"  # no scale: the element's own range


def _static(**kwargs):
    return field(metadata={"static": True}, **kwargs)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantizer:
    """A format, and how values are rounded to it. The gradient is straight-through: the cotangent is never narrowed here.

    source: "current" with a format that has scales, "none" with an element format (whose own range is then all there is).
    """

    format: formats.Format
    rounding: str = _static(default="nearest_even")
    source: str = _static(default="current")

    def __post_init__(self):
        expected = (Source.CURRENT if isinstance(self.format, formats.Scaled) else Source.NONE).value
        if self.source != expected:
            advice = "wrap it in formats.scaled(...) or say source='none'" if expected == "none" else "source='current' goes with it"
            raise ValueError(f"source={self.source!r} with a format of type {type(self.format).__name__}: {advice}")

    @property
    def stochastic(self) -> bool:
        return Rounding(self.rounding).random


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Operand:
    """The quantizers of one role in the two products that read it (in the order of GEMMS); `shared`: quantized once, used twice."""

    first: Quantizer | None = None
    second: Quantizer | None = None
    shared: bool = _static(default=True)

    def quantizers(self) -> tuple[Quantizer, ...]:
        both = (self.first,) if self.shared else (self.first, self.second)
        return tuple(q for q in both if q is not None)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PrecisionPolicy:
    """Role -> quantizers; `dot_dtype` is the dtype of the product's inputs (accumulation is float32)."""

    weights: Operand = Operand()
    activations: Operand = Operand()
    output_gradients: Operand = Operand()
    dot_dtype: str = _static(default="float32")

    @property
    def stochastic(self) -> bool:
        """True if any operand needs random bits."""
        return any(q.stochastic for role in ROLES for q in getattr(self, role).quantizers())

    def without_quantizers(self) -> PrecisionPolicy:
        """The same dot dtype and nothing quantized: for layers that are kept high."""
        return replace(PrecisionPolicy(), dot_dtype=self.dot_dtype)
