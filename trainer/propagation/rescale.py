"""Bringing data back to unit scale where a program lets it drift: by hand, on the value or on its cotangent."""
from __future__ import annotations

import enum
from functools import partial

import jax
import jax.numpy as jnp

from trainer.propagation.array import ZERO_EXPONENT, ScaledArray, floor_log2, shift, wide
from trainer.propagation.custom import scale_rule


class Statistic(enum.Enum):
    """What is brought to [1, 2)."""

    RMS = "rms"
    AMAX = "amax"
    MEAN_ABS = "mean_abs"


class On(enum.Enum):
    """Which of the two passes is rescaled."""

    FORWARD = "forward"
    COTANGENT = "cotangent"
    BOTH = "both"


def measure(data, statistic: Statistic, leading: int = 0):
    """The statistic of data (any float dtype) as float32, for each index of so many leading dimensions; data of unit scale is far from
    where squares overflow."""
    data, axes = wide(data), tuple(range(leading, data.ndim))
    if statistic is Statistic.AMAX:
        return jnp.max(jnp.abs(data), axis=axes, initial=0)
    if statistic is Statistic.MEAN_ABS:
        return jnp.mean(jnp.abs(data), axis=axes)
    return jnp.sqrt(jnp.mean(data * data, axis=axes))


def drift(size):
    """int32 n with a statistic in [2**n, 2**(n + 1)); 0 where all is zero or something is not finite."""
    n = floor_log2(size.astype(jnp.float32))
    return jnp.where(n == ZERO_EXPONENT, 0, n)


def to_unit(data, statistic: Statistic, leading: int = 0):
    """(data / 2**n, n) with the statistic in [1, 2), see `drift`."""
    n = drift(measure(data, statistic, leading))
    return shift(wide(data), -n).astype(data.dtype), n


@scale_rule
def _rescale(x, *, statistic):
    return x


@_rescale.defrule
def _to_unit(x: ScaledArray, *, statistic):
    data, n = to_unit(x.data, statistic, jnp.ndim(x.exponent))  # stacked layers or members: each by itself
    return ScaledArray(data, x.exponent + n)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _rescale_cotangent(x, statistic):
    return x


_rescale_cotangent.defvjp(lambda x, statistic: (x, None), lambda statistic, _, g: (_rescale(g, statistic=statistic),))


def rescale(x: jax.Array, by: str = "rms", on: str = "forward") -> jax.Array:
    """x; under propagate_scales its data is divided by the power of two that brings `by` ("rms", "amax" or "mean_abs", taken in
    float32) to [1, 2), which goes into the exponent: values do not change. on: "forward" the value, "cotangent" what flows back
    through x, or "both" (Scalify, arXiv 2407.17353, section 3.3)."""
    statistic, on = parse(Statistic, "by", by), parse(On, "on", on)
    if on is not On.COTANGENT:
        x = _rescale(x, statistic=statistic)
    return x if on is On.FORWARD else _rescale_cotangent(x, statistic)


def parse(kind, key: str, value):
    """The member of an Enum that a user named."""
    try:
        return kind(value)
    except ValueError:
        raise ValueError(f"rescale: {key}={value!r}; accepted: {', '.join(member.value for member in kind)}") from None
