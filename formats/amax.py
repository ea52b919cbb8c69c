"""What a scale is computed from: the largest magnitude of its values, or a smaller one beyond which values are clipped."""

from __future__ import annotations

import enum
import functools
import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from formats import bits as fb
from formats.layout import View
from formats.plain import nearest


class Amax(enum.Enum):
    """The magnitude that a scale maps to the largest value of the element.

    current: the largest one. percentile: the p-quantile of the magnitudes (0 < p <= 1, linear interpolation). rms: a multiple of
    the root mean square (Gaussian-optimal if no multiple is given). std: likewise of the standard deviation around the mean of the
    values (what the released code of Quartet takes). absmean: the mean magnitude (BitNet b1.58 equation 3 for
    ternary values). mse: the one of 49 magnitudes, the current one times 2**(i/16), i = -40 .. 8, with the least squared error.
    """

    CURRENT = "current"
    PERCENTILE = "percentile"
    RMS = "rms"
    STD = "std"
    ABSMEAN = "absmean"
    MSE = "mse"


_SAMPLES = 1 << 14
_CANDIDATES = np.exp2(np.arange(-40, 9) / 16).astype(np.float32)


def magnitude(v, view: View, statistic: Amax, parameter, squared_error, reduce_max=None, reduce_mean=None):
    """float32 amax of each scale's values, broadcasting against the cut array v; NaN where a value is NaN or infinite.

    parameter: p, or the multiple. squared_error(amax): the squared errors of v quantized by that amax, used by mse. reduce_max,
    reduce_mean: see `blocks.split`. ValueError for a statistic that is neither a maximum nor made of means.
    """
    if reduce_max is not None and statistic is not Amax.CURRENT and (reduce_mean is None or statistic in (Amax.PERCENTILE, Amax.MSE)):
        raise ValueError(f"amax={statistic.value!r} cannot be taken over values that several devices hold; amax='current' can, and with reduce_mean rms, std and absmean")
    if statistic in (Amax.RMS, Amax.STD, Amax.ABSMEAN):  # sums that a NaN or an infinity makes NaN or infinite
        return _typical(v, view, statistic, parameter, reduce_mean or (lambda mean: mean))
    amax = view.amax(v)
    amax = amax if reduce_max is None else reduce_max(amax)
    if statistic is Amax.CURRENT:
        return amax
    if statistic is Amax.MSE:
        found = _least_error(v, view, amax, squared_error)
    else:
        found = _typical(v, view, statistic, parameter, None)
    return jnp.where(jnp.isfinite(amax), found, amax)


def _typical(v, view: View, statistic: Amax, parameter, whole):
    """whole: makes means of equal parts the mean of all; unused by percentiles."""
    if view.blocks is None:
        inside, number = np.bool_(True), np.float32(v.size / max(1, math.prod(view.scales_shape)))
    else:  # a last block may be filled up
        inside = view.cut(jnp.ones(view.shape, bool))
        number = view.reduce(jnp.sum, inside.astype(jnp.float32))
    match statistic:
        case Amax.PERCENTILE:
            held = jnp.where(inside, jnp.abs(v), np.float32(np.nan))
            return view.reduce(lambda u, **where: jnp.nanquantile(u, parameter, **where), held)
        case Amax.RMS:
            return parameter * jnp.sqrt(whole(view.reduce(jnp.sum, v * v) / number))
        case Amax.STD:
            mean = whole(view.reduce(jnp.sum, v) / number)
            # around the mean at once: a difference of squares loses what is small beside it
            return parameter * jnp.sqrt(whole(view.reduce(jnp.sum, jnp.where(inside, jnp.square(v - mean), 0.0)) / number))
        case Amax.ABSMEAN:
            return whole(view.reduce(jnp.sum, jnp.abs(v)) / number)


def _least_error(v, view: View, amax, squared_error):
    """The candidate times amax with the least squared error, each scale for itself; one candidate in memory at a time."""

    def better(best, candidate):
        least, chosen = best
        error = view.reduce(jnp.sum, squared_error(amax * candidate))
        return (jnp.minimum(error, least), jnp.where(error < least, amax * candidate, chosen)), None

    start = (jnp.full(jnp.shape(amax), np.float32(np.inf)), amax)
    return lax.scan(better, start, jnp.asarray(_CANDIDATES[::-1]))[0][1]


def gaussian_clip(element) -> float:
    """The multiple c of its RMS at which Gaussian data, clipped to [-c, c] and rounded to the element with the largest value at c, has
    the least squared error (uniform grids: Max 1960 table II; sqrt(2/pi) for one bit), to 1e-3. ValueError if widths are traced."""
    leaves, structure = jax.tree.flatten(element)
    if fb.is_traced(*leaves):
        raise ValueError("amax='rms' of an element with traced widths needs amax_at=, the multiple of the RMS")
    return _gaussian_clip(structure, tuple((str(leaf.dtype), leaf.shape, leaf.tobytes()) for leaf in map(np.asarray, leaves)))


@functools.cache
def _gaussian_clip(structure, leaves) -> float:
    """Of an element in parts that can be hashed: the search takes a third of a second."""
    element = jax.tree.unflatten(structure, [np.frombuffer(data, dtype).reshape(shape)[()] for dtype, shape, data in leaves])
    normal = statistics.NormalDist()
    x_S = np.array([normal.inv_cdf((i + 0.5) / _SAMPLES) for i in range(_SAMPLES)])
    multiples_C = np.exp2(np.arange(-2.0, 3.0, 2e-3)).astype(np.float32)
    scales_C = multiples_C.astype(np.float64) / float(element.max_value)
    errors_C = [np.mean((nearest(x_S / scale, element) * scale - x_S) ** 2) for scale in scales_C]
    return float(multiples_C[int(np.argmin(errors_C))])
