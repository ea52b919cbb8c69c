"""Attention whose scores, probabilities, keys and values are quantized: the cache that a served model keeps, and what its products read.

Straight-through: gradients are those of the quantized tensors. The scale of a token's keys or values lies along the head width, that of a
channel along time; scores and probabilities have a row for each query. A scale along time sees tokens to come: it stands for one that was
calibrated before (KVQuant, Hooper et al. 2024, section 3.1, takes keys per channel and values per token).

Shapes: B batch, H heads, T time (queries, then keys), K head width; keys and values travel as [B, H, K, T] (`trainer.ops`).
"""
from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

import formats
from formats import Granularity, noise
from formats.gradients import pass_inside, pass_through
from trainer import ops
from trainer.keys import fold_in
from trainer.operands import where_inside

ATTENTION_ROLES = ("kv", "scores", "probabilities")
KEYS, VALUES, SCORES, PROBABILITIES = 0x10, 0x11, 0x12, 0x13  # salts of random bits; those of products count from 0


def attention(policy, key=None, axis_name: str | None = None):
    """`ops.causal_attention` with the policy's roles quantized. key: uint32[2], for stochastic rounding. axis_name: the device axis that
    the batch is split over."""
    if all(getattr(policy, role) is None for role in ATTENTION_ROLES):
        return ops.causal_attention

    def narrow(x, quantizer, salt, token: int, channel: int):
        return x if quantizer is None else _quantized(x, quantizer, salt, (token, channel), key, axis_name)

    def run(q_BHTK, k_BHKT, v_BHKT):
        k = narrow(k_BHKT, policy.kv, KEYS, 2, 3)
        v = narrow(v_BHKT, policy.kv, VALUES, 2, 3)
        allowed = jnp.tri(q_BHTK.shape[2], dtype=bool)[None, None]
        # What is masked is zero before it is quantized, so that no scale sees what is to come.
        scores = narrow(jnp.where(allowed, ops.bdot(q_BHTK, k, 3, 2), 0.0), policy.scores, SCORES, 3, 2)
        probabilities = jax.nn.softmax(jnp.where(allowed, scores, -jnp.inf), axis=-1)
        return ops.bdot(narrow(probabilities, policy.probabilities, PROBABILITIES, 3, 2), v, 3, 3)

    return run


def _quantized(x, quantizer, salt: int, axes: tuple[int, int], key, axis_name):
    """x [B, ...] quantized, straight-through; axes: along which the scale of a token and of a channel is constant."""
    fmt = quantizer.format
    if isinstance(fmt, formats.Scaled):
        fmt = replace(fmt, axis=axes[1] if fmt.granularity is Granularity.CHANNEL else axes[0])
    bits, reduce_max, reduce_mean = None, None, None
    if quantizer.stochastic:
        start = 0 if axis_name is None else lax.axis_index(axis_name) * x.size
        bits = partial(noise.random_bits, fold_in(key, salt), x.shape, offset=start)
    whole = isinstance(fmt, formats.Scaled) and (fmt.granularity is Granularity.TENSOR or fmt.two_level)
    if axis_name is not None and whole:
        reduce_max, reduce_mean = (partial(over, axis_name=axis_name) for over in (lax.pmax, lax.pmean))
    values, scale = formats.split(x, fmt, rounding=quantizer.rounding, random_bits=bits, reduce_max=reduce_max, reduce_mean=reduce_mean)
    y = values * scale
    inside = where_inside(x, values, scale, quantizer)
    return pass_through(x, y) if inside is None else pass_inside(x, y, inside)
