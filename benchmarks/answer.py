"""Is asking worth it? `python -m benchmarks.answer [--worlds 20] [--plot FILE.png]`. Prints JSON lines.

In simulated worlds (a planted law with noise, benchmarks.planted.py) `answer` spends budgets on the width of one interval, and a full grid of the
same budget is fitted beside it: every combination of sizes, lengths and widths, all seeds of a cell before the next larger size or length, cut off
where the budget ends. The interval is the same 95 % one in both (least squares, linearised), compute in FLOP, 6 N D a run.
"""
from __future__ import annotations

import argparse
import json

import numpy as np

import scaling
from scaling.answer import Question, verdict
from scaling.rounds import rounds
from benchmarks.planted import Planted, world

LAW = "kumar:tied+plain"
BUDGETS = (5e11, 1e12, 2e12, 4e12)
NEVER = Question("optimal_bits", {}, 1e-9)


def asked(truth: dict, seed: int, budget: float, noise: float) -> float:
    """Half-width, bits, when all of the budget is spent on what `rounds` chooses; inf where the fit does not tell it."""
    trainer = Planted(truth, np.random.default_rng(seed), noise)
    end = rounds(NEVER, trainer, (LAW,), budget).verdict
    return np.inf if end is None or end.reason else end.half_width


def grid(truth: dict, seed: int, budget: float, noise: float) -> float:
    """Half-width of the largest full grid within the budget: sizes and lengths of a corner of the design, all widths, one seed or more."""
    best = 0.0, []
    cells = Planted(truth, np.random.default_rng(seed), noise).cells()
    sizes, lengths = (sorted({cell.columns[name] for cell in cells}) for name in ("N", "D"))
    for seeds in ("0", "01", "012"):
        for size in sizes[1:]:
            for length in lengths[1:]:
                part = [c for c in cells if c.columns["N"] <= size and c.columns["D"] <= length and c.key[-1] in seeds]
                cost = sum(cell.cost for cell in part)
                best = max(best, (cost, part), key=lambda one: one[0] if one[0] <= budget else 0.0)
    if not best[1]:
        return np.inf
    trainer = Planted(truth, np.random.default_rng(seed), noise)
    trainer.train(best[1])
    end = verdict(scaling.fit(trainer.table()[0], LAW, loss="least_squares"), NEVER)
    return np.inf if end.reason else end.half_width


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worlds", type=int, default=20)
    parser.add_argument("--noise", type=float, default=0.01, help="deviation of ln loss of a run (default 0.01)")
    parser.add_argument("--plot", metavar="FILE", help="draws half-width against compute, with matplotlib")
    arguments = parser.parse_args()
    rows = []
    for budget in BUDGETS:
        pairs = []
        for seed in range(arguments.worlds):
            truth = world(np.random.default_rng(seed))
            pairs.append((asked(truth, seed, budget, arguments.noise), grid(truth, seed, budget, arguments.noise)))
        ours, theirs = np.median(pairs, axis=0)
        rows.append({"flop": budget, "answer_half_width": float(ours), "grid_half_width": float(theirs), "grid/answer": float(np.median([b / a for a, b in pairs if np.isfinite(a + b)] or [np.nan])),
                     "told": [int(np.isfinite(part).sum()) for part in np.transpose(pairs)], "worlds": arguments.worlds})
        print(json.dumps(rows[-1]), flush=True)
    if arguments.plot:
        draw(rows, arguments.plot)


def draw(rows: list[dict], path: str) -> None:
    """Median half-width against compute, both ways of spending it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    for name, label in (("answer_half_width", "bitlaw answer"), ("grid_half_width", "full grid")):
        axes.loglog([row["flop"] for row in rows], [row[name] for row in rows], "o-", label=label)
    axes.set(xlabel="training compute (FLOP)", ylabel="half-width of optimal_bits (bits)")
    axes.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
