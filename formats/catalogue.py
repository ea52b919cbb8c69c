"""Formats by name: ml_dtypes spelling for elements, OCP names for block formats, nvfp4, intN, lnsN, dybitN."""

from __future__ import annotations

import re

from formats.codebooks import Codebook, binary, dybit, nf4
from formats.elements import Element, identity, integer, minifloat, power_of_two
from formats.logarithmic import Logarithmic, lns
from formats.midrise import Midrise, midrise
from formats.scaled import ELEMENTS, Scaled, block, scaled

_FORMATS: dict[str, Element | Codebook | Logarithmic | Midrise | Scaled] = {}
_FLOAT = re.compile(r"float(\d+)_e(\d)m(\d+)(?:b(-?\d+))?(fnuz|fn)?")
_LOGARITHMIC = re.compile(r"lns(\d+)(?:_g(\d+))?")
_MIDRISE = re.compile(r"midrise(\d+)")
_DYBIT = re.compile(r"dybit(\d)")
_BLOCK_FLOAT = re.compile(r"bfp(\d+)(?:_b(\d+))?")
_INTEGER = re.compile(r"(u?)int(\d+)(_full)?(?:_f(-?\d+))?")


def register(name: str, fmt) -> None:
    """Adds a format under a new name (for plugins). ValueError if the name is taken or fmt is not a format."""
    if not isinstance(fmt, (*ELEMENTS, Scaled)):
        raise ValueError(f"format {name!r} must be an element format or a formats.Scaled, got {type(fmt).__name__}")
    if name in _FORMATS:
        raise ValueError(f"format {name!r} is already registered")
    _FORMATS[name] = fmt


def names() -> list[str]:
    """Every registered name, in the order of the catalogue."""
    return list(_FORMATS)


def get(name: str):
    """The format called `name`. Besides `names()`: intN, uintN (N 2..16; "int8_full" reaches -128, "int8_f6"
    has 6 fraction bits), floatB_eEmM[bBIAS][fn|fnuz] of any widths, B = 1 + E + M, lnsN (N 2..16; gamma 2**(N-5), so that every
    width reaches down to about 2**-16, or "lns8_g16"), dybitN (N 2..8), midriseN (N 1..16), bfpN (integers of N bits, blocks of 16 with a shared
    exponent; "bfp8_b64"). ValueError, with advice, for any other name."""
    if name in _FORMATS:
        return _FORMATS[name]
    whole = _INTEGER.fullmatch(str(name))
    if whole and 2 <= int(whole[2]) <= 16:
        return integer(int(whole[2]), signed=not whole[1], symmetric=not whole[3], fraction_bits=int(whole[4] or 0))
    real = _FLOAT.fullmatch(str(name))
    if real and int(real[1]) == 1 + int(real[2]) + int(real[3]):
        return minifloat(int(real[2]), int(real[3]), real[5] or "ieee", None if real[4] is None else int(real[4]))
    if logarithmic := _LOGARITHMIC.fullmatch(str(name)):
        bits = int(logarithmic[1])
        return lns(bits, int(logarithmic[2] or 2 ** max(0, bits - 5)))
    if (uniform := _MIDRISE.fullmatch(str(name))) and 1 <= int(uniform[1]) <= 16:
        return midrise(int(uniform[1]))
    if adaptive := _DYBIT.fullmatch(str(name)):
        return dybit(int(adaptive[1]))
    if shared := _BLOCK_FLOAT.fullmatch(str(name)):
        return block(integer(int(shared[1])), int(shared[2] or 16))
    if re.fullmatch(r"e\dm\d+", str(name).lower()):
        raise ValueError(f"format={name!r} does not say which one: {_advice(name.lower())}")
    raise ValueError(f"format={name!r} is not known; accepted: {', '.join(names())}, intN, floatB_eEmM[fn|fnuz], lnsN, dybitN, midriseN, bfpN")


def resolve(fmt):
    """The format of a name; a format passes. ValueError for anything else."""
    fmt = get(fmt) if isinstance(fmt, str) else fmt
    if not isinstance(fmt, (*ELEMENTS, Scaled)):
        raise ValueError(f"format={fmt!r} must be a catalogue name, an element format such as formats.minifloat(4, 3), or a formats.Scaled")
    return fmt


def _advice(name: str) -> str:
    """Names and maxima of what a bare eEmM may mean."""
    exp_bits, man_bits = (int(digits) for digits in re.findall(r"\d+", name))
    if name == "e4m3":  # the one that bites: 480 is what CPFloat and qtorch mean, with no NaN at all
        return "its maximum is 240 (float8_e4m3, float8_e4m3fnuz), 448 (float8_e4m3fn, OCP) or 480 (no NaN), so name one"
    bits = 1 + exp_bits + man_bits
    meant = [f"float{bits}_{name}{suffix}" for suffix in ("", "fn", "fnuz")]
    return f"use one of {', '.join(meant)}"


def _fill() -> None:
    for name in ("float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2",
                 "float8_e5m2fnuz", "float6_e2m3fn", "float6_e3m2fn", "float4_e2m1fn"):
        register(name, get(name))
    register("float8_e8m0fnu", power_of_two())
    register("float16", minifloat(5, 10))
    register("bfloat16", minifloat(8, 7))
    register("tf32", minifloat(8, 10))
    register("float32", identity())
    for bits in range(2, 9):
        register(f"int{bits}", integer(bits))
    # OCP MX v1.0 table 1; mxint8 has an implied 2**-6 and leaves -2 unused, as section 5.3.4 allows
    for name, element in {"mxfp8_e4m3": get("float8_e4m3fn"), "mxfp8_e5m2": get("float8_e5m2"),
                          "mxfp6_e2m3": get("float6_e2m3fn"), "mxfp6_e3m2": get("float6_e3m2fn"),
                          "mxfp4": get("float4_e2m1fn"), "mxint8": integer(8, fraction_bits=6)}.items():
        register(name, block(element, 32))
    register("nvfp4", scaled("float4_e2m1fn", "block", block=16, scale_format="float8_e4m3fn", two_level=True))
    register("ternary", integer(2))
    register("binary", binary())
    register("nf4", nf4())
    for name in ("lns8", "dybit4", "dybit8", "midrise4", "bfp8"):
        register(name, get(name))


_fill()
