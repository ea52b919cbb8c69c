"""Tables of cases that go through `propagate_scales` from user code, against float64.

A table is run as one program of all its cases, compiled once for each way of holding numbers: the exponents are arguments.
Shapes are words: each letter is a size, drawn for each seed.
"""
from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from trainer import ScaledArray, propagate_scales

F16, F32 = np.dtype(np.float16), np.dtype(np.float32)
ONE = ((0,), (60,), (-60,))
TWO = ((0, 0), (60, 60), (-60, -60), (60, -60), (-60, 60), (3, -5), (0, 60))
FIXED = {str(n): n for n in range(1, 10)}  # sizes that are not drawn


def normal(rng, shape):
    return rng.standard_normal(shape)


def positive(rng, shape):
    return rng.uniform(0.25, 4.0, shape)


def within(low: float, high: float):
    return lambda rng, shape: rng.uniform(low, high, shape)


@dataclass(frozen=True, eq=False)
class Case:
    """fun(*arrays) in jax, oracle(*arrays) in numpy float64.

    shapes: a word for each argument. exponents: the rounds it is run with, one exponent for each argument. dies: plain float16
    gives nothing but zeros, infinities and NaN where all exponents are 60 or -60. rows: what stands at a leading index of the
    result comes from that index of the arguments, and is as exact as they are; None: not run with an exponent for each index.
    tolerance: XLA's own error in float32, where it is more than 1e-6.
    """

    primitives: str
    fun: Callable
    oracle: Callable
    shapes: str = "ABC"
    draw: Callable | tuple = normal
    exponents: tuple = ()
    dies: bool = False
    rows: bool | None = True
    tolerance: float = 1e-6

    @property
    def words(self) -> list[str]:
        return self.shapes.split()

    @property
    def rounds(self) -> tuple:
        if self.exponents:
            return self.exponents
        return {1: ONE, 2: TWO}.get(len(self.words)) or tuple(itertools.product((0, 60, -60), repeat=len(self.words)))


def sizes(seed: int) -> dict[str, int]:
    """A size for each letter; B and D are never 1, so that there is something to contract."""
    rng = np.random.default_rng(seed)
    return {**{letter: int(rng.integers(2, 7)) for letter in "ABCDEFGH"}, **FIXED}


def draw(case: Case, seed: int, number: int, dtype) -> list[np.ndarray]:
    """The data of one round, exact in `dtype`."""
    rng = np.random.default_rng([seed, number])
    size = sizes(seed)
    draws = case.draw if isinstance(case.draw, tuple) else (case.draw,) * len(case.words)
    found = [np.asarray(d(rng, tuple(size[c] for c in w if c != "-")), np.float64) for d, w in zip(draws, case.words, strict=True)]
    # Few digits, so that products and sums of two of them tie now and then.
    return [x.astype(F16).astype(dtype) for x in found]


def program(table: dict[str, Case]):
    """All cases of a table as one function of a dictionary of arguments."""
    return lambda arguments: {name: case.fun(*arguments[name]) for name, case in table.items()}


@functools.lru_cache(maxsize=None)
def transformed(key: int, data_dtype):
    return propagate_scales(program(_TABLES[key]), data_dtype=data_dtype, outputs="scaled")


@functools.lru_cache(maxsize=None)
def plain(key: int):
    return jax.jit(program(_TABLES[key]))


_TABLES: dict[int, dict[str, Case]] = {}


def values(tree):
    """float64 values of a tree of results."""
    return jax.tree.map(value, tree, is_leaf=lambda x: isinstance(x, ScaledArray))


def value(x) -> np.ndarray:
    """data * 2**exponent in float64, made by numpy alone."""
    if not isinstance(x, ScaledArray):
        return np.asarray(x)
    data, exponent = np.asarray(x.data).astype(np.float64), np.asarray(x.exponent)
    return np.ldexp(data, exponent.reshape(exponent.shape + (1,) * (data.ndim - exponent.ndim)).clip(-2000, 2000))


MODES = {"float32": (F32, None), "float16": (F16, None), "held in float16": (F32, F16)}


def exponents_of(case: Case, number: int, data, leading: bool, rng) -> list[np.ndarray]:
    """Those of one round; with `leading`, one for each index of the first dimension."""
    if leading:
        if case.rows is None:
            return [np.int32(0)] * len(data)
        return [rng.integers(-60, 61, x.shape[:1]).astype(np.int32) if x.ndim else np.int32(3) for x in data]
    return [np.int32(e) for e in case.rounds[number % len(case.rounds)]]


@functools.lru_cache(maxsize=None)
def results(key: int, mode: str, leading: bool = False, seed: int = 0):
    """name -> list of (values found, values that float64 gives, whether all exponents are +-60) for each round."""
    table = _TABLES[key]
    dtype, data_dtype = MODES[mode]
    run = transformed(key, data_dtype)
    count = 2 if leading else max(len(case.rounds) for case in table.values())
    found: dict[str, list] = {name: [] for name in table}
    for number in range(count):
        arguments, wanted = {}, {}
        for place, (name, case) in enumerate(table.items()):
            data = draw(case, seed, 100 * number + place, dtype)
            exponents = exponents_of(case, number, data, leading, np.random.default_rng([seed, number, place]))
            arguments[name] = tuple(map(ScaledArray, data, exponents))
            wanted[name] = case.oracle(*(value(x) for x in arguments[name]))
        got = values(run(arguments))
        for name in table:
            found[name].append((got[name], wanted[name], arguments[name]))
    return found


