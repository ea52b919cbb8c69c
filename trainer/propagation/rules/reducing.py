"""Sums and products over dimensions. A sum of n numbers of random sign grows by sqrt(n), so that much moves into the exponent."""
from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from trainer.propagation.array import floor_log2, shift, wide
from trainer.propagation.exponents import Exponent, highest, of_array
from trainer.propagation.rules.registry import Call, rule
from trainer.propagation.values import Scaled, collapse, unscaled_wide


def growth(count: int) -> int:
    """floor(log2(sqrt(count))): how far the sum of so many unit-scale numbers moves the exponent."""
    return max(int(count).bit_length() - 1, 0) // 2


def _keep(a: Scaled, axes) -> Scaled:
    """a with exponents only for the leading dimensions before all of `axes`."""
    return collapse(a, min(axes, default=a.ndim))


@rule("reduce_sum", data="sum(a) / 2^c, added in float32", exponent="ea + c, c = floor(log2 sqrt(n))")
def reduce_sum(call: Call, a):
    axes = tuple(call.params["axes"])
    a = _keep(a, axes)
    steps = growth(int(np.prod([a.shape[i] for i in axes], dtype=np.int64)))
    return call.honest().store(shift(jnp.sum(wide(a.data), axis=axes), -steps), a.exponent + steps)


@rule("cumsum", data="cumsum(a) / 2^c, added in float32", exponent="ea + c, c = floor(log2 sqrt(n))")
def cumsum(call: Call, a):
    axis = call.params["axis"]
    a = _keep(a, (axis,))
    steps = growth(a.shape[axis])
    return call.store(shift(call.bind(wide(a.data)), -steps), a.exponent + steps)


def _windowed(call: Call) -> int:
    """The first dimension that windows overlap in, or leave: before it, each index is one of its own."""
    params = call.params
    each = zip(params["window_dimensions"], params["window_strides"], params["padding"])
    return next((i for i, (size, stride, padding) in enumerate(each) if (size, stride, *padding) != (1, 1, 0, 0)), call.ins[-1].ndim)


@rule("reduce_window_sum", data="sum(a) / 2^c, added in float32", exponent="ea + c, c = floor(log2 sqrt(n))")
def window_sum(call: Call, a):
    a = collapse(a, _windowed(call))
    steps = growth(int(np.prod(call.params["window_dimensions"], dtype=np.int64)))
    return call.store(shift(call.bind(wide(a.data)), -steps), a.exponent + steps)


@rule("reduce_window_max", "reduce_window_min", data="f(a)", exponent="ea")
def window_extreme(call: Call, a):
    a = collapse(a, _windowed(call))
    return call.store(call.bind(a.data), a.exponent)


@rule("select_and_scatter_add", data="the gradient a of maxima, to where they were in b; added in float32", exponent="ea")
def window_extreme_gradient(call: Call, a, b):
    a, b = (Scaled(wide(jnp.broadcast_to(x.data, aval.shape)), x.exponent, x.dtype) for x, aval in zip(map(call.lift, (a, b)), call.ins))
    a, b = collapse(a, _windowed(call)), collapse(b, _windowed(call))
    return call.store(call.bind(a.data, b.data), a.exponent)


@rule("reduce_max", "reduce_min", data="f(a)", exponent="ea")
def extreme(call: Call, a):
    a = _keep(a, call.params["axes"])
    return call.store(call.bind(a.data), a.exponent)


@rule("cummax", "cummin", data="f(a)", exponent="ea")
def running_extreme(call: Call, a):
    a = _keep(a, (call.params["axis"],))
    return call.store(call.bind(a.data), a.exponent)


def _about_one(a: Scaled) -> Scaled:
    """The same values, data wide and with a geometric mean near 1: then its products stay in range."""
    data = wide(a.data)
    each = floor_log2(data)
    counted = jnp.abs(each) <= 1024  # zeros have no logarithm
    middle = jnp.sum(jnp.where(counted, each, 0)) // jnp.maximum(jnp.sum(counted.astype(jnp.int32)), 1)
    return Scaled(shift(data, -middle), a.exponent + of_array(middle), a.dtype)


