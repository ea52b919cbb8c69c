"""Codes against ml_dtypes and an independent code table; stored arrays against what `quantize` gives."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from orbax.checkpoint import v1 as orbax

import formats
from formats import codes, packing
from tests.formats.oracle import bits_equal, decode

NATIVE = [name for name in formats.names() if hasattr(ml_dtypes, name) and not name.startswith("int")] + ["float16"]


@pytest.mark.parametrize("name", NATIVE)
def test_codes_are_those_of_ml_dtypes(name):
    """Every code to its value and back; NaN to the NaN that a cast gives."""
    element, dtype = formats.get(name), np.dtype(getattr(ml_dtypes, name, np.float16))
    width = codes.stored_bits(element)
    every = np.arange(2**width, dtype=np.uint32).astype(np.uint8 if width <= 8 else np.uint16)
    values = every.view(dtype).astype(np.float32)
    got = np.asarray(codes.from_codes(jnp.asarray(every), element))
    assert bits_equal(got, values).all()
    back = np.asarray(codes.to_codes(jnp.asarray(values), element, width))
    number = ~np.isnan(values)
    np.testing.assert_array_equal(back[number], every[number])
    quiet = np.array([np.nan], np.float32).astype(dtype).view(every.dtype)[0]
    assert np.isnan(values).any() == (formats.get(name).has_nan and True)
    assert set(back[~number]) <= {quiet, quiet ^ every.dtype.type(1 << (width - 1))}


@pytest.mark.parametrize(("exp_bits", "man_bits", "variant", "bias"), [
    (3, 1, "fnuz", None), (2, 2, "ieee", None), (0, 4, "fn", None), (5, 0, "fn", None), (4, 3, "fn", -20), (6, 5, "ieee", 100),
    (8, 2, "ieee", None), (8, 7, "fn", 127), (3, 4, "fn", 130)])
def test_codes_follow_the_code_table(exp_bits, man_bits, variant, bias):
    """Signed values in code order, from the table of the tests' own oracle, widths concrete and traced."""
    element = formats.minifloat(exp_bits, man_bits, variant, bias)
    table = decode(exp_bits, man_bits, variant, bias)
    table = table[table <= float(element.max_value)]
    traced = jax.tree.map(jnp.asarray, element)
    for fmt in (element, traced):
        got = np.asarray(codes.from_codes(jnp.arange(len(table), dtype=jnp.uint16), fmt))
        np.testing.assert_array_equal(got.view(np.int32), table.astype(np.float32).view(np.int32))
        width = 1 + exp_bits + man_bits
        back = np.asarray(codes.to_codes(jnp.asarray(-table[1:], jnp.float32), fmt, width))
        np.testing.assert_array_equal(back, np.arange(1, len(table)) + 2 ** (width - 1))


@pytest.mark.parametrize("element", [formats.get("float8_e8m0fnu"), formats.minifloat(3, 2, "ieee", 140), formats.minifloat(0, 4, "fn", 127)])
def test_limits_that_are_float32_subnormals_may_be_traced(element):
    """Their comparison with zero is not a float one: XLA on CPU would take 2**-127 for zero, and lose signs and NaN."""
    width = codes.stored_bits(element)
    every, traced = jnp.arange(2**width, dtype=jnp.uint8), jax.tree.map(jnp.asarray, element)
    values = codes.from_codes(every, element)
    assert bits_equal(jax.jit(codes.from_codes)(every, traced), values).all()
    back = jax.jit(codes.to_codes, static_argnums=2)(values, traced, width)
    np.testing.assert_array_equal(back, codes.to_codes(values, element, width))


@pytest.mark.parametrize(("name", "width"), [("int8", 8), ("int4", 4), ("int4_full", 4), ("int16", 16), ("int8_f3", 8)])
def test_signed_integers_are_twos_complement(name, width):
    element = formats.get(name)
    scale = float(element.max_value) / (2 ** (width - 1) - 1)
    whole = np.arange(round(float(element.min_value) / scale), 2 ** (width - 1))
    got = np.asarray(codes.to_codes(jnp.asarray(whole * scale, jnp.float32), element, width))
    np.testing.assert_array_equal(got, whole % 2**width)
    np.testing.assert_array_equal(codes.from_codes(jnp.asarray(got), element), (whole * scale).astype(np.float32))


