"""The rows of a table that pass its filters, with the mapped inputs as columns of their own: what splits and first stages choose from."""
from __future__ import annotations

from collections.abc import Mapping

import duckdb

from scaling.observations import DEFAULT_COLUMNS
from scaling.table import Source, quote, table


def eligible(source: Source, columns: Mapping[str, str] | None, where: str | None, holdout: str | None) -> duckdb.DuckDBPyRelation:
    """The done rows of `source` that pass `where` and are not in `holdout`, with the mapped inputs as columns of their own."""
    relation = table(source)
    mapped = {name: quote(DEFAULT_COLUMNS[name]) for name in ("N", "D") if DEFAULT_COLUMNS[name] in relation.columns and name not in relation.columns}
    mapped |= dict(columns or {})
    numeric = {"N", "D", "loss"}
    inputs = [f"{f'CAST(({sql}) AS DOUBLE)' if name in numeric else f'({sql})'} AS {quote(name)}" for name, sql in mapped.items()]
    shadowed = {name.lower() for name in mapped}
    rows = counted("columns", lambda: relation.project(", ".join(inputs + [quote(n) for n in relation.columns if n.lower() not in shadowed])))
    conditions = {"status": "status IS NULL OR status = 'done'"} if "status" in rows.columns else {}
    conditions |= {f"where {where}": where} if where else {}
    conditions |= {f"holdout {holdout}": f"NOT coalesce(CAST(({holdout}) AS BOOLEAN), false)"} if holdout else {}
    for what, condition in conditions.items():
        flagged = counted(what, lambda condition=condition, rows=rows: rows.project(
            f"*, coalesce(CAST(({condition}) AS BOOLEAN), false) AS keep_"))
        rows = flagged.filter("keep_").project("* EXCLUDE (keep_)")
    return rows


def counted(what: str, run):
    """What `run()` returns. Relations are lazy: its length is taken here, so that DuckDB's error is told in one line beside what caused it."""
    try:
        result = run()
        len(result)
        return result
    except duckdb.Error as error:
        raise ValueError(f"{what}: {str(error).splitlines()[0]}") from None
