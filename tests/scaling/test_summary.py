"""The three sentences and the analysis behind them: right numbers where they are identified, none where they are not."""
from __future__ import annotations

import dataclasses
import re

import pytest

import scaling
from tests.scaling import fake_runs

TWO = {"sizes": {"2k": 2_304, "5k": 5_120}, "budgets": (600_000, 3_800_000)}


def sentences(**design):
    table = fake_runs.rows(**design)
    analysis = scaling.analyse(table, bootstrap=0)
    return analysis, scaling.summary(analysis.fit_chinchilla, analysis.fit_precision, table)


def test_the_demo_gets_three_sentences_with_intervals():
    analysis, (cost, bits, far) = sentences(noise=0.002)
    for name in ("int3", "int4", "int6"):
        value, low, high = map(float, re.search(rf"{name} (\+\S+) \((\S+) to (\S+);", cost).groups())
        truth = fake_runs.true_loss(24_576, 1e6, fake_runs.BITS[name]) - fake_runs.true_loss(24_576, 1e6, 32)
        assert low - 1e-4 <= truth <= high + 1e-4 and low < value < high
    assert re.match(r"Which bits suffice: [67] bits.*0.01 nats per token \(a stated tolerance.*95% interval", bits)
    assert re.match(r"How far off the prediction was: the 12 runs at 24,576 parameters, held out,.*of 12 fell in their 95% prediction", far)
    assert analysis.fit_precision.label == "kumar:tied+plain" and analysis.fit_chinchilla.metrics["held_out"]["rows"] == 3
    assert "BIC" in analysis.precision.reason()


def test_seed_noise_is_the_tolerance_where_it_is_known():
    _, (_, bits, _) = sentences(seeds=2)
    assert "the noise between seeds, 48 degrees of freedom" in bits


@pytest.mark.parametrize(("design", "cost", "bits", "far"), [
    ({"bits": {"int4": 4.0}}, "cannot be told", "cannot be told", "the 3 runs at 24,576 parameters"),
    ({"bits": {"float32": 32.0}}, "cannot be told", "cannot be told", "the 3 runs at 24,576 parameters"),
    ({"sizes": {"2k": 2_304}}, "no law tells it here", "no precision law was fitted", "no law could be fitted"),
    (TWO, "by the fitted law", "bits", "nothing was held out"),
])
def test_poor_designs_get_no_number_they_do_not_identify(design, cost, bits, far):
    _, told = sentences(**design)
    assert len(told) == 3
    for sentence, part in zip(told, (cost, bits, far), strict=True):
        assert part in sentence and "nan" not in sentence


def test_an_empty_folder_of_results_is_described():
    table = fake_runs.rows() | {"status": ["diverged"] * 48}
    analysis = scaling.analyse(table)
    assert analysis.fit_precision is None and analysis.why["precision"] == "no finished run with a finite loss"
    assert all("no finished runs" in sentence for sentence in scaling.summary(None, None, table))


def test_data_sets_are_not_mixed():
    table = fake_runs.rows()
    other = {name: values[:4] for name, values in table.items()}
    both = {name: [*values, *other[name]] for name, values in table.items()} | {"data": ["stdlib"] * 48 + ["mine"] * 4}
    analysis = scaling.analyse(both, bootstrap=0)
    assert len(analysis.runs) == 48 and analysis.fit_precision.metrics["rows"] == 36
    assert "2 data sets in one folder: only the 48 runs on stdlib are analysed" in analysis.notes


@pytest.mark.slow
def test_two_corpora_of_one_name_are_not_mixed():
    """The standard libraries of two Pythons: both "stdlib", the second with losses that would move every number."""
    table = fake_runs.rows()
    other = {name: values[:16] for name, values in table.items()} | {"loss": table["loss"][:16] + 1.0}
    other["n_params"] = other["n_params"] * 100  # and with the largest size of all
    both = {name: [*values, *other[name]] for name, values in table.items()}
    both |= {"data": ["stdlib"] * 64, "data_sha256": ["ab" * 32] * 48 + ["cd" * 32] * 16, "status": ["done"] * 63 + ["diverged"]}
    alone, mixed = scaling.analyse(table, bootstrap=0), scaling.analyse(both, bootstrap=0)
    assert "2 data sets in one folder: only the 48 runs on stdlib (sha256 abababababab) are analysed" in mixed.notes
    assert len(mixed.whole) == 64 and len(mixed.relation) == len(mixed.runs) == 48
    told, expected = (scaling.summary(a.fit_chinchilla, a.fit_precision, a.relation) for a in (mixed, alone))
    assert told == expected and mixed.gaps == alone.gaps
    assert "24,576 parameters, held out" in told[2]


