"""Run tables from folders, files, arrays and relations; training curves; files written whole."""
from __future__ import annotations

import importlib
import json
from pathlib import Path

import duckdb
import numpy as np
import pytest

import scaling
from scaling import folders
from scaling.cli import run
from scaling.table import RUN_COLUMNS
from tests.scaling import fake_runs, straight


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


def stored_tables() -> int:
    """How many tables the process keeps for mappings."""
    connection = importlib.import_module("scaling.table")._connection()
    return connection.execute("SELECT count(*) FROM duckdb_tables()").fetchall()[0][0]


def test_fits_of_one_mapping_keep_one_table():
    mapping = straight.runs() | {"note": np.array(["a", None] * 12, dtype=object)}
    before = stored_tables()
    for _ in range(50):
        scaling.fit(mapping, straight.power, loss="least_squares")
    assert stored_tables() == before + 1


def test_a_kept_table_is_that_of_its_own_values():
    """A value, type, name or order that differs is another table, whatever became of the arrays since."""
    values = np.arange(4.0)
    first = scaling.table({"a": values, "b": ["x", "y", None, "z"]})
    derived = first.filter("a > 1").order("a")
    values[3] = 9.0
    second = scaling.table({"a": values, "b": ["x", "y", None, "z"]})
    assert (derived.fetchall(), second.filter("a > 1").order("a").fetchall()) == ([(2.0, None), (3.0, "z")], [(2.0, None), (9.0, "z")])
    alike = [{"a": np.arange(4)}, {"a": np.arange(4, dtype=np.int32)}, {"A2": np.arange(4)}, {"a": np.arange(4)[::-1]}, {"a": np.arange(4.0) + 0.5},
             {"a": np.array([0, 1, 2, None], dtype=object)}, {"a": np.array(["0", "1", "2", None], dtype=object)}]
    for arrays in (*alike, *alike):
        (name, told), = arrays.items()
        made = scaling.table(arrays)
        assert made.columns == [name] and [row[0] for row in made.fetchall()] == told.tolist()
    with pytest.raises(duckdb.Error):
        first.insert([1.0, "w"])
    assert len(scaling.table({"a": np.arange(4.0), "b": ["x", "y", None, "z"]})) == 4


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
    (lambda p: scaling.table(p / "newer"), "newer/run/record.json has record_version 2; this bitlaw reads up to 1"),
    (lambda p: scaling.curves(p / "newer"), "newer/run/record.json has record_version 2; this bitlaw reads up to 1"),
    (lambda p: scaling.write_table(scaling.table({"a": [1]}), "/proc/x.csv"), "out=/proc/x.csv: cannot be written"),
    (lambda p: scaling.write_table(scaling.table({"a": [1]}), "/proc/x.parquet"), "out=/proc/x.parquet: cannot be written"),
    (lambda p: scaling.write_table(scaling.table({"a": [1]}), p / "x.xlsx"), "cannot write .xlsx; use .parquet or .csv"),
    (lambda p: scaling.write_table(scaling.table({"a": [1]}), p / "no" / "x.csv"), "does not exist"),
    (lambda p: scaling.curves(p / "x.txt"), "is a file"),
])
def test_refusals_are_one_line(tmp_path, make, message):
    (tmp_path / "x.txt").write_text("a")
    (tmp_path / "bad.parquet").write_text("a")
    if message != "no record.json below it":
        write(tmp_path, "newer/run", {"record_version": 2, "status": "done"})
    with pytest.raises(ValueError) as error:
        make(tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_columns_and_version_are_those_that_the_trainer_writes():
    records = pytest.importorskip("trainer.records")
    assert list(RUN_COLUMNS) == list(records.RECORD_COLUMNS)
    assert folders.RECORD_VERSION == records.RECORD_VERSION


# --- folders as sweeps leave them -----------------------------------------------------------------------------------------


DAMAGES = {"torn": ('{"status": "do', "not a JSON record"), "empty": ("", "not a JSON record"), "list": ("[]", "this is a list"), "text": ('{"loss": "low"}', "loss is 'low'"),
           "number": ('{"status": 3}', "status is 3"), "version": ('{"record_version": "x"}', "record_version is 'x'")}  # fmt: skip


def test_damaged_records_are_left_out_one_line_each(tmp_path, capsys):
    """Truncated, half copied, or not what a run writes: the others' table stands, and no file is passed over in silence."""
    for name, (record, _) in DAMAGES.items():
        write(tmp_path, name, record, '{"step": 1}\n')
    write(tmp_path, "bytes", None)
    (tmp_path / "bytes" / "record.json").write_bytes(b'{"status": "\xff"}')
    write(tmp_path, "whole", {"status": "done", "loss": 2.0})
    assert scaling.table(tmp_path).select("run_id, loss").fetchall() == [("whole", 2.0)]
    lines = sorted(capsys.readouterr().err.splitlines())
    expected = sorted([(name, reason) for name, (_, reason) in DAMAGES.items()] + [("bytes", "not a JSON record")])
    assert len(lines) == len(expected)
    for line, (name, reason) in zip(lines, expected, strict=True):
        assert line.startswith(f"bitlaw: {tmp_path / name / 'record.json'} is left out: ") and reason in line
    assert len(scaling.curves(tmp_path)) == len(DAMAGES) and capsys.readouterr().err == ""


def test_copies_of_a_run_are_one_row(tmp_path, capsys):
    """A sweep made on several machines and copied together: a finished record wins over a failed one, over a damaged and over none, wherever
    it lies; of two finished ones the first folder's; curves are those of the copy that won, or that got furthest."""
    line = '{"step": %d, "loss": 1.0}\n'
    write(tmp_path / "one", "r", {"run_id": "r", "status": "failed"}, line % 1)
    write(tmp_path / "two", "r", {"run_id": "r", "status": "diverged", "diverged_step": 2}, line % 2)
    write(tmp_path / "three", "r (copy)", {"run_id": "r", "status": "done", "loss": 9.0}, line % 3)
    write(tmp_path / "four", "r", '{"run_id": "r", "sta', line % 4)
    write(tmp_path / "five", "r", None, line % 5 * 9)
    for place, steps in (("one", 2), ("two", 3)):
        write(tmp_path / place, "s", None, "".join(line % step for step in range(steps)))
        (tmp_path / place / "s" / "config.json").write_text('{"run_id": "sss"}')
    order = [tmp_path / place for place in ("five", "four", "one", "two", "three")]
    for source in (order, tmp_path):
        assert scaling.table(source).select("run_id, status").fetchall() == [("r", "done" if source is tmp_path else "diverged")]
        steps = scaling.curves(source).order("run_id, step").select("run_id, step").fetchall()
        assert steps == [("r", 3 if source is tmp_path else 2), ("sss", 0), ("sss", 1), ("sss", 2)]


def test_records_of_before_the_version_are_read(tmp_path, capsys):
    """A run folder as bitlaw 0.1 left it, without record_version and with fewer columns."""
    old = Path(__file__).parents[1] / "golden" / "run_folder_v1"
    runs = scaling.table(old)
    row = runs.select("run_id, status, record_version, n_params, steps, precision, weights_bits").fetchall()
    assert row == [(json.loads((old / "config.json").read_text())["run_id"], "done", None, 568, 3, "int4", 4.0)]
    assert runs.columns == list(RUN_COLUMNS) and len(scaling.curves(old)) == 4 and capsys.readouterr().err == ""


def test_a_sweep_can_be_read_while_it_runs(tmp_path, monkeypatch, capsys):
    """Run folders in every state of being made: no file, a config only, a line half written, a record that is taken away (its run is tried
    again) between being seen and being opened."""
    (tmp_path / "plan.json").write_text('{"run_ids": ["a"]}')
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.json").write_text('{"run_id": "begun"}')
    assert len(scaling.table(tmp_path)) == len(scaling.curves(tmp_path)) == len(scaling.telemetry(tmp_path)) == 0
    assert scaling.table(tmp_path).columns == list(RUN_COLUMNS)
    (tmp_path / "empty").mkdir()
    write(tmp_path, "torn", None, '{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    write(tmp_path, "first", None, '{"step"')
    write(tmp_path, "done [a*] ü", {"status": "done", "loss": 2.5}, '{"step": 1, "loss": 2.5}\n')
    write(tmp_path, "retried", {"status": "failed"}, '{"step": 1, "loss": null}\n')
    read_bytes = Path.read_bytes

    def vanishing(path):
        if path == tmp_path / "retried" / "record.json":
            path.unlink(missing_ok=True)
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", vanishing)
    assert scaling.table(tmp_path).select("run_id, loss").fetchall() == [("done [a*] ü", 2.5)]
    rows = [("done [a*] ü", 1, 2.5), ("retried", 1, None), ("torn", 1, 2.0)]
    assert scaling.curves(tmp_path).select("run_id, step, loss").fetchall() == rows and capsys.readouterr().err == ""


def test_curves_keep_the_order_of_runs_and_lines(tmp_path, monkeypatch):
    """Read a few files at a time, by DuckDB's threads."""
    monkeypatch.setattr(importlib.import_module("scaling.table"), "_FILES_AT_ONCE", 3)
    expected = []
    for run in range(10):
        steps = [(7 * line) % 1001 for line in range(1 + 300 * (run % 3))]
        write(tmp_path, f"r{run}", None, "".join(f'{{"step": {step}}}\n' for step in steps))
        expected += [(f"r{run}", step) for step in steps]
    assert scaling.curves(tmp_path).select("run_id, step").fetchall() == expected


def test_command_line_takes_what_fit_takes(tmp_path, demo_runs, capsys):
    """A file or a query of other names becomes a run table, whose fit is that of the original; folders are filtered by the same options."""
    rows = fake_runs.rows()
    named = {"params": rows["n_params"], "tokens seen": rows["tokens"], "final": rows["loss"], "bits": rows["weights_bits"], "note": rows["precision"]}
    ours = scaling.write_table(scaling.table(named), tmp_path / "ours.csv")
    columns = 'N=params,D="tokens seen",loss=final,weights_bits=bits,activations_bits=bits'
    for i, source in enumerate((str(ours), f"FROM '{ours}'")):
        out = tmp_path / f"runs{i}.parquet"
        assert run("table", [source, "--columns", columns, "--where", "params > 3000", "--out", str(out)]) == 0
        assert "36 runs (36 no status)" in capsys.readouterr().out
        made = scaling.table(out)
        assert set(RUN_COLUMNS) <= set(made.columns) and {"note", "params"} <= set(made.columns) and len(made) == 36
        found, wanted = scaling.fit(out, "kumar:tied+plain").params, scaling.fit(rows, "kumar:tied+plain", where="n_params > 3000").params
        assert found == pytest.approx(wanted, rel=1e-6)
    assert run("table", [str(demo_runs), "--where", "status = 'done'", "--out", str(tmp_path / "done.csv")]) == 0
    assert "46 runs (46 done)" in capsys.readouterr().out


@pytest.mark.parametrize(("sources", "options", "message"), [
    (["ours.csv", "RUNS"], [], "ours.csv is a file or a query, which is read alone; put several together by a query"),
    (["ours.csv"], [], "a run table needs n_params; this one has size, tokens, loss (name them: --columns n_params=...)"),
    (["ours.csv"], ["--columns", "size=size"], "columns: 'size' is no column of a run table"),
    (["RUNS"], ["--where", "loss > 99"], "where loss > 99 leaves none of 48 rows"),
    (["none"], [], "none: no such file or folder"),
])
def test_command_line_refuses_in_one_line(sources, options, message, tmp_path, demo_runs, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ours.csv").write_text("size,tokens,loss\n1e5,1e6,3.0\n")
    assert run("table", [*(str(demo_runs) if source == "RUNS" else source for source in sources), *options, "--out", "out.csv"]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and not (tmp_path / "out.csv").exists()
