"""Rules of users: for a function (`scale_rule`), as custom_jvp is for derivatives, and for a primitive (`register_rule`)."""
from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from trainer.propagation.array import ScaledArray, is_scaled
from trainer.propagation.exponents import Exponent, of_array
from trainer.propagation.interpret import USER_RULES
from trainer.propagation.values import Scaled, Uniform, collapse, floats

scale_rule_call = Primitive("scale_rule_call")
scale_rule_call.multiple_results = True


class scale_rule:  # noqa: N801 - a decorator, named like jax.custom_jvp
    """A function with a rule of its own under `propagate_scales`; outside it, the function itself.

        @scale_rule
        def gelu(x): ...

        @gelu.defrule
        def _(x):                     # a ScaledArray; exponent is an int or an int32 array
            return ScaledArray(jax.nn.gelu(trainer.unscaled(x)).astype(x.dtype), 0)

    Positional arguments are pytrees of arrays, keyword arguments are static and hashable. The rule gets a ScaledArray for every
    floating-point array and returns what the function returns, with ScaledArrays (or arrays, at exponent 0) in the floats' places.
    Under differentiation the values keep the rule; the derivative is that of the function, whose equations have the rules of
    their primitives. To give the backward pass a rule too, make the function a custom_vjp of two functions with a scale_rule each.
    Under vmap the rule is mapped. Arrays that the function closes over do not reach the rule: pass them as arguments.
    """

    def __init__(self, fun: Callable):
        functools.update_wrapper(self, fun)
        self.fun = fun
        self.rule: Callable | None = None

    def defrule(self, rule: Callable) -> Callable:
        """Decorator that sets the rule."""
        self.rule = rule
        return rule

    def __call__(self, *args, **static):
        if self.rule is None:
            raise TypeError(f"scale_rule: {self.__name__} has no rule; define one with @{self.__name__}.defrule")
        flat, tree = jax.tree.flatten(args)
        out_tree = None

        def run(*leaves):
            nonlocal out_tree
            out, out_tree = jax.tree.flatten(self.fun(*jax.tree.unflatten(tree, leaves), **static))
            return out

        closed = jax.make_jaxpr(run)(*flat)
        out = scale_rule_call.bind(
            *closed.consts, *flat, jaxpr=closed.jaxpr, num_consts=len(closed.consts), owner=self, static=tuple(static.items()), tree=tree,
            batched=(),
        )
        return jax.tree.unflatten(out_tree, out)


def _evaluate(*args, jaxpr, num_consts, **_):
    return jax.core.eval_jaxpr(jaxpr, args[:num_consts], *args[num_consts:])


def _jvp(primals, tangents, **params):
    out = scale_rule_call.bind(*primals, **params)
    moving = [i for i, t in enumerate(tangents) if not isinstance(t, ad.Zero)]

    def of_moving(*xs):
        full = list(primals)
        for i, x in zip(moving, xs):
            full[i] = x
        return _evaluate(*full, **params)

    _, found = jax.jvp(of_moving, [primals[i] for i in moving], [tangents[i] for i in moving])
    return out, [ad.Zero.from_primal_value(o) if _is_float0(t) else t for o, t in zip(out, found)]


def _is_float0(x) -> bool:
    return getattr(x, "dtype", None) == jax.dtypes.float0


def _batch(args, dims, *, jaxpr, num_consts, batched, **params):
    args = [a if d is None else jnp.moveaxis(a, d, 0) for a, d in zip(args, dims)]
    mapped = tuple(d is not None for d in dims)
    run = functools.partial(_evaluate, jaxpr=jaxpr, num_consts=num_consts)
    closed = jax.make_jaxpr(jax.vmap(run, in_axes=tuple(0 if m else None for m in mapped), out_axes=0))(*args)
    assert not closed.consts
    out = scale_rule_call.bind(*args, jaxpr=closed.jaxpr, num_consts=num_consts, batched=(*batched, mapped[num_consts:]), **params)
    return out, (0,) * len(out)


scale_rule_call.def_impl(_evaluate)
scale_rule_call.def_abstract_eval(lambda *_, jaxpr, **__: [v.aval for v in jaxpr.outvars])
ad.primitive_jvps[scale_rule_call] = _jvp
batching.primitive_batchers[scale_rule_call] = _batch
mlir.register_lowering(scale_rule_call, mlir.lower_fun(_evaluate, multiple_results=True))


