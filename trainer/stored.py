"""What lives between steps in the formats of a policy: master weights, Adam's moments, and the optimizer that keeps them there.

float16 and bfloat16, rounded to nearest, are ScaledArrays (`scaled_state`) unless the policy says otherwise. Rounded any other way, float16
is scaled as FP8 is: parameters have a power-of-two scale for each tensor (of each layer), moments one for blocks of up to 256 along the last
dimension; bfloat16 then has no scale, since its range is that of float32. Everything narrow has the size in memory, and in a checkpoint, that
its format says, unless storage is "emulated": then the same values are held as float32.
"""
from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jax import lax

import formats
from formats import QArray
from trainer.keys import fold_in
from trainer.optimizers import OPTIMIZERS, DescentQuality, blockwise8, collage_adamw, descent_quality, low_precision_moments, low_precision_params, round_bfloat16, round_params
from trainer.precision import Arithmetic, PrecisionPolicy, Storage
from trainer.propagation import is_scaled, unscaled
from trainer.scaled_state import STACKED, scaled_moments, with_scales

SALT = 0x5354  # random bits of the state are apart from those of products
MOMENT_BLOCK = 256  # values along the last dimension that share the scale of FP8 moments, as in torchao's AdamWFp8
SCALABLE = ("float16", "bfloat16")
BLOCKWISE = "blockwise8"


def optimizer(name: str, numbers, lr_tree, decay_tree, policy: PrecisionPolicy, key) -> optax.GradientTransformation:
    """The optimizer called `name` with its state, and the parameters that it leads to, in the policy's formats. key: uint32[2] of the run."""
    if policy.optimizer_arithmetic != Arithmetic.FLOAT32.value:
        variant = policy.optimizer_arithmetic.removeprefix("collage_")
        return collage_adamw(lr_tree, numbers.beta1, numbers.beta2, numbers.eps, numbers.weight_decay, decay_tree, variant, measure=True)
    built, key = OPTIMIZERS[name](numbers, lr_tree, decay_tree), fold_in(key, SALT)
    moments = {name: _moment_format(part, signed, policy) for name, part, signed in (("m", policy.adam_m, True), ("v", policy.adam_v, False))
               if part is not None and not _as_scaled(part, policy.adam_rounding, policy)}
    if moments:
        built = low_precision_moments(built, **moments, rounding=policy.adam_rounding, key=key, packed=policy.storage == Storage.PACKED.value)
    if _rounds_params(policy):
        built = low_precision_params(built, _format_of(policy), policy.master_rounding, key, measure=True)
    return built


def initial(params, policy: PrecisionPolicy, key):
    """float32 parameters as training starts with them, float32 still: on the format that they are held in."""
    if not _rounds_params(policy):
        return params
    return round_params(params, _format_of(policy), policy.master_rounding, fold_in(key, SALT))


def held_params(params, policy: PrecisionPolicy):
    """float32 parameters, as the optimizer left them, in the form that the state holds."""
    if policy.master_weights is not None and _as_scaled(policy.master_weights, policy.master_rounding, policy):
        return with_scales(params, policy.master_weights)
    packed = policy.storage == Storage.PACKED.value
    if policy.optimizer_arithmetic != Arithmetic.FLOAT32.value:  # on bfloat16 already, but for those that training starts with
        return jax.tree.map(lambda x: x.astype(jnp.bfloat16) if packed else round_bfloat16(x), params)
    if not packed:
        return params
    if not _rounds_params(policy):
        return params
    format_of = _format_of(policy)

    def hold(path, x):
        fmt = format_of(path, x)
        name = formats.describe(fmt)["name"]
        return x.astype(name) if name in SCALABLE else formats.encode(x, fmt)  # exact: the values are there already

    return jax.tree_util.tree_map_with_path(hold, params)


