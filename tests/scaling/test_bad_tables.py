"""Strange tables and files through the command line: one clear line and exit code 2, or the right fit. No traceback, no warning, nothing written."""
from __future__ import annotations

import json

import duckdb
import ml_dtypes
import numpy as np
import pytest

import scaling
from scaling.cli import run
from scaling.laws import laws


def good(count: int = 40) -> dict[str, list]:
    """Column -> values: runs of the published Chinchilla law with 0.5 % noise."""
    rng = np.random.default_rng(0)
    N, D = np.exp(rng.uniform(np.log(1e7), np.log(1e9), count)), np.exp(rng.uniform(np.log(1e8), np.log(1e11), count))
    loss = laws["chinchilla"].predict(laws["chinchilla"].published["epoch"], N=N, D=D) * np.exp(0.005 * rng.standard_normal(count))
    return {"N": N.tolist(), "D": D.tolist(), "loss": loss.tolist()}


def write(path, columns: dict, header: list[str] | None = None):
    lines = [",".join(header or columns)] + [",".join(map(str, row)) for row in zip(*columns.values(), strict=True)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def with_cell(column: str, value) -> dict[str, list]:
    return {name: [value, *values[1:]] if name == column else values for name, values in good().items()}


def constant(column: str) -> dict[str, list]:
    return {name: values[:1] * len(values) if name == column else values for name, values in good().items()}


def refused(capsys, verb: str, *argv: str) -> str:
    """The one line of a refusal."""
    assert run(verb, list(argv)) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("bitlaw: ") and captured.err.count("\n") == 1, captured.err
    return captured.err


TABLES = {
    "missing": ({"N": good()["N"], "val": good()["loss"]}, "law chinchilla needs D, loss; the table has N, val"),
    "NaN": (with_cell("loss", "nan"), 'loss ("loss") is missing or NaN in 1 of 40 rows'),
    "blank": (with_cell("N", ""), 'N ("N") is missing or NaN in 1 of 40 rows'),
    "zero": (with_cell("loss", 0.0), 'loss ("loss") is zero in 1 of 40 rows'),
    "negative": (with_cell("loss", -2.0), 'loss ("loss") is negative in 1 of 40 rows'),
    "infinite": (with_cell("D", "inf"), 'D ("D") is infinite in 1 of 40 rows'),
    "text": (with_cell("loss", "diverged"), "loss (\"loss\") is text in 1 of 40 rows, such as 'diverged'; law chinchilla needs numbers, so filter these out with where"),
    "one row": ({name: values[:1] for name, values in good().items()}, "1 row cannot fit the 5 free parameters of law chinchilla (A, B, E, alpha, beta)"),
    "no row": ({name: [] for name in good()}, "no rows left to fit: 0 in the table"),
    "constant N": (constant("N"), "in every fitted row, so law chinchilla cannot be fitted: vary it"),
    "constant loss": (constant("loss"), "in every fitted row: nothing to fit"),
    "one run, copied": ({name: values[:1] * 40 for name, values in good().items()}, "40 rows, of which 39 are copies of another, cannot fit the 5 free parameters"),
    "status of another kind": (good() | {"status": list(range(40))}, "no rows left to fit: 40 in the table, 40 dropped (status is not done)"),
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("verb", ["fit", "compare"])
def test_tables_that_cannot_be_fitted(name, verb, tmp_path, capsys):
    columns, message = TABLES[name]
    path = write(tmp_path / "runs.csv", columns)
    options = ["--law", "chinchilla", "--out", str(tmp_path / "FIT.json")] if verb == "fit" else ["--laws", "chinchilla"]
    assert message in refused(capsys, verb, str(path), *options)
    assert list(tmp_path.iterdir()) == [path]


ARGUMENTS = {
    "kumar": ["--law", "kumar"], "quartet": ["--law", "quartet"], "nothing held": ["--holdout", "N > 1e30"], "all held": ["--holdout", "N > 0"],
    "no such law": ["--law", "chinchila"], "half a formula": ["--law", "E + A/N^"], "code": ["--law", "__import__('os')"], "1/0": ["--law", "1/0 + E + A/N^alpha"],
    "overflow": ["--law", "10^400 + E + A/N^alpha"], "where is no condition": ["--where", "'x'"], "no such column": ["--where", "size > 1"],
    "circle": ["--tie", "alpha=beta,beta=alpha"], "itself": ["--tie", "alpha=alpha"], "twice": ["--columns", "N=N,N=D"], "seed": ["--seed", "-1"],
}  # fmt: skip
MESSAGES = {
    "kumar": "law kumar needs weights_bits or activations_bits or kv_bits; the table has N, D, loss", "quartet": "law quartet needs forward, backward; the table has N, D, loss",
    "nothing held": "holdout='N > 1e30' selects no row of 40", "all held": "holdout='N > 0' selects every row of 40", "no such law": "law 'chinchila': unknown; known laws are",
    "half a formula": "expected a number, a name or '(' at character 9, found the end", "code": "is no part of a formula", "1/0": "has no value (float division by zero)",
    "overflow": "has no value (", "where is no condition": "where 'x': Conversion Error", "no such column": "where size > 1: Binder Error", "circle": "ties: alpha=beta is a circle",
    "itself": "ties: alpha=alpha is a circle", "twice": "N is given twice: N and D", "seed": "seed=-1",
}  # fmt: skip


@pytest.mark.parametrize("name", ARGUMENTS)
def test_requests_that_a_good_table_cannot_meet(name, tmp_path, capsys):
    path = write(tmp_path / "runs.csv", good())
    law = [] if "--law" in ARGUMENTS[name] else ["--law", "chinchilla"]
    assert MESSAGES[name] in refused(capsys, "fit", str(path), *law, *ARGUMENTS[name])


def parquet(path):
    duckdb.sql("SELECT 1 AS N").write_parquet(str(path))
    return path.read_bytes()


FILES = {
    "empty.csv": (b"", "the file is empty"), "empty.parquet": (b"", "the file is empty"), "empty.json": (b"", "the file is empty"),
    "text.parquet": (b"N,D,loss\n1,2,3\n", "Invalid Input Error: No magic bytes"), "text.json": (b"N,D,loss\n1,2,3\n", "Malformed JSON"),
    "parquet.csv": (None, "parquet.csv: Invalid Input Error: "), "utf16.csv": ("N,D,loss\n1,2,3\n".encode("utf-16"), "not utf-8 encoded"),
    "noise.csv": (bytes(np.random.default_rng(0).integers(0, 256, 4000, dtype=np.uint8)), "noise.csv: "), "runs.xlsx": (b"PK", "cannot read .xlsx; known are .csv"),
    "runs": (b"N,D,loss\n", "cannot read a file without suffix"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_not_what_they_say(name, tmp_path, capsys):
    content, message = FILES[name]
    path = tmp_path / name
    path.write_bytes(parquet(tmp_path / "t") if content is None else content)
    line = refused(capsys, "fit", str(path), "--law", "chinchilla")
    assert message in line and name in line


@pytest.mark.parametrize("body", ["{}", "[]", "", '{"bitlaw_fit": 1}', '{"bitlaw_fit": 1, "law": "chinchilla", "intervals": 3}', "\x00"])
@pytest.mark.parametrize("verb", [("predict", "N=1e8", "D=1e9"), ("plan", "--compute", "1e18")])
def test_fits_that_are_none(body, verb, tmp_path, capsys):
    path = tmp_path / "FIT.json"
    path.write_text(body)
    assert "FIT.json: not a " in refused(capsys, verb[0], str(path), *verb[1:])


def test_inputs_of_a_prediction(tmp_path, capsys):
    path = str(scaling.fit(good(), "chinchilla").save(tmp_path / "FIT.json"))
    assert "input D=inf: must be finite" in refused(capsys, "predict", path, "N=1e8", "D=inf", "--extrapolate")
    assert "input N is given twice: 1e8 and 3" in refused(capsys, "predict", path, "N=1e8", "N=3", "D=1e9")


def objective(table, **options) -> float:
    return scaling.fit(table, "chinchilla", **options).metrics["objective"]


def test_strange_tables_that_can_be_fitted(tmp_path):
    """Other names, units and types say the same of the runs, so their fits have the same objective."""
    told = objective(good())
    names = {"N": '"größe (M)" * 1e6', "D": "данные", "loss": '"損失"'}
    strange = write(tmp_path / "ünicode.csv", {"n": [n / 1e6 for n in good()["N"]], "d": good()["D"], "l": good()["loss"]}, ["größe (M)", "данные", "損失"])
    assert objective(strange, columns=names) == pytest.approx(told, rel=1e-9)
    twice = write(tmp_path / "twice.csv", good() | {"again": [9.0] * 40}, ["N", "D", "loss", "loss"])
    assert objective(twice) == pytest.approx(told, rel=1e-9)  # the first of two columns of one name
    assert objective({name: list(map(str, values)) for name, values in good().items()}) == pytest.approx(told, rel=1e-9)
    assert objective(good() | {"keep_": [1] * 40, "weight_": [0] * 40, "held_out_": ["x"] * 40}) == pytest.approx(told, rel=1e-9)
    in_millions = scaling.fit(good(), "chinchilla", columns={"N": "N/1e6", "D": "D/1e6"})
    assert in_millions.metrics["objective"] == pytest.approx(told, rel=1e-9) and in_millions.ranges["N"][1] < 1000
    copies = scaling.fit({name: values * 2 for name, values in good().items()}, "chinchilla")
    assert copies.metrics["objective"] == pytest.approx(2 * told, rel=1e-9)
    (tmp_path / "rows.json").write_text(json.dumps([dict(zip(good(), row, strict=True)) for row in zip(*good().values(), strict=True)]))
    assert objective(tmp_path / "rows.json") == pytest.approx(told, rel=1e-9)


@pytest.mark.parametrize(("table", "message"), [
    (None, "NoneType is no table"), (3, "int is no table"), (np.zeros((3, 3)), "ndarray is no table"), (good() | {"N": np.ones(40) * 1j}, "N complex128"),
    (good() | {"N": np.ma.masked_array(good()["N"], [True] + [False] * 39)}, "is missing or NaN in 1 of 40 rows"),
    (good() | {"N": [None, *good()["N"][1:]]}, "is missing or NaN in 1 of 40 rows"), (good() | {"N": ["x", *map(str, good()["N"][1:])]}, "N (\"N\") is text in 1 of 40 rows, such as 'x'"),
    ({}, "no columns"), ({"N": [1, 2], "D": [1]}, "equally long"),
])  # fmt: skip
def test_python_objects_that_are_no_tables(table, message):
    with pytest.raises(ValueError) as error:
        scaling.fit(table, "chinchilla")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_bfloat16_and_data_frames_are_tables():
    rough = {name: np.asarray(values).astype(ml_dtypes.bfloat16) for name, values in good().items()}
    assert objective(rough) == pytest.approx(objective({name: values.astype(np.float64) for name, values in rough.items()}), rel=1e-9)
    frame = type("DataFrame", (), {"columns": list(good()), "__getitem__": lambda self, name: np.array(good()[name])})()
    assert objective(frame) == pytest.approx(objective(good()), rel=1e-9)


@pytest.mark.parametrize("value", [-1e8, 0.0, float("nan"), [1e8, -1.0]])
def test_python_refuses_sizes_that_are_none(value):
    with pytest.raises(ValueError, match="predict: N is .*must be positive"):
        scaling.fit(good(), "chinchilla").predict(N=value, D=1e9, extrapolate=True)


def test_runs_that_lie_on_the_law_are_fitted():
    """Without noise the objective is rounding, of which a relative decrease says nothing: the fit has converged all the same."""
    published = laws["chinchilla"].published["epoch"]
    columns = {name: np.array(good()[name]) for name in ("N", "D")}
    fit = scaling.fit(columns | {"loss": laws["chinchilla"].predict(published, **columns)}, "chinchilla")
    assert fit.converged and fit.metrics["starts_agree"] > 1
    assert all(fit.params[name] == pytest.approx(value, rel=1e-6) for name, value in published.items())


@pytest.mark.filterwarnings("error")
def test_two_cells_say_nothing_and_warn_of_nothing(tmp_path, capsys):
    cells = {name: values[:2] * 20 for name, values in good().items()}
    path = write(tmp_path / "runs.csv", cells | {"loss": [loss * (1 + 1e-4 * seed) for seed, loss in enumerate(cells["loss"])]})  # no copies: seeds
    assert run("fit", [str(path), "--law", "chinchilla"]) == 0
    captured = capsys.readouterr()
    assert captured.out.count("not identified by this design") == 5 + 4 and captured.err == ""  # constants, and what follows from them


@pytest.mark.slow
def test_a_hundred_thousand_rows():
    fit = scaling.fit({name: np.array(values) for name, values in good(100_000).items()}, "chinchilla", loss="least_squares")
    published = laws["chinchilla"].published["epoch"]
    assert fit.converged and all(fit.params[name] == pytest.approx(published[name], rel=0.02) for name in ("alpha", "beta", "E"))
