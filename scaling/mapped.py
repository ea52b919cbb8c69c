"""Columns of a table by SQL expressions, and the rows that filters leave: what every reader of other people's tables shares.

Each error is one line that says which of the caller's expressions was at fault, what the table has, and what would do.
"""
from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from contextlib import contextmanager

import duckdb

from scaling.table import first_line, quote

KEEP = '"bitlaw keep"'  # a column of its own: no table has such a name


def mapped_rows(relation: duckdb.DuckDBPyRelation, mapping: Mapping[str, str], numeric: Iterable[str], filters: Mapping[str, str],
                who: str) -> list[duckdb.DuckDBPyRelation]:
    """[all rows, those that the first filter leaves, ...]: the inputs of `mapping` (input -> SQL), then the table's own columns, less those
    that an input shadows (SQL ignores case).

    numeric: inputs that are DOUBLE in the last stage. A text column with values that are no numbers stays text until the filters are
    through, since they may leave these rows out; ValueError when they do not. filters: what to call it -> condition, NULL counts as
    false. who: needs the numbers, for messages.
    """
    inputs = ", ".join(f"({sql}) AS {quote(name)}" for name, sql in mapping.items())
    with one_line("columns", relation.columns):
        kinds = dict(zip(mapping, map(str, relation.project(inputs).types), strict=True)) if mapping else {}
    for name in numeric:
        if kinds[name].endswith("]") or kinds[name].startswith(("STRUCT", "MAP")):
            raise ValueError(f"{name} ({mapping[name]}) is {kinds[name]}, not one value in each row; {who} needs a number in each: take "
                             "the values apart in a query (SELECT unnest(...) ...)")
    raw = {name: f"CAST(({mapping[name]}) AS VARCHAR)" for name in numeric if kinds[name] == "VARCHAR" or kinds[name].startswith("ENUM")}
    text = [name for name, sql in raw.items() if len(project(relation, f"{_no_number(sql)} AS {KEEP}", "").filter(KEEP))]
    shadowed = {name.lower() for name in mapping}
    selected = [f"CAST(({sql}) AS DOUBLE) AS {quote(name)}" if name in numeric and name not in text else f"({sql}) AS {quote(name)}"
                for name, sql in mapping.items()]
    stages = [project(relation, ", ".join(selected + [quote(name) for name in relation.columns if name.lower() not in shadowed]), "columns")]
    for reason, condition in filters.items():
        flagged = project(stages[-1], f"*, {boolean(condition)} AS {KEEP}", reason)
        stages.append(flagged.filter(KEEP).project(f"* EXCLUDE ({KEEP})"))
    for name in text:
        stages[-1] = _numbers(stages[-1], name, mapping[name], who)
    return stages


def boolean(condition: str) -> str:
    return f"coalesce(CAST(({condition}) AS BOOLEAN), false)"


@contextmanager
def one_line(what: str, found: Iterable[str] = ()):
    """Turns DuckDB's many-line errors into one line that says which of the caller's expressions was at fault, and, for a column that is
    not there, which are."""
    try:
        yield
    except duckdb.Error as error:
        unknown = re.search(r'column "(.+?)" not found', str(error))
        own = [name for name in found if not name.startswith("bitlaw ")]  # not KEEP and its like
        raise ValueError(f"{what}: {first_line(error)}{_instead(unknown.group(1), own) if unknown else ''}") from None


def project(relation: duckdb.DuckDBPyRelation, select: str, what: str) -> duckdb.DuckDBPyRelation:
    """`select` over `relation`. Names that are not there are told here, as `what`; values that cannot be made, when rows are fetched: relations are
    lazy, and a count does not look at what a projection says.

    Not `relation.query(name, sql)`: a table of that name in the caller's connection would be read instead, silently.
    """
    with one_line(what, relation.columns):
        return relation.project(select)


def suggested(name: str, found: Iterable[str]) -> str:
    """What to write for an input: the column that is called so but for case, or dots."""
    same = [column for column in found if column.lower() == name.lower()]
    return same[0] if len(same) == 1 else "..."


def _instead(name: str, found: list[str]) -> str:
    by_case = {column.lower(): column for column in found}
    close = [by_case[low] for low in difflib.get_close_matches(name.lower(), by_case, 2)]
    return (f" Did you mean {' or '.join(map(quote, close))}?" if close else "") + f" The table has {', '.join(found)}"


def _no_number(sql: str) -> str:
    return f"({sql}) IS NOT NULL AND TRY_CAST({sql} AS DOUBLE) IS NULL"


def _numbers(relation: duckdb.DuckDBPyRelation, name: str, expression: str, who: str) -> duckdb.DuckDBPyRelation:
    """The rows with a text column as numbers. ValueError when a value is none, with how to make it one."""
    sql = f"CAST({quote(name)} AS VARCHAR)"
    bad = relation.filter(_no_number(sql)).project(f"{sql} AS value_")
    rows = bad.fetchall()
    if rows:
        value = min(value for value, in rows)
        raise ValueError(f"{name} ({expression}) is text in {len(rows)} of {len(relation)} rows, such as {value!r}; {who} needs numbers, so "
                         f"{_remedy(name, expression, value)}")
    return relation.project(f"* REPLACE (TRY_CAST({sql} AS DOUBLE) AS {quote(name)})")


def _remedy(name: str, expression: str, value: str) -> str:
    """How to make numbers of such a text."""
    if re.fullmatch(r"\s*-?\d{1,3}(,\d{3})+(\.\d*)?\s*", value):
        return f"take the commas out: columns {name}=replace({expression}, ',', '')"
    if re.fullmatch(r"\s*-?\d+,\d+\s*", value):
        return f"make the comma a point: columns {name}=replace({expression}, ',', '.')"
    if re.match(r"\s*\d", value) or (name.endswith("_bits") and re.search(r"\d", value)):
        return ("take the number out of it, times its unit: columns "
                f"{name}=TRY_CAST(regexp_extract({expression}, '[0-9.]+') AS DOUBLE), or filter these out with where")
    unquantized = (f", or, where that means unquantized, read it as missing: columns {name}=TRY_CAST({expression} AS DOUBLE)"
                   if name.endswith("_bits") else "")
    return f"filter these out with where{unquantized}"
