"""Optimizer moments held in a low-precision format between steps, for any optax transformation that calls them mu and nu.

What v needs is range before digits. Where a v that is not zero is stored as zero, the next update divides by sqrt((1 - b2) g**2), too
little by far if g is small this time, or by eps if it is zero. Measured with gradients over four decades, half of them zero at a time,
b2 = 0.95, 400 steps, nearest rounding; float32 gives updates up to 0.84 times the learning rate, root mean square (rms) 0.22:

    format of v               smallest positive        stored as 0   largest update   with keep_positive: largest, rms error of updates
    bfloat16                  that of float32          0             0.84             0.84   0.0005
    scaled E5M2 (tensor)      2**-31.8 of amax         0             0.85             0.85   0.017
    blockwise8                2**-21.6 of amax         16 %          320              1.2    0.063
    scaled E4M3 (tensor)      2**-17.8 of amax         33 %          1600             1.1    0.10
    mxfp8_e4m3                2**-18 of amax or so     31 %          1500             0.78   0.12
    float16, no scale         2**-24                   60 %          16000            0.81   0.16
    int8 in blocks of 256     1 / 127 of amax          71 %          50000            1.0    0.17

Nearest rounding also stands still where a step changes v by less than half the spacing: b2 = 0.999 takes away 0.1 % at most, bfloat16
is spaced 0.4 to 0.8 %, 8 bits far more. Formats whose scale is exact are dragged along by their amax; the others want stochastic
rounding at such b2 (rms error of updates with bfloat16: 0.0097 nearest, 0.0026 stochastic).
"""
from __future__ import annotations

from dataclasses import astuple
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import formats
from formats import Element, QArray
from formats.bits import is_traced
from formats.catalogue import resolve
from trainer.optimizers.blockwise import Blockwise8, BlockwiseArray
from trainer.optimizers.trees import check_rounding, leaf_key

_PURPOSE = 2  # of the random bits, see `leaf_key`
_ARRAYS = {"bfloat16": jnp.bfloat16, "float16": jnp.float16}  # stored as what they are
# Just above a level, so that no rounding and no draw takes it below: what nu is raised to instead of becoming zero.
_ABOVE = np.float32(1 + 2.0**-20)


class LowPrecisionMomentsState(NamedTuple):
    """inner: the wrapped transformation's state, its moments as stored. count: int32, updates done."""

    inner: Any
    count: jax.Array


def low_precision_moments(inner: optax.GradientTransformation, m=None, v=None, rounding: str = "nearest_even", key=None,
                          packed: bool = True, keep_positive: bool = True, apart: bool = True) -> optax.GradientTransformationExtraArgs:
    """Wraps any optax transformation: first moments (fields `mu` of its state, however nested) are held in format m between steps,
    second ones (`nu`) in format v. The transformation itself computes with them as float32.

    m, v: None (left as they are), a `formats` format or name ("bfloat16", scaled("float8_e4m3fn"), "mxfp8_e4m3", block formats), or
    `blockwise8(signed=True)` and `blockwise8(signed=False)`. rounding: any mode of `formats.Rounding` (blockwise8: nearest_even and
    stochastic); "stochastic" needs key (a PRNG key or uint32[2], may be traced; unused by the others): fresh bits every step and leaf.
    packed: store codes and scales: a QArray, a BlockwiseArray, or a bfloat16 or float16 array (`state_bytes` says how much); else store
    the same values as float32, which gives the same training bit for bit, and lets widths be traced.

    apart: compile the inner update apart from what reads and stores moments, behind a branch that XLA does not fuse into. Otherwise it
    makes other choices of a * b + c in one operation, packed or not, and results differ in the last bit. The price is that all moments
    exist as float32 while the update is computed: apart=False where that memory counts. Under vmap a branch is none, and nothing is apart.

    keep_positive: a second moment that is not zero is never stored as zero, but as the smallest positive value of its block or tensor.
    Without it updates explode, see above; bitsandbytes, which does without, has such zeros.

    ValueError: unknown formats and roundings, stochastic without key, a state without the field that has a format; traced widths
    when packed.
    """
    random, inner = check_rounding(rounding, key), optax.with_extra_args_support(inner)
    stores = {"mu": _store_of("m", m), "nu": _store_of("v", v)}

    def stored(state, count):
        leaves, treedef = jax.tree_util.tree_flatten_with_path(state)
        seen = {field for path, _ in leaves if (field := _field(path))}
        for name, field in (("m", "mu"), ("v", "nu")):
            if stores[field] is not None and field not in seen:
                raise ValueError(f"{name}={(m if name == 'm' else v)!r} with a state that has no field {field}, {type(state).__name__}; "
                                 "accepted: transformations such as optax.adam, whose moments are mu and nu")
        out = []
        for index, (path, x) in enumerate(leaves):
            store = stores.get(_field(path))
            if store is None:
                out.append(x)
                continue
            bits = leaf_key(key, _PURPOSE, count, index) if random else None
            out.append(store(x.astype(jnp.float32), rounding, bits, keep_positive and _field(path) == "nu", packed))
        return jax.tree.unflatten(treedef, out)

    def init(params):
        return LowPrecisionMomentsState(stored(inner.init(params), jnp.int32(-1)), jnp.int32(0))

    def update(updates, state, params=None, **extra_args):
        def compute(*args):
            return inner.update(*args, **extra_args)

        args = updates, _read(state.inner, stores), params
        updates, inner_state = _apart(compute, state.count >= 0, *args) if apart else compute(*args)
        return updates, LowPrecisionMomentsState(stored(inner_state, state.count), optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init, update)


