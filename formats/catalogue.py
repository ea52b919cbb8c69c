"""Formats by name: ml_dtypes spelling for elements, OCP names for block formats, intN; and what to print of a format."""

from __future__ import annotations

import re

import ml_dtypes
import numpy as np

from formats.blocks import Granularity, Scaled, block
from formats.elements import Element, identity, integer, minifloat, power_of_two
from formats.scales import Rule

_FORMATS: dict[str, Element | Scaled] = {}
_FLOAT = re.compile(r"float(\d+)_e(\d)m(\d+)(?:b(-?\d+))?(fnuz|fn)?")
_INTEGER = re.compile(r"(u?)int(\d+)(_full)?(?:_f(-?\d+))?")


def register(name: str, fmt: Element | Scaled) -> None:
    """Adds a format under a new name (for plugins). ValueError if the name is taken or fmt is not a format."""
    if not isinstance(fmt, (Element, Scaled)):
        raise ValueError(f"format {name!r} must be a formats.Element or formats.Scaled, got {type(fmt).__name__}")
    if name in _FORMATS:
        raise ValueError(f"format {name!r} is already registered")
    _FORMATS[name] = fmt


def names() -> list[str]:
    """Every registered name, in the order of the catalogue."""
    return list(_FORMATS)


def get(name: str) -> Element | Scaled:
    """The format called `name`. Besides `names()`: intN, uintN (N 2..16; "int8_full" reaches -128, "int8_f6"
    has 6 fraction bits), and floatB_eEmM[bBIAS][fn|fnuz] of any widths, B = 1 + E + M. ValueError, with advice, for
    any other name."""
    if name in _FORMATS:
        return _FORMATS[name]
    whole = _INTEGER.fullmatch(str(name))
    if whole and 2 <= int(whole[2]) <= 16:
        return integer(int(whole[2]), signed=not whole[1], symmetric=not whole[3], fraction_bits=int(whole[4] or 0))
    real = _FLOAT.fullmatch(str(name))
    if real and int(real[1]) == 1 + int(real[2]) + int(real[3]):
        return minifloat(int(real[2]), int(real[3]), real[5] or "ieee", None if real[4] is None else int(real[4]))
    if re.fullmatch(r"e\dm\d+", str(name).lower()):
        raise ValueError(f"format={name!r} does not say which one: {_advice(name.lower())}")
    raise ValueError(f"format={name!r} is not known; accepted: {', '.join(names())}, intN, floatB_eEmM[fn|fnuz]")


def _advice(name: str) -> str:
    """Names and maxima of what a bare eEmM may mean."""
    exp_bits, man_bits = (int(digits) for digits in re.findall(r"\d+", name))
    if name == "e4m3":  # the one that bites: 480 is what CPFloat and qtorch mean, with no NaN at all
        return "its maximum is 240 (float8_e4m3, float8_e4m3fnuz), 448 (float8_e4m3fn, OCP) or 480 (no NaN), so name one"
    bits = 1 + exp_bits + man_bits
    meant = [f"float{bits}_{name}{suffix}" for suffix in ("", "fn", "fnuz")]
    return f"use one of {', '.join(meant)}"


def describe(fmt: Element | Scaled | str) -> dict:
    """What a run record says of a format: name, bits, bits_effective (scales shared out), exp_bits, man_bits, block.

    Plain Python numbers; widths must be concrete. bits_effective counts block scales; one scale per tensor, channel or
    token is not counted, since its share depends on the shape. block: None unless scales are per block.
    """
    fmt = get(fmt) if isinstance(fmt, str) else fmt
    element = fmt.element if isinstance(fmt, Scaled) else fmt
    size = fmt.block if isinstance(fmt, Scaled) else None
    bits = int(element.bits)
    shared = _scale_bits(fmt) / size if size else 0.0
    return {"name": _name(fmt), "bits": bits, "bits_effective": bits + shared, "exp_bits": int(element.exp_bits),
            "man_bits": int(element.man_bits), "block": size}


def _scale_bits(fmt: Scaled) -> int:
    return 32 if fmt.scale_element is None else int(fmt.scale_element.bits)


def _concrete(fmt):
    """A hashable stand-in: type, structure and numbers, whatever arrays hold them."""
    if isinstance(fmt, Scaled):
        scale = fmt.scale_element and _concrete(fmt.scale_element)
        return (_concrete(fmt.element), scale, fmt.granularity, fmt.axis, fmt.block, fmt.rule)
    fields = fmt.__dataclass_fields__
    return tuple(np.asarray(getattr(fmt, field)).item() for field in fields)


def _name(fmt) -> str:
    for name, known in _FORMATS.items():
        if type(known) is type(fmt) and _concrete(known) == _concrete(fmt):
            return name
    if isinstance(fmt, Element):
        return _element_name(fmt)
    size = str(fmt.block) if fmt.granularity is Granularity.BLOCK else ""
    scale = f"_{_name(fmt.scale_element)}" if fmt.rule is Rule.EXACT and fmt.scale_element is not None else ""
    return f"{_name(fmt.element)}_{fmt.granularity.value}{size}_{fmt.rule.value}{scale}"


def _element_name(element: Element) -> str:
    """The name by which `get` finds an element that the catalogue does not list."""
    exp_bits, man_bits, bits = int(element.exp_bits), int(element.man_bits), int(element.bits)
    if not element.signed_zero and not element.has_nan:
        sign = "" if element.min_value < 0 else "u"
        full = "_full" if element.min_value < 0 and element.min_value != -element.max_value else ""
        fraction = -int(element.quantum_exp)
        return f"{sign}int{bits}{full}" + (f"_f{fraction}" if fraction else "")
    variant = "ieee" if element.has_inf else "fn" if element.signed_zero else "fnuz"
    default = minifloat(exp_bits, man_bits, variant)
    bias = 1 - man_bits - int(element.quantum_exp)
    odd = "" if int(default.quantum_exp) == int(element.quantum_exp) else f"b{bias}"
    return f"float{bits}_e{exp_bits}m{man_bits}{odd}{variant.replace('ieee', '')}"


def table() -> list[dict]:
    """Rows for `bitlaw formats`: name, bits (with the share of block scales), max, smallest_normal (None for integers),
    smallest_subnormal (None if every value is normal) and native (the ml_dtypes or numpy dtype, or None)."""
    rows = []
    for name, fmt in _FORMATS.items():
        element = fmt.element if isinstance(fmt, Scaled) else fmt
        quantum, man_bits = int(element.quantum_exp), int(element.man_bits)
        whole = int(element.exp_bits) == 0
        rows.append({
            "name": name,
            "bits": describe(fmt)["bits_effective"],
            "max": float(np.finfo(np.float32).max if element.unbounded else element.max_value),
            "smallest_normal": None if whole else float(element.min_magnitude) or 2.0 ** (quantum + man_bits),
            "smallest_subnormal": 2.0**quantum if man_bits or whole else None,
            "native": _native(name),
        })
    return rows


def _native(name: str) -> str | None:
    return name if hasattr(ml_dtypes, name) or name in ("float16", "float32", "int8", "int16") else None


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


_fill()
