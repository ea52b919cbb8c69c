"""Laws from a formula: what they mean, what they fit, and where they say the text is wrong."""
from __future__ import annotations

import math

import numpy as np
import pytest

import scaling
from scaling.cli import run
from scaling.laws import laws, resolve


def test_a_formula_is_the_law_that_is_built_in(epoch, tmp_path):
    fit = scaling.fit(law="E + A/N^alpha + B/D^beta", **epoch)
    assert fit.metrics["objective"] == pytest.approx(0.0010182740178, abs=1e-12) and fit.law.combine is None
    assert set(fit.params) == {"A", "B", "E", "alpha", "beta"}
    again = scaling.load(fit.save(tmp_path / "FIT.json"))
    assert again.predict(N=1e9, D=2e10).loss == fit.predict(N=1e9, D=2e10).loss


@pytest.mark.parametrize(("text", "value"), [
    ("E + (A/N^alpha + B/D^beta)^gamma", 1.5 + (3 / 100**0.5 + 4 / 1000**0.3) ** 0.7),
    ("E - A/N^alpha + exp(-D/A)", 1.5 - 3 / 100**0.5 + math.exp(-1000 / 3)),
    ("((A/N)^(alpha/beta) + B/D)^beta", ((3 / 100) ** (0.5 / 0.3) + 4 / 1000) ** 0.3),
    ("E*2^-N**0.5 + A*-B^2", None),
    ("sqrt(A)*log2(N) + tanh(gamma)*log(D)/2e0", math.sqrt(3) * math.log2(100) + math.tanh(0.7) * math.log(1000) / 2),
    ("A - B - E*N/D/gamma", 3 - 4 - 1.5 * 100 / 1000 / 0.7),
    ("A*N^-alpha^beta + E", 3 * 100 ** -(0.5**0.3) + 1.5),
])
def test_formulas_have_the_value_of_arithmetic(text, value):
    p = {"A": 3.0, "B": 4.0, "E": 1.5, "alpha": 0.5, "beta": 0.3, "gamma": 0.7}
    if value is None:
        with pytest.raises(ValueError, match="expected a number, a name or '\\(' at character 17, found '-'"):
            resolve(text)
        return
    law = resolve(text)[0]
    used = {name: number for name, number in p.items() if name in law.names}
    assert law.predict(used, **{name: {"N": 100.0, "D": 1000.0}[name] for name in law.inputs}) == pytest.approx(value, rel=1e-12)


def test_kinds_follow_from_places():
    law = resolve("n/N^a + E + D^b/N^a/g + k*z^kappa; z; kappa=-1:3")[0]
    assert law.inputs == ("N", "D", "z")
    assert {p.name: p.kind for p in law.parameters} == {"n": "amplitude", "E": "amplitude", "k": "amplitude", "g": "divisor", "a": "exponent",
                                                        "b": "exponent", "kappa": "exponent"}
    assert (law.parameter("kappa").low, law.parameter("kappa").high) == (-1.0, 3.0)
    assert {p.name: p.kind for p in resolve("B/D^beta + N/(A*D) + E")[0].parameters}["A"] == "divisor"
    sun = resolve("n/N^a + d/D^b + e + D^b/N^a*log2(block)/(g*(exp_bits + 0.5)^delta*(man_bits + 0.5)^nu)")[0]
    assert sun.combine is None and sun.parameter("g").kind == "divisor" and sun.parameter("nu").kind == "exponent"
    assert resolve("E + A/N^alpha*exp(-gamma/D)")[0].parameter("gamma").kind == "scale"


