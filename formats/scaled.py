"""Formats whose values share scales: what is shared by whom, what a scale is computed from, and what it is rounded to."""

from __future__ import annotations

import dataclasses
import enum

import jax
import numpy as np

from formats import bits as fb
from formats.amax import Amax, gaussian_clip
from formats.codebooks import Codebook
from formats.elements import Element, power_of_two
from formats.logarithmic import Logarithmic
from formats.midrise import Midrise
from formats.modes import parse
from formats.scales import POWER_RULES, Rule, rule_number

ELEMENTS = (Element, Codebook, Logarithmic, Midrise)


class Granularity(enum.Enum):
    """Which values share a scale. channel and token: those along `axis` (the contracted one)."""

    TENSOR = "tensor"
    CHANNEL = "channel"
    TOKEN = "token"
    BLOCK = "block"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scaled:
    """An element format with shared scales. Leaves, which may be traced: the widths (element, scale_element), rule_number,
    amax_at and pre_scale; the rest is structure.

    scale_element: what a scale is rounded to, None for float32. exact: rule "exact"; otherwise rule_number (int32, the place in
    `POWER_RULES`) says which power of two. axis: along which a scale is constant (channel, token) or blocks lie; several for
    blocks of several dimensions, then block has as many sizes. amax, amax_at: see `Amax`. pre_scale: float32 or None; scales
    are those of x, then x is multiplied by it before rounding and divided after. two_level: block scales are relative to a float32 scale of the whole tensor
    (NVFP4). zero_point: integers relative to a code of their own for zero, x = scale (code - zero).
    """

    element: Element | Codebook | Logarithmic | Midrise
    scale_element: Element | None
    rule_number: jax.Array | np.int32
    amax_at: jax.Array | np.float32 | None
    pre_scale: jax.Array | np.float32 | None
    granularity: Granularity = dataclasses.field(metadata={"static": True})
    axis: int | tuple[int, ...] = dataclasses.field(metadata={"static": True})
    block: int | tuple[int, ...] | None = dataclasses.field(metadata={"static": True})
    exact: bool = dataclasses.field(metadata={"static": True})
    amax: Amax = dataclasses.field(metadata={"static": True})
    two_level: bool = dataclasses.field(metadata={"static": True})
    zero_point: bool = dataclasses.field(metadata={"static": True})

    @property
    def rule(self) -> Rule:
        """The scale rule; its number must be concrete."""
        return Rule.EXACT if self.exact else POWER_RULES[int(self.rule_number)]


def scaled(element, granularity="tensor", *, axis: int | tuple[int, ...] = -1, block: int | tuple[int, ...] | None = None,
           scale_format="float32", rule="exact", amax="current", amax_at=None, pre_scale=None, two_level: bool = False,
           zero_point: bool = False) -> Scaled:
    """A format with shared scales. element, scale_format: an element format or a catalogue name.

    granularity: "tensor" one scale; "channel", "token" one for each index of the dimensions other than `axis`; "block" one for every
    `block` consecutive values along `axis` (the last block of a row may be short), or for every tile of block=(16, 16) along
    axis=(-2, -1). rule: see `Rule`; its number may be given instead, and traced, for the power-of-two rules, which have
    float8_e8m0fnu scales whatever scale_format. amax: see `Amax`; amax_at is its parameter (percentile: 0.999; rms, std: the
    Gaussian-optimal multiple). pre_scale: 3/4 keeps blocks with a power-of-two scale from clipping (Quartet, section 4.3).
    ValueError for what does not fit together.
    """
    element = _element("element", element)
    scale_element = None if scale_format == "float32" else _element("scale_format", scale_format)
    granularity, amax = parse(Granularity, granularity), parse(Amax, amax, "amax")
    _check_blocks(granularity, axis, block)
    number = rule_number(rule)
    exact = number is None
    if not exact:
        if scale_format not in ("float32", "float8_e8m0fnu", power_of_two()):
            raise ValueError(f"scale_format={scale_format!r} with rule={rule!r} must be 'float8_e8m0fnu'")
        scale_element = power_of_two()
    elif scale_element is not None and not isinstance(scale_element, Element):
        raise ValueError(f"scale_format={scale_format!r} must be an element format such as 'float8_e4m3fn'")
    if two_level and (granularity is not Granularity.BLOCK or not exact or scale_element is None):
        raise ValueError("two_level=True needs granularity='block', rule='exact' and a scale_format such as 'float8_e4m3fn'")
    if zero_point and not (isinstance(element, Element) and exact and scale_element is None and pre_scale is None
                           and amax in (Amax.CURRENT, Amax.PERCENTILE)):
        raise ValueError("zero_point=True needs an integer element, rule='exact', float32 scales and amax='current' or 'percentile'")
    if not isinstance(element, Element) and isinstance(rule, str) and rule == "even":
        raise ValueError("rule='even' rounds to the mantissa bits of a minifloat or integer; use floor, ceil, rceil or exact")
    return Scaled(element, scale_element, np.int32(0) if exact else number, _parameter(amax, amax_at, element),
                  None if pre_scale is None else _number("pre_scale", pre_scale), granularity, axis, block, exact, amax,
                  two_level, zero_point)


