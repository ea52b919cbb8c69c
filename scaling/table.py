"""Run tables: every way to hand runs to `scaling`, as one DuckDB relation.

A folder of runs holds one `record.json` per run (written when the run ends) and one `metrics.jsonl` (appended while it trains).
`table` reads the former, `curves` the latter, also while runs are trained; files, relations and mappings of arrays pass through
`table` as well, so whatever takes a table takes any of them.
"""
from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import duckdb
import numpy as np

from scaling.files import write_whole
from scaling.folders import runs

_ROLES = ("weights", "activations", "output_gradients", "kv", "scores", "probabilities", "master_weights", "adam_m", "adam_v")
_ROLE_FIELDS = {"format": "VARCHAR", "granularity": "VARCHAR", "bits": "DOUBLE", "bits_effective": "DOUBLE", "exp_bits": "DOUBLE",
                "man_bits": "DOUBLE", "block": "DOUBLE", "rounding": "VARCHAR", "source": "VARCHAR", "log_mse": "DOUBLE"}

RUN_COLUMNS: dict[str, str] = {
    "run_id": "VARCHAR", "sweep": "VARCHAR", "status": "VARCHAR", "seed": "BIGINT", "trunk_id": "VARCHAR", "cooldown_steps": "BIGINT",
    "unique_tokens": "BIGINT", "n_params": "BIGINT", "n_params_total": "BIGINT", "tokens": "BIGINT", "flops": "DOUBLE", "loss": "DOUBLE",
    "loss_std_err": "DOUBLE", "loss_train": "DOUBLE", "bits_per_byte": "DOUBLE", "precision": "VARCHAR", "exemptions": "VARCHAR",
    **{f"{role}_{name}": kind for role in _ROLES for name, kind in _ROLE_FIELDS.items()},
    "quantized_fraction": "DOUBLE", "dot_precision": "VARCHAR", "execution": "VARCHAR", "layout": "VARCHAR", "lr_rule": "VARCHAR",
    "lr": "DOUBLE", "batch_tokens": "BIGINT", "steps": "BIGINT", "schedule": "VARCHAR", "diverged_step": "BIGINT", "wall_s": "DOUBLE",
    "tokens_per_s": "DOUBLE", "mfu": "DOUBLE", "edq": "DOUBLE", "lost_updates": "DOUBLE", "updates_per_ulp": "DOUBLE",
    "gradient_cosine": "DOUBLE", "gradient_magnitude": "DOUBLE",
    **{f"{role}_{what}": "DOUBLE" for role in _ROLES[:6] for what in ("underflow", "overflow")},
    "weights_bytes_per_param": "DOUBLE", "moments_bytes_per_param": "DOUBLE", "peak_bytes_per_param": "DOUBLE", "device": "VARCHAR",
    "n_devices": "BIGINT", "jax_version": "VARCHAR",
    "code_version": "VARCHAR", "data": "VARCHAR", "data_sha256": "VARCHAR", "record_version": "BIGINT",
}
"""Columns that every run table has, absent ones NULL, and their SQL types (section 4 of the design)."""

CURVE_COLUMNS: dict[str, str] = {"step": "BIGINT", "tokens": "BIGINT", "loss": "DOUBLE", "lr": "DOUBLE", "grad_norm": "DOUBLE",
                                 "val_loss": "DOUBLE", "val_stderr": "DOUBLE"}

TELEMETRY_COLUMNS: dict[str, str] = {"step": "BIGINT", "layer": "BIGINT", "site": "VARCHAR", "role": "VARCHAR", "rms": "DOUBLE", "amax": "DOUBLE",
                                     "underflow": "DOUBLE", "overflow": "DOUBLE", "exponent": "DOUBLE"}

_READERS = {".csv": "read_csv", ".tsv": "read_csv", ".parquet": "read_parquet", ".json": "read_json", ".jsonl": "read_json",
            ".ndjson": "read_json"}
_PACKED, _DATABASES = (".gz", ".zst"), (".duckdb", ".ddb", ".db")
TABLE_SUFFIXES = (".parquet", ".csv")
_COUNTER = itertools.count()
_FILES_AT_ONCE = 64
_QUERY = re.compile(r"\s*(SELECT|FROM|WITH|ATTACH)\s", re.IGNORECASE)
Source = "str | os.PathLike | Iterable[str | os.PathLike] | duckdb.DuckDBPyRelation | Mapping[str, object]"


