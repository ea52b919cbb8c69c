"""One role's quantizers: from the keys of a preset and its overrides to frozen specs. Every refusal is one line."""
from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
import numpy as np

import formats
from formats import Amax, Granularity
from formats.modes import Rounding
from trainer.config.checks import in_range, one_of
from trainer.config.frozen import QuantizerSpec, RoleSpec
from trainer.config.policies import UNQUANTIZED_BITS, build_format, build_quantizer
from trainer.methods.rotation import Kind
from trainer.precision import ATTENTION_ROLES, FROM_ELSEWHERE, GEMMS, Gradient, Source, unmovable

WIDTHS = ("bits", "exp_bits", "man_bits", "variant")
SCALES = ("granularity", "block", "scale_format", "scale_rule", "two_level", "amax", "amax_at", "pre_scale", "zero_point")
ROUNDED = ("rounding", "transform", "transform_block", "gradient")  # of any quantizer
BLOCK, BLOCK_SCALES = 32, "float8_e4m3fn"  # where nothing else is said: block size, as in MX; scales under a tensor's, as in NVFP4
KEYS = ("format", *WIDTHS, *SCALES, *ROUNDED, "source", "static_rms")
MOVABLE = ("tensor", "channel", "token")
READS = ("shared", "fresh", "chained", "moved")
MAX_INTEGER_BITS = 16
WHOLE_STATISTICS = (Amax.MSE.value, Amax.PERCENTILE.value)  # need all values of a scale at once


def fits_bfloat16(spec: QuantizerSpec) -> bool:
    """True if every value of the element is a bfloat16: 8 significant bits."""
    fmt = build_format(spec)
    element = fmt.element if isinstance(fmt, formats.Scaled) else fmt
    if isinstance(element, formats.Midrise):  # k + 1/2 is an odd number of halves below 2**bits
        return int(element.bits) <= 8
    if isinstance(element, formats.Codebook):
        levels = np.asarray(element.levels)
        return bool(np.all(levels == levels.astype(jnp.bfloat16).astype(np.float32)))
    if isinstance(element, formats.Logarithmic):
        return element.gamma == 1  # whole powers of two
    return element.exp_bits <= 8 and element.man_bits <= (7 if element.exp_bits else 8)


def check_shards(role: str, spec: QuantizerSpec | None, across_rows: bool) -> None:
    """ValueError for a statistic over the tokens of a batch that devices cannot put together. across_rows: scales that are constant along
    the tensor's first dimension lie along tokens."""
    if spec is None or spec.amax not in WHOLE_STATISTICS or spec.source == Source.NONE.value:
        return
    granularity = build_format(spec).granularity
    if granularity is Granularity.TENSOR or (across_rows and granularity is not Granularity.BLOCK):
        raise ValueError(f"precision.{role}.amax={spec.amax} with a scale over all tokens of a batch, which may be split over devices: it is not made of the amax of the parts; "
                         "accepted there: current, rms, std, absmean, or a scale for each token (granularity=token, in wgrad second=shared) or block")


def freeze_role(role: str, keys: dict, shared: dict) -> RoleSpec:
    """shared: the keys of all roles."""
    specs = []
    for gemm in ("forward", "dgrad", "wgrad"):
        own = {name: value for name, value in keys[gemm].items() if value is not None}
        if gemm in GEMMS[role]:
            own_format = "format" in own
            inherited = {name: None if own_format else keys[name] for name in KEYS}
            if specs:  # a tensor is masked once, by its forward product
                inherited["gradient"] = None
            specs.append(_quantizer(f"precision.{role}" + (f".{gemm}" if own else ""), inherited | own, shared))
        elif own:
            raise ValueError(f"precision.{role}.{gemm}={own}: {role} are not read in {gemm}; accepted: {', '.join(GEMMS[role])}")
    masked = keys["gradient"] or keys["dgrad"]["gradient"] or keys["wgrad"]["gradient"]
    if role == "output_gradients" and masked not in (None, Gradient.STRAIGHT_THROUGH.value):
        raise ValueError(f"precision.{role}.gradient={masked}: nothing is differentiated through output gradients; accepted there: straight_through")
    reads = keys["second"] if keys["second"] is None else one_of(f"precision.{role}.second", keys["second"], READS)
    first, second = specs
    if reads == "moved" and (role == "output_gradients" or first is None or first.source != Source.CURRENT.value or first.granularity not in MOVABLE or first.transform is not None):
        raise ValueError(f"precision.{role}.second=moved: a scale moves onto the output gradients, from weights or activations with a current scale for the tensor, a channel or a "
                         "token and no transform; accepted here: shared, fresh, chained")
    if reads in ("shared", "moved") and (None if first is None else replace(first, gradient=None)) != second:
        raise ValueError(f"precision.{role}.second={reads}: its two products are quantized differently; accepted: fresh, chained, or the same keys for both")
    if reads == "chained" and (first is None or second is None):
        raise ValueError(f"precision.{role}.second=chained quantizes twice, but {role} have no format in {GEMMS[role][0 if first is None else 1]}; accepted: a format for both products")
    if any(q is not None and q.source == Source.LEARNED.value for q in specs) and (role == "output_gradients" or reads not in (None, "shared") or (
            first is None or replace(first, gradient=None) != second)):
        raise ValueError(f"precision.{role}.source=learned: a learned step is that of weights or activations in both of their products; accepted: with the same keys for "
                         "both, second=shared or null, in weights and activations")
    return RoleSpec(first, second, reads)


