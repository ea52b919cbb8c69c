"""Integers and fixed point against numpy.rint and exact fractions."""

from __future__ import annotations

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import formats
from tests.formats.oracle import random_patterns, saturated

X = np.concatenate([np.arange(-40, 40) / 8, np.random.default_rng(0).normal(0, 50, 5_000), [0.5, 1.5, 2.5, -0.5, -1.5],
                    np.nextafter(np.float32(0.5), np.float32([0, 1])), [1e30, -1e30, np.inf, -np.inf]]).astype(np.float32)


@pytest.mark.parametrize("bits", range(2, 17))
@pytest.mark.parametrize("kind", ["symmetric", "full", "unsigned"])
def test_integers_are_rint_and_clip(bits, kind):
    low, high = {"symmetric": (-(2 ** (bits - 1)) + 1, 2 ** (bits - 1) - 1), "full": (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1),
                 "unsigned": (0, 2**bits - 1)}[kind]
    element = formats.integer(bits, signed=kind != "unsigned", symmetric=kind != "full")
    got = np.asarray(formats.quantize(X, element))
    np.testing.assert_array_equal(got, np.clip(np.rint(X), low, high))
    assert not np.signbit(got[got == 0]).any()  # an integer has no negative zero
    assert int(element.bits) == bits


def test_fixed_point_in_exact_fractions():
    """8 bits, 5 of them fraction: multiples of 1/32, ties to even, by rational arithmetic."""
    got = np.asarray(formats.quantize(X, formats.integer(8, fraction_bits=5)))
    finite = np.isfinite(X)
    want = [max(min(round(Fraction(float(x)) * 32), 127), -127) / 32 for x in X[finite]]  # Python rounds ties to even
    np.testing.assert_array_equal(got[finite], np.float32(want))


def test_fixed_point_grid_may_be_coarser_than_one():
    element = formats.integer(4, fraction_bits=-3)
    x = random_patterns(10_000, seed=1)
    np.testing.assert_array_equal(formats.quantize(x, element), saturated(x, 30, 3, -56, 56) + 0.0)


def test_traced_bits_are_the_same_numbers_in_one_program():
    program = jax.jit(lambda x, bits: formats.quantize(x, formats.integer(bits)))
    for bits in range(2, 17):
        np.testing.assert_array_equal(program(X, bits), formats.quantize(X, f"int{bits}"))
    assert program._cache_size() == 1


def test_saturation_is_all_that_integers_have():
    x = jnp.array([1e9, -1e9, np.inf, -np.inf], jnp.float32)
    np.testing.assert_array_equal(formats.quantize(x, "int4", overflow="ieee"), [7, -7, 7, -7])


@pytest.mark.parametrize(("arguments", "complaint"), [
    ((1,), "bits=1 must be an integer from 2 to 24"),
    ((25,), "bits=25 must be"),
    ((4.0,), "bits=4.0 must be an integer"),
    ((jnp.float32(4),), "bits must be an integer, got dtype float32"),
])
def test_impossible_bits_are_refused(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        formats.integer(*arguments)