def table(source: Source) -> duckdb.DuckDBPyRelation:
    """`source` as a relation: a run folder or several (every `record.json` below them), a .csv/.parquet/.json file, a mapping of
    column to array, rows that are mappings of column to value, a data frame, a relation (returned as it is), or a DuckDB query:
    text that begins with SELECT, FROM, WITH, or with the ATTACH of a database and a semicolon: "ATTACH 'lab.duckdb' (READ_ONLY);
    FROM lab.runs".

    Run folders give RUN_COLUMNS first (absent ones NULL), then every other key found in a record (`ptq_*` and one's own), one row for each
    run_id whose run is over: where there are several copies of a run, a finished one. A damaged record is left out, with a line on stderr.
    ValueError, one line, for a path that does not exist, a folder without runs, a record in a newer version, or uneven arrays.
    """
    if isinstance(source, duckdb.DuckDBPyRelation):
        return source
    if isinstance(source, Mapping):
        return _from_arrays(source)
    if isinstance(source, str) and is_query(source):
        return _from_query(source)[1]
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        return _from_file(path) if path.is_file() else _from_folders([path])
    if hasattr(source, "columns"):  # a data frame
        return _from_arrays({str(name): source[name] for name in source.columns})
    if not isinstance(source, Iterable) or isinstance(source, np.ndarray):
        raise ValueError(f"table: {type(source).__name__} is no table; give folders of runs, a file, a DuckDB relation, a data frame, or "
                         "a mapping of column to array")
    items = list(source)
    if items and all(isinstance(item, Mapping) for item in items):  # rows, as JSON has them
        return _from_arrays({key: [row.get(key) for row in items] for key in dict.fromkeys(key for row in items for key in row)})
    odd = next((item for item in items if not isinstance(item, (str, os.PathLike))), None)
    if odd is not None:
        raise ValueError(f"table: a list of {type(odd).__name__} is no table; give folders of runs, or rows, each a mapping of column to value")
    return _from_folders([Path(item) for item in items])


def is_query(source: str) -> bool:
    """Whether `table` reads the text as a query and not as a path."""
    return bool(_QUERY.match(source)) and not os.path.exists(source)


def write_table(relation: duckdb.DuckDBPyRelation, path: str | os.PathLike) -> Path:
    """Writes `relation` to `path` (.parquet or .csv), whole or not at all. Returns the path. ValueError where that cannot be."""
    write = relation.write_parquet if Path(path).suffix == ".parquet" else relation.write_csv
    try:
        return write_whole(path, lambda partial: write(str(partial)), TABLE_SUFFIXES)
    except duckdb.IOException as error:
        raise ValueError(f"out={path}: cannot be written ({str(error).splitlines()[0]})") from None


def curves(source: str | os.PathLike | Iterable[str | os.PathLike]) -> duckdb.DuckDBPyRelation:
    """Training curves: one row per line of the `metrics.jsonl` of every run below the folder(s), those still trained among them.

    Columns run_id and CURVE_COLUMNS (absent ones NULL), ordered by run and line. Copies of a run count once, as in `table`. A torn last
    line (a run killed while writing, or that is just writing) is left out; any other line that is not JSON is a ValueError that names it.
    """
    return _from_lines(source, "metrics.jsonl", CURVE_COLUMNS)


def telemetry(source: str | os.PathLike | Iterable[str | os.PathLike]) -> duckdb.DuckDBPyRelation:
    """What linear layers and attention measured: one row per line of every `telemetry.jsonl` below the folder(s): run_id and
    TELEMETRY_COLUMNS, read as `curves` are. A row is of one step, layer, site and role (weights, activations, output_gradients;
    of site attention kv, scores, probabilities); underflow and overflow are shares of its values, exponent is log2 of its scale;
    these three are NULL where nothing was quantized."""
    return _from_lines(source, "telemetry.jsonl", TELEMETRY_COLUMNS)


