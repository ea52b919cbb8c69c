"""The report: self-contained, complete, and there for every kind of run folder."""
from __future__ import annotations

import html.parser
import json
import re

import numpy as np
import pytest

import scaling
from scaling import report_figures
from scaling.cli import run
from scaling.laws import laws
from scaling.statistics import Run, columns_of
from tests.scaling import fake_runs


class Outline(html.parser.HTMLParser):
    """Counts tags, checks that they close in order, and collects every address that a browser would fetch."""

    VOID = {"meta", "br", "img", "link", "input", "hr"}

    def __init__(self, text):
        super().__init__()
        self.count, self.open, self.fetched, self.headings = {}, [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.count[tag] = self.count.get(tag, 0) + 1
        self.fetched += [value for name, value in attrs if name in ("src", "href", "xlink:href") and not value.startswith("#")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def make(tmp_path, **design):
    folder = fake_runs.write_runs(tmp_path / "runs", **design)
    text = scaling.report(folder, tmp_path / "report.html", scaling.analyse(folder, bootstrap=0)).read_text(encoding="utf-8")
    return text, Outline(text)


def test_the_demos_report_is_whole_and_self_contained(tmp_path):
    text, outline = make(tmp_path, diverge=(0,), fail=(5,))
    assert outline.fetched == [] and "script" not in outline.count and not outline.open
    assert "url(" not in text.replace("url(#", "") and "@import" not in text
    assert outline.count["svg"] == 6 and outline.count["figcaption"] == 6
    assert outline.headings == ["Figures", "Fitted constants: kumar:tied+plain", "Fitted constants: chinchilla:tied", "Held-out predictions",
                                "Seed noise and matched gaps", "Gallery of precisions", "Runs", "How these numbers were made"]
    for part in ("nats/token", "held out", "condition number", "1 run diverged", "1 run failed", "diverged at step 120", "training compute 6ND"):
        assert part in text
    assert text.count("<tr") > 48 + 12
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))  # the figures on a page must not share clip paths
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', text)) == set(ids)


@pytest.mark.parametrize(("design", "svgs", "parts"), [
    ({"bits": {"int4": 4.0}}, 4, ("every run is int4", "one precision only")),
    ({"bits": {"float32": 32.0}}, 4, ("no quantized run",)),
    ({"sizes": {"2k": 2_304}}, 5, ("N is 2304 in every fitted row", "nothing is held out")),
    ({"sizes": {"2k": 2_304}, "budgets": (600_000,), "bits": {"int4": 4.0}}, 3, ("cannot fit",)),
    ({"diverge": tuple(range(48))}, 1, ("48 runs diverged", "no finished run")),
    ({"fail": tuple(range(48))}, 0, ("nothing to draw",)),
    pytest.param({"seeds": 2, "bits": {"int3": 3.0, "float32": 32.0}}, 5, ("degrees of freedom", "is held at 0"), marks=pytest.mark.slow),
])
def test_every_kind_of_folder_gets_a_report(tmp_path, design, svgs, parts):
    text, outline = make(tmp_path, **design)
    assert outline.count.get("svg", 0) == svgs and outline.fetched == []
    for part in parts:
        assert part in text
    assert "nan" not in re.sub(r"<style>.*?</style>", "", text, flags=re.S).replace("finance", "").split("<h2>Runs")[0]


LAYOUTS = {"E2M1": (2.0, 1.0), "E4M3": (4.0, 3.0), "E5M2": (5.0, 2.0), "E8M7": (8.0, 7.0)}


def layouts():
    """A run table of floating-point layouts on the law of Sun et al., the scheme under a name of its own."""
    rows = [(n, d, name, block) for n in (4e7, 1e8, 2e8, 6e8) for d in (1e10, 3e10, 1e11) for name in LAYOUTS for block in (32.0, 128.0)]
    n, d, scheme, block = (np.array(column) for column in zip(*rows, strict=True))
    exp_bits, man_bits = np.array([LAYOUTS[name] for name in scheme]).T
    law = laws["sun"]
    loss = law.predict(law.published["sun"], N=n, D=d, exp_bits=exp_bits, man_bits=man_bits, block=block)
    return {"n_params": n, "tokens": d, "precision": scheme, "weights_bits": 1.0 + exp_bits + man_bits, "scheme": scheme, "exp_bits": exp_bits,
            "man_bits": man_bits, "block": block, "loss": loss * np.exp(0.003 * np.random.default_rng(0).standard_normal(len(rows)))}


@pytest.mark.parametrize("law", ["sun", "E + A/N^alpha + B/D^beta + k[scheme]"])
def test_laws_of_other_inputs_get_a_report(tmp_path, law):
    """Their inputs are no widths, and the optimal width of sun asks for a budget: it has no row."""
    analysis = scaling.analyse(layouts(), bootstrap=0, laws=[law])
    text = scaling.report(layouts(), tmp_path / "report.html", analysis).read_text(encoding="utf-8")
    assert analysis.fit_precision is not None and "How these numbers were made" in text and "compute-optimal width" not in text


