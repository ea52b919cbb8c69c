"""Comparisons, maxima, clamps and masks."""
from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tests.trainer.propagation.harness import MODES, Case, check, check_moved, check_plain_dies



def few(rng, shape):
    """Numbers of which many are equal."""
    return rng.integers(-2, 3, shape).astype(np.float64)


def _compare(name, fun, oracle):
    return Case(name, fun, oracle, "ABC ABC", few)


def _top(a, k):
    order = np.argsort(-a, axis=-1, kind="stable")[..., :k]
    return [np.take_along_axis(a, order, -1), order]


def _mask(a, b):
    """A mask of the shape of a, the same in jax and numpy."""
    return np.arange(np.size(a)).reshape(np.shape(a)) % 3 == 0



TABLE = {
    "eq": _compare("eq", lambda a, b: a == b, np.equal),
    "ne": _compare("ne", lambda a, b: a != b, np.not_equal),
    "lt": _compare("lt", lambda a, b: a < b, np.less),
    "le": _compare("le", lambda a, b: a <= b, np.less_equal),
    "gt": _compare("gt", lambda a, b: a > b, np.greater),
    "ge": _compare("ge", lambda a, b: a >= b, np.greater_equal),
    "above zero": Case("gt", lambda a: a > 0, lambda a: a > 0),
    "above a number": Case("gt", lambda a: a > 0.25, lambda a: a > 0.25),
    "at least a number": Case("ge", lambda a, b: a >= b, np.greater_equal, "ABC -", few),
    "is_finite": Case("is_finite", lambda a: jnp.isfinite(a / (a - a.max())), lambda a: a != a.max(), rows=None),
    "sort": Case("sort", lambda a: jnp.sort(a, 1), lambda a: np.sort(a, 1), dies=True),
    "sort by the first": Case("sort", lambda a, b: lax.sort((a, b), dimension=1)[1], lambda a, b: np.take_along_axis(b, np.argsort(a, 1), 1), "ABC ABC", dies=True),
    "sort along the first": Case("sort", lambda a: jnp.sort(a, 0), lambda a: np.sort(a, 0), dies=True, rows=False),
    "argsort": Case("sort", lambda a: jnp.argsort(a, 1), lambda a: np.argsort(a, 1, kind="stable")),
    "top_k": Case("top_k", lambda a: lax.top_k(a, 2), lambda a: _top(a, 2), "AB4"),
    "argmax": Case("argmax", lambda a: jnp.argmax(a, axis=1), lambda a: np.argmax(a, axis=1)),
    "argmin of all": Case("argmin", lambda a: jnp.argmin(a), np.argmin),
    "max": Case("max", jnp.maximum, np.maximum, "ABC ABC", dies=True),
    "min": Case("min", jnp.minimum, np.minimum, "ABC ABC", dies=True),
    "relu": Case("max", lambda a: jnp.maximum(a, 0.0), lambda a: np.maximum(a, 0), dies=True),
    "max with a number": Case("max", lambda a: jnp.maximum(a, 0.3), lambda a: np.maximum(a, 0.3)),
    "max with a lower number": Case("max", lambda a: jnp.maximum(a, -0.3), lambda a: np.maximum(a, -0.3)),
    "min with a number": Case("min", lambda a: jnp.minimum(a, 0.3), lambda a: np.minimum(a, 0.3)),
    "min with a lower number": Case("min", lambda a: jnp.minimum(a, -0.3), lambda a: np.minimum(a, -0.3)),
    "max with minus infinity": Case("max", lambda a: jnp.maximum(a, -jnp.inf), lambda a: a, dies=True),
    "max with the lowest": Case("max", lambda a: jnp.maximum(a, float(jnp.finfo(a.dtype).min)), lambda a: a, exponents=((0,), (10,), (-60,))),
    "clamp": Case("clamp", lambda a: lax.clamp(a.dtype.type(-0.5), a, a.dtype.type(0.5)), lambda a: np.clip(a, -0.5, 0.5)),
    "clamp above": Case("clamp", lambda a: lax.clamp(a.dtype.type(0.125), a, a.dtype.type(0.75)), lambda a: np.clip(a, 0.125, 0.75)),
    "clamp between arrays": Case("clamp", lambda a, b: lax.clamp(-jnp.abs(b), a, jnp.abs(b)), lambda a, b: np.clip(a, -abs(b), abs(b)), "ABC ABC",
                                 exponents=((0, 0), (60, 60), (-60, -60), (3, -5), (60, 0), (-60, 0)), rows=None),
    "select": Case("select_n", lambda a, b: jnp.where(_mask(a, b), a, b), lambda a, b: np.where(_mask(a, b), a, b), "ABC ABC", dies=True),
    "select or zero": Case("select_n", lambda a: jnp.where(_mask(a, a), a, 0.0), lambda a: np.where(_mask(a, a), a, 0), dies=True),
    "select or one": Case("select_n", lambda a: jnp.where(_mask(a, a), a, 1.0), lambda a: np.where(_mask(a, a), a, 1)),
    "select or a scalar": Case("select_n", lambda a, b: jnp.where(_mask(a, a), a, b), lambda a, b: np.where(_mask(a, a), a, b), "ABC -", dies=True),
    "select or -1e30": Case("select_n", lambda a: jnp.maximum(jnp.where(_mask(a, a), a, jnp.asarray(-1e30 if a.dtype == jnp.float32 else -jnp.inf, a.dtype)), -jnp.abs(a)),
                            lambda a: np.where(_mask(a, a), a, -abs(a))),
    "select or -inf": Case("select_n", lambda a: jnp.maximum(jnp.where(_mask(a, a), a, -jnp.inf), -jnp.abs(a)), lambda a: np.where(_mask(a, a), a, -abs(a))),
    "select or finfo.min": Case("select_n", lambda a: jnp.maximum(jnp.where(_mask(a, a), a, jnp.finfo(a.dtype).min), -jnp.abs(a)),
                                lambda a: np.where(_mask(a, a), a, -abs(a)), exponents=((0,), (10,), (-60,))),
    "select of three": Case("select_n", lambda a, b, c: lax.select_n((jnp.arange(a.size) % 3).astype(jnp.int32).reshape(a.shape), a, b, c),
                            lambda a, b, c: np.choose((np.arange(a.size) % 3).reshape(a.shape), [a, b, c]), "ABC ABC ABC", dies=True),
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
