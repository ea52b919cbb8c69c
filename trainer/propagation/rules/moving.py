"""What moves numbers without changing them: the data moves, the exponent stays, or moves along where it has leading dimensions."""
from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax

from trainer.propagation.array import trailing, wide
from trainer.propagation.exponents import Exponent, highest, of_array
from trainer.propagation.rules.registry import Call, rule
from trainer.propagation.values import Scaled, Uniform, collapse


def _same_leading(a_shape, b_shape) -> int:
    """How many leading dimensions two shapes share."""
    count = 0
    for m, n in zip(a_shape, b_shape):
        if m != n:
            break
        count += 1
    return count


@rule("reshape", data="f(a)", exponent="ea")
def reshape(call: Call, a):
    shape = call.outs[0].shape
    if call.params.get("dimensions") is None:
        a = collapse(a, _same_leading(a.shape, shape))
    else:
        a = collapse(a)
    return call.store(call.bind(a.data), a.exponent)


@rule("squeeze", data="f(a)", exponent="ea")
def squeeze(call: Call, a):
    dims = call.params["dimensions"]
    rank = a.exponent.ndim
    inside = tuple(d for d in dims if d < rank)
    exponent = a.exponent.mapped(lambda e: lax.squeeze(e, inside)) if inside else a.exponent
    return call.store(call.bind(a.data), exponent)


@rule("broadcast_in_dim", data="f(a)", exponent="ea")
def broadcast_in_dim(call: Call, a):
    dims, shape = call.params["broadcast_dimensions"], call.outs[0].shape
    rank = a.exponent.ndim
    exponent = a.exponent
    if rank and not (tuple(dims[:rank]) == tuple(range(rank)) and tuple(shape[:rank]) == tuple(a.shape[:rank])):
        lead = max(dims[:rank]) + 1
        exponent = exponent.mapped(lambda e: lax.broadcast_in_dim(_whole(e, a.shape), shape[:lead], dims[:rank]))
    return call.store(call.bind(a.data), exponent)


def _whole(exponent, shape):
    """An exponent whose dimensions of size one are repeated to those of the data."""
    return jnp.broadcast_to(exponent, shape[: exponent.ndim])


@rule("transpose", data="f(a)", exponent="ea")
def transpose(call: Call, a):
    order = call.params["permutation"]
    fixed = 0
    while fixed < a.exponent.ndim and order[fixed] == fixed:
        fixed += 1
    a = collapse(a, fixed)
    return call.store(call.bind(a.data), a.exponent)


@rule("rev", data="f(a)", exponent="ea")
def rev(call: Call, a):
    inside = tuple(d for d in call.params["dimensions"] if d < a.exponent.ndim)
    exponent = a.exponent.mapped(lambda e: lax.rev(_whole(e, a.shape), inside)) if inside else a.exponent
    return call.store(call.bind(a.data), exponent)


@rule("slice", data="f(a)", exponent="ea")
def slice(call: Call, a):
    start, limit, strides = (call.params[k] for k in ("start_indices", "limit_indices", "strides"))
    rank = a.exponent.ndim

    def cut(e):
        return lax.slice(_whole(e, a.shape), start[:rank], limit[:rank], None if strides is None else strides[:rank])

    return call.store(call.bind(a.data), a.exponent.mapped(cut))


@rule("split", data="f(a)", exponent="ea")
def split(call: Call, a):
    axis, sizes = call.params["axis"], call.params["sizes"]
    pieces = call.bind(a.data)
    if axis >= a.exponent.ndim:
        exponents = [a.exponent] * len(pieces)
    else:
        own = Exponent(a.exponent.known, tuple((t, c) for t, c in a.exponent.terms if not t.array.ndim))
        each = (a.exponent - own).traced()
        exponents = [own + of_array(e) for e in lax.split(_whole(each, a.shape), sizes, axis)]
    return [call.store(piece, e, i) for i, (piece, e) in enumerate(zip(pieces, exponents))]


@rule("dynamic_slice", data="f(a)", exponent="ea")
def dynamic_slice(call: Call, a, *starts):
    rank, sizes = a.exponent.ndim, call.params["slice_sizes"]
    exponent = a.exponent
    if rank and tuple(sizes[:rank]) != tuple(a.shape[:rank]):
        exponent = exponent.mapped(lambda e: lax.dynamic_slice(_whole(e, a.shape), starts[:rank], sizes[:rank]))
    return call.store(call.bind(a.data, *starts), exponent)


def _full(call: Call, x, index: int, exponent: Exponent):
    """Data of an argument at an exponent, in its own shape."""
    shape = call.ins[index].shape
    return jnp.broadcast_to(call.align(x, exponent, shape=shape), shape)


def _flat(x):
    """A variable with at most one exponent for the whole tensor."""
    return collapse(x) if isinstance(x, Scaled) else x


@rule("dynamic_update_slice", data="update of a by b, both at e", exponent="e = max(ea, eb)")
def dynamic_update_slice(call: Call, a, b, *starts):
    a, b = _flat(a), _flat(b)
    exponent = call.common(a, b)
    return call.store(call.bind(_full(call, a, 0, exponent), _full(call, b, 1, exponent), *starts), exponent)


