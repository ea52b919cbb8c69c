"""Precision: from the keys of a preset and its overrides to a frozen spec, and from the spec to the policy of the matmuls."""
from __future__ import annotations

import functools

import numpy as np

import formats
from formats.delayed import Choice
from formats.modes import Rounding
from trainer.config.checks import in_range, one_of
from trainer.config.frozen import STATE_PARTS, PrecisionSpec, QuantizerSpec, RoleSpec
from trainer.precision import FROM_ELSEWHERE, GEMMS, ROLES, Operand, PrecisionPolicy, Quantizer, Source, unmovable

WIDTHS = ("bits", "exp_bits", "man_bits", "variant")
SCALES = ("granularity", "block", "scale_format", "scale_rule", "two_level")
BLOCK, BLOCK_SCALES = 32, "float8_e4m3fn"  # where nothing else is said: block size, as in MX; scales under a tensor's, as in NVFP4
KEYS = ("format", *WIDTHS, *SCALES, "rounding", "source", "static_rms")
MAX_INTEGER_BITS = 16
UNQUANTIZED_BITS = 32  # an integer width that means float32: one program then holds quantized and float32 members
DOT_DTYPES = ("float32", "bfloat16")
DATA_DTYPES = ("float16", "bfloat16", "float32")  # of scale propagation
STATE_DTYPES = ("float32", "float16", "bfloat16")
HISTORY, MAX_HISTORY = 1024, 1 << 20


def freeze_precision(name: str, precision: dict) -> PrecisionSpec:
    """`precision`: the composed group as plain dicts, unset keys None. ValueError in one line for what cannot be."""
    one_of("precision.dot_dtype", precision["dot_dtype"], DOT_DTYPES)
    shared = _shared(precision)
    roles = [_role(role, precision[role], shared) for role in ROLES]
    quantizers = [q for role in roles for q in role.both if q is not None]
    for key in shared:
        if not any(key in _overridable(q.format) for q in quantizers):
            raise ValueError(f"precision.{key}={precision[key]}: nothing in precision={name} takes it; accepted: a precision of elements that need scales")
    history = in_range("precision.history", HISTORY if precision["history"] is None else precision["history"], 1, MAX_HISTORY)
    choice = one_of("precision.history_choice", precision["history_choice"] or Choice.MAX.value, Choice)
    delayed = any(q.source == Source.DELAYED.value for q in quantizers)
    spec = PrecisionSpec(name, precision["dot_dtype"], *roles, *((history, choice) if delayed else (None, None)), **_carried(precision, quantizers))
    if precision["bits"] is not None and not any(q is not None and q.format == "integer" for role in ROLES for q in getattr(spec, role).both):
        raise ValueError(f"precision.bits={precision['bits']}: nothing in precision={name} has a width that it sets; accepted: precision=int and its "
                         "like, or precision.weights.format=integer with precision.weights.bits")
    for role in ROLES:
        for q in getattr(spec, role).both:
            if spec.dot_dtype == "bfloat16" and q is not None and q.bits != UNQUANTIZED_BITS and not _fits_bfloat16(q):
                raise ValueError(f"precision.dot_dtype=bfloat16 would round {role} again; accepted with their format: float32")
    return spec


def _carried(precision: dict, quantizers) -> dict:
    """The keys of scale propagation and of scaled state."""
    data_dtype = precision["data_dtype"]
    if data_dtype is not None:
        one_of("precision.data_dtype", data_dtype, DATA_DTYPES)
        if precision["dot_dtype"] != "float32":
            raise ValueError(f"precision.data_dtype={data_dtype} with precision.dot_dtype={precision['dot_dtype']}: products then take the data as it is; accepted with it: float32")
    elif any(q.source == Source.PROPAGATED.value for q in quantizers):
        raise ValueError(f"source=propagated in precision={precision['name']}, where nothing carries scales; accepted: with precision.data_dtype={'|'.join(DATA_DTYPES)}")
    state = {part: precision[part] for part in STATE_PARTS if precision[part] not in (None, "float32")}
    for part, dtype in state.items():
        one_of(f"precision.{part}", dtype, STATE_DTYPES)
    return {"data_dtype": data_dtype, **state}


def _shared(precision: dict) -> dict:
    """Keys for all roles at once, those that are set."""
    for key in ("block", "two_level"):
        if precision[key] and precision["granularity"] != "block":
            raise ValueError(f"precision.{key}={precision[key]} without precision.granularity=block; accepted: with it, or a role's own granularity, block and two_level")
    return {key: precision[key] for key in ("source", "granularity", "block", "two_level") if precision[key] is not None}


def _fits_bfloat16(spec: QuantizerSpec) -> bool:
    """True if every value of the element is a bfloat16: 8 significant bits."""
    about = formats.describe(build_format(spec))
    return about["exp_bits"] <= 8 and about["man_bits"] <= (7 if about["exp_bits"] else 8)


def _role(role: str, keys: dict, shared: dict) -> RoleSpec:
    """shared: the keys of all roles."""
    specs = []
    for gemm in ("forward", "dgrad", "wgrad"):
        own = {name: value for name, value in keys[gemm].items() if value is not None}
        if gemm in GEMMS[role]:
            own_format = "format" in own
            inherited = {name: None if own_format else keys[name] for name in KEYS}
            specs.append(_quantizer(f"precision.{role}" + (f".{gemm}" if own else ""), inherited | own, shared))
        elif own:
            raise ValueError(f"precision.{role}.{gemm}={own}: {role} are not read in {gemm}; accepted: {', '.join(GEMMS[role])}")
    return RoleSpec(*specs)


