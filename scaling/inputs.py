"""What a functional of a law takes besides the constants, and the refusal of values that an input cannot have."""
from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable

import numpy as np

from scaling.laws import Law
from scaling.laws.parameters import labels


def inputs_of(function: Callable) -> tuple[tuple[str, ...], tuple[str, ...], bool]:
    """(required, optional, whether any operand may be given) of a functional, the constants left out."""
    parameters = list(inspect.signature(function).parameters.values())[1:]
    plain = [p for p in parameters if p.kind is not p.VAR_KEYWORD]
    return (tuple(p.name for p in plain if p.default is p.empty), tuple(p.name for p in plain if p.default is not p.empty),
            len(plain) < len(parameters))


def lacking(law: Law, name: str, given: Iterable[str] = ()) -> tuple[str, ...]:
    """What the functional `name` of the law needs that is not among the inputs `given`."""
    return tuple(key for key in inputs_of(law.functionals[name])[0] if key not in given)


def refuse_input(law: Law, name: str, value: object, what: str) -> None:
    """ValueError, one line that begins with `what`, for a level that the fit does not know, a text that is no number (or name of a
    format), and a number that is not positive and finite. 0 is taken where the law takes it, and infinity for an operand that is
    not quantized."""
    if value is None:
        raise ValueError(f"{what}: {name}=None: not a value")
    levels = law.levels.get(name)
    operand = next((operand for operand in law.operands if operand.input == name), None)
    if levels is not None:
        unknown = next((label for label in labels(value).ravel().tolist() if label not in levels), None)
        if unknown is not None:
            raise ValueError(f"{what}: {name}={unknown}: known levels are {', '.join(levels)}")
        return
    if isinstance(value, str) and operand is not None and operand.from_name:
        operand.from_name(value)
        return
    try:
        numbers = np.asarray(value, dtype=np.float64).ravel()
    except (TypeError, ValueError):
        raise ValueError(f"{what}: {name}={value}: not a number") from None
    taken = (numbers > 0) & (numbers < np.inf)
    if operand is not None:
        taken |= numbers == operand.untouched
    if name in law.zero_allowed:
        taken |= numbers == 0
    if not taken.all():
        raise ValueError(f"{what}: {name}={numbers[~taken][0]:g}: must be positive and finite")
