"""Exact arithmetic to hold formats/ against: values as Python integers in units of 2**-300, never a float operation.

A float32 is a multiple of 2**-149, every value of every format and every half between two of them is a multiple of 2**-300, also
after a shared scale of 2**-127 .. 2**127. Formats are tables made from their code definitions; rounding is a search in the table.
"""

from __future__ import annotations

import dataclasses
import decimal
from bisect import bisect_left, bisect_right
from fractions import Fraction

import numpy as np

UNIT = 300
MODES = ("nearest_even", "nearest_away", "nearest_zero", "toward_zero", "toward_positive", "toward_negative", "to_odd")
OVERFLOWS = ("saturate", "ieee", "saturate_finite")
NAN, INF = 0x7FC00000, 0x7F800000


def patterns(x) -> list[int]:
    """Bit patterns of a float32 array."""
    return np.asarray(x, np.float32).view(np.uint32).ravel().tolist()


def floats(bits) -> np.ndarray:
    """float32 of bit patterns."""
    return np.array(list(bits), np.uint64).astype(np.uint32).view(np.float32)


def to_units(pattern: int) -> int:
    """|x| of a finite float32 pattern."""
    field, man = pattern >> 23 & 255, pattern & 0x7FFFFF
    return (man | (1 << 23 if field else 0)) << (max(field, 1) - 150 + UNIT)


def to_pattern(n: int, negative: bool) -> int:
    """Pattern of a number of units that is a float32 exactly; ArithmeticError otherwise."""
    sign = int(negative) << 31
    exponent = n.bit_length() - 1 - UNIT
    drop = max(exponent, -126) - 23 + UNIT
    significand = n >> drop
    if significand << drop != n or exponent > 127:
        raise ArithmeticError(f"{n} units are not a float32")
    return sign | (significand if exponent < -126 else ((exponent + 127) << 23) + significand - (1 << 23))


def nearest_float32(value: Fraction) -> np.float32:
    """Round to nearest even of a positive Fraction in the normal range."""
    exponent = value.numerator.bit_length() - value.denominator.bit_length()
    exponent -= value < Fraction(2) ** exponent
    significand = round(value / Fraction(2) ** (exponent - 23))  # Python rounds a Fraction half to even
    return floats([to_pattern(significand << (exponent - 23 + UNIT), False)])[0]


def fraction_of(x) -> Fraction:
    """The exact value of one finite float32."""
    return Fraction(float(x))


@dataclasses.dataclass(frozen=True)
class Grid:
    """magnitudes: increasing from 0, and at least one past the largest; high, low: places of the largest positive and negative one.
    powers: whether there is no mantissa, where the significand of a power of two is odd and a tie goes up."""

    magnitudes: list[int]
    high: int
    low: int
    inf: bool = False
    nan: bool = False
    minus_zero: bool = False
    powers: bool = False

    def neighbours(self, n: int) -> tuple[int, int, int]:
        """(place not above n, n less that, spacing to the next); the place of the last one for all beyond it."""
        place = bisect_right(self.magnitudes, n) - 1
        if place >= len(self.magnitudes) - 1:
            return len(self.magnitudes) - 1, 0, 1
        return place, n - self.magnitudes[place], self.magnitudes[place + 1] - self.magnitudes[place]

    def up(self, place: int, rest: int, spacing: int, negative: bool, mode: str) -> bool:
        """Whether a magnitude between two goes to the upper one."""
        if rest == 0:
            return False
        even = place == 0 if self.powers else place % 2 == 0
        match mode:
            case "toward_zero":
                return False
            case "toward_positive":
                return not negative
            case "toward_negative":
                return negative
            case "to_odd":
                return even
            case "nearest_even":
                tie = place > 0 if self.powers else place % 2 == 1
            case _:
                tie = mode == "nearest_away"
        return 2 * rest > spacing or (2 * rest == spacing and tie)

    def settle(self, place: int, negative: bool, mode: str, overflow: str, infinite: bool = False, exponent: int = 0) -> int:
        """Pattern of the value at a place of the grid times 2**exponent, whose range ends where the format's does."""
        limit = self.low if negative else self.high
        if infinite or place > limit:
            inward = mode == "toward_zero" or mode == ("toward_positive" if negative else "toward_negative")
            special = overflow == "ieee" and (infinite or not inward) or overflow == "saturate_finite" and infinite
            if special and self.inf:
                return int(negative) << 31 | INF
            if special and self.nan:
                return NAN
            place = limit
        if place == 0:
            return int(negative and self.minus_zero) << 31
        n = self.magnitudes[place]
        return to_pattern(n << exponent if exponent >= 0 else n >> -exponent, negative)

    def round(self, pattern: int, mode: str, overflow: str = "saturate", exponent: int = 0) -> int:
        """Pattern of a float32 pattern rounded to the grid times 2**exponent."""
        magnitude, negative = pattern & 0x7FFFFFFF, bool(pattern >> 31)
        if magnitude > INF:
            return NAN
        if magnitude == INF:
            return self.settle(len(self.magnitudes), negative, mode, overflow, infinite=True, exponent=exponent)
        n = to_units(magnitude)
        n = n >> exponent if exponent >= 0 else n << -exponent  # multiples of 2**-149 over at most 2**127: exact
        place, rest, spacing = self.neighbours(n)
        return self.settle(place + self.up(place, rest, spacing, negative, mode), negative, mode, overflow, exponent=exponent)

    def fraction(self, pattern: int) -> tuple[int, Fraction]:
        """(place not above |x|, how far |x| is on the way to the next one)."""
        place, rest, spacing = self.neighbours(to_units(pattern & 0x7FFFFFFF))
        return place, Fraction(rest, spacing)


