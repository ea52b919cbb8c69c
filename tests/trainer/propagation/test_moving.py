"""Shapes, slices, gathers and scatters."""
from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tests.trainer.propagation.harness import MODES, Case, check, check_moved, check_plain_dies

ROWS = np.array([1, 0, 1, 1], np.int32)


def _scattered(ufunc):
    def scatter(a, b):
        a = a.copy()
        ufunc.at(a, ROWS[: len(b)], b)
        return a

    return scatter


def _set(a, b):
    a = a.copy()
    a[ROWS[:2]] = b[:2]
    return a


def _update(a, b, start):
    a = a.copy()
    a[tuple(slice(s, s + n) for s, n in zip(start, b.shape))] = b
    return a


def _padded(a, low, high, number=0.0):
    return np.pad(a, [(0, 0), (low, high), (0, 0)], constant_values=number)


def _interior(a):
    wide = np.zeros((a.shape[0], 2 * a.shape[1] - 1, a.shape[2]))
    wide[:, ::2] = a
    return wide


def _move(name, fun, oracle, shapes="ABC", rows=True):
    return Case(name, fun, oracle, shapes, dies=True, rows=rows)


TABLE = {
    "reshape": _move("reshape", lambda a: a.reshape(a.shape[0], -1), lambda a: a.reshape(a.shape[0], -1)),
    "reshape all": _move("reshape", lambda a: a.reshape(-1), lambda a: a.reshape(-1), rows=False),
    "reshape apart": _move("reshape", lambda a: a.reshape(a.shape[0], 2, -1), lambda a: a.reshape(a.shape[0], 2, -1), "A8"),
    "new first dimension": _move("reshape", lambda a: lax.reshape(a, (1, *a.shape)), lambda a: a[None]),
    "squeeze": _move("squeeze", lambda a: a.squeeze(1), lambda a: a.squeeze(1), "A1C"),
    "squeeze the first": _move("squeeze", lambda a: a.squeeze(0), lambda a: a.squeeze(0), "1BC"),
    "expand": _move("broadcast_in_dim", lambda a: jnp.expand_dims(a, (0, 2)), lambda a: np.expand_dims(a, (0, 2)), rows=False),
    "broadcast": _move("broadcast_in_dim", lambda a: jnp.broadcast_to(a, (3, *a.shape)), lambda a: np.broadcast_to(a, (3, *a.shape)), rows=False),
    "broadcast last": _move("broadcast_in_dim", lambda a: lax.broadcast_in_dim(a, (*a.shape, 2), (0, 1)), lambda a: np.stack([a, a], -1), "AB"),
    "broadcast one": _move("broadcast_in_dim", lambda a: lax.broadcast_in_dim(a, (4, *a.shape[1:]), (0, 1)), lambda a: np.repeat(a, 4, 0), "1B"),
    "transpose": _move("transpose", lambda a: a.transpose(0, 2, 1), lambda a: a.transpose(0, 2, 1)),
    "transpose all": _move("transpose", lambda a: a.T, lambda a: a.T, rows=False),
    "rev": _move("rev", lambda a: a[::-1, :, ::-1], lambda a: a[::-1, :, ::-1]),
    "slice": _move("slice", lambda a: lax.slice(a, (1, 0, 1), a.shape), lambda a: a[1:, :, 1:]),
    "slice with strides": _move("slice", lambda a: lax.slice(a, (0, 1, 0), a.shape, (2, 1, 2)), lambda a: a[::2, 1:, ::2]),
    "split": _move("split", lambda a: lax.split(a, (1, a.shape[1] - 1), 1), lambda a: [a[:, :1], a[:, 1:]]),
    "split the first": _move("split", lambda a: lax.split(a, (1, a.shape[0] - 1), 0), lambda a: [a[:1], a[1:]]),
    "dynamic_slice": _move("dynamic_slice", lambda a: lax.dynamic_slice(a, (1, 0, 1), (1, a.shape[1], 1)), lambda a: a[1:2, :, 1:2]),
    "dynamic index": _move("dynamic_slice", lambda a: lax.dynamic_index_in_dim(a, jnp.int32(1), 0, False), lambda a: a[1], rows=False),
    "dynamic_update_slice": _move("dynamic_update_slice", lambda a, b: lax.dynamic_update_slice(a, b, (0, 1, 1)), lambda a, b: _update(a, b, (0, 1, 1)),
                                  "ABC 111", rows=False),
    "concatenate": _move("concatenate", lambda a, b: jnp.concatenate([a, b], 1), lambda a, b: np.concatenate([a, b], 1), "ABC ADC"),
    "concatenate first": _move("concatenate", lambda a, b: jnp.concatenate([a, b]), lambda a, b: np.concatenate([a, b]), "ABC DBC", rows=False),
    "stack": _move("stack", lambda a, b: jnp.stack([a, b, a]), lambda a, b: np.stack([a, b, a]), "AB AB", rows=False),
    "stack with zeros": _move("stack", lambda a: jnp.stack([jnp.zeros_like(a), a]), lambda a: np.stack([0 * a, a]), "AB", rows=False),
    "stack last": _move("stack", lambda a, b: jnp.stack([a, b], -1), lambda a, b: np.stack([a, b], -1), "AB AB"),
    "concatenate rows": _move("concatenate", lambda a, b: jnp.concatenate([a[None], b[None]]), lambda a, b: np.stack([a, b]), "AB AB", rows=False),
    "stack middle": _move("stack", lambda a, b: jnp.stack([a, b], 1), lambda a, b: np.stack([a, b], 1), "AB AB"),
    "unstack": _move("unstack", lambda a: list(jnp.unstack(a)), list, "ABC", rows=False),
    "unstack last": _move("unstack", lambda a: list(jnp.unstack(a, axis=2)), lambda a: list(a.transpose(2, 0, 1)), "ABC"),
    "tile": _move("tile", lambda a: jnp.tile(a, (1, 2, 1)), lambda a: np.tile(a, (1, 2, 1))),
    "tile the first": _move("tile", lambda a: jnp.tile(a, (2, 1, 1)), lambda a: np.tile(a, (2, 1, 1))),
    "pad": _move("pad", lambda a: jnp.pad(a, ((0, 0), (1, 2), (0, 0))), lambda a: _padded(a, 1, 2)),
    "pad with a number": Case("pad", lambda a: lax.pad(a, jnp.asarray(0.5, a.dtype), ((0, 0, 0), (1, 2, 0), (0, 0, 0))), lambda a: _padded(a, 1, 2, 0.5), rows=False),
    "pad between": _move("pad", lambda a: lax.pad(a, jnp.asarray(0.0, a.dtype), ((0, 0, 0), (0, 0, 1), (0, 0, 0))), _interior),
    "pad away": _move("pad", lambda a: lax.pad(a, jnp.asarray(0.0, a.dtype), ((0, 0, 0), (-1, 0, 0), (0, 0, 0))), lambda a: a[:, 1:]),
    "gather": _move("gather", lambda a: a[ROWS], lambda a: a[ROWS], rows=False),
    "take_along_axis": _move("gather", lambda a: jnp.take_along_axis(a, ROWS[None, :2, None], 1), lambda a: np.take_along_axis(a, ROWS[None, :2, None], 1), rows=False),
    "gather, clipped": _move("gather", lambda a: jnp.take(a, np.array([0, 99]), 0, mode="clip"), lambda a: a[[0, -1]], rows=False),
    "gather, filled": _move("gather", lambda a: jnp.take(a, np.array([0, 99]), 0, mode="fill", fill_value=0), lambda a: np.stack([a[0], 0 * a[0]]), rows=False),
    "scatter": _move("scatter", lambda a, b: a.at[ROWS[:2]].set(b[:2]), _set, "AB AB", rows=False),
    "scatter-add": _move("scatter-add", lambda a, b: a.at[ROWS[: len(b)]].add(b), _scattered(np.add), "AB 4B", rows=False),
    "scatter-add to zeros": _move("scatter-add", lambda b: jnp.zeros((3, b.shape[1]), b.dtype).at[ROWS].add(b),
                                  lambda b: _scattered(np.add)(np.zeros((3, b.shape[1])), b), "4B", rows=False),
    "scatter-sub": _move("scatter-sub", lambda a, b: a.at[ROWS[: len(b)]].subtract(b), _scattered(np.subtract), "AB 4B", rows=False),
    "scatter-min": _move("scatter-min", lambda a, b: a.at[ROWS[: len(b)]].min(b), _scattered(np.minimum), "AB 4B", rows=False),
    "scatter-max": _move("scatter-max", lambda a, b: a.at[ROWS[: len(b)]].max(b), _scattered(np.maximum), "AB 4B", rows=False),
    "embedding gradient": _move("scatter-add", lambda a, b: jax.grad(lambda t: (t[ROWS] * b).sum())(a), lambda a, b: _scattered(np.add)(0 * a, b), "AB 4B", rows=False),
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
