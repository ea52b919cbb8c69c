"""Comparisons, maxima, clamps and masks: where variables meet that may have very different scales."""
from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax

from trainer.propagation.array import trailing, wide
from trainer.propagation.exponents import Exponent, highest
from trainer.propagation.rules.registry import Call, rule
from trainer.propagation.values import Scaled, Uniform, collapse, floats

MASKED = 8  # log2 of the size that a mask value must have, so that exp of it is zero


@rule("eq", "ne", "lt", "le", "gt", "ge", data="compare(a 2^(ea - e), b 2^(eb - e)): what is larger may overflow, and stays larger",
      exponent="e = min(ea, eb); the result has none")
def compare(call: Call, a, b):
    exponents = [call.exponent(x) for x in (a, b) if not (isinstance(x, Uniform) and x.any_scale)]
    exponent = highest(exponents, lowest=True) if exponents else Exponent()
    narrow = any(x.data.dtype.itemsize < 4 for x in (a, b) if isinstance(x, Scaled) and x.ndim)
    return call.bind(*(jnp.broadcast_to(_comparable(call, x, exponent, narrow), call.outs[0].shape) for x in (a, b)))


def _comparable(call: Call, x, exponent: Exponent, narrow: bool):
    """Data at the lower of two exponents: what leaves the range stays finite if it was. A number beside narrow data is rounded like it: the
    gradient of minimum(x, a) asks where the result is a."""
    if narrow and call.data_dtype is not None and not x.ndim and not (isinstance(x, Uniform) and x.any_scale):
        x = call.lift(x)
        x = Scaled(wide(x.data.astype(call.data_dtype)), x.exponent, x.dtype)
    data = call.align(x, exponent, far=True)
    if not isinstance(x, Scaled) or x.exponent == exponent:
        return data
    most = float(jnp.finfo(data.dtype).max)
    return jnp.where(jnp.isfinite(x.data), jnp.clip(data, -most, most), data)


@rule("is_finite", data="is_finite(a)", exponent="the result has none")
def is_finite(call: Call, a):
    return jnp.isfinite(a.data)


@rule("sort", data="f(a)", exponent="ea")
def sort(call: Call, *xs):
    """Each operand with its own exponent: a positive factor changes no order."""
    xs = [collapse(call.lift(x), call.params["dimension"]) if floats(x) else x for x in xs]
    arrays = call.bind(*(jnp.broadcast_to(x.data, aval.shape) if isinstance(x, Scaled) else x for x, aval in zip(xs, call.ins)))
    return [call.store(array, x.exponent, i) if isinstance(x, Scaled) else array for i, (array, x) in enumerate(zip(arrays, xs))]


@rule("top_k", data="f(a)", exponent="ea")
def top_k(call: Call, a):
    a = collapse(a, call.params.get("axis", a.ndim - 1) % a.ndim)
    values, indices = call.bind(a.data)
    return [call.store(values, a.exponent), indices]


@rule("argmax", "argmin", data="f(a)", exponent="the result has none")
def position(call: Call, a):
    data = Scaled(wide(a.data), a.exponent, a.dtype)
    return call.bind(collapse(data, min(call.params["axes"], default=0)).data)


@rule("max", "min", data="f(a 2^(ea - e), b 2^(eb - e)); a bound that no value of the data reaches is the largest one",
      exponent="e = max(ea, eb); ea for a bound on its own side of zero")
def max_min(call: Call, a, b):
    bind = jnp.maximum if call.name == "max" else jnp.minimum
    bound, other = (a, b) if isinstance(a, Uniform) and a.known else (b, a)
    if isinstance(bound, Uniform) and bound.known and isinstance(other, Scaled):
        return _bounded(call, other, bound, bind)
    exponent = call.common(a, b)
    return call.settle(bind(call.align(a, exponent), call.align(b, exponent)), exponent)  # all may be that of the smaller scale


def _bounded(call: Call, x: Scaled, bound: Uniform, bind):
    """max(x, bound) or min(x, bound) of a known bound."""
    largest = _largest(x)
    harmless = bound.any_scale or (bound.number < 0) == (call.name == "max") and not x.exponent.divided
    if harmless and not call.narrow(x.ndim):
        return call.store(bind(wide(x.data), call.align(bound, x.exponent, largest)), x.exponent)
    if bound.any_scale:
        return call.store(bind(wide(x.data), call.align(bound, x.exponent)), x.exponent)
    if harmless:  # where x is large and the bound small, what is left has the scale of the bound
        return call.settle(bind(wide(x.data), call.align(bound, x.exponent, largest)), x.exponent)
    exponent = call.common(x, bound)
    return call.settle(bind(call.align(x, exponent), call.align(bound, exponent)), exponent)


def _largest(x: Scaled) -> float:
    """The largest magnitude that data of its dtype can have."""
    return float(jnp.finfo(x.data.dtype).max)


@rule("clamp", data="clamp(lo, a, hi) at one scale", exponent="e = max of those that are not harmless bounds")
def clamp(call: Call, low, x, high):
    if not isinstance(x, Scaled):
        x = call.lift(x)
    if all(isinstance(b, Uniform) and b.known for b in (low, high)) and low.number <= 0 <= high.number and not x.exponent.divided:
        largest = _largest(x)
        data = [call.align(b, x.exponent, largest) for b in (low, high)]
        return call.settle(jnp.clip(wide(x.data), *data), x.exponent)
    exponent = call.common(low, x, high)
    shape = call.outs[0].shape
    low, x, high = (jnp.broadcast_to(call.align(v, exponent), shape) for v in (low, x, high))
    return call.settle(lax.clamp(low, x, high), exponent)  # the bounds may be much smaller than what they bound


def _masking(call: Call, mask: Uniform, exponent: Exponent, largest: float):
    """The lowest number in the place of a mask value; where the tensor is so small that this would mask nothing (or is zero), infinity."""
    data = call.align(mask, exponent, largest)
    if mask.any_scale or not exponent.terms:
        return data
    nothing = exponent.traced() < MASKED - int(np.log2(largest))
    return jnp.where(trailing(nothing, len(call.outs[0].shape)), np.float32(np.copysign(np.inf, mask.number)).astype(data.dtype), data)


@rule("select_n", data="select(a 2^(ea - e), b 2^(eb - e)); mask values such as -1e30 become the lowest number",
      exponent="e = max over all but zeros, infinities and mask values")
def select_n(call: Call, which, *cases):
    if all(isinstance(c, Uniform) and c.known for c in cases) and len({c.number for c in cases}) == 1:
        return call.number(cases[0].number)
    exponent = call.common(*cases)
    shape = call.outs[0].shape
    largest = min(float(jnp.finfo(call.held_as(call.outs[0].dtype, len(shape))).max), 3.0e38)
    data = [_masking(call, c, exponent, largest) if isinstance(c, Uniform) and c.sentinel else call.align(c, exponent) for c in cases]
    chosen = call.bind(which, *(jnp.broadcast_to(d, shape) for d in data))
    # What is chosen may all be of the smaller scale.
    one_scale = all(isinstance(c, Uniform) and (c.any_scale or c.sentinel) or call.exponent(c) == exponent for c in cases)
    return call.store(chosen, exponent) if one_scale else call.settle(chosen, exponent)
