"""Sums, products, maxima over dimensions, and products of matrices."""
from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tests.trainer.propagation.harness import MODES, Case, check, check_moved, check_plain_dies, within

APART = ((0, 0), (60, 60), (-60, -60), (60, -60), (-60, 60), (3, -5))


def _logcumsumexp(a):
    return np.logaddexp.accumulate(a, axis=1)


def _dot(fun, oracle, shapes, rows=False):
    return Case("dot_general", fun, oracle, shapes, exponents=APART, dies=True, rows=rows)


def _einsum(words, shapes, rows=False):
    return _dot(lambda *xs: jnp.einsum(words, *xs), lambda *xs: np.einsum(words, *xs), shapes, rows)


def _max_pool(a, start, function):
    return lax.reduce_window(a, np.asarray(start, a.dtype), function, (1, 2, 2), (1, 1, 1), "VALID")


def _windows(function):
    return lambda a: function(np.lib.stride_tricks.sliding_window_view(a, (2, 2), axis=(1, 2)), axis=(3, 4))


def _max_pool_gradient(a, b):
    out = np.zeros_like(a)
    for i, j, k in np.ndindex(b.shape):
        window = a[i, j : j + 2, k : k + 2]
        m, n = np.unravel_index(np.argmax(window), window.shape)
        out[i, j + m, k + n] += b[i, j, k]
    return out


def _convolution(a_NHWC, b_hwCD):
    return lax.conv_general_dilated(a_NHWC, b_hwCD, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _convolution_oracle(a_NHWC, b_hwCD):
    windows = np.lib.stride_tricks.sliding_window_view(a_NHWC, b_hwCD.shape[:2], axis=(1, 2))
    return np.einsum("nijchw,hwcd->nijd", windows, b_hwCD)


TABLE = {
    "sum": Case("reduce_sum", lambda a: a.sum(), lambda a: a.sum(), dies=True, rows=False),
    "sum over some": Case("reduce_sum", lambda a: a.sum((1, 2)), lambda a: a.sum((1, 2)), dies=True),
    "sum over the first": Case("reduce_sum", lambda a: a.sum(0), lambda a: a.sum(0), dies=True, rows=False),
    "mean": Case("reduce_sum", lambda a: a.mean(1), lambda a: a.mean(1), dies=True),
    "sum of many": Case("reduce_sum", lambda a: jnp.broadcast_to(a[..., None], (*a.shape, 60)).sum((1, 2, 3)), lambda a: 60 * a.sum((1, 2)), dies=True),
    "cumsum": Case("cumsum", lambda a: jnp.cumsum(a, 1), lambda a: np.cumsum(a, 1), dies=True),
    "cumsum from the end": Case("cumsum", lambda a: lax.cumsum(a, 0, reverse=True), lambda a: np.cumsum(a[::-1], 0)[::-1], dies=True, rows=False),
    "max": Case("reduce_max", lambda a: a.max(1), lambda a: a.max(1), dies=True),
    "min of all": Case("reduce_min", lambda a: a.min(), lambda a: a.min(), dies=True, rows=False),
    "cummax": Case("cummax", lambda a: lax.cummax(a, 1), lambda a: np.maximum.accumulate(a, 1), dies=True),
    "cummin": Case("cummin", lambda a: lax.cummin(a, 0), lambda a: np.minimum.accumulate(a, 0), dies=True, rows=False),
    "prod": Case("reduce_prod", lambda a: a.prod(2), lambda a: a.prod(2), "AB2", dies=True),
    "prod of all": Case("reduce_prod", lambda a: a.prod(), lambda a: a.prod(), "22", within(0.5, 2.0), dies=True, rows=False),
    "cumlogsumexp": Case("cumlogsumexp", lambda a: lax.cumlogsumexp(a, 1), _logcumsumexp, exponents=((0,), (60,), (-60,), (5,)), rows=None),
    "matmul": _dot(lambda a, b: a @ b, np.matmul, "AB BC", rows=None),
    "matmul of a vector": _dot(lambda a, b: a @ b, np.matmul, "AB B", rows=None),
    "inner": _dot(lambda a, b: a @ b, np.matmul, "B B"),
    "outer": _einsum("a,b->ab", "A B"),
    "batched": _dot(lambda a, b: a @ b, np.matmul, "ABC ACD", rows=True),
    "batched twice": _einsum("abqd,abkd->abqk", "ABCD ABED", rows=True),
    "batch in the middle": _einsum("bqhd,bkhd->bhqk", "ABCD AECD", rows=False),
    "two contracted": _einsum("abc,bcd->ad", "ABC BCD"),
    "contracted first": _einsum("ab,ac->bc", "AB AC"),
    "transposed batch": _einsum("abc,bad->cd", "ABC BAD"),
    "three factors": Case("dot_general", lambda a, b, c: jnp.einsum("ab,bc,cd->ad", a, b, c), lambda a, b, c: np.einsum("ab,bc,cd->ad", a, b, c),
                          "AB BC CD", exponents=((0, 0, 0), (60, 60, 60), (-60, -60, -60), (60, -60, 3)), dies=True, rows=None),
    "with a known matrix": Case("dot_general", lambda a: a @ jnp.full((a.shape[1], 3), 0.25, a.dtype), lambda a: a @ np.full((a.shape[1], 3), 0.25),
                                "AB", dies=True, rows=False),
    "average pool": Case("reduce_window_sum", lambda a: lax.reduce_window(a, np.zeros((), a.dtype), lax.add, (1, 2, 2), (1, 1, 1), "VALID"), _windows(np.sum), "344", dies=True),
    "max pool": Case("reduce_window_max", lambda a: _max_pool(a, -jnp.inf, lax.max), _windows(np.max), "344", dies=True),
    "min pool": Case("reduce_window_min", lambda a: _max_pool(a, jnp.inf, lax.min), _windows(np.min), "344", dies=True),
    "gradient of max pool": Case("select_and_scatter_add", lambda a, b: jax.vjp(lambda x: _max_pool(x, -jnp.inf, lax.max), a)[1](b)[0], _max_pool_gradient,
                                 "344 333", exponents=APART, dies=True),
    "convolution": Case("conv_general_dilated", _convolution, _convolution_oracle, "A55B 33BC", exponents=APART, dies=True, rows=False),
    "gradient of a convolution": Case("conv_general_dilated", lambda a, b: jax.grad(lambda w: jnp.vdot(_convolution(a, w), jnp.ones((1, 3, 3, 2), a.dtype)))(b),
                                      lambda a, b: np.broadcast_to(np.lib.stride_tricks.sliding_window_view(a, (3, 3), axis=(1, 2)).sum((0, 4, 5))[..., None], b.shape),
                                      "1554 3342", exponents=APART, dies=True, rows=None),
    "in float32": _dot(lambda a, b: lax.dot(a, b, preferred_element_type=jnp.float32), np.matmul, "AB BC", rows=None),
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", TABLE)
def test_values(name, mode):
    check(TABLE, name, mode)


@pytest.mark.parametrize("name", TABLE)
def test_a_power_of_two_moved_changes_no_bit(name):
    check_moved(TABLE, name)


@pytest.mark.parametrize("mode", ("float32", "held in float16"))
@pytest.mark.parametrize("name", TABLE)
def test_an_exponent_for_each_leading_index(name, mode):
    check(TABLE, name, mode, leading=True)


@pytest.mark.parametrize("name", [name for name, case in TABLE.items() if case.dies])
def test_plain_float16_dies(name):
    check_plain_dies(TABLE, name)
