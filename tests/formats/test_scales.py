"""Shared scales against an independent transcription of their definitions in numpy."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import formats
from formats.blocks import Granularity
from tests.formats.oracle import bits_equal, random_patterns, saturated, values_equal

# name: (mantissa bits, exponent of the quantum, largest value), from OCP MX v1.0 table 1 and OFP8
ELEMENTS = {"float8_e4m3fn": (3, -9, 448.0), "float8_e5m2": (2, -16, 57344.0), "float6_e2m3fn": (3, -3, 7.5),
            "float6_e3m2fn": (2, -4, 28.0), "float4_e2m1fn": (1, -1, 6.0), "int4": (30, 0, 7.0), "int8_f6": (30, -6, 127 / 64),
            "bfloat16": (7, -133, float.fromhex("0x1.fep127"))}
RULES = ("floor", "ceil", "rceil", "even", "rfloor", "rround")
split = jax.jit(formats.split, static_argnames=("rounding", "overflow", "reduce_max"))


def exponent_of(amax: float, name: str, rule: str) -> int:
    """E8M0 exponent of one block in float64 arithmetic (`formats.scales.Rule` in words)."""
    man_bits, _, largest = ELEMENTS[name]
    if amax < 2.0**-126:
        return -127
    if rule == "even":
        man_bits = int(formats.get(name).man_bits)
        step = 2.0 ** (math.frexp(amax)[1] - 1 - man_bits)
        amax = math.floor(amax / step + 0.5) * step
    fraction, exponent = math.frexp(amax)
    top_fraction, top = math.frexp(largest)
    shared = exponent - top + {"floor": 0, "even": 0, "ceil": fraction > 0.5, "rceil": fraction > top_fraction,
                                       "rfloor": -(fraction < top_fraction), "rround": round(math.log2(fraction / top_fraction))}[rule]
    return max(-127, min(127, 128 - top, shared))  # the largest value times the scale stays a float32


def power_of_two_blocks(x: np.ndarray, name: str, rule: str, rounding: str = "nearest_even") -> np.ndarray:
    """Rows of one block each, rounded on the grid of the element times 2**exponent, exactly."""
    man_bits, quantum_exp, largest = ELEMENTS[name]
    rows = []
    for row in x.astype(np.float64):
        if not np.isfinite(row).all():
            rows.append(np.full(row.shape, np.nan))
            continue
        shift = exponent_of(np.abs(row).max(), name, rule)
        high = largest * 2.0**shift
        rows.append(saturated(row, man_bits, max(quantum_exp + shift, -149), -high, high, rounding))
    return np.stack(rows)


def hard_rows(length: int) -> np.ndarray:
    """Rows whose amax sits at and an ulp around powers of two, multiples of 3/4 and 7/8 of them, and at the ends of the range."""
    rng = np.random.default_rng(0)
    edges = np.array([m * 2.0**e for e in (-149, -140, -127, -126, -125, -120, -118, -110, -20, -1, 0, 1, 3, 10, 100, 126, 127)
                      for m in (1, 1.25, 1.4375, 1.5, 1.75, 1.875, 1.9375, 1.984375)], np.float32)
    edges = (edges.view(np.int32)[:, None] + np.array([-1, 0, 1], np.int32)).clip(0, 0x7F7FFFFF).view(np.float32).reshape(-1, 1)
    rest = rng.uniform(-1, 1, (edges.size, length - 1)) * edges * 2.0 ** -rng.integers(0, 12, (edges.size, length - 1))
    rows = np.concatenate([edges, rest.astype(np.float32)], axis=1)
    special = np.zeros((5, length), np.float32)
    special[1, 3], special[2, 3], special[3, 0], special[4] = np.nan, np.inf, -np.inf, -0.0
    return np.concatenate([rng.permuted(rows, axis=1), rng.standard_normal((200, length)).astype(np.float32), special])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ELEMENTS)
def test_power_of_two_rules_are_exact_down_to_float32_subnormals(name, rule):
    x = hard_rows(32)
    got = np.asarray(formats.quantize(x, formats.block(formats.get(name), 32, rule=rule)))
    want = power_of_two_blocks(x, name, rule)
    assert values_equal(got, want).all()


def test_unsigned_elements_in_blocks_send_negative_values_to_zero_at_every_scale():
    x = hard_rows(8)
    got = np.asarray(formats.quantize(x, formats.block("uint4", 8)))
    amax = np.abs(x.astype(np.float64)).max(axis=1)
    for row, y, top in zip(x.astype(np.float64), got, amax):
        if np.isfinite(top):
            shift = max(-127, math.frexp(top)[1] - 4) if top >= 2.0**-126 else -127
            want = saturated(row, 30, max(shift, -149), 0, 15 * 2.0**shift)
            np.testing.assert_array_equal(y, want)
            assert not np.signbit(y).any()
        else:
            assert np.isnan(y).all()


@pytest.mark.parametrize("rounding", ["toward_zero", "nearest_away", "to_odd"])
def test_other_roundings_inside_blocks(rounding):
    x = hard_rows(16)
    got = np.asarray(formats.quantize(x, formats.block(formats.get("float4_e2m1fn"), 16, rule="ceil"), rounding=rounding))
    assert values_equal(got, power_of_two_blocks(x, "float4_e2m1fn", "ceil", rounding)).all()


def test_an_ulp_below_a_power_of_two_keeps_the_lower_exponent():
    """float32 log2 is one too large there: microxcaling, pychop and gfloat in float32 lose the 0.3 (it becomes 0)."""
    x = np.zeros(32, np.float32)
    x[:2] = np.nextafter(np.float32(8), np.float32(0)), 0.3
    np.testing.assert_array_equal(formats.quantize(x, "mxfp4")[:2], [6.0, 0.5])


def exact_rows(x: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(values, scale) of rows of one block each by float32 operations in the documented order."""
    man_bits, quantum_exp, largest = ELEMENTS[name]
    amax = np.abs(x).max(axis=1, keepdims=True)
    scale = np.where(amax > 0, amax / np.float32(largest), np.float32(1))
    return saturated(x * (np.float32(1) / scale), man_bits, quantum_exp, -largest, largest).astype(np.float32), scale