# --- between variables and what users see -----------------------------------------------------------------------------


def shown(x, keep: int, exponents: dict):
    """A variable as a rule of a user gets it, with exponents for at most `keep` leading dimensions."""
    if isinstance(x, Uniform):
        x = x if x.known and not x.shape else x.array()
        x = x.array() if isinstance(x, Uniform) else x
    if not floats(x):
        return x
    x = collapse(x if isinstance(x, Scaled) else Scaled(x, Exponent(), np.dtype(x.dtype)), keep)
    exponent = x.exponent.traced()
    if not isinstance(exponent, int):
        exponents[id(exponent)] = (x.exponent, exponent)
    return ScaledArray(x.data, exponent)


def taken(ctx, x, aval, exponents: dict):
    """What a rule of a user returned as a variable."""
    if not is_scaled(x):
        return jnp.asarray(x)
    exponent = x.exponent
    if isinstance(exponent, (int, np.integer)):
        exponent = Exponent(int(exponent))
    elif id(exponent) in exponents:
        exponent = exponents[id(exponent)][0]
    else:
        exponent = of_array(jnp.asarray(exponent, jnp.int32))
    data = jnp.asarray(x.data)
    if tuple(data.shape) != tuple(aval.shape):
        raise ValueError(f"scale_rule: a result has the shape {data.shape} by the rule and {tuple(aval.shape)} by the function")
    dtype = np.dtype(aval.dtype)
    held = dtype if ctx.data_dtype is None or not data.ndim or dtype.itemsize < ctx.data_dtype.itemsize else ctx.data_dtype
    return Scaled(data.astype(held), exponent, dtype)


def _all_taken(ctx, name: str, results, eqn, exponents: dict) -> list:
    if len(results) != len(eqn.outvars):
        raise ValueError(f"scale rule of {name}: it gave {len(results)} results; accepted: {len(eqn.outvars)}, as many as {name} gives")
    return [taken(ctx, x, v.aval, exponents) for x, v in zip(results, eqn.outvars)]


def _apply_scale_rule(ctx, eqn, values):
    params = eqn.params
    values = values[params["num_consts"] :]
    levels = params["batched"]
    exponents: dict = {}
    args = [shown(v, len(levels), exponents) for v in values]
    tree, static = params["tree"], dict(params["static"])
    out_tree = None

    def rule(*leaves):
        nonlocal out_tree
        out = params["owner"].rule(*jax.tree.unflatten(tree, leaves), **static)
        out, out_tree = jax.tree.flatten(out, is_leaf=is_scaled)
        return out

    for mapped in levels:
        rule = _mapped(rule, mapped)
    return _all_taken(ctx, params["owner"].__name__, rule(*args), eqn, exponents)


def _mapped(rule, mapped):
    """The rule over the leading dimension of the arguments that have it; every result gets an exponent for each index."""

    def over(*leaves):
        def axes(x, m):
            if not is_scaled(x):
                return 0 if m else None
            return ScaledArray(0 if m else None, 0 if m and np.ndim(x.exponent) else None)

        def one(*xs):
            out = rule(*xs)
            return [ScaledArray(x.data, jnp.asarray(x.exponent, jnp.int32)) if is_scaled(x) else x for x in out]

        return jax.vmap(one, in_axes=tuple(map(axes, leaves, mapped)))(*leaves)

    return over


USER_RULES["scale_rule_call"] = _apply_scale_rule


def register_rule(primitive):
    """Decorator: the rule of a primitive (a jax.extend.core.Primitive, or its name).

    rule(*args, **params) gets a ScaledArray for every floating-point argument and returns a ScaledArray (or an array), a list of
    them where the primitive has several results. It is used where an argument carries a scale.
    """
    name = primitive if isinstance(primitive, str) else primitive.name

    def add(rule):
        def apply(ctx, eqn, values):
            exponents: dict = {}
            out = rule(*(shown(v, 0, exponents) for v in values), **eqn.params)
            out = list(out) if eqn.primitive.multiple_results else [out]
            return _all_taken(ctx, name, out, eqn, exponents)

        USER_RULES[name] = apply
        return rule

    return add


