"""Primitives that hold programs: jit, scan, while, cond, remat, custom derivatives.

A body is traced once for each kind of its arguments (`Kind`): what is known stays known inside, traced exponents become arguments.
Loops go on until the kinds of what they carry stand still: known, then one traced exponent; it takes two or three rounds.
"""
from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from trainer.propagation.array import ZERO_EXPONENT, brought_near, shift, trailing, wide
from trainer.propagation.exponents import Exponent, of_array
from trainer.propagation.interpret import STRUCTURES, Context, interpret
from trainer.propagation.values import Scaled, Uniform, collapse, lift, plain


DRIFT = 8  # what loops carry stays within 2**-8 and 2**9


@dataclass(frozen=True)
class Kind:
    """What is known of a variable when a body is traced.

    exponent: None for a variable without one (an array, or a known `number`), an int where it is known, "traced" otherwise, then
    with `rank` leading dimensions.
    """

    shape: tuple[int, ...]
    dtype: object  # of the data
    program_dtype: object = None
    exponent: int | str | None = None
    rank: int = 0
    number: float | None = None
    faint: bool = False  # as of Scaled
    divided: bool = False  # as of Exponent


def kind_of(x) -> Kind:
    """The kind of a variable."""
    if isinstance(x, Scaled):
        exponent = "traced" if x.exponent.terms else x.exponent.known
        return Kind(tuple(x.shape), x.data.dtype, x.dtype, exponent, x.exponent.ndim, faint=x.faint, divided=x.exponent.divided)
    if isinstance(x, Uniform):
        return Kind(x.shape, x.dtype, number=x.number if x.known else None)
    return Kind(tuple(np.shape(x)), jnp.result_type(x) if not hasattr(x, "dtype") else x.dtype)


def pack(x, kind: Kind) -> list:
    """A variable as the arrays that a variable of this kind (its own, or a more general one) consists of."""
    if kind.number is not None:
        return []
    if kind.exponent is None:
        return [plain(x)]
    x = _held(x, kind)
    if kind.exponent != "traced":
        difference = x.exponent - kind.exponent
        return [_moved(x, difference.traced(), kind)]
    x = collapse(x, kind.rank)
    exponent = x.exponent.traced()
    exponent = jnp.asarray(exponent, jnp.int32)
    return [x.data, jnp.broadcast_to(trailing(exponent, kind.rank), kind.shape[: kind.rank])]


def _moved(x: Scaled, difference, kind: Kind):
    return shift(wide(x.data), difference).astype(kind.dtype)


def _held(x, kind: Kind) -> Scaled:
    """A float variable as a Scaled with data of the kind's shape and dtype."""
    if isinstance(x, Uniform) and x.zero:
        return Scaled(jnp.zeros(kind.shape, kind.dtype), Exponent(ZERO_EXPONENT if kind.exponent == "traced" else kind.exponent), kind.program_dtype)
    x = lift(x, {})
    data = x.data.astype(kind.dtype)
    return Scaled(jnp.broadcast_to(data, kind.shape), x.exponent, kind.program_dtype)


def unpack(kinds, flat) -> list:
    """The variables of these kinds from their arrays, in order."""
    flat = iter(flat)
    found = []
    for kind in kinds:
        if kind.number is not None:
            found.append(Uniform(kind.number, kind.shape, np.dtype(kind.dtype)))
        elif kind.exponent is None:
            found.append(next(flat))
        else:
            data = next(flat)
            exponent = of_array(next(flat), divided=kind.divided) if kind.exponent == "traced" else Exponent(kind.exponent)
            found.append(Scaled(data, exponent, kind.program_dtype, kind.faint))
    return found


def join(a: Kind, b: Kind) -> Kind:
    """The least general kind that holds variables of both."""
    a, b = (replace(k, faint=a.faint or b.faint, divided=a.divided or b.divided) for k in (a, b))
    if a == b:
        return a
    for one, other in ((a, b), (b, a)):
        if one.number == 0.0 and other.number is None:  # zero has any scale
            return other
    if a.exponent is None and b.exponent is None:
        return replace(a, number=None)
    scaled = a if a.exponent is not None else b
    # In one dtype: the narrower, which is what results are held in.
    dtype = min((k.dtype for k in (a, b) if k.exponent is not None), key=lambda d: np.dtype(d).itemsize)
    return replace(scaled, exponent="traced", rank=max(a.rank, b.rank), dtype=dtype)


@dataclass(frozen=True)
class Body:
    """A traced body: a closed jaxpr on the arrays of its arguments, and the kinds of its results."""

    closed: object
    kinds: tuple[Kind, ...]

    def __call__(self, *flat):
        return jax.core.eval_jaxpr(self.closed.jaxpr, self.closed.consts, *flat)


