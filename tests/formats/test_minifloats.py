"""Minifloats of any widths against their code tables, in every deterministic mode, with widths fixed and traced."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import formats
from tests.formats.oracle import (
    DETERMINISTIC,
    bits_equal,
    decode,
    grid,
    probes,
    random_patterns,
    saturated,
    values_equal,
)

SMALL = [(exp_bits, man_bits, variant) for variant in ("ieee", "fn", "fnuz") for exp_bits in range(6)
         for man_bits in range(5) if decode(exp_bits, man_bits, variant).max(initial=0) > 0]
LARGE = [(8, 0, "ieee"), (8, 1, "fnuz"), (8, 2, "fn"), (8, 7, "ieee"), (8, 10, "fnuz"), (8, 23, "ieee"), (7, 23, "ieee"),
         (6, 9, "fn"), (0, 8, "fn"), (1, 23, "ieee"), (0, 23, "ieee"), (5, 20, "fnuz")]


def widths(exp_bits, man_bits, variant):
    """(man_bits, quantum_exp, largest) from first principles; largest is capped at what float32 holds with man_bits."""
    bias = 0 if exp_bits == 0 else 2 ** (exp_bits - 1) - (0 if variant == "fnuz" else 1)
    if exp_bits + man_bits <= 12:
        largest = decode(exp_bits, man_bits, variant).max()
    elif variant == "ieee" and exp_bits > 0:
        top = 2**exp_bits - 2
        largest = (2.0 - 2.0**-man_bits) * 2.0 ** (top - bias) if top else (1 - 2.0**-man_bits) * 2.0
    elif exp_bits == 0:
        largest = (1 - 2.0**-man_bits) * 2.0
    else:  # the widest float32 with these mantissa bits, or the format's own top
        largest = (2.0 - 2.0**-man_bits * (2 if variant == "fn" else 1)) * 2.0 ** (2**exp_bits - 1 - bias)
    return man_bits, 1 - bias - man_bits, min(largest, (2.0 - 2.0**-man_bits) * 2.0**127)


@jax.jit
def _traced(x, exp_bits, man_bits):
    return {v: formats.round_to(x, formats.minifloat(exp_bits, man_bits, v)) for v in ("ieee", "fn", "fnuz")}


def test_every_small_format_holds_exactly_its_code_table():
    """All values map to themselves, and nothing else comes out, for 80 formats under one compiled program."""
    before = _traced._cache_size()
    for exp_bits, man_bits, variant in SMALL:
        values = decode(exp_bits, man_bits, variant)
        x = np.zeros(2**14, np.float32)
        hard = probes(values)
        x[: hard.size] = hard
        got = np.asarray(_traced(x, exp_bits, man_bits)[variant])
        want = saturated(x, *widths(exp_bits, man_bits, variant)[:2], -values.max(), values.max())
        assert values_equal(got, want).all(), (exp_bits, man_bits, variant)
        assert set(np.abs(got[~np.isnan(got)]).tolist()) == set(values.tolist()), (exp_bits, man_bits, variant)
    assert _traced._cache_size() - before == 1


@pytest.mark.parametrize("case", LARGE)
def test_wide_formats_including_those_with_normals_among_float32_subnormals(case):
    man_bits, quantum_exp, largest = widths(*case)
    x = random_patterns(100_000, seed=4)
    x[:20_000] = (x[:20_000].view(np.uint32) & np.uint32(0x80FFFFFF)).view(np.float32)  # the two lowest binades
    want = saturated(x, man_bits, max(quantum_exp, -149), -largest, largest)
    got = np.asarray(formats.quantize(jnp.asarray(x), formats.minifloat(*case)))
    assert values_equal(got, want).all()


@pytest.mark.parametrize("rounding", DETERMINISTIC)
@pytest.mark.parametrize("case", [(4, 3, "fn"), (2, 1, "fn"), (5, 2, "ieee"), (8, 7, "ieee"), (3, 0, "fn"), (8, 3, "fnuz")])
def test_modes(case, rounding):
    man_bits, quantum_exp, largest = widths(*case)
    x = np.concatenate([probes(decode(*case)), random_patterns(20_000, seed=5)])
    want = saturated(x, man_bits, max(quantum_exp, -149), -largest, largest, rounding)
    got = np.asarray(formats.quantize(jnp.asarray(x), formats.minifloat(*case), rounding=rounding))
    assert values_equal(got, want).all()
    assert (np.signbit(got) == np.signbit(x))[~np.isnan(x) & ((want != 0) | (case[2] != "fnuz"))].all()


@pytest.mark.parametrize("rounding", DETERMINISTIC)
def test_ieee_overflow_goes_to_infinity_only_where_the_mode_rounds_outward(rounding):
    """IEEE 754-2019 section 7.4, on float8_e5m2: finite values past the largest, and infinities."""
    x = np.array([57344, 57345, 61439, 61440, 65536, 1e30, np.inf], np.float32)
    x = np.concatenate([x, -x])
    unbounded = grid(np.where(np.isinf(x), 0, x), 2, -16, rounding)
    want = np.where(np.abs(unbounded) > 57344, np.sign(x) * np.inf, unbounded)
    inward = {"toward_zero": np.full(x.shape, True), "toward_positive": x < 0, "toward_negative": x > 0}
    want = np.where(inward.get(rounding, False) & np.isinf(want), np.sign(x) * 57344, want)
    want = np.where(np.isinf(x), x, want)
    got = np.asarray(formats.quantize(x, "float8_e5m2", rounding=rounding, overflow="ieee"))
    np.testing.assert_array_equal(got, want)


def test_to_odd_then_nearest_is_nearest():
    """Boldo and Melquiond 2008: odd rounding to p + 2 or more bits does not disturb a later rounding to p bits."""
    x = jnp.asarray(random_patterns(200_000, seed=6))
    odd = formats.quantize(x, formats.minifloat(8, 9), rounding="to_odd")
    for name in ("float8_e5m2", "bfloat16", "float8_e4m3fn"):
        assert bits_equal(formats.quantize(odd, name), formats.quantize(x, name)).all()


def test_float32_is_the_identity_to_the_bit_in_every_mode():
    x = random_patterns(200_000, seed=7)
    x[:5] = [0.0, -0.0, np.inf, -np.inf, 1e-45]
    for rounding in DETERMINISTIC:
        for overflow in ("saturate", "ieee"):
            y = formats.round_to(jnp.asarray(x), formats.identity(), rounding=rounding, overflow=overflow)
            np.testing.assert_array_equal(np.asarray(y).view(np.uint32), x.view(np.uint32))
    bits = jnp.asarray(random_patterns(x.size, seed=8).view(np.uint32))
    y = formats.round_to(jnp.asarray(x), formats.identity(), rounding="stochastic", random_bits=bits)
    np.testing.assert_array_equal(np.asarray(y).view(np.uint32), x.view(np.uint32))


def test_without_mantissa_bits_ties_go_to_the_larger_power_of_two():
    x = jnp.array([3.0, -3.0, 1.5, 0.75, 6.0], jnp.float32)
    np.testing.assert_array_equal(formats.quantize(x, formats.minifloat(4, 0, "fn")), [4, -4, 2, 1, 8])


def test_all_elements_share_one_treedef_and_stack():
    """One vmapped program over int3, int4, float4, float8 and float32: each row as it is alone."""
    elements = [formats.integer(3), formats.integer(4), formats.get("float4_e2m1fn"), formats.get("float8_e4m3fn"),
                formats.get("float8_e8m0fnu"), formats.identity()]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *elements)
    x = jnp.asarray(random_patterns(2_000, seed=9))
    together = jax.jit(jax.vmap(formats.round_to, in_axes=(None, 0)))(x, stacked)
    for row, element in zip(together, elements):
        np.testing.assert_array_equal(np.asarray(row).view(np.uint32), np.asarray(formats.round_to(x, element)).view(np.uint32))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((9, 3), "exp_bits=9 must be an integer from 0 to 8"),
        ((4, 24), "man_bits=24 must be"),
        ((4, 3.5), "man_bits=3.5 must be an integer"),
        ((4, 3, "ocp"), "variant='ocp' must be one of ieee, fn, fnuz"),
        ((1, 0), "holds no number but zero"),
        ((0, 0, "fn"), "holds no number but zero"),
        ((4, 3, "fn", -100000), "bias=-100000 must be"),
    ],
)
def test_impossible_widths_are_refused(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        formats.minifloat(*arguments)
