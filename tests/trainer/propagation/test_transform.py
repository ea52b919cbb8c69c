"""`propagate_scales` as a transform: arguments, results, caching, other transforms around it and inside, what it refuses and reports."""
from __future__ import annotations

import ast
import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from tests.trainer.propagation.harness import value
from trainer import ScaledArray, propagate_scales, scaled, unscaled
from trainer.propagation import FallbackError, calibrate

PACKAGE = pathlib.Path(__file__).parents[3] / "trainer" / "propagation"


def at(data, exponent) -> ScaledArray:
    return ScaledArray(jnp.asarray(data, jnp.float32), jnp.asarray(exponent, jnp.int32))


# --- arguments and results --------------------------------------------------------------------------------------------


def test_pytrees_keywords_static_arguments_and_integers():
    @functools.partial(propagate_scales, static_argnames=("power",))
    def f(tree, index, *, power, extra=None):
        return {"x": tree["a"] ** power + extra["b"], "row": tree["a"][index], "index": index + 1, "list": [tree["c"]]}

    tree = {"a": at([1.0, 2.0, 3.0], 100), "c": jnp.arange(3)}
    out = f(tree, 1, power=2, extra={"b": at(1.0, 200)})
    np.testing.assert_array_equal(value(out["x"]), np.array([2.0, 5.0, 10.0]) * 2.0**200)
    assert value(out["row"]) == 2.0**101
    assert int(out["index"]) == 2 and out["index"].dtype == jnp.int32
    np.testing.assert_array_equal(out["list"][0], np.arange(3))
    assert value(f(tree, 1, power=3, extra={"b": at(1.0, 300)})["x"])[0] == 2.0**301


def test_outputs():
    x, y = at([1.0], 3), jnp.ones(1)
    f = lambda x, y: (x * 2.0, y * 2.0, jnp.arange(2))  # noqa: E731
    kinds = {
        how: [isinstance(leaf, ScaledArray) for leaf in propagate_scales(f, outputs=how)(x, y)] for how in ("auto", "scaled", "plain")
    }
    assert kinds == {"auto": [True, False, False], "scaled": [True, True, False], "plain": [False, False, False]}
    assert all(not isinstance(leaf, ScaledArray) for leaf in propagate_scales(f)(y, y))
    for how in kinds:
        assert [value(leaf)[0] for leaf in propagate_scales(f, outputs=how)(x, y)][:2] == [16.0, 2.0]


@pytest.mark.parametrize("key, wrong", [("outputs", "all"), ("on_fallback", "stop"), ("rescale", "always"), ("rescale", 3), ("data_dtype", "int8"),
                                         ("data_dtype", "float13"), ("static_argnames", 3)])
def test_a_wrong_option_is_named_with_what_is_accepted(key, wrong):
    with pytest.raises(ValueError, match=f"{key}={wrong!r}; accepted: "):
        propagate_scales(lambda x: x, **{key: wrong})


def test_an_exponent_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"exponent of shape \(2,\) with data of shape \(3, 2\)"):
        propagate_scales(lambda x: x)(at(np.ones((3, 2)), [1, 2]))
    with pytest.raises(ValueError, match="exponent of dtype float32; accepted: int32"):
        propagate_scales(lambda x: x)(ScaledArray(jnp.ones(3), 0.5))


def test_static_arguments_by_name_and_by_position():
    def program(x, times, y):
        return x * len(range(times)) + y  # times must be a Python number

    x = at([1.0, 2.0], 0)
    run = propagate_scales(program, static_argnames="times")
    for got in run(x, 3, x), run(x, times=3, y=x):
        np.testing.assert_array_equal(value(got), [4.0, 8.0])
    assert run.report(x, 3, x).equations_before == run.report(x, times=3, y=x).equations_before
    assert calibrate(program, x, 3, x, static_argnames=("times",)).places == ()
    auto = propagate_scales(program, static_argnames="times", rescale="auto")
    np.testing.assert_array_equal(value(auto(x, 3, x)), [4.0, 8.0])


def test_static_arguments_that_cannot_be_named():
    def program(x, *rest, n):
        return sum(rest, x) * n

    x = at([1.0], 0)
    run = propagate_scales(program, static_argnames="n")
    np.testing.assert_array_equal(value(run(x, x, x, n=2)), [6.0])
    with pytest.raises(TypeError, match="multiple values for argument 'n'"):
        propagate_scales(lambda x, n: x * n, static_argnames="n")(x, 2, n=3)
    with pytest.raises(ValueError, match="n=3 is static and given by position.*; accepted: n by name"):
        propagate_scales(lambda n, *rest: rest[0] * n, static_argnames="n")(3, x)


