"""Laws against what their papers print, against jax's derivatives, and against the refusals they promise."""
from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling.laws import Law, amplitude, exponent, laws, resolve
from scaling.laws.registry import Registry

KUMAR = laws["kumar"].published["kumar"]
CHINCHILLA = laws["chinchilla"].published["hoffmann"]


def test_chinchilla_is_its_formula():
    p, n, d = CHINCHILLA, 7e9, 1.4e12
    assert laws["chinchilla"].predict(p, N=n, D=d) == pytest.approx(p["A"] / n ** p["alpha"] + p["B"] / d ** p["beta"] + p["E"], rel=1e-14)


@pytest.mark.parametrize(("source", "tokens_per_param", "a"), [("hoffmann", 59.05, 0.4565), ("hoffmann_rounded", 92.86, 0.4516)])
def test_rounding_the_published_exponents_moves_the_optimum(source, tokens_per_param, a):
    p, f = laws["chinchilla"].published[source], laws["chinchilla"].functionals
    assert f["optimal_tokens_per_param"](p, 5.9e23) == pytest.approx(tokens_per_param, abs=0.01)
    assert f["optimal_exponent"](p) == pytest.approx(a, abs=1e-4)


def test_optimal_params_minimise_the_loss_at_fixed_compute():
    best = laws["chinchilla"].functionals["optimal_params"](CHINCHILLA, 1e21)
    sizes = np.geomspace(best / 3, best * 3, 20_001)
    losses = laws["chinchilla"].predict(CHINCHILLA, N=sizes, D=1e21 / 6 / sizes)
    assert sizes[np.argmin(losses)] == pytest.approx(best, rel=2e-4)


def test_kumar_reproduces_the_published_optimum_only_with_its_offsets():
    f = laws["kumar"].functionals["optimal_bits"]
    assert f(KUMAR) == pytest.approx(7.00, abs=0.01)  # the paper: 7 to 8 bits
    assert f({name: 0.0 if name.startswith("n_") else value for name, value in KUMAR.items()}) < 3.7


def test_kumar_with_one_gamma_has_the_closed_form_optimum():
    p = KUMAR | {"gamma_w": 2.0, "gamma_a": 2.0, "gamma_kv": 2.0, "n_w": 0.0, "n_a": 0.0, "n_kv": 0.0}
    u = laws["kumar"].functionals["optimal_bits"](p) / 2.0
    assert u == pytest.approx(1.90381, abs=1e-5)
    assert 3.0 * math.exp(-u) / (1.0 - math.exp(-u)) == pytest.approx(1.0 / u, rel=1e-6)  # stationarity of (1 - e^-u)^3 / u


def test_kumar_optimum_minimises_the_loss_over_size_data_and_bits_jointly():
    p = KUMAR | {"beta": 0.35}  # untied: the optimum must still not depend on the budget
    best = laws["kumar"].functionals["optimal_bits"](p)
    for compute in (1e19, 1e23):
        bits = np.linspace(best - 2, best + 2, 401)[:, None]
        sizes = np.geomspace(1e5, 1e12, 4000)[None, :]
        tokens = 16.0 * compute / (6.0 * sizes * bits)
        losses = laws["kumar"].predict(p, N=sizes, D=tokens, weights_bits=bits, activations_bits=bits, kv_bits=bits)
        assert bits[np.argmin(losses.min(axis=1)), 0] == pytest.approx(best, abs=0.03)


def test_kumar_diverges_where_a_factor_vanishes():
    # zero of a factor at P = n gamma: 0.81 bits for weights, 3.11 for activations, 2.32 for the kv cache
    predict = laws["kumar"].predict
    for name, edge in (("weights_bits", 0.812), ("activations_bits", 3.110), ("kv_bits", 2.316)):
        assert np.isinf(predict(KUMAR, N=1e8, D=1e9, **{name: edge - 0.01}))
        assert np.isfinite(predict(KUMAR, N=1e8, D=1e9, **{name: edge + 0.01}))


@pytest.mark.parametrize("bits", [32.0, 64.0, math.inf])
def test_unquantized_operands_leave_the_law_exactly_alone(bits):
    plain = laws["kumar"].predict(KUMAR, N=1e8, D=1e9)
    assert laws["kumar"].predict(KUMAR, N=1e8, D=1e9, weights_bits=bits, activations_bits=bits, kv_bits=bits) == plain
    assert plain == laws["chinchilla"].predict({k: KUMAR[k] for k in ("A", "B", "E", "alpha", "beta")}, N=1e8, D=1e9)


