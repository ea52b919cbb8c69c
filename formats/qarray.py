"""Arrays as they are stored: packed codes, scales in their own format, and what is needed to read them."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from formats import bits as fb
from formats.blocks import (
    Manner,
    Scaling,
    cut,
    draw_noise,
    factor_of,
    narrow,
    near_ends,
    scales_of,
    times_power,
    view_of,
)
from formats.catalogue import resolve
from formats.codes import from_codes, stored_bits, to_codes
from formats.describe import concrete, name_of
from formats.elements import Element
from formats.packing import pack, unpack
from formats.scaled import ELEMENTS, Scaled


class _Static:
    """A format with concrete widths, hashable by its numbers, so that it can be part of a pytree's structure."""

    def __init__(self, fmt):
        if fb.is_traced(*(leaf for leaf in jax.tree.leaves(fmt) if isinstance(leaf, jax.core.Tracer))):
            raise ValueError("encode needs a format with concrete widths: how codes are stored cannot depend on traced numbers")
        self.format = jax.tree.map(np.asarray, fmt)
        self._identity = concrete(self.format)

    def __hash__(self):
        return hash(self._identity)

    def __eq__(self, other):
        return isinstance(other, _Static) and self._identity == other._identity


@partial(jax.tree_util.register_dataclass, data_fields=("codes", "scales", "tensor_scale", "zero_points", "num_nan"),
         meta_fields=("static", "shape", "dtype"))
@dataclasses.dataclass(frozen=True)
class QArray:
    """A tensor in a format, in the bytes that the format says. A pytree of arrays; the format is part of its structure.

    codes: uint8, codes of up to 8 bits packed along the last dimension (`packing.pack`); uint16 or uint32, one code an entry, for
    wider ones. scales: codes of the scale format, uint8 for E8M0 and E4M3, or float32; one for each scale, shaped as `split`
    takes given amax; None for an element format. tensor_scale: float32 [], with two levels. zero_points: uint8 or uint16 codes.
    num_nan: int32 [], how many NaN the format could not say (they are code 0, the zero of most formats); None where it can.
    shape, dtype: those of the tensor.
    """

    codes: jax.Array
    scales: jax.Array | None
    tensor_scale: jax.Array | None
    zero_points: jax.Array | None
    num_nan: jax.Array | None
    static: _Static
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def format(self):
        """The format."""
        return self.static.format

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and the rest."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    def decode(self):
        """The values, an array of `shape` and `dtype`: what `quantize` gave, bit for bit, but for NaN counted in num_nan."""
        return _decode(self)

    def __repr__(self):
        return f"QArray({name_of(self.format)}, shape={self.shape}, dtype={self.dtype})"


def encode(x, format, *, rounding="nearest_even", overflow="saturate", key=None, sr_bits=None, sr_rule="full", random_bits=None,
           amax=None, scale=None) -> QArray:
    """x rounded to a format, as it is stored; `decode` gives `quantize` of the same arguments. Widths must be concrete.

    Arguments are those of `quantize`. NaN is a code where the format has one; a scale that is NaN says it for its block; an
    element format without NaN stores code 0 and counts. ValueError as `quantize`, and for traced widths.
    """
    static, manner = _Static(resolve(format)), Manner.of(rounding, overflow, sr_bits, sr_rule)
    given = {"key": key, "random_bits": random_bits, "amax": amax, "scale": scale}
    number, mode = (manner.rounding, None) if isinstance(manner.rounding, jax.Array) else (None, manner.rounding)
    return _encode(x, number, given, static, mode, manner._replace(rounding=None))


@partial(jax.jit, static_argnums=(3, 4, 5), inline=True)
def _encode(x, number, given, static: _Static, mode, rest: Manner) -> QArray:
    fmt, manner = static.format, rest._replace(rounding=mode if number is None else number)
    x = jnp.asarray(x)
    v, view = cut(x, fmt)
    noise = draw_noise(view, manner, given["key"], given["random_bits"])
    element = fmt.element if isinstance(fmt, Scaled) else fmt
    parts = dict.fromkeys(("scales", "tensor_scale", "zero_points", "num_nan"))

    if isinstance(fmt, ELEMENTS):
        codes, parts["num_nan"] = _counted(v, element, lambda: _to_codes(manner.round(v, fmt, noise), element))
        return QArray(_pack(view.restore(codes), element), **parts, static=static, shape=x.shape, dtype=x.dtype)
    scaling = scales_of(v, view, fmt, amax=given["amax"], scale=given["scale"])
    zero = np.float32(0.0) if scaling.zero is None else scaling.zero
    codes = narrow(v, fmt, scaling, manner, noise, lambda values, y: _to_codes(values + zero if fmt.zero_point else values, element))
    parts["scales"] = view.listed(_scale_codes(scaling, fmt))
    parts["tensor_scale"] = scaling.tensor
    if scaling.zero is not None:
        parts["zero_points"] = view.listed(_to_codes(scaling.zero, element))
    return QArray(_pack(view.restore(codes), element), **parts, static=static, shape=x.shape, dtype=x.dtype)


