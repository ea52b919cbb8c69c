"""Programs whose exponents say more than their data: deep nets, saturated derivatives, zeros and masks, at unit scale and far from it."""
from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tests.trainer.propagation.harness import value
from trainer import ScaledArray, propagate_scales, scaled, unscaled
from trainer.propagation.array import brought_near

X = np.float32([0.5, -1.0, 2.0])


def at(data, exponent):
    return ScaledArray(jnp.asarray(data, jnp.float32), jnp.int32(exponent))


def test_gradients_of_a_deep_net_with_gelu():
    """20 pre-norm layers; without measuring, the term with x^3 in the derivative takes all gradients below float32's range."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4, 64)).astype(np.float32)
    weights = (rng.standard_normal((20, 64, 64)) * (2 / 64) ** 0.5).astype(np.float32)

    def layer(h, w):
        normed = h * lax.rsqrt(jnp.mean(h * h, -1, keepdims=True) + 1e-6)
        return h + 0.1 * jax.nn.gelu(normed @ w), None

    gradients = jax.grad(lambda weights, x: jnp.mean(lax.scan(layer, x, weights)[0] ** 2))
    want = gradients(weights, x)
    for data_dtype, near in ((None, 1e-6), ("float16", 0.01)):
        got = unscaled(propagate_scales(gradients, data_dtype=data_dtype)(at(weights, 0), at(x, 0)))
        assert np.linalg.norm(got - want) <= near * np.linalg.norm(want)


@pytest.mark.parametrize("data_dtype, exponent", [(None, 50), ("float16", 10)])
def test_a_saturated_derivative(data_dtype, exponent):
    got = propagate_scales(jax.grad(lambda x: jax.nn.gelu(x).sum()), data_dtype=data_dtype)(at(X, exponent))
    np.testing.assert_array_equal(unscaled(got), [1.0, 0.0, 1.0])


@pytest.mark.parametrize("data_dtype", [None, "float16"])
@pytest.mark.parametrize("masked", [-1e9, -1e30, float(np.finfo(np.float32).min), -np.inf])
@pytest.mark.parametrize("logits", [np.zeros(3, np.float32), X * 2.0**-20, X])
def test_masks_mask_whatever_the_scale(logits, masked, data_dtype):
    def program(x):
        return jax.nn.softmax(jnp.where(np.array([True, True, False]), x, masked))

    got = unscaled(propagate_scales(program, data_dtype=data_dtype)(scaled(logits)))
    np.testing.assert_allclose(got, program(logits), atol=1e-3)
    assert got[2] == 0


def test_scaled_arrays_far_from_unit_scale_are_held_narrowly():
    for exponent in (-60, -30, 30, 60):
        got = propagate_scales(lambda x: x * 1.0, data_dtype="float16")(at(X * np.float32(2.0**-exponent), exponent))
        assert got.data.dtype == jnp.float16
        np.testing.assert_array_equal(unscaled(got), X)


QUOTIENTS = {
    "where": (lambda z, x: jnp.where(z == 0, x, x / z), X),
    "minimum": (lambda z, x: jnp.minimum(1 / z, 5.0) + 0 * x, [5.0, 5.0, 5.0]),
    "concatenate": (lambda z, x: jnp.concatenate([1 / z, x])[3:], X),
    "scatter": (lambda z, x: (1 / z).at[:3].set(x), X),
    "where, of a root": (lambda z, x: jnp.where(z > 0, lax.rsqrt(z), x), X),
    "max": (lambda z, x: jnp.maximum(x, -1 / z), X),
    "where, of a cond": (lambda z, x: jnp.where(z == 0, x, lax.cond(x[0] > 0, lambda: x / z, lambda: x)), X),
    "where, of a scan": (lambda z, x: jnp.where(z == 0, x, lax.scan(lambda c, _: (c, x / z), 0.0, None, 2)[1][1]), X),
    "where, of a root of it": (lambda z, x: jnp.where(z > 0, jnp.sqrt(1 / z), x), X),
}


@pytest.mark.parametrize("name", QUOTIENTS)
def test_what_was_divided_by_zeros_leaves_others_alone(name):
    program, want = QUOTIENTS[name]
    for zeros in (scaled(np.zeros(3, np.float32)), at(np.zeros(3), 60), at(np.zeros(3), -60)):
        np.testing.assert_array_equal(unscaled(propagate_scales(program)(zeros, at(X, 0))), want)


@pytest.mark.parametrize("exponent", [0, 30, 60, 100])
@pytest.mark.parametrize("centred", [False, True])
def test_a_row_of_zeros_keeps_the_epsilon_of_its_norm(centred, exponent):
    def norm(x_ND):
        x_ND = x_ND - jnp.mean(x_ND, -1, keepdims=True) if centred else x_ND
        return x_ND * lax.rsqrt(jnp.mean(x_ND * x_ND, -1, keepdims=True) + 1e-6)

    rows = np.float32([[2, 2, 2] if centred else [0, 0, 0], [1, 2, -3]])
    got = unscaled(propagate_scales(norm)(at(rows, exponent)))
    np.testing.assert_array_equal(got[0], [0, 0, 0])
    np.testing.assert_allclose(got[1], rows[1] / np.sqrt(14 / 3), rtol=1e-6)


TWO = np.array([True, False])
FAR_APART = {  # each gives what stands at a tiny scale, beside something at a huge one: right, or too small for float32
    "concatenate": lambda a, b: jnp.concatenate([a, b])[2:],
    "where": lambda a, b: jnp.where(TWO, a, b)[1:],
    "max": lambda a, b: jnp.maximum(-a, b),
    "min": lambda a, b: jnp.minimum(a, b),
    "pad": lambda a, b: jnp.pad(b, 1, constant_values=a[0])[1:3],
    "scatter": lambda a, b: a.at[1].set(b[1])[1:],
    "dynamic_update_slice": lambda a, b: lax.dynamic_update_slice(a, b, (0,)),
    "where, of zeros": lambda a, b: jnp.where(TWO, a - a, b)[1:],
}


@pytest.mark.parametrize("gap", [0, 100, 127, 160, 250, 400])
@pytest.mark.parametrize("name", FAR_APART)
def test_nothing_is_made_up_of_numbers_far_apart(name, gap):
    got = value(propagate_scales(FAR_APART[name])(at([1.5, 1.5], gap // 2), at([1.25, 1.25], -(gap - gap // 2))))
    want = np.ldexp(1.25, -(gap - gap // 2))
    assert np.all((got == want) | (got == 0)), got
    assert gap > 120 or np.all(got == want)


def test_powers_and_many_factors_stay_in_range():
    for data, exponent in ((1.0, 0), (4.0, -2), (8.0, -3), (0.125, 3), (2.0**60, -60)):
        assert unscaled(propagate_scales(lambda x: x**50)(at([data], exponent))) == 1
    rng = np.random.default_rng(0)
    weights, x = (rng.standard_normal((48, 64, 64)) / 8).astype(np.float32), rng.standard_normal((2, 64)).astype(np.float32)
    deep = propagate_scales(lambda weights, x: lax.scan(lambda h, w: (h @ w, None), x, weights)[0])
    want = functools.reduce(np.matmul, weights.astype(np.float64), x.astype(np.float64))
    for k in (0, 1, 3, -3, 60):
        np.testing.assert_allclose(value(deep(at(weights * np.float32(2.0**-k), k), at(x, 0))), want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_empty_arrays_have_no_scale():
    for empty in (at(np.zeros((0,)), 0), at(np.zeros((0,)), 90), scaled(np.zeros((0,), np.float32))):
        got = propagate_scales(lambda e, x: jnp.concatenate([e, x]))(empty, at([1.0, 2.0], 0))
        np.testing.assert_array_equal(unscaled(got), [1.0, 2.0])
    assert propagate_scales(lambda x: x * 2.0)(at(np.zeros((3, 0)), [1, 2, 3])).exponent.shape == (3,)


def test_the_largest_of_many_scales():
    """More than the lanes that long chains of maxima are computed in."""
    arrays = [at([1.5, 1.5], 100 if number == 25 else number - 10) for number in range(30)]

    def program(*xs):
        head = functools.reduce(jnp.add, xs[:9])
        return jnp.concatenate([head, *xs[9:]])

    want = np.concatenate([np.sum([value(x) for x in arrays[:9]], 0), *(value(x) for x in arrays[9:])])
    np.testing.assert_array_equal(value(propagate_scales(program)(*arrays)), want)


@pytest.mark.parametrize("activation", [jax.nn.relu, jax.nn.silu, jax.nn.gelu])
def test_training_in_a_loop_inside_the_transform(activation):
    """SGD under scan: a gradient's exponent says more than its data, and parameters that took it on would say three times as much at the
    next step; within eight all losses were zero."""
    rng = np.random.default_rng(0)
    shapes = {"a": (16, 32), "b": (32, 16), "c": (16, 32), "d": (32, 16), "out": (16, 4)}
    params = {name: (rng.standard_normal(shape) / shape[0] ** 0.5).astype(np.float32) for name, shape in shapes.items()}
    x, y = rng.standard_normal((32, 16)).astype(np.float32), rng.standard_normal((32, 4)).astype(np.float32)

    def loss(params, x, y):
        x = x + activation(x @ params["a"]) @ params["b"]
        x = x + activation(x @ params["c"]) @ params["d"]
        return jnp.mean((x @ params["out"] - y) ** 2)

    def train(params, x, y):
        def step(params, _):
            value, gradients = jax.value_and_grad(loss)(params, x, y)
            return jax.tree.map(lambda p, g: p - 0.02 * g, params, gradients), value

        return lax.scan(step, params, None, length=60)

    ended, losses = propagate_scales(train)(scaled(params), scaled(x), scaled(y))
    want, want_losses = jax.jit(train)(params, x, y)
    np.testing.assert_allclose(unscaled(losses), want_losses, rtol=1e-5)
    for name in params:
        np.testing.assert_allclose(unscaled(ended[name]), want[name], rtol=0, atol=1e-5)
        assert abs(int(ended[name].exponent)) < 16


def test_the_ends_of_the_range():
    largest = np.float32(np.finfo(np.float32).max)
    np.testing.assert_array_equal(unscaled(scaled(np.float32([largest, 8.0]))), [largest, 8.0])
    np.testing.assert_array_equal(unscaled(propagate_scales(lambda x: x[1:] * 1.0)(at([-largest, 1.0, 2.0], 0))), [1.0, 2.0])
    tail = propagate_scales(lambda x: (jnp.log(x + 1e-30), jnp.log(jnp.maximum(x, 1e-30))))(at([1.0, 0.0], 30))
    assert all(-70 < float(unscaled(one)[1]) < -60 for one in tail)  # an epsilon may grow, and does not become zero


@pytest.mark.parametrize("slack", [0, 8])
def test_brought_near_keeps_values(slack):
    """The whole range of float32, zeros, and what is not finite, each row by itself."""
    exponents = np.arange(-126, 128)
    rows = np.ldexp(np.float32([1.5, 1.0]), exponents[:, None]).astype(np.float32)
    rows = np.concatenate([rows, np.float32([[0, 0], [np.inf, 1], [np.nan, 1]])])
    data, k = jax.jit(lambda x: brought_near(x, 1, slack))(rows)
    np.testing.assert_array_equal(np.ldexp(np.float64(data), k[:, None]), np.float64(rows))
    np.testing.assert_array_equal(np.asarray(k)[-3:], 0)
    largest = np.max(np.abs(np.asarray(data)[:-3]), axis=1)
    assert np.all((largest >= 2.0**-slack) & (largest < 2.0 ** (slack + 2)))


def test_infinities_compare_and_nan_stays():
    inf = np.full(3, np.inf, np.float32)
    less, same = propagate_scales(lambda x, b: (x < b, x == b))(at(X, 0), at(inf, 0))
    assert np.all(less) and not np.any(same)
    assert np.all(propagate_scales(lambda x, b: x < b)(at(X, 0), at(np.inf, 0)))
    assert np.isnan(unscaled(propagate_scales(lambda x: x * 0.0)(at([np.inf, 1.0], 0)))[0])
    assert np.isnan(unscaled(propagate_scales(lambda x: 0.0 / x)(at([0.0, 1.0], 0)))[0])


def test_one_large_value_among_zeros_has_a_square_in_float16():
    x = np.zeros((1000, 1000), np.float32)
    x[3, 4] = 1
    for program, want in ((lambda x: jnp.sum(x * x), 1.0), (lambda x: jnp.mean(x**2), 1e-6)):
        np.testing.assert_allclose(unscaled(propagate_scales(program, data_dtype="float16")(x)), want, rtol=1e-3)
    assert np.all(np.isfinite(np.float32(scaled(x, dtype=jnp.float8_e4m3fn).data)))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_gradient_of_a_bound_that_is_a_scalar(dtype):
    """It asks where the result is the bound: rounded like data, or nowhere."""
    gradient = jax.grad(lambda bound, x: jnp.minimum(x, bound).sum())
    assert unscaled(propagate_scales(gradient, data_dtype=dtype)(1.1, np.float32([0.5, 2.0, 3.0]))) == 2


def test_zeros_at_a_large_scale_leave_sums_alone():
    assert unscaled(propagate_scales(lambda a: jnp.mean((a - 1) ** 2))(at([0.0, 0.0], 120))) == 1
    np.testing.assert_array_equal(unscaled(propagate_scales(lambda a: a + 1.0)(at([0.0, 0.0], 60))), [1.0, 1.0])
