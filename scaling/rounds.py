"""The loop of `bitlaw answer`: fit what there is, ask whether that settles the question, train what would, and again.

What trains is a `Trainer`, given by whoever calls: bitlaw's own sweeps, or a law with noise in the tests. Nothing here knows which.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from scaling.analysis import CHINCHILLA, PRECISION
from scaling.answer import SPARE, Cell, Question, Verdict, first, propose, spread_out, total_cost, verdict
from scaling.compare import compare
from scaling.fit import fit
from scaling.laws import Law, resolve
from scaling.observations import Observations
from scaling.pose import pose
from scaling.result import Fit
from scaling.table import Source


class Trainer(Protocol):
    """What can be trained, and what was. Costs and budgets are in one unit, seconds as a rule."""

    def cells(self) -> list[Cell]:
        """The runs that are still to be had, with what they are expected to cost."""

    def table(self) -> tuple[Source | None, list[Mapping]]:
        """The run table of what was trained (None when nothing was), and the columns of these runs."""

    def train(self, cells: list[Cell]) -> bool:
        """Trains them. False when it was told to stop before all were over."""

    def spent(self) -> float:
        """Of the budget, so far."""


@dataclass(frozen=True)
class Round:
    """One look. number: from 1; runs: trained so far; spent: of the budget; verdict: None where no law could be fitted, `why` says why."""

    number: int
    runs: int
    spent: float
    verdict: Verdict | None
    why: str

    def __str__(self) -> str:
        return str(self.verdict) if self.verdict else f"no fit yet ({self.why})"


@dataclass(frozen=True)
class Answer:
    """settled: whether the last round answers the question; rounds: all of them; ended: why it stopped."""

    settled: bool
    rounds: tuple[Round, ...]
    ended: str

    @property
    def verdict(self) -> Verdict | None:
        return self.rounds[-1].verdict if self.rounds else None


def candidates(law: str | Law | None, cells: Sequence[Mapping]) -> tuple[str | Law, ...]:
    """The laws to choose among: the one given, or those of `scaling.analyse`: the precision law where widths vary, else Chinchilla."""
    if law is not None:
        return (law,)
    return PRECISION if len({(c.get("weights_bits"), c.get("activations_bits")) for c in cells}) > 1 else CHINCHILLA


def constants_of(laws: Sequence[str | Law], cells: Sequence[Mapping]) -> int:
    """Free constants of the simplest of `laws` on a design of all `cells`. ValueError, one line, when not even that design can carry it."""
    counts, refusal = [], None
    for spec in laws:
        law, ties, fixed, _ = resolve(spec)
        missing = next((name for name in law.inputs if name not in law.optional and name not in cells[0]), None)
        if missing:
            raise ValueError(f"law {law.name} needs {missing}, which no run of this sweep has; it has {', '.join(cells[0])}")
        columns = {name: np.array([cell[name] for cell in cells]) for name in law.inputs if name in cells[0]}
        blank = {operand.input: np.full(len(cells), operand.untouched) for operand in law.operands if operand.input not in columns}
        made_up = np.linspace(2.0, 3.0, len(cells))  # only the design matters here
        try:
            problem, _ = pose(law, Observations(columns | blank, made_up, np.zeros(len(cells), dtype=bool), {}, {}), ties, fixed)
            counts.append(len(problem.free))
        except ValueError as error:
            refusal = refusal or error
    if not counts:
        raise ValueError(f"this sweep cannot answer: {refusal}")
    return min(counts)


def rounds(question: Question, trainer: Trainer, laws: Sequence[str | Law], budget: float, *, loss: str = "least_squares", bootstrap: int = 0,
           tell: Callable[[Round], None] = lambda _: None) -> Answer:
    """Looks and trains until the question is settled or the budget cannot settle it. budget: in the unit of the cells' costs. loss: of
    the fits; coverage at the stop was measured for least squares (docs/answer.md). tell: called after every look."""
    looks, going = [], True
    while True:
        source, there = trainer.table()
        fitted, why = fit_of(source, laws, loss, bootstrap)
        said = None
        if fitted:
            try:
                said = verdict(fitted, question)
            except ValueError as error:  # a design that identifies nothing yet
                fitted, why = None, str(error)
        looks.append(Round(len(looks) + 1, len(there), trainer.spent(), said, why))
        tell(looks[-1])
        if said and said.narrow:
            return Answer(True, tuple(looks), "settled")
        if not going:
            return Answer(False, tuple(looks), "the training was stopped, by its budget or a signal; the same command goes on")
        batch, ended = _next(question, trainer, laws, fitted, there, budget)
        if not batch:
            return Answer(False, tuple(looks), ended)
        going = trainer.train(batch)


def _next(question: Question, trainer: Trainer, laws, fitted: Fit | None, there: list[Mapping], budget: float) -> tuple[list[Cell], str]:
    """The runs of the next round, or none and why."""
    cells, left = trainer.cells(), budget - trainer.spent()
    if not cells:
        return [], "every run of the sweep is trained"
    if left <= 0:
        return [], "the budget is spent"
    if fitted:
        batch = propose(fitted, question, cells, there, left)
    else:
        wanted = constants_of(laws, [*(cell.columns for cell in cells), *there]) + SPARE
        affordable = [cell for cell in cells if total_cost([cell]) <= left]
        batch = first(cells, wanted, left) if not there else spread_out(affordable, there, max(wanted - len(there), 2))
        while total_cost(batch) > left:
            batch.pop()
    return batch, "" if batch else f"what is left of the budget, {left:.3g}, pays for none of the next runs"


def fit_of(source: Source | None, laws: Sequence[str | Law], loss: str = "least_squares", bootstrap: int = 0) -> tuple[Fit | None, str]:
    """(the fit of the law that `compare` chooses, ""), or (None, why there is none)."""
    if source is None:
        return None, "no run yet"
    try:
        best = compare(source, laws, loss=loss).best
        if best.metrics["dof"] < 1:
            return None, f"{best.metrics['rows']} runs leave nothing over for the {len(best.free)} constants of {best.label}"
        by_name = {spec if isinstance(spec, str) else spec.name: spec for spec in laws}
        return (fit(source, by_name.get(best.label, best.label), loss=loss, bootstrap=bootstrap) if bootstrap else best), ""
    except ValueError as error:
        return None, str(error)
