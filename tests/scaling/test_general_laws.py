"""Laws that are no plain sum, priors, weights and stages: derivatives against differences, planted truth, closed forms, refusals."""
from __future__ import annotations

import math

import numpy as np
import pytest

import scaling
from scaling.laws import Law, amplitude, exponent, laws
from scaling.laws.mse_efficiency import error_of
from scaling.observations import observe
from scaling.plan_text import plan_table
from scaling.pose import pose
from scaling.starts import candidates
from tests.scaling import fake_runs, straight

GRID_N, GRID_D = (part.ravel() for part in np.meshgrid([3e7, 1e8, 3e8, 1e9, 3e9], [1e9, 3e9, 1e10, 3e10, 1e11]))


def noisy(loss, sd=1e-4):
    return loss * np.exp(sd * np.random.default_rng(0).standard_normal(loss.size))


PLANTED = {
    "kaplan": ({}, "kaplan", {}),
    "busbridge": ({}, "quartet_baseline", {}),
    "data_constrained": ({"unique_tokens": GRID_D / np.tile([1.0, 8.0, 30.0, 2.0, 4.0], 5)}, "muennighoff", {"ties": {"beta": "alpha"}}),
    "kumar_ptq": ({"ptq_bits": np.tile([3.0, 4.0, 5.0, 32.0, 3.5], 5)}, "kumar_no_offset", {}),
    "ptq_power": ({"ptq_bits": np.tile([2.0, 3.0, 4.0, 3.0, 2.5], 5)}, "ouyang", {}),
    "sun": ({"exp_bits": np.tile([2.0, 4, 5, 8, 1], 5), "man_bits": np.repeat([1.0, 3, 2, 7, 0], 5), "block": np.full(25, 128.0)}, "sun", {}),
}


@pytest.mark.parametrize("name", sorted(PLANTED))
def test_jacobians_are_those_of_finite_differences(name):
    extra, source, options = PLANTED[name]
    columns = {"N": GRID_N, "D": GRID_D, **extra}
    observed = observe(columns | {"loss": laws[name].predict(laws[name].published[source], **columns)}, laws[name])
    problem, _ = pose(laws[name], observed, options.get("ties", {}), {})
    z = candidates(problem, np.inf)[:3]
    jacobian = problem.jacobian(z)[1]
    for i in range(z.shape[1]):
        step = np.zeros(z.shape[1])
        step[i] = 1e-6
        np.testing.assert_allclose(jacobian[:, :, i], (problem.residuals(z + step) - problem.residuals(z - step)) / 2e-6, rtol=2e-5, atol=1e-7)


def test_a_law_of_ones_own_that_is_no_plain_sum():
    mine = Law(name="mine", about="E + (A/N^alpha)^gamma / (1 + T)", cite="me", inputs=("N", "D"),
               parameters=(amplitude("A"), amplitude("B"), exponent("alpha"), exponent("beta")),
               log_terms=lambda p, x: (-p["alpha"] * np.log(x["N"] / 1e8), -p["beta"] * np.log(x["D"] / 1e10)),
               combine=lambda p, terms, x: np.sqrt(terms[0] ** 2 + terms[1] ** 2))
    truth = {"A": 2.0, "B": 1.5, "alpha": 0.2, "beta": 0.3}
    columns = {"N": GRID_N, "D": GRID_D}
    loss = np.hypot(2.0 * (GRID_N / 1e8) ** -0.2, 1.5 * (GRID_D / 1e10) ** -0.3)
    np.testing.assert_allclose(mine.predict(truth, **columns), loss, rtol=1e-13)
    fit = scaling.fit(columns | {"loss": noisy(loss)}, mine, bootstrap=20, holdout="N = max(N) OVER ()")
    for name, value in truth.items():
        assert fit.params[name] == pytest.approx(value, rel=2e-3)
    assert fit.metrics["held_out"]["rmse"] < 1e-3


