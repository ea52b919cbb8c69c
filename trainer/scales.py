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
from trainer.precision import ROLES, PrecisionPolicy, Quantizer, Source

SQRT2 = np.float32(2**0.5 * (1 + 5e-7))  # a hair above: what lies between two powers of two, as d**-0.5 of d = 32 does, goes up
EXPONENT_FIELD = np.int32(0x7F800000)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Meter:
    """Zeros whose cotangent is what linear layers saw, float32, by role: amax [], and telemetry's statistics [fields]; stacked [L, S, ...]
    outside of the layers. Roles that nobody asks about are left out."""

    amax: dict[str, jax.Array] = field(default_factory=dict)
    statistics: dict[str, jax.Array] = field(default_factory=dict)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Site:
    """What a linear layer is told about the scales of its place, by role; of many places together, the same stacked.

    remembered: float32, the amax that delayed quantizers go by, 0 where nothing has been seen yet. expected: float32, the RMS that
    static quantizers go by. meter: where the layer reports.
    """

    remembered: dict[str, jax.Array] = field(default_factory=dict)
    expected: dict[str, np.float32] = field(default_factory=dict)
    meter: Meter = field(default_factory=Meter)


# --- delayed ----------------------------------------------------------------------------------------------------------


def empty_histories(policy: PrecisionPolicy, shape: tuple[int, int]) -> dict[str, formats.AmaxHistory]:
    """Role -> history of amax [H, L, S], for the roles that need one: a policy without delayed quantizers has no such state."""
    return {role: formats.amax_history(policy.history, shape) for role in policy.roles(Source.DELAYED)}


def remembered(policy: PrecisionPolicy, histories: dict[str, formats.AmaxHistory]) -> dict[str, jax.Array]:
    """Role -> the amax that counts, [L, S]; 0 where nothing has been seen."""
    nothing = {role: jnp.zeros(history.amax.shape[1:], jnp.float32) for role, history in histories.items()}
    return {role: history.get(nothing[role], policy.history_choice) for role, history in histories.items()}


def amax_meter(policy: PrecisionPolicy, shape: tuple[int, int]) -> Meter:
    """A meter of what the histories need, [L, S]."""
    return Meter({role: jnp.zeros(shape, jnp.float32) for role in policy.roles(Source.DELAYED)})


def watched(meter: Meter, shape: tuple[int, int]) -> Meter:
    """The meter, with telemetry's statistics of every role."""
    return replace(meter, statistics={role: jnp.zeros((*shape, len(telemetry.RAW)), jnp.float32) for role in ROLES})


def combine(seen: Meter, data_axis: str | None) -> Meter:
    """What several micro-batches saw, [parts, L, S, ...], as one: the largest amax (layers see to that of all devices, to scale by it)."""
    return Meter({role: jnp.max(amax, axis=0) for role, amax in seen.amax.items()},
                 {role: telemetry.combine(parts, data_axis) for role, parts in seen.statistics.items()})


def delayed_amax(remembered_amax: jax.Array, current: jax.Array) -> jax.Array:
    """The remembered amax; the current one before there is any, and where that is not finite, so that a NaN or an infinity shows as it
    does with current scales."""
    return jnp.where((remembered_amax > 0) & jnp.isfinite(current), remembered_amax, current)


# --- static -----------------------------------------------------------------------------------------------------------


def expected_rms(policy: PrecisionPolicy, weight_std: float, num_tokens: int) -> dict[str, np.float32]:
    """Role -> expected RMS for the static quantizers of a linear layer: the weights' at the start; 1 for activations; for gradients that
    of a mean over num_tokens tokens."""
    sizes = {"weights": weight_std, "activations": 1.0, "output_gradients": 1.0 / num_tokens}
    return {role: np.float32(sizes[role]) for role in policy.roles(Source.STATIC)}


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
