"""Formats whose values share scales: one per tensor, per channel, per token, or per block of consecutive values.

A block is a set of values with one scale; its amax is its largest magnitude. Special blocks, the same for every rule:
- only zeros and float32 subnormals: values 0; scale 1 under "exact", 2**-127 (E8M0 code 0, as OCP libraries do) under
  the power-of-two rules, which still keep subnormals where the element reaches them;
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
from formats.noise import random_bits as hash_bits
from formats.rounding import Overflow, Rounding, as_float32, parse, round_pattern, round_to


_LANES = 8


class Granularity(enum.Enum):
    """Which values share a scale. channel and token: those along `axis` (the contracted one)."""

    TENSOR = "tensor"
    CHANNEL = "channel"
    TOKEN = "token"
    BLOCK = "block"


class Rule(enum.Enum):
    """From amax to scale, m = largest value of the element. exact: amax / m. The others are powers of two, as exponents:
    floor: floor(log2 amax) - floor(log2 m); ceil: ceil(log2 amax) - floor(log2 m); rceil: ceil(log2(amax / m));
    even: as floor, of amax rounded (half up) to the element's mantissa bits."""

    EXACT = "exact"
    FLOOR = "floor"
    CEIL = "ceil"
    RCEIL = "rceil"
    EVEN = "even"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scaled:
    """An element format with shared scales. Widths (element, scale_element) are leaves and may be traced; the rest is
    structure. scale_element: what a scale is rounded to. axis: along which a scale is constant (channel, token) or
    blocks of `block` values lie (block)."""

    element: Element
    scale_element: Element
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
    element, scale_element = _element("element", element), _element("scale_format", scale_format)
    granularity, rule = parse(Granularity, granularity), parse(Rule, rule)
    if (granularity is Granularity.BLOCK) != (block is not None):
        raise ValueError(f"block={block} with granularity={granularity.value!r}: a block size goes with 'block' alone")
    if block is not None and (not isinstance(block, int) or block < 1):
        raise ValueError(f"block={block!r} must be a positive integer")
    if rule is not Rule.EXACT:
        if scale_format not in ("float32", "float8_e8m0fnu"):
            raise ValueError(f"rule={rule.value!r} makes power-of-two scales: scale_format must be float8_e8m0fnu")
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
    v, view = _View.of(x, fmt)
    noise = _noise(x, view, rounding, key, random_bits)
    if isinstance(fmt, Element):
        return round_to(v, fmt, rounding=rounding, overflow=overflow, random_bits=noise), jnp.float32(1.0)
    amax = _amax(v, view, reduce_max, amax)
    if fmt.rule is Rule.EXACT:
        values, scale = _exact(v, fmt, amax, rounding, overflow, noise)
    else:
        y, exponent = _in_place(v, fmt, amax, rounding, overflow, noise)
        exponent = jnp.maximum(exponent, -126)
        scale = jnp.where(_shows(amax, fmt), jnp.float32(jnp.nan), fb.to_value(fb.power_of_two(exponent)))
        # 2**-127 would be flushed: two factors
        inverse = fb.to_value(fb.power_of_two(jnp.maximum(-exponent, -126)))
        values = y * inverse * jnp.where(exponent == 127, jnp.float32(0.5), jnp.float32(1.0))
    return view.restore(values), view.restore(scale) if fmt.granularity is Granularity.BLOCK else scale


def apply(x, fmt: Element | Scaled, *, rounding="nearest_even", overflow="saturate", key=None, random_bits=None):
    """x rounded to the values of fmt, in x's shape and dtype; a constant to autodiff (`quantize` adds a gradient).

    rounding="stochastic" takes either key (hashed with the element's index in x) or random_bits (uint32 like x).
    """
    v, view = _View.of(x, fmt)
    noise = _noise(x, view, rounding, key, random_bits)
    if isinstance(fmt, Element):
        y = round_to(v, fmt, rounding=rounding, overflow=overflow, random_bits=noise)
    elif fmt.rule is Rule.EXACT:
        values, scale = _exact(v, fmt, _amax(v, view), rounding, overflow, noise)
        y = jnp.where(fmt.element.unbounded, v, values * scale)
    else:
        y, _ = _in_place(v, fmt, _amax(v, view), rounding, overflow, noise)
    return view.restore(y).astype(jnp.asarray(x).dtype)


