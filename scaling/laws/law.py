"""The protocol of a scaling law: a frozen dataclass that the solver, the intervals and the report all read.

A law here is separable:

    L(x) = sum_k amplitude_k * exp(log_term_k(theta, x))        nats per token

with non-negative amplitudes (one per term, in order) and a nonlinear vector theta. Chinchilla is A N^-alpha + B D^-beta + E,
so its log terms are -alpha ln N, -beta ln D and 0. Everything else (start grids, Jacobians, bootstrap, prediction) follows from
`log_terms`, so a law of one's own is ten lines:

    mine = Law(name="mine", about="E + A/N^alpha", cite="me", inputs=("N",),
               parameters=(amplitude("A"), amplitude("E"), exponent("alpha")),
               log_terms=lambda p, x: (-p["alpha"] * np.log(x["N"]), 0.0))

`log_terms` must be written with array functions only (`namespace(value)` gives numpy or jax.numpy): it is called with complex
numpy parameters, because derivatives are taken by complex steps, which are exact to rounding and compile nothing.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Params = Mapping[str, Any]
Columns = Mapping[str, Any]


def namespace(value):
    """The array library that `value` belongs to: numpy for numpy arrays and Python numbers, jax.numpy for jax arrays."""
    return value.__array_namespace__() if hasattr(value, "__array_namespace__") else np


@dataclass(frozen=True)
class Parameter:
    """One constant of a law.

    kind: "amplitude" (multiplies a term; solved linearly), "exponent", "scale" (positive, solved in logs) or "offset" (any sign).
    low, high: the box in which starts are drawn and the solution must stay; amplitudes need none.
    unit: for tables and axes.
    """

    name: str
    kind: str
    low: float = 0.0
    high: float = float("inf")
    unit: str = ""

    @property
    def logarithmic(self) -> bool:
        """Whether the solver moves in the logarithm of this parameter."""
        return self.kind in ("amplitude", "scale")


def amplitude(name: str, unit: str = "") -> Parameter:
    return Parameter(name, "amplitude", unit=unit)


def exponent(name: str, low: float = 0.01, high: float = 2.5) -> Parameter:
    return Parameter(name, "exponent", low, high)


def scale(name: str, low: float, high: float, unit: str = "") -> Parameter:
    return Parameter(name, "scale", low, high, unit)


def offset(name: str, low: float, high: float, unit: str = "") -> Parameter:
    return Parameter(name, "offset", low, high, unit)


@dataclass(frozen=True)
class Operand:
    """An input that a run may leave untouched, and the parameters that only it can identify.

    `input` is the column; at `neutral` and above (bits >= 32) the law does not depend on it; `parameters` are ordered from the one
    to keep to the one to give up first when the design has too few levels. Two operands whose columns are identical in every row
    share their parameters pairwise.
    """

    input: str
    parameters: tuple[str, ...]
    neutral: float


@dataclass(frozen=True)
class Reduction:
    """What a set of columns cannot see of a law: parameters it never touches, parameters it cannot tell apart, ones it must hold."""

    absent: tuple[str, ...] = ()
    ties: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Law:
    """A family of scaling laws. See the module's docstring for the form.

    name, aliases: keys of the registry. about: the formula, one line. cite: where it is from.
    parameters: amplitudes first, in the order of the terms. inputs: column names. operands: the optional ones among them.
    log_terms(params, columns) -> one log term per amplitude, broadcastable against each other.
    published: source -> constants with full digits; sources: source -> what they are.
    functionals: name -> f(params, **columns), numbers derived from the constants (an exponent, an optimum), units in their docstrings.
    answers: functional -> the input that its value is a value of; outside the fitted range of that input it is not identified.
    variants: name -> {"ties": ..., "fixed": ...}; `fit(..., "kumar:tied")` uses one, `"kumar:tied+plain"` two.
    """

    name: str
    about: str
    cite: str
    inputs: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    log_terms: Callable[[Params, Columns], tuple]
    operands: tuple[Operand, ...] = ()
    published: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    functionals: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    answers: Mapping[str, str] = field(default_factory=dict)
    variants: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()

    @property
    def amplitudes(self) -> tuple[str, ...]:
        return tuple(p.name for p in self.parameters if p.kind == "amplitude")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(p.name for p in self.parameters)

    def parameter(self, name: str) -> Parameter:
        """The parameter called `name`. ValueError listing the known ones otherwise."""
        for parameter in self.parameters:
            if parameter.name == name:
                return parameter
        raise ValueError(f"parameter {name!r} of law {self.name}: unknown; it has {', '.join(self.names)}")

    def complete(self, columns: Columns) -> dict[str, Any]:
        """`columns` with absent operands filled in as untouched (inf). ValueError when a required input is missing."""
        optional = {operand.input for operand in self.operands}
        unknown = sorted(set(columns) - set(self.inputs))
        if unknown:
            raise ValueError(f"input {unknown[0]!r} of law {self.name}: unknown; it takes {', '.join(self.inputs)}")
        missing = [name for name in self.inputs if name not in columns and name not in optional]
        if missing:
            raise ValueError(f"law {self.name} needs {', '.join(missing)}; given: {', '.join(columns) or 'nothing'}")
        return {name: columns.get(name, np.inf) for name in self.inputs}

    def reduce(self, columns: Columns) -> Reduction:
        """What the values in `columns` (complete) leave unseen: see `Operand`."""
        absent, notes, fixed, ties, kept = [], [], {}, {}, {}
        for operand in self.operands:
            values = np.asarray(columns[operand.input], dtype=np.float64)
            active = values[values < operand.neutral]
            if active.size == 0:
                absent += operand.parameters
                continue
            twin = next((name for name, other in kept.items() if np.array_equal(other[0], values)), None)
            if twin is not None:
                ties |= dict(zip(operand.parameters, kept[twin][1].parameters, strict=True))
                notes.append(f"{operand.input} equals {twin} in every row: they share {', '.join(kept[twin][1].parameters)}")
                continue
            kept[operand.input] = (values, operand)
            levels = np.unique(active)
            given_up = operand.parameters[max(1, levels.size):]
            if given_up:
                fixed |= {name: 0.0 for name in given_up}
                notes.append(f"{operand.input} has {levels.size} level(s) below {operand.neutral:g}: {', '.join(given_up)} "
                             f"cannot be told from {operand.parameters[0]} and is held at 0")
        fixed |= {tied: fixed[source] for tied, source in ties.items() if source in fixed}
        ties = {tied: source for tied, source in ties.items() if source not in fixed}
        return Reduction(tuple(absent), ties, fixed, tuple(notes))

    def predict(self, params: Params, **columns):
        """Loss in nats per token at `columns` (scalars or arrays that broadcast). Shape of the broadcast columns.

        inf where the law has no finite value (an efficiency of zero or less). ValueError for inputs the law does not know or that
        need a constant `params` lacks.
        """
        x = self.complete(columns)
        needed = [name for name in self.names if name not in self.reduce(x).absent]
        missing = [name for name in needed if name not in params]
        if missing:
            users = [o.input for o in self.operands if set(o.parameters) & set(missing)]
            why = f" for {users[0]} below {self.operands[0].neutral:g}" if users else ""
            raise ValueError(f"law {self.name} needs {', '.join(missing)}{why}; these constants have {', '.join(params)}")
        return sum(params[name] * namespace(term).exp(term)
                   for name, term in zip(self.amplitudes, self.log_terms(params, x), strict=True))
