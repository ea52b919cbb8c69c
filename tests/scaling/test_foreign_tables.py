"""Tables as other people release them: their names, units and kinds of precision, through the report and the sentences."""
from __future__ import annotations

import itertools
import json
import math
import re
import warnings

import duckdb
import numpy as np
import pytest

import scaling
from scaling.cli import run
from scaling.laws import laws

KUMAR = laws["kumar"].published["kumar"]
WIDTHS = [(4, 4), (4, 8), (8, 4), (6, 6), (8, 8), (4, None), (None, None)]
MAPPED = {"n_params": "N*1e6", "tokens": "tokens*1e9", "loss": "val", "precision": "scheme", "weights_bits": "W", "activations_bits": "A"}


def released(noise: float = 0.002) -> dict[str, np.ndarray]:
    """Kumar's published law on their sizes and budgets; sizes in millions under the law's own name N, tokens in billions under the run table's."""
    cells = list(itertools.product((30, 60, 110, 220), (1.5, 3, 6, 13), WIDTHS))
    W, A = (np.array([np.nan if pair[i] is None else pair[i] for _, _, pair in cells], dtype=float) for i in (0, 1))
    N, D = (np.array([float(cell[i]) for cell in cells]) for i in (0, 1))
    loss = laws["kumar"].predict(KUMAR, N=N * 1e6, D=D * 1e9, weights_bits=W, activations_bits=A)
    scheme = ["bf16" if w is None else f"W{w}A{a or 16}" for _, _, (w, a) in cells]
    return {"N": N, "tokens": D, "W": W, "A": A, "scheme": scheme, "val": loss * np.exp(noise * np.random.default_rng(0).standard_normal(len(cells)))}


@pytest.fixture(scope="module")
def analysis():
    return scaling.analyse(released(), bootstrap=0, columns=MAPPED)


def test_a_mapped_size_is_the_one_that_is_fitted(analysis):
    """The table has an N of its own, in millions, which a law would take before n_params."""
    fit = analysis.fit_precision
    assert fit.ranges["N"] == (30e6, 110e6) and fit.ranges["D"] == (1.5e9, 13e9)
    A, alpha = fit.params["A"], fit.params["alpha"]
    assert A * 1e8**-alpha == pytest.approx(KUMAR["A"] * 1e8 ** -KUMAR["alpha"], rel=0.03)  # the term, which A and alpha share, in nats


def test_a_precision_costs_what_its_own_widths_cost(analysis):
    """W4A8 is not W4A4: each operand at its own width, against the published law."""
    sentence = scaling.summary(analysis.fit_chinchilla, analysis.fit_precision, analysis.relation)[0]
    baseline = laws["kumar"].predict(KUMAR, N=220e6, D=6e9)
    for name, widths in {"W4A4": (4, 4), "W4A8": (4, 8), "W8A4": (8, 4), "W4A16": (4, np.inf), "W6A6": (6, 6)}.items():
        truth = laws["kumar"].predict(KUMAR, N=220e6, D=6e9, weights_bits=widths[0], activations_bits=widths[1]) - baseline
        told = float(re.search(rf"{name} ([+-][\d.]+)", sentence).group(1))
        assert told == pytest.approx(truth, rel=0.12), name


