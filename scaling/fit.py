"""`scaling.fit`: a table and a law in, a `Fit` out. It refuses what cannot be fitted and reports how far the rest can be trusted."""
from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from scaling.laws import Law, resolve
from scaling.observations import Observations, observe
from scaling.problem import Problem, constants
from scaling.result import MAX_CONDITION, Fit
from scaling.solve import Solution, solve
from scaling.statistics import mean_interval
from scaling.table import Source
from scaling.uncertainty import bootstrap as resample
from scaling.uncertainty import cell_index, discrepancy, spread

LOSSES = ("huber", "least_squares")


def fit(table: Source, law: str | Law, *, columns: Mapping[str, str] | None = None, where: str | None = None,
        holdout: str | None = None, bootstrap: int = 0, loss: str = "huber", delta: float = 1e-3,
        ties: Mapping[str, str] | None = None, fixed: Mapping[str, float] | None = None, seed: int = 0, level: float = 0.95,
        progress: Callable[[int, int], None] | None = None) -> Fit:
    """Fits `law` to the runs in `table` by minimising the sum of Huber losses of ln predicted - ln observed.

    table: run folder(s), .csv/.parquet/.json, DuckDB relation, or mapping of column to array. law: a name ("kumar"), a name with
    variants ("kumar:tied+plain"), or a Law. columns: input -> SQL expression over the table ({"N": "n_params"} is the default for run
    tables; a quoted name is a column). where, holdout: SQL; held-out rows are predicted, never fitted. bootstrap: number of cell
    resamples. loss: "huber" (with `delta`) or "least_squares". ties: {"beta": "alpha"} makes beta equal alpha; fixed: {"n_w": 0.0}.
    level: of the intervals. progress(done, total) is called during the bootstrap.

    Metrics: objective, gradient_norm, converged, starts, starts_agree, condition_number (of J'J in centred logs), rows, dof, dropped,
    residual_sd, rmse, bic, discrepancy, at_bound, held_out (rows, rmse, bias, worst; bias_nats with its 95 %
    interval, rmse_nats; covered: share in their prediction interval, half_width), notes, columns, where, holdout, loss, delta.
    Errors of ln loss are relative errors of the loss. ValueError, one line, for whatever cannot be fitted.
    """
    if loss not in LOSSES:
        raise ValueError(f"loss={loss!r}: unknown; use {' or '.join(LOSSES)}")
    if not delta > 0 or not 0 < level < 1 or bootstrap < 0:
        raise ValueError(f"delta={delta}, level={level}, bootstrap={bootstrap}: need delta > 0, 0 < level < 1, bootstrap >= 0")
    resolved, variant_ties, variant_fixed, label = resolve(law)
    observed = observe(table, resolved, columns, where, holdout)
    problem, notes = pose(resolved, observed, variant_ties | dict(ties or {}), variant_fixed | dict(fixed or {}))
    reach = float("inf") if loss == "least_squares" else delta
    solution = solve(problem, reach)
    return _assemble(problem, solution, observed, label, notes, level, bootstrap, seed, progress,
                     {"loss": loss, "delta": delta, "where": where, "holdout": holdout})


def pose(law: Law, observed: Observations, ties: Mapping[str, str], fixed: Mapping[str, float]) -> tuple[Problem, list[str]]:
    """The problem on the rows not held out, with what the columns cannot see of the law reduced away, and notes that say so."""
    columns, loss = observed.rows(~observed.held)
    for name in (*ties, *ties.values(), *fixed):
        law.parameter(name)  # refuses unknown names
    amplitudes = set(law.amplitudes) & {*ties, *ties.values()}
    if amplitudes:
        raise ValueError(f"ties: {sorted(amplitudes)[0]} is an amplitude; amplitudes can be fixed, not tied")
    reduction = law.reduce(columns)
    fixed = {name: float(value) for name, value in (dict(reduction.fixed) | dict(fixed)).items() if name not in reduction.absent}
    merged = {t: s for t, s in (dict(reduction.ties) | dict(ties)).items() if t not in reduction.absent and t not in fixed}
    merged = {tied: merged.get(source, source) for tied, source in merged.items()}  # one link of a chain is enough: a -> b -> c
    fixed |= {tied: fixed[source] for tied, source in merged.items() if source in fixed}
    merged = {tied: source for tied, source in merged.items() if tied not in fixed}
    free = tuple(name for name in law.names if name not in {*reduction.absent, *merged, *fixed})
    _refuse_design(law, columns, loss, free, fixed)
    notes = list(reduction.notes) + _warnings(columns)
    return Problem(law, columns, np.log(loss), free, merged, fixed), notes


