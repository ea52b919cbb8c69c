"""Optima of laws with known constants: closed forms, published optima, scipy and exhaustive grids."""
from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from scaling.costs import cost_model
from scaling.laws import Law, amplitude, exponent, laws
from scaling.optimum import Budget, Sweep, optimise
from scaling.plan import critical_tokens

CHINCHILLA, KUMAR = laws["chinchilla"], laws["kumar"]
HOFFMANN, P_KUMAR = CHINCHILLA.published["hoffmann"], KUMAR.published["kumar"]
OPERANDS = ("weights_bits", "activations_bits", "kv_bits")
BITS = cost_model("bits")


def best(law, params, choices=({},), model=BITS, **budget):
    return optimise(law, params, Budget(model, **budget), choices)


@pytest.mark.parametrize("source", ["hoffmann", "hoffmann_rounded", "epoch"])
@pytest.mark.parametrize("compute", [1e18, 5.88e23, 1e27])
def test_hoffmanns_closed_form(source, compute):
    """Eq. 4 of arXiv 2203.15556: N = G (C/6)^a, D = (C/6)^b / G, G = (alpha A/(beta B))^(1/(alpha+beta)), a = beta/(alpha+beta)."""
    p = CHINCHILLA.published[source]
    total = p["alpha"] + p["beta"]
    G = (p["alpha"] * p["A"] / (p["beta"] * p["B"])) ** (1 / total)
    found = best(CHINCHILLA, p, compute=compute)
    assert found.N == pytest.approx(G * (compute / 6) ** (p["beta"] / total), rel=1e-6)
    assert found.D == pytest.approx((compute / 6) ** (p["alpha"] / total) / G, rel=1e-6)


def test_two_digits_move_the_optimum():
    """D/N at 5.9e23 FLOP is 59 with all digits and 93 with the two that the paper prints."""
    for source, expected in (("hoffmann", 59), ("hoffmann_rounded", 93)):
        found = best(CHINCHILLA, CHINCHILLA.published[source], compute=5.9e23)
        assert round(found.D / found.N) == expected


@pytest.mark.parametrize("compute", [1e18, 1e21, 1e25])
def test_kumars_width_does_not_depend_on_compute(compute):
    """alpha = beta: P* maximises F(P)/P whatever C (arXiv 2411.04330, section 4.3): 7.00 bits with the printed constants."""
    found = best(KUMAR, P_KUMAR, Sweep(OPERANDS, 0.05, 32.0), compute=compute)
    for name in OPERANDS:
        assert found.precision[name] == pytest.approx(KUMAR.functionals["optimal_bits"](P_KUMAR), abs=1e-4)
    assert found.precision["kv_bits"] == pytest.approx(7.00, abs=0.005)
    assert 6 / 16 * found.N * found.D * found.precision["kv_bits"] == pytest.approx(compute, rel=1e-9)


def test_one_gamma_gives_u_star():
    """Kumar with one gamma and no offsets: P* = 1.90381 gamma, the root of 3u = e^u - 1."""
    p = P_KUMAR | {"n_w": 0.0, "n_a": 0.0, "n_kv": 0.0} | dict.fromkeys(("gamma_w", "gamma_a", "gamma_kv"), 2.5)
    found = best(KUMAR, p, Sweep(OPERANDS, 0.05, 32.0), compute=1e21)
    assert found.precision["weights_bits"] / 2.5 == pytest.approx(1.90381, abs=2e-5)


def test_untied_exponents_move_the_width_of_the_optimum_no_more():
    """With alpha != beta and N, D free P* still maximises F(P)/P; with N fixed it grows with compute (App. E)."""
    p = P_KUMAR | {"beta": 0.4}
    free = [best(KUMAR, p, Sweep(OPERANDS, 0.05, 32.0), compute=c).precision["weights_bits"] for c in (1e19, 1e23)]
    assert free == pytest.approx([7.0021093] * 2, abs=1e-4)
    fixed = [best(KUMAR, p, Sweep(OPERANDS, 0.05, 32.0), compute=c, N=1e9) for c in (1e19, 1e21, 1e23)]
    widths = [found.precision["weights_bits"] for found in fixed]
    assert widths == sorted(widths) and widths[-1] - widths[0] > 1
    for compute, found in zip((1e19, 1e21, 1e23), fixed, strict=True):
        assert found.precision["weights_bits"] == pytest.approx(KUMAR.functionals["optimal_bits_at_size"](p, 1e9, compute), abs=1e-4)
        assert 1e9 * found.D * found.precision["weights_bits"] * 6 / 16 == pytest.approx(compute, rel=1e-9)


