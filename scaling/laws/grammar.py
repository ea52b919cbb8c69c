"""The grammar of a formula: text to a tree, by a parser of its own. Nothing is ever evaluated as code.

    sum     = ["-"] product (("+" | "-") product)*
    product = power (("*" | "/") power)*
    power   = atom [("^" | "**") ["-"] power]
    atom    = number | name ["[" name "]"] | function "(" sum ")" | "(" sum ")"        functions: exp, log, log2, sqrt, tanh

k[format] is one constant k per level of the column `format`.

Every error is one line that says where in the text it is.
"""
from __future__ import annotations

import re
from dataclasses import dataclass

FUNCTIONS = ("exp", "log", "log2", "sqrt", "tanh")
MAX_LENGTH, MAX_DEPTH = 2000, 50
_TOKEN = re.compile(r"\s*(?:(?P<number>\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?)|(?P<name>[A-Za-z_]\w*)|(?P<sign>\*\*|[-+*/^()\[\]]))")


@dataclass(frozen=True)
class Node:
    """kind: number, name, sum, product, power, call. value: the number or name. parts: operands; signs: +1 or -1 of each part of a sum
    (added or subtracted) or product (multiplied or divided). index: of a name, the column whose levels have a value of it each."""

    kind: str
    value: float | str = ""
    parts: tuple[Node, ...] = ()
    signs: tuple[int, ...] = ()
    index: str = ""

    def nodes(self) -> list[Node]:
        """It and all below it, from left to right."""
        return [self] + [node for part in self.parts for node in part.nodes()]

    def names(self) -> list[str]:
        """Every name in it, as often as it occurs, from left to right."""
        return [node.value for node in self.nodes() if node.kind == "name"]


class _Parser:
    def __init__(self, text: str):
        self.text, self.tokens, self.at = text, _tokens(text), 0

    def refuse(self, expected: str) -> None:
        kind, found, place = self.tokens[self.at]
        found = "the end" if kind == "end" else repr(found)
        raise ValueError(f"formula {self.text!r}: expected {expected} at character {place + 1}, found {found}")

    def take(self, *signs: str) -> str:
        """The sign that comes next, if it is one of these, and "" otherwise."""
        kind, value, _ = self.tokens[self.at]
        if kind == "sign" and value in signs:
            self.at += 1
            return value
        return ""

    def sum(self, depth: int) -> Node:
        if depth > MAX_DEPTH:
            raise ValueError(f"formula {self.text!r}: nested deeper than {MAX_DEPTH} at character {self.tokens[self.at][2] + 1}")
        signs = [-1 if self.take("-") else 1]
        parts = [self.product(depth)]
        while sign := self.take("+", "-"):
            signs.append(1 if sign == "+" else -1)
            parts.append(self.product(depth))
        return parts[0] if signs == [1] else Node("sum", parts=tuple(parts), signs=tuple(signs))

    def product(self, depth: int) -> Node:
        signs, parts = [1], [self.power(depth)]
        while sign := self.take("*", "/"):
            signs.append(1 if sign == "*" else -1)
            parts.append(self.power(depth))
        return parts[0] if len(parts) == 1 else Node("product", parts=tuple(parts), signs=tuple(signs))

    def power(self, depth: int) -> Node:
        if depth > MAX_DEPTH:
            raise ValueError(f"formula {self.text!r}: nested deeper than {MAX_DEPTH} at character {self.tokens[self.at][2] + 1}")
        base = self.atom(depth)
        if not self.take("^", "**"):
            return base
        negative = self.take("-")
        exponent = self.power(depth + 1)
        return Node("power", parts=(base, Node("sum", parts=(exponent,), signs=(-1,)) if negative else exponent))

    def atom(self, depth: int) -> Node:
        kind, value, _ = self.tokens[self.at]
        if kind == "number":
            self.at += 1
            return Node("number", float(value))
        if kind == "name":
            self.at += 1
            if value not in FUNCTIONS:
                if self.tokens[self.at][:2] == ("sign", "("):
                    self.at -= 1
                    self.refuse(f"a function ({', '.join(FUNCTIONS)}) before the bracket")
                return Node("name", value, index=self.index())
            if not self.take("("):
                self.refuse(f"'(' after {value}")
            return Node("call", value, (self.closed(depth),))
        if self.take("("):
            return self.closed(depth)
        self.refuse("a number, a name or '('")

    def index(self) -> str:
        """The column in the brackets that may follow a name, or ""."""
        if not self.take("["):
            return ""
        kind, value, _ = self.tokens[self.at]
        if kind != "name" or value in FUNCTIONS:
            self.refuse("the name of a column")
        self.at += 1
        if not self.take("]"):
            self.refuse("']'")
        return value

    def closed(self, depth: int) -> Node:
        inside = self.sum(depth + 1)
        if not self.take(")"):
            self.refuse("')' or an operator")
        return inside


def _tokens(text: str) -> list[tuple[str, str, int]]:
    """(kind, value, place) of every token, "end" last."""
    if len(text) > MAX_LENGTH:
        raise ValueError(f"formula of {len(text)} characters: longer than {MAX_LENGTH}")
    tokens, at = [], 0
    while text[at:].strip():
        found = _TOKEN.match(text, at)
        if not found:
            place = at + len(text[at:]) - len(text[at:].lstrip())
            raise ValueError(f"formula {text!r}: {text[place]!r} at character {place + 1} is no part of a formula; use names, numbers, "
                             "+ - * / ^ ( ) [ ]")
        tokens.append((found.lastgroup, found[found.lastgroup], found.start(found.lastgroup)))
        at = found.end()
    return [*tokens, ("end", "", len(text))]


def parse(text: str) -> Node:
    """The tree of a formula. ValueError, one line with the place, for whatever is none."""
    parser = _Parser(text)
    tree = parser.sum(0)
    if parser.tokens[parser.at][0] != "end":
        parser.refuse("an operator or the end")
    return tree