def normal_rows(num: int, length: int) -> np.ndarray:
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((num, length)) * 2.0 ** rng.uniform(-30, 30, (num, 1))
    rows[3] = 0.0
    return rows.astype(np.float32)


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float4_e2m1fn", "int4", "int8_f6"])
def test_exact_scales_are_the_same_numbers_however_the_program_is_made(name):
    """XLA turns division by a shared number into multiplication by its reciprocal; eager, jitted with constant widths,
    with traced ones and vmapped must still agree with numpy to the bit."""
    x = normal_rows(300, 24)
    values, scale = exact_rows(x, name)
    fmt = formats.scaled(formats.get(name), "token")
    ways = {"eager": formats.split(jnp.asarray(x), fmt), "static": jax.jit(lambda x: formats.split(x, fmt))(x),
            "traced": split(x, fmt),
            "vmapped": jax.vmap(lambda row: formats.split(row, formats.scaled(fmt.element)))(x),
            "mapped": jax.lax.map(lambda row: formats.split(row, formats.scaled(fmt.element)), jnp.asarray(x))}
    for way, (got_values, got_scale) in ways.items():
        np.testing.assert_array_equal(np.asarray(got_scale).reshape(scale.shape), scale, err_msg=way)
        np.testing.assert_array_equal(got_values, values, err_msg=way)
    np.testing.assert_array_equal(formats.quantize(x, fmt), values * scale)


def layouts():
    element = formats.get("float8_e4m3fn")
    yield formats.scaled(element, "tensor"), lambda x: x.reshape(1, -1), ()
    yield formats.scaled(element, "channel", axis=0), lambda x: np.moveaxis(x, 0, -1).reshape(-1, x.shape[0]), (1, 7, 40)
    yield formats.scaled(element, "token", axis=-1), lambda x: x.reshape(-1, x.shape[-1]), (6, 7, 1)
    yield formats.scaled(element, "channel", axis=-2), lambda x: np.moveaxis(x, 1, -1).reshape(-1, x.shape[1]), (6, 1, 40)


@pytest.mark.parametrize("layout", range(4))
def test_granularity_decides_who_shares(layout):
    fmt, to_rows, scale_shape = list(layouts())[layout]
    x = normal_rows(6 * 7, 40).reshape(6, 7, 40)
    values, scale = split(x, fmt)
    assert scale.shape == scale_shape and values.shape == x.shape
    want_values, want_scale = exact_rows(to_rows(x), "float8_e4m3fn")
    np.testing.assert_array_equal(to_rows(np.asarray(values)), want_values)
    np.testing.assert_array_equal(to_rows(np.broadcast_to(scale, x.shape))[:, :1], want_scale)


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
@pytest.mark.parametrize("size", [1, 5, 8, 16])
def test_blocks_run_along_their_axis_and_the_last_may_be_short(axis, size):
    """Each row is cut by itself: pychop's blocks run over row ends when the size does not divide."""
    x = normal_rows(6 * 9, 21).reshape(6, 9, 21)
    got = np.moveaxis(np.asarray(formats.quantize(x, formats.block(formats.get("float4_e2m1fn"), size, axis=axis))), axis, -1)
    rows = np.moveaxis(x, axis, -1)
    for start in range(0, rows.shape[-1], size):
        piece = rows[..., start : start + size]
        want = power_of_two_blocks(piece.reshape(-1, piece.shape[-1]), "float4_e2m1fn", "floor")
        np.testing.assert_array_equal(got[..., start : start + size], want.reshape(piece.shape))


