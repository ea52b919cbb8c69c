"""Formats whose values share scales: one per tensor, per channel, per token, or per block of consecutive values.

A block is a set of values with one scale; its amax is its largest magnitude. Special blocks, the same for every rule:
- only zeros and float32 subnormals: scale 1 and values 0 under "exact" (rounded as they are, at scale 1); scale 2**-127
  (E8M0 code 0, as OCP libraries do) under the power-of-two rules, which keep what the element's grid then reaches;
- a NaN or an infinity anywhere: the scale is NaN and so is the whole block, so that it shows;
- the float32 identity as element: the scale is exactly 1 and every value is unchanged, NaN and inf included.

The power-of-two rules (OCP MX v1.0 section 6.3 for "floor"; the others as torchao and cuBLAS name them) round in place,
with the element's grid moved by the shared exponent: exact down to float32 subnormals, nothing multiplied. "exact"
divides and multiplies in float32: its scale is never below 2**-126, and products below 2**-126 may be flushed to zero.
"""

from __future__ import annotations

import dataclasses
import enum

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from formats import bits as fb
from formats.elements import Element, power_of_two
from formats.layout import View
from formats.noise import random_bits as hash_bits
from formats.modes import Draw, Overflow, Rounding, as_float32, parse
from formats.rounding import round_pattern, round_to
from formats.scales import Rule, exact_scale, hides, shared_exponent


class Granularity(enum.Enum):
    """Which values share a scale. channel and token: those along `axis` (the contracted one)."""

    TENSOR = "tensor"
    CHANNEL = "channel"
    TOKEN = "token"
    BLOCK = "block"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scaled:
    """An element format with shared scales. Widths (element, scale_element) are leaves and may be traced; the rest is
    structure. scale_element: what a scale is rounded to, None for float32. axis: along which a scale is constant
    (channel, token) or blocks of `block` values lie (block)."""

    element: Element
    scale_element: Element | None
    granularity: Granularity = dataclasses.field(metadata={"static": True})
    axis: int = dataclasses.field(metadata={"static": True})
    block: int | None = dataclasses.field(metadata={"static": True})
    rule: Rule = dataclasses.field(metadata={"static": True})


def scaled(element: Element, granularity="tensor", *, axis: int = -1, block: int | None = None, scale_format="float32",
           rule="exact") -> Scaled:
    """A format with shared scales. element, scale_format: an Element or a catalogue name.

    granularity: "tensor" one scale; "channel", "token" one for each index of the dimensions other than `axis`; "block"
    one for every `block` consecutive values along `axis` (the last block of a row may be short). rule: see `Rule`; the
    power-of-two rules have float8_e8m0fnu scales whatever scale_format. ValueError for what does not fit together.
    """
    element = _element("element", element)
    scale_element = None if scale_format == "float32" else _element("scale_format", scale_format)
    granularity, rule = parse(Granularity, granularity), parse(Rule, rule)
    if (granularity is Granularity.BLOCK) != (block is not None):
        raise ValueError(f"block={block} with granularity={granularity.value!r}: a block size goes with 'block' alone")
    if block is not None and (not isinstance(block, int) or block < 1):
        raise ValueError(f"block={block!r} must be a positive integer")
    if rule is not Rule.EXACT:
        if scale_format not in ("float32", "float8_e8m0fnu", power_of_two()):
            raise ValueError(f"scale_format={scale_format!r} with rule={rule.value!r} must be 'float8_e8m0fnu'")
        scale_element = power_of_two()
    return Scaled(element, scale_element, granularity, axis, block, rule)


def block(element: Element, size: int, *, axis: int = -1, scale_format="float8_e8m0fnu", rule="floor") -> Scaled:
    """An MX-like block format: `size` consecutive values along `axis` share a scale (OCP MX: size 32, E8M0, floor)."""
    return scaled(element, "block", axis=axis, block=size, scale_format=scale_format, rule=rule)


def _element(key: str, value) -> Element:
    if isinstance(value, str):
        from formats.catalogue import get  # the catalogue is built of blocks

        value = get(value)
    if not isinstance(value, Element):
        raise ValueError(f"{key}={value!r} must be an element format such as 'float8_e4m3fn' or formats.minifloat(4, 3)")
    if not fb.is_traced(value.min_magnitude) and value.min_magnitude > 0 and key == "element":
        raise ValueError("element='float8_e8m0fnu' cannot have a scale: it has no zero")
    return value


