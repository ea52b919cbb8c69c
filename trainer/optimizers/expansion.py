"""Two-word bfloat16 numbers: the exact arithmetic that Collage (Yu et al. 2024, arXiv 2405.03637) is built on.

An expansion (x, y) stands for the unevaluated sum x + y, with y at most half a unit in the last place of x. The operations are those
of Dekker (1971), Knuth (TAOCP 2, 4.2.2) and Shewchuk (1997); "exact" means that no bit of the result is lost.

Every function takes float32 or bfloat16 arrays that hold bfloat16 values, of shapes that broadcast, and returns float32 arrays that
hold bfloat16 values: `store` makes real bfloat16 of them, losing nothing. Each operation is done in float32 and then rounded, which
is correctly rounded bfloat16 arithmetic, since 24 >= 2 * 8 + 2 (Figueroa 1995, for +, -, *, / and sqrt). The rounding is
`lax.reduce_precision`, never a cast there and back, which XLA may delete (xla_allow_excess_precision); its exponent is as wide as
float32's, so it has no range of its own to be wrong about.

Limits: an overflow is not exact, and NaN follows it. XLA on CPU reads and writes float32 subnormals as zero, and bfloat16 has the same
subnormals: an error term below 2**-126 is lost there, that is, in a sum only of numbers below 2**-117, in a product one below 2**-117.
"""
from __future__ import annotations

import jax.numpy as jnp
from jax import lax

EXPONENT_BITS, MANTISSA_BITS = 8, 7  # of bfloat16


def round_bfloat16(x):
    """float32 -> the nearest bfloat16 value (ties to even), as float32. Exact operands make any one operation exact in bfloat16."""
    return lax.reduce_precision(x, EXPONENT_BITS, MANTISSA_BITS)


def store(x):
    """bfloat16 array of float32 values that are on its grid (others are rounded to nearest)."""
    return x.astype(jnp.bfloat16)


def _wide(*numbers):
    return tuple(jnp.asarray(x).astype(jnp.float32) for x in numbers)


def fast_two_sum(a, b):
    """(x, y) with x = bf16(a + b) and x + y == a + b exactly, if |a| >= |b| or a == 0; else y may be off (Dekker 1971)."""
    a, b = _wide(a, b)
    x = round_bfloat16(a + b)
    return x, round_bfloat16(b - round_bfloat16(x - a))


def two_sum(a, b):
    """(x, y) with x = bf16(a + b) and x + y == a + b exactly, in any order of magnitudes (Knuth)."""
    a, b = _wide(a, b)
    x = round_bfloat16(a + b)
    b_there = round_bfloat16(x - a)
    a_there = round_bfloat16(x - b_there)
    return x, round_bfloat16(round_bfloat16(a - a_there) + round_bfloat16(b - b_there))


def two_prod(a, b):
    """(x, y) with x = bf16(a * b) and x + y == a * b exactly. The paper's FMA is a float32 product here: 8 by 8 bits are exact in 24."""
    a, b = _wide(a, b)
    product = a * b
    x = round_bfloat16(product)
    return x, round_bfloat16(product - x)


def grow(x, y, a):
    """The expansion (x, y) plus a number a, as an expansion: its error is one rounding of the second word.

    Collage, algorithm "Grow", with `two_sum` in place of its Fast2Sum: an update or a new square may be larger than what it is added to.
    """
    x, y, a = _wide(x, y, a)
    u, v = two_sum(x, a)
    # u is 0 or no smaller than y + v: u is a multiple of half an ulp of x unless it is of its size, and y is at most half an ulp
    return fast_two_sum(u, round_bfloat16(y + v))


def mul(x, y, z, w):
    """The product of the expansions (x, y) and (z, w) as an expansion, but for y * w and three roundings of the second word (Collage,
    algorithm "Mul"): relative error below 2**-13."""
    x, y, z, w = _wide(x, y, z, w)
    product, error = two_prod(x, z)
    cross = round_bfloat16(round_bfloat16(x * w) + round_bfloat16(y * z))
    return fast_two_sum(product, round_bfloat16(error + cross))


def expand(number):
    """(x, y): the two-word expansion of float32 numbers, x = bf16(number) and y = bf16(number - x); 0.999 is (1.0, -0.00099945)."""
    (number,) = _wide(number)
    x = round_bfloat16(number)
    return x, round_bfloat16(number - x)
