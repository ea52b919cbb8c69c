"""Block formats against exact arithmetic, and storage: decode of encode is quantize, bytes are those of ml_dtypes."""

from __future__ import annotations

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import formats
from tests.formats import fractions_oracle as exact
from tests.formats.fractions_oracle import floats, patterns
from tests.formats.test_exact import IRREGULAR, check, grid_marks, is_float32, probes

# Blocks

MX = {
    "mxfp8_e4m3": (exact.minifloat(4, 3, "fn"), 3),
    "mxfp8_e5m2": (exact.minifloat(5, 2), 2),
    "mxfp6_e2m3": (exact.minifloat(2, 3, "fn"), 3),
    "mxfp6_e3m2": (exact.minifloat(3, 2, "fn"), 2),
    "mxfp4": (exact.minifloat(2, 1, "fn"), 1),
    "mxint8": (exact.integer(8, fraction_bits=6), 7),
}
RULES = ("floor", "ceil", "rceil", "even")


def largest(grid: exact.Grid) -> Fraction:
    return Fraction(grid.magnitudes[grid.high], 2**exact.UNIT)


def block_rows(grid: exact.Grid, man_bits: int, num: int, seed: int) -> np.ndarray:
    """float32[num, 32]: rows whose amax is at a place where a rule turns, one ulp below and above it, at the ends of float32, NaN or
    infinite; the other values are ties of the grid near that scale, and small ones."""
    rng = np.random.default_rng(seed)
    turns = [Fraction(1), largest(grid), (2 - Fraction(1, 2 ** (man_bits + 1))), Fraction(3, 2), Fraction(9, 8)]
    tops = []
    for k in (-149, -140, -127, -126, -125, -124, -60, -3, -1, 0, 1, 2, 3, 7, 30, 100, 118, 122, 124, 125, 126, 127):
        for turn in turns:
            n = int(turn * Fraction(2) ** k * 2**exact.UNIT)
            if n.bit_length() - 1 - exact.UNIT <= 127 and is_float32(n):
                tops.extend(p for p in (exact.to_pattern(n, False) + d for d in (-1, 0, 1)) if 0 <= p < exact.INF)
    tops = [0, 0, 1, 0x7FFFFF, 0x800000, 0x7F7FFFFF, 0x7F7FFFFE, exact.NAN, exact.INF, *dict.fromkeys(tops)]
    assert len(tops) <= num, len(tops)
    tops = np.resize(np.array(tops, np.uint32), num).view(np.float32)
    marks = probes(grid_marks(grid))
    marks = marks[np.isfinite(marks) & (np.abs(marks) <= float(largest(grid)))]
    with np.errstate(all="ignore"):
        shift = np.floor(np.log2(np.where((tops > 0) & np.isfinite(tops), tops, 1).astype(np.float64))) - math.floor(math.log2(largest(grid)))
        rows = np.ldexp(rng.choice(marks, (num, 32)).astype(np.float64), shift[:, None].astype(int) + rng.integers(-1, 2, (num, 1)))
        rows = rows.astype(np.float32)
        top = np.where(np.isfinite(tops), tops, np.float32(np.inf))[:, None]
        rows = np.where(np.abs(rows) <= top, rows, np.float32(-0.0))
        rows[np.arange(num), rng.integers(0, 32, num)] = tops * rng.choice(np.array([-1, 1], np.float32), num)
    return rows


def exact_blocks(x, grid: exact.Grid, man_bits: int, rule: str, mode: str = "nearest_even") -> list[int]:
    """Each row of x a block."""
    result = []
    for row in x:
        bits = patterns(row)
        top = max(p & 0x7FFFFFFF for p in bits)
        if top >= exact.INF:
            result.extend([exact.NAN] * len(bits))
            continue
        exponent = exact.shared_exponent(Fraction(exact.to_units(top), 2**exact.UNIT), largest(grid), man_bits, rule)
        result.extend(grid.round(p, mode, exponent=exponent) for p in bits)
    return result


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", MX)
def test_mx_blocks_at_scale_boundaries(name, rule):
    grid, man_bits = MX[name]
    x = block_rows(grid, man_bits, 352, seed=3)
    element = formats.get(name).element
    want = exact_blocks(x, grid, man_bits, rule)
    check(formats.quantize(x, formats.block(element, 32, rule=rule)), want, x, f"{name} {rule}")
    ordinary = np.isfinite(x).all(1) & (np.abs(x).max(1) > 2.0**-60) & (np.abs(x).max(1) < 2.0**60)  # the quicker branch
    few = np.resize(x[ordinary], (64, 32))
    check(formats.quantize(few, formats.block(element, 32, rule=rule)), exact_blocks(few, grid, man_bits, rule), few, f"{name} {rule} ordinary")


