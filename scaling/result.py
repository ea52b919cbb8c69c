"""`Fit`: constants with intervals, predictions with intervals, and the refusal to state what the design does not identify."""
from __future__ import annotations

import inspect
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.special import stdtrit

from scaling.choice import Choice, choice
from scaling.files import write_whole
from scaling.inputs import inputs_of, refuse_input
from scaling.laws import Law, resolve
from scaling.laws.parameters import labels
from scaling.problem import constants
from scaling.reach import refuse_far

MAX_CONDITION = 1e9
MAX_RELATIVE_SE = 0.5
MAX_AMPLITUDE_SE = 1.0  # an amplitude trades off with its exponent (correlation 0.9 even in centred logs) and matters by its logarithm; E has none
VERSION = 1


@dataclass(frozen=True)
class Estimate:
    """A number with its interval; `reason` is empty when the design identifies it. relative_se: of the value (offsets: absolute)."""

    name: str
    value: float
    low: float
    high: float
    relative_se: float
    reason: str

    @property
    def identified(self) -> bool:
        return not self.reason

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]" if self.identified else self.reason


@dataclass(frozen=True)
class Prediction:
    """Predicted loss of one run, nats per token, with the interval that a single new run is expected to fall in.

    All arrays of the broadcast shape of the inputs. mean_low, mean_high: the interval of the law's value alone (parameter uncertainty
    only). extrapolated: by what factor the point lies outside the fitted range of its worst input or of N*D (1 inside).
    """

    loss: np.ndarray
    low: np.ndarray
    high: np.ndarray
    mean_low: np.ndarray
    mean_high: np.ndarray
    extrapolated: np.ndarray


