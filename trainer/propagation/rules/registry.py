"""The table of rules, and what a rule is given."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from trainer.propagation.array import floor_log2, shift
from trainer.propagation.exponents import Exponent, of_array
from trainer.propagation.values import Scaled, Uniform, align, common, exponent_of, lift, plain


@dataclass(frozen=True)
class Rule:
    """function(call, *variables) -> variable, or a list of them. data, exponent: what it does, for the documentation."""

    function: Callable
    data: str
    exponent: str


RULES: dict[str, Rule] = {}


def rule(*names: str, data: str, exponent: str):
    """Decorator: the rule of these primitives."""

    def add(function):
        for name in names:
            RULES[name] = Rule(function, data, exponent)
        return function

    return add


@dataclass(frozen=True)
class Call:
    """One equation under the transform: how its results are held, and its parameters.

    params are passed on as they are, known or not: jax adds to them with every release.
    """

    name: str
    params: dict[str, Any]
    ins: tuple  # shape and dtype of the arguments in the program
    outs: tuple  # shape and dtype of the results in the program
    bind_with: Callable  # (params, *arrays): the primitive
    data_dtype: np.dtype | None  # that results are held in, None for their own
    memo: dict
    faint: bool = False  # one of the arguments is, and so its results

    def bind(self, *arrays):
        """The primitive on arrays, with the parameters of the equation."""
        return self.bind_with(self.params, *arrays)

    def lift(self, x) -> Scaled:
        return lift(x, self.memo)

    def split(self, x):
        """A scalar that is known only when the program runs, apart in mantissa and exponent; anything else as it is."""
        known = isinstance(x, Scaled) or isinstance(x, Uniform) and x.known
        return x if known or not isinstance(x, Uniform) and x.ndim else self.lift(x)

    def exponent(self, x) -> Exponent:
        """The exponent of a variable, that of its own for a scalar."""
        return exponent_of(self.split(x))

    def common(self, *xs) -> Exponent:
        """The largest exponent among variables, of those that have a scale of their own."""
        return common(tuple(map(self.split, xs)))

    def align(self, x, exponent: Exponent, saturate=None, shape=None, far: bool = False):
        """The data that x has at another exponent, wide; of its own shape, or of one that broadcasts to `shape` (the result's)."""
        lifted = None if not exponent.ndim or isinstance(x, Uniform) and x.any_scale else self.lift(x)
        shape, rank = self.outs[0].shape if shape is None else shape, exponent.ndim
        if lifted is None or lifted.ndim and lifted.shape[:rank] == tuple(shape[:rank]):
            return align(x, exponent, self.memo, saturate, far)
        # One number, or one row of a size that primitives broadcast, is to have an exponent for each leading index.
        own = lifted.shape[rank:] if lifted.ndim else (1,) * (len(shape) - rank)
        data = jnp.broadcast_to(lifted.data, (*shape[:rank], *own))
        data = align(Scaled(data, lifted.exponent, lifted.dtype), exponent, self.memo, far=far)
        return jnp.clip(data, -saturate, saturate) if saturate is not None and isinstance(x, Uniform) and x.known else data

    def held_as(self, dtype, ndim: int) -> np.dtype:
        """The dtype of the data of a result: scalars and what is narrower already keep their own."""
        dtype = np.dtype(dtype)
        if self.data_dtype is None or not ndim or dtype.itemsize < self.data_dtype.itemsize:
            return dtype
        return self.data_dtype

    def store(self, data, exponent: Exponent, index: int = 0) -> Scaled:
        """A result of the equation, rounded to what results are held in."""
        dtype, shape = np.dtype(self.outs[index].dtype), tuple(self.outs[index].shape)
        if data.shape != shape:  # of scalars alone
            data = jnp.broadcast_to(data, shape)
        return Scaled(data.astype(self.held_as(dtype, data.ndim)), exponent, dtype, self.faint)

    def number(self, number: float) -> Uniform:
        """A result that is known now."""
        return Uniform(number, tuple(self.outs[0].shape), np.dtype(self.outs[0].dtype))

    def narrow(self, ndim: int, index: int = 0) -> bool:
        """True if this result is held in fewer than 32 bits."""
        return self.held_as(self.outs[index].dtype, ndim).itemsize < 4

    def settle(self, data, exponent: Exponent) -> Scaled:
        """A result whose magnitude no rule can foresee: where its dtype is narrow, its largest value is brought to [1, 2), for each
        leading index that has an exponent of its own."""
        return self.honest().store(*to_unit(data, exponent)) if self.narrow(data.ndim) else self.store(data, exponent)

    def honest(self) -> Call:
        """This call with results that are as large as their exponent says, whatever the arguments are."""
        return replace(self, faint=False)

    def fading(self) -> Call:
        """This call with results that may be far smaller than their exponent says."""
        return replace(self, faint=True)

    def fall_back(self, *xs):
        """The primitive itself on unscaled values."""
        return self.bind(*map(plain, xs))


def to_unit(data, exponent: Exponent) -> tuple:
    """(data / 2^k, exponent + k) with the largest magnitude in [1, 2), for each leading index that has an exponent of its own."""
    largest = jnp.max(jnp.abs(data), axis=tuple(range(exponent.ndim, data.ndim)), initial=0)
    top = floor_log2(largest.astype(jnp.float32))
    # Known zeros and infinities stay; everything else moves by what the largest value says.
    down = jnp.where(jnp.abs(top) > 1024, 0, -top)
    return shift(data, down), exponent + of_array(-down)


def describe_rules() -> dict[tuple[str, str], list[str]]:
    """(data, exponent) -> primitives: the table of docs/scale_propagation.md."""
    table: dict[tuple[str, str], list[str]] = {}
    for name, entry in RULES.items():
        table.setdefault((entry.data, entry.exponent), []).append(name)
    return table