def trace(ctx: Context, jaxpr, consts, kinds: tuple[Kind, ...], wanted: tuple[Kind, ...] | None = None) -> Body:
    """The body under the transform for arguments of these kinds, its results as of the kinds `wanted`. Bodies are kept: the
    second round of an outer loop finds those of the inner ones. `consts` must be concrete or belong to the jaxpr."""
    # Paths matter where values are watched or moved: two calls of one jaxpr are two places then.
    key = (id(jaxpr), kinds, wanted, ctx.path if ctx.watch or ctx.move else None)
    if key in ctx.bodies:
        return ctx.bodies[key][0]
    if wanted is not None:
        own = trace(ctx, jaxpr, consts, kinds)
        if own.kinds == wanted:
            return own
    found = []

    def run(*flat):
        inside = replace(ctx, memo={})
        results = interpret(inside, jaxpr, consts, unpack(kinds, flat))
        own = tuple(kind_of(r) for r in results)
        found.append(own if wanted is None else wanted)
        return [array for r, k in zip(results, found[-1]) for array in pack(r, k)]

    shapes = [s for k in kinds for s in _shapes(k)]
    closed = jax.make_jaxpr(run)(*shapes)
    body = Body(closed, found[-1])
    ctx.bodies[key] = (body, jaxpr)  # the jaxpr too: its id must stay its own
    return body


def _shapes(kind: Kind) -> list:
    if kind.number is not None:
        return []
    shapes = [jax.ShapeDtypeStruct(kind.shape, kind.dtype)]
    if kind.exponent == "traced":
        shapes.append(jax.ShapeDtypeStruct(kind.shape[: kind.rank], jnp.int32))
    return shapes


def parts(value):
    """(jaxpr, consts) of an open or a closed jaxpr."""
    return (value.jaxpr, value.consts) if hasattr(value, "consts") else (value, ())


def structure(*names):
    """Decorator: what interprets these primitives; function(ctx, eqn, variables) -> variables."""

    def add(function):
        for name in names:
            STRUCTURES[name] = function
        return function

    return add


# --- calls ----------------------------------------------------------------------------------------------------------


