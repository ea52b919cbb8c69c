"""What defines NVFP4 training: dgrad sees the forward's weights, only gradients are rounded stochastically, and what that leaves unbiased.

Shapes: N tokens, K inputs, M outputs.
"""
from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import norm

import trainer
from tests.trainer.policies.networks import policy
from tests.trainer.policies.numpy_policies import E2M1, Words, along, nearest, nvfp4, nvfp4_scales, rotated

N = K = M = 48
NUM_KEYS = 600


@jax.jit
def _products(which, x, w, g, keys):
    """y, dx, dw for every key."""

    def one(key):
        y, backward = jax.vjp(lambda x, w: trainer.linear(x, w, which, key), x, w)
        return (y, *backward(g))

    return jax.lax.map(one, keys, batch_size=50)


def _keys():
    return np.random.default_rng(8).integers(0, 2**32, (NUM_KEYS, 2), dtype=np.uint32)


def _arrays():
    """x, w, g, with rows of x and g of different size."""
    rng = np.random.default_rng(9)
    return [(rng.standard_normal((N, N)) * np.exp(rng.uniform(-spread, spread, (N, 1)))).astype(np.float32) for spread in (1, 0, 2)]


def test_dgrad_sees_the_weights_of_the_forward():
    """Identity matrices, exact in NVFP4, read the weights out of both products: the same numbers. Plain NVFP4 quantizes them twice."""
    _, w, _ = _arrays()
    eye = np.eye(N, dtype=np.float32)
    for name, alike in (("nvfp4_recipe", True), ("nvfp4", False)):
        y, dx, _ = (np.asarray(a[0]) for a in _products(policy(name), eye, w, eye, _keys()))
        assert np.linalg.norm(y - w) > 0.05 * np.linalg.norm(w)
        same = np.abs(dx.T - y) <= 1e-6 * np.abs(y)
        assert np.all(same) if alike else np.mean(same) < 0.7, name


def test_only_gradients_are_stochastic():
    """y is the same for every key and equals numpy's; dx and dw are not."""
    x, w, g = _arrays()
    y, dx, dw = (np.asarray(a) for a in _products(policy("nvfp4_recipe"), x, w, g, _keys()))
    expected = nvfp4()(x.astype(np.float64), 1, None) @ nvfp4((16, 16))(w.astype(np.float64), 0, None)
    assert np.all(y == y[0]) and np.linalg.norm(y[0] - expected) < 1e-6 * np.linalg.norm(expected)
    assert np.mean(dx[0] != dx[1]) > 0.9 and np.mean(dw[0] != dw[1]) > 0.9


def _clipped(t, axis):
    """What stochastic rounding has as its mean: a block's scale is an E4M3 number, up to 1/16 below amax / 6, and clips what is above."""
    scales = nvfp4_scales(t, along(axis, 16))
    return np.clip(t, -6 * scales, 6 * scales)


def test_unbiased_but_for_the_rounding_of_scales():
    """dx and dw minus the products of the gradients as clipped by their scales, of the key's rotation and rounded activations where those
    are read: means of zero to the largest z that chance has once in a thousand times. Against gradients that nothing clips dx is short."""
    x, w, g = _arrays()
    keys = _keys()
    _, dx, dw = (np.asarray(a, np.float64) for a in _products(policy("nvfp4_recipe"), x, w, g, keys))
    x, w, g = (a.astype(np.float64) for a in (x, w, g))
    w_q = nvfp4((16, 16))(w, 0, None)
    signs = np.asarray([Words(jnp.asarray(key)).signs(16) for key in keys])
    turned = [(nvfp4()(rotated(x, 0, 16, s), 0, None), _clipped(rotated(g, 0, 16, s), 0)) for s in signs]
    for found, expected in ((dx, _clipped(g, 1) @ w_q.T), (dw, np.asarray([x_q.T @ g_c for x_q, g_c in turned]))):
        error = found - expected
        z = error.mean(0) / (error.std(0, ddof=1) / np.sqrt(len(keys)))
        assert np.max(np.abs(z)) < norm.isf(1e-3 / 2 / z.size) and 0.8 < np.mean(z**2) < 1.2
    error = dx - g @ w_q.T
    z = error.mean(0) / (error.std(0, ddof=1) / np.sqrt(len(keys)))
    assert np.mean(z**2) > 2


def test_rotation_is_of_wgrad_alone():
    """Where x and g are exact in NVFP4 without a rotation, dx has no error but the weights', and dw has that of rotated operands."""
    rng = np.random.default_rng(10)
    x, g = (nearest(rng.integers(-6, 7, (N, K)).astype(float), E2M1) for _ in range(2))
    x[:, ::16] = g[:, ::16] = x[::16] = g[::16] = 6.0  # every block holds its largest value, so that all scales are 1
    given = (a.astype(np.float32) for a in (x, np.eye(K, M), g))
    y, dx, dw = (np.asarray(a[0]) for a in _products(policy("nvfp4_recipe"), *given, _keys()))
    assert np.max(np.abs(y - x)) < 1e-5 and np.max(np.abs(dx - g)) < 1e-5
    assert np.linalg.norm(dw - x.T @ g) > 0.02 * np.linalg.norm(dw)
