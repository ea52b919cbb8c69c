"""Two-word bfloat16 arithmetic against exact fractions, under jit: where the compiler could take the roundings away."""
from __future__ import annotations

from fractions import Fraction

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from trainer.optimizers import expand, fast_two_sum, grow, mul, round_bfloat16, two_prod, two_sum

NUM = 1500


def _numbers(rng, spread: int):
    """Random bfloat16 values, as float32, over `spread` binades."""
    x = rng.normal(size=NUM) * np.exp2(rng.integers(-spread, spread + 1, NUM))
    return x.astype(ml_dtypes.bfloat16).astype(np.float32)


def _expansions(rng, spread: int):
    """Normalised: the second word at most half an ulp of the first."""
    x = _numbers(rng, spread)
    half_ulp = np.exp2(np.floor(np.log2(np.abs(x))) - 8)
    y = rng.uniform(-1, 1, NUM) * half_ulp * np.exp2(-rng.integers(0, 6, NUM))
    return x, y.astype(ml_dtypes.bfloat16).astype(np.float32)


def _bfloat16(q: Fraction) -> Fraction:
    """To 8 bits, ties to even: Python's own rounding of an exact quotient."""
    if q == 0:
        return q
    exponent = abs(q.numerator).bit_length() - q.denominator.bit_length()
    exponent -= abs(q) < Fraction(2) ** exponent
    quantum = Fraction(2) ** (exponent - 7)
    return round(q / quantum) * quantum


def _exactly(*arrays):
    return zip(*([Fraction(float(v)) for v in a] for a in arrays), strict=True)


PAIRS = [(0, "alike"), (4, "near"), (12, "far")]


@pytest.mark.parametrize(("spread", "name"), PAIRS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sums_and_products_lose_nothing(spread, name, dtype):
    rng = np.random.default_rng(spread)
    a, b = _numbers(rng, spread), _numbers(rng, spread)
    b[: NUM // 4] = -a[: NUM // 4] * np.float32(1.0078125)  # cancellation; not always on the grid
    b = b.astype(ml_dtypes.bfloat16).astype(np.float32)
    given = [jnp.asarray(v).astype(dtype) for v in (a, b)]
    for function, exact in ((two_sum, lambda p, q: p + q), (two_prod, lambda p, q: p * q)):
        x, y = jax.jit(function)(*given)
        assert x.dtype == y.dtype == jnp.float32
        for p, q, first, second in _exactly(a, b, x, y):
            assert first + second == exact(p, q) and first == _bfloat16(exact(p, q)), (function, p, q)


def test_fast_two_sum_is_exact_in_order_only():
    rng = np.random.default_rng(1)
    a, b = _numbers(rng, 4), _numbers(rng, 4)
    wrong = {}
    for order, (p, q) in {"sorted": (np.where(abs(a) >= abs(b), a, b), np.where(abs(a) >= abs(b), b, a)), "as it comes": (a, b)}.items():
        x, y = jax.jit(fast_two_sum)(p, q)
        wrong[order] = sum(first + second != s + t for s, t, first, second in _exactly(p, q, x, y))
    assert wrong["sorted"] == 0 and wrong["as it comes"] > NUM / 10


@pytest.mark.parametrize(("spread", "name"), PAIRS)
def test_grow_rounds_the_second_word_once(spread, name):
    rng = np.random.default_rng(10 + spread)
    (x, y), a = _expansions(rng, 2), _numbers(rng, spread)
    a[: NUM // 4] = -x[: NUM // 4]
    u, v = jax.jit(grow)(x, y, a)
    for p, q, r, first, second in _exactly(x, y, a, u, v):
        lead = _bfloat16(p + r)
        assert first + second == lead + _bfloat16(q + (p + r - lead)), (p, q, r)
        assert first == _bfloat16(first + second)  # normalised


def test_mul_follows_the_paper_and_is_good_to_thirteen_bits():
    rng = np.random.default_rng(3)
    (x, y), (z, w) = _expansions(rng, 6), _expansions(rng, 6)
    u, v = jax.jit(mul)(x, y, z, w)
    worst = 0
    for a, b, c, d, first, second in _exactly(x, y, z, w, u, v):
        lead = _bfloat16(a * c)
        error = _bfloat16(a * c - lead + _bfloat16(_bfloat16(a * d) + _bfloat16(b * c)))
        assert first + second == lead + error, (a, b, c, d)
        worst = max(worst, abs((first + second) / ((a + b) * (c + d)) - 1))
    assert worst < Fraction(1, 2**13), float(worst)


def test_expand_and_rounding_against_ml_dtypes():
    first, second = jax.jit(expand)(jnp.float32(0.999))
    assert float(first) == 1.0 and float(second) == float(ml_dtypes.bfloat16(-0.001)) == -0.00099945068359375
    x = (np.random.default_rng(4).normal(size=100_000) * 1e3).astype(np.float32)
    np.testing.assert_array_equal(jax.jit(round_bfloat16)(x), x.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_a_constant_average_with_beta2_of_0_999():
    """methods.md 2.3: 4000 steps of a constant square of 1e-2: 9.82e-3 is right, two words reach it, one stands still at 3.91e-3."""
    square = jnp.float32(ml_dtypes.bfloat16(1e-2))
    fresh = round_bfloat16(round_bfloat16(jnp.float32(1e-3)) * square)
    b2 = expand(jnp.float32(0.999))

    @jax.jit
    def averages():
        def step(carry, _):
            (v, dv), plain = carry
            return (grow(*mul(v, dv, *b2), fresh), round_bfloat16(round_bfloat16(b2[0] * plain) + fresh)), None

        zero = jnp.float32(0.0)
        return jax.lax.scan(step, ((zero, zero), zero), length=4000)[0]

    (first, second), plain = averages()
    truth = 1e-2 * (1 - 0.999**4000)
    assert f"{truth:.2e}" == "9.82e-03"
    assert f"{float(first) + float(second):.2e}" == "9.82e-03"
    assert f"{float(plain):.2e}" == "3.91e-03"
