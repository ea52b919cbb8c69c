"""Moving a power of two between the data and the exponent of an argument changes no bit of what whole programs give.

The oracle is plain jax in float32 for the values, and equality of float64 numbers for the bits.
Shapes: N rows, V classes; B batch, Q queries, K keys, H heads, D width.
"""
from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tests.trainer.propagation.harness import normal, positive, value, values
from trainer import ScaledArray, propagate_scales

LABELS = np.array([1, 0, 4, 4, 2], np.int32)
MASK = np.tril(np.ones((5, 5), bool))
FAR, FARTHEST = 60, 100


def layer_norm(x, gain, bias):
    mean = x.mean(-1, keepdims=True)
    variance = jnp.square(x - mean).mean(-1, keepdims=True)
    return (x - mean) * lax.rsqrt(variance + 1e-6) * gain[None] + bias[None]


def cross_entropy(x_NV):
    return -jnp.take_along_axis(jax.nn.log_softmax(x_NV), LABELS[:, None], 1).mean()


def attention(masked):
    def run(q_QD, k_KD, v_KD):
        scores = q_QD @ k_KD.T * 0.5
        scores = jnp.where(MASK, scores, masked)
        return jax.nn.softmax(scores) @ v_KD

    return run


def gradient(fun, number: int = 0):
    return jax.grad(lambda *xs: jnp.sum(jnp.sin(fun(*xs))), number)


def layers(activation):
    """Loss of two layers: all in all a product of many factors, each of which is moved."""

    def loss(x_ND, w_DH, v_HD):
        return jnp.mean(jnp.square(activation(x_ND @ w_DH) @ v_HD))

    return jax.grad(loss, (0, 1, 2))


def swiglu(x):
    return jax.nn.silu(x) * x


def embedding(table_VD, g_ND):
    return jax.grad(lambda t: jnp.sum(t[LABELS] * g_ND))(table_VD)


def max_pool(x):
    return lax.reduce_window(x, -jnp.inf, lax.max, (2, 2), (1, 1), "VALID")


CASES = {
    "relu gradient": (gradient(jax.nn.relu), "55", normal),
    "relu": (jax.nn.relu, "55", normal),
    "max pool gradient": (gradient(max_pool), "55", normal),
    "softmax": (jax.nn.softmax, "55", normal),
    "softmax gradient": (gradient(jax.nn.softmax), "55", normal),
    "logsumexp": (lambda x: jax.nn.logsumexp(x, 1), "55", normal),
    "logsumexp gradient": (gradient(lambda x: jax.nn.logsumexp(x, 1)), "55", normal),
    "log_softmax": (jax.nn.log_softmax, "55", normal),
    "layer norm": (layer_norm, "55 5 5", normal),
    "gelu": (jax.nn.gelu, "55", normal),
    "gelu exact": (lambda x: jax.nn.gelu(x, approximate=False), "55", normal),
    "gelu gradient": (gradient(jax.nn.gelu), "55", normal),
    "silu gradient": (gradient(jax.nn.silu), "55", normal),
    "two layers, gelu": (layers(jax.nn.gelu), "53 35 53", normal),
    "two layers, swiglu": (layers(swiglu), "53 35 53", normal),
    "two layers, relu squared": (layers(lambda x: jnp.square(jax.nn.relu(x))), "53 35 53", normal),
    "gradient of a product": (jax.grad(lambda x: jnp.sum(jnp.prod(x, 1))), "55", normal),
    "a power": (lambda x: x**7, "55", normal),
    "times exp of zeros": (lambda x: x * jnp.exp(jnp.zeros_like(x)), "55", normal),
    "times exp of its zeros": (lambda x: x * jnp.exp(x - x), "55", normal),
    "cross entropy": (cross_entropy, "55", normal),
    "cross entropy gradient": (jax.grad(cross_entropy), "55", normal),
    "attention, -1e30": (attention(-1e30), "53 53 53", normal),
    "attention, -inf": (attention(-jnp.inf), "53 53 53", normal),
    "attention, finfo.min": (attention(jnp.finfo(jnp.float32).min), "53 53 53", normal),
    "attention gradient": (gradient(attention(-1e30)), "53 53 53", normal),
    "attention of jax": (lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True), "2524 2524 2524", normal),
    "gradient of a where mask": (gradient(lambda x, y: jnp.where(x > 0, x * y, 0.1 * y), 1), "55 55", normal),
    "cumsum": (lambda x: jnp.cumsum(x, 0), "55", normal),
    "one hot": (lambda x: jax.nn.one_hot(LABELS, 5) @ x, "55", normal),
    "embedding gradient": (embedding, "53 53", normal),
    "max pool": (max_pool, "55", normal),
    "mean and variance": (lambda x: (x.mean(), x.var()), "55", normal),
    "norm": (lambda x: jnp.linalg.norm(x), "55", normal),
    "log of a sum": (lambda x: jnp.log(x.sum(0)), "55", positive),
    "sort": (lambda x: jnp.sort(x, 1), "55", normal),
    "top_k": (lambda x: lax.top_k(x, 2), "55", normal),
    "argmax": (lambda x: jnp.argmax(x, 1), "55", normal),
}  # fmt: skip


