"""A law from its formula: law("E + A/N^alpha + B/D^beta") fits, predicts and reports like one that is built in.

Inputs are N, D, P, names that end in _bits or _mse, unique_tokens, block, and whatever else is named as one; every other name is a
constant. What kind follows from its place:
  amplitude  a name that occurs once and multiplies (or, a divisor, divides) a summand: "A" in A/N^alpha; solved linearly in a plain sum;
  exponent   a name in an exponent, 0.01 to 2.5;
  scale      any other, positive, 0.001 to 1000.
k[format] is one constant of its kind per level of the column `format`: an amplitude in "k[format]*D^a/N^b", an efficiency in "(N*eff[format])^alpha".
After ";" come further inputs, other boxes and levels that are held: "E + A/N^alpha + k[fmt]*z^kappa; z; kappa=-1:3; k[bf16]=0". Loss must be
positive wherever it is fitted.
"""
from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from scaling.laws.grammar import FUNCTIONS, Node, parse
from scaling.laws.law import Law, namespace
from scaling.laws.parameters import Factor, Parameter, amplitude, divisor, exponent, offset, scale

KNOWN_INPUTS = ("N", "D", "P", "unique_tokens", "block")


@dataclass(frozen=True)
class _Term:
    """A summand: its amplitude's name, whether it divides, and the rest of the product."""

    name: str
    divides: bool
    rest: tuple[tuple[int, Node], ...]


def law(text: str, inputs: tuple[str, ...] = ()) -> Law:
    """The law of a formula. `inputs`: further names that are columns. ValueError, one line, with the place of what is wrong."""
    formula, *settings = text.split(";")
    tree = parse(formula.strip())
    more, boxes, held = _settings(settings, text)
    names, indexed = list(dict.fromkeys(tree.names())), _indexed(tree, text)
    _refuse_undefined(tree, names, text)
    numeric = tuple(name for name in names if name in {*inputs, *more} or _is_known_input(name))
    columns = (*numeric, *(name for name in dict.fromkeys(indexed.values())))
    unused = [name for name in (*more, *boxes) if name not in {*names, *columns}] + [f"{name}[...]" for name in held if name not in indexed]
    if unused:
        raise ValueError(f"formula {text!r}: {unused[0]} is set after ';' but does not occur before it")
    if indexed.keys() & set(numeric):
        raise ValueError(f"formula {text!r}: {min(indexed.keys() & set(numeric))} is a column, which has no values of its own per level")
    constants = [name for name in names if name not in columns]
    if not columns or not constants:
        raise ValueError(f"formula {text!r}: needs an input ({', '.join(KNOWN_INPUTS[:3])}, or one named after ';') and a constant; it has inputs "
                         f"{', '.join(columns) or 'none'} and constants {', '.join(constants) or 'none'}")
    plain, terms = _find_terms(tree, [name for name in constants if name not in boxes and tree.names().count(name) == 1])
    parameters = _parameters(tree, list(terms.values()), constants, boxes)
    factors = tuple(Factor(indexed[p.name], p.name, p.low, p.high, p.kind, None, held.get(p.name, {})) for p in parameters if p.name in indexed)
    told = [name for name in numeric if not _is_known_input(name)] + [f"{name}={low!r}:{high!r}" for name, (low, high) in boxes.items()]
    told += [f"{name}[{level}]={value!r}" for name, levels in held.items() for level, value in levels.items()]
    canonical = "; ".join([formula.strip(), *told])  # the law again, without the caller's `inputs`: what a saved fit names it by
    combine = None if plain else (lambda p, values, x: _value(tree, {**p, **x}, dict(zip(terms, values, strict=True))))
    return Law(name=canonical, about=f"L = {formula.strip()}", cite="the user's own formula", inputs=columns,
               parameters=tuple(p for p in parameters if p.multiplies or p.name not in indexed), factors=factors,
               log_terms=lambda p, x: tuple(_log_rest(term, {**p, **x}) for term in terms.values()), combine=combine)


def _indexed(tree: Node, text: str) -> dict[str, str]:
    """constant -> the column whose levels have one each. ValueError for a name that is used in two ways."""
    uses: dict[str, dict[str, None]] = {}
    for node in tree.nodes():
        if node.kind == "name":
            uses.setdefault(node.value, {})[node.index] = None
    for name, indices in uses.items():
        if len(indices) > 1:
            forms = " and ".join(f"{name}[{index}]" if index else name for index in indices)
            raise ValueError(f"formula {text!r}: {forms} occur; a constant has one form, so give one of them another name")
        index = next(iter(indices))
        if index in uses:
            raise ValueError(f"formula {text!r}: {index} is a column of names in {name}[{index}] and a number elsewhere; give one of them "
                             "another name")
    return {name: next(iter(indices)) for name, indices in uses.items() if any(indices)}


def _is_known_input(name: str) -> bool:
    return name in KNOWN_INPUTS or name.endswith(("_bits", "_mse"))


def is_formula(spec: str) -> bool:
    """Whether a law is meant by formula: by name it would be letters, perhaps with variants after a colon."""
    return not re.fullmatch(r"\s*\w+\s*(:[\w+]*)?\s*", spec)


def _refuse_undefined(tree: Node, names: list[str], text: str) -> None:
    """ValueError for a formula that has no value whatever its names are: 1/0, 10^400."""
    try:
        with np.errstate(all="ignore"):
            _value(tree, {name: 0.5 + 0.1234567 * i for i, name in enumerate(names)}, {})
    except (ZeroDivisionError, OverflowError) as error:
        raise ValueError(f"formula {text!r}: has no value ({error})") from None


