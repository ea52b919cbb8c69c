"""Looking numbers up among sorted thresholds: by comparing all of a few, which vectorises, by searching many."""

from __future__ import annotations

import jax.numpy as jnp

LINEAR = 256  # thresholds up to which all are compared; searching fewer takes as long, and memory


def count(key, thresholds):
    """int32 like key: how many of the increasing thresholds [T] lie below it. Integers throughout."""
    if thresholds.shape[0] > LINEAR:
        return jnp.searchsorted(jnp.asarray(thresholds), key, side="left", method="scan_unrolled").astype(jnp.int32)
    number = jnp.zeros(key.shape, jnp.int32)
    for i in range(thresholds.shape[0]):
        number = number + (key > thresholds[i]).astype(jnp.int32)
    return number


def lookup(key, thresholds, table):
    """table [T + 1] at `count`, an array like key."""
    table = jnp.asarray(table)
    if thresholds.shape[0] > LINEAR:
        return jnp.take(table, count(key, thresholds), mode="clip")
    value = jnp.full(key.shape, table[0])
    for i in range(thresholds.shape[0]):
        value = jnp.where(key > thresholds[i], table[i + 1], value)
    return value