@pytest.mark.parametrize("tokens", [1e10, 1e12, 1e14])
def test_inference_in_the_budget_against_scipy(tokens):
    """6 N D + 2 N D_inf = C, solved by scipy in ln N."""
    compute, p = 1e23, HOFFMANN

    def loss(log_N):
        N = math.exp(log_N)
        return p["A"] / N ** p["alpha"] + p["B"] / (compute / (6 * N) - tokens / 3) ** p["beta"]

    top = math.log(compute / (2 * tokens)) - 1e-9
    expected = minimize_scalar(loss, bounds=(top - 12, top), method="bounded", options={"xatol": 1e-10})
    found = best(CHINCHILLA, p, compute=compute, inference_tokens=tokens)
    assert found.N == pytest.approx(math.exp(expected.x), rel=1e-5)
    assert found.loss - p["E"] == pytest.approx(expected.fun, rel=1e-10)
    assert 6 * found.N * found.D + 2 * found.N * tokens == pytest.approx(compute, rel=1e-9)


@pytest.mark.parametrize("name", ["flops", "bits", "bit_operations", "h100", "b200", "speedups:4=3,6=1.2"])
@pytest.mark.parametrize("given", [{}, {"N": 3e9}, {"D": 5e10}, {"memory": 1e9}, {"inference_tokens": 1e11}])
def test_no_point_of_a_grid_is_better(name, given):
    """Every N of 4001, every width: none beats what was found, and the best comes near."""
    widths, compute, model = (4.0, 6.0, 8.0, 12.0, 16.0), 1e21, cost_model(name)
    found = best(KUMAR, P_KUMAR, [dict.fromkeys(OPERANDS, bits) for bits in widths], model, compute=compute, **given)
    lowest = math.inf
    for bits in widths:
        pair, served = float(model.per_pair({"bits": bits})), float(model.per_answer({"bits": bits})) * given.get("inference_tokens", 0.0)
        N = np.array([given["N"]]) if "N" in given else np.geomspace(1e6, 1e13, 4001)
        N = N[N * bits / 8 <= given.get("memory", math.inf)]
        D = np.full_like(N, given["D"]) if "D" in given else (compute - served * N) / (pair * N)
        fits = (D > 0) & (pair * N * D + served * N <= compute * (1 + 1e-9))
        lowest = min(lowest, np.min(KUMAR.predict(P_KUMAR, N=N[fits], D=D[fits], **dict.fromkeys(OPERANDS, bits)), initial=math.inf))
    assert lowest * (1 + 1e-12) >= found.loss > lowest - 5e-4
    assert cost_of(found, model, given) <= compute * (1 + 1e-9)


def cost_of(found, model, given):
    return model.training(found.N, found.D, found.precision) + model.inference(found.N, given.get("inference_tokens", 0.0), found.precision)


def test_memory_alone_trades_size_for_width():
    """N P = 8 M at fixed D: P* maximises F(P)/P again, for N_eff = 8 M F(P)/P."""
    found = best(KUMAR, P_KUMAR, Sweep(OPERANDS, 0.05, 32.0), memory=1e9, D=1e11)
    assert found.precision["weights_bits"] == pytest.approx(7.0021093, abs=1e-4)
    assert found.N * found.precision["weights_bits"] / 8 == pytest.approx(1e9, rel=1e-9)