def test_near_unit_scale_by_default_or_by_promise():
    x = at(np.float32([2.0**-60, 3 * 2.0**-60]), 60)
    np.testing.assert_array_equal(value(propagate_scales(lambda x: x * x * x * x * x)(x)), [1.0, 243.0])
    as_it_is = propagate_scales(lambda x: x * 1.0, unit_inputs=True)(x)
    np.testing.assert_array_equal(as_it_is.data, x.data)
    assert int(as_it_is.exponent) == 60


def test_data_dtype_holds_all_arrays_and_brings_floats_to_unit_scale():
    f = propagate_scales(lambda x, y: (x * y, x.sum()), data_dtype="float16")
    product, total = f(jnp.float32([1e-20, 2e-20]), jnp.float32([1e-12, 1e-12]))
    assert product.data.dtype == jnp.float16
    np.testing.assert_allclose(value(product), [1e-32, 2e-32], rtol=2e-3)
    assert total.data.dtype == jnp.float32  # scalars have room
    np.testing.assert_allclose(value(total), 3e-20, rtol=1e-3)


def test_traced_once():
    count = 0

    @propagate_scales
    def f(x, y):
        nonlocal count
        count += 1
        return x @ y

    for e in (0, 3, -100):
        f(at(np.ones((2, 3)), e), y=jnp.ones((3, 2)))
    assert count == 1
    f(at(np.ones((4, 3)), 0), y=jnp.ones((3, 2)))
    assert count == 2


def test_under_jit_and_inside_another():
    inner = propagate_scales(lambda x: x * x)
    out = jax.jit(lambda x: inner(inner(x)))(at([3.0], 60))
    assert value(out)[0] == 81 * 2.0**240


def test_closures_over_tracers_and_arrays():
    matrix = jnp.full((3, 3), 0.5)

    @jax.jit
    def outer(x, data):
        hidden = data * 2.0
        return propagate_scales(lambda x: x @ matrix + hidden)(x)

    np.testing.assert_array_equal(value(outer(at(np.ones((2, 3)), 3), jnp.ones((2, 3)))), np.full((2, 3), 14.0))


def test_float64_programs():
    with jax.enable_x64(True):
        x = np.random.default_rng(0).standard_normal((4, 4))
        out = propagate_scales(lambda x: jnp.exp(x) @ x.T + jnp.log(x * x))(ScaledArray(jnp.asarray(x * 2.0**-60), jnp.int32(60)))
        assert out.data.dtype == jnp.float64
        np.testing.assert_allclose(value(out), np.exp(x) @ x.T + np.log(x * x), rtol=1e-12, atol=1e-13)


# --- vmap -------------------------------------------------------------------------------------------------------------


def test_vmap_outside_gives_members_exponents():
    data, exponents = np.random.default_rng(0).standard_normal((3, 2, 4)).astype(np.float32), np.array([100, 0, -100])
    f = propagate_scales(lambda x: (x @ x.T, x.sum()))
    product, total = jax.vmap(f)(at(data, exponents))
    assert product.exponent.shape == total.exponent.shape == (3,)
    for m in range(3):
        x = value(at(data[m], exponents[m]))
        np.testing.assert_allclose(value(product)[m], x @ x.T, rtol=1e-5, atol=1e-6 * np.abs(x).max() ** 2)
        np.testing.assert_allclose(value(total)[m], x.sum(), rtol=1e-5)


def test_vmap_inside():
    data, exponents = np.random.default_rng(0).standard_normal((3, 2, 4)).astype(np.float32), np.array([60, 0, -60])
    weight = np.random.default_rng(1).standard_normal((4, 5)).astype(np.float32)
    f = propagate_scales(lambda x, w: jax.vmap(lambda x: jnp.tanh(x @ w).sum(1))(x))
    x = value(at(data, exponents))
    np.testing.assert_allclose(value(f(at(data, exponents), at(weight, 0))), np.tanh(x @ weight).sum(2), rtol=2e-6, atol=1e-6)


# --- what is refused, and what is counted -----------------------------------------------------------------------------


