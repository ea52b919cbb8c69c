"""From the rows and a law to the problem that is solved: what is free, tied and held, and the refusal of designs that say nothing."""
from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from scaling.laws import Law
from scaling.laws.parameters import BASELINES
from scaling.observations import Observations
from scaling.problem import Problem

SMALL = 1000.0  # parameters or tokens: below, it is a unit
UNHEARD_OF = 1e12  # between two losses of one table: beyond, the sums of a fit lose all digits
LARGE_LOSS = 13.0  # nats per token: ln of 440,000, more than any vocabulary has


def pose(law: Law, observed: Observations, ties: Mapping[str, str], fixed: Mapping[str, float]) -> tuple[Problem, list[str]]:
    """The problem on the rows not held out, with what the columns cannot see of the law reduced away, and notes that say so."""
    columns, loss = observed.rows(~observed.held)
    law = law.at_levels({factor.input: tuple(np.unique(columns[factor.input]).tolist()) for factor in law.factors})
    _refuse_unseen_levels(law, observed)
    columns = law.complete(columns)
    fixed = {name: value for name, value in fixed.items() if name in law.names or not any(f.level(name) for f in law.factors)}
    fixed = _baselines(law, fixed) | fixed
    _refuse_constants(law, ties, fixed)
    reduction = law.reduce(columns)
    fixed = {name: float(value) for name, value in (dict(reduction.fixed) | dict(fixed)).items() if name not in reduction.absent}
    merged = {t: s for t, s in (dict(reduction.ties) | dict(ties)).items() if t not in reduction.absent and t not in fixed}
    merged = {tied: _end(merged, tied) for tied in merged}
    fixed |= {tied: fixed[source] for tied, source in merged.items() if source in fixed}
    merged = {tied: source for tied, source in merged.items() if tied not in fixed}
    free = tuple(name for name in law.names if name not in {*reduction.absent, *merged, *fixed})
    if not free:
        raise ValueError(f"law {law.name}: every constant is fixed, so that nothing is left to fit; fix fewer of {', '.join(fixed)}")
    copies = _copies(columns, loss)
    _refuse_design(law, columns, loss, copies, free, fixed)
    notes = [*reduction.notes, *_warnings(columns), *_warnings_of_copies(copies, loss.size), *_warnings_of_widths(law, reduction.absent),
             *_warnings_of_units(law, columns, loss)]
    return Problem(law, columns, np.log(loss), free, merged, fixed, observed.fitted_weights), notes


def _refuse_constants(law: Law, ties: Mapping[str, str], fixed: Mapping[str, float]) -> None:
    """ValueError for constants held where the law does not take them, and for ties that mean nothing."""
    for name, value in fixed.items():
        parameter = law.parameter(name)  # refuses unknown names
        if not parameter.takes(value):
            raise ValueError(f"fixed {name}={value:g}: law {law.name} takes for {name} {parameter.accepted}")
    for tied, source in ties.items():
        kinds = []
        for name in (tied, source):
            if name not in law.names:
                raise ValueError(f"ties: {tied}={source}: {name!r} is no constant of law {law.name}; it has {', '.join(law.names)}"
                                 + (f" (to hold {tied} at a number, fix it)" if name == source and _is_number(name) else ""))
            kinds.append(law.parameter(name).kind)
            if law.parameter(name).multiplies:
                raise ValueError(f"ties: {name} is an amplitude; amplitudes can be fixed, not tied")
        if _end(ties, tied) is None:
            raise ValueError(f"ties: {tied}={source} is a circle; tie {tied} to a constant that is not tied to it")
        if kinds[0] != kinds[1]:
            raise ValueError(f"ties: {tied}={source}: {tied} is an {kinds[0]} and {source} an {kinds[1]}; tie constants of one "
                             "kind".replace("an s", "a s"))


def _end(ties: Mapping[str, str], tied: str) -> str | None:
    """Where the chain a -> b -> c of ties ends; None for a circle."""
    seen = set()
    while tied in ties and tied not in seen:
        seen.add(tied)
        tied = ties[tied]
    return None if tied in seen else tied


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _baselines(law: Law, fixed: Mapping[str, float]) -> dict[str, float]:
    """{"effN[BF16]": 1.0}: for every factor, what the law holds, or the level that has a baseline's name, unless the caller fixes one.
    ValueError where the law has a baseline and these rows none."""
    found = {}
    for factor in law.factors:
        levels = law.levels[factor.input]
        if any(factor.level(name) for name in fixed):
            continue
        unknown = next((level for level in factor.held if level not in levels), None)
        if unknown is not None:
            raise ValueError(f"{factor.name(unknown)}={factor.held[unknown]:g}: no fitted row has {factor.input}={unknown}; levels are "
                             f"{', '.join(levels)}")
        found |= {factor.name(level): value for level, value in factor.held.items()}
        if factor.baseline is None:
            continue
        named = [level for level in levels if level.lower() in BASELINES]
        if len(named) != 1:
            raise ValueError(f"{factor.input}: {'several baselines' if named else 'no baseline'} among {', '.join(levels)}; say which level "
                             f"has efficiency 1: --fix \"{factor.name(levels[0])}=1\", or fixed={{\"{factor.name(levels[0])}\": 1}} in Python")
        found[factor.name(named[0])] = factor.baseline
    return found