def check(table: dict[str, Case], name: str, mode: str, leading: bool = False) -> None:
    """The case against float64: relative to the largest result, or to the largest of each leading index."""
    seed = list(MODES).index(mode)  # each in shapes of its own
    case = table[name]
    if leading and case.rows is None:
        return
    narrow = MODES[mode] != (F32, None)
    tolerance = 4 * 2.0**-11 if narrow else case.tolerance
    for got, want, arguments in results(register(table), mode, leading, seed)[name]:
        for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            w = np.asarray(w)
            where = f"{name}, {mode}, exponents {[np.asarray(a.exponent).tolist() for a in arguments]}"
            assert g.shape == w.shape, f"{where}: shape {g.shape}, should be {w.shape}"
            if w.dtype.kind != "f":
                np.testing.assert_array_equal(g, w, err_msg=where)
                continue
            axes = tuple(range(1, w.ndim)) if leading and case.rows else None
            scale = np.max(np.abs(w), axis=axes, keepdims=True) if w.size else 0.0
            wrong = np.abs(g - w) > tolerance * scale
            wrong |= ~np.isfinite(g)
            assert not wrong.any(), f"{where}: {g[wrong][:4]} should be {w[wrong][:4]}, largest {np.max(scale)}"


@functools.lru_cache(maxsize=None)
def moved(key: int):
    """name -> list of (values, values with powers of two moved from data to exponents or back, how far) for each round."""
    table, run = _TABLES[key], transformed(key, None)
    found: dict[str, list] = {name: [] for name in table}
    for number in range(max(len(case.rounds) for case in table.values())):
        arguments, others, steps = {}, {}, {}
        for place, (name, case) in enumerate(table.items()):
            data = draw(case, 0, 100 * number + place, F32)
            exponents = exponents_of(case, number, data, False, None)
            far = 60
            if len(set(map(int, exponents))) > 1:  # twice as far apart, small ones go below float32 next to large ones, as they may
                exponents, far = [e // 2 for e in exponents], 30
            steps[name] = np.random.default_rng([number, place]).integers(-far, far + 1, len(data)).astype(np.int32)
            arguments[name] = tuple(map(ScaledArray, data, exponents))
            others[name] = tuple(ScaledArray(np.ldexp(x, s), e - s) for x, e, s in zip(data, exponents, steps[name]))
        before, after = values(run(arguments)), values(run(others))
        for name in table:
            found[name].append((before[name], after[name], steps[name]))
    return found


def check_moved(table: dict[str, Case], name: str) -> None:
    """No bit of a result changes when powers of two move between data and exponents of the arguments."""
    for before, after, steps in moved(register(table))[name]:
        for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
            np.testing.assert_array_equal(x, y, err_msg=f"{name}: data times 2^{steps.tolist()}")


def check_plain_dies(table: dict[str, Case], name: str) -> None:
    """The same program in plain float16, on the same values: nothing is left of them."""
    case = table[name]
    run = plain(register(table))
    seen = 0
    for number, exponents in enumerate(case.rounds):
        if set(map(abs, exponents)) != {60} or len(set(exponents)) > 1:
            continue
        arguments = {}
        for place, (other, c) in enumerate(table.items()):
            data = draw(c, 0, 100 * number + place, F16)
            with np.errstate(over="ignore"):
                arguments[other] = tuple(np.asarray(np.ldexp(x.astype(np.float64), exponents[0])).astype(F16) for x in data)
        for x in jax.tree.leaves(run(arguments)[name]):
            x = np.asarray(x)
            assert np.all((x == 0) | ~np.isfinite(x)), f"{name}: plain float16 lives with exponents {exponents}: {x}"
        seen += 1
    assert seen == 2


def register(table: dict[str, Case]) -> int:
    """The key of a table: its id, and the table is kept."""
    _TABLES[id(table)] = table
    return id(table)


def primitives(fun, *arguments) -> set[str]:
    """Names of all primitives in the program of a function."""
    found: set[str] = set()

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            found.add(eqn.primitive.name)
            for parameter in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
                inner = getattr(parameter, "jaxpr", parameter)
                if hasattr(inner, "eqns"):
                    walk(inner)

    walk(jax.make_jaxpr(fun)(*arguments).jaxpr)
    return found


def claimed(table: dict[str, Case]) -> set[str]:
    """The primitives that the cases of a table name; each is in the program of its case."""
    names = set()
    for name, case in table.items():
        own = set(case.primitives.split())
        arrays = [jnp.asarray(x) for x in draw(case, 0, 0, F32)]
        missing = own - primitives(case.fun, *arrays)
        assert not missing, f"{name}: no {missing} in its program"
        names |= own
    return names