def test_repeated_data_is_the_authors_formula():
    """Muennighoff et al., Eq. 5 to 7, written out."""
    p = laws["data_constrained"].published["muennighoff"]
    n, d, unique = 3e9, 1e11, 1e10
    g = (p["alpha"] * p["A"] / (p["beta"] * p["B"])) ** (1 / (p["alpha"] + p["beta"]))
    needed = min(g * (unique * g) ** (p["beta"] / p["alpha"]), n)
    n_eff = needed + needed * p["R_N"] * (1 - math.exp(-(n / needed - 1) / p["R_N"]))
    d_eff = unique + unique * p["R_D"] * (1 - math.exp(-(d / unique - 1) / p["R_D"]))
    loss = p["A"] / n_eff ** p["alpha"] + p["B"] / d_eff ** p["beta"] + p["E"]
    assert laws["data_constrained"].predict(p, N=n, D=d, unique_tokens=unique) == pytest.approx(loss, rel=1e-12)
    chinchilla = laws["chinchilla"].predict({k: p[k] for k in ("A", "B", "E", "alpha", "beta")}, N=1e8, D=d)
    assert laws["data_constrained"].predict(p, N=1e8, D=d, unique_tokens=2 * d) == pytest.approx(chinchilla, rel=1e-12)


def test_coverage_curve():
    k = np.array([1.0, 3, 10, 30, 100, 300, 1000])
    fit = scaling.fit({"k": k, "loss": noisy(np.exp(-2.0 * k**-0.4))}, "coverage")
    assert fit.params["a"] == pytest.approx(2.0, rel=1e-3) and fit.params["b"] == pytest.approx(0.4, rel=1e-3)
    at = fit.estimate("samples_for", coverage=0.9).value
    assert math.exp(-fit.params["a"] * at ** -fit.params["b"]) == pytest.approx(0.9)


def test_kumar_critical_tokens_is_the_minimum_of_the_law():
    law = laws["kumar_ptq"]
    p = law.published["kumar"]
    best = law.functionals["critical_tokens"](p, 1e8, 4.0)
    tokens = best * np.exp(np.linspace(-0.5, 0.5, 2001))
    assert tokens[np.argmin(law.predict(p, N=1e8, D=tokens, ptq_bits=4.0))] == pytest.approx(best, rel=1e-3)
    unquantized = law.predict(p, N=1e8, D=1e10)
    assert unquantized == laws["chinchilla"].predict({k: p[k] for k in ("A", "B", "E", "alpha", "beta")}, N=1e8, D=1e10)
    assert law.predict(p, N=1e8, D=1e10, ptq_bits=4.0) - unquantized == pytest.approx(law.functionals["loss_gap"](p, 1e8, 1e10, 4.0))


UNIFIED = laws["kumar_unified"].published["kumar"] | {"C_w": 0.5, "C_a": 0.4, "C_kv": 0.6}  # C_x were never printed: these are ours


@pytest.mark.parametrize("widths", [{}, {"weights_bits": 6.0}, {"weights_bits": 5.0, "activations_bits": 8.0, "kv_bits": 8.0}])
@pytest.mark.parametrize(("N", "ptq_bits"), [(3e7, 3.0), (1e8, 4.0)])
def test_unified_critical_tokens_are_the_minimum_over_a_grid(widths, N, ptq_bits):
    law = laws["kumar_unified"]
    found = law.functionals["critical_tokens"](UNIFIED, N, ptq_bits, **widths)
    tokens = np.geomspace(1e6, 1e16, 200_001)  # wide, and not drawn around the answer
    at = tokens[np.argmin(law.predict(UNIFIED, N=N, D=tokens, ptq_bits=ptq_bits, **widths))]
    assert found == pytest.approx(at, rel=2e-4) and 2e6 < at < 5e15
    if not widths:
        assert found == pytest.approx(laws["kumar_ptq"].functionals["critical_tokens"](UNIFIED, N, ptq_bits), rel=1e-12)  # their Eq. 13