def test_a_report_of_draws_without_a_value_warns_of_nothing(tmp_path):
    """Resamples in which no width is best: half the draws are infinite, and inf - inf is no number."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit = scaling.fit(released(), "kumar", bootstrap=40, columns={"N": "N*1e6", "D": "tokens*1e9", "loss": "val", "weights_bits": "W", "activations_bits": "A"})
        estimate = fit.estimate(lambda p: np.inf if p["gamma_w"] > 0 else 1.0)
    assert not estimate.identified


def chinchilla(name: str = "loss") -> dict[str, list]:
    """Column -> values of the Epoch constants on a grid, without noise."""
    N, D = (np.array(v) for v in zip(*itertools.product((1e8, 4e8, 1.6e9, 6.4e9), (2e9, 1e10, 5e10, 2e11)), strict=True))
    return {"N": N.tolist(), "D": D.tolist(), name: laws["chinchilla"].predict(laws["chinchilla"].published["epoch"], N=N, D=D).tolist()}


def write(path, separator: str = ",", **columns):
    lines = [separator.join(columns), *(separator.join(map(str, row)) for row in zip(*columns.values(), strict=True))]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def recovers(fit) -> bool:
    return fit.params == pytest.approx(laws["chinchilla"].published["epoch"], rel=1e-3)


@pytest.mark.parametrize("word", ["N/A", "diverged", "-"])
def test_where_leaves_out_rows_whose_numbers_are_words(word, tmp_path):
    table = chinchilla()
    table["loss"][3] = table["loss"][7] = word
    path = write(tmp_path / "runs.csv", **table)
    with pytest.raises(ValueError, match=re.escape(f"loss (\"loss\") is text in 2 of 16 rows, such as '{word}'; law chinchilla needs numbers")):
        scaling.fit(path, "chinchilla")
    fit = scaling.fit(path, "chinchilla", where=f"loss <> '{word}'")
    assert recovers(fit) and fit.metrics["rows"] == 14
    assert scaling.compare(path, ["chinchilla"], where=f"loss <> '{word}'", leave=["largest-N"]).left_out[0].rows == 4
    assert len(scaling.analyse(path, bootstrap=0, where=f"loss <> '{word}'").runs) == 14  # a report, and N and D by the names that laws use


@pytest.mark.parametrize(("spell", "remedy"), [
    (lambda n: f"{n:,.0f}", """replace("N", ',', '')"""), (lambda n: f"{n / 1e6:g}M", """TRY_CAST(regexp_extract("N", '[0-9.]+') AS DOUBLE)*1e6"""),
    (lambda n: f"{n / 1e9:.4f}".replace(".", ","), """replace("N", ',', '.')"""),
])  # fmt: skip
def test_numbers_that_are_spelt_as_text_are_refused_with_what_reads_them(spell, remedy, tmp_path):
    table = chinchilla()
    path = write(tmp_path / "runs.tsv", "\t", **table | {"N": [spell(n) for n in table["N"]]})
    with pytest.raises(ValueError, match=r"N \(\"N\"\) is text in 16 of 16 rows, such as '") as error:
        scaling.fit(path, "chinchilla")
    assert remedy.removesuffix("*1e6") in str(error.value)
    unit = 1e9 if "'.')" in remedy else 1.0
    assert recovers(scaling.fit(path, "chinchilla", columns={"N": f"CAST({remedy} AS DOUBLE) * {unit}"}))


def test_a_column_that_is_not_there_is_told_with_those_that_are(tmp_path):
    path = write(tmp_path / "runs.csv", **{"Model Size": [1, 2], "Tokens": [1, 2], "Loss": [1, 2]})
    names = {"N": '"Model Size"', "D": "Tokens", "loss": "Loss"}
    told = re.escape('"Model size (B)" not found in FROM clause! Did you mean "Model Size"? The table has Model Size, Tokens, Loss')
    with pytest.raises(ValueError, match=told):
        scaling.fit(path, "chinchilla", columns=names | {"N": '"Model size (B)"'})
    with pytest.raises(ValueError, match=r"law chinchilla needs N, D, loss; .* \(name them: columns N=\.\.\.,D=\.\.\.,loss=Loss\)"):
        scaling.fit(path, "chinchilla")
    for wrong in ({"where": "Modelsize > 1"}, {"holdout": "Modelsize > 1"}):
        with pytest.raises(ValueError, match='Did you mean "Model Size"'):
            scaling.fit(path, "chinchilla", columns=names, **wrong)


def test_tables_as_they_are_packed(tmp_path):
    table = chinchilla()
    path = write(tmp_path / "runs.csv", **table)
    duckdb.sql(f"COPY (FROM '{path}') TO '{tmp_path / 'runs.csv.gz'}' (COMPRESSION gzip)")
    assert recovers(scaling.fit(tmp_path / "runs.csv.gz", "chinchilla"))
    rows = [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]
    assert recovers(scaling.fit(rows, "chinchilla"))
    with pytest.raises(ValueError, match="table: a list of int is no table"):
        scaling.fit([1, 2], "chinchilla")
    (tmp_path / "whole.json").write_text(json.dumps(table))
    with pytest.raises(ValueError, match=r'N \("N"\) is DOUBLE\[\], not one value in each row'):
        scaling.fit(tmp_path / "whole.json", "chinchilla")
    (tmp_path / "lab.duckdb").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"a database holds many tables; name one in a query: \"ATTACH '.*lab.duckdb' AS lab \(READ_ONLY\); FROM lab.NAME\""):
        scaling.fit(tmp_path / "lab.duckdb", "chinchilla")


def test_a_report_on_no_row_is_refused():
    with pytest.raises(ValueError, match="where N > 1e20 leaves none of 16 rows"):
        scaling.analyse(chinchilla(), bootstrap=0, where="N > 1e20")


def test_copies_are_told_and_count_once_for_what_can_be_fitted():
    table = chinchilla()
    twice = {name: values + values[:5] for name, values in table.items()}
    notes = scaling.fit(twice, "chinchilla").metrics["notes"]
    assert any(note.startswith("5 of 21 rows are copies of another (the same inputs and loss)") for note in notes)
    once = scaling.fit(twice, "chinchilla", where="row_number() OVER (PARTITION BY N, D, loss) = 1")
    assert once.metrics["rows"] == 16 and once.metrics["notes"] == []
    with pytest.raises(ValueError, match="16 rows, of which 12 are copies of another, cannot fit the 5 free parameters"):
        scaling.fit({name: (values[:3] + values[7:8]) * 4 for name, values in table.items()}, "chinchilla")


def test_a_law_of_widths_on_rows_without_any_says_so():
    table = chinchilla() | {"weights_bits": [np.nan] * 8 + [32.0] * 8}
    fit = scaling.fit(table, "kumar")
    assert any(note.startswith("no row is quantized: weights_bits, activations_bits, kv_bits") for note in fit.metrics["notes"]) and recovers(fit)


@pytest.mark.parametrize(("options", "line"), [
    ({"fixed": {"E": np.nan}}, "fixed E=nan: law chinchilla takes for E a positive number"),
    ({"fixed": {"E": -1.0}}, "fixed E=-1: law chinchilla takes for E a positive number"),
    ({"fixed": laws["chinchilla"].published["epoch"]}, "law chinchilla: every constant is fixed, so that nothing is left to fit; fix fewer of A, B, E"),
    ({"priors": {"alpha": 0.3}}, "priors alpha=0.3: need (value, deviation)"),
    ({"columns": "N=N"}, "columns='N=N': need a mapping of name to value"),
    ({"fixed": "E=1"}, "fixed='E=1': need a mapping of name to value"),
    ({"bootstrap": 2.5}, "bootstrap=2.5: need a whole number of at least 0"),
    ({"seed": "a"}, "seed='a': need a whole number of at least 0"),
    ({"delta": "small"}, "delta='small': need a positive number"),
    ({"where": 3}, "where=3: need a condition in SQL, as text"),
])  # fmt: skip
def test_options_of_another_kind_are_refused_in_one_line(options, line):
    with pytest.raises(ValueError) as error:
        scaling.fit(chinchilla(), "chinchilla", **options)
    assert str(error.value).startswith(line) and "\n" not in str(error.value)


@pytest.fixture(scope="module")
def kumar_fit(tmp_path_factory):
    columns = MAPPED | {"N": MAPPED["n_params"], "D": MAPPED["tokens"]}
    fit = scaling.fit(released(), "kumar:tied", columns={name: columns[name] for name in ("N", "D", "loss", "weights_bits", "activations_bits")})
    return fit, str(fit.save(tmp_path_factory.mktemp("fits") / "fit.json"))


@pytest.mark.parametrize(("name", "columns", "line"), [
    ("loss_gap", {"N": 1e8, "weight_bits": 4}, "weight_bits=4: unknown; the widths are weights_bits, activations_bits, kv_bits"),
    ("loss_gap", {"N": 1e8, "kv_bits": 4}, "loss_gap: kv_bits=4: no fitted row had it quantized, so that this fit has no gamma_kv"),
    ("bits_for_gap", {"N": 1e8, "loss": 4}, "bits_for_gap of law kumar takes N, gap; given: N, loss"),
    ("optimal_tokens_per_param", {}, "optimal_tokens_per_param of law kumar takes compute, bits (may be left out); given: nothing"),
    (lambda p: p["nope"], {}, "asks for 'nope', which this fit does not have; it has A, B, E"),
    (lambda p: (-1.0) ** p["alpha"], {}, "has no real value at these constants"),
])  # fmt: skip
def test_a_quantity_that_cannot_be_told_says_what_it_takes(name, columns, line, kumar_fit):
    with pytest.raises(ValueError) as error:
        kumar_fit[0].estimate(name, **columns)
    assert line in str(error.value) and "\n" not in str(error.value)


def test_the_gap_of_a_misspelt_width_is_no_zero():
    for function, kind in ((laws["kumar"].functionals["efficiency"], KUMAR), (laws["mse_efficiency"].functionals["efficiency"], {"c_w": 1, "kappa_w": 1})):
        with pytest.raises(ValueError, match="weight=4: unknown; the"):
            function(kind, weight=4)


def test_derived_numbers_on_the_command_line(kumar_fit, capsys):
    fit, path = kumar_fit
    assert run("predict", [path, "loss_gap", "N=1e8", "weights_bits=4"]) == 0
    truth = laws["kumar"].predict(KUMAR, N=1e8, D=1e10, weights_bits=4) - laws["kumar"].predict(KUMAR, N=1e8, D=1e10)
    value, low, high = map(float, re.fullmatch(r"loss_gap at N=1e8, weights_bits=4: (\S+), 95% interval (\S+) to (\S+)\n", capsys.readouterr().out).groups())
    assert low < value < high and value == pytest.approx(truth, rel=0.1)
    assert run("predict", [path, "P_star"]) == 2
    assert "'P_star': not NAME=VALUE; law kumar takes N, D, weights_bits, activations_bits, kv_bits; before these may come one of optimal_bits" in capsys.readouterr().err
    assert run("predict", [path, "n_a"]) == 0 and capsys.readouterr().out.startswith("n_a: 1.")


def test_the_best_layout_has_its_rivals_instead_of_an_interval(tmp_path, capsys):
    """Sun's constants. At 8 bits E4M3 beats E3M4 by 6 % of capacity, nothing else comes near, so its share is the probability that one Gaussian is positive."""
    published = laws["sun"].published["sun"]
    cells = itertools.product((41e6, 154e6, 679e6), (1e10, 1e11, 1e12), ((1, 1), (2, 1), (3, 2), (4, 3), (2, 4), (5, 2)), (32, 512))
    N, D, E, M, B = (np.array(v, dtype=float) for v in zip(*((n, d, *layout, b) for n, d, layout, b in cells), strict=True))
    loss = laws["sun"].predict(published, N=N, D=D, exp_bits=E, man_bits=M, block=B) * np.exp(0.002 * np.random.default_rng(1).standard_normal(N.size))
    fit = scaling.fit({"N": N, "D": D, "exp_bits": E, "man_bits": M, "block": B, "loss": loss}, "sun")
    layout = fit.estimate("best_layout", bits=8)
    margin = fit.estimate(lambda p: p["delta"] * np.log(4.5 / 3.5) + p["nu"] * np.log(3.5 / 4.5))
    probability = 0.5 * (1 + math.erf(margin.value / ((margin.high - margin.low) / 2 / fit.quantile) / 2**0.5))
    assert layout.identified and set(layout.shares) == {"E4M3", "E3M4"} and sum(layout.shares.values()) == pytest.approx(1.0)
    assert layout.shares["E4M3"] == pytest.approx(probability, abs=0.05) and layout.value == ("E4M3" if margin.value > 0 else "E3M4")
    assert run("predict", [str(fit.save(tmp_path / "fit.json")), "best_layout", "bits=8"]) == 0
    assert capsys.readouterr().out == f"best_layout at bits=8: {layout}\n"


