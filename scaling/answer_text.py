"""`bitlaw answer`: its arguments, its lines on the terminal, and the sweep as the rounds see it."""
from __future__ import annotations

import argparse
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from scaling.analysis import CHINCHILLA, PRECISION
from scaling.answer import Cell, Question, check_quantity, unit
from scaling.arguments import Parser, assignments, numbers
from scaling.laws import Law, resolve
from scaling.observations import DEFAULT_COLUMNS, LOGARITHMS
from scaling.reach import refuse_far
from scaling.rounds import Answer, Round, candidates, constants_of, rounds
from scaling.table import table

OVER = ("done", "diverged", "failed")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Arguments, checked as far as no sweep is needed; `question` and `laws` (None: by the sweep's axes) among them. ValueError, one line."""
    p = Parser(prog="bitlaw answer", description="Trains those runs of a sweep that settle a question, and no more.\nExit code 1 when the budget "
               "cannot settle it.", formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("quantity", metavar="QUANTITY", help="a constant or functional of the law, or loss: optimal_bits, alpha, optimal_params, ...")
    p.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="the sweep, as `bitlaw sweep` takes it: sweep=NAME, axes; its runs "
                   "are the candidates")
    p.add_argument("--at", type=assignments, default={}, metavar="compute=1e15,...", help="what the quantity depends on")
    p.add_argument("--until", required=True, metavar="H", help="half-width of the interval to reach, in the unit of the quantity; 5%% is "
                   "a share of its value")
    p.add_argument("--budget", required=True, metavar="TIME", help="seconds of this launch, as 540s, 9m, 1.5h")
    p.add_argument("--law", metavar="NAME", help="chinchilla, kumar:tied, ... (default: the best of those that the report tries, anew every round)")
    p.add_argument("--bootstrap", type=int, default=0, metavar="K", help="cell resamples of every fit (default 0: linearised intervals)")
    p.add_argument("--config-dir", metavar="DIR", help="a folder laid out like configs/")
    asked = p.parse_intermixed_args(list(argv))
    asked.question = Question(asked.quantity, numbers(asked.at, "--at"), *_until(asked.until))
    if asked.bootstrap < 0:
        raise ValueError(f"--bootstrap {asked.bootstrap}: need 0 or more")
    laws = [resolve(asked.law)[0]] if asked.law else [resolve(spec)[0] for spec in (PRECISION[0], CHINCHILLA[0])]
    check_quantity(asked.question, laws)
    return asked


def _until(text: str) -> tuple[float, bool]:
    """"0.3" -> (0.3, False), "5%" -> (0.05, True). ValueError for what is no positive number."""
    match = re.fullmatch(r"([^%]+)(%?)", text)
    try:
        value = float(match[1]) / (100.0 if match[2] else 1.0)
    except (TypeError, ValueError):
        value = math.nan
    if not 0 < value < math.inf:
        raise ValueError(f"--until {text}: need a positive number, the half-width in the unit of the quantity, or one with % for a share of it")
    return value, bool(match[2])


def inputs_of(row: Mapping, laws: Sequence[Law]) -> dict[str, float | str]:
    """What the laws take, from the columns of a run table that are known before a run; operands that it does not quantize are untouched."""
    found = {}
    for law in laws:
        operands, factors = {operand.input: operand for operand in law.operands}, {factor.input for factor in law.factors}
        for name in law.inputs:
            column = name if row.get(name) is not None else DEFAULT_COLUMNS.get(name, name)
            value = row.get(column)
            if value is None:
                if name in operands:
                    found[name] = float(operands[name].untouched)
            elif name in factors:
                found[name] = str(value)
            else:
                found[name] = (math.exp(value) if column in LOGARITHMS
                               else float(np.asarray(operands[name].numbers(value)) if name in operands else value))
    return found


class Sweep:
    """A `scaling.rounds.Trainer` over the candidates of a sweep (an object of the trainer's; nothing of it is imported here)."""

    def __init__(self, source, laws: Sequence[Law]):
        self.source, self.laws, self.failed = source, laws, []

    def cells(self) -> list[Cell]:
        return [Cell(run.run_id, inputs_of(run.row, self.laws), run.seconds, run.program, run.compile_seconds)
                for run in self.source.all() if run.status not in OVER]

    def table(self):
        over = [run for run in self.source.all() if run.status in ("done", "diverged")]
        if not any(run.status == "done" for run in over):
            return None, [inputs_of(run.row, self.laws) for run in over]
        ids = ", ".join(f"'{run.run_id}'" for run in over)  # of this sweep alone: its folder may hold others
        done = table(self.source.root).filter(f"run_id IN ({ids}) AND (loss IS NULL OR isfinite(loss))")
        return done, [inputs_of(run.row, self.laws) for run in over]

    def train(self, cells: list[Cell]) -> bool:
        whole, failures = self.source.train([cell.key for cell in cells])
        for line in failures:
            print(line)
        return whole

    def spent(self) -> float:
        return self.source.spent()


def run(asked: argparse.Namespace, source, budget: float) -> int:
    """The rounds, a line each, and the sentence at the end. Exit code 1 when the question is not settled. source: see `Sweep`; budget: seconds."""
    laws = _laws(asked, source)
    resolved = [resolve(spec)[0] for spec in laws]
    question, remark = check_quantity(asked.question, resolved)
    sweep = Sweep(source, resolved)
    cells = [inputs_of(run.row, resolved) for run in source.all()]
    constants_of(laws, cells)
    if question.quantity == "loss":
        spans = {name: (min(cell[name] for cell in cells), max(cell[name] for cell in cells)) for name in resolved[0].measures}
        refuse_far(spans, {name: np.asarray(question.at[name]) for name in spans}, "answer")
    told = unit(question, resolved[0])
    print(f"{question.quantity}{''.join(f' {k}={v:g}' for k, v in question.at.items())}: {len(cells)} candidate runs in {source.root}; "
          f"half-width to reach {asked.until}{'' if question.relative else f' {told}' if told else ' (in its own unit)'}")
    if remark:
        print(f"note: {remark}")
    if not source.measured():
        print("note: nothing was trained on this kind of device before: runs are ranked by FLOP, not by measured seconds, until some are")
    answer = rounds(question, sweep, laws, budget, bootstrap=asked.bootstrap, tell=lambda one: print(line(one, told), flush=True))
    print(sentence(answer, question, told))
    return 0 if answer.settled else 1


def _laws(asked: argparse.Namespace, source) -> tuple:
    """The specs to choose among. ValueError when the quantity belongs to a law of widths and the sweep has one width."""
    both = [resolve(spec)[0] for spec in (PRECISION[0], CHINCHILLA[0])]
    rows = [inputs_of(run.row, both) for run in source.all()]
    laws = candidates(asked.law, rows)
    if asked.law is None and laws == CHINCHILLA and asked.quantity not in ("loss", *both[1].names, *both[1].functionals):
        raise ValueError(f"{asked.quantity} needs several widths, and weights_bits is {rows[0]['weights_bits']:g} in every run of this sweep: "
                         "give the sweep an axis of them, such as precision.bits=3,4,6,32")
    return laws


def sentence(answer: Answer, question: Question, told: str) -> str:
    """The end in one sentence, with the interval there is."""
    last = answer.rounds[-1]
    name, measure = question.quantity, f" {told}" if told else ""
    if answer.settled:
        v = answer.verdict
        return (f"{name} is {v.value:.4g}{measure}, {v.level:.0%} interval {v.low:.4g} to {v.high:.4g} (half-width {v.half_width:.3g}, "
                f"below {v.limit:.3g}), from {last.runs} runs by {v.law}.")
    have = "there is no interval" if last.verdict is None else str(last.verdict) + ("" if last.verdict.reason else measure)
    return f"{name} is not settled: {answer.ended}; with {last.runs} runs {have}{f' ({last.why})' if last.verdict is None else ''}."


def line(one: Round, told: str) -> str:
    """A round as it is printed."""
    return f"round {one.number}: {one.runs} runs, {one.spent:.0f} s, {one}{f' {told}' if told and one.verdict and not one.verdict.reason else ''}"