def _settings(parts: list[str], text: str) -> tuple[tuple[str, ...], dict[str, tuple[float, float]], dict[str, dict[str, float]]]:
    """(further inputs, boxes, constant -> level -> value that is held) from what follows the semicolons."""
    inputs, boxes, held = [], {}, {}
    for part in filter(None, map(str.strip, parts)):
        level = re.fullmatch(r"(\w+)\[([^\[\]]+)\]\s*=\s*(\S+)", part)
        found = re.fullmatch(r"(\w+)\s*(?:=\s*([^:\s]+)\s*:\s*([^:\s]+))?", part)
        try:
            if level:
                held.setdefault(level[1], {})[level[2].strip()] = float(level[3])
            elif found[2] is None:
                inputs.append(found[1])
            else:
                boxes[found[1]] = (float(found[2]), float(found[3]))
                if not boxes[found[1]][0] < boxes[found[1]][1]:
                    raise ValueError
        except (TypeError, ValueError):
            raise ValueError(f"formula {text!r}: {part!r} at character {text.index(part) + 1} is neither an input (NAME) nor a box "
                             "(NAME=LOW:HIGH) nor a level that is held (NAME[LEVEL]=VALUE)") from None
    return tuple(inputs), boxes, held


def _find_terms(tree: Node, free: list[str]) -> tuple[bool, dict[Node, _Term]]:
    """(whether the formula is a plain sum of terms, node -> term). Below the top, terms are looked for in sums and bases of powers."""
    def term_of(node: Node) -> _Term | None:
        parts = _factors(node, 1)
        for wanted in (1, -1):
            for sign, part in parts:
                if sign == wanted and part.kind == "name" and part.value in free:
                    return _Term(part.value, sign < 0, tuple(p for p in parts if p[1] is not part))
        return None

    summands = tree.parts if tree.kind == "sum" else (tree,)
    top = {node: term_of(node) for node in summands}
    if all(top.values()) and (tree.kind != "sum" or min(tree.signs) > 0) and len(top) == len(summands):
        return True, top
    found: dict[Node, _Term] = {}

    def look(node: Node) -> None:
        term = term_of(node)
        if term:
            found[node] = term
        elif node.kind in ("sum", "product"):
            for part in node.parts:
                look(part)
        elif node.kind == "power":
            look(node.parts[0])

    look(tree)
    return False, found


def _factors(node: Node, sign: int) -> tuple[tuple[int, Node], ...]:
    """(+1 or -1, factor) of a product, brackets opened: a/(g*x) is a, 1/g, 1/x."""
    if node.kind != "product":
        return ((sign, node),)
    return tuple(factor for own, part in zip(node.signs, node.parts, strict=True) for factor in _factors(part, sign * own))


def _parameters(tree: Node, terms: list[_Term], constants: list[str], boxes: dict) -> tuple[Parameter, ...]:
    """Amplitudes in the order of the terms, then the rest."""
    multiplying = tuple((divisor if term.divides else amplitude)(term.name) for term in terms)
    in_exponents = set(_exponent_names(tree))
    rest = []
    for name in constants:
        if name in {term.name for term in terms}:
            continue
        if name in boxes:
            low, high = boxes[name]
            kind = exponent if name in in_exponents else scale if low > 0 else offset
            rest.append(kind(name, low, high))
        else:
            rest.append(exponent(name) if name in in_exponents else scale(name, 1e-3, 1e3))
    return (*multiplying, *rest)


def _exponent_names(node: Node) -> list[str]:
    own = node.parts[1].names() if node.kind == "power" else []
    return own + [name for part in node.parts for name in _exponent_names(part)]


def _log_rest(term: _Term, values: dict):
    """ln of everything in a term but its amplitude."""
    return sum((sign * _log(node, values) for sign, node in term.rest), 0.0)


def _log(node: Node, values: dict):
    """ln of a node; powers, products and exp without leaving logarithms, so that N^-alpha of 1e12 keeps its digits."""
    if node.kind == "power":
        return _value(node.parts[1], values, {}) * _log(node.parts[0], values)
    if node.kind == "product":
        return sum(sign * _log(part, values) for sign, part in zip(node.signs, node.parts, strict=True))
    if node.kind == "call" and node.value == "exp":
        return _value(node.parts[0], values, {})
    value = _value(node, values, {})
    return namespace(value).log(value)


_CALLS: dict[str, Callable] = {name: (lambda value, name=name: getattr(namespace(value), name)(value)) for name in FUNCTIONS}


def _log2(value):
    return _CALLS["log"](value) / 0.6931471805599453  # numpy's log2 refuses complex numbers


def _value(node: Node, values: dict, terms: dict[Node, object]):
    """The value of a node; `terms` holds those of the summands that have an amplitude."""
    if node in terms:
        return terms[node]
    if node.kind == "number":
        return node.value
    if node.kind == "name":
        return values[node.value]
    if node.kind == "call":
        return (_log2 if node.value == "log2" else _CALLS[node.value])(_value(node.parts[0], values, terms))
    if node.kind == "power":
        base, power = (_value(part, values, terms) for part in node.parts)
        if node.parts[1].kind == "number":
            return base ** power  # whole powers of negative numbers have a value
        return namespace(base).exp(power * namespace(base).log(base))
    result = 0.0 if node.kind == "sum" else 1.0
    for sign, part in zip(node.signs, node.parts, strict=True):
        value = _value(part, values, terms)
        result = result + sign * value if node.kind == "sum" else result * value if sign > 0 else result / value
    return result