def block(element, size: int | tuple[int, ...], *, axis: int | tuple[int, ...] = -1, scale_format="float8_e8m0fnu", rule="floor",
          **more) -> Scaled:
    """An MX-like block format: `size` consecutive values along `axis` share a scale (OCP MX: size 32, E8M0, floor). more: the other
    arguments of `scaled`."""
    return scaled(element, "block", axis=axis, block=size, scale_format=scale_format, rule=rule, **more)


def _check_blocks(granularity: Granularity, axis, size) -> None:
    if (granularity is Granularity.BLOCK) != (size is not None):
        raise ValueError(f"block={size} with granularity={granularity.value!r}: a block size goes with 'block' alone")
    axes, sizes = (value if isinstance(value, tuple) else (value,) for value in (axis, size))
    if len(axes) > 1 and granularity is not Granularity.BLOCK:
        raise ValueError(f"axis={axis} with granularity={granularity.value!r} must be one integer")
    if size is None:
        return
    if len(axes) != len(sizes) or not all(isinstance(n, int) and n > 0 for n in sizes):
        raise ValueError(f"block={size!r} with axis={axis!r} must be a positive integer, or as many as there are axes")


def _parameter(amax: Amax, given, element):
    """amax_at, checked; None where the statistic has no parameter."""
    if amax in (Amax.RMS, Amax.STD):
        return np.float32(gaussian_clip(element)) if given is None else _number("amax_at", given)
    if amax is Amax.PERCENTILE:
        value = _number("amax_at", 0.999 if given is None else given)
        if not fb.is_traced(value) and not 0 < value <= 1:
            raise ValueError(f"amax_at={given!r} with amax='percentile' must be above 0 and at most 1")
        return value
    if given is not None:
        raise ValueError(f"amax_at={given!r} goes with amax='rms', 'std' or 'percentile', not with {amax.value!r}")
    return None


def _number(key: str, value):
    """A positive float32, or a traced one."""
    if isinstance(value, jax.Array):
        return value.astype(np.float32)
    if isinstance(value, bool) or not isinstance(value, (int, float, np.floating)) or not 0 < value < np.inf:
        raise ValueError(f"{key}={value!r} must be a positive number")
    return np.float32(value)


def _element(key: str, value):
    if isinstance(value, str):
        from formats.catalogue import get  # the catalogue is built of scaled formats

        value = get(value)
    if not isinstance(value, ELEMENTS):
        raise ValueError(f"{key}={value!r} must be an element format such as 'float8_e4m3fn' or formats.minifloat(4, 3)")
    smallest = getattr(value, "min_magnitude", None)
    if key == "element" and smallest is not None and not fb.is_traced(smallest) and smallest > 0:
        raise ValueError("element='float8_e8m0fnu' cannot have a scale: it has no zero")
    return value