@pytest.mark.parametrize("mode", ["toward_zero", "nearest_away", "toward_positive", "to_odd"])
def test_mx_blocks_in_other_modes_by_traced_rule_and_mode(mode):
    grid, man_bits = MX["mxfp4"]
    x = block_rows(grid, man_bits, 352, seed=4)
    for rule in ("floor", "rceil"):
        fmt = formats.block("float4_e2m1fn", 32, rule=formats.rule_number(rule))
        got = formats.quantize(x, fmt, rounding=formats.mode_number(mode))
        check(got, exact_blocks(x, grid, man_bits, rule, mode), x, f"mxfp4 {rule} {mode}")


def test_tiles_short_blocks_and_the_first_axis():
    """(16, 16) tiles; rows of 45 = 32 + 13; columns."""
    grid, man_bits = MX["mxfp4"]
    x = block_rows(grid, man_bits, 352, seed=5)[9:, :]
    flat = x[np.isfinite(x).all(1)].ravel()
    square = np.resize(flat, (40, 45))
    got = np.asarray(formats.quantize(square, formats.block("float4_e2m1fn", (16, 16), axis=(-2, -1))))
    for i in range(0, 40, 16):
        for j in range(0, 45, 16):
            tile = square[i : i + 16, j : j + 16]
            want = exact_blocks(tile.reshape(1, -1), grid, man_bits, "floor")
            check(got[i : i + 16, j : j + 16], want, tile, f"tile {i} {j}")
    rows = np.asarray(formats.quantize(square, "mxfp4"))
    columns = np.asarray(formats.quantize(square.T.copy(), formats.block("float4_e2m1fn", 32, axis=0)))
    for first, last in ((0, 32), (32, 45)):
        part = np.ascontiguousarray(square[:, first:last])
        want = exact_blocks(part, grid, man_bits, "floor")
        check(rows[:, first:last], want, part, "rows")
        check(np.ascontiguousarray(columns[first:last].T), want, part, "columns")


@pytest.mark.parametrize("name", MX)
def test_pre_scale_three_quarters_never_clips_under_floor(name):
    """Documented (Quartet, section 4.3): the scale is that of x, the values are 3/4 of it, so that none lies beyond the largest."""
    grid, man_bits = MX[name]
    top = np.arange(1.0, 2.0, 2.0**-5, dtype=np.float32)
    x = np.zeros((top.size, 32), np.float32)
    x[:, 0], x[:, 1] = top, -top / 3
    fmt = formats.block(formats.get(name).element, 32, rule="floor", pre_scale=0.75)
    gradient = np.asarray(jax.grad(lambda v: formats.quantize(v, fmt, gradient="clipped").sum())(jnp.asarray(x)))
    assert (gradient == 1).all(), f"{name}: {top[gradient[:, 0] != 1]} count as clipped"
    y = np.asarray(formats.quantize(x, fmt))
    for i in range(top.size):
        exponent = exact.shared_exponent(Fraction(float(top[i])), largest(grid), man_bits, "floor")
        for column in (0, 1):
            v = x[i, column] * np.float32(0.75)
            assert abs(Fraction(float(v))) <= largest(grid) * Fraction(2) ** exponent
            want = Fraction(float(floats([grid.round(patterns(v)[0], "nearest_even", exponent=exponent)])[0])) * 4 / 3
            assert abs(Fraction(float(y[i, column])) - want) <= abs(want) / 2**23, f"{name}: {x[i, column]} -> {y[i, column]}"


def numpy_nvfp4(x):
    """float32 steps as documented: tensor amax / (448 * 6); block amax / 6 / tensor, rounded to e4m3 but never to zero; the product's
    reciprocal times x, rounded to e2m1, times the product."""
    e4m3, e2m1 = exact.minifloat(4, 3, "fn"), exact.minifloat(2, 1, "fn")
    f = np.float32
    amax = np.abs(x.reshape(-1, 16)).max(axis=1)
    tensor = np.clip(amax.max() / f(2688.0), f(2.0**-126), f(2.0**126)) if amax.max() >= f(2.0**-126) else f(1.0)
    y = []
    for block, top in zip(x.reshape(-1, 16), amax, strict=True):
        scale = f(1.0)
        if top >= f(2.0**-126):
            scale = floats([e4m3.round(patterns(top / f(6.0) / tensor)[0], "nearest_even")])[0]
            scale = max(scale, f(2.0**-9))
        factor = np.clip(scale * tensor, f(2.0**-126), f(2.0**126))
        inverse = f(1.0) / factor
        y.append(floats([e2m1.round(p, "nearest_even") for p in patterns(block * inverse)]) * factor)
    return np.stack(y).reshape(x.shape)


