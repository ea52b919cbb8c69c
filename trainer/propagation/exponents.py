"""Exponents while a program is traced: a known integer plus a sum of traced ones, kept apart so that they cancel before any code is made.

x / sqrt(mean(x^2)) has the exponent a + (-2a - s)/2 = -s/2 whatever a is: knowing that at trace time saves the alignment of every
normalised tensor, which is most of what carrying scales would cost.
"""
from __future__ import annotations

import itertools
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from trainer.propagation.array import trailing

_numbers = itertools.count()


class Atom:
    """A traced int32 exponent, told from others by identity. Its shape is a prefix of its tensors' shape."""

    __slots__ = ("array", "number")

    def __init__(self, array):
        self.array, self.number = array, next(_numbers)


@dataclass(frozen=True)
class Exponent:
    """known + sum of coefficient * atom. Terms are sorted by the atoms' numbers and have no zero coefficients."""

    known: int = 0
    terms: tuple[tuple[Atom, int], ...] = ()

    @property
    def ndim(self) -> int:
        """How many leading dimensions have an exponent for each index."""
        return max((atom.array.ndim for atom, _ in self.terms), default=0)

    def __add__(self, other):
        if isinstance(other, int):
            return Exponent(self.known + other, self.terms)
        total = dict(self.terms)
        for atom, count in other.terms:
            total[atom] = total.get(atom, 0) + count
        terms = sorted(((a, c) for a, c in total.items() if c), key=lambda term: term[0].number)
        return Exponent(self.known + other.known, tuple(terms))

    def __mul__(self, factor: int):
        return Exponent(self.known * factor, tuple((a, c * factor) for a, c in self.terms) if factor else ())

    def __neg__(self):
        return self * -1

    def __sub__(self, other):
        return self + (-other)

    def halved(self):
        """(h, r) with 2 h + r = self and r in {0, 1}; r is an int where it is known, else int32."""
        if all(c % 2 == 0 for _, c in self.terms):
            return Exponent(self.known // 2, tuple((a, c // 2) for a, c in self.terms)), self.known % 2
        whole = self.traced()
        return of_array(whole >> 1), whole & 1

    def traced(self, ndim: int | None = None) -> jax.Array | int:
        """The exponent as an int where it is known, else int32; with `ndim`, shaped to broadcast against that many dimensions."""
        if not self.terms:
            return self.known
        rank = self.ndim
        total = None
        for atom, count in self.terms:
            part = trailing(atom.array, rank) if atom.array.ndim else atom.array
            part = part if count == 1 else part * jnp.int32(count)
            total = part if total is None else lax_add(total, part)
        if self.known:
            total = total + jnp.int32(self.known)
        return total if ndim is None or total.ndim == 0 else trailing(total, ndim)

    def mapped(self, function) -> Exponent:
        """Each atom that has leading dimensions replaced by function of its array (a slice, a reversal, ...)."""
        if not self.ndim:
            return self
        rank = self.ndim
        own = [(a, c) for a, c in self.terms if a.array.ndim == 0]
        rest = Exponent(0, tuple((a, c) for a, c in self.terms if a.array.ndim))
        return Exponent(self.known, tuple(own)) + of_array(function(_full(rest.traced(), rank)))


def _full(array, rank):
    return array if array.ndim == rank else trailing(array, rank)


def lax_add(a, b):
    """Sum of two int32 arrays of which one may be a scalar or have dimensions of size one."""
    if a.ndim == b.ndim or a.ndim == 0 or b.ndim == 0:
        return a + b
    rank = max(a.ndim, b.ndim)
    return trailing(a, rank) + trailing(b, rank)


def of_array(array) -> Exponent:
    """An exponent that is only known when the program runs (or an int)."""
    if isinstance(array, int):
        return Exponent(array)
    return Exponent(0, ((Atom(array), 1),))


def highest(exponents, lowest: bool = False) -> Exponent:
    """The largest (or smallest) of several exponents, index by index where they have leading dimensions."""
    pick = min if lowest else max
    by_terms: dict = {}
    for e in exponents:
        seen = by_terms.get(e.terms)
        by_terms[e.terms] = e.known if seen is None else pick(seen, e.known)
    if len(by_terms) == 1:
        ((terms, known),) = by_terms.items()
        return Exponent(known, terms)
    join = jnp.minimum if lowest else jnp.maximum
    found = None
    rank = max(e.ndim for e in exponents)
    for terms, known in by_terms.items():
        value = jnp.asarray(Exponent(known, terms).traced(), jnp.int32)
        value = trailing(value, rank) if value.ndim else value
        found = value if found is None else join(found, value)
    return of_array(found)
