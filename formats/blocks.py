"""Quantizing with shared scales: one per tensor, per channel, per token, per block of consecutive values or tile, or two levels.

A block is a set of values with one scale; its amax is its largest magnitude (or a statistic that stands for it). Special blocks,
the same for every rule:
- only zeros and float32 subnormals: scale 1 and values 0 under "exact" (rounded as they are, at scale 1; scale 0 for an
  element that has no zero); scale 2**-127 (E8M0 code 0, as OCP libraries do) under the power-of-two rules, which keep what the
  element's grid then reaches;
- a NaN or an infinity anywhere: the scale is NaN and so is the whole block (with two levels the whole tensor), so that it shows;
- the float32 identity as element: the scale is exactly 1 and every value is unchanged, NaN and inf included.

The power-of-two rules (OCP MX v1.0 section 6.3 for "floor"; the others as torchao and cuBLAS name them) round in place,
with the element's grid moved by the shared exponent: exact down to float32 subnormals, nothing multiplied. "exact", and elements
that are no grid, divide (by the reciprocal) and multiply in float32: scales are never below 2**-126, and products below 2**-126
may be flushed to zero.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from formats import bits as fb
from formats.amax import Amax, magnitude
from formats.catalogue import resolve
from formats.elements import Element
from formats.layout import View
from formats.modes import Draw, Overflow, Rounding, as_float32, parse, parse_rounding
from formats.noise import random_bits as hash_bits
from formats.rounding import round_pattern, round_to
from formats.scaled import ELEMENTS, Granularity, Scaled
from formats.scales import affine_scale, exact_scale, hides, shared_exponent


_NEAR_SUBNORMALS = -90  # below a quantum of 2**-90 a float32 subnormal is less than 2**-31 of it, the resolution of chance


class Manner(NamedTuple):
    """How values are rounded: mode (a `Rounding`, or a traced number), what lies beyond the range, and what random bits do."""

    rounding: Rounding | jax.Array = Rounding.NEAREST_EVEN
    overflow: Overflow = Overflow.SATURATE
    draw: Draw = Draw()

    @staticmethod
    def of(rounding="nearest_even", overflow="saturate", sr_bits=None, sr_rule="full") -> Manner:
        """Of the arguments of `quantize`, checked."""
        rounding = parse_rounding(rounding)
        return Manner(rounding, parse(Overflow, overflow), Draw.of(sr_bits, sr_rule, rounding))

    @property
    def random(self) -> bool:
        """Whether random bits are needed."""
        return isinstance(self.rounding, Rounding) and self.rounding.random

    def round(self, v, element, noise):
        """v rounded to the element, with the random bits that noise() gives."""
        return round_to(v, element, rounding=self.rounding, overflow=self.overflow, sr_bits=self.draw.bits, sr_rule=self.draw.rule,
                        random_bits=noise())


class Scaling(NamedTuple):
    """The scales of one tensor, broadcasting against it cut into blocks. stored: float32, what a number stands for in its block
    (relative to `tensor`); hidden: bool, blocks that are NaN. With a power-of-two rule, exponent: int32, log2 of stored, and
    empty: bool, blocks of zeros. With two levels, tensor: float32, the scale of the stored ones. With zero points, zero: float32."""

    stored: jax.Array
    hidden: jax.Array
    exponent: jax.Array | None = None
    empty: jax.Array | None = None
    tensor: jax.Array | None = None
    zero: jax.Array | None = None


def split(x, fmt, *, rounding="nearest_even", overflow="saturate", sr_bits=None, sr_rule="full", key=None, random_bits=None,
          reduce_max=None, reduce_mean=None, amax=None, scale=None):
    """(values, scale): the narrow numbers and what multiplies them; values * scale == apply(x, fmt) down to 2**-126.

    x: float32, float16 or bfloat16; both results are float32. scale broadcasts against x: shape [] for "tensor", 1 in
    `axis` for "channel" and "token", the shape of x for "block". For an element the scale is 1. key, random_bits: as in
    `apply`; random_bits may be a function that gives them, called where they are used. reduce_max: applied to amax (to that of the tensor, with two
    levels), e.g. a pmax over the mesh axis that shards values of one scale; reduce_mean: likewise to means over equal shards (a pmean),
    for the statistics that are made of them. amax: float32, used in place of the current one (delayed scales), shaped like scale, for
    "block" with one entry a block; with zero_point a pair, the smallest and the largest value. scale: float32, given outright instead, shaped like amax (static and learned scales; "exact" and float32 scales only).
    A scale of 2**-127, subnormal in float32, is returned as 2**-126 with values of half the size.
    Not differentiable: the result is a constant to autodiff.
    """
    fmt, manner = resolve(fmt), Manner.of(rounding, overflow, sr_bits, sr_rule)
    v, view = cut(x, fmt)
    noise = draw_noise(view, manner, key, random_bits)
    if isinstance(fmt, ELEMENTS):
        return manner.round(v, fmt, noise), jnp.float32(1.0)
    scaling = scales_of(v, view, fmt, amax=amax, scale=scale, reduce_max=reduce_max, reduce_mean=reduce_mean)
    values = narrow(v, fmt, scaling, manner, noise, lambda values, y: values)
    factor = factor_of(fmt, scaling)
    if scaling.exponent is not None:
        values = values * jnp.where(scaling.exponent < -126, np.float32(0.5), np.float32(1.0))
    return view.restore(values), view.restore(factor) if fmt.granularity is Granularity.BLOCK else factor


def apply(x, fmt, *, rounding="nearest_even", overflow="saturate", sr_bits=None, sr_rule="full", key=None, random_bits=None, amax=None,
          scale=None):
    """x rounded to the values of fmt, in x's shape and dtype; a constant to autodiff (`quantize` adds a gradient).

    The stochastic modes take either key (hashed with the element's index in x) or random_bits (uint32 like x). amax, scale: as in
    `split`.
    """
    manner = Manner.of(rounding, overflow, sr_bits, sr_rule)
    v, view = cut(x, fmt)
    noise = draw_noise(view, manner, key, random_bits)
    if isinstance(fmt, ELEMENTS):
        if amax is not None or scale is not None:
            raise ValueError("amax and scale need a format with scales: wrap the element in formats.scaled(...)")
        y = manner.round(v, fmt, noise)
    else:
        scaling = scales_of(v, view, fmt, amax=amax, scale=scale)
        y = narrow(v, fmt, scaling, manner, noise, lambda values, y: y)
    return view.restore(y).astype(jnp.asarray(x).dtype)


def inside_range(x, fmt, *, amax=None, scale=None):
    """bool like x: not beyond the smallest and the largest value, at its scale (True for NaN). What `clipped` gradients go by."""
    v, view = cut(x, fmt)
    if isinstance(fmt, ELEMENTS):
        (low, high), inverse = fmt.limits, np.float32(1.0)
    else:
        scaling = scales_of(v, view, fmt, amax=amax, scale=scale)
        (low, high), inverse = fmt.element.limits, 1.0 / factor_of(fmt, scaling)
        if scaling.zero is not None:
            low, high = low - scaling.zero, high - scaling.zero
    return view.restore(~((v * inverse < low) | (v * inverse > high)))


def cut(x, fmt) -> tuple[jax.Array, View]:
    """x as float32, cut into blocks where fmt has them, and how to undo it. ValueError if x has no dimension `axis`."""
    v = lax.stop_gradient(as_float32(x))
    view = view_of(v.shape, fmt)
    return view.cut(v), view


def view_of(shape: tuple[int, ...], fmt) -> View:
    """Which values of a tensor of that shape share a scale. ValueError if it has no dimension `axis`."""
    if isinstance(fmt, ELEMENTS) or fmt.granularity is Granularity.TENSOR:
        return View(shape, None, None)
    axes = fmt.axis if isinstance(fmt.axis, tuple) else (fmt.axis,)
    for axis in axes:
        if not -len(shape) <= axis < len(shape):
            raise ValueError(f"axis={axis} of the format must be a dimension of x, which has shape {shape}")
    dims = tuple(axis % len(shape) for axis in axes)
    if len(set(dims)) < len(dims):
        raise ValueError(f"axis={fmt.axis} of the format names a dimension of x, which has shape {shape}, twice")
    if fmt.granularity is not Granularity.BLOCK:
        return View(shape, dims, None)
    pairs = sorted(zip(dims, fmt.block if isinstance(fmt.block, tuple) else (fmt.block,), strict=True))
    return View(shape, tuple(dim for dim, _ in pairs), tuple(size for _, size in pairs))


def draw_noise(view: View, manner: Manner, key, random_bits):
    """A function that gives uint32 random bits in the view of x, or None where rounding is deterministic: called where the bits are
    used, since what enters a branch is first written to memory. ValueError for a bad pairing."""
    if key is not None and random_bits is not None:
        raise ValueError("key and random_bits exclude each other: give one")
    if not manner.random:
        if key is not None or random_bits is not None:
            raise ValueError(f"key and random_bits need rounding='stochastic', got rounding={getattr(manner.rounding, 'value', 'a number')!r}")
        return lambda: None
    if key is not None:
        return lambda: view.cut(hash_bits(key, view.shape))
    if random_bits is None:
        raise ValueError(f"rounding={manner.rounding.value!r} needs key=... or random_bits=...")
    if callable(random_bits):
        return lambda: view.cut(random_bits())
    random_bits = jnp.asarray(random_bits)
    if random_bits.shape != view.shape or random_bits.dtype != jnp.uint32:
        raise ValueError(f"random_bits must be uint32 of shape {view.shape}, got {random_bits.dtype}{random_bits.shape}")
    return lambda: view.cut(random_bits)


def scales_of(v, view: View, fmt: Scaled, *, amax=None, scale=None, reduce_max=None, reduce_mean=None) -> Scaling:
    """The scales of v, the tensor cut by view; amax, scale, reduce_max, reduce_mean as in `split`."""
    if scale is not None:
        if amax is not None or not fmt.exact or fmt.scale_element is not None or fmt.zero_point:
            raise ValueError("scale= needs a format with rule='exact', scale_format='float32', zero_point=False, and no amax=")
        stored = view.per_scale(as_float32(scale))
        return Scaling(stored, jnp.isnan(stored))
    if fmt.zero_point:
        return _affine(v, view, fmt, amax, reduce_max)
    if amax is not None:
        amax, top = view.per_scale(as_float32(amax)), None
    else:
        def squared_error(candidate):
            return narrow(v, fmt, _scaling(candidate, fmt, None), Manner(), lambda: None, lambda values, y: (y - v) ** 2)

        # with two levels a block's own statistic is its own: only the largest of all blocks is anybody else's
        across = (None, None) if fmt.two_level else (reduce_max, reduce_mean)
        amax = magnitude(v, view, fmt.amax, fmt.amax_at, squared_error, *across)
        top = reduce_max(jnp.max(amax, initial=0.0)) if fmt.two_level and reduce_max is not None else None
    return _scaling(amax, fmt, top)


def _scaling(amax, fmt: Scaled, top) -> Scaling:
    """The scales for given amax. top: amax of the whole tensor, None for the largest here."""
    hidden = hides(amax, fmt.element)
    if not fmt.exact:
        exponent = shared_exponent(amax, fmt.element, fmt.rule_number)
        if not isinstance(fmt.element, Element):  # those are multiplied: by normal numbers only
            exponent = jnp.clip(exponent, -126, 126)
        # the barrier keeps it from being computed once per value
        exponent, hidden, empty = lax.optimization_barrier((exponent, hidden, fb.to_pattern(amax) == 0))
        return Scaling(fb.to_value(fb.power_of_two(exponent)), hidden, exponent, empty)
    tensor = None
    if fmt.two_level:
        top = jnp.max(amax, initial=0.0) if top is None else top
        # as two divisors: the product of NVFP4, 448 * 6, and of any other elements, is exact
        tensor = lax.optimization_barrier(exact_scale(top, _Bound(fmt.scale_element.max_value * fmt.element.max_value), None))
        hidden = hidden | jnp.isnan(tensor)
    stored = exact_scale(amax, fmt.element, fmt.scale_element, tensor)
    if not isinstance(fmt.element, Element):
        stored = jnp.where((amax == 0) & ~fmt.element.has_zero, np.float32(0.0), stored)
    return Scaling(stored, hidden, tensor=tensor)


class _Bound(NamedTuple):
    """What `exact_scale` needs of an element."""

    max_value: jax.Array
    unbounded: np.bool_ = np.bool_(False)


def _affine(v, view: View, fmt: Scaled, amax, reduce_max) -> Scaling:
    """Scale and zero point from the smallest and the largest value, 0 included; both statistics of the values, or percentiles."""
    if amax is not None:
        if not isinstance(amax, tuple):
            raise ValueError("amax= does not say where zero lies: formats with zero_point=True take amax=(low, high)")
        low, high = (view.per_scale(as_float32(limit)) for limit in amax)
        low, high, reduce_max = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0), None
    elif fmt.amax is Amax.PERCENTILE:
        low, high = (view.reduce(lambda u, q=q, **where: jnp.quantile(u, q, **where), v) for q in (1 - fmt.amax_at, fmt.amax_at))
        low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
    else:
        low, high = (view.reduce(lambda u, f=f, **where: f(u, initial=0.0, **where), v) for f in (jnp.min, jnp.max))
    if reduce_max is not None:
        low, high = -reduce_max(-low), reduce_max(high)
    scale, zero = affine_scale(low, high, fmt.element)
    return Scaling(scale, jnp.isnan(scale), zero=zero)


def narrow(v, fmt: Scaled, scaling: Scaling, manner: Manner, noise, want):
    """want(values, y): values are the numbers of the element, y what they stand for, of the tensor v cut into blocks. What is wanted
    is made where they are, inside a branch, so that one pass over v makes it."""
    if scaling.exponent is not None and isinstance(fmt.element, Element):
        return _in_place(v, fmt, scaling, manner, noise, want)
    factor, element = factor_of(fmt, scaling), fmt.element
    if scaling.zero is not None:
        element = dataclasses.replace(element, min_value=element.min_value - scaling.zero, max_value=element.max_value - scaling.zero)
    # The reciprocal is spelled out, since XLA would take it anyway wherever a scale is shared; the barrier keeps it from
    # being computed once per value.
    factor, inverse = lax.optimization_barrier((factor, jnp.where(factor == 0, np.float32(1.0), 1.0 / factor)))

    def rounded():
        values = manner.round(v * inverse, element, noise)
        # v * 1 would flush subnormals
        return want(jnp.where(element.unbounded, v, values), jnp.where(element.unbounded, v, values * factor))

    if scaling.tensor is None:
        return rounded()
    # XLA on CPU forgets barriers before it fuses, and would round a block's scale once per value; it does not fuse into a branch.
    nothing = jnp.full(v.shape, np.float32(np.nan))
    return lax.cond(jnp.isnan(scaling.tensor), lambda: want(nothing, nothing), rounded)


def near_ends(exponent, hidden, element: Element):
    """bool: whether the element's grid at any of these scales comes near the float32 subnormals, a scale's reciprocal is one, or a
    block is NaN: what the quicker branch leaves out."""
    near = (exponent + element.quantum_exp < _NEAR_SUBNORMALS) | (exponent > 126) | hidden
    return jnp.any(near)


def times_power(value, exponent, ends: bool):
    """value * 2**exponent, exponent -127 .. 127; by multiplication unless the ends of the float32 range are near."""
    return fb.scale_exact(value, exponent) if ends else value * fb.to_value((exponent + 127) << 23)


def factor_of(fmt: Scaled, scaling: Scaling):
    """float32 that multiplies the values: scale, scale of the scale and pre-scale in one. 2**-127 would be flushed; it is 2**-126."""
    factor = scaling.stored
    if scaling.exponent is not None:
        normal = fb.to_value(fb.power_of_two(jnp.maximum(scaling.exponent, -126)))
        factor = jnp.where(scaling.hidden, np.float32(np.nan), normal)
    elif scaling.tensor is not None:
        factor = jnp.clip(factor * scaling.tensor, np.float32(2.0**-126), np.float32(2.0**126))
    return factor if fmt.pre_scale is None else factor * (1 / fmt.pre_scale)


def _in_place(v, fmt: Scaled, scaling: Scaling, manner: Manner, noise, want):
    """`narrow` by moving the element's grid rather than v."""
    v = v if fmt.pre_scale is None else v * fmt.pre_scale

    def rounded(exponent, ends: bool):
        y_bits = round_pattern(fb.to_pattern(v), fmt.element, manner.rounding, manner.overflow, manner.draw, noise(), exponent, ends)
        y = fb.to_value(y_bits | jnp.where(scaling.hidden, fb.NAN, np.int32(0)) if ends else y_bits)  # NaN | anything is NaN
        return want(times_power(y, -exponent, ends), y if fmt.pre_scale is None else y * (1 / fmt.pre_scale))

    # Subnormals cost half a copy: they are treated only where a block's grid comes near them. Blocks of zeros have any grid.
    exponent = jnp.where(scaling.empty, 0, scaling.exponent)
    return lax.cond(near_ends(exponent, scaling.hidden, fmt.element), lambda: rounded(scaling.exponent, True), lambda: rounded(exponent, False))