@pytest.mark.parametrize("size", [1.0, 3.7e-5, 2.0**-60, 1e30])
def test_nvfp4_with_tiny_blocks(size):
    """Block amax from the tensor's down to 2**-14 of it: the block scale is an e4m3 normal, a subnormal, or would round to zero."""
    rng = np.random.default_rng(6)
    falls = np.exp2(-np.linspace(0.0, 22.0, 64)).astype(np.float32)
    x = rng.standard_normal((64, 16)).astype(np.float32) * falls[:, None] * np.float32(size)
    x[7] = 0
    x[8] = np.float32(-0.0)
    # amax / 6 at multiples and halves of the smallest e4m3 scale, 2**-9 of the tensor scale
    top = np.abs(x).max()
    x[20:30] = 0
    x[20:30, 3] = top * np.float32(2.0**-9 / 448) * np.array([0.25, 0.45, 0.55, 1, 1.3, 1.6, 2, 2.7, 7, 7.3], np.float32)
    x[20:30, 4] = -x[20:30, 3] / 3
    got = np.asarray(formats.quantize(x, "nvfp4"))
    want = numpy_nvfp4(x)
    check(got, patterns(want), x, f"nvfp4 {size}")
    values, scale = formats.split(x, formats.get("nvfp4"))
    check(values * scale, patterns(want), x, "split")
    for bad in (np.nan, np.inf, -np.inf):
        x[5, 5] = bad
        assert np.isnan(formats.quantize(x, "nvfp4")).all()


def test_nvfp4_block_scale_is_two_float32_quotients_also_at_its_ties():
    """Documented: amax / 6 / tensor scale, both quotients in float32. A compiler that divides by the product, 6 times the tensor scale,
    is an ulp off, which at a tie of e4m3 is the neighbouring scale. One value a block, amax an ulp around each tie."""
    f, tensor = np.float32, np.float32(1) / np.float32(2688)
    ties = (np.arange(1, 16) + 0.5) * 2.0**-9
    tops = (ties * 6 * float(tensor)).astype(f)
    tops = (tops.view(np.int32)[:, None] + np.arange(-3, 4, dtype=np.int32)).view(f).ravel()
    x = np.zeros((tops.size + 1, 16), f)
    x[:, 0] = [1.0, *tops]
    want = np.maximum(x[:, 0] / f(6) / tensor, f(2.0**-9)).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    stored = formats.encode(x, "nvfp4")
    assert float(stored.tensor_scale) == tensor
    got = np.asarray(stored.scales).ravel()
    wrong = [f"amax {float(x[i, 0]).hex()}: code {got[i]}, documented {want[i]}" for i in np.flatnonzero(got != want)]
    assert not wrong, f"{len(wrong)} of {want.size}: {wrong[:5]}"


@pytest.mark.parametrize("fmt_args", [(8, True, False), (4, False, True), (3, True, True)])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_zero_points_by_numpy(fmt_args, granularity):
    bits, signed, symmetric = fmt_args
    element, f = formats.integer(bits, signed=signed, symmetric=symmetric), np.float32
    low_code, high_code = float(element.min_value), float(element.max_value)
    rng = np.random.default_rng(bits)
    x = (rng.standard_normal((6, 48)) * 3 + np.array([0, 2, -2, 9, -9, 0])[:, None]).astype(f)
    x[5] = 0
    axis = None if granularity == "tensor" else 1
    low = np.minimum(x.min(axis=axis, keepdims=True), f(0))
    high = np.maximum(x.max(axis=axis, keepdims=True), f(0))
    scale = np.where(high == low, f(1), (high - low) / f(high_code - low_code)).astype(f)
    zero = np.clip(f(low_code) - np.rint(low / scale), low_code, high_code).astype(f)
    codes = np.clip(np.rint(x * (f(1) / scale)) + zero, low_code, high_code)
    want = (codes - zero).astype(f) * scale
    fmt = formats.scaled(element, granularity, axis=-1, zero_point=True)
    got = np.asarray(formats.quantize(x, fmt))
    np.testing.assert_array_equal(got, want + f(0))
    stored = formats.encode(x, fmt)
    np.testing.assert_array_equal(stored.decode(), got)
    assert (got == 0).sum() == (want == 0).sum() and (got[x == 0] == 0).all()  # zero is exact


