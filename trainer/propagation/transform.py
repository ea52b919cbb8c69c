"""`propagate_scales`: a function whose floating-point values carry a power of two each."""
from __future__ import annotations

import collections
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from trainer.propagation import structures  # noqa: F401 - registers the structural primitives
from trainer.propagation.array import ZERO_EXPONENT, ScaledArray, is_float, is_scaled, normalized, scaled
from trainer.propagation.calibrate import Plan, make_plan
from trainer.propagation.exponents import of_array
from trainer.propagation.interpret import Context, interpret
from trainer.propagation.values import Scaled, plain

FALLBACKS = ("count", "raise")
OUTPUTS = ("auto", "scaled", "plain")
UNIT = 2  # arguments with their largest magnitude within 1 and 2**3 are left as they are


@dataclass(frozen=True)
class Report:
    """What the transform does to a program. equations: of the function's jaxpr and of the transformed one, nested ones included.
    fallbacks: (primitive, source line) -> in how many places of the program it was met without a rule. rescales: placed by a calibration."""

    equations_before: int
    equations_after: int
    fallbacks: collections.Counter = field(default_factory=collections.Counter)
    rescales: int = 0


def propagate_scales(fun: Callable, *, data_dtype=None, rescale=None, on_fallback: str = "count", outputs: str = "auto", unit_inputs: bool = False,
                     static_argnames=()):
    """`fun` with every floating-point value held as data * 2**exponent: same signature, same values.

    Apply it to what is already differentiated, propagate_scales(jax.value_and_grad(loss)); the gradient of the result is refused.
    Arguments are pytrees of arrays and ScaledArrays. A value that no ScaledArray has reached stays an ordinary array.

    data_dtype: hold all data of one or more dimensions in this dtype (float16, bfloat16), whatever the program says; float arguments
    are then brought to unit scale on entry. None: the program's own dtypes. rescale: a `Plan` of `calibrate`, where data is brought
    back to unit scale; "auto" makes one from the arguments of the first call, which must be concrete. on_fallback: what happens
    at a primitive without a rule: "count" (unscale, apply, exponent 0; see .report) or "raise". outputs: "auto" (ScaledArrays for
    what depends on one, arrays where no argument is one), "scaled" (all floats), "plain" (none). unit_inputs: the data of all ScaledArray
    arguments is near unit scale already, as that of `scaled` is, and is taken as it is (if data_dtype is not narrower); by default float32
    data is brought there on entry, so that no result depends on how much of a value was in the data. static_argnames: as of jax.jit.

    Cached like jax.jit; .report(*args) tells the equations before and after, and the fall-backs.
    """
    for key, value, accepted in (("on_fallback", on_fallback, FALLBACKS), ("outputs", outputs, OUTPUTS)):
        if value not in accepted:
            raise ValueError(f"propagate_scales: {key}={value!r}; accepted: {', '.join(accepted)}")
    if not (rescale is None or rescale == "auto" or isinstance(rescale, Plan)):
        raise ValueError(f"propagate_scales: rescale={rescale!r}; accepted: 'auto', a plan of calibrate(), or None")
    if data_dtype is not None and not _is_float_name(data_dtype):
        raise ValueError(f"propagate_scales: data_dtype={data_dtype!r}; accepted: a floating-point dtype (float16, bfloat16, float32, ...), or None")
    return _Transformed(fun, data_dtype, rescale, on_fallback, outputs, unit_inputs, _names(static_argnames))


def _names(static_argnames) -> tuple[str, ...]:
    names = (static_argnames,) if isinstance(static_argnames, str) else static_argnames
    if not isinstance(names, (tuple, list, set, frozenset)) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"propagate_scales: static_argnames={static_argnames!r}; accepted: names of arguments")
    return tuple(names)


def _is_float_name(dtype) -> bool:
    try:
        return jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        return False


def calibrate(fun: Callable, *args, data_dtype=None, threshold: int = 8, by: str = "rms", static_argnames=(), **kwargs) -> Plan:
    """The fewest rescales that keep the data of propagate_scales(fun) within 2**-threshold and 2**threshold of unit scale.

    fun is compiled once with a switch at every value and run on these arguments (concrete; one batch will do) with one rescale more each
    time, for the first value whose `by` ("rms", "amax", "mean_abs") lies outside: there or before it, wherever it leaves the fewest
    outside. Those that turn out not to be needed are taken away again. Scalars and all-zero arrays do not count. Give the result to
    propagate_scales(fun, rescale=plan); print(plan) says what is where.
    """
    return propagate_scales(fun, data_dtype=data_dtype, static_argnames=static_argnames).plan(args, kwargs, threshold, by)


