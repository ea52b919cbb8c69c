"""What a law is made of besides its formula: constants, inputs that a run may leave untouched, and columns of names."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

SPAN = (-4.0, 4.0)
WIDTHS = ("weights_bits", "activations_bits", "kv_bits")  # the inputs of laws that say how narrow a run was
FULL_BITS = 32.0  # from here on laws of widths see no quantization
BOX_SLACK = 1e-9  # relative: a constant solved in logs that ended on its bound comes back from them rounded
BASELINES = ("baseline", "bf16", "bfloat16", "fp32", "float32", "f32", "fp16", "none", "noquantizer", "16", "32")
"""Names, in any case, of a level whose efficiency is 1 unless the caller fixes another."""


@dataclass(frozen=True)
class Parameter:
    """One constant of a law.

    kind: "amplitude" (multiplies a term), "divisor" (divides one: an amplitude by its inverse), "exponent", "scale" (positive, solved in
    logs) or "offset" (any sign).
    low, high: the box in which starts are drawn and the solution must stay; amplitudes and divisors need none.
    span: for an amplitude of a law that is no plain sum, the box of starts of the log of its term's geometric mean over the rows.
    start: the box of starts, where it is smaller than the bounds. held: the value to hold it at when the design cannot tell it
    from the constant it belongs to. unit: for tables and axes.
    """

    name: str
    kind: str
    low: float = 0.0
    high: float = float("inf")
    unit: str = ""
    span: tuple[float, float] = SPAN
    held: float = 0.0
    start: tuple[float, float] | None = None

    @property
    def multiplies(self) -> bool:
        """Whether it is the factor of a term, so that the solver moves in the log of that term's mean."""
        return self.kind in ("amplitude", "divisor")

    @property
    def logarithmic(self) -> bool:
        """Whether the solver moves in the logarithm of this parameter (of its inverse, for a divisor)."""
        return self.kind in ("amplitude", "divisor", "scale")

    def takes(self, value) -> bool:
        """Whether the constant may be held at `value`: inside the box, to rounding, or where `held` puts it; an amplitude may be
        0, a term left out."""
        low, high = self.low * (1 - BOX_SLACK * np.sign(self.low)), self.high * (1 + BOX_SLACK * np.sign(self.high))
        return bool(np.isfinite(value)) and (value == self.held or (low <= value <= high and not (self.kind == "divisor" and value == 0)))

    @property
    def accepted(self) -> str:
        """What `takes` takes, in words."""
        if self.multiplies:
            return "a positive number" + (", or 0 to leave its term out" if self.kind == "amplitude" else "")
        outside = f", or {self.held:g}" if not self.low <= self.held <= self.high else ""
        return f"a number from {self.low:g} to {self.high:g}{outside}"

    def value(self, coordinate):
        """The constant at a solver coordinate (arrays, complex ones too)."""
        if self.kind == "divisor":
            return np.exp(-coordinate)
        return np.exp(coordinate) if self.logarithmic else coordinate

    def coordinate(self, value):
        """The inverse of `value`. -inf for an amplitude of zero."""
        with np.errstate(divide="ignore"):
            if self.kind == "divisor":
                return -np.log(value)
            return np.log(value) if self.logarithmic else value


def amplitude(name: str, unit: str = "", span: tuple[float, float] = SPAN) -> Parameter:
    return Parameter(name, "amplitude", unit=unit, span=span)


def divisor(name: str, unit: str = "", span: tuple[float, float] = SPAN) -> Parameter:
    return Parameter(name, "divisor", unit=unit, span=span)


def exponent(name: str, low: float = 0.01, high: float = 2.5, held: float = 0.0) -> Parameter:
    return Parameter(name, "exponent", low, high, held=held)


def scale(name: str, low: float, high: float, unit: str = "", held: float = 1.0, start: tuple[float, float] | None = None) -> Parameter:
    return Parameter(name, "scale", low, high, unit, held=held, start=start)


def offset(name: str, low: float, high: float, unit: str = "", start: tuple[float, float] | None = None) -> Parameter:
    return Parameter(name, "offset", low, high, unit, start=start)


@dataclass(frozen=True)
class Operand:
    """An input that a run may leave untouched, and the parameters that only it can identify.

    `input` is the column; at `neutral` and above (bits >= 32; with `below`, at it and below: an error of 0) the law does not depend on
    it; `parameters` are ordered from the one to keep to the one to give up first when the design has too few levels. Two operands
    with as many parameters whose columns are identical in every row share them pairwise.
    also: parameters that no row identifies either when none is touched, but that need no further level.
    from_name: turns a name in that column (a format's) into its number.
    """

    input: str
    parameters: tuple[str, ...]
    neutral: float
    below: bool = False
    from_name: Callable[[str], float] | None = None
    also: tuple[str, ...] = ()

    def touched(self, values) -> np.ndarray:
        """Where the law depends on this operand."""
        values = np.asarray(values, dtype=np.float64)
        return values > self.neutral if self.below else values < self.neutral

    @property
    def untouched(self) -> float:
        """The value of a run that leaves it alone."""
        return self.neutral if self.below else np.inf

    def clip(self, values) -> np.ndarray:
        """Values with everything beyond `neutral` at it."""
        return (np.maximum if self.below else np.minimum)(values, self.neutral)

    def numbers(self, values) -> np.ndarray:
        """Values as float64; names through `from_name`."""
        array = np.asarray(values)
        if array.dtype.kind not in "OUS" or self.from_name is None:
            return np.asarray(array, dtype=np.float64)
        known = {name: self.from_name(name) if isinstance(name, str) else float(name) for name in set(array.ravel().tolist())}
        return np.array([known[name] for name in array.ravel().tolist()], dtype=np.float64).reshape(array.shape)


@dataclass(frozen=True)
class Factor:
    """A column of names (a scheme, a format) with one constant per level: `parameter[level]`, by default an efficiency, 1 at the baseline.

    kind: of these constants, as of a `Parameter`. `log_terms` and `combine` find the value of each row's level under `parameter`; an
    amplitude or divisor is among the law's parameters under that name, and a row has the term of its own level alone.
    baseline: the value at the level that has a baseline's name; None: no name means anything. held: level -> value that it is held at.
    """

    input: str
    parameter: str
    low: float = 0.003
    high: float = 3.0
    kind: str = "scale"
    baseline: float | None = 1.0
    held: Mapping[str, float] = field(default_factory=dict)

    @property
    def multiplies(self) -> bool:
        """Whether its constants are factors of terms."""
        return self.kind in ("amplitude", "divisor")

    def name(self, level: str) -> str:
        return f"{self.parameter}[{level}]"

    def level(self, name: str) -> str | None:
        """The level in "parameter[level]", None for any other name."""
        inside = name.startswith(f"{self.parameter}[") and name.endswith("]")
        return name[len(self.parameter) + 1:-1] if inside else None


def labels(values) -> np.ndarray:
    """Names of levels: strings as they are, numbers without trailing zeros (4.0 is "4")."""
    array = np.asarray(values)
    if array.dtype.kind in "US":
        return array.astype(str)
    return np.array([value if isinstance(value, str) else f"{value:g}" for value in array.ravel().tolist()], dtype=str).reshape(array.shape)


@dataclass(frozen=True)
class Reduction:
    """What a set of columns cannot see of a law: parameters it never touches, parameters it cannot tell apart, ones it must hold."""

    absent: tuple[str, ...] = ()
    ties: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
