"""Loops, branches, remat and custom derivatives under the transform, against the same program in plain numpy or jax."""
from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tests.trainer.propagation.harness import value
from trainer import ScaledArray, propagate_scales


def at(data, exponent) -> ScaledArray:
    return ScaledArray(jnp.asarray(data, jnp.float32), jnp.asarray(exponent, jnp.int32))


def close(got, want, tolerance=2e-6):
    want = np.asarray(want)
    np.testing.assert_allclose(value(got), want, rtol=0, atol=tolerance * np.abs(want).max())


X = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
EACH = np.array([60, 3, -60, 55], np.int32)


@pytest.mark.parametrize("reverse", (False, True))
@pytest.mark.parametrize("exponent", (0, 60, -60, EACH), ids=str)
@pytest.mark.parametrize("data_dtype", (None, "float16"))
def test_scan_with_accumulators_that_start_at_zero(exponent, reverse, data_dtype):
    def f(xs):
        def body(carry, x):
            total, count = carry
            total = total + 2.0 * x
            return (total, count + 1), (total, x * x, count)

        return lax.scan(body, (jnp.zeros(3), 0), xs, reverse=reverse)

    x = X.astype(np.float16).astype(np.float32)
    (total, count), (totals, squares, counts) = propagate_scales(f, data_dtype=data_dtype)(at(x, exponent))
    values = value(at(x, exponent))
    order = slice(None, None, -1) if reverse else slice(None)
    sums = np.cumsum(2 * values[order], 0)[order]
    tolerance = 4e-3 if data_dtype else 2e-6
    close(total, 2 * values.sum(0), tolerance)
    close(totals, sums, tolerance)
    for got, want in zip(value(squares), values**2):  # each layer has its own exponent
        close(got, want, tolerance)
    assert int(count) == 4 and list(np.asarray(counts)) == list(range(4))[order]


def test_gradient_accumulation():
    """Micro-batches in a scan: zeros take the scale of the gradients."""

    def loss(w, x):
        return jnp.sum(jnp.tanh(x @ w) ** 2)

    def step(w, xs):
        def body(total, x):
            return jax.tree.map(jnp.add, total, jax.grad(loss)(w, x)), None

        return lax.scan(body, jnp.zeros_like(w), xs)[0]

    rng = np.random.default_rng(0)
    w, xs = rng.standard_normal((3, 2)).astype(np.float32), rng.standard_normal((4, 5, 3)).astype(np.float32)
    out = propagate_scales(step)(at(w * 2.0**-60, 60), at(xs, 0))
    close(out, step(w, xs))
    tiny = propagate_scales(step, data_dtype="float16")(at(w, -30), at(xs, -30))  # gradients of 2^-90 or so
    close(tiny, 2 * np.einsum("mbi,mbj,jo->io", xs.astype(np.float64), xs, w) * 2.0**-90, 1e-2)


def test_scan_over_layers_with_an_exponent_each():
    def f(x, weights):
        def layer(x, w):
            y = jnp.tanh(x @ w)
            return x + y, y

        return lax.scan(layer, x, weights)

    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((2, 3)).astype(np.float32), rng.standard_normal((4, 3, 3)).astype(np.float32)
    out, stacked = propagate_scales(f)(at(x, 0), at(w * 2.0 ** -EACH[:, None, None].astype(np.float64), EACH))
    want, each = f(x, w)
    close(out, want), close(stacked, each)


def test_a_carry_that_grows_out_of_float32():
    def f(x):
        return lax.fori_loop(0, 9, lambda _, x: x * x, x)

    assert value(propagate_scales(f)(at([1.0], 1)))[0] == 2.0**512


def test_nested_scan():
    def f(x, w):
        def outer(c, w):
            def inner(c, i):
                return c * w + x, c.sum()

            return lax.scan(inner, c, jnp.arange(3))

        return lax.scan(outer, jnp.zeros_like(x), w)

    x, w = X[0], X[:, 0]
    got, got_each = propagate_scales(f)(at(x * 2.0**-50, 50), at(w * 2.0**20, -20))
    want, each = f(jnp.asarray(x), jnp.asarray(w))
    close(got, want), close(got_each, each)


def test_fori_loop_with_traced_bounds():
    f = propagate_scales(lambda n, x: lax.fori_loop(0, n, lambda i, y: y * 0.5 + x, jnp.zeros_like(x)))
    close(f(7, at(X, 60)), X * 2.0**60 * (2 - 0.5**6))
    close(f(0, at(X, 60)), 0 * X)


def test_while_loop_whose_condition_reads_scales():
    def f(x):
        return lax.while_loop(lambda c: c[0].sum() < 1000.0, lambda c: (c[0] * 2.0, c[1] + 1), (x, 0))

    for e in (0, -60, 60):
        total, steps = propagate_scales(f)(at([1.0, 2.0], e))
        want = max(0, int(np.ceil(np.log2(1000 / 3 / 2.0**e))))
        assert int(steps) == want
        np.testing.assert_array_equal(value(total), np.array([1.0, 2.0]) * 2.0 ** (e + want))


