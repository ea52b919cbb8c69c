"""The keys that say how what lives between steps is held."""
from __future__ import annotations

import formats
from formats.modes import Rounding
from trainer.config.checks import one_of
from trainer.config.frozen import STATE_PARTS
from trainer.precision import Arithmetic, Storage
from trainer.stored import BLOCKWISE, SCALABLE


def freeze_state(precision: dict) -> dict:
    """The fields of a `PrecisionSpec` that are of the state, those that say nothing left out. ValueError in one line for what cannot be."""
    found = {part: _format(part, precision[part]) for part in STATE_PARTS if precision[part] not in (None, "float32")}
    found |= _rounding("master_rounding", precision, ("master_weights",), found) | _rounding("adam_rounding", precision, ("adam_m", "adam_v"), found)
    if precision["scaled_state"] is False:
        if not any(found.get(part) in SCALABLE for part in STATE_PARTS):
            raise ValueError("precision.scaled_state=false: no part of the state is held in float16 or bfloat16 with a scale; accepted with it: "
                             f"precision.{'|'.join(STATE_PARTS)}={'|'.join(SCALABLE)}, or null")
        found["scaled_state"] = False
    arithmetic = one_of("precision.optimizer_arithmetic", precision["optimizer_arithmetic"] or Arithmetic.FLOAT32.value, Arithmetic)
    if arithmetic != Arithmetic.FLOAT32.value:
        given = next((part for part in STATE_PARTS if part in found), None)
        if given is not None:
            raise ValueError(f"precision.{given}={found[given]} with precision.optimizer_arithmetic={arithmetic}: weights and moments are then bfloat16; accepted with it: null")
        found["optimizer_arithmetic"] = arithmetic
    if one_of("precision.storage", precision["storage"] or Storage.PACKED.value, Storage) != Storage.PACKED.value:
        if not any(part in found for part in STATE_PARTS) and arithmetic == Arithmetic.FLOAT32.value:
            raise ValueError(f"precision.storage={precision['storage']}: all of the state is float32 already; accepted: null, or with precision.master_weights=bfloat16 and its like")
        found["storage"] = precision["storage"]
    return found


def _rounding(key: str, precision: dict, parts: tuple[str, ...], formats_of: dict) -> dict:
    """The key, where it is set to what is not the default and something is rounded."""
    rounding = one_of(f"precision.{key}", precision[key] or Rounding.NEAREST_EVEN.value, Rounding)
    if rounding == Rounding.NEAREST_EVEN.value:
        return {}
    if not any(part in formats_of for part in parts):
        raise ValueError(f"precision.{key}={rounding}, but {' and '.join(parts)} stay in float32; accepted: with precision.{parts[0]}=bfloat16 or another format")
    if BLOCKWISE in (formats_of.get(part) for part in parts) and rounding != Rounding.STOCHASTIC.value:
        raise ValueError(f"precision.{key}={rounding} with {BLOCKWISE}; accepted with it: {Rounding.NEAREST_EVEN.value}, {Rounding.STOCHASTIC.value}")
    return {key: rounding}


def _format(part: str, name: str) -> str:
    """The name of a format that the part can be held in."""
    if name == BLOCKWISE and part != "master_weights":
        return name
    accepted = f"float32, {', '.join(SCALABLE)}, float8_e4m3fn, float8_e5m2, another element of `bitlaw formats`"
    accepted += "" if part == "master_weights" else f", a block format such as mxfp8_e4m3, {BLOCKWISE}"
    try:
        fmt = formats.get(name)
    except ValueError:
        raise ValueError(f"precision.{part}={name} is not known; accepted: {accepted}") from None
    element = isinstance(fmt, formats.Element) and fmt.min_magnitude == 0 and not fmt.unbounded
    if not element and (part == "master_weights" or not isinstance(fmt, formats.Scaled)):
        raise ValueError(f"precision.{part}={name} is not possible; accepted: {accepted}")
    return name