def _program(arguments):
    return {name: fun(*arguments[name]) for name, (fun, _, _) in CASES.items()}


def _draw(seed: int):
    """name -> arguments, float32 with few digits, so that a difference in one bit is a difference in rounding."""
    rng = np.random.default_rng(seed)
    return {name: tuple(draw(rng, tuple(map(int, word))).astype(np.float16).astype(np.float32) for word in words.split())
            for name, (_, words, draw) in CASES.items()}  # fmt: skip


def _moved(arguments, rng, far: int):
    def one(x):
        step = np.int32(rng.integers(-far, far + 1))
        return ScaledArray(np.ldexp(x, step), -step)

    return {name: tuple(map(one, xs)) for name, xs in arguments.items()}


@pytest.fixture(scope="module")
def found():
    """(plain, with exponent 0, [moved by hand in several ways])."""
    arguments, rng = _draw(0), np.random.default_rng(1)
    run = propagate_scales(_program, outputs="scaled")
    still = values(run(_moved(arguments, rng, 0)))
    return jax.device_get(jax.jit(_program)(arguments)), still, [values(run(_moved(arguments, rng, far))) for far in (8, FAR, FAR, FARTHEST)]


@pytest.mark.parametrize("name", CASES)
def test_values_are_those_of_plain_jax(name, found):
    plain, still, _ = found
    for x, y in zip(jax.tree.leaves(plain[name]), jax.tree.leaves(still[name]), strict=True):
        np.testing.assert_allclose(y, x, rtol=0, atol=1e-6 * max(np.abs(x).max(), 1e-30))


@pytest.mark.parametrize("name", CASES)
def test_no_bit_changes(name, found):
    _, still, moved = found
    for other in moved:
        for x, y in zip(jax.tree.leaves(still[name]), jax.tree.leaves(other[name]), strict=True):
            np.testing.assert_array_equal(y, x)


@pytest.mark.parametrize("gap", (0, 20, 126, 127, 128, 250))
@pytest.mark.parametrize("large", (-100, 0, 100))
@pytest.mark.parametrize("small", (-100, 0, 100))
def test_sums_of_distant_scales(gap, large, small):
    """a + b where one is the other's rounding error or less, and data are far from unit scale."""
    a, b = np.float32([1.5, -2.25, 3.0]), np.float32([0.75, 1.0, -1.25])
    one, other = ScaledArray(np.ldexp(a, large), np.int32(gap - large)), ScaledArray(np.ldexp(b, small), np.int32(-small))
    want = np.ldexp(a.astype(np.float64), gap) + b
    for got in SUMS(one, other), SUMS(other, one):
        np.testing.assert_allclose(value(got), want, rtol=2.0**-23)


SUMS = propagate_scales(lambda x, y: x + y)


def test_moves_of_each_layer_change_no_bit():
    """Weights stacked for scan with an exponent for each layer, and a cohort of two, whose members have their own."""
    rng = np.random.default_rng(0)
    weights_MLDD, x_MND = rng.standard_normal((2, 4, 6, 6)).astype(np.float32) / 2, rng.standard_normal((2, 3, 6)).astype(np.float32)

    def loss(weights_LDD, x_ND):
        return jnp.sum(jnp.sin(lax.scan(lambda h, w: (h + jax.nn.gelu(h @ w), None), x_ND, weights_LDD)[0]))

    run = jax.vmap(propagate_scales(jax.value_and_grad(loss, (0, 1)), outputs="scaled"))

    def results(far: int):
        steps_ML, steps_M = rng.integers(-far, far + 1, (2, 4)).astype(np.int32), rng.integers(-far, far + 1, 2).astype(np.int32)
        return values(run(ScaledArray(np.ldexp(weights_MLDD, steps_ML[..., None, None]), -steps_ML), ScaledArray(np.ldexp(x_MND, steps_M[:, None, None]), -steps_M)))

    want = jax.vmap(jax.value_and_grad(loss, (0, 1)))(weights_MLDD, x_MND)
    still = results(0)
    for got, one in zip(jax.tree.leaves(still), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(got, one, rtol=0, atol=2e-6 * np.abs(one).max())
    for far in (3, 60, 100):
        for got, one in zip(jax.tree.leaves(results(far)), jax.tree.leaves(still), strict=True):
            np.testing.assert_array_equal(got, one)
