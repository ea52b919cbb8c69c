"""From a table to the arrays of a fit: column mapping by SQL expressions, row filters, the held-out split, and every refusal.

Expressions see the table's own columns. `where` and `holdout` see those and the law's inputs (`N`, `D`, ..., `loss`) as mapped;
they may use window functions: `N = max(N) OVER ()` is the largest size, `row_number() OVER (ORDER BY loss DESC) > 5` is all but the
five largest losses. A condition that is NULL counts as false.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from scaling.laws import Law, Operand
from scaling.laws.parameters import labels
from scaling.mapped import boolean, mapped_rows, one_line, project, suggested
from scaling.table import Source, quote, table

RUN_ALIASES = {"N": "n_params", "D": "tokens"}
DEFAULT_COLUMNS = {**RUN_ALIASES, "scheme": "precision", "forward": "weights_format", "backward": "output_gradients_format",
                   "exp_bits": "weights_exp_bits", "man_bits": "weights_man_bits", "block": "weights_block",
                   "weights_mse": "weights_log_mse", "activations_mse": "activations_log_mse"}
"""Where run tables keep the inputs of laws, sizes (RUN_ALIASES) among them; inputs that are not here have the same name in both."""
WEIGHT, HELD, BASE = '"bitlaw weight"', '"bitlaw held out"', '"bitlaw base"'  # columns of its own: no table has such names
LOGARITHMS = ("weights_log_mse", "activations_log_mse")
"""Columns of run tables that hold the natural logarithm of what the law takes."""


@dataclass(frozen=True)
class Observations:
    """Rows of a fit. columns: input -> float64 [rows], names [rows] for factors; loss: float64 [rows], nats per token; held: bool [rows];
    mapping: input -> SQL expression used; dropped: reason -> number of rows left out; weights: float64 [rows] or None; base: bool [rows],
    those of a first stage, or None."""

    columns: dict[str, np.ndarray]
    loss: np.ndarray
    held: np.ndarray
    mapping: dict[str, str]
    dropped: dict[str, int]
    weights: np.ndarray | None = None
    base: np.ndarray | None = None

    def only(self, keep: np.ndarray) -> Observations:
        """The rows where `keep`."""
        weights, base = (None if values is None else values[keep] for values in (self.weights, self.base))
        return replace(self, columns={name: values[keep] for name, values in self.columns.items()}, loss=self.loss[keep], held=self.held[keep],
                       weights=weights, base=base)

    @property
    def fitted_weights(self) -> np.ndarray | None:
        """Weights of the rows that are not held out, scaled to a mean of 1: only their ratios say anything."""
        weights = None if self.weights is None else self.weights[~self.held]
        return weights if weights is None else weights / weights.mean()

    def rows(self, keep: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """(columns, loss) of the rows where `keep`."""
        return {name: values[keep] for name, values in self.columns.items()}, self.loss[keep]


def observe(source: Source, law: Law, columns: Mapping[str, str] | None = None, where: str | None = None,
            holdout: str | None = None, weights: str | None = None, base: str | None = None) -> Observations:
    """The rows that `law` is to be fitted on; `weights`: SQL, how much each counts; `base`: SQL, those of a first stage. ValueError, one line,
    for whatever makes them unusable."""
    relation = table(source)
    mapping = _mapping(law, relation.columns, dict(columns or {}))
    named = {factor.input for factor in law.factors} | {operand.input for operand in law.operands if operand.from_name}
    filters = {"status is not done": "status IS NULL OR CAST(status AS VARCHAR) = 'done'"} if "status" in relation.columns else {}
    filters |= {f"where {where}": where} if where else {}
    stages = mapped_rows(relation, mapping, [name for name in mapping if name not in named], filters, f"law {law.name}")
    with one_line(f"where {where}"):  # a count need not look at all that a projection says, but a filter does
        counts = [len(stage) for stage in stages]
    dropped = {reason: before - after for reason, before, after in zip(filters, counts, counts[1:], strict=False) if before > after}
    if not counts[-1]:
        raise ValueError(f"no rows left to fit: {counts[0]} in the table"
                         + "".join(f", {number} dropped ({reason})" for reason, number in dropped.items()))
    held = boolean(holdout) if holdout else "false"
    counts_as = f"CAST(({weights}) AS DOUBLE)" if weights else "1.0"
    weighed = project(stages[-1], f"*, {counts_as} AS {WEIGHT}", f"weights {weights}" if weights else "")
    based = project(weighed, f"*, {boolean(base) if base else 'false'} AS {BASE}", f"base {base}" if base else "")
    last = project(based, f"{', '.join(map(quote, mapping))}, {WEIGHT}, {BASE}, {held} AS {HELD}", f"holdout {holdout}")
    texts = [f"CAST({quote(name)} AS VARCHAR) AS {quote(name)}" if str(kind).startswith("ENUM") else quote(name)  # else fetched through pandas
             for name, kind in zip(last.columns, last.types, strict=True)]
    with one_line(f"columns, weights {weights} or holdout {holdout}" if weights or holdout else "columns"):
        final = last.project(", ".join(texts)).fetchnumpy()
    return _checked(law, final, mapping, dropped, holdout, weights, base)


def _mapping(law: Law, found: list[str], given: dict[str, str]) -> dict[str, str]:
    """input -> SQL expression. Given ones win, then a column of the same name, then the run table's name; operands may be absent."""
    unknown = sorted(set(given) - set(law.inputs) - {"loss"})
    if unknown:
        raise ValueError(f"columns: {unknown[0]!r} is no input of law {law.name}; it takes {', '.join((*law.inputs, 'loss'))}")
    mapping, missing = {}, []
    for name in (*law.inputs, "loss"):
        alias = DEFAULT_COLUMNS.get(name, name)
        if name in given:
            mapping[name] = given[name]
        elif name in found or alias in found:
            column = name if name in found else alias
            mapping[name] = f"exp({quote(column)})" if column in LOGARITHMS else quote(column)
        elif name not in law.optional:
            missing.append(name)
    optional = [name for name in law.inputs if name in law.optional]
    if optional and not law.optional & set(mapping):
        raise ValueError(f"law {law.name} needs {' or '.join(optional)}; the table has {', '.join(found)} (name one: columns {optional[0]}=...)")
    if missing:
        raise ValueError(f"law {law.name} needs {', '.join(missing)}; the table has {', '.join(found)} "
                         f"(name them: columns {','.join(f'{name}={suggested(name, found)}' for name in missing)})")
    return mapping


