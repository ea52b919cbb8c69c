"""Products, quotients, powers and sums, element by element."""
from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax

from trainer.propagation.array import ZERO_EXPONENT, floor_log2, shift, wide
from trainer.propagation.exponents import Exponent, highest, of_array
from trainer.propagation.rules.registry import Call, rule, to_unit
from trainer.propagation.values import SENTINEL, Scaled, Uniform, plain, split_number


def _is_zero(x) -> bool:
    return isinstance(x, Uniform) and x.zero


def _mantissa(x) -> float | None:
    """Of a number that is known."""
    return split_number(x.number)[0] if isinstance(x, Uniform) and x.known else None


def _apart(call: Call, x):
    """(wide data, exponent)."""
    x = call.lift(x)
    return wide(x.data), x.exponent


def _nothing(call: Call, a, b):
    """A product with known zeros, at any scale: what is not finite becomes NaN, as everywhere."""
    a, b = (jnp.broadcast_to(_apart(call, x)[0], call.outs[0].shape) for x in (a, b))
    return call.store(call.bind(a, b), Exponent(ZERO_EXPONENT))


@rule("mul", data="a b", exponent="ea + eb")
def mul(call: Call, a, b):
    if _is_zero(a) or _is_zero(b):
        return _nothing(call, a, b)
    (da, ea), (db, eb) = _apart(call, a), _apart(call, b)
    if abs(_mantissa(a) or 0) == 1.0:  # a power of two moves the scale alone
        return call.store(db if _mantissa(a) > 0 else -db, ea + eb)
    if abs(_mantissa(b) or 0) == 1.0:
        return call.store(da if _mantissa(b) > 0 else -da, ea + eb)
    return call.store(da * db, ea + eb)


@rule("div", data="a / b", exponent="ea - eb")
def div(call: Call, a, b):
    if _is_zero(a):
        return _nothing(call, a, b)
    (da, ea), (db, eb) = _apart(call, a), _apart(call, b)
    if abs(_mantissa(b) or 0) == 1.0:
        return call.store(da if _mantissa(b) > 0 else -da, ea - eb)
    return call.store(da / db, ea - eb)


@rule("integer_pow", data="a^n", exponent="n ea; n > 2: of a at unit scale")
def integer_pow(call: Call, a):
    data, exponent = _apart(call, a)
    power = call.params["y"]
    if abs(power) < 3:
        return call.store(lax.integer_pow(data, power), exponent * power)
    # A scale that is not known may be that of anything, and 2**43 has no cube in float32.
    if exponent.terms and data.dtype == jnp.float32:
        data, exponent = to_unit(data, exponent)
    return call.settle(lax.integer_pow(data, power), exponent * power)


@rule("square", data="a^2", exponent="2 ea")
def square(call: Call, a):
    data, exponent = _apart(call, a)
    return call.store(data * data, exponent * 2)


@rule("one_minus_square", data="2^-e - a^2 2^(2 ea - e)", exponent="e = max(2 ea, 0)")
def one_minus_square(call: Call, a):
    """The derivative of tanh, from jax 0.11 on."""
    data, exponent = _apart(call, a)
    top = highest([exponent * 2, Exponent()])
    return call.fading().store(call.align(Uniform(1.0, (), data.dtype), top) - (exponent * 2 - top).shift(data * data), top)


@rule("sqrt", data="sqrt(a 2^(ea mod 2))", exponent="floor(ea / 2)")
def sqrt(call: Call, a):
    data, half = _even(call, a)
    return call.store(jnp.sqrt(data), half)


@rule("rsqrt", data="1 / sqrt(a 2^(ea mod 2))", exponent="-floor(ea / 2)")
def rsqrt(call: Call, a):
    data, half = _even(call, a)
    return call.store(lax.rsqrt(data), -half)


def _even(call: Call, a):
    """The data at an even exponent, and half of that."""
    data, exponent = _apart(call, a)
    half, odd = exponent.halved()
    if isinstance(odd, int):
        return (data * data.dtype.type(2.0) if odd else data), half
    factor = (1 + odd).astype(data.dtype)
    return data * (factor.reshape(factor.shape + (1,) * (data.ndim - factor.ndim)) if factor.ndim else factor), half


@rule("add", "sub", "add_any", data="a 2^(ea - e) + b 2^(eb - e)", exponent="e = max(ea, eb); of their largest values where one may lie far below its exponent")
def add(call: Call, a, b):
    if _is_zero(b) or _is_zero(a) and call.name != "sub":
        x = a if _is_zero(b) else b
        exponent = call.common(x)
        return call.store(call.align(x, exponent), exponent)
    if _doubtful(call, a, b):
        exponent, call = highest([_size(call, a), _size(call, b)]), call.honest()
    else:
        exponent = call.common(a, b)
    if any(isinstance(x, Uniform) and x.known and FADING <= abs(x.number) < SENTINEL for x in (a, b)):
        call = call.fading()
    a, b = _term(call, a, exponent), _term(call, b, exponent)
    return call.store(a - b if call.name == "sub" else a + b, exponent)


FADING = 2.0**-4  # 1 - y may be zero everywhere; v + 1e-6 is as large as v is


