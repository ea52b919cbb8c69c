"""Errors of laws on runs that were left out on purpose: the largest sizes, the largest budgets, one precision after the other.

A split is named:
    largest-N, largest-D, largest-compute   the runs within 10 % of the largest value (compute is N D); any column will do
    largest-D/N:25%                         the quarter of the runs with the largest D/N, whole groups of equal values
    each-precision                          one precision left out after the other; each-COLUMN does so with any column

Every split becomes a condition in SQL, so each figure can be had again with `fit(..., holdout=split.holdout)`.
"""
from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import duckdb
import numpy as np

from scaling.eligible import eligible
from scaling.laws import Law, resolve
from scaling.laws.parameters import WIDTHS
from scaling.mapped import one_line
from scaling.solved import errors_of, solved
from scaling.table import Source, quote

SPLITS = ("largest-N", "largest-D", "each-precision")
SAME = 1.1  # values within this factor of the largest are one level: sizes of one name differ by a few percent
MAX_LEVELS = 40
NUMERIC = ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT", "UTINYINT", "USMALLINT", "UINTEGER", "UBIGINT", "FLOAT", "DOUBLE", "DECIMAL")


@dataclass(frozen=True)
class Split:
    """name: as asked for ("each-precision"); level: what is left out ("N > 3.6e+08", "precision = int4"); holdout: the same in SQL."""

    name: str
    level: str
    holdout: str


@dataclass(frozen=True)
class LeftOut:
    """How a law predicts the rows of one split from the others. fitted, rows: numbers of rows fitted and predicted; rmse, bias, worst: of
    ln predicted - ln observed, so relative errors of the loss; rmse_nats: of predicted - observed, in the loss's unit; why: why there is
    no score, else "" (the numbers are then NaN)."""

    label: str
    split: Split
    fitted: int
    rows: int
    rmse: float
    bias: float
    worst: float
    rmse_nats: float
    why: str = ""


def leave_out(source: Source, law: str | Law, splits: Iterable[str] = SPLITS, **options) -> list[LeftOut]:
    """One score per split, or per level of an each-split. options: of `scaling.fit`; rows in its `holdout` are neither fitted nor scored.

    A split that the law cannot predict (it has no constant for a level never fitted, or too few rows are left) has its reason instead.
    ValueError, one line, for a split that makes no sense on this table.
    """
    rows = eligible(source, options.get("columns"), options.get("where"), options.get("holdout"))
    return score(rows, law, pose_splits(rows, splits), options)


def score(rows: duckdb.DuckDBPyRelation, law: str | Law, splits: Iterable[Split], options: Mapping,
          guess: Mapping[str, float] | None = None) -> list[LeftOut]:
    """The same on `eligible` rows with splits that have been posed. Intervals play no part, so that only the optimum is found: from `guess`,
    the constants of a fit to all rows, or else from those of the split before, beside a few fresh starts."""
    apart = ("where", "holdout", "bootstrap", "progress", "columns", "level", "seed")
    kept = {name: value for name, value in options.items() if name not in apart}
    columns = {name: quote(name) for name in options.get("columns") or {}}
    scores = []
    for split in splits:
        scored, params = _scored(rows, law, split, columns, kept | {"guess": guess})
        scores.append(scored)
        guess = guess or params
    return scores


def _scored(rows: duckdb.DuckDBPyRelation, law: str | Law, split: Split, columns: Mapping, options: Mapping) -> tuple[LeftOut, dict[str, float]]:
    """(score, the constants that it is that of)."""
    nothing = {"rmse": math.nan, "bias": math.nan, "worst": math.nan, "rmse_nats": math.nan}
    try:
        with np.errstate(all="ignore"):  # a law may have no finite value where it was not fitted
            found = solved(rows, law, columns=columns, holdout=split.holdout, **options)
            params, (held, loss) = found.params, found.observed.rows(found.observed.held)
            errors = errors_of(found.last.problem.law.predict(params, **held), loss)
    except ValueError as error:
        return LeftOut(resolve(law, tuple(columns))[3], split, 0, 0, **nothing, why=str(error)), {}
    fitted, held_rows = int(found.last.problem.log_loss.size), int(loss.size)
    if not found.converged:
        return LeftOut(found.label, split, fitted, held_rows, **nothing, why="did not converge"), {}
    if not math.isfinite(errors["rmse"]):
        return LeftOut(found.label, split, fitted, held_rows, **nothing, why="no finite prediction for some of these rows"), params
    return LeftOut(found.label, split, fitted, **errors), params


def pose_splits(rows: duckdb.DuckDBPyRelation, names: Iterable[str]) -> list[Split]:
    """The splits called `names` on these rows, as conditions that are the same for every law."""
    splits = []
    for name in names:
        kind, dash, what = name.partition("-")
        if not dash or kind not in ("largest", "each") or not what:
            raise ValueError(f"leave {name!r}: unknown; give largest-N, largest-D, largest-compute, largest-COLUMN:25%, each-precision "
                             "or each-COLUMN")
        splits += _each(rows, name, what) if kind == "each" else [_largest(rows, name, what)]
    return splits