def test_gap_and_bits_for_gap_are_inverse():
    f = laws["kumar"].functionals
    bits = f["bits_for_gap"](KUMAR, 1e8, 0.02)
    gap = f["loss_gap"](KUMAR, 1e8, weights_bits=bits, activations_bits=bits, kv_bits=bits)
    assert gap == pytest.approx(0.02, rel=1e-6)
    full = laws["kumar"].predict(KUMAR, N=1e8, D=1e9, weights_bits=4.0, activations_bits=6.0)
    assert f["loss_gap"](KUMAR, 1e8, weights_bits=4.0, activations_bits=6.0) == pytest.approx(
        full - laws["kumar"].predict(KUMAR, N=1e8, D=1e9), rel=1e-9)


def test_complex_steps_agree_with_jax():
    law, at = laws["kumar"], {"N": 3e5, "D": 2e7, "weights_bits": 4.0, "activations_bits": 5.0, "kv_bits": 3.0}
    names = ("alpha", "beta", "gamma_w", "n_a", "gamma_kv")
    with jax.enable_x64(True):
        columns = {name: jnp.asarray(value, jnp.float64) for name, value in at.items()}
        params = {name: jnp.asarray(value, jnp.float64) for name, value in KUMAR.items()}
        by_jax = jax.grad(lambda p: law.predict(p, **columns))(params)
        by_jax = {name: float(by_jax[name]) for name in names}
    for name in names:
        moved = {**KUMAR, name: KUMAR[name] + 1e-30j}
        terms = law.log_terms(moved, {k: np.asarray(v) for k, v in at.items()})
        by_step = sum(KUMAR[a] * np.exp(t) for a, t in zip(law.amplitudes, terms, strict=True)).imag / 1e-30
        assert by_step == pytest.approx(by_jax[name], rel=1e-9)


def test_reduction_of_what_columns_cannot_see():
    bits = np.array([3.0, 4.0, 6.0, 32.0])
    both = laws["kumar"].reduce({"N": bits, "D": bits, "weights_bits": bits, "activations_bits": bits, "kv_bits": np.full(4, np.inf)})
    assert both.ties == {"gamma_a": "gamma_w", "n_a": "n_w"} and both.absent == ("gamma_kv", "n_kv") and not both.fixed
    one = laws["kumar"].reduce({"N": bits, "D": bits, "weights_bits": np.array([4.0, 4.0, 32.0, 32.0]),
                                "activations_bits": bits, "kv_bits": np.full(4, 32.0)})
    assert one.fixed == {"n_w": 0.0} and not one.ties  # one level below 32 bits cannot carry gamma and offset


@pytest.mark.parametrize(("call", "message"), [
    (lambda: laws["chinchila"], "law 'chinchila': unknown; known laws are busbridge, chinchilla, coverage"),
    (lambda: resolve("kumar:free"), "variant 'free' of law kumar: unknown; it has tied, plain"),
    (lambda: laws["chinchilla"].predict(CHINCHILLA, N=1e9), "law chinchilla needs D; given: N"),
    (lambda: laws["chinchilla"].predict(CHINCHILLA, N=1e9, D=1e9, P=4), "input 'P' of law chinchilla: unknown; it takes N, D"),
    (lambda: laws["kumar"].predict(CHINCHILLA, N=1e9, D=1e9, kv_bits=4), "law kumar needs gamma_kv, n_kv for kv_bits below 32"),
])
def test_refusals_are_one_line(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_a_law_of_ones_own_registers_and_keeps_its_name():
    mine = Law(name="mine", about="A/N^alpha + E", cite="none", inputs=("N",), parameters=(amplitude("A"), amplitude("E"), exponent("alpha")),
               log_terms=lambda p, x: (-p["alpha"] * np.log(x["N"]), 0.0), aliases=("own",))
    registry = Registry(mine)
    assert registry["own"] is mine and list(registry) == ["mine"] and len(registry) == 1
    with pytest.raises(ValueError, match="already registered"):
        registry.add(Law(name="own", about="", cite="", inputs=(), parameters=(), log_terms=lambda p, x: ()))
    assert mine.predict({"A": 2.0, "E": 1.0, "alpha": 0.5}, N=4.0) == pytest.approx(2.0)


def test_every_published_constant_and_variant_may_be_held():
    """A box that excludes a law's own published constants is too small; what lies beyond one by a part in a million is refused."""
    for name in laws:
        for constants in (*laws[name].published.values(), *(variant.get("fixed", {}) for variant in laws[name].variants.values())):
            law = laws[name].at_levels(laws[name].named_levels(constants))
            for constant in set(constants) & set(law.names):
                assert law.parameter(constant).takes(constants[constant]), (name, constant, constants[constant])
    alpha, E = (laws["kumar"].parameter(constant) for constant in ("alpha", "E"))
    assert [alpha.takes(value) for value in (alpha.high, np.exp(np.log(alpha.high)), alpha.high * (1 + 1e-6), -0.1, 0.0, np.nan)] == [True, True, False, False, True, False]
    assert [E.takes(value) for value in (1.7, 0.0, -1.0, np.inf)] == [True, True, False, False]