def test_the_gradient_of_the_result_is_refused():
    f = propagate_scales(lambda x: (x * x).sum(), outputs="plain")
    with pytest.raises(TypeError, match=re.escape("propagate_scales(jax.grad(f)), not jax.grad(propagate_scales(f))")):
        jax.grad(f)(jnp.ones(3))
    with pytest.raises(TypeError, match="differentiate first"):
        jax.grad(lambda d: f(ScaledArray(d, jnp.int32(3))))(jnp.ones(3))
    with pytest.raises(TypeError, match="differentiate first"):  # what is closed over is differentiated too
        jax.grad(lambda w: propagate_scales(lambda x: (x * w).sum(), outputs="plain")(at(np.ones(3), 0)))(jnp.ones(3))


def test_fallbacks_are_counted_or_refused_by_name_and_line():
    def program(x):
        def body(c, _):  # traced more than once, and met once
            return jax.lax.cumprod(c), None

        return jax.lax.igamma(x, x).sum() + jax.lax.scan(body, x, None, length=2)[0].sum()

    x = at([3.0, 1.0, 2.0], 1)
    report = propagate_scales(program).report(x)
    assert {name: count for (name, _), count in report.fallbacks.items()} == {"cumprod": 1, "igamma": 1}
    assert all("test_transform.py" in line for _, line in report.fallbacks)
    assert report.equations_after > report.equations_before > 3
    numbers = np.array([6.0, 2.0, 4.0])
    want = special.gammainc(numbers, numbers).sum() + (6 + 6 * 12 + 6 * 12 * 48)
    np.testing.assert_allclose(value(propagate_scales(program)(x)), want, rtol=1e-5)
    with pytest.raises(FallbackError, match=r"primitive 'igamma' at .*test_transform\.py:\d+"):
        propagate_scales(program, on_fallback="raise")(x)


def test_an_array_that_no_scale_has_reached_is_no_fallback():
    report = propagate_scales(lambda x, y: (x * 2.0, jax.lax.cumprod(y)), on_fallback="raise").report(at([1.0], 0), jnp.ones(3))
    assert not report.fallbacks


# --- scaled and unscaled ----------------------------------------------------------------------------------------------


def test_subnormals_through_scaled_and_unscaled():
    bits = np.random.default_rng(0).integers(1, 1 << 23, 200).astype(np.uint32)
    bits = np.concatenate([bits, bits | np.uint32(1 << 31), np.uint32([1, 2, (1 << 23) - 1, 1 << 23, 0x80000001])])
    for x in (bits.view(np.float32), bits[:200].view(np.float32)):
        there = jax.jit(scaled)(x)
        np.testing.assert_array_equal(value(there), x.astype(np.float64))
        assert np.abs(np.asarray(there.data)).max() >= 1
        np.testing.assert_array_equal(np.asarray(jax.jit(unscaled)(there)).view(np.uint32), x.view(np.uint32))


def test_zeros_give_way_to_any_scale():
    zeros = scaled(jnp.zeros(3))
    np.testing.assert_array_equal(unscaled(zeros), np.zeros(3))
    out = propagate_scales(lambda x, y: x + y)(zeros, at([1.0, 2.0, 3.0], -300))
    np.testing.assert_array_equal(value(out), np.array([1.0, 2.0, 3.0]) * 2.0**-300)


def test_scaled_takes_trees_with_everything_in_it():
    tree = {"w": jnp.full((2, 2), 2.0**70), "n": jnp.arange(3), "s": at([1.0], 3), "k": jax.random.key(0), "stack": jnp.float32([[1e-30] * 2, [1e30] * 2])}
    out = scaled(tree)
    assert out["n"] is tree["n"] and out["s"] is tree["s"] and out["k"] is tree["k"]
    assert int(out["w"].exponent) == 70 and float(out["w"].data[0, 0]) == 1.0
    stacked = scaled(tree["stack"], leading=1)
    assert stacked.exponent.shape == (2,) and np.all((np.abs(stacked.data) >= 1) & (np.abs(stacked.data) < 2))
    np.testing.assert_array_equal(unscaled(stacked), tree["stack"])


# --- what it needs ----------------------------------------------------------------------------------------------------


def test_the_package_is_generic_jax():
    """Every import in it, at any depth, is of the standard library, jax, numpy or itself; rich shows how far a calibration is."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, path
                found.add(node.module)
    outside = {name for name in found if name.split(".")[0] not in {"jax", "numpy", "rich", "__future__"} and not name.startswith("trainer.propagation")}
    standard = {"collections", "collections.abc", "contextlib", "dataclasses", "enum", "functools", "inspect", "itertools", "math", "typing"}
    assert outside <= standard, outside - standard