@structure("jit", "pjit", "call", "closed_call", "core_call", "eval_jaxpr", "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "custom_lin")
def call(ctx: Context, eqn, values):
    """The body in the place of the call. Derivative rules have been applied by the time this runs."""
    jaxpr, consts = parts(eqn.params.get("jaxpr") or eqn.params.get("call_jaxpr") or eqn.params["fun_jaxpr"])
    values = _constrained(eqn.params.get("in_shardings"), values)
    return _constrained(eqn.params.get("out_shardings"), interpret(ctx, jaxpr, consts, values))


def _constrained(shardings, values) -> list:
    """Shardings that an inner jit asked for are asked of the data."""
    if shardings is None or not any(isinstance(s, jax.sharding.Sharding) for s in shardings):
        return list(values)

    def constrain(x, sharding):
        if not isinstance(sharding, jax.sharding.Sharding) or isinstance(x, Uniform):
            return x
        if isinstance(x, Scaled):
            return replace(x, data=lax.with_sharding_constraint(x.data, sharding))
        return lax.with_sharding_constraint(x, sharding)

    return [constrain(x, s) for x, s in zip(values, shardings)]


@structure("remat", "remat2", "checkpoint")
def remat(ctx: Context, eqn, values):
    """Differentiated, it computes the forward pass anew: a barrier keeps XLA from finding that it had it already."""
    jaxpr, consts = parts(eqn.params["jaxpr"])
    if not (eqn.params["differentiated"] and eqn.params["prevent_cse"]):
        return interpret(ctx, jaxpr, consts, values)
    kinds = tuple(map(kind_of, values))
    flat = [array for x, k in zip(values, kinds) for array in pack(x, k)]
    return interpret(ctx, jaxpr, consts, unpack(kinds, lax.optimization_barrier(tuple(flat))))


# --- loops ----------------------------------------------------------------------------------------------------------


def scan_counts(params) -> tuple[int, int]:
    """(constants, carried) of a scan; jax 0.11 replaced the counts by groupings."""
    if "num_carry" in params:
        return params["num_consts"], params["num_carry"]
    consts, carried, _ = (len(list(group)) for group in params["ft_in"].unpack())
    return consts, carried


def _standing_still(ctx, jaxpr, consts, fixed, carried, rest):
    """Kinds of the carried variables that hold before and after the body, and the body for them."""
    count = len(carried)
    while True:
        body = trace(ctx, jaxpr, consts, (*fixed, *carried, *rest))
        after = body.kinds[:count]
        joined = tuple(join(a, b) for a, b in zip(carried, after))
        if joined == carried:
            return carried, trace(ctx, jaxpr, consts, (*fixed, *carried, *rest), (*carried, *body.kinds[count:]))
        carried = joined


def _brought_back(kinds, flat, jaxpr) -> list:
    """The arrays of carried variables, with data that has drifted from unit scale brought back, lest exponents that say more than their data
    say ever more with each iteration: those of parameters and of their gradients would. What the body passes on as it is stays."""
    found = []
    same = set(map(id, jaxpr.invars))
    for variable, kind, out in zip(unpack(kinds, flat), kinds, jaxpr.outvars):
        if isinstance(variable, Scaled) and kind.exponent == "traced" and variable.data.size and id(out) not in same:
            data, moved = brought_near(wide(variable.data), kind.rank, DRIFT)
            variable = replace(variable, data=data.astype(kind.dtype), exponent=variable.exponent + of_array(moved))
        found += pack(variable, kind)
    return found


@structure("scan")
def scan(ctx: Context, eqn, values):
    """Carries with a scale keep one exponent each; stacked results have one for each iteration."""
    params = eqn.params
    jaxpr, consts = parts(params["jaxpr"])
    num_consts, num_carry = scan_counts(params)
    outer, init, xs = values[:num_consts], values[num_consts : num_consts + num_carry], values[num_consts + num_carry :]
    fixed = tuple(map(kind_of, outer))
    slices = tuple(_slice_kind(kind_of(x)) for x in xs)
    carried, body = _standing_still(ctx, jaxpr, consts, fixed, tuple(map(kind_of, init)), slices)
    const_flat = [a for x, k in zip(outer, fixed) for a in pack(x, k)]
    init_flat = tuple(a for x, k in zip(init, carried) for a in pack(x, k))
    xs_flat = tuple(a for x, k in zip(xs, slices) for a in _pack_stacked(x, k, params["length"]))

    def step(carry, x):
        out = body(*const_flat, *carry, *x)
        return tuple(_brought_back(carried, out[: len(init_flat)], jaxpr)), tuple(out[len(init_flat) :])

    last, stacked = lax.scan(step, init_flat, xs_flat, params["length"], params["reverse"], params.get("unroll", 1))
    return unpack(carried, last) + _unpack_stacked(body.kinds[num_carry:], stacked, params["length"])


def _slice_kind(kind: Kind) -> Kind:
    """The kind of one slice along the first dimension."""
    return replace(kind, shape=kind.shape[1:], rank=max(kind.rank - 1, 0))


def _pack_stacked(x, kind: Kind, length: int) -> list:
    if kind.number is not None or kind.exponent != "traced":
        return pack(x, replace(kind, shape=(length, *kind.shape)))
    return pack(x, replace(kind, shape=(length, *kind.shape), rank=kind.rank + 1))


def _unpack_stacked(kinds, flat, length: int) -> list:
    return unpack([replace(k, shape=(length, *k.shape)) for k in kinds], flat)


@structure("while")
def while_loop(ctx: Context, eqn, values):
    """As scan, without slices; the condition reads the carried values as they are."""
    params = eqn.params
    cond, cond_consts = parts(params["cond_jaxpr"])
    jaxpr, consts = parts(params["body_jaxpr"])
    n, m = params["cond_nconsts"], params["body_nconsts"]
    for_cond, for_body, init = values[:n], values[n : n + m], values[n + m :]
    fixed = tuple(map(kind_of, for_body))
    carried, body = _standing_still(ctx, jaxpr, consts, fixed, tuple(map(kind_of, init)), ())
    cond_kinds = tuple(map(kind_of, for_cond))
    test = trace(ctx, cond, cond_consts, (*cond_kinds, *carried))
    body_flat = [a for x, k in zip(for_body, fixed) for a in pack(x, k)]
    cond_flat = [a for x, k in zip(for_cond, cond_kinds) for a in pack(x, k)]
    init_flat = tuple(a for x, k in zip(init, carried) for a in pack(x, k))
    last = lax.while_loop(lambda c: test(*cond_flat, *c)[0], lambda c: tuple(_brought_back(carried, body(*body_flat, *c), jaxpr)), init_flat)
    return unpack(carried, last)


@structure("cond")
def cond(ctx: Context, eqn, values):
    """Results have a scale if one branch gives them one."""
    index, *operands = values
    kinds = tuple(map(kind_of, operands))
    branches = [parts(b) for b in eqn.params["branches"]]
    found = [trace(ctx, jaxpr, consts, kinds).kinds for jaxpr, consts in branches]
    wanted = found[0]
    for other in found[1:]:
        wanted = tuple(join(a, b) for a, b in zip(wanted, other))
    bodies = [trace(ctx, jaxpr, consts, kinds, wanted) for jaxpr, consts in branches]
    flat = [a for x, k in zip(operands, kinds) for a in pack(x, k)]
    results = lax.switch(index.astype(jnp.int32), [lambda *a, b=b: tuple(b(*a)) for b in bodies], *flat)
    return unpack(wanted, results)
