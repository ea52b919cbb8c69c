"""Logarithmic numbers: a sign and an integer k that stands for the magnitude 2**(-k / gamma) (LNS-Madam, Zhao et al. 2021, section 3).

gamma values lie in each octave, at the same mantissas: so the exponent field is kept, the mantissa is compared with a table of
gamma thresholds, and nothing is ever raised to a power. The tables are made in exact arithmetic; a threshold of the nearest
modes, 2**((j + 1/2) / gamma), is irrational, so there are no ties.
"""

from __future__ import annotations

import dataclasses
import decimal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from formats import bits as fb
from formats.elements import whole
from formats.modes import Draw, Rounding, by_mode, carries
from formats.tables import count, lookup

_OCTAVE = 1 << 23


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Logarithmic:
    """bits: int32, stored width, sign included; may be traced. gamma: values an octave.

    The largest value is 1, the smallest 2**(-(2**(bits-1) - 1) / gamma), or 2**-126 if that is larger. There is no zero: zeros go
    to the smallest value of their sign, unless a scale of 0 says that a whole block is zero. No infinities, no NaN code.
    """

    bits: jax.Array | np.int32
    gamma: int = dataclasses.field(metadata={"static": True})

    @property
    def max_value(self):
        """float32: 1."""
        return np.float32(1.0)

    @property
    def unbounded(self):
        """bool: never the float32 identity."""
        return np.bool_(False)

    @property
    def limits(self):
        """float32: -1 and 1."""
        return np.float32(-1.0), np.float32(1.0)

    @property
    def has_zero(self):
        """bool: never."""
        return np.bool_(False)

    @property
    def last_code(self):
        """int32: k of the smallest value."""
        xp = jnp if fb.is_traced(self.bits) else np
        return xp.minimum((xp.asarray(1, np.int32) << (self.bits - 1)) - 1, 126 * self.gamma)

    def round(self, x, rounding, overflow, draw: Draw, random_bits):
        """float32 x to its value, nearest in the logarithm; stochastic rounding is unbiased in x itself."""
        del overflow
        x_bits = fb.to_pattern(x)
        magnitude = x_bits & fb.MAGNITUDE
        octave, mantissa = magnitude & fb.INFINITY, magnitude & (_OCTAVE - 1)
        if isinstance(rounding, Rounding) and rounding.random:
            rounded = octave + self._drawn(octave, mantissa, rounding, draw, lax.bitcast_convert_type(random_bits, jnp.int32))
        else:
            rounded = octave + by_mode(rounding, lambda mode: self._mantissa(octave, mantissa, x_bits >= 0, mode))
        smallest = self._pattern(self.last_code)
        y_bits = (x_bits & fb.SIGN) | jnp.clip(rounded, smallest, fb.to_pattern(np.float32(1.0)))
        return jnp.where(magnitude > fb.INFINITY, x, fb.to_value(y_bits))

    def codes(self, y):
        """int32 codes of values y: the sign above k; NaN is 0."""
        y_bits = fb.to_pattern(y)
        magnitude = y_bits & fb.MAGNITUDE
        place = count(magnitude & (_OCTAVE - 1), _tables(self.gamma)[0][1:-1] - 1)
        k = (127 - (magnitude >> 23)) * self.gamma - place
        sign = (y_bits < 0).astype(jnp.int32) << (self.bits - 1)
        return jnp.where(magnitude > fb.INFINITY, 0, sign | k)

    def values(self, codes):
        """float32 values of codes."""
        k = codes & ((np.int32(1) << (self.bits - 1)) - 1)
        pattern = self._pattern(jnp.minimum(k, self.last_code))
        return fb.to_value(jnp.where(codes >> (self.bits - 1) != 0, pattern | fb.SIGN, pattern))

    def _pattern(self, k):
        """float32 pattern of 2**(-k / gamma)."""
        octaves = -(-k // self.gamma)
        return ((127 - octaves) << 23) + jnp.take(jnp.asarray(_tables(self.gamma)[0]), octaves * self.gamma - k)

    def _mantissa(self, octave, mantissa, positive, mode: Rounding):
        """Rounded mantissa (2**23 is the next octave) of magnitudes in a deterministic mode."""
        values, middles = _tables(self.gamma)
        if mode in (Rounding.NEAREST_EVEN, Rounding.NEAREST_AWAY, Rounding.NEAREST_ZERO):
            return lookup(mantissa, middles, values)
        low, high, exact = self._around(mantissa)
        match mode:
            case Rounding.TOWARD_ZERO:
                up = jnp.zeros(mantissa.shape, bool)
            case Rounding.TOWARD_POSITIVE:
                up = positive
            case Rounding.TOWARD_NEGATIVE:
                up = ~positive
            case _:  # to the odd k, counted over all octaves
                up = ((127 - (octave >> 23)) * self.gamma - count(mantissa, values[1:-1] - 1)) % 2 == 0
        return jnp.where(up & ~exact, high, low)

    def _drawn(self, octave, mantissa, mode: Rounding, draw: Draw, random_bits):
        """Rounded mantissa where chance decides between the two values around."""
        low, high, exact = self._around(mantissa)
        part = (mantissa - low).astype(jnp.float32) / (high - low).astype(jnp.float32)
        fraction = jnp.clip(part * np.float32(2.0**31), 0.0, np.float32(2.0**31 - 128)).astype(jnp.int32)
        return jnp.where(carries(mode, draw, random_bits, fraction) & ~exact, high, low)

    def _around(self, mantissa):
        """Mantissas of the value not above, of the next one, and whether the first is met exactly."""
        values, _ = _tables(self.gamma)
        low, high = (lookup(mantissa, values[1:-1] - 1, table) for table in (values[:-1], values[1:]))
        return low, high, low == mantissa


def lns(bits, gamma: int = 8) -> Logarithmic:
    """Logarithmic numbers of `bits` (2..16, sign included; may be traced), gamma (1..4096) values an octave. lns8: gamma 8."""
    if not isinstance(gamma, int) or not 1 <= gamma <= 4096:
        raise ValueError(f"gamma={gamma!r} must be an integer from 1 to 4096")
    return Logarithmic(whole("bits", bits, 2, 16), gamma)


_CACHE: dict[int, tuple[np.ndarray, np.ndarray]] = {}


def _tables(gamma: int) -> tuple[np.ndarray, np.ndarray]:
    """(int32[gamma + 1] mantissas of 2**(j / gamma), nearest float32, the last one 2**23; int32[gamma] floors of the mantissas of
    2**((j + 1/2) / gamma)), from 40 decimal digits."""
    if gamma not in _CACHE:
        with decimal.localcontext() as context:
            context.prec = 40
            step = decimal.Decimal(2) ** (decimal.Decimal(1) / (2 * gamma))
            powers = [decimal.Decimal(1)]
            for _ in range(2 * gamma - 1):
                powers.append(powers[-1] * step)
            mantissas = [(p - 1) * _OCTAVE for p in powers]
        values = [int(m.to_integral_value(decimal.ROUND_HALF_EVEN)) for m in mantissas[0::2]] + [_OCTAVE]
        middles = [int(m.to_integral_value(decimal.ROUND_FLOOR)) for m in mantissas[1::2]]
        _CACHE[gamma] = np.array(values, np.int32), np.array(middles, np.int32)
    return _CACHE[gamma]
