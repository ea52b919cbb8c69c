"""The command line: exit codes, one-line refusals, and that what it prints is what was fitted."""
from __future__ import annotations

import dataclasses
import importlib
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import scaling
from scaling.arguments import assignments, parser
from scaling.cli import conclude, run
from tests.scaling import fake_runs
from tests.scaling.conftest import DROP_FIVE

LARGEST = "N = max(N) OVER ()"


def test_table_fit_predict(tmp_path, demo_runs, capsys):
    runs, fit = tmp_path / "runs.parquet", tmp_path / "FIT.json"
    assert run("table", [str(demo_runs), "--out", str(runs)]) == 0
    assert "48 runs (1 diverged, 46 done, 1 failed)" in capsys.readouterr().out
    assert run("fit", [str(runs), "--law", "kumar:tied+plain", "--holdout", LARGEST, "--out", str(fit)]) == 0
    out = capsys.readouterr().out
    loaded = scaling.load(fit)
    assert f"{loaded.params['gamma_w']:.6g}" in out and "= gamma_w" in out and "condition number" in out and "2 dropped (status" in out
    assert run("predict", [str(fit), "N=1e5", "D=1e7", "weights_bits=4", "activations_bits=4"]) == 0
    out = capsys.readouterr().out
    loss = float(loaded.predict(N=1e5, D=1e7, weights_bits=4, activations_bits=4).loss)
    assert out.startswith(f"loss {loss:.6g} nats/token, 95% interval") and "times beyond the fitted range" in out


def test_epoch_from_the_command_line(epoch, capsys):
    columns = ",".join(f"{name}={expression}" for name, expression in epoch["columns"].items())
    assert run("fit", [str(epoch["table"]), "--law", "chinchilla", "--columns", columns, "--where", DROP_FIVE]) == 0
    out = capsys.readouterr().out
    for number in ("477.826", "2143.42", "1.81722", "0.34731 ", "0.367172", "0.001018274018", "240 rows fitted, 5 dropped"):
        assert number in out


def test_fit_tells_how_far_it_can_be_trusted(demo_runs, tmp_path, capsys):
    out = tmp_path / "FIT.json"
    assert run("fit", [str(demo_runs), "--law", "kumar:tied+plain", "--bootstrap", "40", "--resample", "wild", "--profile", "alpha,E",
                       "--coverage", "40", "--out", str(out)]) == 0
    told = capsys.readouterr().out
    fit = scaling.load(out)
    assert fit.metrics["resampled"] == "wild" and len(fit.draws) == 40
    profiled = scaling.profile(fit, str(demo_runs), "alpha").estimate
    assert f"profile of alpha: {profiled}" in told and "profile of E: " in told
    assert "coverage of the 95% intervals in 40 simulations (standard error 3.4%)" in told and "(TARP)" in told and "a new run 9" in told


def test_inputs_that_are_given_one_by_one_are_all_taken():
    assert parser("fit").parse_args(["t.csv", "--law", "sun", "--at", "bits=8", "--at", "compute=1e21"]).at == {"bits": "8", "compute": "1e21"}


def test_a_law_of_another_loss_is_printed_in_its_unit(tmp_path, capsys):
    k = np.array([1.0, 3, 10, 30, 100, 300, 1000])
    loss = np.exp(-2.0 * k**-0.4 + 1e-3 * np.random.default_rng(0).standard_normal(7))
    scaling.write_table(scaling.table({"k": k, "loss": loss}), tmp_path / "passes.csv")
    table, fit = str(tmp_path / "passes.csv"), str(tmp_path / "FIT.json")
    assert run("fit", [table, "--law", "coverage", "--holdout", "k > 500", "--checklist", "--out", fit]) == 0
    assert run("compare", [table, "--laws", "coverage", "--holdout", "k > 500", "--leave", "largest-k"]) == 0
    assert run("predict", [fit, "k=200"]) == 0
    out = capsys.readouterr().out
    assert "nats" not in out and "held-out rms, pass@k" in out and "loss = \"loss\" (pass@k)" in out
    predicted = re.search(r"^loss (\S+) pass@k, 95% interval", out, re.MULTILINE)
    assert float(predicted[1]) == pytest.approx(math.exp(-2.0 * 200**-0.4), rel=2e-3)


