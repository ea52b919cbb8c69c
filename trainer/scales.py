"""Scales that do not come from the tensor at hand: of earlier steps (delayed), or known before the run (static) (DESIGN 3.5).

Delayed scaling keeps, for every layer, linear site and role, the amax of the last steps: state of its own, which no optimizer and no
gradient norm sees. What a step observes leaves the backward pass as the cotangent of an argument of zeros, the `Meter`: layers under
scan slice it as they slice parameters; micro-batches are kept apart and combine by max, as do devices.

Static scales (unit scaling, Blake et al. 2023) are constants: of tensors whose RMS is expected to be r, minifloats see values of RMS 1
(the scale is the power of two next to r), and elements whose own range means nothing at RMS 1 get the amax that is best for Gaussian data.

Shapes: L layers, S linear sites of a layer.
"""
from __future__ import annotations

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import formats
from formats import bits as fb
from trainer import telemetry
from trainer.precision import ATTENTION_TENSORS, ROLES, PrecisionPolicy, Quantizer, Source

SQRT2 = np.float32(2**0.5 * (1 + 5e-7))  # a hair above: what lies between two powers of two, as d**-0.5 of d = 32 does, goes up
EXPONENT_FIELD = np.int32(0x7F800000)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Meter:
    """Zeros whose cotangent is what linear layers saw, float32, by role: amax [] or reach [2], and telemetry's statistics [fields]; stacked
    [L, S, ...] outside of the layers. Roles that nobody asks about are left out. attention: the statistics of its tensors by name
    (ATTENTION_TENSORS), stacked [L, fields]: a layer has one attention, whatever the number of its linear sites."""

    ranges: dict[str, jax.Array] = field(default_factory=dict)
    statistics: dict[str, jax.Array] = field(default_factory=dict)
    attention: dict[str, jax.Array] = field(default_factory=dict)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Site:
    """What a linear layer is told about the scales of its place, by role; of many places together, the same stacked.

    remembered: float32, the amax that delayed quantizers go by, or the reach [2] of averaged ones, 0 where nothing has been seen yet.
    expected: float32, the RMS that static quantizers go by and learned scales start from. learned: float32, the learned scales over what
    they started from. blend: float32, how much of a quantized tensor is quantized (`precision.Ramp`); None: all. meter: where the layer
    reports.
    """

    remembered: dict[str, jax.Array] = field(default_factory=dict)
    expected: dict[str, np.float32] = field(default_factory=dict)
    learned: dict[str, jax.Array] = field(default_factory=dict)
    blend: jax.Array | None = None
    meter: Meter = field(default_factory=Meter)


# --- of earlier steps -------------------------------------------------------------------------------------------------


def empty_histories(policy: PrecisionPolicy, shape: tuple[int, int]) -> dict[str, formats.AmaxHistory | formats.RangeAverage]:
    """Role -> history of amax [H, L, S] or average of the range [L, S, 2], for the roles that need one: most policies have no such state."""
    delayed = {role: formats.amax_history(policy.history, shape) for role in policy.roles(Source.DELAYED)}
    return delayed | {role: formats.range_average(shape) for role in policy.roles(Source.EMA)}


def remembered(policy: PrecisionPolicy, histories: dict) -> dict[str, jax.Array]:
    """Role -> what its scales go by, [L, S] (amax) or [L, S, 2] (reach below and above zero); 0 where nothing has been seen."""
    return {role: history.reach if isinstance(history, formats.RangeAverage)
            else history.get(jnp.zeros(history.amax.shape[1:], jnp.float32), policy.history_choice) for role, history in histories.items()}


def pushed(policy: PrecisionPolicy, histories: dict, seen: dict[str, jax.Array]) -> dict:
    """The histories after a step that saw this much of each role."""
    return {role: history.push(seen[role], jnp.float32(policy.ema_decay)) if isinstance(history, formats.RangeAverage) else history.push(seen[role])
            for role, history in histories.items()}


