"""How a value goes to a representable one: the rounding modes, what random bits decide, and what happens beyond the range."""

from __future__ import annotations

import dataclasses
import enum

import jax
import jax.numpy as jnp
import numpy as np

from formats import bits as fb


class Rounding(enum.Enum):
    """How a value between two representable ones goes to one of them (IEEE 754 names where it has one)."""

    NEAREST_EVEN = "nearest_even"
    NEAREST_AWAY = "nearest_away"
    NEAREST_ZERO = "nearest_zero"
    TOWARD_ZERO = "toward_zero"
    TOWARD_POSITIVE = "toward_positive"
    TOWARD_NEGATIVE = "toward_negative"
    TO_ODD = "to_odd"
    STOCHASTIC = "stochastic"
    STOCHASTIC_EQUAL = "stochastic_equal"

    @property
    def random(self) -> bool:
        """Whether the mode draws random bits."""
        return self in (Rounding.STOCHASTIC, Rounding.STOCHASTIC_EQUAL)


DETERMINISTIC = tuple(mode for mode in Rounding if not mode.random)


class Overflow(enum.Enum):
    """What becomes of a value beyond the largest. saturate: the largest, of infinities too (P3109 SatFinite); saturate_finite:
    the largest, but infinities stay infinite, or NaN, where the format can say so (P3109 SatPropagate); ieee: what IEEE 754
    and ml_dtypes do, inf where the format has it, else NaN, else the largest (P3109 OvfInf)."""

    SATURATE = "saturate"
    IEEE = "ieee"
    SATURATE_FINITE = "saturate_finite"


class StochasticRule(enum.Enum):
    """Which random bits decide a stochastic rounding. d: the dropped fraction of the spacing; k: number of bits; r: the k low
    bits of the random word. Up when: full: the dropped bits and as many random ones carry (probability exactly d); A:
    floor(d 2^k) + r >= 2^k; B: floor(d 2^(k+1)) + 2 r + 1 >= 2^(k+1); C: round_even(d 2^k) + r >= 2^k (P3109 3.1
    StochasticA, B, C; gfloat StochasticFastest, Fast, Stochastic). A is biased toward zero by half a step of 2^-k, B and C are not.
    d is exact on grids (minifloats, integers); between codebook levels and logarithmic numbers it is a float32 quotient."""

    FULL = "full"
    A = "A"
    B = "B"
    C = "C"


def parse(kind: type[enum.Enum], value, name: str | None = None):
    """The member of `kind` named by a string (members pass through); ValueError, which calls it `name`, lists what is accepted."""
    try:
        return kind(value)
    except ValueError:
        accepted = ", ".join(member.value for member in kind)
        raise ValueError(f"{name or kind.__name__.lower()}={value!r} must be one of {accepted}") from None


def mode_number(rounding) -> np.int32:
    """The number by which a deterministic mode may be passed where it has to be traced: its place in `DETERMINISTIC`."""
    mode = parse(Rounding, rounding)
    if mode.random:
        raise ValueError(f"rounding={mode.value!r} has no number; only {', '.join(m.value for m in DETERMINISTIC)} can be traced")
    return np.int32(DETERMINISTIC.index(mode))


def parse_rounding(value):
    """A Rounding, or an int32 scalar array: the `mode_number` of a deterministic mode (taken modulo nothing: it is clipped)."""
    if isinstance(value, (jax.Array, np.integer)):
        if not jnp.issubdtype(value.dtype, jnp.integer):
            raise ValueError(f"rounding has dtype {value.dtype}; a name or an integer mode number is needed")
        return jnp.clip(jnp.asarray(value, jnp.int32), 0, len(DETERMINISTIC) - 1)
    return parse(Rounding, value)


def by_mode(rounding, function):
    """function(mode) of a static mode, or the selection among all deterministic ones by a traced number."""
    if isinstance(rounding, Rounding):
        return function(rounding)
    result = function(DETERMINISTIC[0])
    for number, mode in enumerate(DETERMINISTIC[1:], start=1):
        result = jnp.where(rounding == number, function(mode), result)
    return result


@dataclasses.dataclass(frozen=True)
class Draw:
    """What a rounding with random bits does with them. bits: k (1..24), None with rule full, which takes as many as are dropped."""

    bits: int | None = None
    rule: StochasticRule = StochasticRule.FULL

    def __post_init__(self):
        if (self.bits is None) != (self.rule is StochasticRule.FULL):
            raise ValueError(f"sr_bits={self.bits} with sr_rule={self.rule.value!r}: a number of bits goes with the rules A, B and C, none with full")
        if self.bits is not None and not (isinstance(self.bits, int) and 1 <= self.bits <= 24):
            raise ValueError(f"sr_bits={self.bits!r} must be an integer from 1 to 24")

    @staticmethod
    def of(sr_bits=None, sr_rule="full", rounding=Rounding.STOCHASTIC) -> Draw:
        """Of the arguments of `quantize`; ValueError where they do not fit together."""
        draw = Draw(sr_bits, parse(StochasticRule, sr_rule, "sr_rule"))
        if sr_bits is not None and rounding is not Rounding.STOCHASTIC:
            raise ValueError(f"sr_bits={sr_bits} needs rounding='stochastic', got rounding={getattr(rounding, 'value', 'a traced mode')!r}")
        return draw


def random_increment(rounding: Rounding, draw: Draw, random_bits, pattern, shift):
    """int32 0 .. 2**shift - 1: what to add to `pattern` before its low `shift` bits (0..31, the dropped ones) are cleared, so that
    it carries where the draw says up. random_bits: int32 words, of which the low bits are used."""
    one, dropped = np.int32(1), ~(np.int32(-1) << shift)
    if rounding is Rounding.STOCHASTIC_EQUAL:
        return jnp.where(random_bits & 1 != 0, dropped, 0)
    if draw.rule is StochasticRule.FULL:
        return random_bits & dropped
    count = draw.bits
    drawn = random_bits & np.int32(2**count - 1)
    if draw.rule is StochasticRule.B:
        drawn, count = 2 * drawn + 1, count + 1
    spare = jnp.maximum(shift - count, 0)  # dropped bits that the drawn ones do not reach
    increment = jnp.where(shift >= count, drawn << spare, drawn >> jnp.maximum(count - shift, 0))
    if draw.rule is StochasticRule.C:
        odd = (pattern >> spare) & 1
        increment = increment + jnp.where(spare > 0, (((one << spare) >> 1) - 1) + odd, 0)
    return increment


def carries(rounding: Rounding, draw: Draw, random_bits, fraction):
    """bool: whether a value that lies `fraction` (int32, units of 2**-31, 0 .. 2**31 - 1) of the way up goes up."""
    return fraction + random_increment(rounding, draw, random_bits, fraction, np.int32(31)) < 0  # bit 31 is the sign


def as_float32(x):
    """x as float32 (float16 and bfloat16 are exact there); ValueError for any other dtype."""
    x = jnp.asarray(x)
    if x.dtype not in (jnp.float32, jnp.float16, jnp.bfloat16):
        raise ValueError(f"x has dtype {x.dtype}; float32, float16 or bfloat16 is needed")
    return x.astype(jnp.float32)


def ordered(pattern):
    """int32 that orders as the floats of these patterns do; both zeros are 0. Float comparisons would read subnormals as zero."""
    return jnp.where(pattern >= 0, pattern, -(pattern & fb.MAGNITUDE))
