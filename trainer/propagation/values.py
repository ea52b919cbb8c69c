"""What the transform holds for each variable of a program, and the four things that rules do with it: lift, align, collapse, store.

A variable is one of
    an array    an integer, a key, or a float that no scale has reached yet: it has exponent 0
    Uniform     the same number everywhere, known when the program is traced (zero is one of them) or a broadcast scalar
    Scaled      data * 2**exponent
"""
from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from trainer.propagation.array import ZERO_EXPONENT, floor_log2, is_float, shift, trailing, wide
from trainer.propagation.exponents import Exponent, highest, of_array

# Constants of this size stand for minus infinity in masks (-1e9, -1e30, finfo.min): they never set a tensor's scale.
SENTINEL = 2.0**24
_SQRT_HALF = 0.7071067811865476


@dataclass(frozen=True, eq=False)
class Scaled:
    """data * 2**exponent; `dtype` is that of the program's variable, which data may hold more narrowly. `faint`: the data may lie far below
    unit scale everywhere, as exp(x), a probability or 1 - tanh(x)^2 do; then the exponent says nothing of the size."""

    data: jax.Array
    exponent: Exponent
    dtype: np.dtype
    faint: bool = False

    @property
    def shape(self):
        return self.data.shape

    @property
    def ndim(self) -> int:
        return self.data.ndim


@dataclass(frozen=True, eq=False)
class Uniform:
    """`number` at every index: a Python float known at trace time, or a float array of shape []."""

    number: object
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def known(self) -> bool:
        return isinstance(self.number, float)

    @property
    def zero(self) -> bool:
        return self.known and self.number == 0.0

    @property
    def any_scale(self) -> bool:
        """True for what is the same at every scale: zero, infinities, NaN."""
        return self.known and (self.number == 0.0 or not math.isfinite(self.number))

    @property
    def sentinel(self) -> bool:
        return self.known and abs(self.number) >= min(SENTINEL, float(jnp.finfo(self.dtype).max))

    def array(self):
        """As the program's own array."""
        if self.known:
            return jnp.full(self.shape, self.number, self.dtype)
        return lax.broadcast_in_dim(self.number, self.shape, ())


def floats(x) -> bool:
    """True if a variable holds floating-point numbers."""
    return isinstance(x, (Scaled, Uniform)) or is_float(x)


def carries(x) -> bool:
    """True if a scale has reached this variable."""
    return isinstance(x, Scaled)


def plain(x):
    """The variable as the program's own array; a Scaled is multiplied out (in float32 first, then in its own dtype)."""
    if isinstance(x, Scaled):
        return unscaled_wide(x).astype(x.dtype)
    return x.array() if isinstance(x, Uniform) else x


def unscaled_wide(x, far: bool = True):
    """The values of a variable in the dtype that rules compute in; beyond its range they overflow or flush. far: see `Exponent.shift`."""
    if isinstance(x, Scaled):
        return x.exponent.shift(wide(x.data), far and not narrow_range(x.data.dtype))
    return wide(plain(x))


def split_number(number: float) -> tuple[float, int]:
    """(m, k) with number = m * 2**k and m nearest to 1 on a logarithmic scale, so that a decay by 0.999 at every step leaves the
    exponent where it is; what is any scale stays as it is."""
    if number == 0.0 or not math.isfinite(number):
        return number, 0
    mantissa, exponent = math.frexp(number)
    return (mantissa, exponent) if abs(mantissa) >= _SQRT_HALF else (mantissa * 2, exponent - 1)