def range_meter(policy: PrecisionPolicy, shape: tuple[int, int]) -> Meter:
    """A meter of what the histories need, [L, S] or [L, S, 2]."""
    delayed = {role: jnp.zeros(shape, jnp.float32) for role in policy.roles(Source.DELAYED)}
    return Meter(delayed | {role: jnp.zeros((*shape, 2), jnp.float32) for role in policy.roles(Source.EMA)})


def watched(meter: Meter, policy: PrecisionPolicy, shape: tuple[int, int]) -> Meter:
    """The meter, with telemetry's statistics of every role of linear layers, and of those of attention that some layer quantizes."""
    attention = {name: jnp.zeros((shape[0], len(telemetry.RAW)), jnp.float32) for role in policy.attention_roles for name in ATTENTION_TENSORS[role]}
    return replace(meter, statistics={role: jnp.zeros((*shape, len(telemetry.RAW)), jnp.float32) for role in ROLES}, attention=attention)


def combine(seen: Meter, data_axis: str | None) -> Meter:
    """What several micro-batches saw, [parts, L, S, ...], as one: the largest (layers see to that of all devices, to scale by it). The
    statistics of a role of attention, whose tensors are equally large parts of it, join the others as those of one site: [L, 1, fields]."""
    parts = seen.statistics | {role: jnp.concatenate([seen.attention[name] for name in names])[:, :, None]
                               for role, names in ATTENTION_TENSORS.items() if names[0] in seen.attention}
    return Meter({role: jnp.max(found, axis=0) for role, found in seen.ranges.items()}, {role: telemetry.combine(each, data_axis) for role, each in parts.items()})


def averaged_range(remembered_reach: jax.Array, current: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(smallest, largest) of the averages [2], or of the tensor at hand before there are any or where it is not finite."""
    reach = jnp.where(jnp.any(remembered_reach > 0) & jnp.all(jnp.isfinite(current)), remembered_reach, current)
    return -reach[0], reach[1]


def delayed_amax(remembered_amax: jax.Array, current: jax.Array) -> jax.Array:
    """The remembered amax; the current one before there is any, and where that is not finite, so that a NaN or an infinity shows as it
    does with current scales."""
    return jnp.where((remembered_amax > 0) & jnp.isfinite(current), remembered_amax, current)


# --- static -----------------------------------------------------------------------------------------------------------


def expected_rms(policy: PrecisionPolicy, weight_std: float, num_tokens: int) -> dict[str, np.float32]:
    """Role -> expected RMS for the static and learned quantizers of a linear layer: the weights' at the start; 1 for activations; for gradients that
    of a mean over num_tokens tokens."""
    sizes = {"weights": weight_std, "activations": 1.0, "output_gradients": 1.0 / num_tokens}
    return {role: np.float32(sizes[role]) for role in (*policy.roles(Source.STATIC), *policy.roles(Source.LEARNED))}


def static_amax(quantizer: Quantizer, expected: np.float32 | None) -> jax.Array:
    """float32: the amax of the whole tensor that gives a static quantizer its scale."""
    rms = expected if quantizer.static_rms is None else quantizer.static_rms
    if rms is None:
        raise ValueError("source='static' needs the RMS that the tensor is expected to have, which nothing here tells; accepted: Quantizer(..., static_rms=)")
    rms, fmt = jnp.asarray(rms, jnp.float32), quantizer.format
    if quantizer.static_clip is not None:
        return rms * quantizer.static_clip
    scale = nearest_power_of_two(rms)
    if not fmt.exact:  # these rules compare exponents: amax at a power of two leaves none of them a choice
        return scale * fb.to_value(fb.to_pattern(fmt.element.max_value) & EXPONENT_FIELD)
    return scale * (fmt.element.max_value * fmt.scale_element.max_value if fmt.two_level else fmt.element.max_value)


def nearest_power_of_two(x: jax.Array) -> jax.Array:
    """The power of two whose logarithm is nearest to that of x, float32 x > 0; upwards from the middle."""
    return lax.bitcast_convert_type(lax.bitcast_convert_type(x * SQRT2, jnp.int32) & EXPONENT_FIELD, jnp.float32)
