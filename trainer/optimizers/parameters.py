"""Parameters held in a low-precision format: every update lands on the format's values, rounded to nearest or stochastically."""
from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import formats
from formats import Amax, Element, Scaled
from formats.catalogue import resolve
from trainer.optimizers.quality import DescentQuality, descent_quality
from trainer.optimizers.trees import check_rounding, leaf_key

_PURPOSE = 1  # of the random bits, see `leaf_key`


class LowPrecisionParamsState(NamedTuple):
    """inner: the wrapped transformation's state. count: int32, updates done; the random bits of an update are those of its count.
    quality: the `DescentQuality` of the last update if measured, else None."""

    inner: Any
    count: jax.Array
    quality: DescentQuality | None = None


def low_precision_params(inner: optax.GradientTransformation, format, rounding: str = "nearest_even", key=None,
                         measure: bool = False) -> optax.GradientTransformationExtraArgs:
    """Wraps any optax transformation: what `optax.apply_updates` gives are parameters rounded to a format.

    inner: sees gradients and parameters as float32, so its moments are float32 too. Put what clips or scales gradients inside or
    before, and nothing behind. format: an element format ("bfloat16", "float16", `formats.minifloat`, traced widths too), a scaled one
    with a power-of-two rule (scaled("float8_e4m3fn", rule="rceil")), or a function (path, leaf) -> format or None, as of
    `jax.tree_util.tree_map_with_path`, where None leaves the parameter alone. rounding: any mode of `formats.Rounding`; "stochastic"
    needs key (a PRNG key or uint32[2], may be traced; unused by the others): fresh bits every step and leaf. measure: keep each update's
    `DescentQuality` in the state (inner's update is what was intended).

    The updates returned are float32, new - old, and exact: params + update is the new parameter bit for bit, in float32 parameters
    (which hold the format's values) and in bfloat16 or float16 arrays (optax adds in float32 there, then casts). That needs parameters
    that start on the format: `round_params`. Beyond the largest value parameters saturate; NaN stays NaN.

    Exact float32 scales would not do: their values have 24 bits, so that new - old rounds and 2 % of E4M3 parameters land an ulp off
    the format in a step; and x * (1 / scale) is off the grid by an ulp at times, so that stochastic rounding of an update of zero moves
    one parameter in ten million (nearest rounding none). With a power of two both are exact. amax may ask for a smaller
    scale of values that are rounded already; its finer grid holds them, so an update of zero changes nothing. Of the rules rceil
    never clips; floor saturates what lies above the largest value, up to an eighth of amax, whatever the rounding.

    ValueError: unknown formats and roundings, stochastic without key, scales that are not powers of two; update without params.
    """
    random, inner = check_rounding(rounding, key), optax.with_extra_args_support(inner)
    format_of = format if callable(format) else lambda path, leaf: format
    if not callable(format):
        _checked(format)

    def init(params):
        return LowPrecisionParamsState(inner.init(_wide(params)), jnp.int32(0), _unmeasured() if measure else None)

    def update(updates, state, params=None, **extra_args):
        if params is None:
            raise ValueError("params=None in update of low_precision_params; accepted: the parameters, update(grads, state, params)")
        wide = _wide(params)
        intended, inner_state = inner.update(_wide(updates), state.inner, wide, **extra_args)
        intended = _wide(intended)
        new = _rounded(jax.tree.map(jnp.add, wide, intended), format_of, rounding, key if random else None, state.count)
        changes = jax.tree.map(_change, new, wide, intended, is_leaf=lambda x: isinstance(x, _New))
        quality = None
        if measure:
            quality = descent_quality(intended, wide, jax.tree.map(jnp.add, wide, changes), man_bits=_man_bits(wide, format_of))
        return changes, LowPrecisionParamsState(inner_state, optax.safe_increment(state.count), quality)

    return optax.GradientTransformationExtraArgs(init, update)


def round_params(params, format, rounding: str = "nearest_even", key=None):
    """Parameters rounded to a format, a tree like params: where a training with `low_precision_params` starts. Arguments as there."""
    random = check_rounding(rounding, key)
    format_of = format if callable(format) else lambda path, leaf: format
    new = _rounded(_wide(params), format_of, rounding, key if random else None, jnp.int32(-1))
    return jax.tree.map(lambda n, p: p if n.unbounded is None else n.value.astype(p.dtype), new, params, is_leaf=lambda x: isinstance(x, _New))


class _New(NamedTuple):
    """value: float32, a new parameter. unbounded: bool, whether its format is float32 itself; None without a format."""

    value: jax.Array
    unbounded: Any


def _rounded(tree, format_of, rounding: str, key, count):
    """tree of `_New` of a float32 tree."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    rounded = []
    for index, (path, leaf) in enumerate(leaves):
        fmt = _checked(format_of(path, leaf))
        if fmt is None:
            rounded.append(_New(leaf, None))
            continue
        bits = None if key is None else leaf_key(key, _PURPOSE, count, index)
        value = formats.quantize(leaf, fmt, rounding=rounding, key=bits, gradient="none")
        rounded.append(_New(value, (fmt.element if isinstance(fmt, Scaled) else fmt).unbounded))
    return jax.tree.unflatten(treedef, rounded)


def _change(new: _New, old, intended):
    """float32 to add: for float32 as the format what was intended, since new - old may round."""
    return intended if new.unbounded is None else jnp.where(new.unbounded, intended, new.value - old)


def _checked(fmt):
    """The format, if differences of its values are exact and rounding to it twice is rounding once."""
    if fmt is None:
        return None
    fmt = resolve(fmt)
    element = fmt.element if isinstance(fmt, Scaled) else fmt
    if not isinstance(element, Element):
        raise ValueError(f"format={type(element).__name__} of parameters has values of 24 bits, whose differences round; "
                         "accepted: floats and integers")
    if isinstance(fmt, Scaled) and (fmt.exact or fmt.pre_scale is not None or fmt.amax is not Amax.CURRENT):
        rule = "exact" if fmt.exact else "a power of two"
        raise ValueError(f"format with rule={rule!r}, amax={fmt.amax.value!r}, pre_scale={fmt.pre_scale} of parameters cannot be landed on "
                         "exactly; accepted: power-of-two scales such as formats.scaled(ELEMENT, rule='rceil'), amax='current', no pre_scale")
    return fmt


def _man_bits(tree, format_of) -> list:
    """Mantissa bits of each leaf as stored, None for integers: what `descent_quality` takes."""
    found = [_checked(format_of(path, leaf)) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
    elements = [fmt.element if isinstance(fmt, Scaled) else fmt for fmt in found]
    return [23 if e is None else None if not isinstance(e.exp_bits, jax.Array) and e.exp_bits == 0 else e.man_bits for e in elements]


def _wide(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def _unmeasured() -> DescentQuality:
    return DescentQuality(*(jnp.float32(jnp.nan),) * 3)
