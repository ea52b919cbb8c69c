"""What low precision does to a tensor, measured now and then: size, what is lost at both ends of the range, and the scale.

Every `telemetry_every` steps each linear layer reports, for its weights, activations and output gradients, the `statistics` of the tensor and
of how its role's first product quantizes it; attention reports those of keys and values, scores and probabilities, where they are quantized.
They leave the step as `delayed` amax do (see `trainer.scales`), and the run folder holds them in `telemetry.jsonl`. Steps in between run a
program that has no trace of it.

Shapes: P parts (micro-batches, devices), L layers, S linear sites of a layer, F the fields.
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import formats
from formats import bits as fb
from trainer.precision import ATTENTION_ROLES
from trainer.propagation import ScaledArray, pow2, scale_rule, unscaled

FIELDS = ("rms", "amax", "underflow", "overflow", "exponent")
LOSSES = FIELDS[2:4]  # of quantized tensors only; the exponent also of data that carries one
RAW = (*FIELDS, "carried")  # as they leave a layer: RMS and amax are those of the data, whose exponent is `carried`
SLACK = np.float32(1 + 2.0**-20)  # amax divided by a scale that was rounded may lie an ulp beyond the largest value: that is not clipped
DIGITS = 6  # significant ones, in the file


def due(step, every: int):
    """Whether the update from `step` (int or int32 array) to the next is measured: the first, and every `every`-th."""
    return ((step + 1) % every == 0) | (step == 0)


def statistics(x: jax.Array, values: jax.Array | None = None, scale: jax.Array | None = None, fmt=None, where: jax.Array | None = None) -> jax.Array:
    """float32 [F] of a float32 tensor x: its RMS and amax; the share of its values that were not zero and became zero; the share that
    lay beyond the largest value of the element at its scale (with a zero point, which moves the range: that rounding moved by more than a
    step); the mean of log2 of the scales.

    values: x as numbers of fmt's element (fmt is one, or a format with scales), None where x is not quantized (the last three are then NaN). scale: what multiplies them,
    broadcasting against x, None for 1. where: bool, of x's rank and broadcasting against it: which values count, in all of these, and a scale
    if one of its values does; None for all. The others have to be finite. Sizes down to 2**-100 and up to 2**100 do not lose their squares.
    """
    x = x if where is None else jnp.where(where, x, 0.0)
    amax = jnp.max(jnp.abs(x), initial=0.0)
    unit = jnp.clip(_power_of_two_below(amax), np.float32(2.0**-100), np.float32(2.0**100))
    rms = jnp.sqrt(_mean(jnp.square(x * (1 / unit)), where)) * unit
    if values is None:
        return jnp.stack([rms, amax, *(jnp.float32(jnp.nan),) * 3])
    underflow = _mean((x != 0) & (values == 0), where)
    factor = jnp.float32(1.0) if scale is None else scale
    overflow = _mean(_beyond(x, values, factor * SLACK, fmt), where)
    if where is not None:
        where = jnp.any(where, axis=tuple(dim for dim in range(x.ndim) if factor.shape[dim] == 1), keepdims=True) if factor.ndim else None
    return jnp.stack([rms, amax, underflow, overflow, _mean(_log2(factor), where)])


def _beyond(x, values, factor, fmt):
    """bool like x: what the range does not hold. factor: the scale, a hair larger."""
    element = fmt.element if isinstance(fmt, formats.Scaled) else fmt
    if isinstance(fmt, formats.Scaled) and fmt.zero_point:
        return jnp.abs(x - values * factor) > pow2(jnp.asarray(element.quantum_exp, jnp.int32)) * factor
    low, high = (jnp.asarray(limit, jnp.float32) * factor for limit in element.limits)
    return (x < low) | (x > high)


def _mean(y, where):
    """float32: of all of y, or of what counts. That is so in the same share of every slice along the dims in which `where` has size 1."""
    if where is None:
        return jnp.mean(y, dtype=jnp.float32)
    return jnp.mean(jnp.where(where, y.astype(jnp.float32), 0.0)) / jnp.mean(where, dtype=jnp.float32)


def raw(x: jax.Array, values=None, scale=None, fmt=None, where=None) -> jax.Array:
    """The RAW statistics: of data that is the tensor itself."""
    return jnp.concatenate([statistics(x, values, scale, fmt, where), jnp.zeros((1,), jnp.float32)])


carried = scale_rule(raw)


@carried.defrule
def _(x: ScaledArray, values=None, scale=None, fmt=None):
    """Of the data, at its own exponent, so that float16 holds them; the scale of quantized values is relative to that exponent."""
    data, exponent = x.data.astype(jnp.float32), jnp.asarray(x.exponent, jnp.int32)
    if values is not None:
        values = values.data.astype(jnp.float32) * pow2(values.exponent - exponent)
    found = statistics(data, values, unscaled(scale), unscaled(fmt))
    own = exponent.astype(jnp.float32)
    scale_used = jnp.where(jnp.isnan(found[4]), own, found[4] + own)
    return jnp.concatenate([found[:4], jnp.stack([scale_used, own])])


def _power_of_two_below(x):
    return fb.to_value(fb.to_pattern(x) & fb.INFINITY)


def _log2(x):
    """log2 of normal float32 x > 0, exact for powers of two, which a float32 logarithm is not."""
    below = _power_of_two_below(x)
    return ((fb.to_pattern(below) >> 23) - 127).astype(jnp.float32) + jnp.log2(x / below)


def combine(parts: jax.Array, data_axis: str | None = None) -> jax.Array:
    """The statistics of a whole, FIELDS, from the RAW ones of equal parts, [P, ..., F + 1] -> [..., F]; the parts of all devices, with
    data_axis."""
    if data_axis is not None:
        parts = lax.all_gather(parts, data_axis, axis=0, tiled=True)
    rms, amax, *shares, own = (parts[..., i] for i in range(len(RAW)))
    size = pow2(own.astype(jnp.int32))
    rms, amax = rms * size, amax * size
    largest = jnp.max(rms, axis=0)
    unit = jnp.where(largest > 0, largest, np.float32(1.0))
    rms = unit * jnp.sqrt(jnp.mean(jnp.square(rms / unit[None]), axis=0))
    return jnp.stack([rms, jnp.max(amax, axis=0), *(jnp.mean(share, axis=0) for share in shares)], axis=-1)


def rows(step: int, measured: Mapping[str, np.ndarray], sites: Mapping[str, Sequence[str]], quantized: Mapping[str, bool]) -> Iterator[dict]:
    """The rows of telemetry.jsonl for one update: a row for every layer, site and role. measured: role -> [L, S, F]; sites: role -> names
    of its sites; quantized: whether the role's tensors are, in some layer (a width of 32 is a rounding that changes nothing): others have RMS and
    amax only, and the exponent of data that carries one. Attention has no row in layers that do not quantize the role: there its tensors are not looked at."""
    for role, values_LSF in measured.items():
        for layer, values_SF in enumerate(values_LSF):
            for site, values_F in zip(sites[role], values_SF, strict=True):
                found = dict(zip(FIELDS, values_F, strict=True))
                rounded = not np.isnan(found["underflow"])  # a share: of what was rounded never NaN, whatever the tensor holds
                if role in ATTENTION_ROLES and not rounded:
                    continue
                told = FIELDS if rounded and quantized[role] else FIELDS[:2] if rounded or np.isnan(found["exponent"]) else (*FIELDS[:2], "exponent")
                yield {"step": step, "layer": layer, "site": site, "role": role, **{name: float(f"{found[name]:.{DIGITS}g}") for name in told}}
