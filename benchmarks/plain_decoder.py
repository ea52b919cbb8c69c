"""The decoder of trainer/model.py as a textbook writes it in JAX: the peer of our float32 step.

`x @ w`, jax.nn.softmax over masked scores, jax.nn.silu, indexing for the embedding, logsumexp for the loss, optax for the update,
plain autodiff. Same parameters (the trainer's dict), same function, nothing hand-written. What multiplies by the four weights of a block can
be given: that is how quantized products of other libraries meet ours in one model (qwix_products.py).

Shapes: B batch, T time, D width, F feed-forward width, H heads, K head width, L layers, V vocabulary.
"""
from __future__ import annotations

import operator

import jax
import jax.numpy as jnp
import optax

from trainer.model import ModelConfig


def rms_norm(x_BTD, gain_D):
    return x_BTD / jnp.sqrt(jnp.mean(x_BTD**2, axis=-1, keepdims=True) + 1e-6) * gain_D


def rotate(x_BTHK):
    """Rotary positions, half-split layout."""
    half = x_BTHK.shape[-1] // 2
    frequency = 10000.0 ** (-jnp.arange(half) / half)
    angle = jnp.arange(x_BTHK.shape[1])[:, None, None] * frequency
    first, second = jnp.split(x_BTHK, 2, axis=-1)
    return jnp.concatenate([first * jnp.cos(angle) - second * jnp.sin(angle), second * jnp.cos(angle) + first * jnp.sin(angle)], axis=-1)


def attention(x_BTD, layer, num_heads: int, product):
    batch, time, width = x_BTD.shape
    q, k, v = (part.reshape(batch, time, num_heads, -1) for part in jnp.split(product(x_BTD, layer["qkv"]), 3, axis=-1))
    scores = jnp.einsum("bqhk,bthk->bhqt", rotate(q), rotate(k)) / jnp.sqrt(q.shape[-1])
    scores = jnp.where(jnp.tril(jnp.ones((time, time), bool)), scores, -jnp.inf)
    out = jnp.einsum("bhqt,bthk->bqhk", jax.nn.softmax(scores, axis=-1), v)
    return product(out.reshape(batch, time, width), layer["attention_out"])


def feed_forward(x_BTD, layer, product):
    gate, up = jnp.split(product(x_BTD, layer["gate_up"]), 2, axis=-1)
    return product(jax.nn.silu(gate) * up, layer["down"])


def block(h_BTD, layer, num_heads: int, product):
    h_BTD = h_BTD + attention(rms_norm(h_BTD, layer["attention_norm"]), layer, num_heads, product)
    return h_BTD + feed_forward(rms_norm(h_BTD, layer["mlp_norm"]), layer, product)


def loss(params, tokens_BT1, config: ModelConfig, scan: bool, product=operator.matmul):
    """Mean next-token cross-entropy in nats of a decoder with a tied head; layers under lax.scan, or unrolled."""
    inputs, targets = tokens_BT1[:, :-1], tokens_BT1[:, 1:]
    table = params["embedding"]
    h_BTD = table[inputs] * config.embedding_width**0.5
    if scan:
        h_BTD, _ = jax.lax.scan(lambda h, layer: (block(h, layer, config.num_heads, product), None), h_BTD, params["layers"])
    else:
        for index in range(config.num_layers):
            h_BTD = block(h_BTD, jax.tree.map(lambda w: w[index], params["layers"]), config.num_heads, product)
    logits = (rms_norm(h_BTD, params["final_norm"]) * config.logit_scale) @ table.T
    at_target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - at_target)


def optimizer(learning_rate: float, weight_decay: float = 0.1, clip_norm: float = 1.0) -> optax.GradientTransformation:
    """AdamW without decay on the gains of normalisations, after clipping: the trainer's rule."""

    def decayed(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: not path[-1].key.endswith("norm"), params)

    adamw = optax.adamw(learning_rate, b1=0.9, b2=0.95, eps=1e-8, weight_decay=weight_decay, mask=decayed)
    return optax.chain(optax.clip_by_global_norm(clip_norm), adamw)


def train_step(config: ModelConfig, scan: bool, learning_rate: float = 3e-3, product=operator.matmul):
    """(init, steps): init(params) -> state; steps(state, tokens [S, B, T+1]) -> (state, losses [S]), jitted, the state donated.

    `scan` is about the layers; the updates of one call are always scanned, as ours are.
    """
    update = optimizer(learning_rate)

    def step(state, tokens_BT1):
        params, opt_state = state
        value, grads = jax.value_and_grad(loss)(params, tokens_BT1, config, scan, product)
        updates, opt_state = update.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    def steps(state, tokens_SBT1):
        return jax.lax.scan(step, state, tokens_SBT1)

    return lambda params: (params, update.init(params)), jax.jit(steps, donate_argnums=0)
