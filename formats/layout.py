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
    """An array of `shape` in which each scale belongs to the values along dimension `dim` (None: to all of them).

    With a block size the array is seen cut: as [..., blocks, block, ...], or, along the last dimension, as
    [all blocks, block], which XLA on CPU vectorises better. Then a scale belongs to a block.
    """

    shape: tuple[int, ...]
    dim: int | None
    block: int | None

    def cut(self, x):
        """x of `shape` cut into blocks, the last of a row filled up with zeros; without a block size, x."""
        if self.block is None:
            return x
        fill = self._blocks * self.block - self.shape[self.dim]
        if fill:
            x = jnp.pad(x, [(0, fill if dim == self.dim else 0) for dim in range(x.ndim)])
        return x.reshape(self._cut_shape)

    def restore(self, v):
        """The inverse of `cut`, after broadcasting v to the cut shape."""
        if self.block is None:
            return v
        filled = (*self.shape[: self.dim], self._blocks * self.block, *self.shape[self.dim + 1 :])
        filled = jnp.broadcast_to(v, self._cut_shape).reshape(filled)
        return lax.slice_in_dim(filled, 0, self.shape[self.dim], axis=self.dim)

    def per_scale(self, given):
        """One number per scale, along `dim` one per block, as it broadcasts against the cut array."""
        if self.block is None:
            return given
        return given.reshape(tuple(1 if axis == self._axis else n for axis, n in enumerate(self._cut_shape)))

    def amax(self, v):
        """Largest magnitude of each scale's values in the cut array, broadcasting against it; NaN if one is NaN."""
        if self.block is not None:
            return _block_amax(v, self._axis)
        return jnp.max(jnp.abs(v), axis=self.dim, keepdims=self.dim is not None, initial=0.0)

    @property
    def _blocks(self) -> int:
        return -(-self.shape[self.dim] // self.block)

    @property
    def _axis(self) -> int:
        """Dimension of the cut array that runs inside a block."""
        return 1 if self.dim == len(self.shape) - 1 else self.dim + 1

    @property
    def _cut_shape(self) -> tuple[int, ...]:
        before, after = self.shape[: self.dim], self.shape[self.dim + 1 :]
        return (*before, self._blocks, self.block, *after) if after else (math.prod(before) * self._blocks, self.block)


def _block_amax(v, axis: int):
    """amax along a short axis. In integers, and in two stages kept apart by a barrier where blocks are rows: XLA on CPU
    vectorises that (0.5 copies of the array), but neither one stage (1.5) nor a float maximum (1.4)."""
    magnitude = fb.to_pattern(v) & fb.MAGNITUDE
    if axis == v.ndim - 1 and v.shape[axis] % _LANES == 0:
        stages = (v.shape[0], v.shape[1] // _LANES, _LANES)
        magnitude = lax.optimization_barrier(jnp.max(magnitude.reshape(stages), axis=1))
    return fb.to_value(jnp.max(magnitude, axis=axis, keepdims=True))