def _apart(function, true, *args):
    """function(*args) inside a branch; true: bool [], traced and always true. (XLA on CPU drops optimization barriers before it fuses.)"""
    results = jax.eval_shape(function, *args)
    return lax.cond(true, function, lambda *_: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), results), *args)


def _field(path) -> str | None:
    """Which moment a leaf belongs to: mu, nu or None."""
    return next((key.name for key in path if getattr(key, "name", None) in ("mu", "nu")), None)


def _is_stored(x) -> bool:
    return isinstance(x, QArray | BlockwiseArray)


def _decoded(x):
    return x.decode() if _is_stored(x) else x.astype(jnp.float32)


def _read(state, stores: dict):
    """A stored state with its moments as float32."""

    def read(path, x):
        return x if stores.get(_field(path)) is None else _decoded(x)

    return jax.tree_util.tree_map_with_path(read, state, is_leaf=_is_stored)


def _store_of(name: str, fmt):
    """A function (x, rounding, key, keep_positive, packed) -> what is stored of float32 x; None for None."""
    if fmt is None:
        return None
    if isinstance(fmt, Blockwise8):
        return partial(_store_blockwise, fmt)
    try:
        return partial(_store, resolve(fmt))
    except ValueError as error:
        raise ValueError(f"{name}: {error}; or blockwise8(signed={name == 'm'})") from None


def _store_blockwise(fmt: Blockwise8, x, rounding: str, key, keep_positive: bool, packed: bool):
    stored = fmt.encode(x, rounding=rounding, key=key, keep_positive=keep_positive)
    return stored if packed else stored.decode()


def _store(fmt, x, rounding: str, key, keep_positive: bool, packed: bool):
    x = _raised(x, fmt) if keep_positive else x
    dtype = _dtype_of(fmt)
    if packed and dtype is None:
        return formats.encode(x, fmt, rounding=rounding, key=key)
    y = formats.quantize(x, fmt, rounding=rounding, key=key, gradient="none")
    return y.astype(dtype) if packed else y


def _dtype_of(fmt):
    """bfloat16 or float16 if that is what the format is, to be stored as real arrays; else None."""
    for name, dtype in _ARRAYS.items():
        if isinstance(fmt, Element) and not is_traced(*jax.tree.leaves(fmt)) and astuple(fmt) == astuple(formats.get(name)):
            return dtype
    return None


def _raised(x, fmt):
    """x >= 0 with what lies between 0 and the smallest positive value (of its block) moved there."""
    if isinstance(fmt, Element) and not is_traced(fmt.quantum_exp) and fmt.quantum_exp <= -126:
        return x  # reaches as far as float32
    below, above = (formats.quantize(x, fmt, rounding=mode, gradient="none") for mode in ("toward_zero", "toward_positive"))
    return jnp.where((x > 0) & (below == 0), above * _ABOVE, x)
