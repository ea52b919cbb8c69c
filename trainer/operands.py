"""An operand of a matrix product made narrow: rotated where its quantizer says so, then rounded; under scale propagation too.

Shapes: A rows and B columns of the tensor; of a rotated one the contracted dimension is filled up to whole blocks.
"""
from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import formats
from formats import noise
from formats.gradients import pass_inside, pass_through
from trainer import keys, scales, telemetry
from trainer.methods import lsq, rotation
from trainer.precision import Gradient, Operand, PrecisionPolicy, Quantizer, Source
from trainer.propagation import ScaledArray, floor_log2, pow2, scale_rule, shift, unscaled
from trainer.scales import Site

ROTATION = 6  # salts the signs of a call, the same for all its products
STREAMS = 7  # of random bits that a call has: `keys.streams`, by salt


@dataclass(frozen=True)
class RowShards:
    """The rows of activations are split over the device axis `axis_name` in contiguous shards."""

    axis_name: str


@dataclass(frozen=True)
class Use:
    """An operand of one of the products: its role, the dim that is contracted, and what salts its random bits."""

    role: str
    contract: int
    salt: int

    def shards(self, rows: RowShards | None) -> RowShards | None:
        """How its rows are split: weights are whole on every device."""
        return None if self.role == "weights" else rows


ROWS = Use("weights", 1, 0)  # a table of rows, of which each is read as a whole


class Narrow(NamedTuple):
    """values [A, B]: numbers of the element, float32 or the quantizer's native dtype; scale: what multiplies them, broadcasting against
    them, None for 1; inside: bool [A, B], where the gradient passes, or float32, how much of it, None for everywhere."""

    values: jax.Array
    scale: jax.Array | None = None
    inside: jax.Array | None = None


def narrow(x, quantizer: Quantizer | None, use: Use, streams, rows: RowShards | None, amax, policy: PrecisionPolicy, blend=None) -> Narrow:
    """x [A, B] as its quantizer makes it. amax: of the whole tensor, None for the current one. blend: float32, how much of it is
    quantized, None for all; exactly so at 1."""
    if quantizer is None:
        return Narrow(x)
    if policy.data_dtype is None:
        found = _split(x, quantizer, streams, amax, use=use, rows=rows)
        if blend is None:
            return found
        # At 1 the narrow numbers and their scale, below it the blend: both ends are exact.
        whole, q = blend >= 1, widened(found)
        scale = None if found.scale is None else jnp.where(whole, found.scale, 1.0)
        inside = None if found.inside is None else 1 - blend * (1 - found.inside.astype(jnp.float32))
        return Narrow(jnp.where(whole, found.values, x + blend * (q - x)), scale, inside)
    return _split_data(x, quantizer, streams, amax, use=use, rows=rows)


def straight_through(x, quantizer: Quantizer, use: Use, key, policy: PrecisionPolicy) -> jax.Array:
    """x quantized, where no product follows that could take it narrow; its gradient is that of the result, masked as the quantizer says.
    ValueError for one with a transform: nothing would cancel it."""
    if quantizer.transform is not None:
        raise ValueError("a transform belongs to both operands of a product; accepted here: a quantizer without one")
    found = narrow(x, quantizer, use, None if key is None else keys.streams(key, use.salt + 1), None, None, policy)
    y = widened(found)
    return pass_through(x, y) if found.inside is None else pass_inside(x, y, found.inside)


def widened(operand: Narrow):
    """The numbers that a narrow operand stands for, float32."""
    values = operand.values.astype(jnp.float32)
    return values if operand.scale is None else values * operand.scale


