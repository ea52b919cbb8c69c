"""The notebooks, converted by jupytext and run in a kernel, cell by cell; and the script form of the one that needs data."""
from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import duckdb
import pytest

from tests.scaling.conftest import SHARED

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ROOT / "scaling" / "notebooks"


def executed(name: str, monkeypatch, **environment) -> tuple[str, int]:
    """(all that its cells print, number of figures shown) of a notebook; an error in a cell fails the test."""
    jupytext = pytest.importorskip("jupytext", reason="jupytext is a dependency of the extra dev")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is a dependency of the extra dev")
    pytest.importorskip("ipykernel", reason="ipykernel is a dependency of the extra dev")
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    book = jupytext.read(NOTEBOOKS / f"{name}.py")
    assert {cell.cell_type for cell in book.cells} == {"markdown", "code"}
    nbclient.NotebookClient(book, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    outputs = [output for cell in book.cells for output in cell.get("outputs", ())]
    return "".join(output.get("text", "") for output in outputs), sum("image/png" in output.get("data", {}) for output in outputs)


def numbers(text: str, label: str) -> list[float]:
    """The numbers in the line that has `label`, after it."""
    line = next(line for line in text.splitlines() if label in line)
    return [float(number) for number in re.findall(r"[-+]?\d[\d.]*(?:e[-+]?\d+)?", line.split(label)[1])]


def test_fit_your_sweep(monkeypatch):
    monkeypatch.delenv("BITLAW_SWEEP", raising=False)
    text, shown = executed("fit_your_sweep", monkeypatch)
    assert "144 runs" in text and shown == 3
    for label, gap in (("int-w2a32  +", 0.272), ("int-w32a2  +", 0.599), ("int6  +", 0.012)):
        assert numbers(text, label)[0] == pytest.approx(matched_gap(label.split()[0]), abs=6e-4) == pytest.approx(gap, abs=1e-3)
    own, literature = (numbers(text, label)[:4] for label in ("excess that grows ", "effective parameters (mse_efficiency) "))
    assert own[0] == 12 and literature[0] == 9 and own[2] < 0.4 * literature[2]  # the held-out size, as runs/reference/ladder/README.md has it


def matched_gap(precision: str) -> float:
    """Mean loss of a precision minus that of the float32 run of its size, tokens and seed, from the table by SQL."""
    path = ROOT / "runs" / "reference" / "ladder" / "runs.csv"
    query = f"""SELECT avg(a.loss - b.loss) FROM '{path}' a JOIN '{path}' b USING (n_params, tokens, seed)
                WHERE a.precision = '{precision}' AND b.precision = 'float32'"""
    return duckdb.sql(query).fetchall()[0][0]


def test_plan_a_training(monkeypatch):
    text, shown = executed("plan_a_training", monkeypatch)
    value, low, high = numbers(text, "best width of all operands:")[:3]
    assert value == pytest.approx(7.0, abs=0.3) and low < value < high and shown == 2
    assert re.search(r"plan: N = .* times above the fitted range", text) and "h100: N" in text


@pytest.mark.slow
def test_published_fits(monkeypatch):
    if not (SHARED / "data").is_dir():
        pytest.skip("../shared/data is not here")
    text, shown = executed("published_fits", monkeypatch, BITLAW_DATA=str(SHARED / "data"))
    assert "0.0010182740178" in text and shown == 4 and text.rstrip().endswith("nothing")
    assert numbers(text, "effN[FP4]")[0] == pytest.approx(0.640, abs=0.003) and numbers(text, "effD[FP4]")[0] == pytest.approx(0.889, abs=0.003)
    pairs = re.findall(r"effN \w+[^\n]*? +([\d.]+) +reference ([\d.]+)\n", text)  # nine schemes of Quartet II
    assert "246 rows" in text and len(pairs) == 9 and all(abs(float(ours) - float(told)) < 1e-3 for ours, told in pairs)
    assert numbers(text, "eff[int4]")[0] == pytest.approx(0.689, abs=0.005) and numbers(text, "rms error, 2 bits left out")[0] < 0.026


@pytest.mark.parametrize("notebook", [True, False])
def test_published_fits_without_the_tables(notebook, monkeypatch, tmp_path):
    """Sections are skipped with a line that says why; what needs no table is there. As a notebook, and as a script with an argument."""
    if notebook:
        text, shown = executed("published_fits", monkeypatch, BITLAW_DATA=str(tmp_path))
        assert shown == 0
    else:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        environment.pop("BITLAW_DATA", None)
        done = subprocess.run([sys.executable, str(NOTEBOOKS / "published_fits.py"), str(tmp_path)], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        text = done.stdout
    assert text.count(f"skipped: {tmp_path}") == 4 and "quest-runs/runs.csv is not here; set BITLAW_DATA" in text
    assert numbers(text, "D_crit E4M3 (1e12 tokens)")[0] == pytest.approx(27.3, abs=0.05) and "E2M1 E4M3 E8M7" in text