SITES = ("qkv", "attention_out", "gate_up", "down")


def _exponent(step, layer, site, role):
    return {"weights": -9, "activations": -7}[role] + layer + 0.25 * SITES.index(site) + step / 100


def write_telemetry(folder, run_id, steps=(1, 10, 20)):
    """As the trainer writes it: roles in any order, sites in that of the forward pass; output gradients were not quantized."""
    rows = [{"step": step, "layer": layer, "site": site, "role": role, "rms": 0.5, "amax": 2.0}
            | ({} if role == "output_gradients" else {"underflow": 0.01 * layer, "overflow": 0.0, "exponent": _exponent(step, layer, site, role)})
            for step in steps for role in ("activations", "output_gradients", "weights") for layer in (0, 1) for site in SITES]
    (folder / run_id / "telemetry.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 30, "lay')
    return rows


@pytest.mark.slow
def test_telemetry_is_drawn_where_runs_have_it(tmp_path):
    """One figure for each kind of run, of the largest and longest; the torn last line of a killed run is passed over."""
    folder = fake_runs.write_runs(tmp_path / "runs", bits={"int4": 4.0, "float32": 32.0})
    for run_id in ("2k-600k-int4-s0", "25k-1500k-int4-s0"):
        rows = write_telemetry(folder, run_id)
    text = scaling.report(folder, tmp_path / "report.html", scaling.analyse(folder, bootstrap=0)).read_text(encoding="utf-8")
    outline = Outline(text)
    assert outline.count["svg"] == 6 and all(address.startswith("data:image/png") for address in outline.fetched)
    for part in ("Run 25k-1500k-int4-s0", "Scales and what they lose: int4", "1 attention_out", "log2 of the scale", "share that became 0"):
        assert part in text
    assert "Run 2k-600k-int4-s0" not in text and "output gradients</text>" not in text
    relation = scaling.telemetry(folder / "25k-1500k-int4-s0")
    assert len(relation) == len(rows) and relation.filter("exponent IS NULL").project("role").distinct().fetchall() == [("output_gradients",)]


def test_heat_maps_are_of_the_right_places(tmp_path):
    """Rows from the first layer down in forward order, columns in order of steps, also of one that was written twice."""
    folder = fake_runs.write_runs(tmp_path / "runs", sizes={"2k": 2_304}, budgets=(600_000,), bits={"int4": 4.0})
    write_telemetry(folder, "2k-600k-int4-s0", steps=(20, 1, 10, 20))
    steps, places, exponent, underflow = report_figures._grids(columns_of(scaling.telemetry(folder).filter("exponent IS NOT NULL")))
    assert steps == [1, 10, 20] and places == [f"{layer} {site}" for layer in (0, 1) for site in SITES]
    assert list(exponent) == ["weights", "activations"]
    for role, grid in exponent.items():
        expected = [[_exponent(step, layer, site, role) for step in steps] for layer in (0, 1) for site in SITES]
        np.testing.assert_array_equal(grid, expected)
        np.testing.assert_array_equal(underflow[role], [[0.0] * 3] * 4 + [[0.01] * 3] * 4)
    write_telemetry(folder, "2k-600k-int4-s0", steps=range(1, 1001))
    steps, _, exponent, _ = report_figures._grids(columns_of(scaling.telemetry(folder).filter("exponent IS NOT NULL")))
    assert len(steps) == report_figures.MAX_COLUMNS and (steps[0], steps[-1]) == (1, 1000) and exponent["weights"].shape == (8, 200)


def test_text_from_records_is_escaped(tmp_path):
    folder = fake_runs.write_runs(tmp_path / "runs", bits={"<b>4&": 4.0, "float32": 32.0}, sizes={"2k": 2_304})
    text = scaling.report(folder, tmp_path / "r.html", scaling.analyse(folder, bootstrap=0)).read_text(encoding="utf-8")
    assert "<b>4&" not in text and "&lt;b&gt;4&amp;" in text


@pytest.mark.slow
def test_the_same_runs_give_the_same_file(tmp_path):
    folder = fake_runs.write_runs(tmp_path / "runs", bits={"int3": 3.0, "float32": 32.0})
    analysis = scaling.analyse(folder, bootstrap=0)
    first, second = (scaling.report(folder, tmp_path / name, analysis).read_bytes() for name in ("a.html", "b.html"))
    assert first == second


def test_impossible_files_are_refused(tmp_path, demo_runs):
    with pytest.raises(ValueError, match="does not exist"):
        scaling.report(demo_runs, tmp_path / "no" / "r.html")
    with pytest.raises(ValueError, match="is a folder"):
        scaling.report(demo_runs, tmp_path)


@pytest.mark.slow
def test_a_sweep_that_goes_on_says_how_much_is_left(tmp_path):
    """Runs that are begun, and those that only the plan names, are counted once; the page loads itself anew if asked to."""
    folder = fake_runs.write_runs(tmp_path / "runs", sizes={"2k": 2_304})
    begun, *_ = sorted(path.name for path in folder.iterdir())
    (folder / begun / "record.json").unlink()
    planned = [path.name for path in folder.iterdir()] + ["one", "two"]
    (folder / "plan.json").write_text(json.dumps({"run_ids": planned}))
    analysis = scaling.analyse(folder, bootstrap=0)
    text = scaling.report(folder, tmp_path / "report.html", analysis, refresh=60).read_text(encoding="utf-8")
    assert f"3 runs of {len(planned)} are not over yet." in text and '<meta http-equiv="refresh" content="60">' in text
    (folder / "plan.json").write_text("[]")
    text = scaling.report(folder, tmp_path / "report.html", analysis).read_text(encoding="utf-8")
    assert "1 run of 12 is not over yet." in text and "refresh" not in text


def test_lines_go_through_the_means_of_seeds():
    """Without a law: two budgets, two seeds each, given in no order."""
    from scaling import plots

    losses = {(2e6, 0): 3.0, (1e6, 1): 4.5, (1e6, 0): 4.0, (2e6, 1): 3.2}
    runs = [Run(f"{d}-{s}", 1e3, d, 4.0, {}, "int4", s, loss, None, None, ()) for (d, s), loss in losses.items()]
    figure = plots.loss_against_tokens(runs, None, set())
    line = next(line for line in figure.axes[0].lines if line.get_linestyle() == "-")
    assert list(line.get_xdata()) == [1e6, 2e6] and list(line.get_ydata()) == [4.25, 3.1]


def test_what_each_role_loses_is_drawn_with_attention(tmp_path):
    """Means by hand over the runs of a precision; a role that no run quantizes has no column, a precision that loses nothing known no row; the
    attention telemetry has maps of its own."""
    from scaling import plots, role_losses

    folder = fake_runs.write_runs(tmp_path / "runs", sizes={"2k": 2_304}, bits={"int4": 4.0, "int6": 6.0, "float32": 32.0})
    planted = {"int4": [{"kv_underflow": 0.2, "kv_overflow": 0.0, "weights_underflow": 1e-5}, {"kv_underflow": 0.4, "kv_overflow": 0.5}, {"kv_underflow": None}],
               "int6": [{"probabilities_underflow": 0.0}] * 3}
    for precision, shares in planted.items():
        for path, found in zip(sorted(folder.glob(f"*-{precision}-*/record.json")), shares, strict=True):
            path.write_text(json.dumps(json.loads(path.read_text()) | found))
    analysis = scaling.analyse(folder, bootstrap=0)
    means = role_losses.role_losses(analysis.runs, analysis.relation)
    assert list(means) == ["int4", "int6"]
    np.testing.assert_allclose(means["int4"], [[1e-5, np.nan, np.nan, 0.3, np.nan, np.nan], [np.nan, np.nan, np.nan, 0.25, np.nan, np.nan]])
    with plots.style():
        left, right = role_losses.figure(means).axes
    assert [tick.get_text() for tick in left.get_xticklabels()] == ["weights", "kv", "probabilities"]
    assert [text.get_text() for text in left.texts] == ["1e-05", "30%", "0"] and [text.get_text() for text in right.texts] == ["25%"]
    rows = [{"step": step, "layer": layer, "site": "attention", "role": role, "underflow": 0.1, "overflow": 0.0, "exponent": -3.0 - layer}
            for step in (1, 9) for role in ("kv", "scores", "probabilities") for layer in (0, 1)]
    run_id = next(run.run_id for run in analysis.runs if run.precision == "int4")
    (folder / run_id / "telemetry.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = scaling.report(folder, tmp_path / "report.html", analysis).read_text(encoding="utf-8")
    assert "What rounding loses, by role." in text and "Scales and what they lose in attention: int4" in text
    assert text.count("Scales and what they lose") == 1 and "0 attention</text>" in text and "probabilities</text>" in text
    steps, places, exponent, underflow = report_figures._grids(columns_of(scaling.telemetry(folder)), report_figures.ATTENTION_ROLES)
    assert (steps, places, list(exponent)) == ([1, 9], ["0 attention", "1 attention"], ["kv", "scores", "probabilities"])
    np.testing.assert_array_equal(exponent["scores"], [[-3.0, -3.0], [-4.0, -4.0]])


def test_a_report_of_laws_of_ones_own(tmp_path, capsys):
    """A formula is chosen, its held-out runs are told, and the sentences fall back on measured gaps, which need no law."""
    folder = fake_runs.write_runs(tmp_path / "demo")
    own = "E + A/N^alpha + B/D^alpha + C*exp(-weights_bits/g); g=0.2:10"
    assert run("report", [str(folder), "--laws", f"mse_efficiency,{own}", "--out", str(tmp_path / "r.html"), "--bootstrap", "0"]) == 0
    told, page = capsys.readouterr().out, (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "mse_efficiency" in told and "E + A/N^alpha" in told and "pairs) (mean over matched runs with its 95% interval; no law tells it here)" in told
    assert "Held-out predictions" in page and "Fit against data" in page
    assert run("report", [str(folder), "--laws", "kumrr", "--out", str(tmp_path / "x.html")]) == 2
    assert "kumrr" in capsys.readouterr().err