def _split(x, quantizer: Quantizer, streams, amax, *, use: Use, rows: RowShards | None) -> Narrow:
    rows, fmt = use.shards(rows), _known_whole(_oriented(quantizer.format, use.contract), quantizer.native)
    x = transformed(x, quantizer, use, streams)
    bits = None
    if formats.Rounding(quantizer.rounding).random:
        start = 0
        if rows is not None:
            start = lax.axis_index(rows.axis_name) * x.shape[0]
        bits = partial(noise.random_bits, streams[use.salt], x.shape, offset=start * x.shape[1])
    reduce_max = reduce_mean = None
    if amax is not None and fmt.two_level:  # the blocks' own scales stay current under that of the tensor
        reduce_max, amax = partial(lambda given, current: given, amax), None
    elif amax is None and rows is not None and _crosses_rows(fmt, use.contract):
        reduce_max, reduce_mean = (partial(over, axis_name=rows.axis_name) for over in (lax.pmax, lax.pmean))
    values, scale = formats.split(x, fmt, rounding=quantizer.rounding, random_bits=bits, reduce_max=reduce_max, reduce_mean=reduce_mean, amax=amax)
    inside = where_inside(x, values, scale, quantizer)
    if quantizer.native is not None:
        values = values.astype(quantizer.native)
    return Narrow(values, scale if isinstance(fmt, formats.Scaled) else None, inside)


def transformed(x, quantizer: Quantizer, use: Use, streams):
    """What is rounded: x, or x rotated along its contraction."""
    if quantizer.transform is None:
        return x
    return rotation.rotate(x, quantizer.transform, use.contract, _turning(streams))


def _turning(streams):
    """The stream of a call's signs, None without any."""
    return None if streams is None else streams[ROTATION]


def _oriented(fmt, contract: int):
    """The format with its scales along the contraction; of a tile, its first side."""
    if not isinstance(fmt, formats.Scaled):
        return fmt
    return replace(fmt, axis=(contract, 1 - contract) if isinstance(fmt.block, tuple) else contract)


def _known_whole(fmt, native: str | None):
    """The format; where its numbers are held as integers, with constants for what is the same in all of them, since the widths that training
    is given do not say what they are widths of. A negative zero is none after the conversion, so that it need not be avoided."""
    if native is None or not jnp.issubdtype(native, jnp.integer):
        return fmt
    element = fmt.element if isinstance(fmt, formats.Scaled) else fmt
    element = replace(element, exp_bits=np.int32(0), quantum_exp=np.int32(0), min_magnitude=np.float32(0.0), signed_zero=np.bool_(True))
    return replace(fmt, element=element) if isinstance(fmt, formats.Scaled) else element


def where_inside(x, values, scale, quantizer: Quantizer):
    """Where the gradient passes, by the x that was rounded to values * scale: bool like x, None for everywhere."""
    match Gradient(quantizer.gradient):
        case Gradient.CLIPPED:
            low, high = (jnp.asarray(limit, jnp.float32) * (scale * telemetry.SLACK) for limit in quantizer.element.limits)
            return (x >= low) & (x <= high)
        case Gradient.TRUST:
            step = pow2(jnp.asarray(quantizer.element.quantum_exp, jnp.int32))
            return jnp.abs(x - values * scale) <= np.float32(0.5) * step * (scale * telemetry.SLACK)
    return None


_split_data = scale_rule(_split)


@_split_data.defrule
def _(x: ScaledArray, quantizer, streams, amax, *, use: Use, rows: RowShards | None):
    """Under scale propagation the data is quantized and keeps its exponent: its scale is 1 if it was propagated, and relative to the
    exponent otherwise."""
    quantizer = unscaled(quantizer)
    data, exponent = x.data.astype(jnp.float32), jnp.asarray(x.exponent, jnp.int32)
    rows = use.shards(rows)
    if rows is not None and quantizer.source != Source.PROPAGATED.value:
        top = lax.pmax(exponent, rows.axis_name)  # the scales below are of the whole tensor
        data, exponent = data * pow2(exponent - top), top
    if quantizer.source == Source.PROPAGATED.value:
        if amax is not None:
            amax = unscaled(amax)
        found = _split(data, quantizer, streams, amax, use=use, rows=rows)
        return Narrow(ScaledArray(found.values, x.exponent), *found[1:])
    if amax is not None:
        amax = unscaled(ScaledArray(amax.data, amax.exponent - exponent))
    # Whatever the scale says, the elements are held at the size of the tensor's own data: there float16 holds them, and their products.
    if not isinstance(quantizer.format, formats.Scaled):  # source="none": the element's own range, for the values themselves
        found = _split(shift(data, exponent), quantizer, streams, amax, use=use, rows=rows)
        return Narrow(ScaledArray(shift(found.values, -exponent), exponent), *found[1:])
    found = _split(data, quantizer, streams, amax, use=use, rows=rows)
    size = floor_log2(jnp.max(found.scale))
    return Narrow(ScaledArray(found.values * pow2(size), exponent), found.scale * pow2(-size), found.inside)