@pytest.mark.parametrize("data_dtype", (None, "float16"))
def test_branches_of_different_scales(data_dtype):
    def f(which, x):
        small, large, none = (lambda x: x * 2.0**-100), (lambda x: x * x), (lambda x: jnp.zeros_like(x))
        return lax.switch(which, [small, large, none], x), lax.cond(which > 0, lambda x: x, lambda x: jnp.ones_like(x), x)

    x = X.astype(np.float16).astype(np.float32)
    run = propagate_scales(f, data_dtype=data_dtype)
    tolerance = 2e-3 if data_dtype else 2e-6
    values = x * 2.0**60
    for which, want in enumerate((values * 2.0**-100, values**2, 0 * values)):
        got, other = run(which, at(x, 60))
        close(got, want, tolerance)
        close(other, values if which else np.ones_like(values), tolerance)


# --- derivatives ------------------------------------------------------------------------------------------------------


def _loss(w, x):
    return jnp.sum(jnp.sin(x @ w) ** 2) * 1e-3


@pytest.mark.parametrize("policy", (None, jax.checkpoint_policies.dots_saveable))
def test_remat(policy):
    def loss(w, x):
        return _loss(jax.checkpoint(lambda w: w @ w.T, policy=policy)(w), x)

    w, x = X[:3], X
    want, gradient = jax.value_and_grad(loss)(w, x)
    got, got_gradient = propagate_scales(jax.value_and_grad(loss))(at(w * 2.0**40, -40), at(x * 2.0**-10, 10))
    close(got, want), close(got_gradient, gradient)


def test_remat_in_a_scan():
    def loss(weights, x):
        layer = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None))
        return jnp.sum(lax.scan(layer, x, weights)[0] ** 2)

    w = np.random.default_rng(0).standard_normal((4, 3, 3)).astype(np.float32)
    want = jax.grad(loss)(w, X)
    close(propagate_scales(jax.grad(loss))(at(w, 0), at(X, 0)), want)
    out = propagate_scales(jax.grad(loss))(at(w * 2.0 ** -EACH[:, None, None].astype(np.float64), EACH), at(X, 0))
    close(out, want)


@jax.custom_jvp
def _jvp(x):
    return x * x


@_jvp.defjvp
def _(primals, tangents):
    return _jvp(*primals), 3.0 * tangents[0]  # not the derivative of x * x: it must be used


@jax.custom_vjp
def _vjp(x, y):
    return x * y


_vjp.defvjp(lambda x, y: (x * y, x), lambda x, g: (7.0 * g, g * x))


def test_custom_derivatives_before_and_after_grad():
    x = at([2.0], 60)
    assert value(propagate_scales(_jvp)(x))[0] == 2.0**122
    assert value(propagate_scales(jax.grad(lambda x: _jvp(x).sum()))(x))[0] == 3.0
    assert value(propagate_scales(_vjp)(x, x))[0] == 2.0**122
    one, other = propagate_scales(jax.grad(lambda x, y: _vjp(x, y).sum(), (0, 1)))(x, x)
    assert value(one)[0] == 7.0 and value(other)[0] == 2.0**61


def test_jvp_and_second_derivatives_inside():
    f = propagate_scales(lambda x, t: jax.jvp(jax.grad(lambda x: jnp.sum(x**3)), (x,), (t,))[1])
    np.testing.assert_allclose(value(f(at([2.0, 3.0], 60), at([1.0, 1.0], -60))), [12.0, 18.0])


def test_float32_identity_of_a_network_step():
    """Value and gradients of a small network with every structure in it, in float32: as in plain jax."""

    def loss(params, x_NI, y_N):
        def block(x, w):
            h = jax.nn.relu(x @ w)
            return x + h * lax.rsqrt(jnp.mean(h * h, -1, keepdims=True) + 1e-6), None

        x_NI, _ = lax.scan(jax.checkpoint(block), x_NI, params["blocks"])
        logits = x_NI @ params["head"]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), y_N[:, None], 1).mean()

    rng = np.random.default_rng(0)
    params = {"blocks": rng.standard_normal((3, 8, 8)).astype(np.float32) / 3, "head": rng.standard_normal((8, 5)).astype(np.float32)}
    x, y = rng.standard_normal((16, 8)).astype(np.float32), rng.integers(0, 5, 16).astype(np.int32)
    want, gradients = jax.jit(jax.value_and_grad(loss))(params, x, y)
    held = {"blocks": at(params["blocks"] * 2.0**20, -20), "head": at(params["head"] * 2.0**-30, 30)}
    got, found = propagate_scales(jax.value_and_grad(loss), on_fallback="raise")(held, x, y)
    close(got, want, 1e-6)
    for name in params:
        difference = value(found[name]) - np.asarray(gradients[name], np.float64)
        assert np.linalg.norm(difference) <= 1e-6 * np.linalg.norm(gradients[name])