def test_unified_critical_tokens_where_there_are_none():
    tokens = laws["kumar_unified"].functionals["critical_tokens"]
    assert tokens(UNIFIED, 1e8, 4.0, weights_bits=4.0) == np.inf == tokens(UNIFIED, 1e8, 32.0)
    assert np.isnan(tokens(UNIFIED, 1e8, 2.0, activations_bits=3.0))  # the law diverges there
    with pytest.raises(ValueError, match="critical_tokens needs C_w for weights_bits below 32; these constants have A, B, "):
        tokens(laws["kumar_unified"].published["kumar"], 1e8, 3.0, weights_bits=6.0)


def test_a_plan_of_the_unified_law_tells_its_critical_tokens():
    """At a fixed N the plan buys no more tokens than D_crit of the law, which a grid of the fitted law finds too."""
    grid = np.array([(n, d, w, q) for n in (3e7, 6e7, 1.1e8, 2.2e8) for d in (1.5e9, 6e9, 2.6e10) for w in (3.0, 5.0, 8.0, 32.0) for q in (2.0, 3.0, 32.0)])
    columns = dict(zip(("N", "D", "weights_bits", "ptq_bits"), grid.T, strict=True))
    loss = laws["kumar_unified"].predict({k: v for k, v in UNIFIED.items() if k not in ("C_a", "C_kv")}, **columns)
    fit = scaling.fit(columns | {"loss": noisy(loss, 1e-3)}, "kumar_unified:tied", loss="least_squares")
    made = scaling.plan(fit, compute=1e23, fix={"N": 1e8, "weights_bits": 8.0, "ptq_bits": 3.0}, extrapolate=True)
    tokens = np.geomspace(1e8, 1e14, 100_001)
    at = tokens[np.argmin(fit.law.predict(fit.params, N=1e8, D=tokens, weights_bits=8.0, ptq_bits=3.0))]
    assert made.critical_tokens.value == pytest.approx(at, rel=5e-4) == made.D.value
    assert "D_crit" in list(plan_table(made).columns[0].cells)


def test_unified_law_loses_nothing_where_training_and_inference_widths_agree():
    law = laws["kumar_unified"]
    p = law.published["kumar"] | {"C_w": 0.4}
    at = {"N": 1e8, "D": 1e10, "weights_bits": 4.0}
    assert law.predict(p, ptq_bits=4.0, **at) == law.predict(p, **at) == laws["kumar"].predict(laws["kumar"].published["kumar"], **at)
    assert law.predict(p, ptq_bits=3.0, **at) > law.predict(p, **at)


def test_names_of_formats_stand_for_their_errors(tmp_path):
    rows = np.random.default_rng(1).standard_normal((200, 1024))
    steps = np.abs(rows).max(axis=1, keepdims=True) / 7  # int4 by hand: one scale per row, -7 to 7 in use
    by_hand = np.mean((np.round(rows / steps) * steps - rows) ** 2)
    assert error_of("int4") == pytest.approx(by_hand, rel=0.03) and error_of("float32") == 0.0
    assert error_of("int8") == pytest.approx(by_hand / (127 / 7) ** 2, rel=0.05)
    truth = {"A": 200.0, "B": 300.0, "E": 1.7, "alpha": 0.3, "beta": 0.3, "c_w": 4.0, "kappa_w": 0.6, "c_a": 4.0, "kappa_a": 0.6}
    names = np.tile(["mxfp4", "float32", "nvfp4", "mxfp8_e4m3", "mxfp4"], 5)
    columns = {"N": GRID_N, "D": GRID_D, "weights_mse": names}
    fit = scaling.fit(columns | {"loss": laws["mse_efficiency"].predict(truth, **columns)}, "mse_efficiency", loss="least_squares")
    assert fit.params["c_w"] == pytest.approx(4.0, rel=1e-3) and "c_a" not in fit.params
    by_name, by_number = (fit.predict(N=1e9, D=1e10, weights_mse=mse).loss for mse in ("mxfp4", error_of("mxfp4")))
    assert by_name == by_number
    again = scaling.load(fit.save(tmp_path / "FIT.json"))
    assert again.predict(N=1e9, D=1e10, weights_mse="mxfp4").high == fit.predict(N=1e9, D=1e10, weights_mse="mxfp4").high


