"""AdamW in float32, with a learning rate for every parameter."""
from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from trainer.optimizers.registry import OptimizerNumbers, register


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