def test_baselines_by_name_have_no_error():
    published = {"A": 400.0, "B": 2000.0, "E": 1.8, "alpha": 0.34, "beta": 0.36, "c_w": 8.0, "kappa_w": 0.8}
    schemes = ["int3", "int4", "mxfp4", "BF16"]
    N, D, scheme = map(np.array, zip(*itertools.product((3e7, 1e8, 3e8), (1e9, 1e10, 6e10), schemes), strict=True))
    loss = laws["mse_efficiency"].predict(published, N=N, D=D, weights_mse=scheme)
    assert np.array_equal(loss[3::4], laws["chinchilla"].predict(published, N=N, D=D)[3::4])
    fit = scaling.fit({"N": N, "D": D, "scheme": scheme, "loss": loss}, "mse_efficiency", columns={"weights_mse": "scheme"})
    assert fit.params == pytest.approx(published, rel=1e-3)
    with pytest.raises(ValueError, match="^weights_mse: format='w4' is not known; accepted: "):
        scaling.fit({"N": N, "D": D, "scheme": np.full(N.size, "w4"), "loss": loss}, "mse_efficiency", columns={"weights_mse": "scheme"})


def test_units_that_no_law_takes_are_told():
    table = {name: np.array(values) for name, values in chinchilla().items()}
    notes = scaling.fit(table | {"N": table["N"] / 1e9, "D": table["D"] / 1e9, "loss": np.exp(table["loss"])}, "chinchilla").metrics["notes"]
    assert [note.split(":")[0] for note in notes] == ["N is 0.1 to 6.4", "D is 2 to 200", f"loss is {np.exp(min(table['loss'])):.4g} to {np.exp(max(table['loss'])):.4g}, "
                                                      "more than the logarithm of any vocabulary"]
    assert scaling.fit(table, "chinchilla").metrics["notes"] == []