@rule("concatenate", data="concatenate(a 2^(ea - e), ...)", exponent="e = max; pieces of length 1 along the first dimension keep theirs")
def concatenate(call: Call, *pieces):
    axis, shape = call.params["dimension"], call.outs[0].shape
    stackable = axis == 0 and len(pieces) > 1 and all(aval.shape[0] == 1 for aval in call.ins)
    lifted = [p if isinstance(p, Uniform) and p.any_scale else call.lift(p) for p in pieces]
    if stackable:
        return _stack(call, lifted)
    lifted = [collapse(p, axis) if isinstance(p, Scaled) else p for p in lifted]
    exponent = call.common(*lifted)
    return call.store(call.bind(*(_full(call, p, i, exponent) for i, p in enumerate(lifted))), exponent) if shape else lifted[0]


def _stack(call: Call, pieces, rank: int = 0):
    """Layers laid side by side: each keeps its exponent, or one for each of its `rank` leading indices, unless all have the same."""
    pieces = [collapse(p, max(rank, 1)) if isinstance(p, Scaled) else p for p in pieces]
    exponents = [p.exponent if isinstance(p, Scaled) else None for p in pieces]
    real = [e for e in exponents if e is not None]
    if not any(e.terms for e in real) and len({e.known for e in real}) == 1:
        exponent = real[0]
        return call.store(call.bind(*(_full(call, p, i, exponent) for i, p in enumerate(pieces))), exponent)
    top = highest(real)
    each = [top if e is None else e for e in exponents]
    data = [_full(call, p, i, e) for i, (p, e) in enumerate(zip(pieces, each))]
    shape = call.ins[0].shape[:rank]
    stacked = jnp.concatenate([_as_row(jnp.asarray(e.traced(), jnp.int32), shape) for e in each])
    return call.store(call.bind(*data), of_array(stacked))


def _as_row(exponent, shape):
    """An exponent for each index of `shape`, as one slice of a stack."""
    if not shape:
        return jnp.reshape(exponent, (1,))
    return jnp.broadcast_to(trailing(exponent, len(shape)), shape)[None]


@rule("stack", data="stack(a 2^(ea - e), ...)", exponent="e = max; along the first dimension, each keeps its own")
def stack(call: Call, *pieces):
    axis = call.params["axis"]
    pieces = [p if isinstance(p, Uniform) and p.any_scale else call.lift(p) for p in pieces]
    if axis == 0:
        return _stack(call, pieces, max(p.exponent.ndim for p in pieces if isinstance(p, Scaled)))
    pieces = [collapse(p, axis) if isinstance(p, Scaled) else p for p in pieces]
    exponent = call.common(*pieces)
    return call.store(call.bind(*(_full(call, p, i, exponent) for i, p in enumerate(pieces))), exponent)


@rule("unstack", data="f(a)", exponent="ea")
def unstack(call: Call, a):
    axis = call.params["axis"]
    pieces = call.bind(a.data)
    if axis >= a.exponent.ndim:
        return [call.store(piece, a.exponent, i) for i, piece in enumerate(pieces)]
    each = [a.exponent.mapped(lambda e, i=i: lax.index_in_dim(_whole(e, a.shape), i, axis, keepdims=False)) for i in range(len(pieces))]
    return [call.store(piece, e, i) for i, (piece, e) in enumerate(zip(pieces, each))]


@rule("tile", data="f(a)", exponent="ea")
def tile(call: Call, a):
    reps = call.params["reps"][: a.exponent.ndim]
    exponent = a.exponent if all(r == 1 for r in reps) else a.exponent.mapped(lambda e: jnp.tile(_whole(e, a.shape), reps))
    return call.store(call.bind(a.data), exponent)


@rule("pad", data="pad(a, b) at e", exponent="e = max(ea, eb); ea where b is 0")
def pad(call: Call, a, value):
    untouched = next((i for i, sizes in enumerate(call.params["padding_config"]) if any(sizes)), 0)
    if isinstance(a, Scaled):
        a = collapse(a, untouched if isinstance(value, Uniform) and value.any_scale else 0)
    exponent = call.common(a, value)
    return call.store(call.bind(_full(call, a, 0, exponent), call.align(value, exponent)), exponent)


@rule("gather", data="f(a)", exponent="ea")
def gather(call: Call, a, indices):
    if call.params.get("fill_value") not in (None, 0) and np.isfinite(call.params["fill_value"]):
        return call.fall_back(a, indices)
    if not a.exponent.ndim:
        return call.store(call.bind(a.data, indices), a.exponent)
    # What is taken may be much smaller than the largest of what was there.
    a = collapse(Scaled(wide(a.data), a.exponent, a.dtype))
    return call.settle(call.bind(a.data, indices), a.exponent)


SCATTERS = {"scatter": lax.scatter, "scatter_add": lax.scatter_add, "scatter_sub": lax.scatter_sub, "scatter_min": lax.scatter_min,
            "scatter_max": lax.scatter_max}  # fmt: skip


@rule("scatter", "scatter-add", "scatter-sub", "scatter-min", "scatter-max", data="f(a 2^(ea - e), b 2^(eb - e)), added in float32", exponent="e = max(ea, eb)")
def scatter(call: Call, a, indices, updates):
    a, updates = _flat(a), _flat(updates)
    exponent = call.common(a, updates)
    params = {k: call.params[k] for k in ("dimension_numbers", "indices_are_sorted", "unique_indices", "mode")}
    # By jax's function: the primitive holds a program of the combination in the dtype of the data.
    function = SCATTERS[call.name.replace("-", "_")]
    return call.store(function(_full(call, a, 0, exponent), indices, _full(call, updates, 2, exponent), **params), exponent)


