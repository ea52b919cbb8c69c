"""Is asking worth it? `python -m benchmarks.answer [--worlds 20] [--runs TABLE] [--plot FILE.png]`. Prints JSON lines.

`answer` spends budgets on the interval of one quantity, and full grids of the same budget are fitted beside it: every combination of sizes, lengths
and widths up to a largest size and length, of all such corners (with one seed, or more) the dearest that can be paid. The interval is the same 95 %
one in both (least squares, linearised), compute in FLOP, 6 N D a run. In simulated worlds a planted law with noise is the truth
(benchmarks.planted); with --runs the losses are those of a run table, of which `answer` sees only the rows that it asks for.
"""
from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import numpy as np

import scaling
from scaling.answer import Question, verdict
from scaling.reach import MAX_REACH, reaches
from scaling.rounds import Trainer, rounds
from benchmarks.planted import Planted, Recorded, world

LAW = "kumar:tied+plain"
NEVER = 1e-12  # a half-width that nobody reaches: all of the budget is spent
SHARES = (0.02, 0.04, 0.08, 0.16)  # of what all runs take
QUESTIONS = {"optimal_bits": ({}, "bits"), "alpha": ({}, ""), "loss": (None, "nats/token")}
BEYOND = 2.0  # "loss" is asked at so many times the largest N and D, unquantized


def question_of(quantity: str, trainer: Trainer) -> Question:
    """`quantity`, never settled; of a loss: beyond every run."""
    at = QUESTIONS[quantity][0]
    if at is None:
        at = {name: BEYOND * max(cell.columns[name] for cell in trainer.cells()) for name in ("N", "D")}
    return Question(quantity, at, NEVER)


def asked(trainer: Trainer, question: Question, law: str, budget: float) -> float:
    """Half-width when all of the budget is spent on what `rounds` chooses; inf where the fit does not tell it."""
    return half_width(rounds(question, trainer, (law,), budget).verdict)


def half_width(end) -> float:
    """Of a verdict; inf for one that tells nothing."""
    return np.inf if end is None or end.reason else end.half_width


def grid(trainer: Trainer, question: Question, law: str, budget: float) -> float:
    """Half-width of the dearest full grid that can be paid."""
    best = 0.0, []
    cells = trainer.cells()
    sizes, lengths = (sorted({cell.columns[name] for cell in cells}) for name in ("N", "D"))
    for seeds in range(1, 1 + max(cell.seed for cell in cells) + 1):
        for size in sizes[1:]:
            for length in lengths[1:]:
                part = [c for c in cells if c.columns["N"] <= size and c.columns["D"] <= length and c.seed < seeds]
                cost = sum(cell.cost for cell in part)
                best = max(best, (cost, part), key=lambda one: one[0] if one[0] <= budget else 0.0)
    if not best[1]:
        return np.inf
    trainer.train(best[1])
    fit = scaling.fit(trainer.table()[0], law, loss="least_squares")
    if question.quantity == "loss" and any(factor > MAX_REACH for factor, _ in reaches(fit.ranges, question.at).values()):
        return np.inf  # refused: the grid ends too far below
    return half_width(verdict(fit, question))


def compare(quantity: str, law: str, makers: list[Callable[[], Trainer]], share: float) -> dict:
    """Medians over worlds, with quartiles, of a budget that is a share of what all runs take."""
    budget = share * sum(cell.cost for cell in makers[0]().cells())
    question = question_of(quantity, makers[0]())
    pairs = np.array([[way(make(), question, law, budget) for way in (asked, grid)] for make in makers])
    told = np.isfinite(pairs)
    row = {"quantity": quantity, "law": law, "flop": budget, "worlds": len(makers), "told": told.sum(axis=0).tolist()}
    for name, values in zip(("answer", "grid"), pairs.T, strict=True):
        row[name] = [float(q) for q in np.quantile(values, (0.25, 0.5, 0.75), method="nearest")]
    both = pairs[told.all(axis=1)]
    return row | {"grid/answer": float(np.median(both[:, 1] / both[:, 0])) if len(both) else None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worlds", type=int, default=20)
    parser.add_argument("--noise", type=float, default=0.01, help="deviation of ln loss of a run in simulated worlds (default 0.01)")
    parser.add_argument("--questions", default=",".join(QUESTIONS), help=f"of {', '.join(QUESTIONS)} (default all)")
    parser.add_argument("--runs", metavar="TABLE", help="replay a run table in place of simulated worlds")
    parser.add_argument("--law", default=LAW, help=f"default {LAW}")
    parser.add_argument("--plot", metavar="FILE", help="draws half-width against compute, with matplotlib")
    arguments = parser.parse_args()
    if arguments.runs:
        makers = [lambda: Recorded(arguments.runs)]
    else:
        makers = [lambda seed=seed: Planted(world(np.random.default_rng(seed)), np.random.default_rng(seed), arguments.noise)
                  for seed in range(arguments.worlds)]
    rows = []
    for quantity in arguments.questions.split(","):
        for share in SHARES:
            rows.append(compare(quantity, arguments.law, makers, share))
            print(json.dumps(rows[-1]), flush=True)
    if arguments.plot:
        draw(rows, arguments.plot)


def draw(rows: list[dict], path: str) -> None:
    """Half-width against compute, both ways of spending it, a panel for each question; bands hold half of the worlds."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    from scaling import plots

    names = list(dict.fromkeys(row["quantity"] for row in rows))
    with plots.style():
        figure = Figure(figsize=(3.1 * len(names), 2.8), layout="constrained")
        for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
            here = [row for row in rows if row["quantity"] == name]
            for way, label, colour, marker in (("grid", "full grid", "#999999", "s"), ("answer", "bitlaw answer", "#1d6996", "o")):
                low, middle, high = np.array([row[way] for row in here]).T
                axes.fill_between([row["flop"] for row in here], low, high, color=colour, alpha=0.2, linewidth=0)
                axes.plot([row["flop"] for row in here], middle, marker + "-", color=colour, label=label, markersize=4)
            at, measure = QUESTIONS[name]
            axes.set(xscale="log", yscale="log", xlabel="training compute (FLOP)", title=name if at is not None else f"{name} at {BEYOND:g}x the largest N and D",
                     ylabel="half-width" + (f" ({measure})" if measure else ""))
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
                axis.set_major_formatter(StrMethodFormatter("{x:g}"))
                axis.set_minor_formatter(NullFormatter())
        axes.legend()
        figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
