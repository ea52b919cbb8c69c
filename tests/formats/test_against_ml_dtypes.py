"""overflow="ieee" against ml_dtypes: every type it shares with us, over all float16, all bfloat16 and random float32.

Stated exceptions: float4 and float6 have no NaN; ml_dtypes makes it a zero there, here it stays NaN.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import formats
from tests.formats.oracle import all_float16, bits_equal, decode, probes, random_patterns

FLOAT8 = ("float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2",
          "float8_e5m2fnuz", "float8_e8m0fnu")
NO_NAN = ("float4_e2m1fn", "float6_e2m3fn", "float6_e3m2fn")
OTHER = ("float16", "bfloat16")
NAMES = FLOAT8 + NO_NAN + OTHER

all_bfloat16 = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16)
rounded = jax.jit(lambda x, element: formats.round_to(x, element, overflow="ieee"))


def native(x: np.ndarray, name: str) -> np.ndarray:
    """float32 of what ml_dtypes (numpy for float16) makes of float32 x."""
    dtype = np.float16 if name == "float16" else getattr(ml_dtypes, name)
    with np.errstate(over="ignore", invalid="ignore"):
        return x.astype(np.float32).astype(dtype).astype(np.float32)


def mismatches(x: np.ndarray, name: str, round_it=None) -> np.ndarray:
    element = formats.get(name)
    with np.errstate(over="ignore", invalid="ignore"):
        got = np.asarray((round_it or rounded)(jnp.asarray(x), element)).astype(np.float32)
        want = native(x, name).astype(x.dtype).astype(np.float32)
    wrong = ~bits_equal(got, want)
    with np.errstate(invalid="ignore"):
        is_nan = np.isnan(x.astype(np.float32))
    return x[wrong & ~is_nan] if name in NO_NAN else x[wrong]


@pytest.mark.parametrize("name", NAMES)
def test_every_float16(name):
    assert mismatches(all_float16(), name).size == 0


@pytest.mark.parametrize("name", NAMES)
def test_every_bfloat16(name):
    assert mismatches(all_bfloat16, name).size == 0


@pytest.mark.parametrize("name", NAMES)
def test_four_million_float32_patterns_and_scaled_normals(name):
    normal = np.random.default_rng(1).standard_normal(200_000) * 2.0 ** np.random.default_rng(2).uniform(-40, 20, 200_000)
    for x in (random_patterns(4_000_000), normal.astype(np.float32)):
        assert mismatches(x, name).size == 0


@pytest.mark.parametrize("name", NAMES)
def test_every_value_and_midpoint_within_two_ulp(name):
    dtype = np.float16 if name == "float16" else getattr(ml_dtypes, name)
    bits = 4 if name.startswith("float4") else 6 if name.startswith("float6") else 16 if name in OTHER else 8
    with np.errstate(invalid="ignore"):
        codes = np.arange(2**bits, dtype=np.uint16 if bits == 16 else np.uint8).view(dtype).astype(np.float64)
    values = codes[np.isfinite(codes) & (codes >= 0)]
    assert mismatches(probes(values), name).size == 0


@pytest.mark.parametrize("name", FLOAT8 + NO_NAN)
def test_eager_and_closed_over_widths_are_the_same_program(name):
    element, x = formats.get(name), jnp.asarray(random_patterns(20_000, seed=3))
    traced = np.asarray(rounded(x, element)).view(np.uint32)
    eager = np.asarray(formats.round_to(x, element, overflow="ieee")).view(np.uint32)
    static = np.asarray(jax.jit(lambda x: formats.round_to(x, element, overflow="ieee"))(x)).view(np.uint32)
    np.testing.assert_array_equal(eager, traced)
    np.testing.assert_array_equal(static, traced)


@pytest.mark.parametrize("name", NO_NAN)
def test_nan_stays_nan_where_the_format_has_none(name):
    x = jnp.array([np.nan, -np.nan], jnp.float32)
    for overflow in ("ieee", "saturate"):
        assert np.isnan(formats.quantize(x, name, overflow=overflow)).all()


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("float") and name != "float8_e8m0fnu"])
def test_code_table_is_that_of_ml_dtypes(name):
    """The oracle's decoder, used for the formats that ml_dtypes lacks, is right where it can be checked."""
    exp_bits, man_bits = int(formats.get(name).exp_bits), int(formats.get(name).man_bits)
    variant = "fnuz" if name.endswith("fnuz") else "fn" if name.endswith("fn") else "ieee"
    bias = 11 if "b11" in name else None
    info = ml_dtypes.finfo(np.float16 if name == "float16" else getattr(ml_dtypes, name))
    values = decode(exp_bits, man_bits, variant, bias)
    assert values[-1] == float(info.max) and values[1] == float(info.smallest_subnormal)
