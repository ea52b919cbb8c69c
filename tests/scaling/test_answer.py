"""The sweep that decides its own next runs: its choices, its stops, and whether the intervals it stops with hold the truth."""
from __future__ import annotations

import importlib
import itertools
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binomtest

import scaling
from benchmarks.planted import OPTIMUM, Planted, world
from scaling import answer_text
from scaling.answer import Cell, Question, check_quantity, first, propose, spread_out, total_cost, verdict
from scaling.laws import laws
from scaling.rounds import constants_of, rounds

LAW = "kumar:tied+plain"
BUDGET = 1e13  # FLOP: 360 runs take 3e13
CELLS = [Cell(f"{n}-{d}-{b}", {"N": n, "D": d, "weights_bits": b, "activations_bits": b}, 6.0 * n * d)
         for n in (1e3, 1e4, 1e5) for d in (1e5, 1e6, 1e7) for b in (2.0, 4.0, 32.0)]


def search(seed, until, noise=0.01, budget=BUDGET):
    """(answer, the true width) of one world."""
    rng = np.random.default_rng(seed)
    trainer = Planted(world(rng), rng, noise)
    return rounds(Question("optimal_bits", {}, until), trainer, (LAW,), budget), OPTIMUM * trainer.truth["gamma"]


def planted_fit():
    """(a fit to the first runs of one world, its trainer)."""
    trainer = Planted(world(np.random.default_rng(0)), np.random.default_rng(0))
    trainer.train(first(trainer.cells(), 12, BUDGET))
    return scaling.fit(trainer.table()[0], LAW, loss="least_squares"), trainer


def assert_covers(seeds, until, monkeypatch):
    """Of the searches that stop, the share whose interval holds the truth is 95 % or more, within binomial error."""
    monkeypatch.setattr(importlib.import_module("scaling.fit"), "discrepancy", lambda *_: 0.0)  # half of the time, and no functional reads it
    found = [search(seed, until) for seed in seeds]
    held = [end.verdict.low <= truth <= end.verdict.high for end, truth in found if end.settled]
    assert len(held) >= 0.9 * len(found) and all(end.verdict.half_width < until for end, _ in found if end.settled)
    assert binomtest(sum(held), len(held), 0.95, alternative="less").pvalue > 0.025, (sum(held), len(held))


def test_the_optimum_of_the_planted_law():
    """2 x e^-x = 1 - e^-x at x = OPTIMUM, and the law's functional agrees."""
    assert 2 * OPTIMUM * np.exp(-OPTIMUM) == pytest.approx(1 - np.exp(-OPTIMUM), abs=1e-9)
    params = {"gamma_w": 2.0, "gamma_a": 2.0, "n_w": 0.0, "n_a": 0.0}
    assert laws["kumar"].functionals["optimal_bits"](params) == pytest.approx(2.0 * OPTIMUM, abs=1e-3)