def split(x, fmt: Element | Scaled, *, rounding="nearest_even", overflow="saturate", key=None, random_bits=None,
          reduce_max=None, amax=None):
    """(values, scale): the narrow numbers and what multiplies them; values * scale == apply(x, fmt) down to 2**-126.

    x: float32, float16 or bfloat16; both results are float32. scale broadcasts against x: shape [] for "tensor", 1 in
    `axis` for "channel" and "token", the shape of x for "block". For an Element the scale is 1. key, random_bits: as in
    `apply`. reduce_max: applied to amax, e.g. a pmax over the mesh axis that shards values of one scale. amax: float32,
    used in place of the current one (delayed or static scales), shaped like scale, for "block" with one entry a block
    along `axis`. A scale of 2**-127, subnormal in float32, is returned as 2**-126 with values of half the size.
    Not differentiable: the result is a constant to autodiff.
    """
    v, view = _view(x, fmt)
    noise = _noise(view, rounding, key, random_bits)
    if isinstance(fmt, Element):
        return round_to(v, fmt, rounding=rounding, overflow=overflow, random_bits=noise), jnp.float32(1.0)
    if amax is None:
        amax = view.amax(v) if reduce_max is None else reduce_max(view.amax(v))
    else:
        amax = view.per_scale(as_float32(amax))
    if fmt.rule is Rule.EXACT:
        values, scale = _exact(v, fmt, amax, rounding, overflow, noise)
    else:
        y, exponent = _in_place(v, fmt, amax, rounding, overflow, noise)
        exponent = jnp.maximum(exponent, -126)
        scale = jnp.where(hides(amax, fmt.element), jnp.float32(jnp.nan), fb.to_value(fb.power_of_two(exponent)))
        # 2**-127 would be flushed: two factors
        inverse = fb.to_value(fb.power_of_two(jnp.maximum(-exponent, -126)))
        values = y * inverse * jnp.where(exponent == 127, jnp.float32(0.5), jnp.float32(1.0))
    return view.restore(values), view.restore(scale) if fmt.granularity is Granularity.BLOCK else scale


def apply(x, fmt: Element | Scaled, *, rounding="nearest_even", overflow="saturate", key=None, random_bits=None):
    """x rounded to the values of fmt, in x's shape and dtype; a constant to autodiff (`quantize` adds a gradient).

    rounding="stochastic" takes either key (hashed with the element's index in x) or random_bits (uint32 like x).
    """
    v, view = _view(x, fmt)
    noise = _noise(view, rounding, key, random_bits)
    if isinstance(fmt, Element):
        y = round_to(v, fmt, rounding=rounding, overflow=overflow, random_bits=noise)
    elif fmt.rule is Rule.EXACT:
        values, scale = _exact(v, fmt, view.amax(v), rounding, overflow, noise)
        y = jnp.where(fmt.element.unbounded, v, values * scale)
    else:
        y, _ = _in_place(v, fmt, view.amax(v), rounding, overflow, noise)
    return view.restore(y).astype(jnp.asarray(x).dtype)


def _view(x, fmt) -> tuple[jax.Array, View]:
    """x as float32, cut into blocks where fmt has them, and how to undo it. ValueError if x has no dimension `axis`."""
    v = lax.stop_gradient(as_float32(x))
    if isinstance(fmt, Element) or fmt.granularity is Granularity.TENSOR:
        return v, View(v.shape, None, None)
    if not -v.ndim <= fmt.axis < v.ndim:
        raise ValueError(f"axis={fmt.axis} of the format must be a dimension of x, which has shape {v.shape}")
    axis = fmt.axis % v.ndim
    if fmt.granularity is not Granularity.BLOCK:
        return v, View(v.shape, axis, None)
    view = View(v.shape, axis, fmt.block)
    return view.cut(v), view


def _noise(view: View, rounding, key, random_bits):
    """uint32 random bits in the view of x, or None where rounding is deterministic. ValueError for a bad pairing."""
    rounding = parse(Rounding, rounding)
    if key is not None and random_bits is not None:
        raise ValueError("key and random_bits exclude each other: give one")
    if rounding is not Rounding.STOCHASTIC:
        if key is not None or random_bits is not None:
            raise ValueError(f"key and random_bits need rounding='stochastic', got rounding={rounding.value!r}")
        return None
    if key is not None:
        random_bits = hash_bits(key, view.shape)
    elif random_bits is None:
        raise ValueError("rounding='stochastic' needs key=... or random_bits=...")
    if jnp.shape(random_bits) != view.shape or random_bits.dtype != jnp.uint32:
        raise ValueError(f"random_bits must be uint32 of shape {view.shape}, got {random_bits.dtype}{random_bits.shape}")
    return view.cut(random_bits)


def _exact(v, fmt: Scaled, amax, rounding, overflow, noise):
    """(values, scale) of v in its view: values = v / scale rounded."""
    scale = exact_scale(amax, fmt.element, fmt.scale_element)
    # The reciprocal is spelled out, since XLA would take it anyway wherever a scale is shared; the barrier keeps it from
    # being computed once per value.
    scale, inverse = lax.optimization_barrier((scale, 1.0 / scale))
    values = round_to(v * inverse, fmt.element, rounding=rounding, overflow=overflow, random_bits=noise)
    # v * 1 would flush subnormals
    return jnp.where(fmt.element.unbounded, v, values), scale


def _in_place(v, fmt: Scaled, amax, rounding, overflow, noise):
    """(y, exponent): v rounded on the element's grid times 2**exponent, by moving the grid rather than v."""
    hidden = jnp.where(hides(amax, fmt.element), fb.NAN, np.int32(0))  # NaN | anything is NaN
    exponent, hidden = lax.optimization_barrier((shared_exponent(amax, fmt.element, fmt.rule), hidden))
    y_bits = round_pattern(fb.to_pattern(v), fmt.element, parse(Rounding, rounding), parse(Overflow, overflow), Draw(), noise,
                           exponent)
    return fb.to_value(y_bits | hidden), exponent