def _from_lines(source, name: str, columns: Mapping[str, str]) -> duckdb.DuckDBPyRelation:
    """Every whole line of the file called `name` of every run below the folder(s). DuckDB takes the JSON apart; Python's memory holds a few
    files at a time."""
    folders = [Path(source)] if isinstance(source, (str, os.PathLike)) else [Path(item) for item in source]
    found = sorted((run.path / name, run.run_id) for run in runs(folders, RUN_COLUMNS, name, tell=False) if (run.path / name).is_file())
    stored = f"lines_{next(_COUNTER)}"
    _connection().execute(f"CREATE TABLE {stored} (run_id VARCHAR, {', '.join(f'{quote(column)} {kind}' for column, kind in columns.items())})")
    for start in range(0, len(found), _FILES_AT_ONCE):
        _insert_lines(stored, found[start:start + _FILES_AT_ONCE], columns)
    return _connection().table(stored)


def _insert_lines(stored: str, files: list[tuple[Path, str]], columns: Mapping[str, str]) -> None:
    texts = [path.read_bytes().rpartition(b"\n")[0] for path, _ in files]  # what follows the last newline is torn
    try:
        arrays = {"run_id": [run_id for _, run_id in files], "text": [text.decode() for text in texts]}
        _connection().register("files_", {name: np.array(values, dtype=object) for name, values in arrays.items()})
        _connection().execute(f"""INSERT INTO {stored} SELECT run_id, unnest(json_transform(line, $structure)) FROM
            (SELECT run_id, unnest(string_split(text, chr(10))) AS line FROM files_ WHERE text <> '')""", {"structure": json.dumps(dict(columns))})
    except (duckdb.Error, UnicodeDecodeError) as error:
        for (path, _), text in zip(files, texts, strict=True):
            for number, line in enumerate(text.split(b"\n"), 1):
                try:
                    json.loads(line)
                except ValueError as broken:
                    raise ValueError(f"{path}:{number}: not a JSON line ({broken})") from None
        raise ValueError(f"{files[0][0]} and the next {len(files) - 1}: {str(error).splitlines()[0]}") from None
    finally:
        _connection().unregister("files_")


def _from_folders(folders: list[Path]) -> duckdb.DuckDBPyRelation:
    records = [{"run_id": run.run_id} | {k: v for k, v in run.record.items() if v is not None} for run in runs(folders, RUN_COLUMNS) if run.record]
    keys = dict.fromkeys(key for record in records for key in record if key not in RUN_COLUMNS)
    extra = {key: _sql_type(records, key) for key in keys}
    return _from_rows(records, RUN_COLUMNS | extra)


def _sql_type(records: list[dict], key: str) -> str:
    """The SQL type of an extra key: DOUBLE when every value is a number, else text (JSON for lists and objects)."""
    values = [record[key] for record in records if key in record]
    return "DOUBLE" if all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values) else "VARCHAR"


def _from_rows(rows: list[dict], types: dict[str, str]) -> duckdb.DuckDBPyRelation:
    """Rows of JSON values as a relation with the given columns and types, in order. Text values of numeric columns must parse."""
    def cell(value):
        return json.dumps(value) if isinstance(value, (dict, list, bool)) else value
    arrays = {}
    for name, kind in types.items():
        values = [cell(row.get(name)) for row in rows]
        # Text keeps integers beyond 2^53 and the difference between NULL and NaN; DuckDB casts it to the column's type.
        arrays[name] = np.array([None if v is None else str(v) for v in values], dtype=object)
    select = ", ".join(f"CAST({quote(name)} AS {kind}) AS {quote(name)}" for name, kind in types.items())
    if not rows:
        empty = ", ".join(f"CAST(NULL AS {kind}) AS {quote(name)}" for name, kind in types.items())
        return _connection().sql(f"SELECT {empty} WHERE false")
    try:
        return _stored(arrays, select)
    except duckdb.ConversionException as error:
        raise ValueError(f"run table: {str(error).splitlines()[0]}") from None


def _from_arrays(arrays: Mapping[str, object]) -> duckdb.DuckDBPyRelation:
    columns = {str(name): _array(values) for name, values in arrays.items()}
    lengths = {name: values.shape for name, values in columns.items()}
    if not columns or any(len(shape) != 1 for shape in lengths.values()) or len(set(lengths.values())) != 1:
        raise ValueError(f"table: columns must be one-dimensional and equally long; got {lengths or 'no columns'}")
    try:
        return _stored(columns, "*")
    except duckdb.Error as error:
        raise ValueError(f"table: {first_line(error)}; dtypes are "
                         f"{', '.join(f'{name} {values.dtype}' for name, values in columns.items())}") from None