def test_a_formula_on_columns_of_its_own_through_the_command_line(tmp_path, capsys):
    n, width = (x.ravel() for x in np.meshgrid([1e6, 3e6, 1e7, 3e7, 1e8], [2.0, 3.0, 4.0, 6.0, 8.0]))
    loss = (40 * n**-0.3 + 1.7 + 2.5 * np.exp(-width / 1.3)) * np.exp(1e-4 * np.random.default_rng(0).standard_normal(n.size))
    scaling.write_table(scaling.table({"size": n, "width": width, "nats": loss}), tmp_path / "t.csv")
    out = tmp_path / "FIT.json"
    code = run("fit", [str(tmp_path / "t.csv"), "--law", "E + A/N^alpha + C*exp(-w/gamma)", "--columns", "N=size,w=width,loss=nats",
                       "--out", str(out)])
    assert code == 0, capsys.readouterr().err
    fit = scaling.load(out)
    for name, value in (("E", 1.7), ("A", 40), ("alpha", 0.3), ("C", 2.5), ("gamma", 1.3)):
        assert fit.params[name] == pytest.approx(value, rel=0.02)
    assert run("predict", [str(out), "N=1e7", "w=4"]) == 0


@pytest.mark.parametrize(("text", "message"), [
    ("E + A/N^^alpha", "expected a number, a name or '(' at character 9, found '^'"),
    ("E + A/N^alpha)", "expected an operator or the end at character 14, found ')'"),
    ("E + (A/N^alpha", "expected ')' or an operator at character 15, found the end"),
    ("E + foo(N)", "expected a function (exp, log, log2, sqrt, tanh) before the bracket at character 5, found 'foo'"),
    ("E + A/N$", "'$' at character 8 is no part of a formula"),
    ("__import__('os')", '"\'" at character 12 is no part of a formula'),
    ("E + N.real", "at character 6 is no part of a formula"),
    ("E + A/N^alpha; q", "q is set after ';' but does not occur before it"),
    ("E + A/N^alpha; alpha=2:1", "'alpha=2:1' at character 16 is neither an input (NAME) nor a box (NAME=LOW:HIGH)"),
    ("A + E", "needs an input"),
    ("(" * 60 + "N" + ")" * 60, "nested deeper than 50 at character"),
    ("-" * 3 + "N*A", "expected a number, a name or '(' at character 2, found '-'"),
])
def test_errors_are_one_line_with_the_place(text, message):
    with pytest.raises(ValueError) as error:
        resolve(text)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_formula_of_a_published_law_is_that_law():
    p = laws["kumar"].published["kumar"]
    law = resolve("E + B/D^beta + A/(N*(1 - exp(-P/gamma_w + n_w)))^alpha; n_w=0:8")[0]
    ours = law.predict({name: p[name] for name in law.names}, N=1e8, D=1e10, P=np.array([4.0, 8.0]))
    np.testing.assert_allclose(ours, laws["kumar"].predict(p, N=1e8, D=1e10, weights_bits=np.array([4.0, 8.0])), rtol=1e-14)


def test_laws_with_different_inputs_are_compared_side_by_side():
    n, d, k = (x.ravel() for x in np.meshgrid([1e7, 3e7, 1e8, 3e8], [1e9, 4e9, 2e10], [0, 1]))
    eff = np.where(k == 1, 0.6, 1.0)
    loss = (400 / (n * eff) ** 0.34 + 400 / d**0.28 + 1.7) * np.exp(1e-4 * np.random.default_rng(0).standard_normal(n.size))
    table = {"n": n, "d": d, "kind": np.where(k == 1, "low", "full"), "loss": loss}
    columns = {"N": "n", "D": "d", "scheme": "kind"}
    compared = scaling.compare(table, ["free_efficiency", "E + A/N^alpha + B/D^beta"], columns=columns, fixed={"eff[full]": 1.0}, holdout="N = 3e8")
    assert compared.best.law.name == "free_efficiency" and compared.best.params["eff[low]"] == pytest.approx(0.6, abs=0.01) and len(compared.fits) == 2
    with pytest.raises(ValueError, match="columns: 'scheme' is known to none of the laws chinchilla"):
        scaling.compare(table, ["chinchilla"], columns=columns)
