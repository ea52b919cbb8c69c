"""Searches over a hyper-parameter, against enumeration of subsets by hand; what a table carries is printed and reported."""
from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
from scipy import stats

import scaling
from scaling.cli import run
from scaling.searches import searches
from scaling.stats_text import search_cells, search_header
from tests.scaling import fake_runs

RATES = (0.001, 0.003, 0.01, 0.03)


def swept(diverged=()):
    """Two cells (float32 and int4), three seeds, four learning rates, the best at 0.01 or, for int4, 0.003; rows in no order."""
    rng = np.random.default_rng(5)
    rows = [(p, s, lr, 3.0 + 0.1 * (p == "int4") + 0.05 * np.log(lr / (0.003 if p == "int4" else 0.01)) ** 2 + 0.01 * rng.standard_normal())
            for p in ("float32", "int4") for s in range(3) for lr in RATES]
    rows = [rows[i] for i in rng.permutation(len(rows))]
    p, s, lr, loss = (list(column) for column in zip(*rows, strict=True))
    status = ["diverged" if (p[i], lr[i]) in diverged else "done" for i in range(len(rows))]
    return {"n_params": np.full(24, 1e5), "tokens": np.full(24, 2e6), "precision": p, "weights_bits": [4.0 if name == "int4" else 32.0 for name in p],
            "seed": s, "lr": lr, "loss": [np.nan if state == "diverged" else value for state, value in zip(status, loss, strict=True)],
            "status": status, "run_id": [f"r{i}" for i in range(24)]}


def by_hand(table, precision, k):
    """The mean over seeds of the mean over all k-subsets of the lowest loss."""
    per_seed = []
    for seed in range(3):
        losses = [loss for p, s, loss in zip(table["precision"], table["seed"], table["loss"], strict=True) if (p, s) == (precision, seed) and loss == loss]
        subsets = list(itertools.combinations(losses, k))
        per_seed.append(sum(map(min, subsets)) / len(subsets))
    return np.mean(per_seed)


def test_curves_are_the_means_over_all_subsets():
    table = swept()
    found = {search.precision: search for search in searches(scaling.table(table))}
    assert set(found) == {"float32", "int4"}
    for name, search in found.items():
        assert search.curve == pytest.approx([by_hand(table, name, k) for k in (1, 2, 3, 4)], rel=1e-12)
        assert (search.seeds, search.runs, search.diverged, search.repeated) == (3, 12, 0, 0)
    assert found["float32"].best == (0.01,) and found["int4"].best == (0.003,)


def test_diverged_runs_are_counted_in_their_own_cell_and_are_in_no_curve():
    table = swept(diverged={("int4", 0.03)})
    found = {search.precision: search for search in searches(scaling.table(table))}
    assert found["int4"].curve == pytest.approx([by_hand(table, "int4", k) for k in (1, 2, 3)], rel=1e-12)
    assert (found["int4"].diverged, found["float32"].diverged) == (3, 0) and len(found["float32"].curve) == 4


def test_other_columns_and_seeds_may_be_what_was_tuned():
    """Weight decay is a column of one's own; over seeds, every learning rate is a cell; a column that nobody varied gives nothing."""
    table = swept()
    decayed = {name: np.concatenate([values, values]) for name, values in table.items()} | {"weight_decay": np.repeat([0.0, 0.1], 24)}
    decayed["run_id"], decayed["loss"] = np.array([f"r{i}" for i in range(48)]), np.concatenate([table["loss"], np.array(table["loss"]) - 0.02])
    found = searches(scaling.table(decayed), ["weight_decay"])
    assert len(found) == 8 and all(len(search.curve) == 2 and search.best == (0.1,) for search in found)
    assert [float(search.curve[0] - search.curve[1]) for search in found] == pytest.approx([0.01] * 8, rel=1e-9)
    both = searches(scaling.table(decayed), ["lr", "weight_decay"])
    assert [len(search.curve) for search in both] == [8, 8] and both[0].best == (0.01, 0.1)
    assert searches(scaling.table(decayed), ["lr"]) == []  # every rate is there twice, and which of the two is meant is not known
    twice = {name: np.append(values, values[0]) for name, values in table.items()} | {"run_id": [f"r{i}" for i in range(25)]}
    assert sorted((search.runs, search.repeated) for search in searches(scaling.table(twice))) == [(11, 2), (12, 0)]
    seeds = searches(scaling.table(table), ["seed"])
    assert len(seeds) == 8 and all(len(search.curve) == 3 and search.seeds == 1 for search in seeds)
    assert searches(scaling.table(fake_runs.rows() | {"lr": np.full(48, 0.01)})) == []
    with pytest.raises(ValueError, match="tuned: 'decay' is no column of the table; it has n_params"):
        searches(scaling.table(table), ["decay"])


