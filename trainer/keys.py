"""Keys as two uint32 words: cheap to derive per step, layer and operand, the same in every layout."""
from __future__ import annotations

import jax
import jax.numpy as jnp

from formats import noise


def fold_in(key, data) -> jax.Array:
    """A new uint32[2] key from a uint32[2] key and an integer (which may be traced)."""
    word = jnp.asarray(data).astype(jnp.uint32)
    return jnp.stack(noise.key_words(jnp.append(key, word)))