def _crosses_rows(fmt, contract: int) -> bool:
    """True if one scale covers rows of several shards (dim 0 of x is the sharded one)."""
    if not isinstance(fmt, formats.Scaled):
        return False
    if fmt.granularity is formats.Granularity.BLOCK:
        return fmt.two_level
    return fmt.granularity is formats.Granularity.TENSOR or contract == 0


def to_tensor(gradient, operand: Operand, inside, use: Use, size: int, rotated: bool, streams):
    """The gradient of a tensor from what its product gave: masked where it was rounded, then rotated back to where it came from.

    gradient [A, B], its dim `use.contract` of the rotated size if `rotated` (the other operand was), else of `size`, the tensor's.
    """
    turn = None if operand.first is None else operand.first.transform
    if turn is None or (inside is None and not rotated):
        return _masked(gradient, inside)
    key = _turning(streams)
    if not rotated:
        gradient = rotation.rotate(gradient, turn, use.contract, key)
    return rotation.rotate_back(_masked(gradient, inside), turn, use.contract, size, key)


def _masked(gradient, inside):
    if inside is None:
        return gradient
    return jnp.where(inside, gradient, 0) if inside.dtype == bool else gradient * inside


def seen_range(x, operand: Operand, use: Use, rows: RowShards | None):
    """Of the whole tensor what the role's histories need, float32: amax [], reach below and above zero [2], or None."""
    if operand.takes(Source.DELAYED):
        seen = jnp.max(jnp.abs(x), initial=0.0)
    elif operand.takes(Source.EMA):
        seen = jnp.stack([jnp.max(-x, initial=0.0), jnp.max(x, initial=0.0)])
    else:
        return None
    rows = use.shards(rows)
    return seen if rows is None else lax.pmax(seen, rows.axis_name)


def given_range(quantizer: Quantizer | None, role: str, site: Site, current):
    """What `formats.split` takes as amax, by the quantizer's source: None where that is the tensor at hand. current: of `seen_range`."""
    if quantizer is None:
        return None
    match Source(quantizer.source):
        case Source.DELAYED:
            return scales.delayed_amax(site.remembered[role], current)
        case Source.EMA:
            low, high = scales.averaged_range(site.remembered[role], current)
            return (low, high) if quantizer.format.zero_point else jnp.maximum(-low, high)
        case Source.STATIC:
            return scales.static_amax(quantizer, site.expected.get(role))
        case Source.LEARNED:
            return learned_step(quantizer, role, site)[0] * quantizer.element.max_value
        case Source.PROPAGATED if quantizer.format.block is None or quantizer.format.two_level:
            return scales.static_amax(quantizer, np.float32(1.0))  # of the data
    return None


def learned_step(quantizer: Quantizer, role: str, site: Site):
    """float32: the learned scale of a role, and its derivative by the parameter. It is not let below a millionth of what it started from,
    where gradients would push it to zero."""
    least, initial = np.float32(2.0**-20), lsq.initial_step(site.expected[role], quantizer.element.max_value)
    return jnp.maximum(site.learned[role], least) * initial, jnp.where(site.learned[role] >= least, initial, 0.0)


def statistics(tensor, found: Narrow, quantizer: Quantizer | None, use: Use, streams, policy: PrecisionPolicy):
    """Telemetry's statistics of a tensor and of what its quantizer made of it, float32 [fields]."""
    measure = telemetry.raw if policy.data_dtype is None else telemetry.carried
    if quantizer is None:
        return measure(tensor)
    return measure(transformed(tensor, quantizer, use, streams), found.values, found.scale, quantizer.format)
