"""Where plain float16 collapses and float16 with carried scales trains: a classifier of bytes by the bytes before them, on real text.

After jax-scalify's MNIST experiments (branch mnist-experiments-plots): there plain float16 ends at chance for initial scales of 2 and more,
scaled float16 does not.
"""
from __future__ import annotations

import functools
import pathlib
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from trainer import propagate_scales, rescale, scaled, unscaled

CONTEXT, ALPHABET, WIDTH, BATCH, STEPS = 4, 64, 128, 128, 400


def _text() -> tuple[np.ndarray, np.ndarray]:
    """(contexts [n, CONTEXT], next bytes [n]) of a module of the standard library, folded to ALPHABET values."""
    data = np.frombuffer(pathlib.Path(textwrap.__file__).read_bytes(), np.uint8) % ALPHABET
    windows = np.lib.stride_tricks.sliding_window_view(data, CONTEXT + 1)
    return windows[:, :-1].astype(np.int32), windows[:, -1].astype(np.int32)


def _norm(h):
    return h * lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + jnp.asarray(1e-5, h.dtype))


def _loss(params, x, labels):
    (w1, b1), (w2, b2), (w3, b3) = params
    h = jax.nn.relu(_norm(x @ w1 + b1[None, :]))
    h = jax.nn.relu(_norm(h @ w2 + b2[None, :]))
    logits = rescale(h @ w3 + b3[None, :], by="rms", on="cotangent")  # as in jax-scalify's examples
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1))


def _step(params, x, labels):
    loss, grads = jax.value_and_grad(_loss)(params, x, labels)
    # Rescaled, because a sum has the larger exponent: an update whose exponent says more than its data would lift that of the parameter, which
    # lifts the next gradients' exponents, and so on without end.
    return jax.tree.map(lambda p, g: p - jnp.asarray(0.05, p.dtype) * rescale(g), params, grads), loss


@functools.cache
def _training(mode: str):
    """(params, rows [STEPS, BATCH]) -> losses [STEPS], compiled."""
    step = propagate_scales(_step) if mode == "scaled float16" else _step
    contexts, labels = map(jnp.asarray, _text())

    def one(params, rows):
        x = jax.nn.one_hot(contexts[rows], ALPHABET, dtype=jnp.float32).reshape(BATCH, -1)
        params, loss = step(params, _held(mode, x), labels[rows])
        return params, jnp.asarray(unscaled(loss), jnp.float32)

    return jax.jit(lambda params, rows: lax.scan(one, params, rows)[1])


def _held(mode: str, tree):
    if mode == "scaled float16":
        return scaled(tree, dtype=jnp.float16)
    return jax.tree.map(lambda x: x.astype(jnp.float16), tree) if mode == "plain float16" else tree


def _final_loss(mode: str, init_scale: float) -> float:
    """The mean loss of the last 50 of STEPS steps of SGD, from hidden weights of init_scale times the usual size."""
    rng = np.random.default_rng(0)
    sizes, scales = (CONTEXT * ALPHABET, WIDTH, WIDTH, ALPHABET), (init_scale, init_scale, 1.0)
    weights = [rng.normal(size=(m, n)) * scale / m**0.5 for m, n, scale in zip(sizes, sizes[1:], scales)]
    params = [(w.astype(np.float32), np.zeros(w.shape[1], np.float32)) for w in weights]
    losses = _training(mode)(_held(mode, params), jnp.asarray(rng.integers(0, len(_text()[1]), (STEPS, BATCH))))
    return float(np.mean(losses[-50:]))


@pytest.mark.parametrize("init_scale", [pytest.param(2.0**-12, marks=pytest.mark.slow), 2.0**-4, 1.0, 2.0**10, 2.0**12])
def test_plain_float16_collapses_where_scaled_float16_trains(init_scale):
    chance = np.log(ALPHABET)
    plain, carried, exact = (_final_loss(mode, init_scale) for mode in ("plain float16", "scaled float16", "float32"))
    print(f"weights of {init_scale:g} times the usual size: plain float16 {plain:.3f}, scaled float16 {carried:.3f}, float32 {exact:.3f}, chance {chance:.3f}")
    assert exact < 0.65 * chance, "there is something to learn"
    assert abs(carried - exact) < 0.05
    assert abs(plain - exact) < 0.05 if init_scale == 1 else not plain < 0.95 * chance
