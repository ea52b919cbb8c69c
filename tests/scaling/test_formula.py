"""Laws from a formula: what they mean, what they fit, and where they say the text is wrong."""
from __future__ import annotations

import math

import numpy as np
import pytest

import scaling
from scaling.cli import run
from scaling.laws import laws, resolve
from scaling.refits import problem_of


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
    ("E + A[/N", "expected the name of a column at character 7, found '/'"),
    ("E + A[4]/N", "expected the name of a column at character 7, found '4'"),
    ("E + A[kind/N", "expected ']' at character 11, found '/'"),
    ("E + (A/N)[kind]", "expected an operator or the end at character 10, found '['"),
    ("E + A[kind]/N^A", "A[kind] and A occur; a constant has one form"),
    ("E + A[kind]/N^b[form]*b[kind]", "b[form] and b[kind] occur; a constant has one form"),
    ("E + A[kind]*kind/N", "kind is a column of names in A[kind] and a number elsewhere"),
    ("E + N[kind]*A", "N is a column, which has no values of its own per level"),
    ("E + A[kind]/N; B[x]=0", "B[...] is set after ';' but does not occur before it"),
    ("E + A[kind]/N; A[x]=none", "'A[x]=none' at character 16 is neither an input (NAME) nor a box"),
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


def by_kind():
    """N, D and three kinds crossed, with the number of the kind beside its name."""
    n, d, k = (x.ravel() for x in np.meshgrid([1e7, 3e7, 1e8, 3e8, 1e9], [1e9, 4e9, 2e10, 1e11], [0, 1, 2]))
    return n, d, k, np.array(["bf16", "fp8", "fp4"])[k]


def test_constants_of_a_level_are_those_of_its_rows_alone():
    """Nothing is shared in A[kind]/N^alpha[kind], so each level must be fitted as if the others were not there."""
    n, _, k, kind = by_kind()
    loss = np.array([30.0, 40.0, 60.0])[k] * n ** -np.array([0.11, 0.13, 0.16])[k] * np.exp(0.01 * np.random.default_rng(0).standard_normal(n.size))
    whole = scaling.fit({"N": n, "kind": kind, "loss": loss}, "A[kind]/N^alpha[kind]")
    total = 0.0
    for name in np.unique(kind):
        alone = scaling.fit({"N": n[kind == name], "loss": loss[kind == name]}, "A/N^alpha")
        assert whole.params[f"A[{name}]"] == pytest.approx(alone.params["A"], rel=1e-6)
        assert whole.params[f"alpha[{name}]"] == pytest.approx(alone.params["alpha"], rel=1e-6)
        total += alone.metrics["objective"]
    assert whole.metrics["objective"] == pytest.approx(total, rel=1e-9) and whole.law.combine is None


def test_efficiencies_by_formula_are_the_law_that_is_built_in():
    n, d, k, kind = by_kind()
    loss = (400 / (n * np.array([1.0, 0.8, 0.5])[k]) ** 0.34 + 400 / d**0.28 + 1.7) * np.exp(3e-3 * np.random.default_rng(0).standard_normal(n.size))
    table = {"N": n, "D": d, "scheme": kind, "loss": loss}
    told, ours = (scaling.fit(table, law) for law in ("free_efficiency", "E + A/(N*eff[scheme])^alpha + B/D^beta; eff=0.003:3; eff[bf16]=1"))
    assert ours.metrics["objective"] == pytest.approx(told.metrics["objective"], rel=1e-9) and ours.free and set(ours.free) == set(told.free)
    for name in told.params:
        assert ours.params[name] == pytest.approx(told.params[name], rel=1e-5)


@pytest.mark.parametrize("text", ["E + A/N^alpha + B/D^beta + k[kind]*D^a/N^b; k[bf16]=0", "E + (A/N^alpha + B/D^beta)^gamma + k[kind]*D^a/N^b; k[bf16]=0; gamma=0.05:2"])
def test_amplitudes_by_level(text, tmp_path, capsys):
    """Planted gaps come back, in a plain sum and beside another law; the file knows the levels; derivatives are those of differences."""
    n, d, k, kind = by_kind()
    gap = np.array([0.0, 0.3, 0.9])[k] * d**0.2 / n**0.3
    loss = (1.7 + 400 / n**0.34 + 400 / d**0.28 + gap) * np.exp(1e-4 * np.random.default_rng(0).standard_normal(n.size))
    table = {"N": n, "D": d, "kind": kind, "loss": loss}
    fit = scaling.fit(table, text, loss="least_squares")
    assert fit.params["k[bf16]"] == 0.0 and fit.params["a"] == pytest.approx(0.2, abs=0.01) and fit.params["b"] == pytest.approx(0.3, abs=0.01)
    assert fit.params["k[fp4]"] / fit.params["k[fp8]"] == pytest.approx(3.0, rel=0.02)
    problem, z, _ = problem_of(fit, table)
    jacobian = problem.jacobian(z[None])[1][0]
    for i in range(len(z)):
        step = 1e-6 * (np.arange(len(z)) == i)
        np.testing.assert_allclose(jacobian[:, i], (problem.residuals((z + step)[None]) - problem.residuals((z - step)[None]))[0] / 2e-6, rtol=2e-5, atol=1e-8)
    path = fit.save(tmp_path / "FIT.json")
    assert scaling.load(path).predict(N=1e8, D=1e10, kind="fp4").loss == fit.predict(N=1e8, D=1e10, kind="fp4").loss
    assert fit.law.predict(fit.params, N=1e8, D=1e10, kind=["bf16", "fp4"]) == pytest.approx(
        [(1.7 + 400 / 1e8**0.34 + 400 / 1e10**0.28) + k * 1e10**0.2 / 1e8**0.3 for k in (0.0, 0.9)], rel=2e-4)
    assert run("predict", [str(path), "N=1e8", "D=1e10", "kind=int2"]) == 2
    assert "kind=int2: law" in capsys.readouterr().err


def test_a_held_level_that_no_row_has_is_refused():
    n, d, _, kind = by_kind()
    with pytest.raises(ValueError, match=r"k\[fp32\]=0: no fitted row has kind=fp32; levels are bf16, fp4, fp8"):
        scaling.fit({"N": n, "D": d, "kind": kind, "loss": 2 + 1e3 * n**-0.4}, "E + A/N^alpha + k[kind]/D^b; k[fp32]=0")
