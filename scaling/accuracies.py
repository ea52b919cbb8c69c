"""Accuracies in a table: counts of right answers, or the answers themselves, with the intervals of `scaling.proportions`."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scaling.proportions import Paired, Proportion, paired, proportion
from scaling.statistics import columns_of

COLUMNS = {"correct": "DOUBLE", "questions": "DOUBLE", "question": "VARCHAR", "model": "VARCHAR"}
"""Columns that no record has: give them, or name them by --columns. correct and questions: a row is a run; correct (0 or 1) and question: a row is
an answer. model: who answered; without it the precision, without that the run."""


@dataclass(frozen=True)
class Accuracy:
    """One model. against: the reference, on the questions that both answered (`shared` of them); None without answers, and for
    the reference itself."""

    model: str
    correct: int
    questions: int
    share: Proportion
    against: Paired | None = None
    shared: int = 0


def carries(columns: Sequence[str]) -> bool:
    """Whether a table has accuracies."""
    return "correct" in columns and ("questions" in columns or "question" in columns)


def accuracies(relation, reference: str | None = None, level: float = 0.95) -> list[Accuracy]:
    """Every model of the table, in its order. reference: the model that the others are paired with, left out the first. ValueError when one
    answered a question twice, an answer is neither 0 nor 1, counts are none, or the reference is not there."""
    columns = columns_of(relation)
    names = next((columns[name] for name in ("model", "precision", "run_id") if name in columns and any(columns[name])), range(len(relation)))
    names = [str(name) for name in names]
    if "question" not in columns:
        rows = zip(names, columns["correct"], columns["questions"], strict=True)
        counts = [(name, *_counts(name, c, n)) for name, c, n in rows if c is not None and n is not None]
        return [Accuracy(name, c, n, proportion(c, n, level)) for name, c, n in counts]
    answers: dict[str, dict[str, int]] = {}
    for name, question, right in zip(names, columns["question"], columns["correct"], strict=True):
        if right is None or question is None:
            continue
        if right not in (0, 1):
            raise ValueError(f"correct={right}: the answer of {name} to question {question} must be 0 or 1")
        if str(question) in answers.setdefault(name, {}):
            raise ValueError(f"{name} answered question {question} twice: say who answered by --columns model=SQL, or choose rows by --where")
        answers[name][str(question)] = int(right)
    if reference is not None and reference not in answers:
        raise ValueError(f"--reference {reference}: no model of this table; it has {', '.join(answers)}")
    base = answers.get(reference or next(iter(answers), ""), {})
    found = []
    for name, own in answers.items():
        both = [question for question in own if question in base]
        pair = paired([own[q] for q in both], [base[q] for q in both], level) if own is not base and both else None
        found.append(Accuracy(name, sum(own.values()), len(own), proportion(sum(own.values()), len(own), level), pair, len(both)))
    return found


def _counts(model: str, correct: object, questions: object) -> tuple[int, int]:
    """Both as whole numbers. ValueError for a share or a truth value, which a count would silently round to 0 or 1, and for more right
    answers than questions."""
    for name, value in (("correct", correct), ("questions", questions)):
        if isinstance(value, bool) or not _whole(value):
            raise ValueError(f"{name}={value}, of {model}: beside a column questions both are counts: give whole numbers of answers, 83 of 100")
    if not 0 <= float(correct) <= float(questions) or float(questions) < 1:
        raise ValueError(f"correct={int(float(correct))}, questions={int(float(questions))}, of {model}: need at least one question, and no more right "
                         "answers than questions")
    return int(float(correct)), int(float(questions))


def _whole(value: object) -> bool:
    try:
        return float(value).is_integer()
    except (TypeError, ValueError):
        return False
