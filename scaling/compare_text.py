"""`bitlaw compare` beyond the table of laws side by side: errors on left-out splits, and the guard of the held-out rows."""
from __future__ import annotations

import hashlib
import math
from pathlib import Path

from rich.table import Table

from scaling.compare import Comparison
from scaling.files import check_target, locked
from scaling.held_out import LeftOut, Pooled, pool
from scaling.observations import observe
from scaling.thresholdout import SPENT, Thresholdout, guarded, load_guard


def left_out_table(scores: tuple[LeftOut, ...], unit: str) -> Table:
    """`unit`: of the loss. A row per law and split; the levels of an each-split follow their pooled row."""
    made = Table(title="errors of ln loss on rows left out of the fit", title_justify="left")
    for name, justify in (("split", "left"), ("left out", "left"), ("law", "left"), ("fitted", "right"), ("rows", "right"), ("rms", "right"),
                          ("bias", "right"), ("worst", "right"), (f"rms, {unit}", "right")):
        made.add_column(name, justify=justify, overflow="fold")
    pooled = pool(scores)
    for split in dict.fromkeys(one.name for one in pooled):
        levels = list(dict.fromkeys(one.split.level for one in scores if one.split.name == split))
        if len(levels) > 1:
            for one in pooled:
                if one.name == split:
                    made.add_row(split, f"all {len(levels)} in turn", one.label, "", f"{one.rows}", *_errors(one),
                                 style="bold" if not one.unscored else None)
        for level in levels:
            for one in scores:
                if one.split.name == split and one.split.level == level:
                    cells = _errors(one) if not one.why else ("none", "", "", "")
                    made.add_row(split, level, one.label, f"{one.fitted or ''}", f"{one.rows or ''}", *cells)
        made.add_section()
    return made


def reasons(scores: tuple[LeftOut, ...]) -> list[str]:
    """Why a law has no score on a split, one line per law and reason."""
    found: dict[tuple[str, str], list[str]] = {}
    for one in scores:
        if one.why:
            found.setdefault((one.label, one.why), []).append(one.split.level)
    return [f"{label}: no score where {', '.join(levels)}: {why}" for (label, why), levels in found.items()]


def _errors(one: LeftOut | Pooled) -> tuple[str, ...]:
    numbers = ((one.rmse, ".3%"), (one.bias, "+.3%"), (one.worst, "+.3%"), (one.rmse_nats, ".4f"))
    return tuple("none" if math.isnan(value) else format(value, spec) for value, spec in numbers)


def with_guard(comparison: Comparison, arguments) -> tuple[Comparison, list[str]]:
    """The comparison as the guard of --guard lets it be seen, and what it says. The file is read, or made, and written back."""
    if not arguments.holdout:
        raise ValueError("guard: no rows are held out; name them with --holdout")
    path, mark = Path(arguments.guard), held_out_mark(comparison, arguments)
    asked = {name: getattr(arguments, f"guard_{name}") for name in ("threshold", "scale", "budget")}
    given = {name: value for name, value in asked.items() if value is not None}
    with locked(path):  # reading, asking and writing are one step: two comparisons at once must not spend the same answer twice
        guard = load_guard(path) if path.exists() else Thresholdout(**given, seed=arguments.seed, held_out=mark)
        _refuse_guard(guard, path, mark, given)
        seen = guarded(comparison, guard.ask)
        guard.save(path)
    lines = [f"guard: {fitted.label}: held-out error from the {fitted.metrics['held_out']['source']} rows" if
             fitted.metrics["held_out"]["source"] in ("training", "held-out") else f"guard: {fitted.label}: {fitted.metrics['held_out']['source']}"
             for fitted in seen.fits]
    left = guard.budget - guard.spent
    lines.append(f"guard: {path}: {guard.asked} questions so far, {left} of {guard.budget} answers left (threshold {guard.threshold:g}, noise "
                 f"{guard.scale:g})" + ("; these rows have been used up, hold out others" if not left else ""))
    return seen, lines


def _refuse_guard(guard: Thresholdout, path: Path, mark: str, given: dict) -> None:
    """ValueError when the guard is of other rows or has other settings."""
    if guard.held_out != mark:
        raise ValueError(f"guard {path}: belongs to other held-out rows; a new held-out set needs a new file")
    for name, value in given.items():
        if getattr(guard, name) != value:
            raise ValueError(f"--guard-{name} {value:g}: {path} was started with {getattr(guard, name):g}; it cannot change while its rows "
                             "are in use")


def check_guard(arguments) -> None:
    """Refuses before any fit what would fail after it."""
    if arguments.guard:
        check_target(arguments.guard)
        if not arguments.holdout:
            raise ValueError("guard: no rows are held out; name them with --holdout")
        if Path(arguments.guard).exists() and (guard := load_guard(arguments.guard)).spent >= guard.budget:
            raise ValueError(f"guard {arguments.guard}: {SPENT}: all {guard.budget} answers after {guard.asked} questions; hold out other rows, "
                             "with a new file")


def held_out_mark(comparison: Comparison, arguments) -> str:
    """A digest of the held-out losses: the same rows give the same mark, whichever way they were selected."""
    law = comparison.fits[0].law
    columns = {name: sql for name, sql in arguments.columns.items() if name in (*law.inputs, "loss")}
    observed = observe(arguments.table, law, columns, arguments.where, arguments.holdout)
    losses = sorted(observed.loss[observed.held].tolist())
    return hashlib.sha256(repr(losses).encode()).hexdigest()
