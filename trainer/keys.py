"""Keys as two uint32 words: cheap to derive per step, layer and operand, the same in every layout."""
from __future__ import annotations

import jax
import jax.numpy as jnp

from formats import noise


def fold_in(key, data) -> jax.Array:
    """A new uint32[2] key from a uint32[2] key and an integer (which may be traced)."""
    return jnp.stack(noise.mixed(*key, jnp.asarray(data).astype(jnp.uint32)))


def streams(key, count: int) -> tuple[noise.Words, ...]:
    """`fold_in` of 0 .. count - 1, ready to draw from. Derived side by side: a program with hundreds of operands compiles faster."""
    first, second = noise.mixed(*noise.mixed(*key, jnp.arange(count, dtype=jnp.uint32)))
    return tuple(noise.Words(first[i], second[i]) for i in range(count))