@dataclasses.dataclass(frozen=True)
class _View:
    """An array with each scale's values along `axes` (None: all of them): x itself, or x cut into blocks."""

    shape: tuple[int, ...]
    axes: tuple[int, ...] | None
    block: int | None

    @staticmethod
    def of(x, fmt) -> tuple[jax.Array, _View]:
        """x as float32 in its view, and the view. ValueError if x has no dimension `axis`."""
        v = lax.stop_gradient(as_float32(x))
        if isinstance(fmt, Element) or fmt.granularity is Granularity.TENSOR:
            return v, _View(v.shape, None, None)
        if not -v.ndim <= fmt.axis < v.ndim:
            raise ValueError(f"axis={fmt.axis} of the format is out of range for x of shape {v.shape}")
        axis = fmt.axis % v.ndim
        if fmt.granularity is not Granularity.BLOCK:
            return v, _View(v.shape, (axis,), None)
        view = _View(v.shape, (axis + 1,), fmt.block)
        return view.cut(v), view

    def cut(self, x):
        """x of `shape` as [..., blocks, block, ...], the last block filled up with zeros; or x itself."""
        if self.block is None:
            return x
        axis = self.axes[0] - 1
        fill = -self.shape[axis] % self.block
        if fill:
            x = jnp.pad(x, [(0, fill if dim == axis else 0) for dim in range(x.ndim)])
        return x.reshape(*x.shape[:axis], -1, self.block, *x.shape[axis + 1:])

    def restore(self, v):
        """The inverse of `cut`, after broadcasting v to the cut shape."""
        if self.block is None:
            return v
        axis, length = self.axes[0] - 1, self.shape[self.axes[0] - 1]
        blocks = -(-length // self.block)
        cut = (*self.shape[:axis], blocks, self.block, *self.shape[axis + 1:])
        flat = jnp.broadcast_to(v, cut).reshape(*self.shape[:axis], blocks * self.block, *self.shape[axis + 1:])
        return lax.slice_in_dim(flat, 0, length, axis=axis)


def _noise(x, view: _View, rounding, key, random_bits):
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


def _amax(v, view: _View, reduce_max=None, given=None):
    """Largest magnitude of each scale's values, as size-1 dimensions of v; NaN if one is NaN."""
    if given is not None:
        given = as_float32(given)
        return jnp.expand_dims(given, view.axes) if view.block is not None else given
    if view.block is None:
        amax = jnp.max(jnp.abs(v), axis=view.axes, keepdims=view.axes is not None, initial=0.0)
    else:
        amax = _block_amax(v, view.axes[0])
    return amax if reduce_max is None else reduce_max(amax)


def _block_amax(v, axis: int):
    """amax along a short axis. In integers, and along the last axis in two stages kept apart by a barrier: XLA on CPU
    vectorises that (0.5 copies of the array), but neither a float maximum of adjacent values (1.4) nor one stage (1.5)."""
    magnitude = fb.to_pattern(v) & fb.MAGNITUDE
    if axis == v.ndim - 1 and v.shape[axis] % _LANES == 0:
        magnitude = jnp.max(magnitude.reshape(*v.shape[:-1], -1, _LANES), axis=-2)
        magnitude = lax.optimization_barrier(magnitude)
    return fb.to_value(lax.optimization_barrier(jnp.max(magnitude, axis=axis, keepdims=True)))


def _shows(amax, fmt: Scaled):
    """bool: the block holds a NaN or infinity that its format would hide, so all of it becomes NaN."""
    return ~jnp.isfinite(amax) & ~fmt.element.unbounded


def _exact(v, fmt: Scaled, amax, rounding, overflow, noise):
    """(values, scale), scale = amax / max_value in float32, rounded to scale_element."""
    # XLA turns a / (shared b) into a * (1 / b), an ulp off; a select keeps b from being shared, and the division true
    max_value = jnp.where(jnp.isnan(amax), amax, fmt.element.max_value)
    scale = jnp.maximum(amax / max_value, jnp.float32(2.0**-126))
    # a scale that rounds to zero would lose the block: take the smallest there is
    smallest = fb.to_value(jnp.maximum(fb.power_of_two(fmt.scale_element.quantum_exp), fb.SMALLEST_NORMAL))
    scale = jnp.maximum(round_to(scale, fmt.scale_element), smallest)
    # compared in integers: a subnormal amax may read as zero or not, depending on the backend
    empty = fb.to_pattern(amax) < fb.SMALLEST_NORMAL
    scale = jnp.where(empty | fmt.element.unbounded, jnp.float32(1.0), scale)
    scale = jnp.where(_shows(amax, fmt), jnp.float32(jnp.nan), scale)
    # the reciprocal spelled out, since XLA would take it anyway wherever a scale is shared; the barrier keeps it from being
    # computed once per value
    scale, inverse = lax.optimization_barrier((scale, 1.0 / scale))
    values = round_to(v * inverse, fmt.element, rounding=rounding, overflow=overflow, random_bits=noise)
    # v / 1 would flush subnormals
    return jnp.where(fmt.element.unbounded, v, values), scale


def _in_place(v, fmt: Scaled, amax, rounding, overflow, noise):
    """(y, exponent): v rounded on the element's grid times 2**exponent, by moving the grid rather than v."""
    # NaN | anything is NaN
    exponent, hidden = lax.optimization_barrier(
        (shared_exponent(amax, fmt.element, fmt.rule), jnp.where(_shows(amax, fmt), fb.NAN, np.int32(0))))
    y_bits = round_pattern(fb.to_pattern(v), fmt.element, parse(Rounding, rounding), parse(Overflow, overflow), noise,
                           exponent)
    return fb.to_value(y_bits | hidden), exponent


def shared_exponent(amax, element: Element, rule: Rule):
    """int32 exponent of a block's power-of-two scale, -127 .. 127 (E8M0), by integer arithmetic on amax's pattern.

    Never floor(log2 amax): float32 log2 is one too large an ulp below a power of two. 0 for the float32 identity.
    """
    bits, top = fb.to_pattern(amax), fb.to_pattern(element.max_value)
    if rule is Rule.EVEN:
        bits = bits + ((np.int32(1) << (23 - element.man_bits)) >> 1)
    exponent = (bits >> 23) - (top >> 23)
    mantissa = bits & np.int32(0x7FFFFF)
    if rule is Rule.CEIL:
        exponent = exponent + (mantissa > 0).astype(jnp.int32)
    elif rule is Rule.RCEIL:
        exponent = exponent + (mantissa > (top & np.int32(0x7FFFFF))).astype(jnp.int32)
    # subnormals are one with zero, whatever the backend made of them in the maximum
    exponent = jnp.where(bits < fb.SMALLEST_NORMAL, -127, exponent)
    return jnp.where(element.unbounded, 0, jnp.clip(exponent, -127, 127))
