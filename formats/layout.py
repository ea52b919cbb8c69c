"""Arrays as seen by a scale: which values share one, and how an array is cut into blocks and put together again."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
from jax import lax

from formats import bits as fb

_LANES = 8


@dataclasses.dataclass(frozen=True)
class View:
    """An array of `shape` in which the values along dimensions `dims` share a scale (None: all values).

    With block sizes, one for each of dims, the array is seen cut: each of dims becomes [blocks, block] and a scale belongs to a
    block. Blocks along the last dimension alone are seen as [all blocks, block], which XLA on CPU vectorises better.
    """

    shape: tuple[int, ...]
    dims: tuple[int, ...] | None
    blocks: tuple[int, ...] | None

    def cut(self, x):
        """x of `shape` cut into blocks, the last of a row filled up with zeros; without block sizes, x."""
        if self.blocks is None:
            return x
        if self._filled != self.shape:
            x = jnp.pad(x, [(0, full - size) for full, size in zip(self._filled, self.shape, strict=True)])
        return x.reshape(self._cut_shape)

    def restore(self, v):
        """The inverse of `cut`, after broadcasting v to the cut shape."""
        if self.blocks is None:
            return v
        filled = jnp.broadcast_to(v, self._cut_shape).reshape(self._filled)
        return filled if self._filled == self.shape else filled[tuple(slice(size) for size in self.shape)]

    @property
    def scales_shape(self) -> tuple[int, ...]:
        """Shape of one number per scale: [] for one, 1 along dims, or the number of blocks there."""
        if self.dims is None:
            return ()
        counts = (1,) * len(self.dims) if self.blocks is None else self._counts
        return tuple(dict(zip(self.dims, counts, strict=True)).get(dim, size) for dim, size in enumerate(self.shape))

    def per_scale(self, given):
        """One number per scale, shaped `scales_shape`, as it broadcasts against the cut array."""
        if self.blocks is None:
            return given
        return given.reshape(tuple(1 if axis in self._axes else n for axis, n in enumerate(self._cut_shape)))

    def listed(self, per_scale):
        """The inverse of `per_scale`."""
        return per_scale.reshape(self.scales_shape)

    def amax(self, v):
        """Largest magnitude of each scale's values in the cut array, broadcasting against it; NaN if one is NaN."""
        if self.blocks is not None:
            return _block_amax(v, self._axes)
        return self.reduce(lambda u, **where: jnp.max(u, initial=0.0, **where), jnp.abs(v))

    def reduce(self, function, v):
        """function(v, axis=..., keepdims=...) over each scale's values."""
        if self.dims is None:
            return function(v, axis=None, keepdims=False)
        return function(v, axis=self.dims if self.blocks is None else self._axes, keepdims=True)

    @property
    def _counts(self) -> tuple[int, ...]:
        return tuple(-(-self.shape[dim] // size) for dim, size in zip(self.dims, self.blocks, strict=True))

    @property
    def _filled(self) -> tuple[int, ...]:
        """The shape with every block full."""
        full = {dim: count * size for dim, count, size in zip(self.dims, self._counts, self.blocks, strict=True)}
        return tuple(full.get(dim, size) for dim, size in enumerate(self.shape))

    @property
    def _rows(self) -> bool:
        """Whether blocks lie along the last dimension alone."""
        return self.dims == (len(self.shape) - 1,)

    @property
    def _axes(self) -> tuple[int, ...]:
        """Dimensions of the cut array that run inside a block."""
        return (1,) if self._rows else tuple(dim + place + 1 for place, dim in enumerate(self.dims))

    @property
    def _cut_shape(self) -> tuple[int, ...]:
        if self._rows:
            return (math.prod(self.shape[:-1]) * self._counts[0], self.blocks[0])
        pairs = {dim: (count, size) for dim, count, size in zip(self.dims, self._counts, self.blocks, strict=True)}
        return tuple(n for dim, size in enumerate(self.shape) for n in pairs.get(dim, (size,)))


def _block_amax(v, axes: tuple[int, ...]):
    """amax along short axes. In integers, and in stages kept apart by barriers, eight lanes first where blocks are rows: XLA on CPU
    vectorises that (0.5 copies of the array), but neither one stage (1.5) nor a float maximum (1.4)."""
    magnitude = fb.to_pattern(v) & fb.MAGNITUDE
    if axes == (1,) and v.ndim == 2 and v.shape[1] % _LANES == 0:
        stages = (v.shape[0], v.shape[1] // _LANES, _LANES)
        magnitude = lax.optimization_barrier(jnp.max(magnitude.reshape(stages), axis=1))
    for axis in reversed(axes[1:]):
        magnitude = lax.optimization_barrier(jnp.max(magnitude, axis=axis, keepdims=True))
    return fb.to_value(jnp.max(magnitude, axis=axes[0], keepdims=True))
