"""Random bits for stochastic rounding: a keyed hash of the global element index.

Counter-based, so the bits belong to (key, position in the whole tensor): the same on one device or many, in any layout,
under vmap or not. Cheap enough to fuse into the rounding (two multiplies an element); JAX's default generator costs
30 copies of the tensor on a CPU. For rounding, not for cryptography or for simulations that need a tested generator.

The mixer is Chris Wellons' lowbias32 (public domain, "hash-prospector", constants 7feb352d 846ca68b), keyed before
each multiply. The key words are themselves mixed first, so that keys 0, 1, 2 ... give unrelated streams.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_M1, _M2 = np.uint32(0x7FEB352D), np.uint32(0x846CA68B)


def _mix(h):
    """lowbias32: uint32 -> uint32, a bijection with avalanche bias 0.17."""
    h = (h ^ (h >> 16)) * _M1
    h = (h ^ (h >> 15)) * _M2
    return h ^ (h >> 16)


class Words(NamedTuple):
    """A key, mixed: what random bits are drawn with. Two uint32 scalars; arrays, for as many keys."""

    first: jax.Array
    second: jax.Array


def key_words(key) -> Words:
    """The words, well mixed, of a typed PRNG key or a raw uint32 key of shape [2] (any word count); Words pass through."""
    if isinstance(key, Words):
        return key
    key = jnp.asarray(key)
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.key_data(key)
    if key.dtype != jnp.uint32 or key.ndim != 1:
        raise ValueError(f"key must be one PRNG key or a uint32[2] array, got {key.dtype}{list(key.shape)}")
    return mixed(*key)


def mixed(*words) -> Words:
    """The words of a key, uint32, or of many side by side: the operations do not grow with their number."""
    a, b = jnp.uint32(0x9E3779B9), jnp.uint32(0xBB67AE85)
    for word in words:
        a = _mix(a ^ word)
        b = _mix(b + a)
    return Words(a, b)


def random_bits(key, shape, offset=0, *, start=None, global_shape=None):
    """uint32 array of `shape`: uniform random bits that depend on key and global element index only.

    key: typed PRNG key, uint32[2], or Words. offset: global row-major index of the first element (int or traced uint32/int32
    scalar), or an integer array of `shape` with every element's index. For a shard that is not contiguous give, instead,
    start (global index of its corner, one per dimension, may be traced) and global_shape. Indices count modulo 2**32.
    """
    shape = tuple(shape)
    if (start is None) != (global_shape is None):
        raise ValueError("start and global_shape must be given together")
    a, b = key_words(key)
    h = _indices(shape, offset, start, global_shape) ^ a
    h = (h ^ (h >> 16)) * _M1
    h = (h ^ (h >> 15) ^ b) * _M2
    return h ^ (h >> 16)


def _word(number):
    """uint32 of a Python integer of any size or of an integer array, modulo 2**32."""
    return jnp.uint32(number % 2**32) if isinstance(number, int) else jnp.asarray(number).astype(jnp.uint32)


def _indices(shape, offset, start, global_shape):
    """uint32 global row-major index of every element."""
    if start is None and jnp.ndim(offset) == len(shape) > 0:
        if jnp.shape(offset) != shape:
            raise ValueError(f"offset has shape {jnp.shape(offset)}; a scalar or shape {shape} is needed")
        return jnp.asarray(offset).astype(jnp.uint32)
    start = (0,) * len(shape) if start is None else tuple(start)
    global_shape = shape if global_shape is None else tuple(global_shape)
    if not len(start) == len(global_shape) == len(shape):
        raise ValueError(f"start {start} and global_shape {global_shape} need {len(shape)} entries each")
    index = _word(offset)
    stride = 1
    for dim in reversed(range(len(shape))):
        position = lax.broadcasted_iota(jnp.uint32, shape, dim) + _word(start[dim])
        index = index + position * np.uint32(stride % 2**32)
        stride *= global_shape[dim]
    return index