def _checked(law: Law, arrays: dict, mapping: dict[str, str], dropped: dict[str, int], holdout: str | None, weights: str | None,
             base: str | None) -> Observations:
    operands = {operand.input: operand for operand in law.operands}
    factors = {factor.input for factor in law.factors}
    columns = {}
    for name in (name for name in law.inputs if name in mapping):
        if name in factors:
            columns[name] = _names(arrays[name], name, mapping[name], law)
            continue
        operand = operands.get(name)
        values = np.ma.filled(_numeric(arrays[name], operand, name), operand.untouched if operand else np.nan)
        _refuse(values, name, mapping[name], law, infinite_allowed=operand is not None,
                zero_allowed=name in law.zero_allowed or (operand is not None and operand.below))
        columns[name] = values
    loss = np.ma.filled(np.ma.asarray(arrays["loss"], dtype=np.float64), np.nan)
    _refuse(loss, "loss", mapping["loss"], law, infinite_allowed=False)
    weight = np.ma.filled(np.ma.asarray(arrays[WEIGHT.strip('"')], dtype=np.float64), np.nan)
    _refuse(weight, "weights", weights, law, infinite_allowed=False)
    held, based = (np.asarray(np.ma.filled(arrays[name.strip('"')], False), dtype=bool) for name in (HELD, BASE))
    if holdout and (held.all() or not held.any()):
        raise ValueError(f"holdout={holdout!r} selects {'every row' if held.all() else 'no row'} of {held.size}; "
                         "it must leave rows to fit and rows to test")
    if base and not (based & ~held).any():
        raise ValueError(f"base={base!r} selects no row of the {int((~held).sum())} that are fitted; it must select those of the first stage")
    filled = {name: columns[name] if name in columns else np.full(loss.shape, operands[name].untouched) for name in law.inputs}
    # SQL gives rows in any order (window functions do shuffle them); sums must not depend on it.
    order = np.lexsort((*filled.values(), loss))
    return Observations({name: values[order] for name, values in filled.items()}, loss[order], held[order], mapping, dropped,
                        weight[order] if weights else None, based[order] if base else None)


def _numeric(values, operand: Operand | None, name: str) -> np.ma.MaskedArray:
    """A column as numbers, missing ones masked; names of formats through the operand, which refuses unknown ones."""
    values = np.ma.asarray(values)
    if operand is None or values.dtype.kind not in "OUS":
        return np.ma.asarray(values, dtype=np.float64)
    missing = np.ma.getmaskarray(values) | np.array([value is None for value in values.data], dtype=bool)
    numbers = np.full(values.shape, operand.untouched)
    try:
        numbers[~missing] = operand.numbers(values.data[~missing])
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return np.ma.array(numbers, mask=missing)


def _names(values, name: str, expression: str, law: Law) -> np.ndarray:
    """A column as names of levels. ValueError when one is missing."""
    values = np.ma.asarray(values)
    missing = np.ma.getmaskarray(values) | np.array([value is None or value != value for value in values.data], dtype=bool)
    if missing.any():
        raise ValueError(f"{name} ({expression}) is missing in {int(missing.sum())} of {values.size} rows; law {law.name} needs a name in "
                         f"each: filter these out with where, or name them: {name}=coalesce({expression}, 'baseline')")
    return labels(values.data)


def _refuse(values: np.ndarray, name: str, expression: str, law: Law, infinite_allowed: bool, zero_allowed: bool = False) -> None:
    """ValueError when any value is missing, NaN, infinite (unless allowed), zero or negative: laws take logarithms."""
    kinds = (("missing or NaN", np.isnan(values)), ("infinite", np.isinf(values) & (not infinite_allowed)),
             ("zero", (values == 0) & (not zero_allowed)),
             ("negative", values < 0))
    for kind, bad in kinds:
        if bad.any():
            raise ValueError(f"{name} ({expression}) is {kind} in {int(bad.sum())} of {values.size} rows; law {law.name} needs positive "
                             "finite numbers, so filter these out with where")