def _doubtful(call: Call, a, b) -> bool:
    """True if the exponents of two terms say little of which is larger, as in the derivative of GELU, where one is x * x * f'(x): where it
    has the larger exponent, and f'(x) is zero or nearly so, it would push the other out of range, and the sum would say more than its data
    in turn, layer after layer. Data that is held narrowly is out of range much sooner."""
    if any(isinstance(x, Uniform) and x.any_scale for x in (a, b)):
        return False
    terms = [call.exponent(x).terms for x in (a, b)]
    if terms[0] == terms[1]:
        return False
    powers = any(abs(count) > 1 for each in terms for _, count in each)
    if call.narrow(len(call.outs[0].shape)):
        return powers or not all(terms)
    return call.faint or powers and not any(isinstance(x, Uniform) and x.known for x in (a, b))


def _size(call: Call, x) -> Exponent:
    """The exponent that the largest value of an array has, for each index that has an exponent of its own; so low that any other is higher
    where all is zero. That of anything else as it is."""
    if not isinstance(x, Scaled) or not x.ndim or not x.data.size:
        return call.exponent(x)
    largest = jnp.max(jnp.abs(wide(x.data)), axis=tuple(range(x.exponent.ndim, x.ndim)))
    return x.exponent + of_array(floor_log2(largest))


def _term(call: Call, x, exponent: Exponent):
    """Data of a term of a sum. Where results are held narrowly, two kinds of terms get lost that a program relies on:

    a number beside an array (the epsilon in 1 / sqrt(v + epsilon)) does not vanish: it becomes the least that data can have;
    an array that no scale has reached is a mask of 0 and -1e9, or the like: its numbers stay finite, so that a row which is
    masked throughout does.
    """
    data = call.align(x, exponent)
    shape = call.outs[0].shape
    narrow = call.narrow(len(shape))
    if isinstance(x, Scaled) and x.ndim or not narrow:
        return data
    limits = jnp.finfo(call.held_as(call.outs[0].dtype, len(shape)))
    if not x.ndim or isinstance(x, Uniform):
        least = float(limits.smallest_subnormal)
        return jnp.where(data == 0, data, jnp.sign(data) * jnp.maximum(jnp.abs(data), least))
    most = float(limits.max) / 2
    return jnp.where(jnp.isfinite(data), jnp.clip(data, -most, most), data)


@rule("neg", "abs", "copy", "stop_gradient", "reduce_precision", "name", "sharding_constraint", data="f(a)", exponent="ea")
def on_data(call: Call, a):
    if isinstance(a, Uniform) and a.known and call.name == "neg":
        return call.number(-a.number)
    a = call.lift(a)
    return call.store(call.bind(a.data), a.exponent)


@rule("sign", data="sign(a)", exponent="0")
def sign(call: Call, a):
    return call.store(jnp.sign(wide(call.lift(a).data)), Exponent())


@rule("convert_element_type", data="cast(a)", exponent="ea; to float16: that of the largest")
def convert_element_type(call: Call, a):
    dtype = call.outs[0].dtype
    if not jnp.issubdtype(dtype, jnp.floating):
        return call.fall_back(a)
    if isinstance(a, Uniform) and a.known:
        return call.number(float(np.asarray(a.number, dtype)))
    a = call.lift(a)
    # float16 has no room for data that is far from unit scale; every other float has, or is asked for its own rounding.
    crowded = dtype == jnp.float16 and a.data.dtype.itemsize > 2
    return call.settle(a.data, a.exponent) if crowded else call.store(a.data, a.exponent)


@rule("optimization_barrier", "device_put", data="a", exponent="ea")
def each_as_it_is(call: Call, *xs):
    """Only data is held back or put somewhere: a known exponent is not in the program at all."""
    arrays = call.bind(*(x.data if isinstance(x, Scaled) else plain(x) for x in xs))
    return [call.store(array, x.exponent, i) if isinstance(x, Scaled) else array for i, (array, x) in enumerate(zip(arrays, xs))]


@rule("atan2", data="atan2 of a and b at one scale", exponent="0")
def atan2(call: Call, a, b):
    exponent = call.common(a, b)
    return call.store(jnp.arctan2(*jnp.broadcast_arrays(call.align(a, exponent), call.align(b, exponent))), Exponent())


@rule("nextafter", data="f(a, b 2^(eb - ea))", exponent="ea")
def nextafter(call: Call, a, b):
    """The next number of the data lies where the data's digits end; of b only the direction counts, and it may overflow."""
    exponent = call.exponent(a)
    return call.store(_at(call, exponent, a, b), exponent)


@rule("rem", data="f(a 2^(ea - e), b 2^(eb - e)) 2^(e - m), e = max(ea, eb)", exponent="m = min(ea, eb)")
def rem(call: Call, a, b):
    """The remainder is smaller than both."""
    exponent = call.common(a, b)
    lowest = highest([call.exponent(x) for x in (a, b)], lowest=True)
    return call.store(shift(_at(call, exponent, a, b), (exponent - lowest).traced()), lowest)


def _at(call: Call, exponent: Exponent, *xs):
    """The primitive on wide data that has been brought to one exponent."""
    shape = call.outs[0].shape
    return call.bind(*(jnp.broadcast_to(call.align(x, exponent), shape) for x in xs))
