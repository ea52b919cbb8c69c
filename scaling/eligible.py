"""The rows of a table that pass its filters, with the mapped inputs as columns of their own: what splits choose from."""
from __future__ import annotations

from collections.abc import Mapping

import duckdb

from scaling.mapped import boolean, mapped_rows
from scaling.observations import RUN_ALIASES
from scaling.table import Source, quote, table


def eligible(source: Source, columns: Mapping[str, str] | None, where: str | None, holdout: str | None) -> duckdb.DuckDBPyRelation:
    """The done rows of `source` that pass `where` and are not in `holdout`, with the mapped inputs as columns of their own."""
    relation = table(source)
    mapped = {name: quote(own) for name, own in RUN_ALIASES.items() if own in relation.columns and name not in relation.columns}
    mapped |= dict(columns or {})
    mapped |= {"loss": quote("loss")} if "loss" in relation.columns and "loss" not in mapped else {}
    filters = {"status": "status IS NULL OR status = 'done'"} if "status" in relation.columns else {}
    filters |= {f"where {where}": where} if where else {}
    filters |= {f"holdout {holdout}": f"NOT {boolean(holdout)}"} if holdout else {}
    return mapped_rows(relation, mapped, [name for name in mapped if name in ("N", "D", "loss")], filters, "every law")[-1]