def minifloat(exp_bits: int, man_bits: int, variant: str = "ieee", bias: int | None = None) -> Grid:
    """By its codes: the field 0 is subnormal; ieee keeps the top field, fn (above 6 bits) the top code, fnuz the code of -0."""
    if bias is None:
        bias = 0 if exp_bits == 0 else 2 ** (exp_bits - 1) - (0 if variant == "fnuz" else 1)

    def value(code: int) -> int:
        field, man = code >> man_bits, code & ((1 << man_bits) - 1)
        significand = man + ((1 << man_bits) if field else 0)
        return significand << (max(field, 1) - bias - man_bits + UNIT)

    count = 1 << (exp_bits + man_bits)
    inf = nan = False
    if variant == "ieee" and exp_bits:
        count, inf, nan = count - (1 << man_bits), True, man_bits > 0
    elif variant == "fn" and exp_bits + man_bits > 5:
        count, nan = count - 1, True
    elif variant == "fnuz":
        nan = True
    top = count - 1
    return Grid([value(code) for code in range(count + 1)], top, top, inf, nan, variant != "fnuz", powers=man_bits == 0)


def integer(bits: int, signed: bool = True, symmetric: bool = True, fraction_bits: int = 0) -> Grid:
    """Multiples of 2**-fraction_bits."""
    high = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    low = (high if symmetric else high + 1) if signed else 0
    return Grid([k << (UNIT - fraction_bits) for k in range(high + 3)], high, low)


@dataclasses.dataclass(frozen=True)
class Table:
    """A codebook: its levels in signed units, from the float32 ones."""

    levels: list[int]

    @staticmethod
    def of(levels) -> Table:
        return Table([to_units(p & 0x7FFFFFFF) * (-1 if p >> 31 else 1) for p in patterns(levels)])

    def value(self, place: int) -> int:
        n = self.levels[place]
        return to_pattern(abs(n), n < 0)

    def fraction(self, pattern: int) -> tuple[int, Fraction]:
        """(place of the level not above x, how far x is on the way to the next one), x within the levels."""
        n = to_units(pattern & 0x7FFFFFFF) * (-1 if pattern >> 31 else 1)
        n = min(max(n, self.levels[0]), self.levels[-1])
        place = min(bisect_right(self.levels, n) - 1, len(self.levels) - 2)
        return place, Fraction(n - self.levels[place], self.levels[place + 1] - self.levels[place])

    def round(self, pattern: int, mode: str, overflow: str = "saturate") -> int:
        del overflow
        if pattern & 0x7FFFFFFF > INF:
            return NAN
        if pattern & 0x7FFFFFFF == INF:
            return self.value(0 if pattern >> 31 else -1)
        place, part = self.fraction(pattern)
        if part in (0, 1):
            return self.value(place + int(part))
        low, high = self.levels[place : place + 2]
        up = {"toward_zero": low < 0, "toward_positive": True, "toward_negative": False, "to_odd": place % 2 == 0}.get(mode)
        if up is None:
            # between -a and a, neither further from zero than the other, up: binary() takes zero as +1
            tie = {"nearest_even": place % 2 == 1, "nearest_away": abs(high) > abs(low), "nearest_zero": abs(high) < abs(low)}[mode]
            tie = tie or abs(high) == abs(low)
            up = part > Fraction(1, 2) or (part == Fraction(1, 2) and tie)
        return self.value(place + up)