def test_command_line_prints_what_the_table_carries(tmp_path, capsys):
    table = swept(diverged={("int4", 0.03)})
    path = str(scaling.write_table(scaling.table(table), tmp_path / "runs.parquet"))
    assert run("stats", [path]) == 0
    out = capsys.readouterr().out
    losses = {key: [] for key in set(zip(table["precision"], table["lr"], strict=True))}
    for p, lr, loss in zip(table["precision"], table["lr"], table["loss"], strict=True):
        losses[p, lr].append(loss)
    groups = [np.array(values) for values in losses.values() if np.isfinite(values).all()]
    within = sum(((g - g.mean()) ** 2).sum() for g in groups) / (len(groups) * 2)
    low, high = (np.sqrt(14 * within / stats.chi2.ppf(share, 14)) for share in (0.975, 0.025))
    assert f"{np.sqrt(within):.4g}" in out and f"interval {low:.4g} to {high:.4g}" in out and "21 finished runs of 24 rows" in out
    for k in (1, 2):
        assert f"{by_hand(table, 'int4', k):.4f}" in out and f"{by_hand(table, 'float32', k):.4f}" in out
    gaps = [a - b for a, b in zip(*([loss for _, _, loss in sorted((lr, s, loss) for p, s, lr, loss in zip(*(table[c] for c in ("precision", "seed", "lr", "loss")),
                                    strict=True) if p == name and lr < 0.03)] for name in ("int4", "float32")), strict=True)]
    assert re.search(rf"int4 .*│ +9 │ +\+{np.mean(gaps):.4f} ", out) and "3 diverged runs of these cells are in no curve" in out
    assert run("stats", [path, "--tuned", "decay"]) == 2 and "tuned: 'decay' is no column of the table" in capsys.readouterr().err


def test_report_shows_searches_where_there_are_some(tmp_path):
    table = swept()
    text = scaling.report(table, tmp_path / "r.html", scaling.analyse(table, bootstrap=0)).read_text(encoding="utf-8")
    assert "<h2>Searches over lr</h2>" in text and "What tuning is expected to reach." in text and f"{by_hand(table, 'int4', 2):.4f}" in text
    assert "between cells" in text and "between seeds" in text
    counted = table | {"correct": np.full(24, 45), "questions": np.full(24, 60), "model": table["run_id"]}
    text = scaling.report(counted, tmp_path / "r.html", scaling.analyse(counted, bootstrap=0)).read_text(encoding="utf-8")
    low, high = stats.beta.ppf([0.025, 0.975], 46, 16)
    assert "<h2>Accuracies</h2>" in text and text.count(f"{low:.2%} to {high:.2%}") == 24
    wrong = table | {"correct": np.full(24, 61), "questions": np.full(24, 60)}
    text = scaling.report(wrong, tmp_path / "r.html", scaling.analyse(wrong, bootstrap=0)).read_text(encoding="utf-8")
    assert "No accuracies: correct=61, questions=60, of " in text
    plain = fake_runs.rows(sizes={"2k": 2_304})
    text = scaling.report(plain, tmp_path / "r.html", scaling.analyse(plain, bootstrap=0)).read_text(encoding="utf-8")
    assert "Searches over" not in text and "between cells" not in text and "What tuning" not in text


def test_the_largest_k_is_that_of_the_shortest_search():
    """Seeds 0 and 1 have four runs, seed 2 two: the last column is the best of two, above the lowest losses of the longer searches."""
    table = swept()
    kept = [i for i in range(24) if not (table["precision"][i] == "int4" or (table["seed"][i] == 2 and table["lr"][i] > 0.003))]
    rows = [(s, lr, loss) for s, lr, loss in ((table["seed"][i], table["lr"][i], table["loss"][i]) for i in kept)]
    (search,) = searches(scaling.table({name: [values[i] for i in kept] for name, values in table.items()}))
    mean = np.mean([np.mean([min(pair) for pair in itertools.combinations([loss for s, _, loss in rows if s == seed], 2)]) for seed in range(3)])
    header, counts = search_header([search], ["lr"])
    assert len(search.curve) == 2 and search_cells(search, counts)[header.index("largest k")] == f"{mean:.4f}"


