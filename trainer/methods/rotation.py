"""Block rotations of what is quantized: x R in blocks along the contraction, with one orthogonal R for both operands of a product.

A rotation spreads outliers over their block and cancels in the product, (x R)(R^T w) = x w, so nothing is rotated back there. Quartet
(Castro et al. 2025, sections 3 and 4) rotates everything in blocks of 32; NVFP4 training (NVIDIA 2025, section 4.2) the operands of wgrad
in blocks of 16.
"""
from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from scipy.linalg import hadamard

from formats import noise


class Kind(str, Enum):
    """Which R, [block, block]; S is a diagonal of random signs, fresh for every call of a layer, the same in all blocks."""

    HADAMARD = "hadamard"  # H, orthonormal and symmetric
    RANDOM_HADAMARD = "random_hadamard"  # S H: signs first, so that the values that are quantized differ from call to call
    HADAMARD_SIGNS = "hadamard_signs"  # H S: what Quartet's released code does; to a quantizer symmetric in sign the S changes nothing
    RANDOM_ORTHOGONAL = "random_orthogonal"  # uniform over all orthogonal matrices (Quartet's rerotate=O32)


@dataclass(frozen=True)
class Rotation:
    """kind and block size; for the Hadamard kinds a power of two."""

    kind: Kind
    block: int

    def __post_init__(self):
        if self.block < 2 or (self.kind is not Kind.RANDOM_ORTHOGONAL and self.block & (self.block - 1)):
            accepted = "2 and above" if self.kind is Kind.RANDOM_ORTHOGONAL else "2, 4, 8, 16, ..."
            raise ValueError(f"transform_block={self.block} with transform={self.kind.value}; accepted: {accepted}")

    @property
    def random(self) -> bool:
        """Whether it needs a key."""
        return self.kind is not Kind.HADAMARD

    def padded(self, size: int) -> int:
        """The size of a dimension whose last block is filled up."""
        return -(-size // self.block) * self.block


def _matrix(rotation: Rotation, key):
    """R, float32 [block, block]."""
    size = rotation.block
    if rotation.kind is Kind.RANDOM_ORTHOGONAL:
        words = jnp.stack(noise.key_words(key))
        return jax.random.orthogonal(jax.random.wrap_key_data(words, impl="threefry2x32"), size).astype(jnp.float32)
    matrix = hadamard(size).astype(np.float32) * np.float32(size**-0.5)
    if not rotation.random:
        return matrix
    signs = jnp.where(noise.random_bits(key, (size,)) >> 31 == 0, jnp.float32(1.0), jnp.float32(-1.0))
    return signs[:, None] * matrix if rotation.kind is Kind.RANDOM_HADAMARD else matrix * signs[None, :]


def rotate(x: jax.Array, rotation: Rotation, dim: int, key=None) -> jax.Array:
    """x [A, B] float32, `dim` filled up with zeros to whole blocks, each block of it times R. key: uint32[2] for the random kinds."""
    missing = rotation.padded(x.shape[dim]) - x.shape[dim]
    if missing:
        x = jnp.pad(x, [(0, missing if d == dim else 0) for d in range(2)])
    return _times(x, _matrix(rotation, key), dim)


def rotate_back(x: jax.Array, rotation: Rotation, dim: int, size: int, key=None) -> jax.Array:
    """The inverse of `rotate`, for the same key: `dim` has its own `size` again."""
    return lax.slice_in_dim(_times(x, _matrix(rotation, key).T, dim), 0, size, axis=dim)


def _times(x, matrix, dim: int):
    """Every block of `dim` times matrix. Blocks along rows as a batch of products: three to four copies of x on a CPU, where transposing
    would be fifteen."""
    block = matrix.shape[0]
    if dim == 1:
        return lax.dot(x.reshape(-1, block), matrix, precision=lax.Precision.HIGHEST).reshape(x.shape)
    blocks = x.reshape(-1, block, x.shape[1])
    left = jnp.broadcast_to(matrix.T, (blocks.shape[0], block, block))
    return lax.dot_general(left, blocks, (((2,), (1,)), ((0,), (0,))), precision=lax.Precision.HIGHEST).reshape(x.shape)