@pytest.mark.parametrize("fmt", [formats.get("mxfp8_e4m3"), formats.get("mxint8"), formats.scaled("int4", "channel", axis=0),
                                 formats.scaled("float8_e5m2"), formats.scaled("float8_e5m2", rule="rceil"),
                                 formats.scaled("float4_e2m1fn", "block", block=16, scale_format="float8_e4m3fn")],
                         ids=lambda fmt: formats.describe(fmt)["name"])
@pytest.mark.parametrize("rounding", ["nearest_even", "stochastic"])
def test_values_times_scale_is_quantize_and_values_are_narrow(fmt, rounding):
    x = normal_rows(48, 64)
    key = jax.random.key(0) if rounding == "stochastic" else None
    values, scale = split(x, fmt, rounding=rounding, key=key)
    np.testing.assert_array_equal(values * scale, formats.quantize(x, fmt, rounding=rounding, key=key))
    np.testing.assert_array_equal(formats.quantize(values, fmt.element), values)
    assert np.isfinite(values).all() and (np.asarray(scale) > 0).all()


def test_scales_in_a_narrow_format_are_rounded_to_it_and_never_to_zero():
    """float8_e4m3fn scales (one level of NVFP4): nearest, at least 2**-9 (torchao stops at 2**-6), at most 448."""
    x = np.concatenate([normal_rows(200, 16), np.full((1, 16), 1e-6, np.float32), np.full((1, 16), 1e6, np.float32)])
    _, scale = split(x, formats.scaled("float4_e2m1fn", "block", block=16, scale_format="float8_e4m3fn"))
    amax = np.abs(x).max(axis=1)
    want = saturated(amax / np.float32(6), 3, -9, 2.0**-9, 448.0)
    np.testing.assert_array_equal(scale[:, 0], np.where(amax == 0, 1.0, want))
    assert float(scale[-2, 0]) == 2.0**-9 and float(scale[-1, 0]) == 448.0


EXACT = [formats.scaled("float8_e4m3fn"), formats.scaled("int4", "token"), formats.scaled("float4_e2m1fn", "block", block=8)]
ALL = [*EXACT, formats.get("mxfp4"), formats.scaled("float8_e5m2", rule="ceil")]


@pytest.mark.parametrize("fmt", ALL, ids=lambda fmt: formats.describe(fmt)["name"])
def test_special_blocks(fmt):
    """Zeros stay zeros with their sign where the element has one; a NaN or an infinity makes its whole block NaN."""
    zeros = np.zeros((2, 32), np.float32)
    zeros[1] = -0.0
    got = np.asarray(formats.quantize(zeros, fmt))
    assert (got == 0).all() and (np.signbit(got) == (np.signbit(zeros) & bool(fmt.element.signed_zero))).all()
    values, scale = split(zeros, fmt)
    assert (values == 0).all() and np.isfinite(scale).all() and (np.asarray(scale) > 0).all()
    for bad in (np.nan, np.inf, -np.inf):
        x = np.ones((2, 32), np.float32)
        x[1, 5] = bad
        got, (values, scale) = np.asarray(formats.quantize(x, fmt)), split(x, fmt)
        spoiled = {Granularity.TENSOR: np.s_[:], Granularity.TOKEN: np.s_[1]}.get(fmt.granularity, np.s_[1, : fmt.block])
        for result in (got, np.broadcast_to(scale, x.shape), np.asarray(values * scale)):
            assert np.isnan(result[spoiled]).all() and np.isnan(result).sum() == np.isnan(result[spoiled]).size


@pytest.mark.parametrize("fmt", EXACT, ids=lambda fmt: formats.describe(fmt)["name"])
def test_tiny_and_huge_blocks_under_exact_scales(fmt):
    """amax just above 2**-126 keeps its bits (scale 2**-126); a subnormal amax counts as zero; the largest stays finite."""
    tiny = np.full((2, 32), 2.0**-125, np.float32)
    np.testing.assert_array_equal(formats.quantize(tiny, fmt), tiny)
    assert (np.asarray(split(tiny, fmt)[1]) == 2.0**-126).all()
    subnormal = np.full((2, 32), 1e-40, np.float32)
    assert (np.asarray(formats.quantize(subnormal, fmt)) == 0).all() and (np.asarray(split(subnormal, fmt)[1]) == 1).all()
    huge = np.full((2, 32), 3e38, np.float32)
    np.testing.assert_allclose(formats.quantize(huge, fmt), huge, rtol=2**-23)
    two_bits = formats.scaled("int2", fmt.granularity, block=fmt.block)
    np.testing.assert_array_equal(formats.quantize(huge, two_bits), np.full_like(huge, 2.0**126))


