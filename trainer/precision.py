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
import numpy as np

import formats
from formats import Amax, Granularity, Rounding

ROLES = ("weights", "activations", "output_gradients")
GEMMS = {"weights": ("forward", "dgrad"), "activations": ("forward", "wgrad"), "output_gradients": ("dgrad", "wgrad")}


class Source(str, Enum):
    """Where a quantizer's scale comes from. With blocks under a scale of the whole tensor (two levels) it is that scale's source, and
    the blocks' own scales are always current."""

    CURRENT = "current"  # amax of the tensor at hand
    DELAYED = "delayed"  # amax of earlier steps, kept in the state
    STATIC = "static"  # a constant, from the size that the tensor is expected to have (unit scaling)
    PROPAGATED = "propagated"  # the exponent that scale propagation carries beside the data: the data is at unit scale as it is
    NONE = "none"  # no scale: the element's own range


FROM_ELSEWHERE = (Source.DELAYED.value, Source.STATIC.value, Source.PROPAGATED.value)  # a scale that the tensor at hand does not set


def unmovable(fmt: formats.Scaled, source: str = Source.DELAYED.value) -> str | None:
    """Why a format's scales cannot come from elsewhere than the tensor at hand, and what can; None where they can. Blocks of
    propagated data have scales of their own, relative to what is propagated."""
    if fmt.granularity in (Granularity.CHANNEL, Granularity.TOKEN):
        return (f"granularity={fmt.granularity.value} has many scales, and only one for a whole tensor can be delayed, static or propagated; "
                "accepted: granularity=tensor")
    if fmt.granularity is Granularity.BLOCK and not fmt.two_level and source != Source.PROPAGATED.value:
        return "its blocks have no scale of the whole tensor above them that could be delayed or static; accepted: source=current, or two_level=true"
    if fmt.zero_point or fmt.amax is not Amax.CURRENT:
        return "zero_point=True and other statistics than amax='current' are taken of the tensor at hand; accepted: source=current"
    return None


def _static(**kwargs):
    return field(metadata={"static": True}, **kwargs)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantizer:
    """A format, and how values are rounded to it. The gradient is straight-through: the cotangent is never narrowed here.

    source: see `Source`; "none" with an element format (whose own range is then all there is), another one with a format that has
    scales. static_rms: of "static" alone, float32, the RMS that the tensor is expected to have (None: the model says). static_clip: of
    "static" and "propagated", float32, amax over RMS for elements other than minifloats (None: chosen for Gaussian data).
    """

    format: formats.Format
    rounding: str = _static(default="nearest_even")
    source: str = _static(default="current")
    static_rms: jax.Array | np.float32 | None = None
    static_clip: jax.Array | np.float32 | None = None

    def __post_init__(self):
        if (self.source == Source.NONE.value) == isinstance(self.format, formats.Scaled) or self.source not in (s.value for s in Source):
            scaled = isinstance(self.format, formats.Scaled)
            accepted = ", ".join(s.value for s in Source if s is not Source.NONE) if scaled else "none, or the format wrapped in formats.scaled(...)"
            raise ValueError(f"source={self.source!r} with a format of type {type(self.format).__name__}; accepted: {accepted}")
        if self.source in FROM_ELSEWHERE and (reason := unmovable(self.format, self.source)):
            raise ValueError(f"source={self.source!r}: {reason}")
        if self.source in (Source.STATIC.value, Source.PROPAGATED.value) and self.static_clip is None and _needs_clip(self.format):
            object.__setattr__(self, "static_clip", np.float32(formats.gaussian_clip(self.format.element)))

    @property
    def stochastic(self) -> bool:
        return Rounding(self.rounding).random


def _needs_clip(fmt: formats.Scaled) -> bool:
    """True for a tensor scale of an element whose own range says nothing about values of size 1: integers, tables, logarithms."""
    if fmt.granularity is not Granularity.TENSOR:
        return False
    if not isinstance(fmt.element, formats.Element):
        return True
    exp_bits = fmt.element.exp_bits  # not a number where pytree machinery puts its own things in the place of leaves
    return isinstance(exp_bits, np.integer) and exp_bits == 0


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

    def takes(self, source: Source) -> bool:
        """True if a quantizer has its scale from there."""
        return any(q.source == source.value for q in self.quantizers())


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PrecisionPolicy:
    """Role -> quantizers; `dot_dtype` is the dtype of the product's inputs (accumulation is float32). history, history_choice: how many
    steps delayed scales remember, and which of their amax counts ("max", "most_recent"). data_dtype: the forward and backward pass run
    under scale propagation with their data held in it; None: they do not. master_weights, adam_m, adam_v: dtypes that the state is held
    in between steps, as ScaledArrays where that is not None (float32)."""

    weights: Operand = Operand()
    activations: Operand = Operand()
    output_gradients: Operand = Operand()
    dot_dtype: str = _static(default="float32")
    history: int = _static(default=1024)
    history_choice: str = _static(default="max")
    data_dtype: str | None = _static(default=None)
    master_weights: str | None = _static(default=None)
    adam_m: str | None = _static(default=None)
    adam_v: str | None = _static(default=None)

    def roles(self, source: Source) -> tuple[str, ...]:
        """The roles in which a quantizer has its scale from there."""
        return tuple(role for role in ROLES if getattr(self, role).takes(source))

    @property
    def stochastic(self) -> bool:
        """True if any operand needs random bits."""
        return any(q.stochastic for role in ROLES for q in getattr(self, role).quantizers())

    def without_quantizers(self) -> PrecisionPolicy:
        """The same dot dtype and nothing quantized: for layers that are kept high."""
        return replace(PrecisionPolicy(), dot_dtype=self.dot_dtype, data_dtype=self.data_dtype)