def test_a_prior_is_the_row_it_stands_for():
    """Least squares with a prior on alpha has the optimum that scipy finds for the penalised sum, and a strong prior wins."""
    p = laws["chinchilla"].published["hoffmann"]
    columns = {"N": GRID_N, "D": GRID_D}
    table = columns | {"loss": noisy(laws["chinchilla"].predict(p, **columns), 0.01)}
    free = scaling.fit(table, "chinchilla", loss="least_squares")
    held = scaling.fit(table, "chinchilla", loss="least_squares", priors={"alpha": (0.5, 1e-5)})
    assert held.params["alpha"] == pytest.approx(0.5, abs=1e-4) and abs(free.params["alpha"] - 0.5) > 0.05
    weak = scaling.fit(table, "chinchilla", loss="least_squares", priors={"alpha": (0.5, 1e3)})
    assert weak.params["alpha"] == pytest.approx(free.params["alpha"], abs=1e-5)
    sd = free.estimate("alpha").relative_se * free.params["alpha"]
    even = scaling.fit(table, "chinchilla", loss="least_squares", priors={"alpha": (free.params["alpha"] + 0.5 * sd, sd)})
    assert even.estimate("alpha").relative_se * even.params["alpha"] == pytest.approx(sd / math.sqrt(2.0), rel=0.1)
    # a prior as precise as the rows moves the estimate half of the way; residual degrees of freedom and curvature are the rest
    assert even.params["alpha"] - free.params["alpha"] == pytest.approx(0.25 * sd, rel=0.25)


def test_weights_count_rows():
    """The constants of a table in which some rows are repeated; the objective of a mean row."""
    p = laws["chinchilla"].published["hoffmann"]
    table = {"N": GRID_N, "D": GRID_D, "loss": noisy(laws["chinchilla"].predict(p, N=GRID_N, D=GRID_D), 0.01), "w": np.tile([1.0, 3.0, 1, 2, 1], 5)}
    twice = {name: np.repeat(values, table["w"].astype(int)) for name, values in table.items()}
    weighted, repeated = scaling.fit(table, "chinchilla", weights="w"), scaling.fit(twice, "chinchilla")
    assert weighted.metrics["objective"] / 25 == pytest.approx(repeated.metrics["objective"] / 40, rel=1e-9)
    assert weighted.params["alpha"] == pytest.approx(repeated.params["alpha"], rel=1e-6)


def test_only_ratios_of_weights_matter():
    """Intervals, profile, BIC and priors are those without weights when all weights are 10."""
    table = straight.runs()
    for options in ({}, {"priors": {"alpha": (0.35, 0.01)}}):
        plain, tens = (scaling.fit(table, straight.power, weights=weights, **options) for weights in (None, "10"))
        assert tens.metrics["bic"] == pytest.approx(plain.metrics["bic"]) and tens.estimate("alpha").value == pytest.approx(plain.estimate("alpha").value, rel=1e-8)
        assert tens.estimate("alpha").relative_se == pytest.approx(plain.estimate("alpha").relative_se, rel=1e-6)
    plain, tens = (scaling.profile(scaling.fit(table, straight.power, weights=weights), table, "alpha").estimate for weights in (None, "10"))
    assert (tens.low, tens.high) == pytest.approx((plain.low, plain.high), rel=1e-6)


