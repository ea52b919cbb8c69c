"""`bitlaw fit`, `compare` and `report` on folders, CSV, Parquet and DuckDB queries with columns of other names, end to end."""
from __future__ import annotations

import re

import duckdb
import numpy as np
import pytest

import scaling
from scaling.analysis import analyse
from scaling.cli import run
from tests.scaling import fake_runs

COLUMNS = 'N="Model, size (M)"*1e6,D="compute"/6/("Model, size (M)"*1e6),loss="val/loss"'
BITS = 'weights_bits=CASE WHEN "fmt" = \'float32\' THEN 32 ELSE CAST(right("fmt", 1) AS INT) END'
BOTH = f'{COLUMNS},{BITS},{BITS.replace("weights", "activations")}'
LARGEST = "N = max(N) OVER ()"


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """kind -> what the command line is given for one table: awkward names, sizes in millions, compute instead of tokens, formats by name."""
    folder = tmp_path_factory.mktemp("foreign")
    rows = fake_runs.rows()
    made = {"Model, size (M)": rows["n_params"] / 1e6, "compute": 6.0 * rows["n_params"] * rows["tokens"], "val/loss": rows["loss"], "fmt": rows["precision"]}
    relation = scaling.table(made)
    relation.write_csv(str(folder / "t.csv"))
    relation.write_parquet(str(folder / "t.parquet"))
    with duckdb.connect(str(folder / "lab.duckdb")) as database:
        database.execute(f"CREATE TABLE \"my runs\" AS FROM '{folder / 't.parquet'}'")
    return {"csv": str(folder / "t.csv"), "parquet": str(folder / "t.parquet"), "query": f"SELECT * FROM '{folder}/t.parquet' WHERE \"val/loss\" > 0",
            "from": f"from '{folder}/*.csv'", "with": f"WITH t AS (FROM '{folder}/t.csv') FROM t",
            "database": f"ATTACH '{folder}/lab.duckdb' AS lab (READ_ONLY); FROM lab.\"my runs\""}


@pytest.fixture(scope="module")
def expected():
    return scaling.fit(fake_runs.rows(), "kumar:tied+plain", holdout=LARGEST)


@pytest.mark.parametrize("kind", ["csv", "parquet", "query", "from", "with", "database"])
def test_fit_of_any_source(foreign, expected, kind, tmp_path, capsys):
    out = tmp_path / "FIT.json"
    assert run("fit", [foreign[kind], "--law", "kumar:tied+plain", "--columns", BOTH, "--holdout", LARGEST, "--out", str(out)]) == 0
    fitted = scaling.load(out)
    for name, value in expected.params.items():
        assert fitted.params[name] == pytest.approx(value, rel=1e-5), name
    assert fitted.metrics["held_out"]["rows"] == 12 and "36 rows fitted" in capsys.readouterr().out


def test_fit_of_a_folder_with_a_mapping(demo_runs, tmp_path, capsys):
    out = tmp_path / "FIT.json"
    assert run("fit", [str(demo_runs), "--law", "chinchilla", "--columns", "N=n_params_total,D=flops/6/n_params", "--where", "precision = 'float32'",
                       "--out", str(out)]) == 0
    sizes = scaling.load(out).ranges["N"]
    assert sizes == (2_304 + 8_192, 24_576 + 8_192)


@pytest.mark.parametrize("kind", ["csv", "database"])
def test_compare_names_every_constant(foreign, kind, capsys):
    assert run("compare", [foreign[kind], "--laws", "chinchilla,kumar:tied+plain,free_efficiency", "--columns", f'{BOTH},scheme="fmt"',
                           "--holdout", LARGEST]) == 0
    out = capsys.readouterr().out
    assert re.search(r"eff\[int3\].* 0\.", out) and "eff[float32]" in out and "1 (fixed)" in out


def test_fit_prints_names_of_levels(foreign, capsys):
    assert run("fit", [foreign["csv"], "--law", "free_efficiency", "--columns", f'{COLUMNS},scheme="fmt"']) == 0
    assert re.search(r"│ eff\[int3\] +│ +0\.", capsys.readouterr().out)


@pytest.mark.parametrize("kind", ["parquet", "query"])
def test_report_of_a_foreign_table(foreign, kind, tmp_path, capsys):
    out = tmp_path / "report.html"
    columns = BOTH.replace("N=", "n_params=").replace(",D=", ",tokens=") + ',precision="fmt"'
    assert run("report", [foreign[kind], "--out", str(out), "--bootstrap", "0", "--columns", columns]) == 0
    told, page = capsys.readouterr().out, out.read_text()
    assert "What low precision costs: in nats per token over float32, int3 +" in told
    assert "48 of 48" in page and "4 × 3 × 4" in page and "row 48" in page and "Gallery of precisions" in page
    seen = analyse(foreign[kind], 0, columns=dict(N='"Model, size (M)"*1e6', D='"compute"/6e6/"Model, size (M)"', loss='"val/loss"'), where="n_params < 1e4")
    assert len(seen.runs) == 24 and len({run.run_id for run in seen.runs}) == 24 and seen.why["precision"].startswith("no quantized run")


def test_the_same_query_may_be_asked_twice(foreign):
    first, second = (scaling.table(foreign["database"]).aggregate("sum(compute)").fetchall() for _ in range(2))
    assert first == second
    np.testing.assert_allclose(first[0][0], 6.0 * float((fake_runs.rows()["n_params"].astype(float) * fake_runs.rows()["tokens"]).sum()))


@pytest.mark.parametrize(("verb", "options", "line"), [
    ("fit", ["SELECT nope FROM 'PARQUET'", "--law", "chinchilla"], "query \"SELECT nope .*: Binder Error: .*nope"),
    ("fit", ["FROM nowhere", "--law", "chinchilla"], "query 'FROM nowhere': Catalog Error: .*nowhere"),
    ("fit", ["PARQUET", "--law", "chinchilla", "--columns", 'N="Model, size (M)",D="tokens",loss="val/loss"'], 'columns: Binder Error: .*"tokens"'),
    ("fit", ["PARQUET", "--law", "chinchilla", "--columns", "N=Model, size (M)"], "'size .M.' is not NAME=VALUE"),
    ("fit", ["PARQUET", "--law", "chinchilla"], "needs N, D, loss; the table has Model, size .M., compute, val/loss, fmt"),
    ("report", ["PARQUET", "--out", "r.html"], "needs n_params, tokens, loss; this one has Model.*--columns n_params=...,tokens=...,loss=..."),
    ("report", ["PARQUET", "--out", "r.html", "--columns", "size=1"], "columns: 'size' is no column of a run table; known are N, D.* in all: RUN_COLUMNS of scaling/table.py"),
    ("report", ["PARQUET", "--out", "r.html", "--columns", COLUMNS, "--where", "zzz = 1"], "where zzz = 1: Binder Error: .*zzz"),
    ("report", ["PARQUET", "--out", "r.html", "--columns", COLUMNS.replace('"val/loss"', "fmt")], r"loss \(fmt\) is text in 48 of 48 rows, such as 'float32'; a run table needs numbers, so filter these out"),
])
def test_what_is_wrong_is_one_line(foreign, verb, options, line, capsys):
    options = [text.replace("PARQUET", foreign["parquet"]) for text in options]
    assert run(verb, options) == 2
    error = capsys.readouterr().err
    assert error.startswith("bitlaw: ") and error.count("\n") == 1 and re.search(line, error), error