def test_compare_puts_laws_side_by_side(demo_runs, capsys):
    assert run("compare", [str(demo_runs), "--laws", "chinchilla,kumar:tied,kumar:plain", "--holdout", LARGEST]) == 0
    out = capsys.readouterr().out
    header = next(line for line in out.splitlines() if "kumar:plain" in line)
    assert "chinchilla" in header and "kumar:tied" in header
    assert re.search(r"held-out rms .*%.*%.*%", out) and "BIC" in out and "0 (fixed)" in out


def test_report_ends_with_the_three_sentences(tmp_path, capsys):
    out = tmp_path / "report.html"
    few = fake_runs.write_runs(tmp_path / "few", sizes={"2k": 2_304})
    assert run("report", [str(few), "--out", str(out), "--bootstrap", "20"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert out.is_file() and f"written: {out}" in lines
    assert [line.split(":")[0] for line in lines[-3:]] == ["What low precision costs", "Which bits suffice", "How far off the prediction was"]


def test_conclude_leaves_everything_beside_the_runs(tmp_path, capsys):
    folder = fake_runs.write_runs(tmp_path / "demo")
    assert conclude(folder) == 0
    made = {path.name for path in folder.iterdir() if path.is_file()}
    assert made == {"runs.parquet", "runs.csv", "fit-chinchilla.json", "fit-precision.json", "report.html"}
    assert scaling.load(folder / "fit-precision.json").metrics["bootstrap"] == 200
    out = capsys.readouterr().out
    assert "condition number" in out and all(name in out for name in made)


@pytest.mark.slow
def test_conclude_writes_all_runs_and_speaks_of_one_data_set(tmp_path, capsys):
    folder = fake_runs.write_runs(tmp_path / "demo", sizes={"2k": 2_304})
    other = fake_runs.write_runs(folder / "other", sizes={"25k": 24_576}, bits={"int4": 4.0})
    for path in other.glob("*/record.json"):
        path.write_text(path.read_text().replace('"data": "stdlib"', '"data": "mine"'))
    assert conclude(folder) == 0
    out = capsys.readouterr().out
    assert "only the 12 runs on stdlib are analysed" in out and "int4 +" in out
    assert len(scaling.table(folder / "runs.parquet")) == 15 and (folder / "report.html").read_text(encoding="utf-8").count("24,576") == 3


def test_unconverged_fits_exit_with_1_and_print_no_constants(monkeypatch, demo_runs, tmp_path, capsys):
    monkeypatch.setattr("scaling.solve.MAX_ROUNDS", 1)
    monkeypatch.setattr("scaling.solve.SCIPY_ROUNDS", 1)
    arguments = [str(demo_runs), "--law", "kumar", "--out", str(tmp_path / "FIT.json")]
    assert run("fit", arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and "did not converge" in captured.err and not (tmp_path / "FIT.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("stalled", "fitted"), [({"chinchilla", "kumar"}, set()), ({"kumar"}, {"fit-chinchilla.json"})])
def test_laws_that_do_not_converge_end_the_demo_with_1(monkeypatch, stalled, fitted, tmp_path, capsys):
    """One of the two laws is enough for the exit code."""
    module = importlib.import_module("scaling.stages")

    def stalling(problem, delta, solve=module.solve):
        solution = solve(problem, delta)
        return dataclasses.replace(solution, decrease=1.0) if problem.law.name in stalled else solution

    monkeypatch.setattr(module, "solve", stalling)
    folder = fake_runs.write_runs(tmp_path / "demo")
    assert conclude(folder) == 1
    assert {path.name for path in folder.iterdir() if path.is_file()} == {"runs.parquet", "runs.csv", "report.html"} | fitted
    told = capsys.readouterr()
    assert told.err.count("did not converge") == (6 if "chinchilla" in stalled else 4) == told.err.count("\n")
    assert "no precision fit: no candidate converged (kumar:tied+plain, kumar:plain, kumar:tied, kumar)" in told.out
    assert "gamma_w" not in told.out and "no candidate converged" in (folder / "report.html").read_text(encoding="utf-8")
    assert run("report", [str(folder), "--out", str(tmp_path / "r.html"), "--bootstrap", "0"]) == 1


@pytest.mark.parametrize(("verb", "argv", "message"), [
    ("report", ["RUNS", "--out", "x.html", "--bootstrap", "-1"], "bootstrap=-1: need bootstrap >= 0"),
    ("fit", ["none.csv", "--law", "kumar"], "none.csv: no such file or folder"),
    ("fit", ["RUNS", "--law", "kumarr"], "law 'kumarr': unknown; known laws are"),
    ("fit", ["RUNS"], "fit: the following arguments are required: --law"),
    ("fit", ["RUNS", "--law", "kumar", "--columns", "N"], "'N' is not NAME=VALUE"),
    ("fit", ["RUNS", "--law", "kumar", "--columns", "N=size"], 'Referenced column "size" not found'),
    ("fit", ["RUNS", "--law", "kumar", "--fix", "n_w=none"], "--fix n_w=none: not a number"),
    ("fit", ["RUNS", "--law", "kumar", "--fix", "alpha=-1"], "fixed alpha=-1: law kumar takes for alpha a number from 0.01 to 2.5, or 0"),
    ("fit", ["RUNS", "--law", "kumar", "--fix", "gamma_w=21"], "fixed gamma_w=21: law kumar takes for gamma_w a number from 0.1 to 20"),
    ("fit", ["RUNS", "--law", "kumar", "--fix", "E=nan"], "fixed E=nan: law kumar takes for E a positive number, or 0 to leave its term out"),
    ("fit", ["RUNS", "--law", "kumar", "--fix", "beta=0.3", "--tie", "beta=alpha"], "ties: beta=alpha: beta is also fixed, at 0.3; give one of the two"),
    ("fit", ["RUNS", "--law", "kumar", "--tie", "beta=0.3"], "'0.3' is no constant of law kumar; it has A, B, E, alpha, beta, gamma_w, n_w, gamma_a, n_a, gamma_kv, n_kv (to hold beta at a number, fix it)"),
    ("fit", ["RUNS", "--law", "kumar", "--tie", "gamma_w=alpha"], "ties: gamma_w=alpha: gamma_w is a scale and alpha an exponent; tie constants of one kind"),
    ("fit", ["RUNS", "--law", "kumar", "--prior", "alpha"], "'alpha' is not NAME=VALUE"),
    ("fit", ["RUNS", "--law", "kumar", "--prior", "alpha=x"], "--prior alpha=x: not MEAN:DEVIATION, such as alpha=0.35:0.05"),
    ("fit", ["RUNS", "--law", "kumar", "--prior", "alpha=nan:1"], "priors alpha=nan, 1: law kumar takes for alpha a number from 0.01 to 2.5, or 0"),
    ("fit", ["RUNS", "--law", "kumar", "--prior", "alpha=5:0.1"], "priors alpha=5, 0.1: law kumar takes for alpha a number from 0.01 to 2.5, or 0"),
    ("fit", ["RUNS", "--law", "kumar", "--prior", "alpha=0.3:inf"], "priors alpha=0.3, inf: need a positive deviation, and a finite one"),
    ("fit", ["RUNS", "--law", "kumar", "--prior", "A=3:1"], "priors: A trades off with its exponent; give the prior on one of E, alpha, beta, gamma_w, n_w"),
    ("fit", ["RUNS", "--law", "kumar", "--delta", "x"], "argument --delta: invalid float value: 'x'"),
    ("fit", ["RUNS", "--law", "kumar", "--resample", "rows"], "--resample rows: unknown; use cells or wild"),
    ("fit", ["RUNS", "--law", "kumar", "--resample", "wild"], "--resample wild: needs resamples, and --bootstrap is 0"),
    ("fit", ["RUNS", "--law", "kumar", "--coverage", "5"], "--coverage 5: need at least 20 simulations"),
    ("fit", ["RUNS", "--law", "kumar:tied+plain", "--profile", "gamma"], "'gamma': law kumar has no such parameter or functional here"),
    ("fit", ["RUNS", "--law", "kumar:tied+plain", "--profile", "bits_for_gap"], "bits_for_gap of law kumar takes N, gap; given: nothing"),
    ("fit", ["RUNS", "--law", "kumar", "--out", "no/FIT.json"], "out=no/FIT.json: the folder no does not exist"),
    ("fit", ["RUNS", "--law", "kumar", "--hold", "N > 3"], "unrecognized arguments: --hold"),
    ("compare", ["RUNS", "--laws", "chinchilla,foo"], "law 'foo': unknown"),
    ("compare", ["RUNS", "--laws", ","], "laws: none given"),
    ("predict", ["FIT.json", "N=1"], "FIT.json: no such file"),
    ("report", ["none", "--out", "x.html"], "none: no such file or folder"),
    ("table", ["none", "--out", "x.csv"], "none: no such file or folder"),
    ("fit", ["RUNS", "--law", "kumar", "--plugins", "no_such_module"], "--plugins no_such_module: cannot be imported (No module named"),
    ("report", ["none", "--out", "x.html", "--plugins", "json,no.such"], "--plugins no.such: cannot be imported"),
    ("table", ["RUNS", "--out", "x.csv", "--plugins", "a,,b"], "argument --plugins: '' is not the name of a module"),
    ("predict", ["FIT.json", "N=1", "--plugins", "../mine.py"], "argument --plugins: '../mine.py' is not the name of a module"),
    ("explain", [], "explain: unknown; scaling has table, fit, compare, predict, plan, stats, report"),
])
def test_bad_input_is_one_line_and_exit_code_2(verb, argv, message, demo_runs, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert run(verb, [str(demo_runs) if word == "RUNS" else word for word in argv]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and captured.out == ""
    assert list(tmp_path.iterdir()) == []


PLUGIN = """
import dataclasses
from scaling import laws

laws.add(dataclasses.replace(laws["chinchilla"], name="mine", aliases=()))
"""


@pytest.mark.slow
def test_a_law_of_ones_own_comes_in_as_a_plugin(tmp_path):
    """In processes of their own: a law registered here would stay for the other tests, and so hide a plugin that is not imported."""
    (tmp_path / "my_laws.py").write_text(PLUGIN)
    fake_runs.write_runs(tmp_path / "runs", bits={"float32": 32.0})
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(scaling.__file__).parents[1]), str(tmp_path)])}

    def call(*argv: str):
        code = "import sys; from scaling.cli import run; sys.exit(run(sys.argv[1], sys.argv[2:]))"
        return subprocess.run([sys.executable, "-c", code, *argv], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    fit = ("fit", "runs", "--law", "mine", "--out", "FIT.json")
    refused = call(*fit)
    assert refused.returncode == 2 and "law 'mine': unknown" in refused.stderr
    assert call(*fit, "--plugins", "my_laws").returncode == 0
    predicted = call("predict", "FIT.json", "N=1e4", "D=1e6", "--plugins", "my_laws")
    assert predicted.returncode == 0 and predicted.stdout.startswith("loss ")
    assert "mine" in call("compare", "runs", "--laws", "chinchilla,mine", "--plugins", "my_laws").stdout


@pytest.mark.parametrize("pairs", [["N=x", "D=1"], ["N", "D=1"], ["N=1"], ["N=0", "D=1"], ["N=1", "D=1", "kv_bits=4"], ["N=1", "D=1", "Q=4"]])
def test_predict_refuses_bad_inputs(pairs, tmp_path, capsys):
    path = scaling.fit(fake_runs.rows(), "kumar:tied+plain").save(tmp_path / "FIT.json")
    assert run("predict", [str(path), *pairs]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("bitlaw: ") and captured.err.count("\n") == 1 and captured.out == ""


def test_help_exits_with_0(capsys):
    assert run("fit", ["--help"]) == 0
    assert "--holdout" in capsys.readouterr().out


def test_commas_inside_expressions_do_not_split_them():
    assert assignments('N=greatest(a, b),D="x,y"/6') == {"N": "greatest(a, b)", "D": '"x,y"/6'}
