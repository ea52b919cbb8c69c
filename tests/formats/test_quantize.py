"""The entry: dtypes, gradients, refusals; and properties that hold for every format and mode."""

from __future__ import annotations

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import formats
from tests.formats.oracle import DETERMINISTIC, bits_equal

X = jnp.array([0.3, -1e-4, 1000.0, 1 / 3, -7.0, 0.0], jnp.float32)


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float4_e2m1fn", "mxfp4", "int4", "bfloat16"])
def test_straight_through_passes_the_cotangent_unrounded(name):
    """The implicit rule of a cast rounds it instead: 1/3 becomes 0.34375 and 1000 becomes NaN in float8_e4m3fn."""
    cotangent = jnp.array([1 / 3, 1e-4, 1000.0, -3e-30, 1.1, 7.7], jnp.float32)
    for q in (lambda x: formats.quantize(x, name), jax.jit(lambda x: formats.quantize(x, name))):
        y, pull = jax.vjp(q, X)
        np.testing.assert_array_equal(pull(cotangent)[0], cotangent)
        np.testing.assert_array_equal(jax.jvp(q, (X,), (cotangent,))[1], cotangent)
        np.testing.assert_array_equal(y, formats.quantize(X, name, gradient="none"))


def test_gradient_none_is_zero_and_noise_and_widths_have_no_gradient():
    zero = jax.grad(lambda x: formats.quantize(x, "int4", gradient="none").sum())(X)
    np.testing.assert_array_equal(zero, jnp.zeros_like(X))
    one = jax.grad(lambda x: formats.quantize(x, "mxfp4", rounding="stochastic", key=jax.random.key(0)).sum())(X)
    np.testing.assert_array_equal(one, jnp.ones_like(X))
    per_width = jax.vmap(jax.grad(lambda x, bits: (formats.quantize(x, formats.integer(bits)) ** 2).sum()), in_axes=(None, 0))
    got = per_width(X, jnp.array([3, 4, 8]))
    np.testing.assert_array_equal(got, 2 * np.stack([formats.quantize(X, f"int{bits}") for bits in (3, 4, 8)]))
    narrow = jax.grad(lambda x: formats.blocks.split(x, formats.scaled("int4"))[0].sum())(X)
    np.testing.assert_array_equal(narrow, jnp.zeros_like(X))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("name", ["float8_e5m2", "mxfp4", "int8"])
def test_narrow_inputs_give_their_own_dtype_and_the_float32_answer(dtype, name):
    x = jnp.asarray(np.random.default_rng(0).normal(0, 3, (16, 64)), jnp.float32).astype(dtype)
    y = formats.quantize(x, name)
    assert y.dtype == dtype
    np.testing.assert_array_equal(y.astype(jnp.float32), formats.quantize(x.astype(jnp.float32), name))


def test_python_and_numpy_inputs():
    assert formats.quantize(0.3, "float4_e2m1fn") == 0.5
    np.testing.assert_array_equal(formats.quantize(np.float32([0.02, 2.5]), "int4"), [0.0, 2.0])


@pytest.mark.parametrize(("given", "complaint"), [
    ({"format": "e4m3"}, r"format='e4m3' does not say which one: its maximum is 240 .*, 448 .* or 480"),
    ({"format": "e5m2"}, "use one of float8_e5m2, float8_e5m2fn, float8_e5m2fnuz"),
    ({"format": "fp7"}, "format='fp7' is not known; accepted: float8_e3m4, "),
    ({"format": 4}, "format=4 must be a catalogue name"),
    ({"rounding": "up"}, "rounding='up' must be one of nearest_even, nearest_away"),
    ({"overflow": "wrap"}, "overflow='wrap' must be one of saturate, ieee"),
    ({"gradient": "ste"}, "gradient='ste' must be one of straight_through, clipped, none"),
    ({"rounding": "stochastic"}, "rounding='stochastic' needs key=... or random_bits=..."),
    ({"key": jnp.zeros(2, jnp.uint32)}, "key and random_bits need rounding='stochastic', got rounding='nearest_even'"),
    ({"rounding": "stochastic", "key": jnp.zeros(2, jnp.uint32), "random_bits": jnp.zeros(6, jnp.uint32)}, "exclude each other"),
    ({"rounding": "stochastic", "random_bits": jnp.zeros(5, jnp.uint32)}, r"random_bits must be uint32 of shape \(6,\)"),
    ({"rounding": "stochastic", "random_bits": jnp.zeros(6, jnp.int32)}, r"random_bits must be uint32 of shape \(6,\)"),
    ({"x": jnp.arange(6)}, "x has dtype int32; float32, float16 or bfloat16 is needed"),
])
def test_refusals_are_one_line_that_names_what_was_given(given, complaint):
    arguments = {"x": X, "format": "float8_e4m3fn", **given}
    with pytest.raises(ValueError, match=complaint) as refusal:
        formats.quantize(arguments.pop("x"), arguments.pop("format"), **arguments)
    assert "\n" not in str(refusal.value)


