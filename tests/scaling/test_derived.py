"""What follows from a fit, with intervals: against planted truth, the reference's numbers and the bootstrap; inputs that are natural or lacking."""
from __future__ import annotations

import functools
import json
import re

import numpy as np
import pytest

import scaling
from scaling.cli import run
from scaling.laws import laws
from tests.scaling.conftest import shared
from tests.scaling.planted_laws import PLANTED


@functools.cache
def fitted(name: str, **options) -> scaling.Fit:
    return scaling.fit(PLANTED[name].table(0), PLANTED[name].law, **options)


def by_name(fit, at=None) -> dict:
    return {one.name: one for one in scaling.derived(fit, at)[0]}


def test_chinchilla_exponent_and_tokens_per_parameter(epoch):
    """a = .367172/(.347310 + .367172) with the reference's interval of 1000 cell resamples at most as wide; D/N at the largest compute fitted."""
    fit = scaling.fit(law="chinchilla", bootstrap=200, **epoch)
    found = by_name(fit)
    a = found["optimal_exponent"].estimate
    assert a.value == pytest.approx(0.367172 / (0.347310 + 0.367172), abs=2e-6) and a.low < 0.513 < a.high and 0.03 < a.high - a.low < 0.12
    ratio = found["optimal_tokens_per_param"]
    compute = ratio.at["compute"]
    assert compute == pytest.approx(6.0 * max(fit.ranges["N*D"]))
    sizes = np.geomspace(1e8, 1e11, 400_001)  # the minimum itself, on a grid
    best = sizes[np.argmin(fit.law.predict(fit.params, N=sizes, D=compute / 6.0 / sizes))]
    assert ratio.estimate.value == pytest.approx(compute / 6.0 / best**2, rel=1e-3) and ratio.estimate.low < ratio.estimate.value < ratio.estimate.high


def test_quartet_efficiencies_have_the_intervals_of_the_reference():
    """effN .640 [.621, .651], effD .889 [.869, .915]: a bootstrap over the 21 cells; ours is the hull of that and the linearised one."""
    columns = {"N": "N_nonemb", "D": "D_tokens", "forward": "precision_fwd", "backward": "precision_bwd"}
    fit = scaling.fit(shared("data/quartet1-figure/fig1a_scaling_fit.csv"), "quartet", columns=columns, delta=1e-4,
                      fixed={"effN[FP8]": 1, "effD[FP8]": 1}, bootstrap=100)
    for name, value, low, high in (("effN[FP4]", 0.640, 0.621, 0.651), ("effD[FP4]", 0.889, 0.869, 0.915)):
        estimate = fit.estimate(name)
        assert estimate.value == pytest.approx(value, abs=0.003)
        assert estimate.low == pytest.approx(low, abs=0.01) and estimate.high == pytest.approx(high, abs=0.01)


def test_sun_critical_tokens_and_layout():
    fit = fitted("sun", loss="least_squares")
    for exp_bits, man_bits, tokens in ((8, 7, 1729.5e12), (4, 3, 27.33e12), (2, 1, 0.393e12)):
        estimate = by_name(fit, {"N": 1e9, "exp_bits": exp_bits, "man_bits": man_bits, "block": 128.0})["critical_tokens"].estimate
        assert estimate.identified and estimate.low < tokens < estimate.high < 3.0 * estimate.low
    layouts = {bits: by_name(fit, {"bits": bits})["best_layout"] for bits in (4, 6, 8, 16)}
    assert {bits: next(iter(one.estimate.shares)) for bits, one in layouts.items()} == {4: "E2M1", 6: "E3M2", 8: "E4M3", 16: "E8M7"}
    assert all(0.99 < sum(one.estimate.shares.values()) < 1.01 for one in layouts.values()) and layouts[8].estimate.shares["E4M3"] > 0.99
    bits = by_name(fit, {"compute": 1e21, "block": 128.0})["optimal_bits"].estimate
    assert bits.low < 4.19 < bits.high < bits.low + 0.2
    assert fit.estimate("best_layout", bits=8) == layouts[8].estimate


def test_a_layout_that_the_data_leave_open_is_told_as_shares():
    """Seven runs in ten of the design are dropped and the noise is 3 %: the share is that of M* on the far side of the tie."""
    table = PLANTED["sun"].table(0)
    keep = np.random.default_rng(1).random(table["N"].size) < 0.3
    noisy = np.exp(0.03 * np.random.default_rng(2).standard_normal(table["N"].size))
    fit = scaling.fit({name: values[keep] for name, values in (table | {"loss": table["loss"] * noisy}).items()}, "sun", loss="least_squares")
    shares = by_name(fit, {"bits": 8})["best_layout"].estimate.shares
    real = fit.estimate("best_man_bits_real", bits=8)
    assert len(shares) > 1 and sum(shares.values()) == pytest.approx(1.0)
    assert real.high - real.low > 0.1 and max(shares, key=shares.get) == fit.law.functionals["best_layout"](fit.params, 8)