def held_moments(opt_state, policy: PrecisionPolicy):
    """An optimizer state as the state holds it: what `optimizer` does not pack itself are ScaledArrays."""
    if policy.optimizer_arithmetic != Arithmetic.FLOAT32.value:
        return opt_state
    dtypes = {field: part for field, part in (("mu", policy.adam_m), ("nu", policy.adam_v))
              if part is not None and _as_scaled(part, policy.adam_rounding, policy)}
    return scaled_moments(opt_state, dtypes) if dtypes else opt_state


def narrow_only(params):
    """Held parameters with everything but ScaledArrays as float32."""
    return jax.tree.map(lambda x: x if is_scaled(x) else _wide(x), params, is_leaf=lambda x: is_scaled(x) or isinstance(x, QArray))


def wide(params):
    """Held parameters as float32."""
    return unscaled(narrow_only(params))


def quality(opt_state, before, new, held, step, policy: PrecisionPolicy) -> DescentQuality:
    """How much of an update the parameters underwent: what the optimizer measured itself, or by the float32 parameters before it, after it, and
    as they are held. step: int32, 0 or more. Of float32 weights (nothing narrows what is held) that is no measurement of edq and lost:
    `loses_updates` is False, and records leave both out.

    Looking must not change how an update is computed, not by a bit: the update itself is not looked at, and what is stands behind a branch
    that is always taken, since XLA does not fuse into one (without both, golden runs moved by 1e-4 on jax 0.12)."""
    found = [leaf for leaf in jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, DescentQuality)) if isinstance(leaf, DescentQuality)]
    if found:
        return found[0]

    man_bits = 23 if policy.master_weights is None else formats.get(policy.master_weights).man_bits

    def measure(before, new, held):
        return descent_quality(jax.tree.map(jnp.subtract, new, before), before, wide(held), man_bits=man_bits)

    nothing = DescentQuality(*(jnp.float32(jnp.nan),) * 3)
    return lax.cond(step >= 0, measure, lambda *_: nothing, before, new, held)


def loses_updates(policy) -> bool:
    """Whether weights are held in less than float32, so that an update can be lost. policy: a PrecisionPolicy or PrecisionSpec."""
    return policy.master_weights is not None or policy.optimizer_arithmetic not in (None, Arithmetic.FLOAT32.value)


def _wide(x):
    if isinstance(x, QArray):
        return x.decode()
    return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x


def _as_scaled(name: str, rounding: str, policy: PrecisionPolicy) -> bool:
    return name in SCALABLE and rounding == "nearest_even" and policy.scaled_state


def _rounds_params(policy: PrecisionPolicy) -> bool:
    """Whether the optimizer itself leads parameters to a format."""
    return policy.master_weights is not None and not _as_scaled(policy.master_weights, policy.master_rounding, policy)


def _format_of(policy: PrecisionPolicy):
    """(path, leaf) -> format of a parameter. FP8 is for matrices: gains and learned scales are bfloat16 beside it."""
    element = formats.get(policy.master_weights)
    float16 = policy.master_weights == "float16"

    def format_of(path, leaf):
        if policy.master_weights in SCALABLE and not (float16 and policy.scaled_state):
            return element
        first = 1 if path[0].key == STACKED else 0
        if leaf.ndim - first < 2 and not float16:
            return formats.get("bfloat16")
        return formats.scaled(element, "block", axis=tuple(range(first, leaf.ndim)), block=tuple(leaf.shape[first:]), rule="rceil",
                              scale_format="float8_e8m0fnu")

    return format_of


def _moment_format(name: str, signed: bool, policy: PrecisionPolicy):
    if name == BLOCKWISE:
        return blockwise8(signed=signed)
    fmt = formats.get(name)
    if name == "float16" and policy.scaled_state:  # a squared gradient of 1e-5 lies below its smallest number
        return formats.scaled(fmt, "block", block=MOMENT_BLOCK, rule="rceil")
    if isinstance(fmt, formats.Scaled) or name in SCALABLE:
        return fmt
    return formats.scaled(fmt, "block", block=MOMENT_BLOCK)
