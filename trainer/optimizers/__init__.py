"""Optimizers as optax transformations, built inside the step from traced numbers.

An optimizer is a function (numbers: OptimizerNumbers, lr_tree, decay_tree) -> optax.GradientTransformation, where `lr_tree` holds
each parameter's learning rate (traced float32 scalars) and `decay_tree` says (bool) whether weight decay applies to it. Plugins add
theirs with `register`.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Callable

import jax
import jax.numpy as jnp
import optax

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


def scale_by_tree(factors) -> optax.GradientTransformation:
    """Multiply every leaf by its own scalar: learning rates per parameter."""

    def update(updates, state, params=None):
        del params
        return jax.tree.map(lambda u, f: u * f, updates, factors), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


@register("adamw")
def adamw(numbers: OptimizerNumbers, lr_tree, decay_tree) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019); the decay is decoupled and multiplied by the learning rate."""
    return optax.chain(
        optax.scale_by_adam(b1=numbers.beta1, b2=numbers.beta2, eps=numbers.eps),
        optax.add_decayed_weights(numbers.weight_decay, mask=decay_tree),
        scale_by_tree(jax.tree.map(jnp.negative, lr_tree)),
    )