# Storage

ODD = {
    **{name: name for name in ("float5_e3m1fnuz", "float7_e3m3", "float9_e4m4fn", "float12_e5m6", "int3", "int7", "uint6", "uint2", "int12",
                               "int8_full", "int5_f-3", "lns4", "lns5_g3", "lns12", "dybit5", "dybit2", "bfp4", "bfp7_b5")},
    "e0m4": formats.minifloat(0, 4), "e8m0": formats.minifloat(8, 0), "e8m23": formats.minifloat(8, 23), "e0m1": formats.minifloat(0, 1),
    "e4m3_b145": formats.minifloat(4, 3, bias=145), "e6m0fn": formats.minifloat(6, 0, "fn"), "e5m0": formats.minifloat(5, 0),
    "irregular": formats.codebook(IRREGULAR), "uint1": formats.integer(1, signed=False),
    "int4_channel": formats.scaled("int4", "channel", axis=0), "int3_token": formats.scaled("int3", "token"),
    "int8_tensor": formats.scaled("int8"), "nf4_blocks": formats.scaled("nf4", "block", block=64),
    "lns8_channel": formats.scaled("lns8", "channel"), "binary_channel": formats.scaled("binary", "channel", amax="absmean"),
    "tiles": formats.block("float4_e2m1fn", (16, 16), axis=(-2, -1)), "tiles_e4m3": formats.block("float8_e4m3fn", (4, 8), axis=(0, 1)),
    "mxfp6_first": formats.block("float6_e3m2fn", 32, axis=0), "mxfp4_short": formats.block("float4_e2m1fn", 24),
    "mxfp4_pre": formats.block("float4_e2m1fn", 32, pre_scale=0.75), "mxfp8_rceil": formats.block("float8_e5m2", 32, rule="rceil"),
    "nvint4": formats.scaled("int4", "block", block=16, scale_format="float8_e4m3fn"),
    "affine8": formats.scaled("uint8", "channel", zero_point=True), "affine3": formats.scaled("int3", zero_point=True),
    "affine_blocks": formats.scaled("uint4", "block", block=16, zero_point=True), "nf4_e8m0": formats.block("nf4", 32),
}
ROWS, COLUMNS = 24, 77


def stored_inputs() -> dict[str, np.ndarray]:
    """float32[ROWS, COLUMNS]: random patterns without NaN and infinity, moderate values with zeros of both signs, subnormals."""
    rng = np.random.default_rng(8)
    any_bits = rng.integers(0, 2**32, (ROWS, COLUMNS), dtype=np.uint64).astype(np.uint32).view(np.float32)
    any_bits = np.where(np.isfinite(any_bits), any_bits, np.float32(-0.0))
    moderate = (rng.standard_normal((ROWS, COLUMNS)) * np.exp2(rng.integers(-12, 8, (ROWS, 1)))).astype(np.float32)
    moderate[rng.random(moderate.shape) < 0.1] = 0.0
    moderate[rng.random(moderate.shape) < 0.1] = -0.0
    moderate[3] = 0
    small = rng.integers(0, 2**24, (ROWS, COLUMNS)).astype(np.uint32) | rng.integers(0, 2, (ROWS, COLUMNS)).astype(np.uint32) << 31
    return {"any": any_bits, "moderate": moderate, "subnormal": small.view(np.float32)}


# A format compiles two programs of its own; those much like another one wait for --slow.
ALIKE = {"int5", "int6", "float8_e3m4", "float8_e4m3b11fnuz", "float8_e5m2fnuz", "float8_e4m3", "float6_e2m3fn", "mxfp8_e5m2", "mxfp6_e2m3",
         "mxfp6_e3m2", "tf32", "ternary", "dybit8", "bfp8", "float7_e3m3", "float9_e4m4fn", "uint2", "int8_full", "lns5_g3", "dybit2", "e5m0",
         "e0m1", "int3_token", "int8_tensor", "binary_channel", "tiles_e4m3", "mxfp8_rceil", "nvint4", "affine_blocks", "e8m23"}
