"""Precision: from the keys of a preset and its overrides to a frozen spec."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import formats
from formats.delayed import Choice
from trainer.config.checks import in_range, one_of
from trainer.config.frozen import STATE_KEYS, STATE_PARTS, PrecisionSpec, RoleSpec
from trainer.config.policies import UNQUANTIZED_BITS, added_parameters, build_format, build_policy, native_dtype, reads_second
from trainer.config.state import freeze_state
from trainer.config.quantizers import check_shards, fits_bfloat16, freeze_attention, freeze_role, overridable
from trainer.precision import GEMMS, OUTSIDE, ROLES, Source

EXECUTIONS = ("emulated", "native")
NATIVE_KINDS = ("float32", "integers", "float8")
HIGH = "high"  # an exemption that is not quantized
DOT_DTYPES = ("float32", "bfloat16")
DATA_DTYPES = ("float16", "bfloat16", "float32")  # of scale propagation
HISTORY, MAX_HISTORY, EMA_DECAY = 1024, 1 << 20, 0.99


def freeze_precision(name: str, precision: dict, preset: Callable[[str], dict]) -> PrecisionSpec:
    """`precision`: the composed group as plain dicts, unset keys None. preset(NAME): another precision, composed as it is in configs/.
    ValueError in one line for what cannot be."""
    one_of("precision.dot_dtype", precision["dot_dtype"], DOT_DTYPES)
    shared = _shared(precision)
    roles = [freeze_role(role, precision[role], shared) for role in ROLES]
    quantizers = [q for role in roles for q in role.both if q is not None]
    for role, spec in zip(ROLES[1:], roles[1:]):  # weights are whole on every device
        check_shards(role, spec.first, across_rows=False)
        check_shards(role, None if reads_second(spec) in ("shared", "moved") else spec.second, across_rows=True)
    for key in shared:
        if not any(key in overridable(q.format) for q in quantizers):
            raise ValueError(f"precision.{key}={precision[key]}: nothing in precision={name} takes it; accepted: a precision of elements that need scales")
    history = in_range("precision.history", HISTORY if precision["history"] is None else precision["history"], 1, MAX_HISTORY)
    choice = one_of("precision.history_choice", precision["history_choice"] or Choice.MAX.value, Choice)
    delayed, averaged = (any(q.source == source.value for q in quantizers) for source in (Source.DELAYED, Source.EMA))
    decay = in_range("precision.ema_decay", EMA_DECAY if precision["ema_decay"] is None else precision["ema_decay"], 0.0, 1.0 - 1e-6, "0 up to, not including, 1")
    moved = [role for role, spec in zip(ROLES, roles) if spec.reads == "moved"]
    gradients = roles[ROLES.index("output_gradients")]
    if moved and (reads_second(gradients) != "fresh" or any(q is not None and q.source != Source.CURRENT.value for q in gradients.both) or precision["data_dtype"] is not None):
        raise ValueError(f"precision.{moved[0]}.second=moved: each product's output gradient takes a scale of its own before it is quantized; accepted with it: "
                         "precision.output_gradients.second=fresh with source=current, and no data_dtype")
    spec = PrecisionSpec(name, precision["dot_dtype"], *roles, *((history, choice) if delayed else (None, None)), **_carried(precision, quantizers), **freeze_state(precision), **freeze_attention(precision),
                         ema_decay=decay if averaged else None, extra_norm=precision["extra_norm"] or None,
                         **_ramp(precision, quantizers), execution=_execution(precision, roles), pad=precision["pad"], exemptions=_exemptions(precision, preset))
    _check_bits(name, precision, (*quantizers, *(q for q in freeze_attention(precision).values() if q is not None)), preset)
    for role, both in zip(ROLES, roles):
        for q in both.both:
            if spec.dot_dtype == "bfloat16" and q is not None and q.bits != UNQUANTIZED_BITS and not fits_bfloat16(q):
                raise ValueError(f"precision.dot_dtype=bfloat16 would round {role} again; accepted with their format: float32")
    try:
        build_policy(spec)
    except ValueError as error:
        raise ValueError(f"precision={name}: {error}") from None
    return spec


def _check_bits(name: str, precision: dict, quantizers, preset: Callable[[str], dict]) -> None:
    """ValueError for a width that nothing has, unless it is the one that the preset came with, all of whose uses were overridden."""
    bits = precision["bits"]
    if bits is None or any(q.bits == bits for q in quantizers):
        return
    try:
        own = preset(precision["name"])["bits"]
    except ValueError:  # under a name of the user's there is none to ask: any width may be what it came with
        own = bits if any(q.format in ("integer", "midrise") for q in quantizers) else None
    if bits != own:
        raise ValueError(f"precision.bits={bits}: nothing in precision={name} has a width that it sets; accepted: precision=int and its "
                         "like, or a role's own, as in precision.weights.format=integer precision.weights.bits=4")


def _ramp(precision: dict, quantizers) -> dict:
    """The keys of gradual quantization, with their defaults, or none."""
    steps = precision["ramp_steps"]
    for key in ("ramp_stagger", "ramp_order"):
        if steps is None and precision[key] is not None:
            raise ValueError(f"precision.{key}={precision[key]} without precision.ramp_steps; accepted: with it")
    if steps is None:
        return {}
    in_range("precision.ramp_steps", steps, 1, MAX_HISTORY)
    attention = [q for q in freeze_attention(precision).values() if q is not None]
    outside = [place for place, name in precision["exemptions"].items() if place in OUTSIDE and name != HIGH]
    if not quantizers or attention or outside or any(q.source == Source.LEARNED.value for q in quantizers):
        raise ValueError(f"precision.ramp_steps={steps} is of the linear layers of blocks: it needs one that is quantized, and nothing else may be that it does not reach (attention, "
                         "embedding, head), nor learned scales; accepted: without them")
    if precision["data_dtype"] is not None or precision["execution"] == "native" or any(q.transform for q in quantizers):
        raise ValueError(f"precision.ramp_steps={steps} mixes a tensor with its quantized values, which a transform, native execution and scale propagation do not allow; "
                         "accepted with it: none of them")
    stagger = in_range("precision.ramp_stagger", precision["ramp_stagger"] or 0, 0, MAX_HISTORY)
    return {"ramp_steps": steps, "ramp_stagger": stagger, "ramp_order": one_of("precision.ramp_order", precision["ramp_order"] or "output", ("output", "input"))}


def _execution(precision: dict, roles: list[RoleSpec]) -> str | None:
    """"native" if both operands of every product that is quantized can be multiplied in a dtype of their own; None for emulated."""
    if one_of("precision.execution", precision["execution"], EXECUTIONS) == "emulated":
        return None
    if not any(spec for role in roles for spec in role.both):
        raise ValueError(f"precision.execution=native in precision={precision['name']}, where nothing is quantized; accepted: emulated")
    by_role = dict(zip(ROLES, roles))
    for gemm in ("forward", "dgrad", "wgrad"):
        kinds = {role: _native_kind(by_role[role], GEMMS[role].index(gemm)) for role in ROLES if gemm in GEMMS[role]}
        if len(set(kinds.values())) > 1 or kinds.get("weights", kinds.get("activations")) not in NATIVE_KINDS:
            found = " and ".join(f"{role} in {kind}" for role, kind in kinds.items())
            raise ValueError(f"precision.execution=native: {gemm} multiplies {found}; accepted: integers of at most 8 bits, or float8_e4m3fn and float8_e5m2, "
                             "for both, with scales constant along the contraction (granularity tensor, or channel and token with second=fresh); or execution=emulated")
    if precision["data_dtype"] is not None:
        raise ValueError(f"precision.execution=native with precision.data_dtype={precision['data_dtype']}: scale propagation is emulated; accepted with it: emulated")
    return "native"


def _native_kind(role: RoleSpec, place: int) -> str:
    """What an operand of a product can be multiplied in, one of NATIVE_KINDS ("float32" is not quantized), or what it is."""
    spec = role.both[place]
    if spec is None:
        return "float32"
    dtype = native_dtype(spec)
    shared = place == 1 and reads_second(role) == "shared"
    constant = spec.source == Source.NONE.value or spec.granularity in (None, "tensor") or (spec.granularity in ("channel", "token") and not shared)
    if dtype is None or not constant or (spec.source != Source.NONE.value and build_format(spec).block is not None):
        scales = "" if constant else " with scales along the contraction"
        return f"{formats.describe(build_format(spec))['name']}{scales}"
    return "integers" if dtype == "int8" else "float8"


def _exemptions(precision: dict, preset: Callable[[str], dict]) -> tuple[tuple[str, PrecisionSpec | None], ...] | None:
    """Place -> its precision, None for one that is kept high. Places are checked where the model is known."""
    return tuple((where, _exempt(where, name, precision, preset)) for where, name in precision["exemptions"].items()) or None


def _exempt(where: str, name: str, precision: dict, preset: Callable[[str], dict]) -> PrecisionSpec | None:
    if name == HIGH:
        return None
    key = f"precision.exemptions.{where}={name}"
    try:
        found = preset(name)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
    spec = freeze_precision(name, found | {"data_dtype": precision["data_dtype"], "pad": precision["pad"]}, preset)
    if (spec.execution == "native") != (precision["execution"] == "native"):
        raise ValueError(f"{key} is {spec.execution or 'emulated'} and precision.execution={precision['execution']}; accepted: {HIGH}, or a precision of the same execution")
    if spec.history is not None or spec.ema_decay is not None or added_parameters(spec)["learned"]:
        raise ValueError(f"{key} has delayed, averaged or learned scales, which only a whole model keeps; accepted: {HIGH}, or a precision with current scales")
    for what, has in (("exemptions", spec.exemptions), ("extra_norm", spec.extra_norm), ("ramp_steps", spec.ramp_steps)):
        if has:
            raise ValueError(f"{key} has {what}, which only a whole model has; accepted: {HIGH}, or a precision without")
    if where == "embedding" and spec.weights.first is not None and spec.weights.first.transform is not None:
        raise ValueError(f"{key} rotates both operands of a product, and an embedding has one; accepted: {HIGH}, or a precision whose weights have no transform")
    return replace(spec, **{key: None for key in (*STATE_PARTS, *STATE_KEYS)})


def _carried(precision: dict, quantizers) -> dict:
    """The key of scale propagation."""
    data_dtype = precision["data_dtype"]
    if data_dtype is not None:
        one_of("precision.data_dtype", data_dtype, DATA_DTYPES)
        if precision["dot_dtype"] != "float32":
            raise ValueError(f"precision.data_dtype={data_dtype} with precision.dot_dtype={precision['dot_dtype']}: products then take the data as it is; accepted with it: float32")
        for source in (Source.EMA, Source.LEARNED):
            if any(q.source == source.value for q in quantizers):
                raise ValueError(f"source={source.value} with precision.data_dtype={data_dtype}: under scale propagation scales are carried, or of the data at hand; accepted: "
                                 "propagated, current, delayed, static, none")
    elif any(q.source == Source.PROPAGATED.value for q in quantizers):
        raise ValueError(f"source=propagated in precision={precision['name']}, where nothing carries scales; accepted: with precision.data_dtype={'|'.join(DATA_DTYPES)}")
    return {"data_dtype": data_dtype}


def _shared(precision: dict) -> dict:
    """Keys for all roles at once, those that are set."""
    for key in ("block", "two_level"):
        if precision[key] and precision["granularity"] != "block":
            raise ValueError(f"precision.{key}={precision[key]} without precision.granularity=block; accepted: with it, or a role's own granularity, block and two_level")
    return {key: precision[key] for key in ("source", "granularity", "block", "two_level") if precision[key] is not None}
