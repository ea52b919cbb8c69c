"""`scaling.fit`: a table and a law in, a `Fit` out. It refuses what cannot be fitted and reports how far the rest can be trusted."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real

import numpy as np

from scaling.laws import Law, resolve
from scaling.observations import Observations, observe
from scaling.pose import pose
from scaling.priors import with_priors
from scaling.problem import Problem, constants
from scaling.result import MAX_CONDITION, Fit
from scaling.ridges import confounded, ridges, undetermined
from scaling.solve import Solution, solve
from scaling.statistics import mean_interval
from scaling.table import Source
from scaling.uncertainty import bootstrap as resample
from scaling.uncertainty import cell_index, discrepancy, spread

LOSSES = ("huber", "least_squares", "lad")
LAD_DELTA = 1e-6  # of the Huber loss that stands for least absolute deviations: residuals are a thousand times larger


def fit(table: Source, law: str | Law, *, columns: Mapping[str, str] | None = None, where: str | None = None,
        holdout: str | None = None, bootstrap: int = 0, loss: str = "huber", delta: float = 1e-3,
        ties: Mapping[str, str] | None = None, fixed: Mapping[str, float] | None = None, seed: int = 0, level: float = 0.95,
        base: str | None = None, priors: Mapping[str, tuple[float, float]] | None = None, weights: str | None = None,
        progress: Callable[[int, int], None] | None = None) -> Fit:
    """Fits `law` to the runs in `table` by minimising the sum of Huber losses of ln predicted - ln observed.

    table: run folder(s), .csv/.parquet/.json, DuckDB relation, or mapping of column to array. law: a name ("kumar"), a name with
    variants ("kumar:tied+plain"), or a Law. columns: input -> SQL expression over the table ({"N": "n_params"} is the default for run
    tables; a quoted name is a column). where, holdout: SQL; held-out rows are predicted, never fitted. bootstrap: number of cell
    resamples. loss: "huber" (with `delta`), "least_squares" or "lad" (least absolute deviations: Huber with delta 1e-6). ties:
    {"beta": "alpha"} makes beta equal alpha; fixed: {"n_w": 0.0}, or another fit's params. base: SQL; all constants that these rows
    determine are fitted on them alone and then held (Quartet's two stages). priors: {"alpha": (0.35, 0.05)}, mean and standard
    deviation of a Gaussian on an exponent or offset, for E and scales (value, relative deviation) of a log-normal. weights: SQL, how
    much a row counts. level: of the intervals. progress(done, total) is called during the bootstrap.
    Levels of a factor: 1 for the one called baseline, bf16, fp32, ... or for the one in fixed: {"effN[FP8]": 1}.

    Metrics: objective, gradient_norm, converged, starts, starts_agree, condition_number (of J'J in centred logs), rows, dof, dropped,
    residual_sd, rmse, bic, discrepancy, at_bound, ridges (directions that the design leaves open by more than 50 %), confounded (pairs
    of constants with correlation over 0.95), undetermined (constants in which starts of one objective end apart), held_out (rows, rmse, bias, worst; bias_nats with its 95 %
    interval, rmse_nats; covered: share in their prediction interval, half_width), notes, columns, where, holdout, loss, delta.
    Errors of ln loss are relative errors of the loss. ValueError, one line, for whatever cannot be fitted.
    """
    if not isinstance(law, (str, Law)):
        raise ValueError(f"law={law!r}: give the name of a law, a formula, or a Law")
    if loss not in LOSSES:
        raise ValueError(f"loss={loss!r}: unknown; use huber, least_squares or lad")
    _refuse_options({"columns": columns, "ties": ties, "fixed": fixed, "priors": priors}, {"where": where, "holdout": holdout, "base": base, "weights": weights},
                    {"bootstrap": bootstrap, "seed": seed})
    if not _positive(delta) or not (_positive(level) and level < 1):
        raise ValueError(f"delta={delta!r}: need a positive number" if not _positive(delta) else f"level={level!r}: need a share between 0 and 1, such as 0.95")
    resolved, variant_ties, variant_fixed, label = resolve(law, tuple(columns or ()))
    ties, fixed, notes = variant_ties | dict(ties or {}), variant_fixed | dict(fixed or {}), []
    if base:
        try:
            first = fit(table, resolved, columns=columns, where=f"({where}) AND ({base})" if where else base, loss=loss, delta=delta,
                        ties=ties, fixed=fixed, priors=priors, weights=weights)
        except ValueError as error:
            raise ValueError(f"base={base!r}: {error}") from None
        if not first.converged:
            raise ValueError(f"base={base!r}: the fit of these {first.metrics['rows']} rows did not converge, so nothing can be held at it")
        fixed, priors = dict(first.params) | fixed, None
        notes = [f"{', '.join(first.free)} are held at their fit to the {first.metrics['rows']} rows where {base}"]
    observed = observe(table, resolved, columns, where, holdout, weights)
    problem, more = pose(resolved, observed, ties, fixed)
    reach = {"huber": delta, "least_squares": float("inf"), "lad": LAD_DELTA}[loss]
    problem, solution = with_priors(problem, reach, priors) if priors else (problem, solve(problem, reach))
    if solution.agree == 1:
        more.append(f"only one of {solution.starts} starts ended at this optimum: a lower one may exist")
    return _assemble(problem, solution, observed, label, notes + more, level, bootstrap, seed, progress,
                     {"loss": loss, "delta": reach, "where": where, "holdout": holdout, "base": base, "weights": weights,
                      "priors": {name: list(pair) for name, pair in (priors or {}).items()}})


def _refuse_options(mappings: dict, conditions: dict, counts: dict) -> None:
    """ValueError, one line, for an option of another kind than its name says."""
    for name, value in mappings.items():
        if value is not None and not isinstance(value, Mapping):
            raise ValueError(f"{name}={value!r}: need a mapping of name to value")
    for name, pair in (mappings["priors"] or {}).items():
        if not isinstance(pair, Sequence) or len(pair) != 2:
            raise ValueError(f"priors {name}={pair!r}: need (value, deviation)")
    for name, value in conditions.items():
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{name}={value!r}: need a condition in SQL, as text")
    for name, value in counts.items():
        if not isinstance(value, Integral) or value < 0:
            raise ValueError(f"{name}={value!r}: need a whole number of at least 0")


def _positive(value) -> bool:
    return isinstance(value, Real) and value > 0


def _assemble(problem: Problem, solution: Solution, observed: Observations, label: str, notes: list[str], level: float, num_draws: int,
              seed: int, progress, asked: dict) -> Fit:
    """The solved problem with its uncertainty, held-out score and metrics, as a Fit."""
    law, delta, required = problem.law, asked["delta"], problem.law.measures
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
        "notes": notes, "ridges": ridges(law, problem.free, coordinates, around.scatter),
        "undetermined": undetermined(law, problem.free, problem.plain(solution.ends)),
        "confounded": confounded(problem.free, around.scatter), "columns": observed.mapping, "bootstrap": num_draws, **asked,
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
    operands = {operand.input: operand for operand in law.operands}
    factors = {factor.input for factor in law.factors}
    seen = {name: operands[name].clip(values) if name in operands else values for name, values in columns.items() if name not in factors}
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
        interval = fitted.predict(**columns, extrapolate=True)
        score["covered"] = float(np.mean((interval.low <= loss) & (loss <= interval.high)))
        score["half_width"] = float(np.median(0.5 * (interval.high - interval.low)))
        beyond = float(np.mean(np.log(interval.extrapolated)))
        if beyond > 0.0:  # a rate per e-fold, as `discrepancy` has it; rows inside the data tell nothing of it
            rate = float(np.mean(errors**2) - fitted.metrics["residual_sd"] ** 2) / beyond
            metrics["discrepancy"] = max(metrics["discrepancy"], max(rate, 0.0) ** 0.5)
    return metrics | {"held_out": score}
