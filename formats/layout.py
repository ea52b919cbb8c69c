"""Arrays as seen by a scale: which values share one, and how an array is cut into blocks and put together again."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax import lax

from formats import bits as fb

_LANES = 8


@dataclasses.dataclass(frozen=True)
class View:
    """An array of `shape` in which each scale belongs to the values along `axis` (None: to all of them).

    With a block size, the array is seen cut, as [..., blocks, block, ...]: then `axis` counts in the cut array.
    """

    shape: tuple[int, ...]
    axis: int | None
    block: int | None

    def cut(self, x):
        """x of `shape` as [..., blocks, block, ...], the last block of a row filled up with zeros; or x itself."""
        if self.block is None:
            return x
        dim, length, blocks = self._cut_dimension()
        fill = blocks * self.block - length
        if fill:
            x = jnp.pad(x, [(0, fill if d == dim else 0) for d in range(x.ndim)])
        return x.reshape(self._cut_shape())

    def restore(self, v):
        """The inverse of `cut`, after broadcasting v to the cut shape."""
        if self.block is None:
            return v
        dim, length, blocks = self._cut_dimension()
        flat_shape = (*self.shape[:dim], blocks * self.block, *self.shape[dim + 1:])
        flat = jnp.broadcast_to(v, self._cut_shape()).reshape(flat_shape)
        return lax.slice_in_dim(flat, 0, length, axis=dim)

    def per_scale(self, given):
        """An array with one number a block along the cut dimension, as it broadcasts against the cut array."""
        return given if self.block is None else jnp.expand_dims(given, self.axis)

    def amax(self, v):
        """Largest magnitude of each scale's values, float32, keeping `axis` as 1 (a scalar for None); NaN if one is NaN."""
        if self.block is not None:
            return _block_amax(v, self.axis)
        return jnp.max(jnp.abs(v), axis=self.axis, keepdims=self.axis is not None, initial=0.0)

    def _cut_dimension(self):
        dim = self.axis - 1
        return dim, self.shape[dim], -(-self.shape[dim] // self.block)

    def _cut_shape(self):
        dim, _, blocks = self._cut_dimension()
        return (*self.shape[:dim], blocks, self.block, *self.shape[dim + 1:])


def _block_amax(v, axis: int):
    """amax along a short axis. In integers, and along the last axis in two stages kept apart by a barrier: XLA on CPU
    vectorises that (0.5 copies of the array), but neither a float maximum of adjacent values (1.4) nor one stage (1.5)."""
    magnitude = fb.to_pattern(v) & fb.MAGNITUDE
    if axis == v.ndim - 1 and v.shape[axis] % _LANES == 0:
        stages = (*v.shape[:-1], v.shape[-1] // _LANES, _LANES)
        magnitude = lax.optimization_barrier(jnp.max(magnitude.reshape(stages), axis=-2))
    return fb.to_value(jnp.max(magnitude, axis=axis, keepdims=True))