@partial(jax.jit, inline=True)
def _decode(q: QArray):
    fmt = q.format
    element = fmt.element if isinstance(fmt, Scaled) else fmt
    codes = _unpack(q.codes, element, q.shape)
    if isinstance(fmt, ELEMENTS):
        return _from_codes(codes, element).astype(q.dtype)
    view = view_of(q.shape, fmt)
    scaling = _scaling(q, fmt, view)
    if scaling.exponent is None or not isinstance(element, Element):
        values = _from_codes(view.cut(codes), element)
        values = values if scaling.zero is None else values - scaling.zero
        y = values if element.unbounded else values * factor_of(fmt, scaling)
        return view.restore(y).astype(q.dtype)

    def rescaled(ends: bool):
        # all of it in the branch: what enters one is first written to memory
        values = _from_codes(view.cut(_unpack(q.codes, element, q.shape)), element)
        y = times_power(values, scaling.exponent, ends)
        y = y if fmt.pre_scale is None else y * (1 / fmt.pre_scale)
        y = jnp.where(scaling.hidden, np.float32(np.nan), y) if ends else y
        return view.restore(y).astype(q.dtype)

    return lax.cond(near_ends(scaling.exponent, scaling.hidden, element), lambda: rescaled(True), lambda: rescaled(False))


def _counted(v, element, codes):
    """(codes(), int32 number of NaN in v, or None where the element has a code for it). Whether there is any is seen at once, and
    counted only then: a sum costs three times as much as a maximum on a CPU."""
    if _has_nan(element):
        return codes(), None
    highest = fb.to_pattern(v) & fb.MAGNITUDE
    if v.size % 128 == 0:  # in two stages, as `layout` does
        highest = lax.optimization_barrier(jnp.max(highest.reshape(-1, 16, 8), axis=1))
    nan = jnp.max(highest, initial=0) > fb.INFINITY
    return lax.cond(nan, lambda: (codes(), jnp.sum(jnp.isnan(v), dtype=jnp.int32)), lambda: (codes(), jnp.int32(0)))


def _scale_codes(scaling: Scaling, fmt: Scaled):
    """What is stored of the scales, shaped like them."""
    if scaling.exponent is not None:  # E8M0
        return jnp.where(scaling.hidden, 255, scaling.exponent + 127).astype(jnp.uint8)
    if fmt.scale_element is None:
        return scaling.stored
    return to_codes(scaling.stored, fmt.scale_element, stored_bits(fmt.scale_element))


def _scaling(q: QArray, fmt: Scaled, view) -> Scaling:
    """The scales that were stored, as they broadcast against the cut array."""
    codes = view.per_scale(q.scales)
    if not fmt.exact:
        exponent = jnp.minimum(codes.astype(jnp.int32) - 127, 127)
        return Scaling(fb.to_value(fb.power_of_two(exponent)), codes == 255, exponent)
    stored = codes if fmt.scale_element is None else from_codes(codes, fmt.scale_element)
    zero = None if q.zero_points is None else _from_codes(view.per_scale(q.zero_points), fmt.element)
    return Scaling(stored, jnp.isnan(stored), tensor=q.tensor_scale, zero=zero)


def _bits(element) -> int:
    return stored_bits(element) if isinstance(element, Element) else int(element.bits)


def _has_nan(element) -> bool:
    return isinstance(element, Element) and bool(element.has_nan)


def _to_codes(values, element):
    """Codes of an element's values: uint8, uint16 or uint32."""
    if isinstance(element, Element):
        return to_codes(values, element, _bits(element))
    return element.codes(values).astype(jnp.uint8 if _bits(element) <= 8 else jnp.uint16)


def _from_codes(codes, element):
    """Values of an element's codes."""
    return from_codes(codes, element) if isinstance(element, Element) else element.values(codes.astype(jnp.int32))


def _pack(codes, element):
    bits = _bits(element)
    return pack(jnp.atleast_1d(codes), bits) if bits <= 8 else codes


def _unpack(packed, element, shape: tuple[int, ...]):
    bits = _bits(element)
    return unpack(packed, bits, (shape or (1,))[-1]).reshape(shape) if bits <= 8 else packed
