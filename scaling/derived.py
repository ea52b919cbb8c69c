"""What follows from a fit's constants, with intervals: exponent a, D/N, P*, D_crit, the best layout, at inputs that are given or natural.

Natural are the largest N, D and compute (6 N D) that were fitted, what was the same in every row, each operand's narrowest width, and each
level of a column of names in turn. A quantity that needs more is not told until `at` gives it.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from scaling.choice import Choice
from scaling.inputs import inputs_of, refuse_input
from scaling.result import Estimate, Fit

MAX_LEVELS = 12


@dataclass(frozen=True)
class Derived:
    """name: of the law's functional; at: its inputs; estimate: the number with its interval, or, for a name (a layout), with its rivals."""

    name: str
    at: Mapping[str, object]
    estimate: Estimate | Choice

    def as_json(self) -> dict:
        """{"name", "at", "value", "reason", and "low" and "high", or "shares"}."""
        e = self.estimate
        rest = {"shares": dict(e.shares)} if isinstance(e, Choice) else {"low": e.low, "high": e.high}
        return {"name": self.name, "at": dict(self.at), "value": e.value, "reason": e.reason} | rest


def derived(fit: Fit, at: Mapping[str, object] | None = None) -> tuple[list[Derived], dict[str, tuple[str, ...]]]:
    """(every functional of the law whose inputs are given or natural, functional -> what it still needs).

    at: inputs by name: {"compute": 1e21, "bits": 8}. ValueError, one line, for a name that no functional takes and a value that is none of it.
    """
    given = dict(at or {})
    takes = {name: inputs_of(function) for name, function in fit.law.functionals.items()}
    operands = [operand.input for operand in fit.law.operands]
    known = {name for required, optional, any_operand in takes.values() for name in (*required, *optional, *(operands if any_operand else ()))}
    unknown = next((name for name in given if name not in known), None)
    if unknown:
        raise ValueError(f"at: {unknown!r} is no input of what law {fit.law.name} tells; these are {', '.join(sorted(known)) or 'none'}")
    for name, value in given.items():
        refuse_input(fit.law, name, value, "at")
    found, lacking = [], {}
    for name, (required, optional, any_operand) in takes.items():
        columns = {key: given.get(key, _natural(fit, key)) for key in required} | {key: given[key] for key in optional if key in given}
        if any_operand:
            columns |= {key: given[key] for key in operands if key in given} or _narrowest(fit)
        missing = tuple(key for key, value in columns.items() if value is None)
        if missing or (any_operand and not set(columns) & set(operands)):
            lacking[name] = missing or tuple(operands)
            continue
        one_level = [] if set(optional) & set(given) else [
            {key: level} for key in optional if key in fit.law.levels for level in _natural(fit, key)]
        found += [Derived(name, one | level, fit.estimate(name, **(one | level))) for one in _one_by_one(columns) for level in one_level or [{}]]
    return found, lacking


def _natural(fit: Fit, name: str) -> object:
    """What an input is when nobody says: a number, a list of levels, or None."""
    if name in fit.law.levels:
        baseline = {factor.name(level) for factor in fit.law.factors for level in fit.law.levels[factor.input]} & set(fit.fixed)
        factor = next(factor for factor in fit.law.factors if factor.input == name)
        return [level for level in fit.law.levels[name] if factor.name(level) not in baseline][:MAX_LEVELS]
    if name == "compute":
        return 6.0 * fit.ranges["N*D"][1] if "N*D" in fit.ranges else None
    low, high = fit.ranges.get(name, (None, None))
    return high if name in fit.law.measures or low == high else None


def _narrowest(fit: Fit) -> dict[str, float]:
    """Every operand that the fit knows of at its narrowest width fitted; nothing for operands that are no widths."""
    return {name: fit.ranges[name][0] for name in fit.at_width(1.0)}


def _one_by_one(columns: Mapping[str, object]) -> list[dict[str, object]]:
    """One set of inputs for every combination of levels."""
    made: list[dict[str, object]] = [{}]
    for name, value in columns.items():
        made = [one | {name: each} for one in made for each in (value if isinstance(value, list) else [value])]
    return made