@rule("reduce_prod", data="prod(a / 2^c), multiplied in float32, c = floor(mean(log2 |a|))", exponent="sum of (ea + c)")
def reduce_prod(call: Call, a):
    axes, rank = tuple(call.params["axes"]), a.exponent.ndim
    inside = tuple(i for i in axes if i < rank)
    a = _about_one(a) if a.data.dtype.itemsize <= 4 else a
    count = int(np.prod([a.shape[i] for i in axes if i >= rank], dtype=np.int64))
    exponent = a.exponent * count
    if inside:
        exponent = of_array(jnp.sum(jnp.broadcast_to(jnp.asarray(exponent.traced(), jnp.int32), a.shape[:rank]), axis=inside))
    return call.settle(jnp.prod(wide(a.data), axis=axes), exponent)


@rule("dot_general", data="(a . b) / 2^c, added in float32", exponent="ea + eb + c, c = floor(log2 sqrt(K))")
def dot_general(call: Call, a, b):
    (contract, _), (batch_a, batch_b) = call.params["dimension_numbers"]
    a, b = call.lift(a), call.lift(b)
    if not a.ndim or not b.ndim:  # a known number was broadcast to a matrix
        a, b = (x if x.ndim else Scaled(jnp.broadcast_to(x.data, aval.shape), x.exponent, x.dtype) for x, aval in zip((a, b), call.ins))
    leading = tuple(range(len(batch_a)))
    keep = len(leading) if tuple(batch_a) == leading == tuple(batch_b) else 0
    apart = max(a.exponent.ndim, b.exponent.ndim) > keep
    a, b = _together(a, keep), _together(b, keep)
    steps = growth(int(np.prod([a.shape[i] for i in contract], dtype=np.int64)))
    data = _product(call, a.data, b.data, steps)
    # The largest of a may have met the smallest of b.
    call = call.honest()
    return (call.settle if apart else call.store)(data, a.exponent + b.exponent + steps)


def _together(x: Scaled, keep: int) -> Scaled:
    """x with exponents for its first `keep` dimensions: wide where exponents fall together, as small ones must not get lost yet."""
    return x if x.exponent.ndim <= keep else collapse(Scaled(wide(x.data), x.exponent, x.dtype), keep)


def _product(call: Call, a, b, steps: int):
    """The product of the data over 2^steps, in float32 at least."""
    out = call.outs[0]
    if a.dtype != b.dtype and not _narrow_floats(a, b):
        a, b = wide(a), wide(b)
    params = dict(call.params)
    accumulate = np.promote_types(np.float32, out.dtype) if out.dtype.itemsize >= 4 else np.dtype(np.float32)
    params["preferred_element_type"] = np.dtype(accumulate)
    # On the result: what comes after a product is elementwise nearly always, and then this is free.
    return shift(call.bind_with(params, a, b), -steps)


@rule("conv_general_dilated", data="conv(a, b) / 2^c, added in float32", exponent="ea + eb + c, c = floor(log2 sqrt(n)), n: fan-in")
def convolution(call: Call, a, b):
    a, b = (Scaled(jnp.broadcast_to(x.data, aval.shape), x.exponent, x.dtype) for x, aval in zip(map(call.lift, (a, b)), call.ins))
    a, b = _together(a, 0), _together(b, 0)
    fan_in = b.data.size // b.shape[call.params["dimension_numbers"].rhs_spec[0]]
    steps = growth(fan_in)
    return call.honest().store(_product(call, a.data, b.data, steps), a.exponent + b.exponent + steps)


def _narrow_floats(a, b) -> bool:
    return a.dtype.itemsize == 1 and b.dtype.itemsize == 1


@rule("cumlogsumexp", data="f(a 2^ea) 2^-e", exponent="e = max(ea, 0)")
def cumlogsumexp(call: Call, a):
    exponent = highest([a.exponent, Exponent()])
    return call.store(shift(call.bind(unscaled_wide(a)), (-exponent).traced()), exponent)