def _array(values: object) -> np.ndarray:
    """`values` as an array that DuckDB takes: masked numbers become NaN, bfloat16 and its like float64; views are copied."""
    if isinstance(values, np.ma.MaskedArray):
        values = np.ma.filled(values.astype(np.float64 if values.dtype.kind in "iuf" else object), np.nan if values.dtype.kind in "iuf" else None)
    array = np.asarray(values)
    array = array if array.flags.c_contiguous else array.copy()
    return array.astype(np.float64) if array.dtype.kind == "V" and array.dtype.names is None else array


def _from_file(path: Path) -> duckdb.DuckDBPyRelation:
    suffix = Path(path.stem if path.suffix.lower() in _PACKED else path.name).suffix.lower()
    if suffix in _DATABASES:
        raise ValueError(f"{path}: a database holds many tables; name one in a query: \"ATTACH '{path}' AS lab (READ_ONLY); FROM lab.NAME\"")
    if suffix not in _READERS:
        raise ValueError(f"{path}: cannot read {path.suffix or 'a file without suffix'}; known are {', '.join(_READERS)}, or a run folder")
    if not path.stat().st_size:
        raise ValueError(f"{path}: the file is empty")
    reader = getattr(_connection(), _READERS[suffix])
    options = {"sep": "\t"} if suffix == ".tsv" else {}  # numbers with commas in them look like columns otherwise
    try:
        return reader(str(path), **options)
    except duckdb.Error as error:
        raise ValueError(f"{path}: {first_line(error)}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not text in UTF-8, as {suffix} must be") from None


@functools.cache
def _from_query(query: str) -> tuple[duckdb.DuckDBPyConnection, duckdb.DuckDBPyRelation]:
    """A connection of its own, so that what a query attaches is attached once however often the query is asked, and the lazy relation."""
    connection = duckdb.connect()
    try:
        relation = connection.sql(query)
    except duckdb.Error as error:
        raise ValueError(f"query {query!r}: {first_line(error)}") from None
    return connection, relation


@functools.cache
def _connection() -> duckdb.DuckDBPyConnection:
    """The in-memory database that holds tables made here. One for the process: before DuckDB 2, a relation dies with its connection."""
    return duckdb.connect()


def _stored(arrays: dict[str, np.ndarray], select: str) -> duckdb.DuckDBPyRelation:
    """`select` over the arrays as a table of its own, so that nothing refers to the caller's arrays any more.

    Equal arrays share one table, so that a hundred fits of one mapping do not leave a hundred tables. A table is never dropped: before
    DuckDB 2 a relation derived from another keeps only the name of the table. What is returned cannot be inserted into, for the same reason.
    """
    name = f"table_{_digest(arrays, select)}"
    _connection().register("arrays_", arrays)
    try:
        _connection().execute(f"CREATE TABLE IF NOT EXISTS {name} AS SELECT {select} FROM arrays_")
    finally:
        _connection().unregister("arrays_")
    return _connection().table(name).select("*")


def _digest(arrays: dict[str, np.ndarray], select: str) -> str:
    """Equal for equal names, types, values and `select`. A column of objects that cannot be pickled is equal to no other."""
    seen = hashlib.blake2b(select.encode(), digest_size=16)
    for name, values in arrays.items():
        try:
            content = pickle.dumps(values.tolist()) if values.dtype.hasobject else values.tobytes()
        except (pickle.PicklingError, TypeError, AttributeError):
            content = str(next(_COUNTER)).encode()
        seen.update(repr((name, values.dtype, values.shape, len(content))).encode() + content)
    return seen.hexdigest()


def first_line(error: duckdb.Error) -> str:
    """What DuckDB's error of many lines says in one: the first, and of a CSV file, where that is but a line number, what is wrong there."""
    first, *rest = str(error).splitlines()
    why = next((line for line in rest if "Could not convert" in line or "Invalid unicode" in line or "Expected Number of Columns" in line), "")
    return f"{first}: {why}" if "CSV Error" in first and why else first


def quote(name: str) -> str:
    """`name` as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'