def freeze_attention(precision: dict) -> dict[str, QuantizerSpec | None]:
    """Role of attention -> its quantizer."""
    found = {}
    for role in ATTENTION_ROLES:
        spec = _quantizer(f"precision.{role}", precision[role], {})
        if spec is not None and (spec.transform or spec.source not in (Source.CURRENT.value, Source.NONE.value) or spec.gradient == Gradient.TRUST.value
                                 or isinstance(spec.block, tuple)):
            raise ValueError(f"precision.{role}={spec.format}: attention quantizes the tensors at hand as they are; accepted: source current or none, no transform, "
                             "gradient straight_through or clipped, block one number")
        if spec is not None and precision["data_dtype"] is not None:
            raise ValueError(f"precision.{role}={spec.format} with precision.data_dtype={precision['data_dtype']}: under scale propagation attention has rules of its own; accepted with it: float32")
        check_shards(role, spec, across_rows=False)
        found[role] = spec
    return found


def overridable(fmt: str) -> tuple[str, ...]:
    """The keys, besides `format`, that mean something for a format."""
    if fmt == "float32":
        return ()
    free = (*SCALES, *ROUNDED, "source", "static_rms")
    if fmt in ("integer", "midrise"):
        return ("bits", *free)
    if fmt == "minifloat":
        return ("exp_bits", "man_bits", "variant", *free)
    if not isinstance(formats.get(fmt), formats.Scaled):
        return free
    return ROUNDED if unmovable(formats.get(fmt)) else (*ROUNDED, "source", "static_rms")


def _check_format(key: str, fmt: str) -> None:
    if fmt in ("integer", "midrise", "minifloat"):
        return
    try:
        formats.get(fmt)
    except ValueError as error:
        raise ValueError(f"{key}.{error}; or 'integer' or 'midrise' with bits, or 'minifloat' with exp_bits and man_bits") from None


def _quantizer(key: str, keys: dict, shared: dict) -> QuantizerSpec | None:
    """One quantizer; None where nothing is quantized."""
    fmt = keys["format"] or "float32"
    _check_format(key, fmt)
    allowed = overridable(fmt)
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
        in_range(f"{key}.bits", keys["bits"], 1, MAX_INTEGER_BITS, f"1 to {MAX_INTEGER_BITS}, or {UNQUANTIZED_BITS} for float32")
    if fmt == "midrise":
        in_range(f"{key}.bits", keys["bits"], 1, MAX_INTEGER_BITS)
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
    own = {"format": fmt, "rounding": rounding, "source": source, "block": _block(f"{key}.block", keys["block"]), **_turned(key, keys)}
    spec = QuantizerSpec(**{**keys, **own})
    try:
        built = build_format(spec)
        _check_source(source_key, spec, built)
        build_quantizer(spec)
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith("precision.") else f"{key}: {error}") from None
    return spec


def _block(key: str, block):
    """A block size, or the two of a tile."""
    if isinstance(block, list) and len(block) == 2 and all(isinstance(size, int) and size > 0 for size in block):
        return tuple(block)
    if block is not None and not (isinstance(block, int) and block > 0):
        raise ValueError(f"{key}={block} is not possible; accepted: a number of values along the contraction, or two, [along it,across it]")
    return block


def _turned(key: str, keys: dict) -> dict:
    """The keys of the transform and of the gradient; what they do by themselves is left unset."""
    if keys["transform"] is not None:
        one_of(f"{key}.transform", keys["transform"], Kind)
    elif keys["transform_block"] is not None:
        raise ValueError(f"{key}.transform_block={keys['transform_block']} without a transform; accepted: with transform={'|'.join(kind.value for kind in Kind)}")
    gradient = one_of(f"{key}.gradient", keys["gradient"] or Gradient.STRAIGHT_THROUGH.value, Gradient)
    return {"gradient": None if gradient == Gradient.STRAIGHT_THROUGH.value else gradient}


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