@dataclasses.dataclass(frozen=True)
class Logs:
    """2**(-k / gamma), nearest float32, k = 0 .. last; thresholds of the nearest modes from 60 decimal digits."""

    magnitudes: list[int]  # increasing
    middles: list[int]  # floor, in units, of the irrational thresholds between them
    last: int  # k of the smallest

    @staticmethod
    def of(bits: int, gamma: int) -> Logs:
        last = min(2 ** (bits - 1) - 1, 126 * gamma)
        with decimal.localcontext() as context:
            context.prec = 140  # 60 digits after the point, and as many before it as units of 2**-300 need

            def power(numerator: int) -> decimal.Decimal:
                return decimal.Decimal(2) ** (decimal.Decimal(numerator) / (2 * gamma))

            magnitudes, middles = [], []
            for k in range(last, -1, -1):
                exponent = -(-k // gamma)  # octave below which the value lies
                significand = power(2 * (exponent * gamma - k)) * 2**23
                whole = int(significand.to_integral_value(decimal.ROUND_HALF_EVEN))
                magnitudes.append(whole << (UNIT - exponent - 23))
                if k:
                    middles.append(int(power(-(2 * k - 1)) * 2**UNIT))
        return Logs(magnitudes, middles, last)

    def round(self, pattern: int, mode: str, overflow: str = "saturate") -> int:
        del overflow
        magnitude, negative = pattern & 0x7FFFFFFF, bool(pattern >> 31)
        if magnitude > INF:
            return NAN
        top = len(self.magnitudes) - 1
        n = self.magnitudes[top] if magnitude == INF else min(max(to_units(magnitude), self.magnitudes[0]), self.magnitudes[top])
        if mode.startswith("nearest"):
            place = bisect_left(self.middles, n)  # how many thresholds' floors lie below n
        else:
            place = bisect_right(self.magnitudes, n) - 1
            odd_k = (self.last - place) % 2 == 1
            outward = {"toward_zero": False, "toward_positive": not negative, "toward_negative": negative, "to_odd": not odd_k}[mode]
            place += n != self.magnitudes[place] and outward
        return to_pattern(self.magnitudes[place], negative)


def goes_up(part: Fraction, rule: str, k: int, r: int) -> bool:
    """The k-bit truth tables of the stochastic rules (P3109 3.1), part of the spacing in 0 .. 1."""
    if rule == "A":
        return part * 2**k // 1 + r >= 2**k
    if rule == "B":
        return part * 2 ** (k + 1) // 1 + 2 * r + 1 >= 2 ** (k + 1)
    return round(part * 2**k) + r >= 2**k


def floor_log2(value: Fraction) -> int:
    """floor(log2 value), exactly."""
    exponent = value.numerator.bit_length() - value.denominator.bit_length()
    return exponent - (value < Fraction(2) ** exponent)


def shared_exponent(amax: Fraction, largest: Fraction, man_bits: int, rule: str) -> int:
    """Exponent of an E8M0 scale (OCP MX v1.0, and the other rules as torchao and cuBLAS have them), in -127 .. 127, and no higher than
    keeps the largest value times the scale below 2**128."""
    if amax < Fraction(1, 2**126):
        return -127
    match rule:
        case "floor":
            exponent = floor_log2(amax) - floor_log2(largest)
        case "ceil":
            exponent = -floor_log2(1 / amax) - floor_log2(largest)  # -floor(-t) is ceil(t)
        case "rceil":
            exponent = -floor_log2(largest / amax)
        case _:
            spacing = Fraction(2) ** (floor_log2(amax) - man_bits)
            exponent = floor_log2((amax / spacing + Fraction(1, 2)) // 1 * spacing) - floor_log2(largest)
    return min(max(exponent, -127), 127, 127 - floor_log2(largest))
