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


def measure(data, statistic: Statistic):
    """The statistic of data (any float dtype) as float32; data of unit scale is far from where squares overflow."""
    data = wide(data)
    if statistic is Statistic.AMAX:
        return jnp.max(jnp.abs(data), initial=0)
    if statistic is Statistic.MEAN_ABS:
        return jnp.mean(jnp.abs(data))
    return jnp.sqrt(jnp.mean(data * data))


def to_unit(data, statistic: Statistic):
    """(data / 2**n, n) with the statistic in [1, 2); n is 0 where all is zero or something is not finite."""
    n = floor_log2(measure(data, statistic).astype(jnp.float32))
    n = jnp.where(n == ZERO_EXPONENT, 0, n)
    return shift(wide(data), -n).astype(data.dtype), n


@scale_rule
def _rescale(x, *, statistic):
    return x


@_rescale.defrule
def _to_unit(x: ScaledArray, *, statistic):
    if jnp.ndim(x.exponent):  # stacked layers or members: each by itself
        return jax.vmap(partial(_to_unit, statistic=statistic))(x)
    data, n = to_unit(x.data, statistic)
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