def test_gaps_and_variances_follow_the_level(tmp_path, capsys):
    """Student's interval of the twelve gaps, by hand, at 80 %; a level that is no share is refused."""
    table = swept()
    path = str(scaling.write_table(scaling.table(table), tmp_path / "runs.parquet"))
    by_name = {name: [loss for p, _, _, loss in sorted(zip(*(table[c] for c in ("precision", "lr", "seed", "loss")), strict=True)) if p == name]
               for name in ("int4", "float32")}
    gaps = np.subtract(by_name["int4"], by_name["float32"])
    low, high = stats.t.interval(0.8, 11, loc=gaps.mean(), scale=stats.sem(gaps))
    assert run("stats", [path, "--level", "0.8"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert f"{low:+.4f} to {high:+.4f}" in out and "80%" in out and "95%" not in out
    for level in ("1.5", "0", "nan"):
        assert run("stats", [path, "--level", level]) == 2 and f"--level {level}: need a share between 0 and 1" in capsys.readouterr().err


@pytest.mark.parametrize(("correct", "questions", "message"), [
    ("0.83", "100", "correct=0.83, of a: beside a column questions both are counts"),
    ("true", "100", "correct=True, of a: beside a column questions both are counts"),
    ("83", "99.5", "questions=99.5, of a: beside a column questions both are counts"),
    ("61", "60", "correct=61, questions=60, of a: need at least one question, and no more right answers than questions"),
    ("-1", "60", "correct=-1, questions=60, of a: need"),
])
def test_counts_that_are_none_are_refused(correct, questions, message, tmp_path, capsys):
    """In columns of these names, and named by --columns."""
    path = tmp_path / "counts.csv"
    for names, more in (("correct,questions", []), ("hits,asked", ["--columns", "correct=hits,questions=asked"])):
        path.write_text(f"model,{names}\na,{correct},{questions}\n")
        assert run("stats", [str(path), *more]) == 2
        assert message in capsys.readouterr().err


def test_accuracies_from_counts_and_from_answers(tmp_path, capsys):
    """Counts: Beta(1 + s, 1 + f). Answers: 40 questions, a right on 30, b on 25, both on 20: the Dirichlet posterior of the difference by simulation."""
    counts = tmp_path / "counts.csv"
    counts.write_text("model,right,asked\na,45,60\nb,60,60\n")
    assert run("stats", [str(counts), "--columns", 'correct="right",questions=asked']) == 0
    out = capsys.readouterr().out
    for s, f in ((45, 15), (60, 0)):
        low, high = stats.beta.ppf([0.025, 0.975], 1 + s, 1 + f)
        assert f"{low:.2%} to {high:.2%}" in out
    answers = tmp_path / "answers.csv"
    a, b = [1] * 30 + [0] * 10, [1] * 20 + [0] * 10 + [1] * 5 + [0] * 5
    answers.write_text("model,question,correct\n" + "".join(f"{name},{q},{right}\n" for name, own in (("a", a), ("b", b)) for q, right in enumerate(own)))
    assert run("stats", [str(answers), "--reference", "b"]) == 0
    out = capsys.readouterr().out
    posterior = np.random.default_rng(0).dirichlet([21, 11, 6, 6], 400_000) @ [0, 1, -1, 0]  # both, only a, only b, neither
    low, high = (float(x) for x in re.search(r"\+12.50% │ ([+-][\d.]+)% to ([+-][\d.]+)%", out).groups())
    assert (low / 100, high / 100) == pytest.approx(np.quantile(posterior, [0.025, 0.975]), abs=2e-3)
    better = float(re.search(r"([\d.]+)% │\n", out)[1]) / 100
    assert better == pytest.approx(np.mean(posterior > 0), abs=3e-3)
    answers.write_text("model,question,correct\na,1,1\na,1,0\n")
    assert run("stats", [str(answers)]) == 2 and "a answered question 1 twice" in capsys.readouterr().err
    assert run("stats", [str(counts), "--columns", "correct=model,questions=asked"]) == 2 and capsys.readouterr().err.startswith("bitlaw: columns: Conversion Error")
    assert run("stats", [str(counts)]) == 2 and "a run table needs n_params, tokens, loss" in capsys.readouterr().err
