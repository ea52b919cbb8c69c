"""Uniform numbers without a zero: -3/2, -1/2, 1/2, 3/2 for two bits. Of 2**bits evenly spaced levels around zero, the least error that
Gaussian data can have (Max 1960); QuEST's integers (Panferov et al. 2025, section 3.1), and for one bit the sign."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from formats.elements import whole
from formats.modes import Draw, Rounding, by_mode, carries

_MAX_BITS = 16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Midrise:
    """bits: int32, 1 to 16; may be traced. The values are k + 1/2, k = -2**(bits-1) .. 2**(bits-1) - 1; the code of a value is its place
    among them. No infinities, no NaN code, no zero: zero goes to 1/2 under the nearest modes."""

    bits: jax.Array | np.int32

    @property
    def max_value(self):
        """float32: 2**(bits-1) - 1/2."""
        return self._half.astype(np.float32) - np.float32(0.5)

    @property
    def limits(self):
        """float32: the smallest and the largest value."""
        return -self.max_value, self.max_value

    @property
    def unbounded(self):
        """bool: never the float32 identity."""
        return np.bool_(False)

    @property
    def has_zero(self):
        """bool: never."""
        return np.bool_(False)

    @property
    def quantum_exp(self):
        """int32: values are 2**0 apart."""
        return np.int32(0)

    @property
    def _half(self):
        return (np.int32(1) << self.bits) >> 1

    def round(self, x, rounding, overflow, draw: Draw, random_bits):
        """float32 x to its value; NaN stays NaN. `rounding.round_to` documents the arguments. Ties of nearest_even go to the even code."""
        del overflow
        if isinstance(rounding, Rounding) and rounding.random:
            below = jnp.floor(x - np.float32(0.5)) + np.float32(0.5)  # within 2**-25 of a step, where that is rounded
            fraction = jnp.clip((x - below) * np.float32(2.0**31), 0.0, np.float32(2.0**31 - 128)).astype(jnp.int32)
            y = below + carries(rounding, draw, lax.bitcast_convert_type(random_bits, jnp.int32), fraction).astype(jnp.float32)
        else:
            below = jnp.floor(jnp.abs(x) - np.float32(0.5)) + np.float32(0.5)  # of |x|; -1/2 for what lies nearer to zero than 1/2
            y = by_mode(rounding, lambda mode: self._nearer(x, below, below + np.float32(1.0), mode))
        return jnp.where(jnp.isnan(x), x, jnp.clip(y, -self.max_value, self.max_value))

    def _nearer(self, x, below, above, mode: Rounding):
        """`below` or `above` of |x|, with the sign of x; between -1/2 and 1/2 one of those."""
        size, middle, negative = jnp.abs(x), below + np.float32(0.5), _negative(x)
        exact, even = size == below, self._even(jnp.where(negative, -above, above))
        up = {
            Rounding.NEAREST_EVEN: (size > middle) | ((size == middle) & even),
            Rounding.NEAREST_AWAY: size >= middle,
            Rounding.NEAREST_ZERO: size > middle,
            Rounding.TOWARD_ZERO: jnp.zeros_like(exact),
            Rounding.TOWARD_POSITIVE: ~negative & ~exact,
            Rounding.TOWARD_NEGATIVE: negative & ~exact,
            Rounding.TO_ODD: ~exact & ~even,
        }[mode]
        # Between -1/2 and 1/2 neither is nearer to zero: toward_zero goes up, as it does in a codebook.
        plus = {Rounding.TOWARD_POSITIVE: True, Rounding.TOWARD_ZERO: True, Rounding.TOWARD_NEGATIVE: False,
                Rounding.TO_ODD: ~self._even(np.float32(0.5))}.get(mode, ~negative)
        size = jnp.where(up, above, below)
        return jnp.where(below < 0, jnp.where(plus, np.float32(0.5), np.float32(-0.5)), jnp.where(negative, -size, size))

    def _even(self, value):
        """bool: whether the code of a value is even."""
        return self.codes(value) & 1 == 0

    def codes(self, y):
        """int32 places of values y, from 0 for the smallest; NaN is that of 1/2."""
        return jnp.where(jnp.isnan(y), 0, jnp.floor(y)).astype(jnp.int32) + self._half

    def values(self, codes):
        """float32 values of codes."""
        return (codes - self._half).astype(jnp.float32) + np.float32(0.5)


def _negative(x):
    """bool: below zero, float32 subnormals too."""
    # One comparison of the whole pattern: LLVM turns "magnitude bits != 0" into a float comparison, which flushes.
    return lax.bitcast_convert_type(x, jnp.uint32) > np.uint32(0x80000000)


def midrise(bits) -> Midrise:
    """Midrise numbers of `bits` (1 to 16; may be traced). ValueError for anything else."""
    return Midrise(whole("bits", bits, 1, _MAX_BITS))
