"""Functions whose values have a scale of their own: they are taken of the unscaled values, in float32.

Where a function is about c x near zero, small values would be lost at exponent 0: its values then keep the exponent of x.
"""
from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from trainer.propagation.array import floor_log2, shift, wide
from trainer.propagation.exponents import Exponent, highest
from trainer.propagation.rules.elementwise import integer_pow, rsqrt, sqrt
from trainer.propagation.rules.registry import Call, rule
from trainer.propagation.values import Scaled, Uniform, unscaled_wide

LINEAR_BELOW = -24  # where |x| < 2^-24 all of them are c x to float32's last digit or nearly
# f(x) = c x + O(x^2 or x^3)
SLOPES = {"tanh": 1.0, "sin": 1.0, "tan": 1.0, "asin": 1.0, "atan": 1.0, "sinh": 1.0, "asinh": 1.0, "atanh": 1.0, "expm1": 1.0, "log1p": 1.0,
          "erf": 1.1283791670955126, "erf_inv": 0.8862269254527580}  # fmt: skip


@rule(*SLOPES, data="f(a 2^ea) 2^-e; c a where |x| < 2^-24", exponent="e = min(ea, 0)")
def linear_at_zero(call: Call, a):
    a = call.lift(a)
    exponent = highest([a.exponent, Exponent()], lowest=True)
    values = _exactly(call, unscaled_wide(a))
    back = (-exponent).traced()
    data = shift(values, back)
    if not isinstance(back, int) or back > 60:
        # The program's own values underflow long before the data does.
        tiny = jnp.abs(unscaled_wide(a)) < 2.0**LINEAR_BELOW
        data = jnp.where(tiny, shift(wide(a.data), (a.exponent - exponent).traced()) * data.dtype.type(SLOPES[call.name]), data)
    return call.settle(data, exponent) if call.name in ("sinh", "expm1") else call.store(data, exponent)


def _exactly(call: Call, x):
    """The function of wide values: the primitive is bound in their dtype."""
    return call.bind(x)


@rule("exp", "exp2", "cosh", data="f(a 2^ea)", exponent="0; narrow data: that of the largest")
def growing(call: Call, a):
    return call.fading().settle(_exactly(call, unscaled_wide(a, far=False)), Exponent())


@rule("logistic", "cos", "erfc", "acos", data="f(a 2^ea)", exponent="0")
def bounded(call: Call, a):
    return call.fading().store(_exactly(call, unscaled_wide(a)), Exponent())


@rule("floor", "ceil", "round", data="f(a 2^ea) 2^-e", exponent="e = max(ea, 0)")
def to_integers(call: Call, a):
    a = call.lift(a)
    exponent = highest([a.exponent, Exponent()])
    values = _exactly(call, unscaled_wide(a))
    return call.store(shift(values, (-exponent).traced()), exponent)


@rule("cbrt", "acosh", "lgamma", "digamma", "bessel_i0e", "bessel_i1e", data="f(a 2^ea)", exponent="0; narrow data: that of the largest")
def of_values(call: Call, a):
    return call.settle(_exactly(call, unscaled_wide(a)), Exponent())


@rule("log", "log2", data="log(m) + (k + ea) log 2 of a = m 2^k; log(a 2^ea) where that is a float32", exponent="0")
def log(call: Call, a):
    a = call.lift(a)
    function, of_two = (jnp.log, 0.6931471805599453) if call.name == "log" else (jnp.log2, 1.0)
    data, exponent = wide(a.data), a.exponent
    values = function(unscaled_wide(a))
    if data.dtype != jnp.float32:
        return call.honest().store(values, Exponent())
    if exponent.terms or abs(exponent.known) > 60:
        # The same number whatever power of two lies in the data: mantissa and exponent are taken apart first.
        total = floor_log2(data) + exponent.traced(data.ndim)
        mantissa = shift_each(data, -floor_log2(data))
        apart = function(mantissa) + total.astype(jnp.float32) * jnp.float32(of_two)
        outside = (jnp.abs(total) > 120) & (data > 0) & jnp.isfinite(data)
        values = jnp.where(outside, apart, values)
    return call.honest().store(values, Exponent())


def shift_each(data, exponent):
    """data * 2**exponent with an exponent for each element."""
    return shift(data, jnp.where(jnp.abs(exponent) > 1024, 0, exponent))


@rule("pow", data="as sqrt, rsqrt or integer_pow where the power is one; else f(a 2^ea)", exponent="theirs; else 0; narrow data: that of the largest")
def pow(call: Call, a, power):
    if is_integer(power) and not np.ndim(power) and not isinstance(power, jax.core.Tracer) and abs(int(power)) <= 64:
        return integer_pow(_with_power(call, int(power)), a)
    if isinstance(power, Uniform) and power.known and jnp.issubdtype(power.dtype, jnp.floating):
        if power.number in (0.5, -0.5):
            return (sqrt if power.number > 0 else rsqrt)(call, a)
        if power.number.is_integer() and abs(power.number) <= 64:
            return integer_pow(_with_power(call, int(power.number)), a)
    shape = call.outs[0].shape
    base, power = (jnp.broadcast_to(unscaled_wide(x), shape) if not is_integer(x) else x for x in (a, power))
    return call.settle(lax.pow(base, power), Exponent())


def _with_power(call: Call, power: int) -> Call:
    return dataclasses.replace(call, params={"y": power})


def is_integer(x) -> bool:
    """True for variables of an integer dtype."""
    return not isinstance(x, (Scaled, Uniform)) and jnp.issubdtype(jnp.result_type(x), jnp.integer)