@dataclass(frozen=True)
class Fit:
    """A fitted law. Everything that prediction needs is here and in the JSON file that `save` writes.

    params: name -> value; intervals: name -> (low, high) at `level`; metrics: what the fit reports about itself (see `scaling.fit`).
    free, ties, fixed, coordinates, scatter, draws: the solution in plain solver coordinates (logs of amplitudes and scales);
    scatter @ scatter.T
    is their covariance; draws are bootstrap refits (may be empty). ranges: input -> fitted (low, high).
    """

    law: Law
    label: str
    params: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]
    metrics: Mapping[str, object]
    level: float
    free: tuple[str, ...]
    ties: Mapping[str, str]
    fixed: Mapping[str, float]
    coordinates: np.ndarray
    scatter: np.ndarray
    draws: np.ndarray
    ranges: Mapping[str, tuple[float, float]]

    @property
    def converged(self) -> bool:
        return bool(self.metrics["converged"])

    @property
    def quantile(self) -> float:
        """Two-sided Student quantile at `level` with the residual degrees of freedom."""
        return float(stdtrit(max(self.metrics["dof"], 1), 0.5 + 0.5 * self.level))

    def estimate(self, name: str | Callable[[Mapping], float], **columns) -> Estimate | Choice:
        """A parameter, one of the law's functionals (at `columns`), or a function of the constants and `columns` of one's own, with its
        interval, or why the design does not identify it.

        The interval is that of the linearised covariance (symmetric in the logarithm of a positive value), or, when the fit has draws,
        the hull of it and the bootstrap percentiles. Each fails alone: the former trusts equal and independent residuals (on the
        Chinchilla points it is 40 % too narrow for beta), the latter is too narrow with few cells (nine cells: 82 % for 95 %).
        A functional that gives a name ("best_layout") has the shares of the names instead. ValueError, one line, where there is no such
        quantity, or no real value of it.
        """
        function, unit_scale = self.quantity(name, columns)
        try:
            with np.errstate(all="ignore"):
                raw = function(self.params)
        except KeyError as error:
            raise ValueError(f"{getattr(name, '__name__', name)} asks for {error.args[0]!r}, which this fit does not have; it has "
                             f"{', '.join(self.params)}") from None
        if isinstance(raw, str):
            return choice(self, name, function, self._reason(name, 0.0))
        value = _real(raw, name, columns)
        error = math.sqrt(float((self._slopes(lambda p: np.asarray(function(p), dtype=np.float64)) ** 2).sum()))
        half_width = self.quantile * error
        if value > 0 and unit_scale is None:
            low, high = value * math.exp(-min(half_width / value, 700.0)), value * math.exp(min(half_width / value, 700.0))
        else:
            low, high = value - half_width, value + half_width
        if len(self.draws) > 20:
            draw_low, draw_high, draw_error = self._from_draws(function)
            low, high, error = min(low, draw_low), max(high, draw_high), max(error, draw_error)
        relative = error / (unit_scale or abs(value) or 1.0)
        name = name if isinstance(name, str) else getattr(name, "__name__", "function")
        nowhere = "" if math.isfinite(value) else f"{name} has no finite value at these constants"
        reason = self._reason(name, relative) or self._outside(name, value) or nowhere
        if not reason and (held := self.on_bound(function, high - low)):
            reason = f"not identified by this design ({name} follows from {held}, which ended on its bound)"
        return Estimate(name, value, low, high, relative, reason)

    def on_bound(self, function: Callable[[Mapping], float], width: float = 0.0) -> str:
        """A constant that ended on its bound and moves the function of the constants by more than `width` within a tenth of its coordinate, or
        "": it has no error there, so that an interval of the function is too narrow, or has no width at all."""
        for name in self.metrics["at_bound"]:
            step = 0.05 * np.array([one == name for one in self.free])
            with np.errstate(all="ignore"):
                values = [float(function(self.constants_at(self.coordinates + sign * step))) for sign in (-1.0, 1.0)]
            if not abs(values[1] - values[0]) <= max(1e-9 * abs(values[0]), width):
                return name
        return ""

    def identified(self, name: str, **columns) -> bool:
        """Whether the design identifies a parameter or functional: `estimate(...).identified`."""
        return self.estimate(name, **columns).identified

    def predict(self, *, extrapolate: bool = False, **columns) -> Prediction:
        """Loss of one run at the law's inputs, with its interval at `level`.

        The variance of ln loss has three parts: of the law's value (linearised, or the bootstrap's if larger), of a run about
        the law (the residuals of the fit), and, outside the fitted range of any input, the law's discrepancy there, which is calibrated
        on refits to the smaller runs that predict the larger ones (`scaling.uncertainty.discrepancy`).
        ValueError when the design identifies nothing (condition number), for inputs that the law does not take, or, without
        `extrapolate`, when N, D or compute lies more than 30 times outside of its fitted range.
        """
        if self.metrics["condition_number"] > MAX_CONDITION or not self.converged:
            raise ValueError(f"prediction {self._reason('', 0.0)}")
        columns = self._arrays(columns)
        for name in self.law.measures:
            values = columns.get(name, np.ones(()))
            if not np.all((values > 0) | ((values == 0) & (name in self.law.zero_allowed))):
                raise ValueError(f"predict: {name} is {np.ravel(values)[np.argmin(np.ravel(values))]:g}: must be positive")
        for operand in self.law.operands:
            values = np.ravel(columns.get(operand.input, 1.0))
            if not np.all(values >= 0.0):
                raise ValueError(f"predict: {operand.input} is {values[~(values >= 0.0)][0]:g}: must be a positive number, or absent where "
                                 "it is not quantized")
        if not extrapolate:
            refuse_far(self.ranges, columns, "predict")
        loss = np.asarray(self.law.predict(self.params, **columns))
        with np.errstate(all="ignore"):
            mean_variance = (self._slopes(lambda p: np.log(self.law.predict(p, **columns))) ** 2).sum(axis=0)
            if len(self.draws) > 20:
                logs = np.log([self.law.predict(self.constants_at(draw), **columns) for draw in self.draws])
                low, high = np.quantile(logs, [0.15865, 0.84135], axis=0)
                mean_variance = np.maximum(mean_variance, (0.5 * (high - low)) ** 2)
        extrapolated = self._extrapolation(columns)
        beyond = self.discrepancy_at(extrapolated)
        half = self.quantile * np.sqrt(mean_variance + float(self.metrics["residual_sd"]) ** 2 + beyond**2)
        mean_half = self.quantile * np.sqrt(mean_variance)
        # a law that diverges has no interval
        ends = [np.exp(np.log(loss) + np.where(np.isinf(loss), 0.0, one)) for one in (-half, half, -mean_half, mean_half)]
        return Prediction(loss, *ends, extrapolated)

    def discrepancy_at(self, extrapolated: np.ndarray) -> np.ndarray:
        """Standard deviation of ln loss that the law's form adds at a factor `extrapolated` beyond the data: 0 inside, and growing
        with the root of the factor's logarithm; infinite at an infinite factor."""
        grown = float(self.metrics["discrepancy"]) * np.sqrt(np.log(np.clip(extrapolated, 1.0, 1e300)))
        return np.where(np.isinf(extrapolated), np.inf, grown)

    def _arrays(self, columns: Mapping) -> dict[str, np.ndarray]:
        """Columns as arrays: names of levels as they are, names of formats as their numbers, the rest float64."""
        operands = {operand.input: operand for operand in self.law.operands}
        factors = {factor.input for factor in self.law.factors}
        arrays = {}
        for name, values in columns.items():
            try:
                arrays[name] = (np.asarray(values) if name in factors else operands[name].numbers(values) if name in operands
                                else np.asarray(values, dtype=np.float64))
            except (TypeError, ValueError) as error:
                raise ValueError(f"predict: {name}={values!r}: {error}") from None
        try:
            np.broadcast_shapes(*(array.shape for array in arrays.values()))
        except ValueError:
            raise ValueError(f"predict: {', '.join(f'{name} has shape {array.shape}' for name, array in arrays.items())}: give one value "
                             "or equally many") from None
        return arrays

    def at_width(self, bits: float) -> dict[str, float]:
        """Inputs that put every operand whose width the fit knows of at `bits`: {"weights_bits": 4.0, ...}; empty for a law of other things."""
        return {operand.input: bits for operand in self.law.operands if operand.parameters[0] in self.params and operand.input.endswith("_bits")}

    @property
    def one_knob(self) -> bool:
        """Whether all operands that the fit knows of share one width and its constants, so that the loss is a curve over bits."""
        widths = self.at_width(1.0)
        first = [operand.parameters[0] for operand in self.law.operands if operand.input in widths]
        return len({self.ties.get(name, name) for name in first}) == 1

    def save(self, path: str | os.PathLike) -> Path:
        """Writes FIT.json, whole or not at all: everything that `load` needs to predict. Returns the path."""
        body = {"bitlaw_fit": VERSION, "law": self.law.name, "about": self.law.about, "cite": self.law.cite, "label": self.label,
                "params": dict(self.params), "intervals": {k: list(v) for k, v in self.intervals.items()}, "level": self.level,
                "metrics": dict(self.metrics), "free": list(self.free), "ties": dict(self.ties), "fixed": dict(self.fixed),
                "coordinates": self.coordinates.tolist(), "scatter": self.scatter.tolist(), "draws": self.draws.tolist(),
                "ranges": {k: list(v) for k, v in self.ranges.items()}, "levels": {k: list(v) for k, v in self.law.levels.items()}}
        text = json.dumps(_to_json(body), indent=1) + "\n"
        return write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))

    def constants_at(self, coordinates: np.ndarray) -> dict[str, float]:
        """Named constants at plain coordinates [F], such as a row of `draws`."""
        return constants(self.law, self.free, self.ties, self.fixed, coordinates)

    def quantity(self, name: str | Callable, columns: Mapping) -> tuple[Callable[[Mapping], float], float | None]:
        """(params -> number, scale of its standard error: None for relative to the value), of whatever `estimate` takes. ValueError for a
        name that is neither a parameter nor a functional, for columns that the functional lacks or does not know, and for values that are
        none of theirs."""
        if callable(name):
            return (lambda p: name(p, **columns)), None
        if name in self.params:
            return (lambda p: p[name]), (1.0 if self.law.parameter(name).kind == "offset" else None)
        if name not in self.law.functionals:
            raise ValueError(f"{name!r}: law {self.law.name} has no such parameter or functional here; it has "
                             f"{', '.join((*self.params, *self.law.functionals))}")
        function = self.law.functionals[name]
        try:
            inspect.signature(function).bind(self.params, **columns)
        except TypeError:
            raise ValueError(f"{name} of law {self.law.name} takes {self._taken(function)}; given: {', '.join(columns) or 'nothing'}") from None
        for key, given in columns.items():
            if given is not None or key in inputs_of(function)[0]:  # what may be left out may be None
                refuse_input(self.law, key, given, name)
        columns = dict(columns) | {key: str(labels(columns[key])) for key in self.law.levels if columns.get(key) is not None}  # 4.0 is "4"
        for operand in self.law.operands:
            given = columns.get(operand.input)
            if given is not None and operand.parameters[0] not in self.params and np.any(operand.touched(operand.numbers(given))):
                raise ValueError(f"{name}: {operand.input}={given}: no fitted row had it quantized, so that this fit has no {operand.parameters[0]}")

        def value(p: Mapping[str, float]) -> float | str:
            try:
                return function(p, **columns)
            except ArithmeticError:  # far out along a direction that the design leaves open
                return math.nan

        return value, None

    def _taken(self, function: Callable) -> str:
        """What a functional takes beside the constants: "N, gap", "compute, cost_per_pair (may be left out)"."""
        required, optional, any_operand = inputs_of(function)
        optional += tuple(operand.input for operand in self.law.operands) if any_operand else ()
        return ", ".join((*required, *(f"{name} (may be left out)" for name in optional))) or "nothing"

    def _slopes(self, function: Callable[[Mapping], np.ndarray]) -> np.ndarray:
        """[F, ...]: change of `function` along each column of scatter (one standard deviation), by central differences."""
        step = 0.1
        with np.errstate(all="ignore"):
            slopes = np.stack([(function(self.constants_at(self.coordinates + step * column))
                                - function(self.constants_at(self.coordinates - step * column))) / (2 * step) for column in self.scatter.T])
        return np.where(np.isfinite(slopes), slopes, np.inf)

    def _from_draws(self, function: Callable[[Mapping], float]) -> tuple[float, float, float]:
        with np.errstate(all="ignore"):
            values = np.array([function(self.constants_at(draw)) for draw in self.draws], dtype=np.float64)
        tail = 0.5 * (1.0 - self.level)
        values = np.where(np.isnan(values), np.inf, values)
        low, left, right, high = np.quantile(values, [tail, 0.15865, 0.84135, 1.0 - tail], method="closest_observation")
        return float(low), float(high), float(0.5 * (right - left)) if np.isfinite(right) else math.inf  # mostly without value: no inf - inf

    def _reason(self, name: str, relative: float) -> str:
        condition = float(self.metrics["condition_number"])
        why = f"condition number {condition:.1e}"
        if not self.converged:
            return f"not identified: the fit did not converge ({why})"
        if name in self.metrics["at_bound"] or self.ties.get(name) in self.metrics["at_bound"]:
            return f"not identified by this design ({why}; {name} ended on its bound)"
        if self.metrics["dof"] < 1 or condition > MAX_CONDITION:
            return f"not identified by this design ({why})"
        flat = self.metrics.get("undetermined", {})
        apart = flat.get(name) or flat.get(self.ties.get(name))
        if apart:
            return f"not identified by this design (the objective is flat: starts that reach it end {apart:.0%} apart)"
        amplitude = name in self.law.amplitudes and name not in self.metrics.get("constant_terms", ())
        if not relative <= (MAX_AMPLITUDE_SE if amplitude else MAX_RELATIVE_SE):
            return f"not identified by this design ({why}; relative standard error {relative:.0%})"
        return ""

    def _outside(self, name: str, value: float) -> str:
        """Why a functional whose value is a value of an input cannot be told: it lies outside what was trained."""
        answered = self.law.answers.get(name)
        narrowed = list(self.at_width(1.0))  # a width of all operands is one of those that the fit knows of
        answered = narrowed if answered in {operand.input for operand in self.law.operands} else [answered]
        spans = [self.ranges[one] for one in answered if one in self.ranges] or [(-math.inf, math.inf)]
        low, high = min(low for low, _ in spans), max(high for _, high in spans)
        if low <= value <= high:
            return ""
        return (f"not identified by this design (the law puts {name} at {value:.3g}, outside the {' and '.join(answered)} trained, "
                f"{low:g} to {high:g})")

    def _extrapolation(self, columns: Mapping[str, np.ndarray]) -> np.ndarray:
        """Largest factor by which an input, or the scale N*D, lies outside its fitted range; broadcast shape, at least 1.

        An operand beyond its neutral width counts as that width; one that was always neutral has no range. Infinite where every fitted row
        has 0 of an input (no mantissa bits) and the point has not.
        """
        factors = [np.ones(())]
        operands = {operand.input: operand for operand in self.law.operands}
        for name, (low, high) in self.ranges.items():
            operand = operands.get(name)
            values = (operand.clip(columns.get(name, operand.untouched)) if operand else
                      math.prod(columns.get(part, math.inf) for part in name.split("*")))
            values = np.asarray(values, dtype=np.float64)
            with np.errstate(divide="ignore", invalid="ignore"):
                factor = np.maximum(values / high, low / values)
            edge = (values == 0.0) | np.isinf(values)  # 0 bits, an error of 0, a law without D: the edge of the scale, not beyond it
            factors.append(np.where(edge, 1.0, np.maximum(factor, 1.0)))
        factors = np.broadcast_arrays(*factors)
        return np.max(factors, axis=0)


