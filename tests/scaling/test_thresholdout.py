"""Thresholdout against its definition (Dwork et al. 2015, figure 1), the overfitting it is there to stop, and its file."""
from __future__ import annotations

import json
import math
import subprocess
import sys
import time

import numpy as np
import pytest
from scipy import integrate, stats

import scaling
from scaling.cli import run
from scaling.files import locked
from scaling.thresholdout import Thresholdout, load_guard
from tests.scaling import fake_runs


def test_without_noise_it_is_a_plain_threshold():
    guard = scaling.Thresholdout(threshold=0.1, scale=1e-12, budget=2)
    told = [guard.ask(*scores) for scores in ((0.5, 0.55), (0.5, 0.65), (0.7, 0.5), (0.5, 0.5))]
    assert [answer.source for answer in told] == ["training", "held-out", "held-out", "budget spent"]
    assert [answer.value for answer in told[:3]] == pytest.approx([0.5, 0.65, 0.5], abs=1e-10) and math.isnan(told[3].value)
    assert (guard.asked, guard.spent) == (3, 2)


@pytest.mark.parametrize("difference", [0.0, 0.7, 1.0, 1.6])
def test_chance_of_an_answer_from_the_held_out_rows(difference):
    """T + Laplace(2 sigma) + Laplace(4 sigma) < difference, over 4000 seeds, against the integral of the two densities."""
    threshold, scale = 1.0, 0.1
    exact, _ = integrate.quad(lambda g: stats.laplace.pdf(g, scale=2 * scale) * stats.laplace.cdf(difference - threshold - g, scale=4 * scale), -4, 4,
                              points=[0.0, difference - threshold])
    paid = np.mean([Thresholdout(threshold, scale, 1, seed).ask(3.0, 3.0 + difference).source == "held-out" for seed in range(4000)])
    assert paid == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 4000))


def test_noise_of_answers_and_thresholds_is_laplace():
    """Also after questions have been asked: each answer's noise is new, independent of those before."""
    first, second, thresholds = [], [], []
    for seed in range(2000):
        guard = Thresholdout(0.1, 0.02, 5, seed)
        thresholds.append(guard.noisy_threshold)
        first.append(guard.ask(0.0, 50.0).value - 50.0)
        second.append(guard.ask(0.0, 50.0).value - 50.0)
    for values, scale in ((first, 0.02), (second, 0.02), (np.array(thresholds) - 0.1, 0.04)):
        assert stats.kstest(values, stats.laplace(scale=scale).cdf).pvalue > 1e-3
    assert abs(stats.spearmanr(first, second).statistic) < 0.08 and abs(stats.spearmanr(first, thresholds).statistic) < 0.08


def test_threshold_is_drawn_anew_only_after_a_paid_answer():
    guard = Thresholdout(1.0, 0.01, 5)
    before = guard.noisy_threshold
    guard.ask(0.0, 0.0)
    assert guard.noisy_threshold == before and guard.spent == 0
    guard.ask(0.0, 9.0)
    assert guard.noisy_threshold != before and guard.spent == 1


def test_an_analyst_who_selects_on_the_held_out_set_is_stopped():
    """Dwork et al.'s experiment: pure noise, features chosen when training and held-out correlations agree. The truth is 50 %; seed 0."""
    rng = np.random.default_rng(0)
    n, d = 1000, 3000
    (x, y), (x_held, y_held) = ((rng.standard_normal((n, d)), rng.choice((-1.0, 1.0), n)) for _ in range(2))
    training, held = y @ x / n, y_held @ x_held / n

    def accuracy(answers):
        chosen = (np.abs(training) > n**-0.5) & (np.sign(training) == np.sign(answers)) & (np.abs(answers) > n**-0.5)
        signs = np.where(chosen, np.sign(training), 0.0)
        return np.mean(np.sign(x @ signs) == y), np.mean(np.sign(x_held @ signs) == y_held)

    assert accuracy(held)[1] > 0.65  # the naive re-use of the held-out set believes in noise
    guard = Thresholdout(4 / n**0.5, n**-0.5, 1000)
    answers = np.array([guard.ask(*scores).value for scores in zip(training, held, strict=True)])
    seen, held_out = accuracy(answers)
    assert seen > 0.8 and held_out == pytest.approx(0.5, abs=0.08)  # 5 standard errors of 1000 coin tosses: the held-out rows are as good as new
    told = guard.ask(seen, held_out)
    assert told.source == "held-out" and told.value < 0.65


def test_file_goes_on_where_it_stopped(tmp_path):
    path = tmp_path / "guard.json"
    whole, parts = Thresholdout(0.1, 0.05, 9, seed=4), Thresholdout(0.1, 0.05, 9, seed=4)
    for question in range(12):
        parts.save(path)
        parts = load_guard(path)
        assert str(parts.ask(1.0, 1.0 + 0.03 * question)) == str(whole.ask(1.0, 1.0 + 0.03 * question))
    assert json.loads(path.read_text())["asked"] == 11 and whole.asked == 12


@pytest.mark.parametrize(("text", "told"), [("[]", "not a guard"), ("{", "cannot be read"), ('{"bitlaw_guard": 1}', "not a guard")])
def test_a_file_that_is_no_guard(tmp_path, text, told):
    (tmp_path / "g.json").write_text(text)
    with pytest.raises(ValueError, match=told):
        load_guard(tmp_path / "g.json")


