"""Exponents while a program is traced: a known integer plus a sum of traced ones, kept apart so that they cancel before any code is made.

x / sqrt(mean(x^2)) has the exponent a + (-2a - s)/2 = -s/2 whatever a is: knowing that at trace time saves the alignment of every
normalised tensor, which is most of what carrying scales would cost.
"""
from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from trainer.propagation.array import BIAS, ZERO_EXPONENT, like, pow2_of_biased, shift, times, trailing, two_factors

_numbers = itertools.count()
_LANES = 16
_DEEPEST = 8


class Atom:
    """A traced int32 exponent, told from others by identity. Its shape is a prefix of its tensors' shape. `made`: what has been
    computed of it already, so that no sum and no power of two is in the program twice. `depth`: of how many maxima, one inside the
    other, it is made (see `highest`). `divided`: see Exponent."""

    __slots__ = ("array", "depth", "divided", "made", "number")

    def __init__(self, array, depth: int = 0, divided: bool = False):
        self.array, self.depth, self.divided, self.made, self.number = array, depth, divided, {}, next(_numbers)


@dataclass(frozen=True)
class Exponent:
    """known + sum of coefficient * atom. Terms are sorted by the atoms' numbers and have no zero coefficients."""

    known: int = 0
    terms: tuple[tuple[Atom, int], ...] = ()

    @property
    def ndim(self) -> int:
        """How many leading dimensions have an exponent for each index."""
        return max((atom.array.ndim for atom, _ in self.terms), default=0)

    @property
    def divided(self) -> bool:
        """True if it is that of a quotient, or the like: of what may be infinite everywhere, and of any scale then."""
        return any(count < 0 or atom.divided for atom, count in self.terms)

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
        return of_array(whole >> 1, divided=self.divided), whole & 1

    def traced(self, ndim: int | None = None) -> jax.Array | int:
        """The exponent as an int where it is known, else int32; with `ndim`, shaped to broadcast against that many dimensions."""
        if not self.terms:
            return self.known
        made = self.terms[0][0].made
        if self not in made:
            made[self] = self._sum()
            made.setdefault(self.terms, self)  # what others with these terms differ from by a number
        total = made[self]
        return total if ndim is None or total.ndim == 0 else trailing(total, ndim)

    def _sum(self):
        rank, known, terms, total = self.ndim, self.known, self.terms, None
        begun = terms[0][0].made.get(terms[:-1])  # a term is aligned to the sum, whose exponent is the newest
        if begun is not None and begun.ndim == rank:
            total, known, terms = begun.traced(), known - begun.known, terms[-1:]
        for atom, count in sorted(terms, key=lambda term: term[1] < 0):  # then most of those to be subtracted can be
            part = trailing(atom.array, rank) if atom.array.ndim else atom.array
            if count == -1 and total is not None and total.shape == part.shape:
                total = lax.sub(total, part)
                continue
            part = part if count == 1 else lax.neg(part) if count == -1 else lax.mul(part, like(part, count))
            total = part if total is None else _add(total, part)
        return lax.add(total, like(total, known)) if known else total

    def factors(self, far: bool) -> tuple:
        """Two float32 powers of two whose product is 2**self, for exponents that are traced: exact from 2**-252 to 2**254 if `far`, else
        from 2**-126 to 2**127 and below that so small that nothing is left but infinities."""
        made = self.terms[0][0].made
        if (self, far) not in made:
            made[self, far] = two_factors(self.traced()) if far else self._near()
        return made[self, far]

    def _near(self) -> tuple:
        biased = (self + BIAS).traced()
        inside = lax.gt(biased, like(biased, 0))
        return pow2_of_biased(biased), lax.select(inside, lax.full_like(biased, 1.0, np.float32), lax.full_like(biased, 2.0**-126, np.float32))

    def shift(self, x, far: bool = False):
        """x * 2**self, for float32 or float64 x; exact unless the result leaves the normal range. Without `far`, zero (or infinite, if x is)
        below 2**-126 and by 2**127 at most: data near unit scale is nothing beside other data where it is moved farther."""
        if not self.terms or x.dtype.itemsize > 4:
            return shift(x, self.traced())
        for factor in self.factors(far):
            factor = factor.reshape(()) if factor.ndim > x.ndim else factor
            x = times(x, trailing(factor, x.ndim) if factor.ndim else factor)
        return x

    def mapped(self, function) -> Exponent:
        """Each atom that has leading dimensions replaced by function of its array (a slice, a reversal, ...)."""
        if not self.ndim:
            return self
        rank = self.ndim
        own = [(a, c) for a, c in self.terms if a.array.ndim == 0]
        rest = Exponent(0, tuple((a, c) for a, c in self.terms if a.array.ndim))
        return Exponent(self.known, tuple(own)) + of_array(function(_full(rest.traced(), rank)), divided=rest.divided)


