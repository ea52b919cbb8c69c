"""The protocol of a scaling law: a frozen dataclass that the solver, the intervals and the report all read.

A law here is made of terms, each a positive amplitude times the exponential of something nonlinear:

    term_k(x) = amplitude_k * exp(log_term_k(theta, x)),    L(x) = sum_k term_k     in the law's unit, nats per token

Chinchilla is A N^-alpha + B D^-beta + E, so its log terms are -alpha ln N, -beta ln D and 0. Everything else (start grids, Jacobians,
bootstrap, prediction) follows from `log_terms`, so a law of one's own is ten lines:

    mine = Law(name="mine", about="E + A/N^alpha", cite="me", inputs=("N",),
               parameters=(amplitude("A"), amplitude("E"), exponent("alpha")),
               log_terms=lambda p, x: (-p["alpha"] * np.log(x["N"]), 0.0))

A law that is no plain sum says how its terms make the loss. Only the starts then differ (drawn over all constants, since none is linear):

    bent = Law(name="bent", about="E + (A/N^alpha + B/D^beta)^gamma", cite="me", inputs=("N", "D"),
               parameters=(amplitude("A"), amplitude("B"), amplitude("E"), exponent("alpha"), exponent("beta"), exponent("gamma", 0.05, 2)),
               log_terms=chinchilla.log_terms,
               combine=lambda p, terms, x: terms[2] + np.exp(p["gamma"] * np.log(terms[0] + terms[1])))

`log_terms` and `combine` must be written with array functions only (`namespace(value)` gives numpy or jax.numpy): they are called with
complex numpy parameters, because derivatives are taken by complex steps, which are exact to rounding and compile nothing. So they must be analytic
in the parameters: no abs, sign or rounding of them; a fit refuses a law whose derivative is lost that way.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from scaling.laws.parameters import Factor, Operand, Parameter, Reduction, labels

Params = Mapping[str, Any]
Columns = Mapping[str, Any]


def namespace(value):
    """The array library that `value` belongs to: numpy for numpy arrays and Python numbers, jax.numpy for jax arrays."""
    return value.__array_namespace__() if hasattr(value, "__array_namespace__") else np


@dataclass(frozen=True)
class Law:
    """A family of scaling laws. See the module's docstring for the form.

    name, aliases: keys of the registry. about: the formula, one line. cite: where it is from.
    parameters: amplitudes and divisors in the order of the terms. inputs: column names. operands: the optional ones among them;
    factors: the ones that hold names; zero_allowed: the ones that may be 0. levels: input -> names, filled in by `at_levels`.
    log_terms(params, columns) -> one log term per amplitude, broadcastable against each other; one for all levels of a factor's amplitude.
    combine(params, terms, columns) -> loss; None is the sum of the terms.
    published: source -> constants with full digits; sources: source -> what they are ("none" -> why, for a law without any); validity:
    source -> input -> (low, high) trained; where there is none, the source says so: "no range".
    functionals: name -> f(params, **columns), numbers derived from the constants (an exponent, an optimum), units in their docstrings.
    answers: functional -> the input that its value is a value of; outside the fitted range of that input it is not identified.
    unit: of the loss, for tables and axes.
    variants: name -> {"ties": ..., "fixed": ...}; `fit(..., "kumar:tied")` uses one, `"kumar:tied+plain"` two.
    """

    name: str
    about: str
    cite: str
    inputs: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    log_terms: Callable[[Params, Columns], tuple] = lambda p, x: ()
    combine: Callable[[Params, tuple, Columns], Any] | None = None
    operands: tuple[Operand, ...] = ()
    factors: tuple[Factor, ...] = ()
    zero_allowed: tuple[str, ...] = ()
    published: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    validity: Mapping[str, Mapping[str, tuple[float, float]]] = field(default_factory=dict)
    functionals: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    answers: Mapping[str, str] = field(default_factory=dict)
    variants: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    levels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    unit: str = "nats/token"

    @property
    def amplitudes(self) -> tuple[str, ...]:
        """Names of the terms' factors, in the order of the terms."""
        return tuple(p.name for p in self.parameters if p.multiplies)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(p.name for p in self.parameters)

    @property
    def optional(self) -> frozenset[str]:
        """Inputs that a table need not have."""
        return frozenset(operand.input for operand in self.operands)

    @property
    def measures(self) -> tuple[str, ...]:
        """Inputs that say how large a run is: N and D where the law takes them, else all that are neither operands nor names."""
        others = self.optional | {factor.input for factor in self.factors}
        return tuple(name for name in self.inputs if name in ("N", "D")) or tuple(name for name in self.inputs if name not in others)

    def parameter(self, name: str) -> Parameter:
        """The parameter called `name`. ValueError listing the known ones otherwise."""
        for parameter in self.parameters:
            if parameter.name == name:
                return parameter
        raise ValueError(f"parameter {name!r} of law {self.name}: unknown; it has {', '.join(self.names)}")

    def at_levels(self, levels: Mapping[str, tuple[str, ...]]) -> Law:
        """This law with one constant per level of each of its factors; amplitudes of levels stand where the amplitude stood."""
        parameters: dict[str, Parameter] = {}
        for parameter in self.parameters:
            factor = self._factor_of(parameter.name)
            if factor is None:
                parameters[parameter.name] = parameter
            elif factor.multiplies:
                parameters |= {name: replace(parameter, name=name) for name in map(factor.name, levels.get(factor.input, ()))}
        for factor in self.factors:
            if not factor.multiplies:
                parameters |= {name: Parameter(name, factor.kind, factor.low, factor.high) for name in map(factor.name, levels.get(factor.input, ()))}
        return replace(self, parameters=tuple(parameters.values()), levels={f.input: tuple(levels.get(f.input, ())) for f in self.factors})

    def _factor_of(self, name: str) -> Factor | None:
        """The factor that a constant, "effN[FP4]" or "effN", belongs to."""
        return next((factor for factor in self.factors if name == factor.parameter or factor.level(name)), None)

    def named_levels(self, params: Params) -> dict[str, tuple[str, ...]]:
        """Levels of the factors that a set of constants knows: those of "effN[FP4]"."""
        levels: dict[str, dict[str, None]] = {factor.input: {} for factor in self.factors}
        for factor in self.factors:
            levels[factor.input] |= dict.fromkeys(filter(None, map(factor.level, params)))
        return {name: tuple(known) for name, known in levels.items()}

    def complete(self, columns: Columns) -> dict[str, Any]:
        """`columns` as numbers: absent operands untouched, names of levels as their positions in `levels`.

        ValueError when a required input is missing, or a level is not among `levels`.
        """
        unknown = sorted(set(columns) - set(self.inputs))
        if unknown:
            raise ValueError(f"input {unknown[0]!r} of law {self.name}: unknown; it takes {', '.join(self.inputs)}")
        missing = [name for name in self.inputs if name not in columns and name not in self.optional]
        if missing:
            raise ValueError(f"law {self.name} needs {', '.join(missing)}; given: {', '.join(columns) or 'nothing'}")
        complete = dict(columns)
        for operand in self.operands:
            given = columns.get(operand.input, operand.untouched)
            complete[operand.input] = operand.numbers(given) if operand.from_name else given
        for factor in self.factors:
            complete[factor.input] = self._positions(factor, labels(columns[factor.input]))
        return {name: complete[name] for name in self.inputs}

    def _positions(self, factor: Factor, names: np.ndarray) -> np.ndarray:
        """[...] integers: where each name stands in `levels`. ValueError for one that does not."""
        known = self.levels.get(factor.input, ())
        unknown = sorted(set(names.ravel().tolist()) - set(known))
        if unknown:
            raise ValueError(f"{factor.input}={unknown[0]}: law {self.name} has no {factor.name(unknown[0])} here; known levels of {factor.input} "
                             f"are {', '.join(known) or 'none'}")
        order = {name: position for position, name in enumerate(known)}
        return np.array([order[name] for name in names.ravel().tolist()], dtype=np.intp).reshape(names.shape)

    def per_row(self, params: Params, columns: Columns) -> Params:
        """`params` with, for every factor, the value of each row's level under the factor's name: [S, 1] each become [S, R], other
        shapes broadcast."""
        rows = {}
        for factor in self.factors:
            if factor.multiplies:
                continue
            values = [np.asarray(params.get(factor.name(level), np.nan)) for level in self.levels[factor.input]]
            codes = np.asarray(columns[factor.input])
            if codes.ndim == 1 and all(value.ndim == 2 for value in values):  # the solver's own shapes: one gather
                rows[factor.parameter] = np.concatenate(np.broadcast_arrays(*values), axis=-1)[:, codes]
                continue
            chosen = values[0]
            for position, value in enumerate(values[1:], 1):
                chosen = np.where(codes == position, value, chosen)
            rows[factor.parameter] = chosen
        return dict(params) | rows if rows else params

    @cached_property
    def _written(self) -> list[tuple[Factor | None, list[str]]]:
        """(its factor or None, its amplitudes) of every term that `log_terms` returns."""
        groups: dict[str, tuple[Factor | None, list[str]]] = {}
        for name in self.amplitudes:
            factor = self._factor_of(name)
            groups.setdefault(factor.parameter if factor else name, (factor, []))[1].append(name)
        return list(groups.values())

    def terms(self, params: Params, columns: Columns) -> tuple:
        """`log_terms` with one for every amplitude: that of a level is -inf in the rows of other levels."""
        made: list = []
        for (factor, names), log_term in zip(self._written, self.log_terms(params, columns), strict=True):
            if factor is None:
                made.append(log_term)
                continue
            codes, xp = np.asarray(columns[factor.input]), namespace(log_term)
            made += [xp.where(codes == position, log_term, -np.inf) for position in range(len(names))]
        return tuple(made)

    def total(self, params: Params, terms: tuple, columns: Columns):
        """The loss that the terms (one for every amplitude) make. `params` as `per_row` returns them."""
        if self.combine is None:
            return sum(terms)
        rest = iter(terms)
        return self.combine(params, tuple(sum(next(rest) for _ in names) for _, names in self._written), columns)

    def reduce(self, columns: Columns) -> Reduction:
        """What the values in `columns` (complete) leave unseen: see `Operand`."""
        absent, notes, fixed, ties, kept = [], [], {}, {}, {}
        for operand in self.operands:
            values = np.asarray(columns[operand.input], dtype=np.float64)
            active = values[operand.touched(values)]
            if active.size == 0:
                absent += operand.parameters + operand.also
                continue
            twin = next((name for name, (others, other) in kept.items() if np.array_equal(others, values)
                         and (len(other.parameters), len(other.also)) == (len(operand.parameters), len(operand.also))), None)
            if twin is not None:
                other = kept[twin][1]
                ties |= dict(zip(operand.parameters + operand.also, other.parameters + other.also, strict=True))
                notes.append(f"{operand.input} equals {twin} in every row: they share {', '.join(kept[twin][1].parameters)}")
                continue
            kept[operand.input] = (values, operand)
            levels = np.unique(active)
            given_up = operand.parameters[max(1, levels.size):]
            if given_up:
                fixed |= {name: self.parameter(name).held for name in given_up}
                side = "above" if operand.below else "below"
                notes.append(f"{operand.input} has {levels.size} level(s) {side} {operand.neutral:g}: {', '.join(given_up)} "
                             f"cannot be told from {operand.parameters[0]} and is held at {self.parameter(given_up[0]).held:g}")
        fixed |= {tied: fixed[source] for tied, source in ties.items() if source in fixed}
        ties = {tied: source for tied, source in ties.items() if source not in fixed}
        ties = {tied: source for tied, source in ties.items() if tied not in absent}
        return Reduction(tuple(dict.fromkeys(absent)), ties, fixed, tuple(notes))

    def predict(self, params: Params, **columns):
        """Loss in `unit` at `columns` (scalars or arrays that broadcast). Shape of the broadcast columns.

        inf where the law has no finite value (an efficiency of zero or less). ValueError for inputs the law does not know or that
        need a constant `params` lacks.
        """
        law = self.at_levels(self.named_levels(params)) if self.factors else self
        x = law.complete(columns)
        absent = law.reduce(x).absent if law.operands else ()
        missing = [name for name in law.names if name not in absent and name not in params]
        if missing:
            users = [o for o in law.operands if set(o.parameters + o.also) & set(missing)]
            side = "above" if users and users[0].below else "below"
            why = f" for {users[0].input} {side} {users[0].neutral:g}" if users else ""
            raise ValueError(f"law {law.name} needs {', '.join(missing)}{why}; these constants have {', '.join(params)}")
        p = law.per_row(params, x)
        terms = []
        for name, log_term in zip(law.amplitudes, law.terms(p, x), strict=True):
            part = namespace(log_term).exp(log_term)
            terms.append(p[name] * part if law.parameter(name).kind == "amplitude" else part / p[name])
        return law.total(p, tuple(terms), x)