@pytest.mark.slow
def test_runs_that_nothing_tells_apart_are_counted_in_a_note():
    table = {name: [*values, *values[:4]] for name, values in fake_runs.rows().items()}
    analysis = scaling.analyse(table, bootstrap=0)
    (note,) = analysis.notes
    assert note.startswith("8 runs share size, tokens, precision, seed,") and sum(len(gap.values) for gap in analysis.gaps) == 33


def test_variants_that_the_data_need_are_chosen():
    """alpha = beta is dropped when the data say so: a truth with very different exponents."""
    truth = fake_runs.TRUTH | {"alpha": 0.25, "beta": 0.6, "A": 12.0, "B": 4000.0}
    analysis, _ = sentences(truth=truth, noise=0.001)
    assert analysis.fit_precision.label == "kumar:plain" and "tied" not in analysis.fit_chinchilla.label


def test_a_table_without_losses_is_refused():
    with pytest.raises(ValueError, match="a run table needs n_params, tokens, loss; this one has a"):
        scaling.analyse({"a": [1]})


def test_comparison_refuses_names_and_keeps_the_rest():
    table = fake_runs.rows(bits={"float32": 32.0})
    with pytest.raises(ValueError, match="law 'foo': unknown"):
        scaling.compare(table, ["chinchilla", "foo"])
    rows = {name: values[:4] for name, values in table.items()}
    comparison = scaling.compare(rows, ["chinchilla:tied", "chinchilla"])
    assert len(comparison.fits) == 1 and "4 rows cannot fit the 5" in comparison.refused["chinchilla"]


@pytest.mark.slow
def test_done_runs_without_a_loss_are_counted():
    table = fake_runs.rows()
    table["loss"][:2] = float("nan")
    analysis = scaling.analyse(table | {"status": ["done"] * 47 + ["diverged"]}, bootstrap=0)
    assert "2 finished run(s) without size, tokens or a finite loss are left out" in analysis.notes
    assert analysis.fit_precision.metrics["rows"] == 34 and analysis.fit_precision.metrics["dropped"] == {"status is not done": 1}


def test_the_reason_says_why_one_candidate_is_left():
    """Without offsets in the truth, the variant that frees them fits and is passed over: that is not "could not be fitted"."""
    alone = scaling.compare(fake_runs.rows(), ["kumar:tied+plain"])
    assert alone.reason() == "kumar:tied+plain is the only candidate that could be fitted"
    passed = scaling.compare(fake_runs.rows(), ["kumar:tied+plain", "kumar:tied"])
    assert passed.reason() == ("kumar:tied+plain is the only supported candidate; passed over, since what they free is not determined by "
                               "the data: kumar:tied")
    stuck = dataclasses.replace(passed.fits[1], metrics=passed.fits[1].metrics | {"converged": False})
    assert scaling.Comparison((alone.best, stuck), {}).reason() == "kumar:tied+plain is the only supported candidate; not converged: kumar:tied"
    with pytest.raises(ValueError, match="compare: no fit converged .kumar:tied."):
        scaling.Comparison((stuck,), {}).reason()


def test_the_reason_speaks_of_converged_candidates_only():
    """One quantized width and two sizes: some variants are singular, and the choice must still be told truly."""
    table = fake_runs.rows(sizes={"2k": 2_304, "5k": 5_120}, budgets=(600_000, 3_800_000), bits={"int3": 3.0, "float32": 32.0})
    comparison = scaling.compare(table, scaling.analysis.PRECISION)
    best = comparison.best
    assert best.converged and best.label in comparison.reason()
    assert all(len(best.free) <= len(f.free) or f.metrics["bic"] > best.metrics["bic"] - 2 for f in comparison.fits if f.converged)
