"""`scaling.scipy_check`: it confirms a right fit, and finds one out that is not."""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import scaling
from scaling.cli import run
from tests.scaling import fake_runs, straight


@pytest.mark.parametrize("loss", ["huber", "least_squares", pytest.param("lad", marks=pytest.mark.slow)])
def test_it_confirms_the_published_refit(epoch, loss):
    fit = scaling.fit(law="chinchilla", loss=loss, **epoch)
    found = scaling.scipy_check(fit, epoch["table"])
    assert found.ratio == pytest.approx(1.0, abs=1e-6) and found.within >= 4 and (found.agrees or loss == "lad")


def test_it_finds_out_a_fit_that_is_not_the_optimum(monkeypatch):
    """An alpha that is two standard errors off, with the objective that it has there."""
    table = straight.runs()
    fit = scaling.fit(table, straight.power, loss="least_squares")
    moved = fit.coordinates + 2.0 * fit.scatter[:, 0]
    errors = np.log(straight.power.predict(fit.constants_at(moved), N=table["N"])) - np.log(table["loss"])
    wrong = replace(fit, coordinates=moved, metrics=dict(fit.metrics) | {"objective": float(0.5 * errors @ errors)})
    found = scaling.scipy_check(wrong, table)
    assert not found.agrees and found.lowest == pytest.approx(fit.metrics["objective"], rel=1e-9) and found.apart > 1.0
    assert "does not confirm" in str(found)


def test_runs_that_lie_on_the_law():
    """Both objectives are rounding there, and their ratio says nothing."""
    table = straight.runs(noise=lambda rng, x: 0.0 * x)
    assert scaling.scipy_check(scaling.fit(table, straight.power), table).agrees


@pytest.mark.parametrize("options", [["--base", "N > 1"], ["--prior", "alpha=0.3:0.1"], ["--weights", "N"]])
def test_what_scipy_cannot_check_is_refused_before_the_fit(epoch, options, capsys):
    columns = ",".join(f"{name}={sql}" for name, sql in epoch["columns"].items())
    assert run("fit", [str(epoch["table"]), "--law", "chinchilla", "--columns", columns, "--check", *options]) == 2
    told = capsys.readouterr()
    assert told.out == "" and "--check" in told.err and told.err.count("\n") == 1


def test_levels_and_weights():
    """Names of levels are the law's own columns; SciPy has no Huber loss of weighted rows."""
    table = straight.runs() | {"w": np.arange(1.0, 25.0)}
    assert scaling.scipy_check(scaling.fit(table, straight.power, weights="w", loss="least_squares"), table).agrees
    with pytest.raises(ValueError, match="no Huber loss of weighted rows"):
        scaling.scipy_check(scaling.fit(table, straight.power, weights="w"), table)
    rows = fake_runs.rows(noise=0.003)
    rows |= {"scheme": np.where(rows["weights_bits"] < 4, "narrow", "bf16")}
    assert scaling.scipy_check(scaling.fit(rows, "free_efficiency", loss="least_squares"), rows).agrees


def test_command_line(epoch, capsys):
    columns = ",".join(f"{name}={sql}" for name, sql in epoch["columns"].items())
    assert run("fit", [str(epoch["table"]), "--law", "chinchilla", "--columns", columns, "--where", epoch["where"], "--check"]) == 0
    assert "scipy least_squares from 8 starts: objective 0.001018274018" in capsys.readouterr().out
