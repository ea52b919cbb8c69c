"""From a frozen precision to what runs: formats, quantizers and the policy of the matmuls."""
from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np

import formats
from trainer.config.frozen import STATE_KEYS, STATE_PARTS, PrecisionSpec, QuantizerSpec, RoleSpec
from trainer.methods.rotation import Kind, Rotation
from trainer.precision import ATTENTION_ROLES, ROLES, Exemption, Gradient, Operand, PrecisionPolicy, Quantizer, Ramp, Source

UNQUANTIZED_BITS = 32  # an integer width that means float32: one program then holds quantized and float32 members
TRANSFORM_BLOCK = 32  # where nothing else is said, as Quartet has it


def build_format(spec: QuantizerSpec) -> formats.Format:
    """The format of a spec, with concrete widths."""
    amax = spec.amax
    if spec.format == "integer" and spec.bits == 1:
        element, amax = formats.binary(), amax or "absmean"  # the mean magnitude, with the least error (XNOR-Net, Rastegari et al. 2016, eq. 6)
    elif spec.format == "integer":
        element = formats.identity() if spec.bits == UNQUANTIZED_BITS else formats.integer(spec.bits, signed=not spec.zero_point)
    elif spec.format == "midrise":
        element = formats.midrise(spec.bits)
    elif spec.format == "minifloat":
        element = formats.minifloat(spec.exp_bits, spec.man_bits, spec.variant or "ieee")
    else:
        element = formats.get(spec.format)
    if isinstance(element, formats.Scaled) or spec.source == "none":
        return element
    given = {"block": spec.block, "scale_format": spec.scale_format, "rule": spec.scale_rule, "two_level": spec.two_level, "amax": amax,
             "amax_at": spec.amax_at, "pre_scale": spec.pre_scale, "zero_point": spec.zero_point, "axis": (0, 1) if isinstance(spec.block, tuple) else None}
    return formats.scaled(element, spec.granularity or "tensor", **{name: value for name, value in given.items() if value is not None})


@functools.cache
def _static_clip(spec: QuantizerSpec) -> np.float32 | None:
    """amax over RMS for a static scale, cached since it is searched for; any number where the width means float32, whose scale is 1."""
    if spec.bits == UNQUANTIZED_BITS:
        return np.float32(1.0)
    return Quantizer(build_format(spec), source=spec.source).static_clip


def build_quantizer(spec: QuantizerSpec | None, native: bool = False) -> Quantizer | None:
    """The quantizer of a spec; native: its numbers are held in a dtype of their own. ValueError where something does not fit together."""
    if spec is None:
        return None
    rms = None if spec.static_rms is None else np.float32(spec.static_rms)
    clip = _static_clip(spec) if spec.source in (Source.STATIC.value, Source.PROPAGATED.value) else None
    turn = None if spec.transform is None else Rotation(Kind(spec.transform), spec.transform_block or TRANSFORM_BLOCK)
    return Quantizer(build_format(spec), spec.rounding, spec.source, rms, clip, turn, spec.gradient or Gradient.STRAIGHT_THROUGH.value,
                     native_dtype(spec) if native else None)


def native_dtype(spec: QuantizerSpec) -> str | None:
    """The dtype whose products a backend may run natively that holds the format's numbers exactly; None where there is none."""
    if spec.format == "integer":
        return "int8" if spec.bits <= 8 and not spec.zero_point else None
    if spec.format == "midrise":
        return None
    element = build_format(spec)
    element = element.element if isinstance(element, formats.Scaled) else element
    name = formats.describe(element)["name"]
    if name.startswith("int") and name[3:].isdecimal() and int(name[3:]) <= 8:
        return "int8"
    return name if name in ("float8_e4m3fn", "float8_e5m2") else None


def build_policy(spec: PrecisionSpec) -> PrecisionPolicy:
    """The policy that `trainer.linear` takes; its widths are leaves."""

    native = spec.execution == "native"

    def operand(role: RoleSpec) -> Operand:
        first, reads = build_quantizer(role.first, native), reads_second(role)
        shared = reads in ("shared", "moved")
        return Operand(first, None if shared else build_quantizer(role.second, native), shared, reads == "chained", reads == "moved")

    delayed = {} if spec.history is None else {"history": spec.history, "history_choice": spec.history_choice}
    if spec.ema_decay is not None:
        delayed["ema_decay"] = spec.ema_decay
    policy = PrecisionPolicy(*(operand(getattr(spec, role)) for role in ROLES), dot_dtype=spec.dot_dtype, **delayed,
                             data_dtype=spec.data_dtype, extra_norm=bool(spec.extra_norm), **{key: value for key in (*STATE_PARTS, *STATE_KEYS) if (value := getattr(spec, key)) is not None})
    if spec.ramp_steps is not None:
        policy = replace(policy, ramp=Ramp(np.float32(spec.ramp_steps), np.float32(spec.ramp_stagger), spec.ramp_order == "output"))
    policy = replace(policy, **{role: build_quantizer(getattr(spec, role)) for role in ATTENTION_ROLES})
    exemptions = [Exemption(where, policy.without_quantizers() if there is None else build_policy(there)) for where, there in spec.exemptions or ()]
    return replace(policy, exemptions=tuple(exemptions))


def added_parameters(spec: PrecisionSpec) -> dict:
    """What a precision adds to the parameters of every block, as arguments of `ModelConfig`."""
    roles = tuple(role for role in ROLES for q in getattr(spec, role).both[:1] if q is not None and q.source == Source.LEARNED.value)
    return {"extra_norm": bool(spec.extra_norm), "learned": roles}


def reads_second(role: RoleSpec) -> str:
    """What the second product of a role reads: what it says, or the first one's numbers where both would be quantized alike. Blocks and
    rotations lie along the contraction, which differs between the two; tiles with equal sides lie along both."""
    if role.reads is not None:
        return role.reads
    first = role.first
    if first is None:
        return "shared" if role.second is None else "fresh"
    block = build_format(first).block if first.source != "none" else None
    along = first.transform is not None or (block is not None and not (isinstance(block, tuple) and len(set(block)) == 1))
    return "shared" if replace(first, gradient=None) == role.second and not along else "fresh"