@pytest.mark.parametrize("fmt", ALL, ids=lambda fmt: formats.describe(fmt)["name"])
def test_float32_member_of_a_traced_cohort_is_untouched(fmt):
    """The identity as element, through the program that serves the narrow ones: scale 1 and every bit kept."""
    x = random_patterns(64 * 32, seed=2).reshape(64, 32)
    member = dataclasses.replace(fmt, element=formats.identity())
    stacked = jax.tree.map(lambda a, b: jnp.stack([a, b]), fmt, member)
    values, scale = jax.jit(jax.vmap(formats.split, in_axes=(None, 0)))(x, stacked)
    assert (np.asarray(scale[1]) == 1.0).all()
    whole = jax.vmap(lambda f: formats.quantize(jnp.asarray(x), f))(stacked)
    assert bits_equal(whole[1], x).all()
    if fmt.rule is formats.Rule.EXACT:
        assert bits_equal(values[1], x).all()
    narrow = split(x, fmt)
    assert bits_equal(values[0], narrow[0]).all() and bits_equal(scale[0], narrow[1]).all()


def test_scales_of_a_sharded_tensor_come_from_all_of_it():
    x, fmt = normal_rows(16, 24), formats.scaled("float8_e4m3fn", rule="floor")
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.PartitionSpec("rows")
    def shard(x):
        return split(x, fmt, reduce_max=lambda amax: jax.lax.pmax(amax, "rows"))
    values, scale = jax.jit(jax.shard_map(shard, mesh=mesh, in_specs=rows, out_specs=(rows, jax.sharding.PartitionSpec())))(x)
    whole_values, whole_scale = split(x, fmt)
    np.testing.assert_array_equal(values, whole_values)
    assert scale == whole_scale


@pytest.mark.parametrize("rule", ["exact", *RULES])
def test_a_given_amax_replaces_the_current_one_and_what_exceeds_it_saturates(rule):
    x = np.array([[0.1, 0.5, 3.0, -1e30, np.inf, np.nan, -0.0, 2.0**-140]], np.float32)
    for fmt, amax in ((formats.scaled("float8_e4m3fn", rule=rule), np.float32(2.0)),
                      (formats.scaled("float8_e4m3fn", "block", block=4, rule=rule), np.full((1, 2), 2.0, np.float32))):
        values, scale = split(x, fmt, amax=amax)
        scale = float(np.unique(np.asarray(scale)).item())
        current = split(np.float32([2.0] * 8), formats.scaled("float8_e4m3fn", rule=rule))[1]
        assert scale == float(current)
        want = saturated(x * (np.float32(1) / np.float32(scale)), 3, -9, -448, 448)
        assert values_equal(values, want).all()


@pytest.mark.parametrize(("make", "complaint"), [
    (lambda: formats.scaled("int4", "row"), "granularity='row' must be one of tensor, channel, token, block"),
    (lambda: formats.scaled("int4", rule="round"), "rule='round' must be one of exact, floor, ceil, rceil, even"),
    (lambda: formats.scaled("int4", "block"), "block=None with granularity='block'"),
    (lambda: formats.scaled("int4", "tensor", block=32), "block=32 with granularity='tensor'"),
    (lambda: formats.block("int4", 0), "block=0 with axis=-1 must be a positive integer"),
    (lambda: formats.scaled("int4", rule="floor", scale_format="float16"), "scale_format='float16' with rule='floor' must be"),
    (lambda: formats.scaled("mxfp4"), "element=.* must be an element format"),
    (lambda: formats.scaled("float8_e8m0fnu"), "has no zero"),
    (lambda: formats.quantize(jnp.ones((2, 3)), formats.scaled("int4", "token", axis=2)), "axis=2 of the format must be a dimension"),
])
def test_what_does_not_fit_together_is_refused(make, complaint):
    with pytest.raises(ValueError, match=complaint):
        make()


def test_nothing_to_quantize():
    for fmt in ALL:
        assert formats.quantize(jnp.zeros((3, 0)), fmt).shape == (3, 0)
        assert formats.quantize(jnp.zeros((0, 8)), fmt).shape == (0, 8)