def lift(x, memo: dict) -> Scaled:
    """A float variable as a Scaled. A scalar is split into mantissa and exponent, so that multiplying by a learning rate moves the
    scale and not the data; arrays have exponent 0. `memo` keeps the split of each traced scalar."""
    if isinstance(x, Scaled):
        return x
    if isinstance(x, Uniform) and x.known:
        mantissa, exponent = split_number(x.number)
        exponent = ZERO_EXPONENT if x.zero else exponent
        return Scaled(np.full((), mantissa, wide_dtype(x.dtype)), Exponent(exponent), x.dtype)
    number = x.number if isinstance(x, Uniform) else x
    if number.ndim:
        return Scaled(number, Exponent(), number.dtype)
    if id(number) not in memo:
        data = wide(number)
        if data.dtype != jnp.float32:  # float64 has range enough
            parts = (data, Exponent())
        else:
            k = floor_log2(data * np.float32(1 / _SQRT_HALF))  # nearest, as in split_number
            parts = (shift(data, jnp.where(k == ZERO_EXPONENT, 0, -k)), of_array(k))
        memo[id(number)] = (*parts, number)  # the number itself too: its id must stay its own
    data, exponent, _ = memo[id(number)]
    return Scaled(data, exponent, number.dtype)


def narrow_range(dtype) -> bool:
    """True if one power of two of float32's range does for any shift of such data: float16 and FP8 have nothing at 2**100, bfloat16 has."""
    return jnp.finfo(dtype).maxexp < 64


def wide_dtype(dtype) -> np.dtype:
    """The dtype that rules compute in for a variable of this one."""
    return np.dtype(dtype) if np.dtype(dtype).itemsize >= 4 else np.dtype(np.float32)


def align(x, exponent: Exponent, memo: dict, saturate=None, far: bool = False):
    """The data that x has at another exponent, wide. `saturate`: the largest magnitude that a known number may take. `far`: see
    `Exponent.shift`."""
    if isinstance(x, Uniform) and x.known:
        if x.any_scale or not exponent.terms:
            value = x.number if x.any_scale else _ldexp(x.number, -exponent.known)
            if saturate is not None and math.isfinite(x.number):
                value = max(-saturate, min(saturate, value))
            return np.full((), value, wide_dtype(x.dtype))
        mantissa, own = split_number(x.number)
        value = (Exponent(own) - exponent).shift(np.full((), mantissa, wide_dtype(x.dtype)), far)
        # An epsilon, or the bound of a logarithm, does not become zero.
        tiny = float(jnp.finfo(value.dtype).tiny)
        value = jnp.maximum(value, tiny) if x.number > 0 else jnp.minimum(value, -tiny)
        return value if saturate is None else jnp.clip(value, -saturate, saturate)
    x = lift(x, memo)
    return (x.exponent - exponent).shift(wide(x.data), far)


def _ldexp(number: float, exponent: int) -> float:
    try:
        return math.ldexp(number, exponent)
    except OverflowError:
        return math.copysign(math.inf, number)


def common(xs) -> Exponent:
    """The largest exponent among variables, of those that have a scale of their own. Sentinels have one only among themselves."""
    real = [x for x in xs if not (isinstance(x, Uniform) and (x.any_scale or x.sentinel))]
    if not real:
        real = [x for x in xs if not (isinstance(x, Uniform) and x.any_scale)]
    return highest([exponent_of(x) for x in real]) if real else Exponent()


def exponent_of(x) -> Exponent:
    """The exponent of a variable; that of a broadcast scalar which is not known is 0 here."""
    if isinstance(x, Scaled):
        return x.exponent
    if isinstance(x, Uniform) and x.known:
        return Exponent(split_number(x.number)[1])
    return Exponent()


def collapse(x: Scaled, keep: int = 0) -> Scaled:
    """x with exponents for its first `keep` dimensions only: the largest of those that fall together."""
    if x.exponent.ndim <= keep:
        return x
    each = x.exponent.traced()
    top = jnp.max(each, axis=tuple(range(keep, each.ndim)), initial=ZERO_EXPONENT)
    data = shift(wide(x.data), each - trailing(top, each.ndim) if keep else each - top)
    return Scaled(data.astype(x.data.dtype), of_array(top, divided=x.exponent.divided), x.dtype)