@pytest.mark.slow
def test_intervals_cover_where_a_search_stops(monkeypatch):
    assert_covers(range(1000, 1100), 0.4, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("until", [0.12, 0.2])
def test_intervals_cover_after_many_looks(until, monkeypatch):
    assert_covers(range(2000, 2200), until, monkeypatch)


def test_a_first_design_has_corners_and_middle():
    """Eight corners and the middle of three axes (both widths move together), and more where more are asked for."""
    chosen = {cell.key for cell in first(CELLS, 9, 1e99)}
    corners = {f"{n}-{d}-{b}" for n, d, b in itertools.product((1e3, 1e5), (1e5, 1e7), (2.0, 32.0))}
    assert chosen == corners | {f"{1e4}-{1e6}-{4.0}"}
    assert len(first(CELLS, 14, 1e99)) == 14 and len({cell.key for cell in first(CELLS, 14, 1e99)}) == 14


def test_a_first_design_keeps_to_the_budget():
    total = sum(cell.cost for cell in first(CELLS, 9, 1e99))
    chosen = first(CELLS, 9, total / 20)
    assert len(chosen) >= 9 and sum(cell.cost for cell in chosen) <= total / 40
    assert first(CELLS, 9, 1e9) == []


def test_a_program_is_compiled_once_for_its_cells():
    """By hand: two runs of one size and one of another are 2 + 3 + 4 s of training and 10 + 20 s of compiling."""
    cells = [Cell("a", {}, 2.0, "small", 10.0), Cell("b", {}, 3.0, "small", 10.0), Cell("c", {}, 4.0, "large", 20.0)]
    assert total_cost(cells) == 39.0 and total_cost(cells[:2]) == 15.0 and total_cost([]) == 0.0
    compiling = [replace(cell, program=cell.columns["N"], setup=1e12) for cell in CELLS]
    sizes = {budget: {cell.columns["N"] for cell in first(compiling, 9, budget)} for budget in (1.5e12, 2.2e12, 1e13)}
    assert sizes == {1.5e12: set(), 2.2e12: {1e3, 1e4}, 1e13: {1e3, 1e4, 1e5}}  # a third program, and its runs, for more than half of 2.2e12
    fit, trainer = planted_fit()
    cells = [replace(cell, program=cell.columns["N"], setup=1e13) for cell in trainer.cells()]
    assert propose(fit, Question("optimal_bits", {}, 1e-3), cells, trainer.table()[1], 0.99e13) == []
    chosen = propose(fit, Question("optimal_bits", {}, 1e-3), cells, trainer.table()[1], 4.8e13)
    assert len({cell.program for cell in chosen}) == 1 and len(chosen) > 1


def test_spread_out_goes_where_nothing_is():
    there = [cell.columns for cell in CELLS if cell.columns["N"] < 1e5]
    assert all(cell.columns["N"] == 1e5 for cell in spread_out(CELLS, there, 4))


QUANTITIES = {"optimal_bits": {}, "alpha": {}, "loss_gap": {"N": 5e4, "weights_bits": 4.0, "activations_bits": 4.0}}


def test_proposals_are_the_best_per_cost_and_affordable():
    """The first is the best by brute force: a refit with each run that can be paid, at the loss that is expected of it. None twice; no more
    than a quarter of what is left unless one alone is more."""
    fit, trainer = planted_fit()
    rows, there = trainer.table()
    budget = 3e10
    cells = trainer.cells()
    affordable = {tuple(cell.columns.values()): cell for cell in cells if cell.cost <= budget}.values()  # seeds are alike
    refits = [scaling.fit({name: np.append(rows[name], value) for name, value in (cell.columns | {"loss": fit.predict(**cell.columns).loss}).items()},
                          LAW, loss="least_squares") for cell in affordable]
    winners = set()
    for quantity, at in QUANTITIES.items():
        before, gains = error_by_design(fit, quantity, at), {}
        for cell, refit in zip(affordable, refits, strict=True):
            gains[tuple(cell.columns.values())] = (before - error_by_design(refit, quantity, at)) / cell.cost
        best, second = sorted(gains, key=gains.get, reverse=True)[:2]
        assert gains[best] > 1.001 * gains[second]  # no tie that rounding would decide
        chosen = propose(fit, Question(quantity, at, 1e-3), cells, there, budget)
        assert tuple(chosen[0].columns.values()) == best and len({cell.key for cell in chosen}) == len(chosen)
        assert len(chosen) == 1 or sum(cell.cost for cell in chosen) <= max(0.25 * budget, chosen[0].cost)
        winners.add(best)
    assert len(winners) > 1  # what is best depends on the question
    assert propose(fit, Question("optimal_bits", {}, 1e-3), cells, [], 1.0) == []


def error_by_design(fit, quantity, at):
    """Standard error of a quantity in residual deviations: a row at its expected loss adds to the design, and would lower the residuals."""
    estimate = fit.estimate(quantity, **at)
    return estimate.relative_se * abs(estimate.value) / fit.metrics["residual_sd"]


def test_the_interval_is_the_98_percent_one():
    """Against the fit's own linearised error: low and high at the Student quantile of 98 %."""
    from scipy.stats import t

    fit, _ = planted_fit()
    said, plain = verdict(fit, Question("alpha", {}, 0.1)), fit.estimate("alpha")
    ratio = t.ppf(0.99, fit.metrics["dof"]) / t.ppf(0.975, fit.metrics["dof"])
    assert np.log(said.high / said.value) / np.log(plain.high / plain.value) == pytest.approx(ratio, rel=1e-9)
    assert said.narrow == (said.half_width < 0.1) and not verdict(fit, Question("alpha", {}, said.half_width)).narrow


def test_a_constant_on_its_bound_settles_nothing():
    """gamma beyond its box of 20 bits: it ends on its bound, has no error there, and optimal_bits would have an interval of no width."""
    rng = np.random.default_rng(0)
    trainer = Planted(world(rng) | {"gamma": 60.0}, rng)
    trainer.train(first(trainer.cells(), 12, BUDGET))
    fit = scaling.fit(trainer.table()[0], LAW, loss="least_squares")
    assert {"gamma_w", "gamma_a"} & set(fit.metrics["at_bound"])
    said = verdict(fit, Question("optimal_bits", {}, 0.3))
    assert not said.narrow and "bound" in said.reason
    assert not fit.identified("optimal_bits") and "ended on its bound" in fit.estimate("optimal_bits").reason


def test_a_budget_that_cannot_settle_it_says_so():
    end, _ = search(0, 1e-6, budget=5e11)
    assert not end.settled and end.rounds[-1].spent <= 5e11 and end.verdict.half_width > 1e-6
    told = answer_text.sentence(end, Question("optimal_bits", {}, 1e-6), "bits")
    assert "not settled" in told and f"{end.verdict.low:.4g} to {end.verdict.high:.4g}" in told and "\n" not in told
    end, _ = search(0, 0.3, budget=1e6)
    assert not end.settled and "there is no interval" in answer_text.sentence(end, Question("optimal_bits", {}, 0.3), "bits")


def test_a_second_design_keeps_to_what_is_left():
    """Three runs are there, which no law fits yet; ten more would be wanted, and the budget pays for two."""
    trainer = Planted(world(np.random.default_rng(0)), np.random.default_rng(0))
    trainer.train(sorted(trainer.cells(), key=lambda cell: cell.cost)[:3])
    cheap = sorted(cell.cost for cell in trainer.cells())
    budget = trainer.spent() + sum(cheap[:2])
    end = rounds(Question("optimal_bits", {}, 0.1), trainer, (LAW,), budget)
    assert not end.settled and end.rounds[0].verdict is None and trainer.spent() <= budget and end.rounds[-1].runs > 3


def test_questions():
    kumar = [laws["kumar"]]
    question, remark = check_quantity(Question("optimal_bits", {"compute": 1e15}, 0.3), kumar)
    assert question.at == {} and "does not depend on compute" in remark  # its value at every compute
    assert check_quantity(Question("loss", {"N": 1e5, "D": 1e6}, 0.1), kumar)[1] == ""
    for bad, expected in ((Question("bits", {}, 1), "optimal_bits, "), (Question("optimal_bits", {"comput": 1}, 1), "--at comput=1"),
                          (Question("loss_gap", {}, 1), "N=..."), (Question("loss", {"N": 1}, 1), "D=...")):
        with pytest.raises(ValueError, match=expected):
            check_quantity(bad, kumar)


@pytest.mark.parametrize(("axis", "told"), [("N", "N is "), ("D", "D is "), ("weights_bits", "weights_bits is ")])
def test_a_sweep_that_lacks_an_axis_is_refused(axis, told):
    cells = [cell.columns | ({axis: 4.0} | ({"activations_bits": 4.0} if axis == "weights_bits" else {})) for cell in CELLS]
    with pytest.raises(ValueError, match=told):
        constants_of((LAW,), cells)


@pytest.mark.parametrize(("arguments", "expected"), [
    (["optimal_bit", "--until", "1", "--budget", "1h"], "optimal_bits, "), (["alpha", "--until", "-1", "--budget", "1h"], "--until -1"),
    (["alpha", "--until", "x", "--budget", "1h"], "--until x"), (["alpha", "--until", "0%", "--budget", "1h"], "--until 0%"),
    (["alpha", "--until", "1"], "--budget"), (["alpha", "--until", "1", "--budget", "1h", "--law", "kumr"], "kumr"),
    (["alpha", "--until", "1", "--budget", "1h", "--bootstrap", "-1"], "--bootstrap -1"),
])  # fmt: skip
def test_bad_arguments(arguments, expected):
    with pytest.raises(ValueError, match=expected):
        answer_text.parse(arguments)