def test_kumar_optimum_and_what_needs_more():
    fit = fitted("kumar")
    found, lacking = scaling.derived(fit)
    told = {one.name: one for one in found}
    assert lacking == {"bits_for_gap": ("gap",)}
    estimate = told["optimal_bits"].estimate
    assert estimate.low < 7.00 < estimate.high and estimate.high - estimate.low < 0.4
    assert told["efficiency"].at == {"weights_bits": 3.0, "activations_bits": 4.0, "kv_bits": 4.0}
    truth = laws["kumar"].functionals["efficiency"](PLANTED["kumar"].truth, **told["efficiency"].at)
    assert told["efficiency"].estimate.low < truth < told["efficiency"].estimate.high


@pytest.mark.parametrize(("law", "quantity", "columns", "message"), [
    ("kumar", "bits_for_gap", {"N": -1.0, "gap": 0.1}, "bits_for_gap: N=-1: must be positive and finite"),
    ("kumar", "optimal_bits_at_size", {"N": 0.0, "compute": 1e20}, "optimal_bits_at_size: N=0: must be positive and finite"),
    ("kumar", "efficiency", {"weights_bits": "abc"}, "efficiency: weights_bits=abc: not a number"),
    ("kumar", "efficiency", {"weights_bits": -4.0}, "efficiency: weights_bits=-4: must be positive and finite"),
    ("chinchilla", "optimal_params", {"compute": float("nan")}, "optimal_params: compute=nan: must be positive and finite"),
    ("free_efficiency", "loss_gap", {"N": 1e8, "scheme": "int7"}, "loss_gap: scheme=int7: known levels are baseline, int1"),
])
def test_values_that_an_input_cannot_have_are_refused(law, quantity, columns, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        fitted(law).estimate(quantity, **columns)


def test_an_operand_may_be_told_to_be_unquantized():
    fit = fitted("kumar")
    assert fit.estimate("efficiency", weights_bits=4.0, kv_bits=np.inf).value == fit.estimate("efficiency", weights_bits=4.0).value


def test_what_may_be_left_out_may_be_none():
    quartet = fitted("quartet", loss="least_squares")
    at = {"N": 1e8, "D": 1e10, "backward": "RTN"}
    assert quartet.estimate("loss_gap", **at, forward=None) == quartet.estimate("loss_gap", **at)
    with pytest.raises(ValueError, match="loss_gap: scheme=None: not a value"):
        fitted("free_efficiency").estimate("loss_gap", N=1e8, scheme=None)


def test_levels_that_are_numbers_are_told_as_numbers():
    table = PLANTED["free_efficiency"].table(0)
    bits = {"baseline": 16.0, "int1": 1.0, "int2": 2.0, "int3": 3.0, "int4": 4.0, "int8": 8.0}
    fit = scaling.fit(table | {"scheme": np.array([bits[name] for name in table["scheme"]])}, "free_efficiency")
    named = fitted("free_efficiency").estimate("loss_gap", N=1e8, scheme="int4")
    assert fit.estimate("loss_gap", N=1e8, scheme=4.0).value == pytest.approx(named.value, rel=1e-6)


def test_critical_tokens_of_no_block_are_refused():
    with pytest.raises(ValueError, match="critical_tokens: block=0: must be positive and finite"):
        fitted("sun", loss="least_squares").estimate("critical_tokens", N=1e9, exp_bits=4.0, man_bits=0.0, block=0.0)


def test_each_level_has_its_gap():
    found = [one for one in scaling.derived(fitted("free_efficiency", loss="least_squares"))[0] if one.name == "loss_gap"]
    assert [one.at["scheme"] for one in found] == ["int1", "int2", "int3", "int4", "int8"]  # not the baseline
    quartet = [one.at for one in scaling.derived(fitted("quartet", loss="least_squares"))[0] if one.name == "loss_gap"]
    assert [tuple(at)[2:] for at in quartet] == [("forward",)] * 3 + [("backward",)] * 3


def test_command_line_prints_and_writes_them(epoch, tmp_path, capsys):
    out = tmp_path / "FIT.json"
    columns = ",".join(f"{name}={sql}" for name, sql in epoch["columns"].items())
    assert run("fit", [str(epoch["table"]), "--law", "chinchilla", "--columns", columns, "--where", epoch["where"], "--at", "compute=5.76e23", "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert "optimal_exponent" in told and "compute=5.76e+23" in told and "optimal_tokens_per_param" in told
    written = {one["name"]: one for one in json.loads(out.read_text())["metrics"]["derived"]}
    estimate = scaling.load(out).estimate("optimal_tokens_per_param", compute=5.76e23)
    assert (written["optimal_tokens_per_param"]["value"], written["optimal_tokens_per_param"]["high"]) == pytest.approx((estimate.value, estimate.high))


@pytest.mark.parametrize(("at", "message"), [
    ({"foo": 3.0}, "at: 'foo' is no input of what law quartet tells; these are "),
    ({"N": "many"}, "at: N=many: not a number"),
    ({"compute": -1.0}, "at: compute=-1: must be positive and finite"),
    ({"forward": "int2"}, "at: forward=int2: known levels are QuEST, RTN, SR, baseline"),
])
def test_refusals_are_one_line(at, message):
    with pytest.raises(ValueError) as error:
        scaling.derived(fitted("quartet", loss="least_squares"), at)
    assert message in str(error.value) and "\n" not in str(error.value)
