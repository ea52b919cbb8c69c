"""Formats given by a table of values: nf4, DyBit, binary, or any levels of one's own (learned ones too: they may be traced).

Every deterministic mode is a threshold between each pair of neighbours: x goes to level i if i thresholds lie below it. They
are compared as ordered integers, so that ties and subnormals are exact. Levels at or below 2**126 in magnitude.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from formats import bits as fb
from formats.modes import Draw, Rounding, as_float32, by_mode, carries, ordered
from formats.tables import count, lookup


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Codebook:
    """levels: float32[L], increasing; a leaf, so it may be traced and vmapped. The code of a value is its place in it.

    No infinities, no NaN code, no negative zero: what lies outside goes to the end levels under every overflow rule.
    """

    levels: jax.Array | np.ndarray

    @property
    def bits(self) -> int:
        """Stored width."""
        return max(1, math.ceil(math.log2(self.levels.shape[0])))

    @property
    def max_value(self):
        """float32: the largest magnitude, which a scale maps amax to."""
        xp = jnp if fb.is_traced(self.levels) else np
        return xp.maximum(xp.abs(self.levels[0]), xp.abs(self.levels[-1]))

    @property
    def unbounded(self):
        """bool: never the float32 identity."""
        return np.bool_(False)

    @property
    def limits(self):
        """float32: the smallest and the largest level."""
        return self.levels[0], self.levels[-1]

    @property
    def has_zero(self):
        """bool: whether 0 is a level; without it a block of zeros needs scale 0."""
        return (self.levels == 0).any()

    def round(self, x, rounding, overflow, draw: Draw, random_bits):
        """float32 x to its level; NaN stays NaN. `elements.round_to` documents the arguments."""
        del overflow
        x_bits = fb.to_pattern(x)
        key = ordered(x_bits)
        if isinstance(rounding, Rounding) and rounding.random:
            low, high = _neighbours(key, self.levels)
            part = (jnp.clip(x, self.levels[0], self.levels[-1]) - low) / (high - low)
            fraction = jnp.clip(part * np.float32(2.0**31), 0.0, np.float32(2.0**31 - 128)).astype(jnp.int32)
            inexact = key > ordered(fb.to_pattern(low))
            fraction = jnp.where(inexact, jnp.maximum(fraction, 1), 0)
            up = carries(rounding, draw, lax.bitcast_convert_type(random_bits, jnp.int32), fraction)
            y = jnp.where(up | (key >= ordered(fb.to_pattern(high))), high, low)
        else:
            y = lookup(key, by_mode(rounding, lambda mode: _thresholds(self.levels, mode)), self.levels)
        return jnp.where(x_bits & fb.MAGNITUDE > fb.INFINITY, x, y)

    def codes(self, y):
        """int32 places of levels y; NaN is 0."""
        return count(ordered(fb.to_pattern(y)), ordered(fb.to_pattern(jnp.asarray(self.levels[1:]))) - 1)

    def values(self, codes):
        """float32 levels of codes."""
        return jnp.take(jnp.asarray(self.levels), codes, mode="clip")


def codebook(levels) -> Codebook:
    """A format of the given numbers (2 .. 256 of them, increasing, finite, at most 2**126 in magnitude, exact in float32)."""
    if isinstance(levels, jax.Array):
        if levels.ndim != 1 or levels.shape[0] < 2:
            raise ValueError(f"levels has shape {levels.shape}; one dimension of at least two numbers is needed")
        return Codebook(as_float32(levels))
    given = np.asarray(levels, np.float64)
    table = given.astype(np.float32)
    fits = table.ndim == 1 and 2 <= table.size <= 256 and (np.diff(table) > 0).all() and (np.abs(given) <= 2.0**126).all()
    if not fits:
        raise ValueError(f"levels={levels!r} must be 2 to 256 increasing float32 numbers of at most 2**126 in magnitude")
    return Codebook(table + np.float32(0.0))  # no -0


def nf4() -> Codebook:
    """NormalFloat4 (QLoRA, Dettmers et al. 2023, appendix E), its sixteen constants as published."""
    return codebook(np.array([
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
        -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0], np.float32))


def dybit(bits: int) -> Codebook:
    """DyBit of `bits` (2..8), sign included: with n = bits - 1 magnitude bits, a leading 0 is the fraction code / 2**(n-1); i leading
    ones and k bits X after the 0 that ends them are 2**(i-1) (1 + X / 2**k); all ones are 2**(n-1)."""
    if not isinstance(bits, int) or not 2 <= bits <= 8:
        raise ValueError(f"bits={bits!r} must be an integer from 2 to 8")
    n = bits - 1
    magnitudes = []
    for code in range(2**n):
        ones = n - (~code & (2**n - 1)).bit_length()
        k = n - ones - 1
        if ones == 0:
            magnitudes.append(code / 2 ** (n - 1))
        elif ones == n:
            magnitudes.append(2.0 ** (n - 1))
        else:
            magnitudes.append(2.0 ** (ones - 1) * (1 + (code & (2**k - 1)) / 2**k))
    return codebook(sorted({-m for m in magnitudes} | set(magnitudes)))


def binary() -> Codebook:
    """-1 and 1, by the sign; zero is +1 under the nearest modes (BinaryConnect and BWN take it so)."""
    return codebook([-1.0, 1.0])


def _middle(levels):
    """(key of the largest float32 not above each midpoint, whether it is the midpoint), exactly: the sum's rounding error tells."""
    low, high = levels[:-1], levels[1:]
    total = low + high
    part = total - low
    error = (low - (total - part)) + (high - part)
    half = ordered(fb.to_pattern(jnp.asarray(total * np.float32(0.5))))
    return jnp.where(error < 0, half - 1, half), error == 0


def _thresholds(levels, mode: Rounding):
    """int32[L-1]: x goes above level i exactly if its key is greater than threshold i."""
    keys = ordered(fb.to_pattern(jnp.asarray(levels)))
    low, high = keys[:-1], keys[1:]
    number = jnp.arange(1, keys.shape[0])  # of the upper level
    at_once, never = low, high - 1  # anything above the lower level goes up; nothing below the upper one does
    match mode:
        case Rounding.TOWARD_NEGATIVE:
            return never
        case Rounding.TOWARD_POSITIVE:
            return at_once
        case Rounding.TOWARD_ZERO:
            return jnp.where(low >= 0, never, at_once)
        case Rounding.TO_ODD:
            return jnp.where(number % 2 == 1, at_once, never)
    middle, exact = _middle(levels)
    size = jnp.abs(high) - jnp.abs(low)
    up = {Rounding.NEAREST_EVEN: number % 2 == 0, Rounding.NEAREST_AWAY: size > 0, Rounding.NEAREST_ZERO: size < 0}[mode]
    up = up | (size == 0)  # between -a and a neither is further from zero
    return middle - (exact & up).astype(jnp.int32)


def _neighbours(key, levels):
    """The levels around: (last not above key, the next one), of the end interval outside."""
    levels = jnp.asarray(levels)
    keys = ordered(fb.to_pattern(levels))
    inner = keys[1:-1] - 1
    return lookup(key, inner, levels[:-1]), lookup(key, inner, levels[1:])