def _largest(rows: duckdb.DuckDBPyRelation, name: str, what: str) -> Split:
    what, colon, share = what.partition(":")
    expression = "N * D" if what == "compute" else what
    cast = f"CAST(({expression}) AS DOUBLE)"
    with one_line(f"leave {name}", rows.columns):
        values = rows.project(f"{cast} AS value_").fetchall()
    found = sorted(value for value, in values if value is not None)
    if not found or not found[0] > 0:
        raise ValueError(f"leave {name!r}: {expression} must be positive numbers; it is "
                         f"{f'{found[0]:g} in a row' if found else 'missing everywhere'}")
    if colon:
        first = found[-max(1, round(len(found) * _share(name, share)))]
    else:
        first = next(value for value in found if value * SAME >= found[-1])
    below = [value for value in found if value < first]
    if not below:
        raise ValueError(f"leave {name!r}: {expression} is {found[0]:.4g} to {found[-1]:.4g}, so leaving out its largest leaves nothing to fit")
    threshold = f"{math.sqrt(below[-1] * first):.4g}"
    if not below[-1] < float(threshold) < first:  # close values need all their digits
        threshold = repr(below[-1])
    return Split(name, f"{expression} > {threshold}", f"{cast} > CAST('{threshold}' AS DOUBLE)")


def _share(name: str, text: str) -> float:
    try:
        share = float(text.removesuffix("%")) / 100 if text.endswith("%") else float("nan")
    except ValueError:
        share = float("nan")
    if not 0 < share < 1:
        raise ValueError(f"leave {name!r}: after the colon comes a share of the rows, such as 25%")
    return share


def _each(rows: duckdb.DuckDBPyRelation, name: str, what: str) -> list[Split]:
    parts = _widths(rows, name) if what == "precision" and "precision" not in rows.columns else [what]
    with one_line(f"leave {name}", rows.columns):
        found = rows.project(", ".join(f"({part}) AS level{i}_" for i, part in enumerate(parts))).distinct()
        len(found)  # relations are lazy
    numeric = [str(kind).split("(")[0] in NUMERIC for kind in found.types]  # fits cast numbers: 4 and 4.0 are one level
    levels = sorted(found.fetchall(), key=lambda level: [_order(value) for value in level])
    if not 1 < len(levels) <= MAX_LEVELS:
        raise ValueError(f"leave {name!r}: {what} has {len(levels)} level{'s' * (len(levels) != 1)} here; leaving out one after the other takes 2 to "
                         f"{MAX_LEVELS}")
    return [Split(name, f"{what} = {'/'.join(map(_told, level))}", " AND ".join(map(_equal, parts, level, numeric))) for level in levels]


def _equal(expression: str, value, numeric: bool) -> str:
    if value is None:
        return f"({expression}) IS NULL"
    if numeric:
        return f"CAST(({expression}) AS DOUBLE) = CAST('{float(value)!r}' AS DOUBLE)"
    return f"CAST(({expression}) AS VARCHAR) = '" + str(value).replace("'", "''") + "'"


def _told(value) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _widths(rows: duckdb.DuckDBPyRelation, name: str) -> list[str]:
    """What tells precisions apart where no column is called so."""
    widths = [quote(width) for width in WIDTHS if width in rows.columns]
    if not widths:
        raise ValueError(f"leave {name!r}: the table has neither a column precision nor {', '.join(WIDTHS)}; give each-COLUMN; "
                         f"it has {', '.join(rows.columns)}")
    return widths


def _order(value) -> tuple:
    try:
        return 0, float(value), ""
    except (TypeError, ValueError):
        return 1, 0.0, str(value or "")


@dataclass(frozen=True)
class Pooled:
    """The scores of one law on all levels of one split together. unscored: level -> why."""

    label: str
    name: str
    rows: int
    rmse: float
    bias: float
    worst: float
    rmse_nats: float
    unscored: dict[str, str]


def pool(scores: Iterable[LeftOut]) -> list[Pooled]:
    """One line per law and name of split: errors over all held-out rows of its levels, each row once."""
    groups: dict[tuple[str, str], list[LeftOut]] = {}
    for one in scores:
        groups.setdefault((one.label, one.split.name), []).append(one)
    pooled = []
    for (label, name), group in groups.items():
        scored = [one for one in group if not one.why]
        rows = sum(one.rows for one in scored)
        rmse, nats = (math.sqrt(sum(one.rows * error(one) ** 2 for one in scored) / rows) if rows else math.nan
                      for error in (lambda one: one.rmse, lambda one: one.rmse_nats))
        bias = sum(one.rows * one.bias for one in scored) / rows if rows else math.nan
        worst = max((one.worst for one in scored), key=abs, default=math.nan)
        pooled.append(Pooled(label, name, rows, rmse, bias, worst, nats, {one.split.level: one.why for one in group if one.why}))
    return pooled


def verdict(chosen: str, scores: Iterable[LeftOut]) -> str:
    """One sentence: whether the errors on left-out rows choose the law that BIC chooses. Laws compete on a split when they predict every
    level of it that any law predicts; one that cannot is named."""
    pooled = pool(scores)
    agree, against, silent = [], [], []
    for name in dict.fromkeys(one.name for one in pooled):
        group = [one for one in pooled if one.name == name]
        fewest = min(len(one.unscored) for one in group)
        complete = [one for one in group if len(one.unscored) == fewest and one.rows]
        if not complete:
            silent.append(f"no law predicts {name}")
            continue
        best = min(complete, key=lambda one: one.rmse)
        mine = next((one for one in complete if one.label == chosen), None)
        if best.label == chosen:
            agree.append(name)
        elif mine is None:
            against.append(f"{name} would choose {best.label} ({best.rmse:.2%}), for {chosen} does not predict all of it")
        else:
            against.append(f"{name} would choose {best.label} ({best.rmse:.2%} against {mine.rmse:.2%})")
    parts = [f"BIC chooses {chosen}"]
    parts += [f"{', '.join(agree)} agree{'s' * (len(agree) == 1)}"] if agree else []
    parts += [f"held-out errors disagree: {'; '.join(against)}. BIC weighs the fit to these runs, left-out rows what lies beyond them: "
              "for a prediction trust the split that is like it"] if against else []
    return "; ".join([parts[0], *silent, *parts[1:]]) + "."
