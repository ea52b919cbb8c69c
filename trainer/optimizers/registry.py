"""Optimizers by name: what `optimizer.name=NAME` may be, and the traced numbers that they are built from."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax

OPTIMIZERS: dict[str, Callable] = {}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class OptimizerNumbers:
    """Traced hyper-parameters, all float32 scalars."""

    lr: jax.Array
    beta1: jax.Array
    beta2: jax.Array
    eps: jax.Array
    weight_decay: jax.Array
    clip_norm: jax.Array  # inf: no clipping


def register(name: str):
    """Decorator that adds an optimizer under `optimizer.name=NAME`."""

    def add(build):
        OPTIMIZERS[name] = build
        return build

    return add