def test_what_does_not_fit_has_no_finite_loss():
    assert best(CHINCHILLA, HOFFMANN, compute=1e18, N=1e9, D=1e9).loss == math.inf
    assert best(CHINCHILLA, HOFFMANN, compute=1e18, N=1e9, inference_tokens=1e12).loss == math.inf
    assert best(CHINCHILLA, HOFFMANN, memory=1e6, N=1e9, D=1e9).loss == math.inf
    assert best(CHINCHILLA, HOFFMANN, N=1e9, D=1e9).loss == pytest.approx(float(CHINCHILLA.predict(HOFFMANN, N=1e9, D=1e9)))


# Sun et al. 2025 (arXiv 2501.02423), Table 2: the law in which too many tokens harm. B: values per scale factor, 128.
SUN = {"n": 69.2343, "d": 68973.0621, "eps": 1.9061, "k": math.log2(128) / 11334.5197, "alpha": 0.2368, "beta": 0.5162, "delta": 3.1926, "nu": 2.9543}


def sun_critical(p, N, exp_bits, man_bits):
    return (p["d"] * N ** p["alpha"] / p["k"] * (exp_bits + 0.5) ** p["delta"] * (man_bits + 0.5) ** p["nu"]) ** (1 / (2 * p["beta"]))


def sun_terms(p, x):
    N, D = -p["alpha"] * np.log(x["N"]), -p["beta"] * np.log(x["D"])
    return N, D, 0.0, N - D - p["delta"] * np.log(x["exp_bits"] + 0.5) - p["nu"] * np.log(x["man_bits"] + 0.5)


def sun_terms_by_width(p, x):
    """The best layout of P bits has E + 0.5 = delta P/(delta + nu), M + 0.5 = nu P/(delta + nu)."""
    total = p["delta"] + p["nu"]

    def share(part):
        return np.log(part / total * x["weights_bits"])

    N, D = -p["alpha"] * np.log(x["N"]), -p["beta"] * np.log(x["D"])
    return N, D, 0.0, N - D - p["delta"] * share(p["delta"]) - p["nu"] * share(p["nu"])


def sun(terms, inputs, functionals=None):
    parameters = (*(amplitude(name) for name in ("n", "d", "eps", "k")), *(exponent(name, 0.01, 5.0) for name in ("alpha", "beta", "delta", "nu")))
    return Law("sun_here", "Sun et al. 2025", "arXiv 2501.02423", ("N", "D", *inputs), parameters, terms, functionals=functionals or {})


@pytest.mark.parametrize(("compute", "bits"), [(1e21, 4.19), (1e23, 4.72), (1e25, 5.31), (1e27, 5.98), (1e29, 6.73), (1e31, 7.58)])
def test_suns_widths(compute, bits):
    """The compute-optimal width of floating point, from Sun's closed form (laws.md 1.2): 4.19 to 7.58 bits."""
    found = best(sun(sun_terms_by_width, ("weights_bits",)), SUN, Sweep(("weights_bits", "activations_bits"), 2.0, 16.0), compute=compute)
    assert found.precision["weights_bits"] == pytest.approx(bits, abs=0.006)


@pytest.mark.parametrize(("layout", "trillions"), [((8, 7), 1730), ((4, 3), 27.3), ((2, 1), 0.393)])
def test_no_more_than_the_critical_tokens_are_bought(layout, trillions):
    """N = 1e9: the paper prints 1730 T (BF16), 27 T (E4M3), 0.4 T (E2M1). A larger budget at that N is not spent."""
    law = sun(sun_terms, ("exp_bits", "man_bits"), {"critical_tokens": sun_critical})
    precision = dict(zip(("exp_bits", "man_bits"), map(float, layout), strict=True))
    found = best(law, SUN, [precision], N=1e9, compute=1e9 * 6 * 3000e12)
    assert found.D / 1e12 == pytest.approx(trillions, rel=2e-3)
    assert critical_tokens(law, SUN, 1e9, precision) == pytest.approx(found.D, rel=1e-5)
    small = best(law, SUN, [precision], N=1e9, compute=6e9 * 1e11)
    assert small.D == pytest.approx(1e11, rel=1e-12)  # below it, all is
    assert critical_tokens(law, SUN, 1e9, {"exp_bits": 4.0}) is None