def _real(value, name, columns: Mapping) -> float:
    if np.iscomplexobj(value) or np.ndim(value):
        what = "no real value" if np.iscomplexobj(value) else "more than one value"
        told = ", ".join(f"{key}={given}" for key, given in columns.items())
        raise ValueError(f"{getattr(name, '__name__', name)} has {what} at {told or 'these constants'}; give positive numbers, one of each")
    return float(value)


def load(path: str | os.PathLike, law: Law | None = None) -> Fit:
    """The fit in a FIT.json. `law`: only for a law that is not in the registry. ValueError, one line, when it cannot be read."""
    try:
        body = json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=float)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; give the FIT.json that `bitlaw fit --out` wrote") from None
    except (json.JSONDecodeError, UnicodeDecodeError, IsADirectoryError) as error:
        raise ValueError(f"{path}: not a fit ({error})") from None
    if not isinstance(body, dict) or body.get("bitlaw_fit") != VERSION:
        raise ValueError(f"{path}: not a fit of this version (bitlaw_fit must be {VERSION})")
    try:
        return _from_json(body, law)
    except (KeyError, TypeError, AttributeError) as error:  # a key that is not there, or something else in its place
        raise ValueError(f"{path}: not a whole fit ({type(error).__name__}: {error}); write it again with `bitlaw fit --out`") from None


def _from_json(body: dict, law: Law | None) -> Fit:
    pairs = {name: {k: tuple(_number(x) for x in v) for k, v in body[name].items()} for name in ("intervals", "ranges")}
    metrics = {name: _number(value) for name, value in body["metrics"].items()}
    size = len(body["free"])
    made = law or resolve(body["law"])[0]
    made = made.at_levels({name: tuple(levels) for name, levels in body.get("levels", {}).items()}) if made.factors else made
    return Fit(made, body["label"], body["params"], pairs["intervals"], metrics, body["level"],
               tuple(body["free"]), body["ties"], body["fixed"], np.array(body["coordinates"], dtype=np.float64),
               _matrix(body["scatter"], size), _matrix(body["draws"], size), pairs["ranges"])


def _to_json(value):
    """JSON has no infinity: infinite and NaN numbers are written as the strings "inf", "-inf", "nan"."""
    if isinstance(value, Mapping):
        return {str(k): _to_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_json(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _number(value):
    return float(value) if value in ("inf", "-inf", "nan") else value


def _matrix(rows: list, width: int) -> np.ndarray:
    return np.array([[float(x) for x in row] for row in rows], dtype=np.float64).reshape(len(rows), width)
