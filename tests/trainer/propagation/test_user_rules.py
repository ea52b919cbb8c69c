"""Rules of users: `scale_rule` for functions, `register_rule` for primitives."""
from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Primitive
from jax.interpreters import mlir

from tests.trainer.propagation.harness import value
from trainer import ScaledArray, propagate_scales, scale_rule
from trainer.propagation import register_rule


def at(data, exponent) -> ScaledArray:
    return ScaledArray(jnp.asarray(data, jnp.float32), jnp.asarray(exponent, jnp.int32))


@scale_rule
def plus_one(x, *, factor=1.0):
    """x + 1; its rule gives x * 10 instead, so that a test can see which one ran."""
    return x + 1.0


@plus_one.defrule
def _(x, *, factor=1.0):
    return ScaledArray(x.data * 10.0 * factor, x.exponent)


@scale_rule
def norm(tree, weights):
    return {"out": tree["x"] / jnp.sqrt(jnp.sum(tree["x"] ** 2)) * weights, "count": tree["n"] + 1}


@norm.defrule
def _(tree, weights):
    x = tree["x"].data
    data = x / jnp.sqrt(jnp.sum(x * x)) * weights.data
    return {"out": ScaledArray(data, weights.exponent), "count": tree["n"] + 1}


def test_the_rule_is_used_under_the_transform_alone():
    assert float(plus_one(jnp.ones(()))) == 2.0
    assert value(propagate_scales(lambda x: plus_one(x))(at([2.0], 3)))[0] == 160.0
    assert value(propagate_scales(lambda x: plus_one(x, factor=0.5))(at([2.0], 3)))[0] == 80.0
    assert float(jax.jit(plus_one)(jnp.ones(()))) == 2.0


def test_trees_and_integers():
    x, w = np.float32([3.0, 4.0]), np.float32([1.0, 2.0])
    out = propagate_scales(lambda x, n, w: norm({"x": x, "n": n}, w))(at(x, 100), 4, at(w, 7))
    np.testing.assert_allclose(value(out["out"]), np.array([0.6, 1.6]) * 128, rtol=1e-6)
    assert int(out["count"]) == 5
    np.testing.assert_allclose(norm({"x": x, "n": 1}, w)["out"], [0.6, 1.6], rtol=1e-6)


def test_under_vmap():
    x = at([[1.0, 2.0], [3.0, 4.0]], [1, 2])
    f = lambda x: plus_one(x)  # noqa: E731
    want = value(x) * 10
    np.testing.assert_array_equal(value(propagate_scales(jax.vmap(f))(x)), want)
    np.testing.assert_array_equal(value(jax.vmap(propagate_scales(f))(x)), want)
    np.testing.assert_array_equal(value(propagate_scales(jax.vmap(jax.vmap(f)))(x)), want)
    np.testing.assert_array_equal(jax.vmap(f)(x.data), x.data + 1)
    np.testing.assert_array_equal(value(propagate_scales(jax.vmap(f, in_axes=1, out_axes=1))(x)), want)


def test_under_grad_the_value_keeps_the_rule():
    f = lambda x: (plus_one(x) * plus_one(x)).sum()  # noqa: E731
    out, gradient = propagate_scales(jax.value_and_grad(f))(at([2.0], 1))
    assert value(out) == 1600.0
    assert value(gradient)[0] == 2 * 40.0  # the derivative of the function, at the value by the rule
    np.testing.assert_array_equal(jax.grad(f)(jnp.float32([3.0])), [8.0])


@pytest.mark.parametrize("wrap", (jax.checkpoint, jax.jit), ids=("remat", "jit"))
def test_in_structures(wrap):
    f = wrap(lambda x: plus_one(x))
    scanned = lambda x: jax.lax.scan(lambda c, y: (c, f(y)), 0.0, x)[1]  # noqa: E731
    np.testing.assert_array_equal(value(propagate_scales(scanned)(at([1.0, 2.0], [1, 2]))), [20.0, 80.0])
    assert value(propagate_scales(jax.value_and_grad(lambda x: f(x).sum()))(at([1.0], 0))[0]) == 10.0


def test_a_custom_vjp_of_two_rules_has_both():
    @scale_rule
    def back(g):
        return g

    back.defrule(lambda g: ScaledArray(g.data * 100.0, g.exponent))
    f = jax.custom_vjp(lambda x: plus_one(x))
    f.defvjp(lambda x: (plus_one(x), None), lambda _, g: (back(g),))
    out, gradient = propagate_scales(jax.value_and_grad(lambda x, y: (f(x) * y).sum()))(at([2.0], 0), at([3.0], 0))
    assert value(out) == 60.0 and value(gradient)[0] == 300.0


def test_mistakes_are_named():
    @scale_rule
    def nothing(x):
        return x

    with pytest.raises(TypeError, match="nothing has no rule"):
        nothing(jnp.ones(2))

    @scale_rule
    def short(x):
        return x

    short.defrule(lambda x: ScaledArray(x.data[:1], x.exponent))
    with pytest.raises(ValueError, match=r"\(1,\) by the rule and \(2,\) by the function"):
        propagate_scales(lambda x: short(x))(at([1.0, 2.0], 0))
    short.defrule(lambda x: (x, x))
    with pytest.raises(ValueError, match="scale rule of short: it gave 2 results; accepted: 1"):
        propagate_scales(lambda x: short(x))(at([1.0, 2.0], 0))


def test_register_rule():
    twice = Primitive("twice_of_this_test")
    twice.def_impl(lambda x, *, times: x * times)
    twice.def_abstract_eval(lambda x, *, times: x)
    mlir.register_lowering(twice, mlir.lower_fun(lambda x, *, times: x * jnp.asarray(times, x.dtype), multiple_results=False))
    f = lambda x: twice.bind(x, times=2)  # noqa: E731
    assert value(propagate_scales(f)(at([3.0], 60)))[0] == 6 * 2.0**60  # fallen back
    assert propagate_scales(f).report(at([3.0], 60)).fallbacks

    @register_rule(twice)
    def _(x, *, times):
        return ScaledArray(x.data, x.exponent + times - 1)

    again = propagate_scales(f, on_fallback="raise")
    assert value(again(at([3.0], 200)))[0] == 6 * 2.0**200
    assert float(propagate_scales(f)(jnp.float32([3.0]))[0]) == 6.0