def _refuse_unseen_levels(law: Law, observed: Observations) -> None:
    """ValueError when a held-out row has a level that no fitted row has: nothing could predict it."""
    for factor in law.factors:
        unseen = sorted(set(observed.columns[factor.input].tolist()) - set(law.levels[factor.input]))
        if unseen:
            raise ValueError(f"holdout: {factor.input}={unseen[0]} occurs only in held-out rows, so law {law.name} has no {factor.name(unseen[0])} "
                             "to predict it with; hold out other rows, or use a law of widths or errors (kumar, mse_efficiency)")


def _copies(columns: Mapping[str, np.ndarray], loss: np.ndarray) -> int:
    """How many rows have the inputs and the loss of another one, to the last digit."""
    return loss.size - np.unique(np.stack([*columns.values(), loss]), axis=1).shape[1]


def _warnings_of_copies(copies: int, rows: int) -> list[str]:
    return [f"{copies} of {rows} rows are copies of another (the same inputs and loss): if a run was logged twice, the intervals are too "
            "narrow, as if it "
            "had been trained twice; keep one of each with where row_number() OVER (PARTITION BY N, D, ..., loss) = 1"] if copies else []


def _warnings_of_units(law: Law, columns: Mapping[str, np.ndarray], loss: np.ndarray) -> list[str]:
    """Sizes in millions and perplexities fit as well as any; what is then predicted at N=1e9 is of another model."""
    notes = [f"{name} is {columns[name].min():.4g} to {columns[name].max():.4g}: counted in millions or billions? Laws, costs and "
             f"predictions take {unit} "
             f"(columns {name}=...*1e9)" for name, unit in (("N", "parameters"), ("D", "tokens")) if name in columns and columns[name].max() < SMALL]
    if law.unit == Law.unit and {"N", "D"} <= set(columns) and loss.max() > LARGE_LOSS:
        notes.append(f"loss is {loss.min():.4g} to {loss.max():.4g}, more than the logarithm of any vocabulary: a perplexity? Laws take "
                     "nats per token (columns loss=ln(...))")
    return notes


def _warnings_of_widths(law: Law, absent: tuple[str, ...]) -> list[str]:
    """A law of quantized operands on rows of which none is quantized."""
    if not law.operands or not all(set(operand.parameters) <= set(absent) for operand in law.operands):
        return []
    return [f"no row is quantized: {', '.join(operand.input for operand in law.operands)} are absent or unquantized in all, so that nothing "
            f"is said of {', '.join(absent)}"]


def _refuse_design(law: Law, columns: Mapping[str, np.ndarray], loss: np.ndarray, copies: int, free: tuple[str, ...], fixed: Mapping) -> None:
    """ValueError when no fit can follow from these columns: too few rows, or an input that never varies."""
    if loss.size - copies < len(free) + bool(copies):  # as many different rows as constants leave no residual; copies would count it as certainty
        rows = f"{loss.size} row{'s' * (loss.size > 1)}" if not copies else f"{loss.size} rows, of which {copies} are copies of another,"
        raise ValueError(f"{rows} cannot fit the {len(free)} free parameters of law {law.name} ({', '.join(free)})")
    operands = {operand.input: operand for operand in law.operands}
    efficiencies = {name for name in free if any(factor.level(name) for factor in law.factors)}
    for name, values in columns.items():
        operand = operands.get(name)
        neutral = operand is not None and (not operand.touched(values[0]) or set(operand.parameters) <= set(fixed))
        held = set(free) <= efficiencies  # a second stage: its one size or width says what the first stage left to say
        needed = name in law.measures or operand is not None  # what else a law takes may be constant: B of one block size
        if np.all(values == values[0]) and needed and not (neutral or held):
            others = [law_name for law_name in ("chinchilla",) if operand is not None and law_name != law.name]
            raise ValueError(f"{name} is {values[0]:g} in every fitted row, so law {law.name} cannot be fitted: vary it"
                             + (f", or fit {others[0]}" if others else ""))
    if not (1.0 / UNHEARD_OF < loss.min() and loss.max() < UNHEARD_OF * min(1.0, loss.min())):
        raise ValueError(f"loss is {loss.min():g} to {loss.max():g}: no law spans that; filter out what is no loss with where")
    if np.all(loss == loss[0]):
        raise ValueError(f"loss is {loss[0]:g} in every fitted row: nothing to fit")


def _warnings(columns: Mapping[str, np.ndarray]) -> list[str]:
    """Remarks on a design that fits but misleads."""
    if not {"N", "D"} <= set(columns):
        return []
    log_N, log_D = np.log(columns["N"]), np.log(columns["D"])
    correlation = float(np.corrcoef(log_N, log_D)[0, 1])
    notes = []
    if abs(correlation) > 0.95:
        notes.append(f"N and D move together (correlation of logs {correlation:.3f}): alpha and beta are confounded; cross sizes and budgets")
    levels = {name: int(np.unique(columns[name]).size) for name in ("N", "D")}
    notes += [f"{name} has only {count} levels: its exponent and E cannot be told apart" for name, count in levels.items() if count < 3]
    return notes