def test_a_report_on_losses_that_are_none_is_refused(tmp_path, capsys):
    path = write(tmp_path / "runs.csv", **chinchilla() | {"loss": [-1.0, *chinchilla()["loss"][1:]]})
    assert run("report", [str(path), "--out", str(tmp_path / "r.html")]) == 2 and not (tmp_path / "r.html").exists()
    assert capsys.readouterr().err.startswith("bitlaw: loss is zero or negative in 1 of 16 rows; a run table needs positive losses")


def test_copies_are_no_residual():
    """Five different rows determine five constants; four copies of each would pass for fifteen degrees of freedom."""
    with pytest.raises(ValueError, match="20 rows, of which 15 are copies of another, cannot fit the 5 free parameters"):
        scaling.fit({name: np.tile(np.array(values)[[0, 3, 6, 9, 15]], 4) for name, values in chinchilla().items()}, "chinchilla")


def test_what_python_passes_is_named(kumar_fit):
    fit = kumar_fit[0]
    for columns, line in (({"N": "a", "D": 1e10}, "predict: N='a': "), ({"N": [1e8, 2e8], "D": [1e9] * 3}, r"predict: N has shape \(2,\), D has shape \(3,\): give"),
                          ({"N": 1e8, "D": 1e9, "weights_bits": "int4"}, "predict: weights_bits='int4': ")):
        with pytest.raises(ValueError, match=line):
            fit.predict(**columns)
    with pytest.raises(ValueError, match="^base scheme = 1: .*The table has N, D, loss$"):
        scaling.fit(chinchilla(), "chinchilla", base="scheme = 1")
    assert [fitted.label for fitted in scaling.compare(chinchilla(), "chinchilla, chinchilla:tied").fits] == ["chinchilla", "chinchilla:tied"]


