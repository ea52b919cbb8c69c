"""The interpreter: a jaxpr, equation by equation, on variables that may carry scales."""
from __future__ import annotations

import collections
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex
from jax.extend import source_info_util

from trainer.propagation.rules import RULES, Call
from trainer.propagation.values import Scaled, Uniform, carries, floats, plain

STRUCTURES: dict[str, Callable] = {}

# Of a broadcast number these make another one.
_KEEP_UNIFORM = ("broadcast_in_dim", "reshape", "squeeze", "expand_dims", "transpose", "rev", "slice", "copy", "copy_p")


class FallbackError(NotImplementedError):
    """A primitive has no rule, and on_fallback="raise"."""


@dataclass
class Context:
    """What one interpretation shares: how results are held, what has been met, bodies already traced."""

    data_dtype: np.dtype | None = None
    on_fallback: str = "count"
    watch: Callable | None = None  # watch(path, equation, value) of every Scaled result, while calibrating
    move: Callable | None = None  # move(path, equation, value) -> value, which rescales where a calibration found it needed
    fallbacks: collections.Counter = field(default_factory=collections.Counter)
    fallen: dict = field(default_factory=dict)  # (path, id) -> equation, of those counted: a loop's body is traced more than once
    memo: dict = field(default_factory=dict)
    bodies: dict = field(default_factory=dict)
    path: tuple = ()
    line: str = ""  # of the program that called this body: jax keeps none for what is inside its own functions

    def nested(self, name, line: str) -> Context:
        """The same context inside a body: paths are longer, numbers of the outer trace are not remembered."""
        return replace(self, memo={}, path=(*self.path, name), line=line)


def read_literal(literal):
    """A literal as a variable: floats are numbers known now."""
    value = literal.val
    if np.ndim(value) == 0 and jnp.issubdtype(jnp.result_type(value), jnp.floating):
        return Uniform(float(value), (), np.dtype(literal.aval.dtype))
    return value


def constant(value):
    """A constant of a jaxpr as a variable: all-zero arrays are known to be so."""
    if isinstance(value, (np.ndarray, jax.Array)) and not isinstance(value, jax.core.Tracer) and jnp.issubdtype(value.dtype, jnp.floating):
        if value.size and not np.any(np.asarray(value)):
            return Uniform(0.0, tuple(value.shape), np.dtype(value.dtype))
    return value


def interpret(ctx: Context, jaxpr, consts, args) -> list:
    """The results of a jaxpr (open) as variables."""
    env: dict = {}

    def read(atom):
        return read_literal(atom) if isinstance(atom, jex.Literal) else env[atom]

    for var, value in zip((*jaxpr.constvars, *jaxpr.invars), (*map(constant, consts), *args), strict=True):
        env[var] = value
    for number, eqn in enumerate(jaxpr.eqns):
        stack = source_info_util.current_name_stack() + eqn.source_info.name_stack
        with source_info_util.user_context(eqn.source_info.traceback, name_stack=stack), eqn.ctx.manager:
            results = _apply(ctx, eqn, [read(a) for a in eqn.invars], number)
        for index, (var, value) in enumerate(zip(eqn.outvars, results, strict=True)):
            if isinstance(value, Scaled) and (ctx.watch or ctx.move):
                value = _visit(ctx, (*ctx.path, number, index), eqn, value)
            if not isinstance(var, jex.DropVar):
                env[var] = value
    return [read(a) for a in jaxpr.outvars]


def _visit(ctx: Context, path, eqn, value: Scaled) -> Scaled:
    if eqn.primitive.name in STRUCTURES:  # seen inside
        return value
    if ctx.move is not None:
        value = ctx.move(path, eqn, value)
    if ctx.watch is not None:
        ctx.watch(path, eqn, value)
    return value


def _apply(ctx: Context, eqn, values, number: int) -> list:
    name = eqn.primitive.name
    if name in STRUCTURES:
        return STRUCTURES[name](ctx.nested(number, where(eqn) or ctx.line), eqn, values)
    if name in USER_RULES and any(map(carries, values)):
        return USER_RULES[name](ctx, eqn, values)
    if not eqn.outvars:  # a print: of what the program has
        return bind(eqn, [plain(v) for v in values])
    if not any(map(carries, values)):
        return _without_scales(eqn, values)
    entry = RULES.get(name)
    if entry is None:
        return fall_back(ctx, eqn, values)
    outs = [v.aval for v in eqn.outvars]
    faint = any(isinstance(v, Scaled) and v.faint for v in values)
    call = Call(name, eqn.params, tuple(v.aval for v in eqn.invars), tuple(outs), _binder(eqn), ctx.data_dtype, ctx.memo, faint)
    results = entry.function(call, *(_full_if_alone(v, len(values)) for v in values))
    return list(results) if isinstance(results, (list, tuple)) else [results]


USER_RULES: dict[str, Callable] = {}


def _full_if_alone(value, count: int):
    return value.array() if count == 1 and isinstance(value, Uniform) else value


def _is_float_aval(aval) -> bool:
    return jnp.issubdtype(aval.dtype, jnp.floating)


def _without_scales(eqn, values) -> list:
    """No scale has come here: the program's own equation, but numbers stay known through broadcasts and casts."""
    name, out = eqn.primitive.name, eqn.outvars[0].aval
    first = values[0] if values else None
    if name == "convert_element_type" and isinstance(first, (bool, int, np.integer, np.bool_)) and _is_float_aval(out):
        return [Uniform(float(np.asarray(first, out.dtype)), (), np.dtype(out.dtype))]  # the 0 of where(mask, x, 0)
    if len(values) == 1 and floats(first) and _is_float_aval(out):
        number = first.number if isinstance(first, Uniform) else first if not np.ndim(first) and name == "broadcast_in_dim" else None
        if number is not None:
            shape, dtype = tuple(out.shape), np.dtype(out.dtype)
            if name in _KEEP_UNIFORM:
                return [Uniform(number, shape, dtype)]
            if name == "convert_element_type" and isinstance(number, float):
                with np.errstate(over="ignore"):  # infinite in float16, as in the program
                    return [Uniform(float(np.asarray(number, dtype)), shape, dtype)]
    return bind(eqn, [plain(v) for v in values])


def _binder(eqn):
    def bind_with(params, *arrays):
        return eqn.primitive.bind(*arrays, **params)

    return bind_with


def bind(eqn, arrays) -> list:
    """The equation itself, on arrays."""
    results = eqn.primitive.bind(*arrays, **eqn.primitive.get_bind_params(eqn.params))
    return list(results) if eqn.primitive.multiple_results else [results]


def where(eqn) -> str:
    """The line of the user's program that an equation comes from."""
    return source_info_util.summarize(eqn.source_info)


def fall_back(ctx: Context, eqn, values) -> list:
    """Unscale, apply, exponent 0; counted."""
    name, line = eqn.primitive.name, where(eqn) or ctx.line
    if ctx.on_fallback == "raise":
        raise FallbackError(
            f"propagate_scales: primitive '{name}' at {line} has no scale rule; give it one with "
            "trainer.propagation.register_rule, wrap the function in scale_rule, or accept on_fallback='count'"
        )
    if (ctx.path, id(eqn)) not in ctx.fallen:
        ctx.fallen[ctx.path, id(eqn)] = eqn
        ctx.fallbacks[name, line] += 1
    return bind(eqn, [plain(v) for v in values])