def test_four_bits_are_adjacent_pairs_and_six_fill_three_bytes():
    assert np.asarray(packing.pack(jnp.array([1, 2, 3], jnp.uint8), 4)).tolist() == [0x21, 0x03]
    assert np.asarray(packing.pack(jnp.array([0x3F, 0, 0, 1], jnp.uint8), 6)).tolist() == [0x3F, 0, 4]


STORED = [*formats.names(), "float5_e3m1fnuz", "int16", "uint4", "int8_f3", "lns4", "lns16", "dybit5", "bfp4"]
SHAPED = {"tiles": formats.scaled("float8_e4m3fn", "block", block=(4, 4), axis=(-2, -1)),
          "channel": formats.scaled("int4", "channel", axis=0), "affine": formats.scaled("uint4", "token", zero_point=True),
          "pre": formats.block("float4_e2m1fn", 32, pre_scale=0.75), "codebook": formats.scaled("nf4", "block", block=8),
          "powers": formats.scaled("nf4", "block", block=8, rule="floor"), "lns": formats.scaled("lns8", "token")}


@pytest.mark.parametrize("name", [*STORED, *SHAPED])
def test_decoded_is_quantized_bit_for_bit(name):
    """Ordinary numbers, every bit pattern, zeros and subnormals; NaN apart where the format cannot say it (they are counted)."""
    fmt = SHAPED.get(name) or formats.get(name)
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 2**32, (6, 96), dtype=np.uint64).astype(np.uint32).view(np.float32)
    ordinary = rng.standard_normal((6, 96)).astype(np.float32)
    for x in (ordinary, patterns, np.zeros_like(ordinary), ordinary * np.float32(1e-38)):
        stored = formats.encode(jnp.asarray(x), fmt)
        want = np.asarray(formats.quantize(jnp.asarray(x), fmt))
        same = bits_equal(stored.decode(), want)
        if stored.num_nan is not None:
            assert int(stored.num_nan) == np.isnan(x).sum()
            same |= np.isnan(x)
        assert same.all()


def test_sizes_are_what_the_format_says():
    x = jnp.ones((64, 64), jnp.float32)
    assert formats.encode(x, "mxfp4").nbytes == 64 * 64 // 2 + 64 * 2
    assert formats.encode(x, "nvfp4").nbytes == 64 * 64 // 2 + 64 * 4 + 4
    assert formats.encode(x, "mxfp6_e2m3").nbytes == 64 * 48 + 64 * 2
    assert formats.encode(x, formats.scaled("int8", "token")).nbytes == 64 * 64 + 64 * 4
    assert formats.encode(x, formats.scaled("uint3", "token", zero_point=True)).nbytes == 64 * 24 + 64 * 4 + 64
    assert formats.encode(x, "float16").nbytes == 2 * 64 * 64


def test_a_stored_array_passes_jit_and_keeps_dtype_and_randomness():
    x = jnp.asarray(np.random.default_rng(1).standard_normal((4, 64)), jnp.bfloat16)
    key = jnp.array([3, 4], jnp.uint32)
    stored = jax.jit(lambda x: formats.encode(x, "mxfp8_e4m3", rounding="stochastic", key=key))(x)
    want = formats.quantize(x, "mxfp8_e4m3", rounding="stochastic", key=key)
    got = jax.jit(lambda q: q.decode())(stored)
    assert got.dtype == jnp.bfloat16 and bits_equal(got.astype(jnp.float32), want.astype(jnp.float32)).all()
    stacked = jax.tree.map(lambda a: jnp.stack([a, a]), stored)
    assert jax.tree.structure(stacked) == jax.tree.structure(stored) and "mxfp8_e4m3" in repr(stored)


def test_a_stored_array_survives_orbax(tmp_path):
    stored = formats.encode(jnp.linspace(-3, 3, 64), "nvfp4")
    orbax.save(tmp_path / "q", {"w": stored})
    loaded = orbax.load(tmp_path / "q", {"w": jax.tree.map(jnp.zeros_like, stored)})["w"]
    assert isinstance(loaded, formats.QArray) and bits_equal(loaded.decode(), stored.decode()).all()


def test_traced_widths_cannot_be_stored():
    with pytest.raises(ValueError, match="encode needs a format with concrete widths"):
        jax.jit(lambda bits: formats.encode(jnp.ones(4), formats.integer(bits)).codes)(4)
