"""What the low-precision transformations share: numbers for every leaf, random keys for every leaf and step, bytes of a state."""
from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from formats import Rounding
from formats.modes import parse
from trainer.keys import fold_in


def spread(name: str, prefix, tree) -> list:
    """One entry of `prefix` for every leaf of `tree`, in order. prefix: one number, a tree like `tree`, or anything between (a tree that
    stops at subtrees, as optax's masks may). ValueError, which calls it `name`, if it does not fit."""
    try:
        return jax.tree.leaves(jax.tree.broadcast(prefix, tree))
    except ValueError:
        raise ValueError(f"{name} is a tree with structure {jax.tree.structure(prefix)}; accepted: one number, or a tree like the parameters, "
                         f"{jax.tree.structure(tree)}") from None


def check_rounding(rounding: str, key) -> bool:
    """True if the rounding draws random bits. ValueError if it is unknown, or random without a key."""
    random = parse(Rounding, rounding).random
    if random and key is None:
        raise ValueError(f"rounding={rounding!r} with key=None draws no bits: give key=jax.random.key(SEED), or a uint32[2] array")
    return random


def leaf_key(key, purpose: int, count, index: int):
    """uint32[2]: the key of leaf `index` at step `count` (int32, may be traced). key: a typed PRNG key or uint32[2]. purpose: one number
    for each use, so that parameters and moments given one key still round independently."""
    if jnp.issubdtype(jnp.asarray(key).dtype, jax.dtypes.prng_key):
        key = jax.random.key_data(key)
    return fold_in(fold_in(fold_in(key, purpose), count), index)


def state_bytes(tree) -> int:
    """Bytes that the arrays of a tree take: parameters, gradients, optimizer states, with QArrays and BlockwiseArrays at the size of
    their codes and scales. Also of the `jax.ShapeDtypeStruct`s that `jax.eval_shape(transformation.init, params)` gives."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
