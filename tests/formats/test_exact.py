"""The public API against exact integer arithmetic of its own (fractions_oracle.py), with gfloat and ml_dtypes as further opinions."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

import formats
from tests.formats import fractions_oracle as exact
from tests.formats.fractions_oracle import MODES, OVERFLOWS, floats, patterns

SIZE = 4096  # every probe array has this size, so that programs are shared
IRREGULAR = np.array([-7.0, -2.5, -1.0, -2.0**-20, 3.0, 3.25, 3.2500002, 100.0], np.float32)

GRIDS = {
    "e4m3fn": (formats.minifloat(4, 3, "fn"), exact.minifloat(4, 3, "fn")),
    "e5m2": (formats.minifloat(5, 2), exact.minifloat(5, 2)),
    "e2m1fn": (formats.minifloat(2, 1, "fn"), exact.minifloat(2, 1, "fn")),
    "e3m2fn": (formats.minifloat(3, 2, "fn"), exact.minifloat(3, 2, "fn")),
    "e4m3": (formats.minifloat(4, 3), exact.minifloat(4, 3)),
    "e4m3fnuz": (formats.minifloat(4, 3, "fnuz"), exact.minifloat(4, 3, "fnuz")),
    "e5m2fnuz": (formats.minifloat(5, 2, "fnuz"), exact.minifloat(5, 2, "fnuz")),
    "e8m0": (formats.minifloat(8, 0), exact.minifloat(8, 0)),
    "e5m0fn": (formats.minifloat(5, 0, "fn"), exact.minifloat(5, 0, "fn")),
    "e6m0fn": (formats.minifloat(6, 0, "fn"), exact.minifloat(6, 0, "fn")),
    "e0m4": (formats.minifloat(0, 4), exact.minifloat(0, 4)),
    "e0m7fnuz": (formats.minifloat(0, 7, "fnuz", bias=3), exact.minifloat(0, 7, "fnuz", 3)),
    "e8m7": (formats.minifloat(8, 7), exact.minifloat(8, 7)),
    "e4m3fn_b11": (formats.minifloat(4, 3, "fn", bias=11), exact.minifloat(4, 3, "fn", 11)),
    "e3m2_b-2": (formats.minifloat(3, 2, "ieee", bias=-2), exact.minifloat(3, 2, "ieee", -2)),
    "e4m3_b145": (formats.minifloat(4, 3, "ieee", bias=145), exact.minifloat(4, 3, "ieee", 145)),  # normals that float32 has as subnormals
    "e3m2fnuz_b148": (formats.minifloat(3, 2, "fnuz", bias=148), exact.minifloat(3, 2, "fnuz", 148)),  # quantum 2**-149
    "int4": (formats.integer(4), exact.integer(4)),
    "int8_full": (formats.integer(8, symmetric=False), exact.integer(8, symmetric=False)),
    "int2": (formats.integer(2), exact.integer(2)),
    "uint6": (formats.integer(6, signed=False), exact.integer(6, signed=False)),
    "uint1": (formats.integer(1, signed=False), exact.integer(1, signed=False)),
    "int8_f6": (formats.integer(8, fraction_bits=6), exact.integer(8, fraction_bits=6)),
    "int5_full_f-3": (formats.integer(5, symmetric=False, fraction_bits=-3), exact.integer(5, symmetric=False, fraction_bits=-3)),
}
TABLES = {
    "nf4": (formats.nf4(), exact.Table.of(formats.nf4().levels)),
    "dybit4": (formats.dybit(4), exact.Table.of([-4, -2, -1.5, -1, -0.75, -0.5, -0.25, 0, 0.25, 0.5, 0.75, 1, 1.5, 2, 4])),
    "binary": (formats.binary(), exact.Table.of([-1, 1])),
    "irregular": (formats.codebook(IRREGULAR), exact.Table.of(IRREGULAR)),
    "lns8": (formats.lns(8), exact.Logs.of(8, 8)),
    "lns6_g3": (formats.lns(6, 3), exact.Logs.of(6, 3)),
    "lns8_g1": (formats.lns(8, 1), exact.Logs.of(8, 1)),
}


def probes(marks: list[int], seed: int = 0) -> np.ndarray:
    """float32[SIZE] of both signs: marks (units; up to 200 of them spread over all), their float32 neighbours, and what is special
    everywhere: zeros, infinities, NaNs, float32 subnormals, powers of two and an ulp below, random patterns."""
    marks = sorted(set(marks))
    if len(marks) > 400:
        keep = np.unique(np.concatenate([np.arange(16), np.linspace(0, len(marks) - 1, 368).astype(int), len(marks) - 1 - np.arange(16)]))
        marks = [marks[i] for i in keep]
    around = set()
    for mark in marks:
        if mark.bit_length() - 1 - exact.UNIT > 127:
            continue
        drop = max(mark.bit_length() - 24, exact.UNIT - 149)
        near = exact.to_pattern(mark >> drop << drop, False)  # the float32 not above
        around.update(p for p in range(near - 1, near + 2) if 0 <= p <= exact.INF)
    around.update([0, 1, 2, 3, 0x400000, 0x400001, 0x7FFFFF, 0x800000, 0x800001, 0x7F7FFFFF, exact.INF, exact.NAN, 0x7F800001])
    around.update((field << 23) - below for field in range(1, 255, 3) for below in (0, 1))
    half = np.array(sorted(around), np.uint32)
    assert 2 * half.size <= SIZE, half.size
    rest = np.random.default_rng(seed).integers(0, 2**32, SIZE - 2 * half.size, dtype=np.uint64).astype(np.uint32)
    return np.concatenate([half, half | np.uint32(1 << 31), rest]).view(np.float32)


def grid_marks(grid: exact.Grid) -> list[int]:
    """Values, halves and quarters between them, up to past the largest."""
    values = grid.magnitudes
    if len(values) > 70:
        picked = sorted({*range(12), *np.linspace(0, len(values) - 2, 46).astype(int).tolist(), *range(len(values) - 10, len(values) - 1)})
    else:
        picked = range(len(values) - 1)
    marks = [values[i] + (values[i + 1] - values[i]) * part // 4 for i in picked for part in range(4)]
    return [*marks, values[-1], 2 * values[-1], 4 * values[-1]]


def table_marks(table) -> list[int]:
    if isinstance(table, exact.Logs):
        return table.magnitudes + table.middles
    levels = table.levels
    return [abs(n) for n in levels] + [abs(low + high) // 2 for low, high in zip(levels, levels[1:], strict=False)]


def check(got, want: list[int], x, what: str):
    """Same bits, or both NaN; the message shows the first few that differ."""
    got, want, x = np.asarray(got, np.float32).ravel(), floats(want), np.asarray(x, np.float32).ravel()
    wrong = (got.view(np.uint32) != want.view(np.uint32)) & ~(np.isnan(got) & np.isnan(want))
    shown = [f"x={float(x[i])!r} ({float(x[i]).hex()}): got {float(got[i])!r}, exact {float(want[i])!r}" for i in np.flatnonzero(wrong)[:6]]
    assert not wrong.any(), f"{what}: {wrong.sum()} of {x.size} wrong\n" + "\n".join(shown)


@pytest.mark.parametrize("name", GRIDS)
def test_every_mode_and_overflow_rule_of_grids(name):
    """With traced widths (`quantize` outside jit) and with concrete ones (`round_to` outside jit), which take other steps."""
    fmt, grid = GRIDS[name]
    x = probes(grid_marks(grid))
    bits = patterns(x)
    for overflow in OVERFLOWS:
        for mode in MODES:
            want = [grid.round(p, mode, overflow) for p in bits]
            check(formats.quantize(x, fmt, rounding=mode, overflow=overflow), want, x, f"quantize {name} {mode} {overflow}")
            if overflow != "saturate_finite":
                check(formats.round_to(x, fmt, rounding=mode, overflow=overflow), want, x, f"round_to {name} {mode} {overflow}")


@pytest.mark.parametrize("name", TABLES)
def test_every_mode_of_tables(name):
    fmt, table = TABLES[name]
    x = probes(table_marks(table))
    bits = patterns(x)
    for mode in MODES:
        want = [table.round(p, mode) for p in bits]
        check(formats.round_to(x, fmt, rounding=mode), want, x, f"{name} {mode}")
    check(formats.quantize(x, fmt), [table.round(p, "nearest_even") for p in bits], x, f"quantize {name}")


@pytest.mark.parametrize("name", ["e4m3fn", "e8m0", "e0m4", "int8_full", "nf4", "lns6_g3"])
def test_modes_by_traced_number(name):
    fmt, oracle = {**GRIDS, **TABLES}[name]
    x = probes(grid_marks(oracle) if name in GRIDS else table_marks(oracle))
    bits = patterns(x)
    for mode in MODES:
        got = formats.quantize(x, fmt, rounding=formats.mode_number(mode), overflow="ieee")
        check(got, [oracle.round(p, mode, "ieee") for p in bits], x, f"{name} {mode} by number")


# Stochastic rounding


def stochastic_probes(grid: exact.Grid, k: int, below: bool) -> list[int]:
    """Positive patterns whose way to the next value is near every multiple of 2**-(k+1), in a normal octave, among the subnormals, or
    below the smallest value."""
    values = grid.magnitudes
    places = [0] if below else [1, 2, len(values) // 2, len(values) - 3]
    found = set()
    for place in places:
        step = values[place + 1] - values[place]
        for part in range(2 ** (k + 1) + 1):
            mark = values[place] + step * part // 2 ** (k + 1)
            if mark == 0:
                found.update([0, 1, 2, 3])
                continue
            drop = max(mark.bit_length() - 24, exact.UNIT - 149)
            near = exact.to_pattern(mark >> drop << drop, False)
            found.update(p for p in (near - 1, near, near + 1) if p >= 0)
    return sorted(found)


@pytest.mark.parametrize("k", [1, 2, 4, 8])
@pytest.mark.parametrize("name", ["e4m3fn", "e5m2", "e2m1fn", "e4m3_b145", "e8m0", "int8_f6"])
def test_stochastic_truth_tables_of_grids(name, k):
    """Every value of the k bits, against the inequalities; also with the bits above the k set."""
    fmt, grid = GRIDS[name]
    chosen = stochastic_probes(grid, k, below=False) + stochastic_probes(grid, k, below=True)
    chosen = sorted(set(chosen))[:: max(1, len(chosen) // 900)]
    bits = (chosen + [p | 1 << 31 for p in chosen])[:SIZE // 2]
    bits = bits + [0] * (SIZE // 2 - len(bits))
    parts = [grid.fraction(p) for p in bits]
    drawn = sorted({0, 1, 2**k // 2, 2**k - 1, *range(0, 2**k, max(1, 2**k // 16))})
    x, noise = np.broadcast_to(floats(bits), (16, SIZE // 2)), np.zeros((16, SIZE // 2), np.uint32)
    for rule in "ABC":
        for first in range(0, len(drawn), 16):
            rows = (drawn[first : first + 16] * 16)[:16]
            noise = np.broadcast_to(np.array(rows, np.uint32)[:, None], x.shape).copy()
            noise[:, ::2] |= np.uint32(0xFFFFFFFF << k & 0xFFFFFFFF)
            got = formats.quantize(x, fmt, rounding="stochastic", sr_bits=k, sr_rule=rule, random_bits=noise)
            want = [grid.settle(place + exact.goes_up(part, rule, k, r), bool(p >> 31), "stochastic", "saturate")
                    for r in rows for p, (place, part) in zip(bits, parts, strict=True)]
            check(got, want, x, f"{name} rule {rule} k={k}")


@pytest.mark.parametrize("k", [1, 2, 8])
@pytest.mark.parametrize("name", ["dybit4", "binary", "irregular", "nf4"])
def test_stochastic_truth_tables_of_codebooks(name, k):
    """x at the fractions where the rules decide, those that are float32. (Between levels the fraction is a float32 quotient, as
    documented: an ulp beside a threshold it may already be the threshold.) Up means the next level, whatever the sign."""
    fmt, table = TABLES[name]
    marks = set()
    for place in range(len(table.levels) - 1):
        low, high = table.levels[place : place + 2]
        for part in np.unique(np.linspace(0, 2 ** (k + 1), 17).astype(int)).tolist():
            n = low + (high - low) * part // 2 ** (k + 1)
            drop = max(abs(n).bit_length() - 24, exact.UNIT - 149)
            near = exact.to_pattern(abs(n) >> drop << drop, n < 0)
            met = (high - low) * part % 2 ** (k + 1) == 0 and abs(n) >> drop << drop == abs(n)
            marks.update(p for p in (near,) * met if p >= 0 and p != (1 << 31) - 1)
    inside = (floats(sorted(marks)) > floats([table.value(0)])) & (floats(sorted(marks)) < floats([table.value(-1)]))
    bits = [p for p, kept in zip(sorted(marks), inside, strict=True) if kept][: SIZE // 4]
    bits = bits + [bits[0]] * (SIZE // 4 - len(bits))
    drawn = sorted({0, 1 % 2**k, 2**k // 2, 2**k - 1, *range(0, 2**k, max(1, 2**k // 4))})
    drawn = (drawn * 8)[:8]
    x = np.broadcast_to(floats(bits), (8, SIZE // 4))
    noise = np.broadcast_to(np.array(drawn, np.uint32)[:, None], x.shape)
    parts = [table.fraction(p) for p in bits]
    for rule in "ABC":
        got = formats.quantize(x, fmt, rounding="stochastic", sr_bits=k, sr_rule=rule, random_bits=noise)
        want = [table.value(place + exact.goes_up(part, rule, k, r)) for r in drawn for place, part in parts]
        check(got, want, x, f"{name} rule {rule} k={k}")


@pytest.mark.parametrize("name", ["e4m3fn", "e8m7", "int4", "e4m3_b145"])
def test_full_stochastic_goes_up_as_often_as_the_dropped_fraction_says(name):
    """All words of 10 low bits, for values with at most 10 dropped bits: the count of ups is the fraction, exactly."""
    fmt, grid = GRIDS[name]
    places = [1, 2, 3, 5, 6] if name != "e8m7" else [1, 2, 127, 128, 16000]
    want, bits = [], []
    for place in places:
        low, step = grid.magnitudes[place], grid.magnitudes[place + 1] - grid.magnitudes[place]
        for part in (1, 512, 1023, 341, 16, 0):
            mark = low + step * part // 1024
            drop = max(mark.bit_length() - 24, exact.UNIT - 149)
            if mark >> drop << drop != mark:  # not a float32
                mark = low
            bits.append(exact.to_pattern(mark, bool(part & 1)))
            want.append(Fraction(mark - low, step) * 1024)
    x = np.broadcast_to(floats(bits), (1024, len(bits)))
    # a dropped field of s bits reads the low s bits of the word: all combinations of the 10 low ones, moved to its top
    shifts = [max(0, _dropped(grid, p) - 10) for p in bits]
    noise = (np.arange(1024, dtype=np.uint32)[:, None] << np.array(shifts, np.uint32)[None]).astype(np.uint32)
    y = np.asarray(formats.quantize(x, fmt, rounding="stochastic", random_bits=noise))
    ups = (y != floats([exact.to_pattern(grid.magnitudes[grid.fraction(p)[0]], bool(p >> 31)) for p in bits])).sum(axis=0)
    assert ups.tolist() == want


def _dropped(grid: exact.Grid, pattern: int) -> int:
    """Bits of the float32 significand below the spacing of the grid."""
    place, _, spacing = grid.neighbours(exact.to_units(pattern & 0x7FFFFFFF))
    del place
    field = max(pattern >> 23 & 255, 1)
    return spacing.bit_length() - 1 - (field - 150 + exact.UNIT)


@pytest.mark.parametrize("name", ["e4m3fn", "e5m2", "e2m1fn", "int4", "e8m0"])
def test_full_stochastic_below_the_smallest_value(name):
    """Fractions that are multiples of 2**-31: up for exactly that many of the 2**31 words, found where the answer turns."""
    fmt, grid = GRIDS[name]
    quantum = grid.magnitudes[1]
    parts = [Fraction(1, 2), Fraction(1, 4), Fraction(3, 8), Fraction(1, 2**20), Fraction(2**23 + 1, 2**31), Fraction(2**24 - 1, 2**24)]
    bits = [exact.to_pattern(int(quantum * part), False) for part in parts if (quantum * part).denominator == 1 and is_float32(int(quantum * part))]
    parts = [grid.fraction(p)[1] for p in bits]
    words = [[2**31 - int(part * 2**31) + move for part in parts] for move in (-1, 0)]  # the last that stays, the first that goes up
    x = np.broadcast_to(floats(bits), (2, len(bits)))
    y = np.asarray(formats.quantize(x, fmt, rounding="stochastic", random_bits=np.array(words, np.uint32)))
    assert len(bits) >= 4
    assert (y[0] == 0).all() and (y[1] == floats([exact.to_pattern(quantum, False)])).all()


def is_float32(n: int) -> bool:
    try:
        exact.to_pattern(n, False)
    except ArithmeticError:
        return False
    return True


@pytest.mark.parametrize("name", ["e4m3fn", "e5m2", "e8m0", "e4m3_b145", "int8_full", "uint6", "nf4", "dybit4", "irregular"])
def test_stochastic_equal_is_up_or_down_by_the_lowest_bit(name):
    fmt, oracle = {**GRIDS, **TABLES}[name]
    grid = name in GRIDS
    x = probes(grid_marks(oracle) if grid else table_marks(oracle))
    # away from and toward zero are the two outcomes of a grid, up and down those of a codebook
    down = [oracle.round(p, "toward_zero" if grid else "toward_negative") for p in patterns(x)]
    up = [oracle.round(p, ("toward_negative" if p >> 31 else "toward_positive") if grid else "toward_positive") for p in patterns(x)]
    for low, want in ((0, down), (1, up)):
        noise = np.full(x.shape, 0xABCDE0 | low, np.uint32)
        check(formats.quantize(x, fmt, rounding="stochastic_equal", random_bits=noise), want, x, f"{name} lowest bit {low}")


@pytest.mark.parametrize("rule, k", [("full", None), ("A", 1), ("A", 8), ("B", 8), ("C", 8), ("equal", None)])
@pytest.mark.parametrize("name", ["nf4", "dybit4", "binary", "irregular", "lns8", "e4m3fn", "int4"])
def test_no_draw_moves_a_level_or_leaves_the_end_levels(name, rule, k):
    """Values of the format, and values outside its range, which saturate: the same under every random word."""
    fmt, oracle = {**GRIDS, **TABLES}[name]
    if name in GRIDS:
        levels = [exact.to_pattern(n, False) for n in oracle.magnitudes[: oracle.high + 1]]
    else:
        levels = [exact.to_pattern(abs(n), n < 0) for n in (oracle.magnitudes if name == "lns8" else oracle.levels)]
    x = np.concatenate([np.tile(floats(levels), 4), np.array([1e3, 3e38, np.inf, -1e3, -3e38, -np.inf] * 20, np.float32)])
    x = np.broadcast_to(np.resize(x, 640), (4, 640))
    want = [oracle.round(p, "nearest_even") for p in patterns(x)]
    noise = np.broadcast_to(np.array([0, 1, 2**31, 2**32 - 1], np.uint32)[:, None], x.shape)
    how = {"rounding": "stochastic_equal"} if rule == "equal" else {"rounding": "stochastic", "sr_rule": rule, "sr_bits": k}
    check(formats.quantize(x, fmt, random_bits=noise, **how), want, x, f"{name} {rule} {k}")


# gfloat


def _gfloat(name: str):
    gfloat_formats = pytest.importorskip("gfloat.formats")
    return {"e4m3fn": gfloat_formats.format_info_ocp_e4m3, "e5m2": gfloat_formats.format_info_ocp_e5m2,
            "e2m1fn": gfloat_formats.format_info_ocp_e2m1, "e3m2fn": gfloat_formats.format_info_ocp_e3m2}[name]


GFLOAT_MODES = {"nearest_even": "TiesToEven", "nearest_away": "TiesToAway", "toward_zero": "TowardZero",
                "toward_positive": "TowardPositive", "toward_negative": "TowardNegative"}


@pytest.mark.parametrize("name", ["e4m3fn", "e5m2", "e2m1fn", "e3m2fn"])
def test_deterministic_modes_as_gfloat(name):
    gfloat = pytest.importorskip("gfloat")
    info = _gfloat(name)
    fmt, grid = GRIDS[name]
    x = probes(grid_marks(grid))
    some = np.random.default_rng(1).permutation(SIZE)[:1200]
    some = some[~np.isnan(x[some])]
    with np.errstate(all="ignore"):
        for overflow in ("saturate", "ieee") if info.num_nans else ("saturate",):
            for mode, theirs in GFLOAT_MODES.items():
                got = np.asarray(formats.quantize(x, fmt, rounding=mode, overflow=overflow))[some]
                want = [gfloat.round_float(info, float(v), gfloat.RoundMode[theirs], overflow == "saturate") for v in x[some]]
                check(got, patterns(want), x[some], f"gfloat {name} {mode} {overflow}")


@pytest.mark.parametrize("k", [1, 4, 8])
@pytest.mark.parametrize("name", ["e4m3fn", "e5m2", "e2m1fn"])
def test_stochastic_rules_as_gfloat(name, k):
    gfloat = pytest.importorskip("gfloat")
    info = _gfloat(name)
    fmt, grid = GRIDS[name]
    chosen = stochastic_probes(grid, min(k, 3), below=False) + stochastic_probes(grid, min(k, 3), below=True)
    x = floats((chosen + [p | 1 << 31 for p in chosen]))
    x = np.resize(x, 512)
    noise = np.random.default_rng(k).integers(0, 2**k, x.shape, dtype=np.uint32)
    for rule, theirs in {"A": "StochasticFastest", "B": "StochasticFast", "C": "Stochastic"}.items():
        got = formats.quantize(x, fmt, rounding="stochastic", sr_bits=k, sr_rule=rule, random_bits=noise)
        want = [gfloat.round_float(info, float(v), gfloat.RoundMode[theirs], True, int(r), k) for v, r in zip(x, noise, strict=True)]
        check(got, patterns(want), x, f"gfloat {name} rule {rule} k={k}")
