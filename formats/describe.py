"""What to print of a format: its name, its widths, its range."""

from __future__ import annotations

import dataclasses
import math

import jax
import ml_dtypes
import numpy as np

from formats.catalogue import get, names, resolve
from formats.elements import Element, minifloat
from formats.logarithmic import Logarithmic
from formats.midrise import Midrise
from formats.scaled import Granularity, Scaled


def describe(fmt) -> dict:
    """What a run record says of a format or a format's name: name, bits, bits_effective (scales shared out), exp_bits, man_bits
    (None for codebooks and logarithmic numbers), block (None unless scales are per block; a tile's number of values).

    Plain Python numbers; widths must be concrete. bits_effective counts block scales; one scale per tensor, channel or
    token is not counted, since its share depends on the shape.
    """
    name, fmt = (fmt, get(fmt)) if isinstance(fmt, str) else (None, resolve(fmt))
    element = fmt.element if isinstance(fmt, Scaled) else fmt
    size = fmt.block if isinstance(fmt, Scaled) else None
    size = math.prod(size) if isinstance(size, tuple) else size
    bits = int(element.bits)
    shared = _scale_bits(fmt) / size if size else 0.0
    grid = isinstance(element, Element)
    return {"name": name or name_of(fmt), "bits": bits, "bits_effective": bits + shared,
            "exp_bits": int(element.exp_bits) if grid else None, "man_bits": int(element.man_bits) if grid else None, "block": size}


def _scale_bits(fmt: Scaled) -> int:
    return 32 if fmt.scale_element is None else int(fmt.scale_element.bits)


def concrete(fmt):
    """A hashable stand-in: type, structure and numbers, whatever arrays hold them."""
    leaves, structure = jax.tree.flatten(fmt)
    return structure, tuple((np.shape(leaf), np.asarray(leaf).tobytes()) for leaf in leaves)


def name_of(fmt) -> str:
    """The catalogue's name for a format (blocks may lie along any axis), or one made of what it is."""
    if isinstance(fmt, Scaled) and not isinstance(fmt.axis, tuple):
        fmt = dataclasses.replace(fmt, axis=-1)
    wanted = concrete(fmt)
    for name in names():
        if concrete(get(name)) == wanted:
            return name
    if isinstance(fmt, Element):
        return _element_name(fmt)
    if isinstance(fmt, Logarithmic):
        return f"lns{int(fmt.bits)}_g{fmt.gamma}"
    if isinstance(fmt, Midrise):
        return f"midrise{int(fmt.bits)}"
    return _scaled_name(fmt) if isinstance(fmt, Scaled) else f"codebook{fmt.levels.shape[0]}"


def _scaled_name(fmt: Scaled) -> str:
    sizes = fmt.block if isinstance(fmt.block, tuple) else (fmt.block,)
    size = "x".join(map(str, sizes)) if fmt.granularity is Granularity.BLOCK else ""
    parts = [name_of(fmt.element), f"{fmt.granularity.value}{size}", fmt.rule.value]
    if fmt.exact and fmt.scale_element is not None:
        parts.append(name_of(fmt.scale_element))
    if fmt.amax.value != "current":
        parts.append(fmt.amax.value + ("" if fmt.amax_at is None else f"{float(fmt.amax_at):.4g}"))
    if fmt.pre_scale is not None:
        parts.append(f"pre{float(fmt.pre_scale):.4g}")
    return "_".join(parts + ["two_level"] * fmt.two_level + ["zero_point"] * fmt.zero_point)


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
    """Rows for `bitlaw formats`: name, bits (with the share of block scales), max, smallest_normal (None for integers and codebooks),
    smallest_subnormal (None if every value is normal) and native (the ml_dtypes or numpy dtype, or None)."""
    rows = []
    for name in names():
        fmt = get(name)
        element = fmt.element if isinstance(fmt, Scaled) else fmt
        normal, subnormal = _smallest(element)
        rows.append({
            "name": name,
            "bits": describe(name)["bits_effective"],
            "max": float(np.finfo(np.float32).max if element.unbounded else element.max_value),
            "smallest_normal": normal,
            "smallest_subnormal": subnormal,
            "native": _native(name),
        })
    return rows


def _smallest(element) -> tuple[float | None, float | None]:
    """Smallest positive normal and subnormal value."""
    if isinstance(element, Logarithmic):
        return 2.0 ** (-int(element.last_code) / element.gamma), None
    if isinstance(element, Midrise):
        return None, 0.5
    if not isinstance(element, Element):
        return None, float(min(level for level in element.levels if level > 0))
    quantum, man_bits, whole = int(element.quantum_exp), int(element.man_bits), int(element.exp_bits) == 0
    normal = None if whole else float(element.min_magnitude) or 2.0 ** (quantum + man_bits)
    return normal, 2.0**quantum if man_bits or whole else None


def _native(name: str) -> str | None:
    return name if hasattr(ml_dtypes, name) or name in ("float16", "float32", "int8", "int16") else None
