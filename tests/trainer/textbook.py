"""The decoder and its operations from the textbook, in float64 and without a thought for speed: the oracle of the trainer's tests.

Shapes: B batch, T time, D model width, H heads, K head width, F feed-forward width, V vocabulary, L layers.
Everything is written in terms of `xp`: numpy for values, jax.numpy (under `jax.enable_x64`) where a gradient is wanted.
"""
from __future__ import annotations

import numpy as np


def rms_norm(x, gain, xp=np):
    return x / xp.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * gain


def swiglu(gate_up, xp=np):
    gate, up = xp.split(gate_up, 2, axis=-1)
    return gate / (1.0 + xp.exp(-gate)) * up


def rotate(x_BHTK, xp=np):
    """Rotary positions: component pairs (i, i + K/2) turn by position / 10000**(2 i / K)."""
    time, width = x_BHTK.shape[-2:]
    angle = np.arange(time)[:, None] * 10000.0 ** (-np.arange(0, width, 2) / width)
    first, second = x_BHTK[..., : width // 2], x_BHTK[..., width // 2 :]
    cos, sin = np.cos(angle)[None, None], np.sin(angle)[None, None]
    return xp.concatenate([first * cos - second * sin, first * sin + second * cos], -1)


def attention(qkv_BTX, num_heads: int, xp=np):
    """Causal softmax attention from [B, T, 3 D] (queries, keys, values side by side) to [B, T, D]."""
    batch, time, width = qkv_BTX.shape
    head = width // 3 // num_heads
    q, k, v = (xp.reshape(part, (batch, time, num_heads, head)).transpose(0, 2, 1, 3) for part in xp.split(qkv_BTX, 3, axis=-1))
    scores = rotate(q, xp) @ rotate(k, xp).transpose(0, 1, 3, 2) / np.sqrt(head)
    scores = xp.where(np.tril(np.ones((time, time), bool))[None, None], scores, -np.inf)
    weights = xp.exp(scores - scores.max(-1, keepdims=True))
    weights = weights / weights.sum(-1, keepdims=True)
    return xp.reshape((weights @ v).transpose(0, 2, 1, 3), (batch, time, width // 3))


def cross_entropy(logits, targets, xp=np):
    """-log softmax at the target, over the last dim of logits."""
    shifted = logits - logits.max(-1, keepdims=True)
    log_total = xp.log(xp.exp(shifted).sum(-1))
    return log_total - xp.take_along_axis(shifted, targets[..., None], -1)[..., 0]


def logits(params: dict, tokens_BT, num_heads: int, xp=np):
    """Of the decoder with these parameters (tied or untied head) under the standard parametrisation."""
    width = params["embedding"].shape[1]
    h = params["embedding"][tokens_BT] * np.sqrt(width)
    layers = params["layers"]
    for i in range(layers["qkv"].shape[0]):
        normed = rms_norm(h, layers["attention_norm"][i][None, None], xp)
        h = h + attention(normed @ layers["qkv"][i], num_heads, xp) @ layers["attention_out"][i]
        normed = rms_norm(h, layers["mlp_norm"][i][None, None], xp)
        h = h + swiglu(normed @ layers["gate_up"][i], xp) @ layers["down"][i]
    h = rms_norm(h, params["final_norm"][None, None], xp)
    return h @ params["head"].T if params.get("head") is not None else h @ params["embedding"].T / np.sqrt(width)


def loss(params: dict, tokens_BT1, num_heads: int, xp=np):
    """Mean cross-entropy of the next tokens, nats."""
    return cross_entropy(logits(params, tokens_BT1[:, :-1], num_heads, xp), tokens_BT1[:, 1:], xp).mean()


def adamw(param, grad, mean, square, step: int, lr, beta1, beta2, eps, decay):
    """(param, mean, square) after update `step` (from 0): Loshchilov & Hutter 2019, algorithm 2."""
    mean, square = beta1 * mean + (1 - beta1) * grad, beta2 * square + (1 - beta2) * grad**2
    direction = (mean / (1 - beta1 ** (step + 1))) / (np.sqrt(square / (1 - beta2 ** (step + 1))) + eps)
    return param - lr * (direction + decay * param), mean, square