class _Transformed:
    """The callable that propagate_scales returns."""

    def __init__(self, fun, data_dtype, rescale, on_fallback, outputs, unit_inputs, static_argnames):
        functools.update_wrapper(self, fun, updated=())
        self._fun, self._rescale, self._outputs, self._on_fallback, self._unit_inputs = fun, rescale, outputs, on_fallback, unit_inputs
        self._data_dtype = None if data_dtype is None else np.dtype(data_dtype)
        self._static = static_argnames
        self._jitted = jax.jit(lambda *a, **k: self._run(Counters(), *a, **k), static_argnames=self._static, inline=True)

    def __call__(self, *args, **kwargs):
        if self._rescale == "auto":
            if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((args, kwargs))):
                raise ValueError("propagate_scales: rescale='auto' needs concrete arguments, and is called under jit or another transformation; "
                                 "make the plan before, rescale=trainer.propagation.calibrate(fun, *args)")
            self._rescale = self.plan(args, kwargs)
        args, kwargs = self._by_name(args, kwargs)
        return self._jitted(*args, **kwargs)

    def _by_name(self, args, kwargs):
        """The same arguments with static ones that were given by position, and what follows them, by name."""
        if not self._static:
            return args, kwargs
        signature = inspect.signature(self._fun)
        signature.bind(*args, **kwargs)  # a TypeError that tells what is missing or too much
        names = [p.name for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        first = next((i for i, name in enumerate(names[: len(args)]) if name in self._static), len(args))
        if first < len(args) and len(names) < len(args):
            raise ValueError(f"propagate_scales: {names[first]}={args[first]!r} is static and given by position, and what follows it has no name; "
                             f"accepted: {names[first]} by name")
        return args[:first], dict(zip(names[first:], args[first:])) | kwargs

    def report(self, *args, **kwargs) -> Report:
        """What the transform does with arguments like these (arrays or ShapeDtypeStructs)."""
        counters = Counters()
        args, kwargs = self._by_name(args, kwargs)
        static = {k: v for k, v in kwargs.items() if k in self._static}
        traced = {k: v for k, v in kwargs.items() if k not in self._static}
        after = jax.make_jaxpr(lambda a, k: self._run(counters, *a, **k, **static))(args, traced)
        rescales = len(self._rescale.places) if isinstance(self._rescale, Plan) else 0
        return Report(counters.before, _count(after.jaxpr), counters.fallbacks, rescales)

    def plan(self, args, kwargs, threshold: int = 8, by: str = "rms") -> Plan:
        """Where data drifts from unit scale with these arguments; see `calibrate`."""
        return make_plan(self.watched, *self._by_name(args, kwargs), threshold, by, self._static)

    def trace(self, args, kwargs):
        """(closed jaxpr, variables of its arguments, tree of its results, whether an argument carries a scale)."""
        static = {k: v for k, v in kwargs.items() if k in self._static}
        traced = {k: v for k, v in kwargs.items() if k not in self._static}
        leaves, tree = jax.tree.flatten((args, traced), is_leaf=is_scaled)
        out_tree = None

        def flat(*xs):
            nonlocal out_tree
            args, kwargs = jax.tree.unflatten(tree, xs)
            out, out_tree = jax.tree.flatten(self._fun(*args, **kwargs, **static))
            return out

        any_scaled = self._data_dtype is not None or any(map(is_scaled, leaves))
        closed = jax.make_jaxpr(flat)(*map(self._program_view, leaves))
        return closed, [self._enter(x) for x in leaves], out_tree, any_scaled

    def _program_view(self, x):
        """What the program sees of an argument."""
        if not is_scaled(x):
            return x
        data = jnp.asarray(x.data)
        # What it is otherwise stays: inside shard_map, an array varies over devices or not.
        return jax.typeof(data).update(dtype=self._program_dtype(data.dtype), weak_type=False)

    def _program_dtype(self, dtype):
        """Data that is held narrowly stands for float32 in the program."""
        return np.dtype(np.float32) if self._data_dtype is not None and dtype == self._data_dtype else np.dtype(dtype)

    def _enter(self, x):
        """An argument as a variable."""
        if not is_scaled(x):
            if not is_float(x):
                return x
            x = _undifferentiable(jnp.asarray(x))
            if self._data_dtype is None or not x.ndim or x.dtype.itemsize < self._data_dtype.itemsize:
                return x
            own = scaled(x, dtype=self._data_dtype)
            return Scaled(own.data, of_array(own.exponent), np.dtype(x.dtype))
        data = _undifferentiable(jnp.asarray(x.data))
        dtype = self._program_dtype(data.dtype)
        exponent = x.exponent
        narrowed = self._data_dtype is not None and data.ndim and data.dtype.itemsize > self._data_dtype.itemsize
        exponent = jnp.asarray(exponent)
        if not jnp.issubdtype(exponent.dtype, jnp.integer):
            raise ValueError(f"ScaledArray: exponent of dtype {exponent.dtype}; accepted: int32 (the value is data * 2**exponent)")
        exponent = exponent.astype(jnp.int32)
        if exponent.shape != data.shape[: exponent.ndim]:
            raise ValueError(f"ScaledArray: exponent of shape {exponent.shape} with data of shape {data.shape}; accepted: () or a prefix of the data's")
        if narrowed:
            own = scaled(data, leading=exponent.ndim, dtype=self._data_dtype)
            data, exponent = own.data, _sum(exponent, own.exponent)
        elif data.dtype.itemsize >= 4 and not self._unit_inputs:
            data, exponent = _brought_to_unit(data, exponent)
        return Scaled(data, of_array(exponent), dtype)

    def watched(self, plan, watch: Callable) -> Callable:
        """This transform with the rescales of `plan`, which tells watch(path, equation, value) of every value."""
        return lambda *args, **kwargs: self._run(Counters(), *args, _plan=plan, _watch=watch, **kwargs)

    def _run(self, counters: Counters, *args, _plan=None, _watch=None, **kwargs):
        closed, variables, tree, any_scaled = self.trace(args, kwargs)
        counters.before = _count(closed.jaxpr)
        plan = _plan or (self._rescale if isinstance(self._rescale, Plan) else None)
        move = None if plan is None else plan.move
        ctx = Context(self._data_dtype, self._on_fallback, watch=_watch, move=move, fallbacks=counters.fallbacks)
        consts = [_undifferentiable(c) if isinstance(c, jax.core.Tracer) and is_float(c) else c for c in closed.consts]
        results = interpret(ctx, closed.jaxpr, consts, variables)
        return jax.tree.unflatten(tree, [self._leave(x, any_scaled) for x in results])

    def _leave(self, x, any_scaled: bool):
        """A variable as a result."""
        if isinstance(x, Scaled) and (self._outputs == "scaled" or (self._outputs == "auto" and any_scaled)):
            return ScaledArray(x.data, jnp.asarray(x.exponent.traced(), jnp.int32))
        x = plain(x)
        if self._outputs == "scaled" and is_float(x):
            return ScaledArray(x, jnp.int32(0))
        return x


@dataclass
class Counters:
    """What one interpretation counts."""

    before: int = 0
    fallbacks: collections.Counter = field(default_factory=collections.Counter)


def _count(jaxpr) -> int:
    """Equations of a jaxpr and of those inside it."""
    total = 0
    for eqn in jaxpr.eqns:
        total += 1
        for value in eqn.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    total += _count(inner)
    return total


def _brought_to_unit(data, exponent):
    """The same values with the largest magnitude of the data near 1, for each index that has an exponent of its own: from here on it makes
    no difference how much of a value was in the data and how much in the exponent, as no product comes near the ends of the range."""
    data, own = normalized(data, exponent.ndim, slack=UNIT)
    return data, _sum(exponent, own)


def _sum(exponent, own):
    """The exponent of data that had been moved by `own`; that of zeros is the same whatever it was."""
    return jnp.where(own == ZERO_EXPONENT, own, exponent + own)


@jax.custom_jvp
def _undifferentiable(x):
    return x


@_undifferentiable.defjvp
def _refuse(primals, tangents):
    raise TypeError(
        "the gradient of a function that propagate_scales returned is not defined (it would be that of the data, not of the values): "
        "differentiate first, propagate_scales(jax.grad(f)), not jax.grad(propagate_scales(f))"
    )