def _refuse_design(law: Law, columns: Mapping[str, np.ndarray], loss: np.ndarray, free: tuple[str, ...], fixed: Mapping) -> None:
    """ValueError when no fit can follow from these columns: too few rows, or an input that never varies."""
    rows = "row" if loss.size == 1 else "rows"
    if loss.size < len(free):
        raise ValueError(f"{loss.size} {rows} cannot fit the {len(free)} free parameters of law {law.name} ({', '.join(free)})")
    operands = {operand.input: operand for operand in law.operands}
    for name, values in columns.items():
        operand = operands.get(name)
        neutral = operand is not None and (values[0] >= operand.neutral or set(operand.parameters) <= set(fixed))
        if np.all(values == values[0]) and not neutral:
            others = [law_name for law_name in ("chinchilla",) if operand is not None and law_name != law.name]
            raise ValueError(f"{name} is {values[0]:g} in every fitted row, so law {law.name} cannot be fitted: vary it"
                             + (f", or fit {others[0]}" if others else ""))
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


def _assemble(problem: Problem, solution: Solution, observed: Observations, label: str, notes: list[str], level: float, num_draws: int,
              seed: int, progress, asked: dict) -> Fit:
    """The solved problem with its uncertainty, held-out score and metrics, as a Fit."""
    delta = float("inf") if asked["loss"] == "least_squares" else asked["delta"]
    law = problem.law
    required = tuple(n for n in law.inputs if n not in {operand.input for operand in law.operands})
    around = spread(problem, solution.z, delta)
    coordinates = problem.plain(solution.z[None])[0]
    draws = np.zeros((0, len(problem.free)))
    if num_draws:
        draws = resample(problem, solution.z, cell_index(problem.columns, required), delta, num_draws, seed, progress)
    residuals = problem.residuals(solution.z[None])[0]
    rows = residuals.size
    mean_square = float(np.mean(residuals**2))
    metrics = {
        "objective": solution.objective, "gradient_norm": solution.gradient, "converged": solution.converged, "starts": solution.starts,
        "starts_agree": solution.agree, "condition_number": around.condition, "rows": rows, "dof": around.dof,
        "dropped": observed.dropped, "residual_sd": around.residual_sd, "rmse": mean_square**0.5,
        "bic": float(rows * np.log(max(mean_square, 1e-300)) + len(problem.free) * np.log(rows)),
        "discrepancy": discrepancy(problem, solution.z, delta, required, around.condition), "at_bound": list(around.at_bound), "held_out": None,
        "notes": notes, "columns": observed.mapping, "bootstrap": num_draws, **asked,
    }
    params = constants(law, problem.free, problem.ties, problem.fixed, coordinates)
    ranges = _ranges(law, problem.columns, required)
    bare = Fit(law, label, params, {}, metrics, level, problem.free, problem.ties, problem.fixed, coordinates, around.scatter, draws, ranges)
    metrics = _with_held_out(bare, observed)
    estimates = {name: bare.estimate(name) for name in params if name not in problem.fixed}
    intervals = {name: (e.low, e.high) for name, e in estimates.items()}
    return Fit(law, label, params, intervals, metrics, level, problem.free, problem.ties, problem.fixed, coordinates, around.scatter, draws,
               ranges)


def _ranges(law: Law, columns: Mapping[str, np.ndarray], required: tuple[str, ...]) -> dict[str, tuple[float, float]]:
    """Fitted (low, high) of every input and of the product of the required ones; operands count up to their neutral width."""
    neutral = {operand.input: operand.neutral for operand in law.operands}
    seen = {name: np.minimum(values, neutral.get(name, np.inf)) for name, values in columns.items()}
    seen["*".join(required)] = np.prod([columns[name] for name in required], axis=0)
    return {name: (float(values.min()), float(values.max())) for name, values in seen.items()}


def _with_held_out(fitted: Fit, observed: Observations) -> dict:
    """Metrics with the score on the held-out rows, whose intervals use nothing but the fitted rows; their excess error then widens
    the discrepancy that later predictions use."""
    metrics = dict(fitted.metrics)
    if not observed.held.any():
        return metrics
    columns, loss = observed.rows(observed.held)
    predicted = fitted.law.predict(fitted.params, **columns)
    errors = np.log(predicted) - np.log(loss)
    score = {"rows": int(loss.size), "rmse": float(np.sqrt(np.mean(errors**2))), "bias": float(np.mean(errors)),
             "worst": float(errors[np.argmax(np.abs(errors))]), "rmse_nats": float(np.sqrt(np.mean((predicted - loss) ** 2))),
             **dict(zip(("bias_nats", "bias_low", "bias_high"), mean_interval(predicted - loss), strict=True)),
             "covered": None, "half_width": None}
    if fitted.metrics["condition_number"] <= MAX_CONDITION:
        interval = fitted.predict(**columns)
        score["covered"] = float(np.mean((interval.low <= loss) & (loss <= interval.high)))
        score["half_width"] = float(np.median(0.5 * (interval.high - interval.low)))
        mean_variance = (np.log(interval.mean_high / interval.loss) / fitted.quantile) ** 2
        excess = float(np.mean(errors**2) - np.mean(mean_variance) - fitted.metrics["residual_sd"] ** 2)
        metrics["discrepancy"] = max(metrics["discrepancy"], max(excess, 0.0) ** 0.5)
    return metrics | {"held_out": score}
