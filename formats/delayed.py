"""Delayed scaling: the scale of a step comes from the amax of earlier steps, kept as explicit state (Micikevicius et al. 2022; TransformerEngine)."""

from __future__ import annotations

import dataclasses
import enum

import jax
import jax.numpy as jnp
import numpy as np

from formats.modes import as_float32, parse


class Choice(enum.Enum):
    """Which of the remembered amax counts: the largest, or the most recent one."""

    MAX = "max"
    MOST_RECENT = "most_recent"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AmaxHistory:
    """The last H amax of a tensor, newest first: a pytree, so state of a step like any other; never part of a gradient.

    amax: float32[H, *scales], where the shape of the scales is that of `split`'s amax ([] for one per tensor). Entries not yet
    seen are 0. Histories of micro-batches, devices or scan iterations combine by `merge`.
    """

    amax: jax.Array

    def push(self, amax) -> AmaxHistory:
        """With this step's amax (float32, shaped like one entry) at the front and the oldest forgotten. One that is NaN or infinite is
        not remembered: the entry repeats the newest before it, so that a single bad step cannot poison a thousand."""
        amax = as_float32(amax)
        known = jnp.where(jnp.isfinite(amax), amax, self.amax[0])
        return AmaxHistory(jnp.concatenate([known[None], self.amax[:-1]]))

    def merge(self, other: AmaxHistory) -> AmaxHistory:
        """Entry by entry the larger one."""
        return AmaxHistory(jnp.maximum(self.amax, other.amax))

    def get(self, current, choice="max") -> jax.Array:
        """float32: the amax to scale by, `current` (shaped like one entry) where nothing has been seen yet."""
        seen = self.amax[0] if parse(Choice, choice, "choice") is Choice.MOST_RECENT else jnp.max(self.amax, axis=0)
        return jnp.where(seen > 0, seen, as_float32(current))


def amax_history(length: int = 1024, shape: tuple[int, ...] = ()) -> AmaxHistory:
    """An empty history of `length` steps (TransformerEngine's default) for scales of that shape."""
    if not isinstance(length, int) or length < 1:
        raise ValueError(f"length={length!r} must be a positive integer")
    return AmaxHistory(jnp.zeros((length, *shape), np.float32))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RangeAverage:
    """An exponential moving average of the smallest and the largest value of a tensor (Krishnamoorthi 2018, section 3.1): state of a step,
    as `AmaxHistory` is.

    reach: float32[*scales, 2], how far the values go below and above zero, (-low, high); 0 where nothing has been seen yet, and never
    negative, since a range contains zero.
    """

    reach: jax.Array

    def push(self, reach, decay) -> RangeAverage:
        """decay times the average and the rest of this step's; the first one as it is. One that is NaN or infinite is not remembered."""
        reach = jnp.where(jnp.isfinite(as_float32(reach)), reach, self.reach)
        seen = jnp.max(self.reach, axis=-1, keepdims=True) > 0
        return RangeAverage(jnp.where(seen, decay * self.reach + (1 - decay) * reach, reach))


def range_average(shape: tuple[int, ...] = ()) -> RangeAverage:
    """Nothing seen yet, for scales of that shape."""
    return RangeAverage(jnp.zeros((*shape, 2), np.float32))
