"""The report: self-contained, complete, and there for every kind of run folder."""
from __future__ import annotations

import html.parser
import re

import pytest

import scaling
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
    assert outline.count["svg"] == 5 and outline.count["figcaption"] == 5
    assert outline.headings == ["Figures", "Fitted constants: kumar:tied+plain", "Fitted constants: chinchilla:tied", "Held-out predictions",
                                "Seed noise and matched gaps", "Runs", "How these numbers were made"]
    for part in ("nats/token", "held out", "condition number", "1 run diverged", "1 run failed", "diverged at step 120", "training compute 6ND"):
        assert part in text
    assert text.count("<tr") > 48 + 12
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))  # five figures on a page must not share clip paths
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', text)) == set(ids)


@pytest.mark.parametrize(("design", "svgs", "parts"), [
    ({"bits": {"int4": 4.0}}, 4, ("every run is int4", "one precision only")),
    ({"bits": {"float32": 32.0}}, 4, ("no quantized run",)),
    ({"sizes": {"2k": 2_304}}, 4, ("N is 2304 in every fitted row", "nothing is held out")),
    ({"sizes": {"2k": 2_304}, "budgets": (600_000,), "bits": {"int4": 4.0}}, 3, ("cannot fit",)),
    ({"diverge": tuple(range(48))}, 1, ("48 runs diverged", "no finished run")),
    ({"fail": tuple(range(48))}, 0, ("nothing to draw",)),
    ({"seeds": 2, "bits": {"int3": 3.0, "float32": 32.0}}, 5, ("degrees of freedom", "is held at 0")),
])
def test_every_kind_of_folder_gets_a_report(tmp_path, design, svgs, parts):
    text, outline = make(tmp_path, **design)
    assert outline.count.get("svg", 0) == svgs and outline.fetched == []
    for part in parts:
        assert part in text
    assert "nan" not in re.sub(r"<style>.*?</style>", "", text, flags=re.S).replace("finance", "").split("<h2>Runs")[0]


def test_text_from_records_is_escaped(tmp_path):
    folder = fake_runs.write_runs(tmp_path / "runs", bits={"<b>4&": 4.0, "float32": 32.0}, sizes={"2k": 2_304})
    text = scaling.report(folder, tmp_path / "r.html", scaling.analyse(folder, bootstrap=0)).read_text(encoding="utf-8")
    assert "<b>4&" not in text and "&lt;b&gt;4&amp;" in text


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