NAMES = [name for name in formats.names() if name not in ("float8_e8m0fnu", "float32")]
ELEMENTS = [name for name in NAMES if isinstance(formats.get(name), formats.Element)]
arrays = hnp.arrays(np.float32, 64, elements=st.floats(width=32, allow_nan=False, allow_infinity=False))
quick = hypothesis.settings(max_examples=60, deadline=None, derandomize=True)


@quick
@hypothesis.given(arrays, st.sampled_from(ELEMENTS), st.sampled_from(DETERMINISTIC))
def test_rounding_is_idempotent_monotone_and_bounded(x, name, rounding):
    x = np.sort(x)
    y = np.asarray(formats.quantize(x, name, rounding=rounding))
    assert bits_equal(formats.quantize(y, name, rounding=rounding), y).all()
    assert (np.diff(y) >= 0).all()
    assert np.abs(y).max() <= float(formats.get(name).max_value)


@quick
@hypothesis.given(arrays, st.sampled_from([name for name in NAMES if name not in ("nf4", "binary")]),
                  st.sampled_from(["nearest_even", "nearest_away", "toward_zero", "to_odd"]))
def test_symmetric_formats_round_symmetrically(x, name, rounding):
    y = formats.quantize(x, name, rounding=rounding)
    np.testing.assert_array_equal(formats.quantize(-x, name, rounding=rounding), -y)


@quick
@hypothesis.given(arrays, st.sampled_from([name for name in NAMES if name.startswith("mx")]), st.integers(-60, 60))
def test_power_of_two_blocks_follow_powers_of_two(x, name, shift):
    """Scaling a block by 2**k scales the result by 2**k, exactly, away from the ends of the range."""
    x = np.where(np.abs(x) < 2.0**-40, 0, np.clip(x, -(2.0**40), 2.0**40)).astype(np.float32)
    factor = np.float32(2.0**shift)
    np.testing.assert_array_equal(np.asarray(formats.quantize(x * factor, name)), np.asarray(formats.quantize(x, name)) * factor)


@quick
@hypothesis.given(arrays, st.sampled_from([name for name in NAMES if name.startswith("mx")]))
def test_power_of_two_blocks_settle(x, name):
    """A block of representable values is left alone once its scale repeats (after the first pass it may drop, not rise)."""
    y = np.asarray(formats.quantize(x, name))
    np.testing.assert_array_equal(formats.quantize(y, name), y)


@quick
@hypothesis.given(arrays, st.integers(0, 8), st.integers(0, 23), st.sampled_from(["ieee", "fn", "fnuz"]))
def test_nearest_is_within_half_a_spacing(x, exp_bits, man_bits, variant):
    hypothesis.assume(exp_bits + man_bits > 1)
    element = formats.minifloat(exp_bits, man_bits, variant)
    x = np.clip(x, element.min_value, element.max_value)
    y = np.asarray(_rounded(x, element), np.float64)
    exponent = np.frexp(x.astype(np.float64))[1] - 1
    spacing = np.ldexp(1.0, np.maximum(exponent - man_bits, int(element.quantum_exp)))
    assert (np.abs(y - x) <= spacing / 2).all()


_rounded = jax.jit(formats.round_to)