def test_weighted_errors_are_those_of_weighted_least_squares():
    """s^2 (X'WX)^-1 by hand, on runs of which half scatter ten times as much, with weights 1/variance."""
    weights = np.where(np.arange(24) % 2, 1e4, 1e2)
    table = straight.runs(noise=lambda rng, x: rng.standard_normal(x.size) / np.sqrt(weights)) | {"w": weights}
    fit = scaling.fit(table, straight.power, weights="w", loss="least_squares")
    x, own = np.stack([np.ones(24), -np.log(table["N"])], axis=1), weights / weights.mean()
    information = x.T @ (own[:, None] * x)
    beta = np.linalg.solve(information, x.T @ (own * np.log(table["loss"])))
    errors = np.log(table["loss"]) - x @ beta
    variance = (own * errors**2).sum() / 22
    assert fit.params["alpha"] == pytest.approx(beta[1], rel=1e-6) and fit.metrics["residual_sd"] == pytest.approx(np.sqrt(variance), rel=1e-6)
    assert fit.estimate("alpha").relative_se * beta[1] == pytest.approx(np.sqrt(variance * np.linalg.inv(information)[1, 1]), rel=1e-5)
    profile = scaling.profile(fit, table, "alpha").estimate
    assert (profile.low, profile.high) == pytest.approx((fit.estimate("alpha").low, fit.estimate("alpha").high), rel=2e-3)
    bic = 24 * np.log((own * errors**2).mean()) + 2 * np.log(24)
    assert fit.metrics["bic"] == pytest.approx(bic, rel=1e-9)


def test_every_published_row_has_its_source_and_a_cited_law():
    for law in {laws[name].name: laws[name] for name in laws}.values():
        assert set(law.sources) == (set(law.published) or {"none"}) and law.cite, law.name
        assert law.published or law.sources["none"].startswith(("none published: ", "none here: "))
        ranged = {source for source, text in law.sources.items() if "no range: " not in text} if law.published else set()
        assert set(law.validity) == ranged, law.name  # a row of constants has the range that was trained, or says that it has none
        for range_ in law.validity.values():
            assert set(law.measures) <= set(range_) <= set(law.inputs) and all(0 <= low < high for low, high in range_.values()), law.name
        for constants in law.published.values():
            factors = tuple(factor.parameter for factor in law.factors)
            assert all(name in (*law.names, "n_post") or name.startswith(factors) for name in constants), law.name
    assert [name for name in laws if laws[name].published and not laws[name].validity] == ["kaplan"]
    assert "memory" in laws["kaplan"].sources["kaplan"] and "secondary" in laws["qat"].sources["W4A4"]


SCHEMES = {"N": GRID_N, "D": GRID_D, "scheme": np.tile(["fp8", "int4", "int4", "fp8", "fp8"], 5), "loss": 2.0 + 1e3 * GRID_N**-0.4}