@pytest.mark.parametrize("bad", [{"threshold": 0.0}, {"scale": float("nan")}, {"budget": 0}, {"budget": 1.5}, {"seed": -1}, {"threshold": "1"}])
def test_refusals(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Thresholdout(**bad)


def test_scores_must_be_finite():
    with pytest.raises(ValueError, match="finite"):
        Thresholdout().ask(0.1, float("inf"))


def test_command_line_counts_across_invocations(tmp_path, capsys):
    runs = fake_runs.write_runs(tmp_path / "runs")
    guard = tmp_path / "guard.json"
    command = ["compare", str(runs), "--laws", "chinchilla,kumar:tied+plain", "--holdout", "N = max(N) OVER ()", "--guard", str(guard)]
    truth = scaling.fit(runs, "chinchilla", holdout="N = max(N) OVER ()").metrics
    assert abs(truth["held_out"]["rmse"] - truth["rmse"]) < 0.1
    assert run("compare", [*command[1:], "--guard-budget", "2", "--guard-threshold", "1e-6", "--guard-scale", "1e-6"]) == 0
    out = capsys.readouterr().out
    state = json.loads(guard.read_text())
    assert (state["asked"], state["spent"]) == (2, 2) and "these rows have been used up" in out
    assert run("compare", command[1:]) == 2 and "hold out other rows" in capsys.readouterr().err
    assert run("compare", [*command[1:], "--guard-budget", "9"]) == 2
    guard.write_text(json.dumps(state | {"spent": 1, "asked": 1}))
    capsys.readouterr()
    assert run("compare", [*command[1:], "--guard-budget", "9"]) == 2 and "it cannot change" in capsys.readouterr().err
    assert run("compare", ["D = max(D) OVER ()" if part.startswith("N =") else part for part in command[1:]]) == 2
    assert "other held-out rows" in capsys.readouterr().err
    assert run("compare", command[1:]) == 0
    assert json.loads(guard.read_text())["asked"] >= 2
    assert run("compare", [str(runs), "--laws", "chinchilla", "--guard", str(guard)]) == 2 and "--holdout" in capsys.readouterr().err


ASKER = """
import sys, time
from argparse import Namespace
from pathlib import Path
from scaling import compare_text
guard, ready, go = map(Path, sys.argv[1:])
compare_text.held_out_mark = lambda *_: "these rows"
compare_text.guarded = lambda comparison, ask: (ask(0.1, 0.5), time.sleep(0.02), comparison)[2]  # an unlocked one would be overtaken meanwhile
arguments = Namespace(guard=str(guard), holdout="N = 8e6", seed=0, guard_threshold=1e-6, guard_scale=1e-9, guard_budget=40)
ready.touch()
while not go.exists():
    time.sleep(0.005)
for _ in range(15):
    compare_text.with_guard(Namespace(fits=()), arguments)
"""


def test_two_processes_spend_one_budget(tmp_path):
    """Each asks fifteen times, both at once: thirty questions and thirty paid answers, none counted for two."""
    guard, go = tmp_path / "guard.json", tmp_path / "go"
    ready = [tmp_path / f"ready{i}" for i in range(2)]
    processes = [subprocess.Popen([sys.executable, "-c", ASKER, str(guard), str(mark), str(go)], stderr=subprocess.PIPE) for mark in ready]
    since = time.monotonic()
    while not all(mark.exists() for mark in ready):
        assert time.monotonic() - since < 120 and all(process.poll() is None for process in processes), [p.stderr.read() for p in processes if p.poll()]
        time.sleep(0.01)
    go.touch()
    assert [process.wait(120) for process in processes] == [0, 0], [process.stderr.read() for process in processes]
    state = json.loads(guard.read_text())
    assert (state["asked"], state["spent"]) == (30, 30)
    assert {path.name for path in tmp_path.iterdir()} == {"guard.json", "go", "ready0", "ready1"}  # neither lock nor part is left


def test_a_lock_ends_with_its_process_and_is_not_waited_for_without_end(tmp_path):
    path = tmp_path / "guard.json"
    code = "import sys, time; from scaling.files import locked\nwith locked(sys.argv[1]): print('in', flush=True); time.sleep(600)"
    holder = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"in\n"
    with pytest.raises(ValueError, match="guard.json: another process has it locked"), locked(path, patience=0.1):
        pass
    holder.kill()
    holder.wait()
    assert (tmp_path / ".guard.json.lock").exists()  # what a killed process leaves is no lock
    with locked(path, patience=0.1):
        pass
    assert not list(tmp_path.iterdir())


def test_guarded_table_shows_no_held_out_figure_of_its_own(tmp_path, capsys):
    runs = fake_runs.write_runs(tmp_path / "runs")
    true = scaling.fit(runs, "kumar:tied+plain", holdout="N = max(N) OVER ()").metrics
    assert run("compare", [str(runs), "--laws", "kumar:tied+plain", "--holdout", "N = max(N) OVER ()", "--guard", str(tmp_path / "g.json"),
                           "--guard-threshold", "10"]) == 0
    out = capsys.readouterr().out
    assert f"{true['held_out']['rmse']:.3%}" not in out and f"{true['held_out']['rmse_nats']:.4f}" not in out
    assert out.count(f"{true['rmse']:.3%}") == 2 and "from the training rows" in out