def _overridable(fmt: str) -> tuple[str, ...]:
    """The keys, besides `format`, that mean something for a format."""
    if fmt == "float32":
        return ()
    free = (*SCALES, "rounding", "source", "static_rms")
    if fmt == "integer":
        return ("bits", *free)
    if fmt == "minifloat":
        return ("exp_bits", "man_bits", "variant", *free)
    if not isinstance(formats.get(fmt), formats.Scaled):
        return free
    return ("rounding",) if unmovable(formats.get(fmt)) else ("rounding", "source", "static_rms")


def _check_format(key: str, fmt: str) -> None:
    if fmt in ("integer", "minifloat"):
        return
    try:
        formats.get(fmt)
    except ValueError as error:
        raise ValueError(f"{key}.{error}; or 'integer' with bits, or 'minifloat' with exp_bits and man_bits") from None


def _quantizer(key: str, keys: dict, shared: dict) -> QuantizerSpec | None:
    """One quantizer; None where nothing is quantized."""
    fmt = keys["format"] or "float32"
    _check_format(key, fmt)
    allowed = _overridable(fmt)
    if "granularity" in shared and "granularity" in allowed:
        block = shared.get("block", BLOCK) if shared["granularity"] == "block" else None
        keys = keys | {"granularity": shared["granularity"], "block": block, "two_level": shared.get("two_level")}
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
    source_key = f"{key}.source" if keys["source"] else "precision.source"
    source = one_of(source_key, keys["source"] or shared.get("source") or Source.CURRENT.value, Source)
    if keys["two_level"] and keys["scale_format"] is None:
        keys = keys | {"scale_format": BLOCK_SCALES}
    if source == Source.NONE.value and keys["granularity"] == "tensor":
        keys = keys | {"granularity": None}  # that of any format with a scale, unless it says otherwise
    if source == Source.NONE.value and any(keys[name] is not None for name in SCALES):
        raise ValueError(f"{source_key}=none means no scale, so {', '.join(SCALES)} cannot be set; accepted with them: current, delayed, static, propagated")
    if keys["static_rms"] is not None:
        if source != Source.STATIC.value:
            raise ValueError(f"{key}.static_rms={keys['static_rms']}: the scale's source is {source}; accepted with it: source=static")
        in_range(f"{key}.static_rms", keys["static_rms"], 2.0**-100, 2.0**100, "a number from 2**-100 to 2**100")
    spec = QuantizerSpec(**{**keys, "format": fmt, "rounding": rounding, "source": source})
    try:
        built = build_format(spec)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
    _check_source(source_key, spec, built)
    return spec


def _check_source(key: str, spec: QuantizerSpec, fmt: formats.Format) -> None:
    """ValueError if the format's scales cannot come from there."""
    if not isinstance(fmt, formats.Scaled):
        return
    reason = unmovable(fmt, spec.source)
    if spec.source in FROM_ELSEWHERE and reason:
        raise ValueError(f"{key}={spec.source} with format '{spec.format}': {reason}")
    if spec.source == Source.NONE.value:
        accepted = [source.value for source in Source if source is not Source.NONE and not (reason and source.value in FROM_ELSEWHERE)]
        raise ValueError(f"{key}=none: format '{spec.format}' is made of blocks with scales; accepted: {', '.join(accepted)}")


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
    given = {"block": spec.block, "scale_format": spec.scale_format, "rule": spec.scale_rule, "two_level": spec.two_level}
    return formats.scaled(element, spec.granularity or "tensor", **{name: value for name, value in given.items() if value is not None})


@functools.cache
def _static_clip(spec: QuantizerSpec) -> np.float32 | None:
    """amax over RMS for a static scale, cached since it is searched for; any number where the width means float32, whose scale is 1."""
    if spec.bits == UNQUANTIZED_BITS:
        return np.float32(1.0)
    return Quantizer(build_format(spec), source=spec.source).static_clip


def _build_quantizer(spec: QuantizerSpec | None) -> Quantizer | None:
    if spec is None:
        return None
    if spec.source not in (Source.STATIC.value, Source.PROPAGATED.value):
        return Quantizer(build_format(spec), spec.rounding, spec.source)
    rms = None if spec.static_rms is None else np.float32(spec.static_rms)
    return Quantizer(build_format(spec), spec.rounding, spec.source, rms, _static_clip(spec))


def build_policy(spec: PrecisionSpec) -> PrecisionPolicy:
    """The policy that `trainer.linear` takes; its widths are leaves."""

    def operand(role: RoleSpec) -> Operand:
        first = _build_quantizer(role.first)
        # Blocks lie along the contraction, which differs between a role's two products: each quantizes for itself.
        blocked = first is not None and isinstance(first.format, formats.Scaled) and first.format.block is not None
        shared = role.first == role.second and not blocked
        return Operand(first, None if shared else _build_quantizer(role.second), shared)

    delayed = {} if spec.history is None else {"history": spec.history, "history_choice": spec.history_choice}
    return PrecisionPolicy(*(operand(getattr(spec, role)) for role in ROLES), dot_dtype=spec.dot_dtype, **delayed,
                           data_dtype=spec.data_dtype, **{part: getattr(spec, part) for part in STATE_PARTS})
