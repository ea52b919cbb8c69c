"""Names, what is said of a format, and its error on Gaussian data."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import formats
from docs import formats as page
from formats import catalogue
from tests.formats.oracle import saturated

PUBLISHED = {  # max, smallest normal, smallest subnormal: OCP OFP8 and MX v1.0, IEEE 754
    "float8_e4m3fn": (448.0, 2.0**-6, 2.0**-9), "float8_e5m2": (57344.0, 2.0**-14, 2.0**-16),
    "float6_e2m3fn": (7.5, 1.0, 0.125), "float6_e3m2fn": (28.0, 0.25, 0.0625), "float4_e2m1fn": (6.0, 1.0, 0.5),
    "float8_e8m0fnu": (2.0**127, 2.0**-127, None), "float16": (65504.0, 2.0**-14, 2.0**-24),
    "bfloat16": (3.3895313892515355e38, 2.0**-126, 2.0**-133), "float32": (3.4028234663852886e38, 2.0**-126, 2.0**-149),
    "int8": (127.0, None, 1.0), "mxfp4": (6.0, 1.0, 0.5), "mxint8": (127 / 64, None, 1 / 64),
}


def test_table_has_the_published_numbers():
    rows = {row["name"]: row for row in formats.table()}
    assert list(rows) == formats.names()
    for name, (largest, normal, subnormal) in PUBLISHED.items():
        row = rows[name]
        assert (row["max"], row["smallest_normal"], row["smallest_subnormal"]) == (largest, normal, subnormal), name
    assert rows["mxfp4"]["bits"] == 4.25 and rows["tf32"]["bits"] == 19
    assert rows["float8_e4m3fn"]["native"] == "float8_e4m3fn" and rows["int3"]["native"] is None


def test_every_narrow_dtype_of_ml_dtypes_is_there():
    theirs = [name for name in dir(ml_dtypes) if name.startswith(("float", "bfloat"))]
    assert set(theirs) <= set(formats.names())


@pytest.mark.parametrize("name", [*(name for name in formats.names() if name != "ternary"), "int16", "uint4", "int4_full", "int8_f3", "float6_e3m2", "float10_e5m4fn",
                                  "float8_e4m3b9", "float5_e3m1fnuz", "float7_e0m6fn", "float9_e8m0", "lns8_g16"])
def test_a_name_gets_a_format_that_has_this_name(name):
    fmt = formats.get(name)
    assert formats.describe(fmt)["name"] == name == formats.describe(name)["name"]


def test_descriptions():
    assert formats.describe("mxfp8_e4m3") == {"name": "mxfp8_e4m3", "bits": 8, "bits_effective": 8.25, "exp_bits": 4,
                                              "man_bits": 3, "block": 32}
    assert formats.describe(formats.scaled("int4", "channel", axis=0)) == {
        "name": "int4_channel_exact", "bits": 4, "bits_effective": 4.0, "exp_bits": 0, "man_bits": 3, "block": None}
    one_level = formats.scaled("float4_e2m1fn", "block", block=16, scale_format="float8_e4m3fn")
    assert formats.describe(one_level)["bits_effective"] == 4.5
    assert formats.describe("float32")["bits"] == 32 and formats.describe("uint4")["bits"] == 4


@pytest.mark.parametrize("name", ["e4m3", "E4M3", "float8_e4m4", "int1", "int17", "fp8", "", "float9_e9m0", "mxfp4 "])
def test_other_names_are_refused_in_one_line(name):
    with pytest.raises(ValueError) as refusal:
        formats.get(name)
    assert "\n" not in str(refusal.value)


def test_plugins_register_once(monkeypatch):
    monkeypatch.setattr(catalogue, "_FORMATS", dict(catalogue._FORMATS))
    formats.register("my4", formats.block("int4", 64))
    assert formats.get("my4").block == 64 and "my4" in formats.names()
    with pytest.raises(ValueError, match="'my4' is already registered"):
        formats.register("my4", formats.get("int4"))
    with pytest.raises(ValueError, match="'my5' must be an element format or a formats.Scaled, got str"):
        formats.register("my5", "int4")


@pytest.mark.parametrize(("name", "largest", "quantum_exp", "man_bits"), [("float4_e2m1fn", 6, -1, 1), ("float8_e4m3fn", 448, -9, 3),
                                                                          ("int4", 7, 0, 30)])
def test_gaussian_error_is_that_of_the_integral(name, largest, quantum_exp, man_bits):
    """Against the integral of the squared error over the normal density, within the sampling error of 65536 draws."""
    x = np.linspace(-8, 8, 2_000_001)
    density = np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)
    want = np.trapezoid((saturated(x, man_bits, quantum_exp, -largest, largest) - x) ** 2 * density, x)
    assert formats.gaussian_mse(name) == pytest.approx(want, rel=0.02)


def test_gaussian_error_orders_formats_and_is_zero_for_float32():
    errors = [formats.gaussian_mse(formats.scaled(f"int{bits}", "channel")) for bits in range(2, 9)]
    assert errors == sorted(errors, reverse=True)
    # 6 dB a bit (a factor 4) once the amax is resolved
    assert all(3.4 < a / b < 5.2 for a, b in zip(errors[2:], errors[3:]))
    assert formats.gaussian_mse("float32") == 0.0
    # OCP MXFP4, nearest even, averaged over sigma: 1.33e-2 (independent measurement, 2.3 % of values clipped)
    assert formats.gaussian_mse("mxfp4") == pytest.approx(1.33e-2, rel=0.02)


def test_the_page_of_formats_lists_what_there_is():
    text = (page.HERE / "formats.md").read_text(encoding="utf-8")
    assert page.values() in text and all(f"| `{name}` |" in text for name in formats.names())


@pytest.mark.slow
def test_the_page_of_formats_is_that_of_the_code():
    """docs/formats.md, numbers included (three digits of the errors)."""
    assert (page.HERE / "formats.md").read_text(encoding="utf-8") == page.page(), "run python -m docs.formats"