@pytest.mark.parametrize(("call", "message"), [
    (lambda: scaling.fit(SCHEMES, "free_efficiency"), "scheme: no baseline among fp8, int4; say which level has efficiency 1: --fix \"eff[fp8]=1\", or fixed={\"eff[fp8]\": 1} in Python"),
    (lambda: scaling.fit(SCHEMES, "free_efficiency", fixed={"eff[fp8]": 1}, holdout="scheme = 'int4'"), "holdout: scheme=int4 occurs only in"),
    (lambda: laws["quartet"].predict(laws["quartet"].published["quartet"], N=1e8, D=1e10, forward="int2", backward="SR"),
     "forward=int2: law quartet has no effN[int2] here; known levels of forward are baseline, SR, RTN, QuEST"),
    (lambda: scaling.fit(SCHEMES | {"scheme": [None] + ["bf16"] * 24}, "free_efficiency"), "scheme (\"scheme\") is missing in 1 of 25 rows"),
    (lambda: scaling.fit(SCHEMES, "chinchilla", priors={"A": (1.0, 0.1)}), "priors: A trades off with its exponent"),
    (lambda: scaling.fit(SCHEMES, "chinchilla", priors={"zeta": (1.0, 0.1)}), "parameter 'zeta' of law chinchilla: unknown"),
    (lambda: scaling.fit(SCHEMES, "chinchilla", priors={"alpha": (1.0, 0.0)}), "priors alpha=1, 0: need a positive deviation"),
    (lambda: scaling.fit(SCHEMES, "chinchilla", weights="N - 3e7"), "weights (N - 3e7) is zero in 5 of 25 rows"),
    (lambda: scaling.fit(SCHEMES | {"weights_mse": ["int4"] * 24 + ["int99x"]}, "mse_efficiency"),
     "weights_mse: format='int99x' is not known; accepted: float8_e3m4, "),
])
def test_refusals_are_one_line(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_flat_objective_states_no_constants():
    """Four precisions in each cell and a law that cannot tell them apart: every curve between the middle two is least absolute."""
    p, gaps = laws["chinchilla"].published["hoffmann"], np.array([0.97, 0.99, 1.01, 1.03])
    n, d, gap = (part.ravel() for part in np.meshgrid([3e7, 1e8, 3e8, 1e9], [1e9, 4e9, 2e10], gaps))
    fit = scaling.fit({"N": n, "D": d, "loss": gap * laws["chinchilla"].predict(p, N=n, D=d)}, "chinchilla", loss="lad")
    assert fit.metrics["undetermined"] and not fit.identified(next(iter(fit.metrics["undetermined"])))
    assert "the objective is flat" in str(fit.estimate(next(iter(fit.metrics["undetermined"]))))


def test_levels_broadcast_against_sizes_and_resamples():
    p = laws["free_efficiency"].published["quest"]
    n = np.array([1e8, 1e9, 1e10])[:, None]
    both = laws["free_efficiency"].predict(p, N=n, D=1e10, scheme=np.array(["int4", "baseline"]))
    assert both.shape == (3, 2)
    for column, scheme in enumerate(("int4", "baseline")):
        one = laws["free_efficiency"].predict({name: np.full((4, 1), value) for name, value in p.items()}, N=n[:, 0], D=1e10, scheme=scheme)
        np.testing.assert_allclose(one, np.tile(both[:, column], (4, 1)), rtol=1e-14)


@pytest.mark.parametrize("blind", [np.abs, np.real, lambda value: np.sign(np.real(value)) * np.abs(value)])
def test_a_law_that_loses_a_derivative_is_refused(blind):
    """abs, real and sign drop the imaginary part that a derivative travels in: alpha stayed at its start, and the fit called itself converged."""
    def log_terms(p, x):
        return -blind(p["alpha"]) * np.log(x["N"]), -p["beta"] * np.log(x["D"]), 0.0

    law = Law(name="blind", about="A/N^alpha + B/D^beta + E", cite="none", inputs=("N", "D"), log_terms=log_terms,
              parameters=(amplitude("A"), amplitude("B"), amplitude("E"), exponent("alpha"), exponent("beta")))
    with pytest.raises(ValueError, match="law blind: its derivative by alpha is lost"):
        scaling.fit(fake_runs.rows(noise=0.003), law)


def test_a_term_that_few_rows_feel_has_its_error():
    """An excess that falls exponentially with bits is nothing at 32 bits, where half of the rows are. It had been taken for dead, and the error of
    its width for 30 times less than the profile has it."""
    n, bits = (part.ravel() for part in np.meshgrid(np.geomspace(1e6, 1e8, 8), [2.0, 3.0, 4.0, 32.0, 32.0]))
    table = {"N": n, "weights_bits": bits, "loss": (1.5 + 30 * n**-0.3 + 4 * np.exp(-bits / 0.7)) * np.exp(0.003 * np.random.default_rng(1).standard_normal(n.size))}
    fit = scaling.fit(table, "E + A/N^alpha + C*exp(-weights_bits/g); g=0.2:10", loss="least_squares")
    profile = scaling.profile(fit, table, "g").estimate
    assert not fit.metrics["at_bound"] and fit.estimate("g").low < 0.7 < fit.estimate("g").high
    assert (fit.estimate("g").low, fit.estimate("g").high) == pytest.approx((profile.low, profile.high), rel=0.02)
