"""Precision: from the keys of a preset and its overrides to a frozen spec, and from the spec to the policy of the matmuls."""
from __future__ import annotations

import formats
from formats.modes import Rounding
from trainer.config.checks import in_range, one_of
from trainer.config.frozen import PrecisionSpec, QuantizerSpec, RoleSpec
from trainer.precision import GEMMS, ROLES, Operand, PrecisionPolicy, Quantizer, Source

WIDTHS = ("bits", "exp_bits", "man_bits", "variant")
SCALES = ("granularity", "block", "scale_format", "scale_rule")
KEYS = ("format", *WIDTHS, *SCALES, "rounding", "source")
MAX_INTEGER_BITS = 16
UNQUANTIZED_BITS = 32  # an integer width that means float32: one program then holds quantized and float32 members
DOT_DTYPES = ("float32", "bfloat16")


def freeze_precision(name: str, precision: dict) -> PrecisionSpec:
    """`precision`: the composed group as plain dicts, unset keys None. ValueError in one line for what cannot be."""
    one_of("precision.dot_dtype", precision["dot_dtype"], DOT_DTYPES)
    spec = PrecisionSpec(name, precision["dot_dtype"], *(_role(role, precision[role]) for role in ROLES))
    if precision["bits"] is not None and not any(q is not None and q.format == "integer" for role in ROLES for q in getattr(spec, role).both):
        raise ValueError(f"precision.bits={precision['bits']}: nothing in precision={name} has a width that it sets; accepted: precision=int and its "
                         "like, or precision.weights.format=integer with precision.weights.bits")
    for role in ROLES:
        for q in getattr(spec, role).both:
            if spec.dot_dtype == "bfloat16" and q is not None and q.bits != UNQUANTIZED_BITS and not _fits_bfloat16(q):
                raise ValueError(f"precision.dot_dtype=bfloat16 would round {role} again; accepted with their format: float32")
    return spec


def _fits_bfloat16(spec: QuantizerSpec) -> bool:
    """True if every value of the element is a bfloat16: 8 significant bits."""
    about = formats.describe(build_format(spec))
    return about["exp_bits"] <= 8 and about["man_bits"] <= (7 if about["exp_bits"] else 8)


def _role(role: str, keys: dict) -> RoleSpec:
    specs = []
    for gemm in ("forward", "dgrad", "wgrad"):
        own = {name: value for name, value in keys[gemm].items() if value is not None}
        if gemm in GEMMS[role]:
            own_format = "format" in own
            inherited = {name: None if own_format else keys[name] for name in KEYS}
            specs.append(_quantizer(f"precision.{role}" + (f".{gemm}" if own else ""), inherited | own))
        elif own:
            raise ValueError(f"precision.{role}.{gemm}={own}: {role} are not read in {gemm}; accepted: {', '.join(GEMMS[role])}")
    return RoleSpec(*specs)


def _overridable(fmt: str) -> tuple[str, ...]:
    """The keys, besides `format`, that mean something for a format."""
    if fmt == "float32":
        return ()
    if fmt == "integer":
        return ("bits", *SCALES, "rounding", "source")
    if fmt == "minifloat":
        return ("exp_bits", "man_bits", "variant", *SCALES, "rounding", "source")
    return ("rounding",) if isinstance(formats.get(fmt), formats.Scaled) else (*SCALES, "rounding", "source")


def _check_format(key: str, fmt: str) -> None:
    if fmt in ("integer", "minifloat"):
        return
    try:
        formats.get(fmt)
    except ValueError as error:
        raise ValueError(f"{key}.{error}; or 'integer' with bits, or 'minifloat' with exp_bits and man_bits") from None


def _quantizer(key: str, keys: dict) -> QuantizerSpec | None:
    """One quantizer; None where nothing is quantized."""
    fmt = keys["format"] or "float32"
    _check_format(key, fmt)
    allowed = _overridable(fmt)
    for name in KEYS[1:]:
        if keys[name] is not None and name not in allowed:
            reason = "has a fixed width" if name in WIDTHS else f"takes no {name}"
            raise ValueError(f"{key}.{name}={keys[name]}: format '{fmt}' {reason}; can be overridden: {', '.join(('format', *allowed))}")
    if fmt == "float32":
        return None
    if fmt == "integer" and keys["bits"] != UNQUANTIZED_BITS:
        in_range(f"{key}.bits", keys["bits"], 2, MAX_INTEGER_BITS, f"2 to {MAX_INTEGER_BITS}, or {UNQUANTIZED_BITS} for float32")
    if fmt == "minifloat":
        in_range(f"{key}.exp_bits", keys["exp_bits"], 0, 8)
        in_range(f"{key}.man_bits", keys["man_bits"], 0, 23)
    rounding = one_of(f"{key}.rounding", keys["rounding"] or "nearest_even", Rounding)
    source = one_of(f"{key}.source", keys["source"] or "current", Source)
    if source == "none" and any(keys[name] is not None for name in SCALES):
        raise ValueError(f"{key}.source=none means no scale, so {', '.join(SCALES)} cannot be set; accepted with them: current")
    spec = QuantizerSpec(**{**keys, "format": fmt, "rounding": rounding, "source": source})
    try:
        build_format(spec)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
    return spec


def build_format(spec: QuantizerSpec) -> formats.Format:
    """The format of a spec, with concrete widths."""
    if spec.format == "integer":
        element = formats.identity() if spec.bits == UNQUANTIZED_BITS else formats.integer(spec.bits)
    elif spec.format == "minifloat":
        element = formats.minifloat(spec.exp_bits, spec.man_bits, spec.variant or "ieee")
    else:
        element = formats.get(spec.format)
    if isinstance(element, formats.Scaled) or spec.source == "none":
        return element
    given = {"block": spec.block, "scale_format": spec.scale_format, "rule": spec.scale_rule}
    return formats.scaled(element, spec.granularity or "tensor", **{name: value for name, value in given.items() if value is not None})


def _build_quantizer(spec: QuantizerSpec | None) -> Quantizer | None:
    return None if spec is None else Quantizer(build_format(spec), spec.rounding, spec.source)


def build_policy(spec: PrecisionSpec) -> PrecisionPolicy:
    """The policy that `trainer.linear` takes; its widths are leaves."""

    def operand(role: RoleSpec) -> Operand:
        first = _build_quantizer(role.first)
        # Blocks lie along the contraction, which differs between a role's two products: each quantizes for itself.
        blocked = first is not None and isinstance(first.format, formats.Scaled) and first.format.block is not None
        shared = role.first == role.second and not blocked
        return Operand(first, None if shared else _build_quantizer(role.second), shared)

    return PrecisionPolicy(*(operand(getattr(spec, role)) for role in ROLES), dot_dtype=spec.dot_dtype)
