"""Remarks on designs that were made to deserve them, and none on one that does not; the checklist says what is known and nothing else."""
from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

import scaling
from scaling.checklist import UNKNOWN, as_json, as_text, checklist
from scaling.cli import run
from scaling.design_checks import check_table, design_checks
from tests.scaling import fake_runs

SIZES, RATIOS = np.array([1e8, 2e8, 4e8, 8e8]), np.array([10.0, 40.0, 160.0])


def _table(n, d, A=400.0, B=2000.0, E=1.8, alpha=0.35, beta=0.37, noise=1e-3):
    loss = (A / n**alpha + B / d**beta + E) * np.exp(noise * np.random.default_rng(0).standard_normal(n.size))
    return {"N": n, "D": d, "loss": loss}


def _grid():
    return tuple(x.ravel() for x in np.meshgrid(SIZES, SIZES[:3] * 40))


def _remarks(table, law="chinchilla", **options):
    return check_table(table, scaling.fit(table, law, **options))


def test_a_crossed_design_deserves_no_remark():
    assert _remarks(_table(*_grid())) == []


def test_fixed_ratio_is_named_with_its_correlation():
    remark, *others = _remarks(_table(np.repeat(SIZES, 3), 20 * np.repeat(SIZES, 3)))
    assert remark.startswith("D/N is 20 in every row (correlation of ln N and ln D 1.000)")


def test_correlation_is_printed_with_the_inflation_of_variance():
    n = np.repeat(SIZES, 3)
    d = 20 * n**1.0 * np.tile([0.5, 1.0, 2.0], 4)
    correlation = np.corrcoef(np.log(n), np.log(d))[0, 1]
    assert 0.8 < correlation < 0.95  # beyond 0.95 the fit's own note says it
    remark = next(text for text in _remarks(_table(n, d)) if "correlated" in text)
    assert f"({correlation:.3f})" in remark and f"by {1 / (1 - correlation**2):.1f}" in remark and "from 10 to 40" in remark


def test_dead_term_is_the_one_without_work():
    """B = 1e-9 of a loss of 2: no row feels it."""
    n, d = _grid()
    table = _table(n, d)
    fitted = scaling.fit(table, "chinchilla")
    params = dict(fitted.params) | {"B": fitted.params["B"] * 1e-9}
    found = [text for text in design_checks(table, replace(fitted, params=params)) if "dead" in text]
    assert len(found) == 1 and found[0].startswith("the term of B is dead") and "B and beta" in found[0]
    share = (params["B"] / d ** params["beta"] / fitted.law.predict(params, N=n, D=d)).max()
    assert f"{share:.1e}" in found[0]


def test_constant_terms_are_told_from_working_ones():
    table = _table(*_grid())
    fitted = scaling.fit(table, "chinchilla")
    flat = replace(fitted, params=dict(fitted.params) | {"B": 0.5, "beta": 1e-5})
    assert [text.partition(":")[0] for text in design_checks(table, flat)] == ["the terms of B, E are all constant over these rows"]


def test_tie_of_exponents_is_told_and_that_of_widths_is_not():
    found = [text for text in _remarks(fake_runs.rows(), "kumar:tied+plain") if "tied" in text]
    assert len(found) == 1 and found[0].startswith("beta is tied to alpha") and "optimal precision" in found[0]
    assert "precision" not in next(text for text in _remarks(_table(*_grid()), "chinchilla:tied") if "tied" in text)


def test_few_levels_of_bits_and_sizes():
    rows = fake_runs.rows(bits={"int3": 3.0, "int4": 4.0, "float32": 32.0})
    found = _remarks(rows, "kumar:plain")
    assert sum("2 levels below 16 (3, 4)" in text for text in found) == 2  # weights and activations
    assert not any("levels" in text for text in _remarks(fake_runs.rows(), "kumar:plain"))


def test_a_baseline_at_16_bits_is_asked_about():
    rows = fake_runs.rows(bits={"int3": 3.0, "int4": 4.0, "int6": 6.0, "bf16": 16.0})
    found = [text for text in _remarks(rows, "kumar:plain") if "leave it empty" in text]
    assert len(found) == 2 and found[0].startswith("weights_bits is 16 in 12 rows")


def test_dropped_rows_are_counted_with_their_reason(demo_runs):
    text = next(text for text in _remarks(demo_runs, "kumar:tied+plain", where="tokens > 600000", holdout="N = max(N) OVER ()") if "left out" in text)
    assert "of 48 rows" in text and "2 (status is not done)" in text and "(where tokens > 600000)" in text


def _answers(items):
    return {item.question: item.answer for item in items}


def test_checklist_of_a_bare_fit_says_unknown_for_what_only_the_table_knows():
    fitted = scaling.fit(fake_runs.rows(), "chinchilla")
    bare = _answers(checklist(fitted))
    assert bare["training data"] == bare["seeds"] == bare["schedule"] == bare["table of runs"] == UNKNOWN
    assert bare["test on rows not fitted"].startswith("none") and "delta 0.001" in bare["objective"]
    assert bare["number of models"] == "48 fitted" and bare["how N is counted"] == "non-embedding parameters"


def test_checklist_of_a_run_folder_is_filled_in(demo_runs):
    fitted = scaling.fit(demo_runs, "kumar:tied+plain", holdout="N = max(N) OVER ()", bootstrap=30, where="seed = 0")
    items = checklist(fitted, demo_runs)
    told = _answers(items)
    assert told["training data"] == "stdlib" and told["batch size (tokens)"] == "4096" and told["seeds"] == "0"
    assert told["how compute is counted"] == "6 N D" and told["precisions"] == "float32, int3, int4, int6"
    assert told["exclusions"] == "2 rows (status is not done)" and told["row filter"] == "seed = 0"
    assert told["test on rows not fitted"].startswith("12 rows held out (N = max(N) OVER ())") and "30 resamples" in told["intervals"]
    assert told["held fixed or tied"].endswith("beta = alpha") and told["optimizer"] == UNKNOWN
    assert f"{sum(item.answer == UNKNOWN for item in items)} of {len(items)} items are unknown" in as_text(items)[-1]
    assert set(as_json(items)) == {item.part for item in items}


def test_fit_prints_the_checklist_and_keeps_it_in_the_file(tmp_path, demo_runs, capsys):
    out = tmp_path / "FIT.json"
    assert run("fit", [str(demo_runs), "--law", "kumar:tied+plain", "--checklist", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "note: beta is tied to alpha" in text and "e. Uncertainty and validation" in text and "optimizer: unknown" in text
    metrics = json.loads(out.read_text())["metrics"]
    assert metrics["checklist"]["models"]["training data"] == "stdlib" and any("tied" in remark for remark in metrics["design_checks"])
    assert scaling.load(out).params == pytest.approx(scaling.fit(demo_runs, "kumar:tied+plain").params)


def test_report_ends_with_the_checklist(tmp_path):
    folder = fake_runs.write_runs(tmp_path / "runs", sizes={"2k": 2_304, "5k": 5_120})
    text = scaling.report(folder, tmp_path / "report.html", scaling.analyse(folder, bootstrap=0)).read_text(encoding="utf-8")
    after = text.partition("How these numbers were made")[2]
    assert "The checklist of (Mis)Fitting" in after and "learning rate and its rule" in after and "Design: " in after