def _full(array, rank):
    return array if array.ndim == rank else trailing(array, rank)


def _add(a, b):
    """Sum of two int32 arrays of which one may be a scalar or have dimensions of size one."""
    if a.shape == b.shape:
        return lax.add(a, b)
    if a.ndim and b.ndim:
        rank = max(a.ndim, b.ndim)
        a, b = trailing(a, rank), trailing(b, rank)
    return a + b


def of_array(array, depth: int = 0, divided: bool = False) -> Exponent:
    """An exponent that is only known when the program runs (or an int)."""
    if isinstance(array, int):
        return Exponent(array)
    return Exponent(0, ((Atom(array, depth, divided), 1),))


def highest(exponents, lowest: bool = False) -> Exponent:
    """The largest (or smallest) of several exponents, index by index where they have leading dimensions. What has been divided by an
    array of zeros is infinite at any scale, and does not count."""
    pick = min if lowest else max
    by_terms: dict = {}
    for e in exponents:
        seen = by_terms.get(e.terms)
        by_terms[e.terms] = e.known if seen is None else pick(seen, e.known)
    if len(by_terms) == 1:
        ((terms, known),) = by_terms.items()
        return Exponent(known, terms)
    rank = max(e.ndim for e in exponents)
    values = [jnp.asarray(Exponent(known, terms).traced(rank), jnp.int32) for terms, known in by_terms.items()]
    if not lowest:
        values = [_counting(value) if Exponent(0, terms).divided else value for value, terms in zip(values, by_terms)]
    full = jnp.broadcast_shapes(*(np.shape(v) for v in values))
    depth = 1 + max(atom.depth for terms in by_terms for atom, _ in terms)
    if depth < _DEEPEST:
        found = functools.reduce(lax.min if lowest else lax.max, (_spread(v, full) for v in values))
        return of_array(found, depth)
    # As a reduction: XLA copies a long chain of scalar maxima into every fused loop that reads its end (a hundred times, of a decoder's
    # residual stream), but computes a reduction once. One of a concatenation it would turn into scalars again.
    lanes = (max(_LANES, len(values)), *full)
    lane = lax.broadcasted_iota(jnp.int32, lanes, 0)
    stacked = _spread(values[0], lanes)
    for number, value in enumerate(values[1:], 1):
        stacked = lax.select(lax.eq(lane, like(lane, number)), _spread(value, lanes), stacked)
    return of_array(lax.reduce_min(stacked, (0,)) if lowest else lax.reduce_max(stacked, (0,)))


def _counting(value):
    """The exponent; so low that others win where something was divided by zeros (or by the root of zeros: half as high)."""
    return lax.select(lax.gt(value, like(value, -ZERO_EXPONENT // 2 - 1)), like(value, ZERO_EXPONENT), value)


def _spread(value, full):
    if value.shape == full:
        return value
    return lax.broadcast_in_dim(value, full, tuple(range(len(full) - value.ndim, len(full))))