FORMATS = [pytest.param(name, marks=pytest.mark.slow) if name in ALIKE else name for name in (*formats.names(), *ODD)]


@pytest.mark.parametrize("name", FORMATS)
def test_decode_of_encode_is_quantize_bit_for_bit(name):
    fmt = ODD.get(name, name)
    fmt = formats.get(fmt) if isinstance(fmt, str) else fmt
    for kind, x in stored_inputs().items():
        stored = formats.encode(x, fmt)
        check(stored.decode(), patterns(formats.quantize(x, fmt)), x, f"{name} {kind}")
        assert stored.nbytes == expected_bytes(fmt), f"{name}: {stored.nbytes} bytes, by hand {expected_bytes(fmt)}"


def expected_bytes(fmt) -> int:
    """By hand for a ROWS x COLUMNS tensor: rows of packed codes to the next byte (whole words above 8 bits), scales, zero points, one
    int32 count where NaN has no code."""
    def width(element) -> int:
        if isinstance(element, formats.Element):
            return int(element.exp_bits) + int(element.man_bits) + int(element.min_value < 0)
        return math.ceil(math.log2(element.levels.shape[0])) if isinstance(element, formats.Codebook) else int(element.bits)

    def a_row(count: int, bits: int) -> int:
        return math.ceil(count * bits / 8) if bits <= 8 else count * (2 if bits <= 16 else 4)

    scaled = isinstance(fmt, formats.Scaled)
    element = fmt.element if scaled else fmt
    total = ROWS * a_row(COLUMNS, width(element))
    if not scaled:
        return total + (0 if getattr(element, "has_nan", False) else 4)
    shape = [ROWS, COLUMNS]
    if fmt.granularity.value == "tensor":
        count = 1
    elif fmt.block is None:
        count = ROWS * COLUMNS // shape[fmt.axis]
    else:
        axes, sizes = ((v if isinstance(v, tuple) else (v,)) for v in (fmt.axis, fmt.block))
        for axis, size in zip(axes, sizes, strict=True):
            shape[axis] = math.ceil(shape[axis] / size)
        count = math.prod(shape)
    total += count * (4 if fmt.scale_element is None else 1) + (4 if fmt.two_level else 0)
    return total + (count * (1 if width(element) <= 8 else 2) if fmt.zero_point else 0)


@pytest.mark.parametrize("name", ["float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2",
                                  "float8_e5m2fnuz", "float6_e2m3fn", "float6_e3m2fn", "float4_e2m1fn", "bfloat16", "float16"])
def test_code_bytes_are_those_of_ml_dtypes(name):
    """All values of the type, its infinities and NaN, and arbitrary finite values that do not overflow."""
    dtype = np.dtype(getattr(ml_dtypes, name, None) or name)
    bits = formats.describe(name)["bits"]
    every = np.arange(2**bits, dtype=np.uint16 if bits > 8 else np.uint8).view(dtype)
    x = np.concatenate([every.astype(np.float32), stored_inputs()["subnormal"].ravel()])
    top = float(formats.get(name).max_value)
    x = np.concatenate([x, np.clip(stored_inputs()["moderate"].ravel(), -top, top)])
    x = x[~np.isnan(x)] if bits < 8 else x
    want = x.astype(dtype).view(np.uint16 if bits > 8 else np.uint8)
    codes = np.asarray(formats.encode(x.reshape(-1, 1), name, overflow="ieee").codes).ravel()
    nan = np.isnan(x)
    np.testing.assert_array_equal(codes[~nan], want[~nan])
    assert np.isnan(codes[nan].view(dtype).astype(np.float32)).all()


def test_scale_bytes_are_e8m0_and_e4m3():
    x = np.zeros((4, 32), np.float32)
    x[:, 5] = [6.0, 0.0, 7.9999995 * 2.0**20, np.nan]
    stored = formats.encode(x, "mxfp4")
    np.testing.assert_array_equal(np.asarray(stored.scales).ravel(), [127, 0, 147, 255])
    x[3, 5] = 2.0**-20
    stored = formats.encode(x[:, :16], "nvfp4")
    assert float(stored.tensor_scale) == np.float32(x.max()) / np.float32(2688)
    tops = np.abs(x[:, :16]).max(axis=1) / np.float32(6) / np.float32(stored.tensor_scale)
    want = np.maximum(tops, np.float32(2.0**-9)).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    want[1] = np.float32(1).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)  # a block of zeros
    np.testing.assert_array_equal(np.asarray(stored.scales).ravel(), want)
