"""Run tables from folders, files, arrays and relations; training curves; files written whole."""
from __future__ import annotations

import json

import duckdb
import numpy as np
import pytest

import scaling
from scaling.table import RUN_COLUMNS


def write(folder, run_id, record, metrics=""):
    path = folder / run_id
    path.mkdir(parents=True)
    if record is not None:
        (path / "record.json").write_text(record if isinstance(record, str) else json.dumps(record))
    (path / "metrics.jsonl").write_text(metrics)


def test_every_column_of_the_design_is_there_in_order(tmp_path):
    write(tmp_path, "a", {"run_id": "a", "status": "done", "loss": 2.5, "tokens": 2**60 + 1, "ptq_int4": 3.5, "mine": {"x": [1]}})
    write(tmp_path, "deep/b", {"status": "diverged", "loss": None, "weights_bits": 4, "ptq_int4": 4, "tag": "t"})
    write(tmp_path, "running", None)
    runs = scaling.table(tmp_path)
    assert runs.columns == [*RUN_COLUMNS, "ptq_int4", "mine", "tag"]
    rows = runs.order("run_id").select("run_id, status, loss, tokens, weights_bits, ptq_int4, mine, tag").fetchall()
    assert rows == [("a", "done", 2.5, 2**60 + 1, None, 3.5, '{"x": [1]}', None), ("b", "diverged", None, None, 4.0, 4.0, None, "t")]


def test_several_folders_are_one_table(tmp_path):
    for name in ("one", "two"):
        write(tmp_path / name, f"run-{name}", {"status": "done", "loss": 1.0})
    assert len(scaling.table([tmp_path / "one", tmp_path / "two"])) == 2
    assert len(scaling.table([tmp_path, tmp_path / "one"])) == 2  # a run found twice counts once


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_written_tables_read_back(tmp_path, demo_runs, suffix):
    runs = scaling.table(demo_runs)
    again = scaling.table(scaling.write_table(runs, tmp_path / f"runs{suffix}"))
    select = "run_id, status, n_params, tokens, loss, weights_bits"
    assert again.order("run_id").select(select).fetchall() == runs.order("run_id").select(select).fetchall()
    assert [path.name for path in tmp_path.iterdir()] == [f"runs{suffix}"]  # nothing half-written beside it


def test_arrays_json_and_relations_pass_through(tmp_path):
    arrays = {"N": np.array([1, 2]), "name": ["x", None]}
    assert scaling.table(arrays).fetchall() == [(1, "x"), (2, None)]
    (tmp_path / "t.json").write_text('[{"N": 1}, {"N": 2}]')
    assert scaling.table(tmp_path / "t.json").fetchall() == [(1,), (2,)]
    relation = duckdb.connect().sql("SELECT 1 AS N")
    assert scaling.table(relation) is relation


def test_a_relation_is_not_confused_with_a_table_called_runs():
    """A temporary name inside the caller's connection would be shadowed by a table of that name, silently."""
    connection = duckdb.connect()
    connection.execute("CREATE TABLE runs AS SELECT range AS i, 1e3 * (1 + range % 3) AS size, 1e5 * (1 + range // 3) AS d, "
                       "3.0 - 0.05 * range AS loss FROM range(9)")
    doubled = connection.table("runs").project("size * 2 AS N, d AS D, loss + 1 AS loss")
    fit = scaling.fit(doubled, "chinchilla:tied", where="N > 0", holdout="D = max(D) OVER ()")
    assert fit.ranges["N"] == (2e3, 6e3) and fit.metrics["rows"] == 6


def test_curves_keep_every_line_and_drop_a_torn_one(tmp_path):
    lines = '{"step": 1, "tokens": 64, "loss": 5.5}\n{"step": 2, "tokens": 128, "loss": null, "val_loss": 4.5}\n{"step": 3, "tok'
    write(tmp_path, "a", None, lines)
    rows = scaling.curves(tmp_path).select("run_id, step, tokens, loss, val_loss").fetchall()
    assert rows == [("a", 1, 64, 5.5, None), ("a", 2, 128, None, 4.5)]
    write(tmp_path, "b", None, '{"step": 1\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl:1: not a JSON line"):
        scaling.curves(tmp_path)


@pytest.mark.parametrize(("make", "message"), [
    (lambda p: scaling.table(p / "none"), "no such file or folder"),
    (lambda p: scaling.table(p), "no record.json below it"),
    (lambda p: scaling.table([]), "no folder given"),
    (lambda p: scaling.table(p / "x.txt"), "cannot read .txt"),
    (lambda p: scaling.table(p / "bad.parquet"), "bad.parquet: "),
    (lambda p: scaling.table({"a": [1], "b": [1, 2]}), "equally long"),
    (lambda p: scaling.table(p / "torn"), "not a JSON record"),
    (lambda p: scaling.table(p / "list"), "a record is a JSON object, this is a list"),
    (lambda p: scaling.table(p / "text"), "run table: "),
    (lambda p: scaling.write_table(scaling.table({"a": [1]}), p / "x.xlsx"), "cannot write .xlsx; use .parquet or .csv"),
    (lambda p: scaling.write_table(scaling.table({"a": [1]}), p / "no" / "x.csv"), "does not exist"),
    (lambda p: scaling.curves(p / "x.txt"), "is a file"),
])
def test_refusals_are_one_line(tmp_path, make, message):
    (tmp_path / "x.txt").write_text("a")
    (tmp_path / "bad.parquet").write_text("a")
    for name, record in (("torn", "{"), ("list", "[]"), ("text", '{"loss": "low"}')):
        if message != "no record.json below it":
            write(tmp_path, f"{name}/run", record)
    with pytest.raises(ValueError) as error:
        make(tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_columns_are_those_that_the_trainer_writes():
    records = pytest.importorskip("trainer.records")
    assert list(RUN_COLUMNS) == list(records.RECORD_COLUMNS)