@pytest.mark.parametrize(("verb", "options", "line"), [
    ("fit", ["--law", "chinchilla", "--out", "runs.json"], "out=runs.json: is the table that is read; name another file"),
    ("fit", ["--law", "chinchilla", "--out", "runs.csv"], "out=runs.csv: cannot write .csv; use .json"),
    ("report", ["--out", "runs.json"], "out=runs.json: cannot write .json; use .html or .htm"),
])  # fmt: skip
def test_a_table_is_not_written_over(verb, options, line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = json.dumps([dict(zip(chinchilla(), row, strict=True)) for row in zip(*chinchilla().values(), strict=True)])
    (tmp_path / "runs.json").write_text(text)
    assert run(verb, ["runs.json", *options]) == 2 and capsys.readouterr().err == f"bitlaw: {line}\n"
    assert (tmp_path / "runs.json").read_text() == text and [path.name for path in tmp_path.iterdir()] == ["runs.json"]


@pytest.mark.parametrize("odd", [1e-300, 1e17])
def test_losses_that_no_law_spans_are_refused(odd):
    with pytest.raises(ValueError, match=r"^loss is .* to .*: no law spans that; filter out"):
        scaling.fit(chinchilla() | {"loss": [odd, *chinchilla()["loss"][1:]]}, "chinchilla")


@pytest.mark.parametrize("diverged", [1e2, 1e5, 1e9])
def test_one_diverged_run_among_the_losses_is_an_outlier_and_no_crash(diverged):
    """The Huber loss gives it the pull of any other run, however far off it is: the other runs stay within two deltas of the law."""
    table = chinchilla()
    table["loss"][9] = diverged
    fit = scaling.fit(table, "chinchilla")
    others = np.arange(16) != 9
    errors = np.log(fit.law.predict(fit.params, N=np.array(table["N"]), D=np.array(table["D"]))) - np.log(chinchilla()["loss"])
    assert fit.converged and fit.metrics["at_bound"] == [] and np.abs(errors[others]).max() < 2e-3
