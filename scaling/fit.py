"""`scaling.fit`: a table and a law in, a `Fit` out. It refuses what cannot be fitted and reports how far the rest can be trusted."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from numbers import Integral, Real

import numpy as np

from scaling.laws import Law
from scaling.observations import Observations
from scaling.problem import constants
from scaling.result import MAX_CONDITION, Fit
from scaling.ridges import confounded, ridges, undetermined
from scaling.solved import Solved, errors_of, solved
from scaling.stages import Joined, Stage, after, joined
from scaling.statistics import mean_interval
from scaling.table import Source
from scaling.uncertainty import bootstrap as resample
from scaling.uncertainty import Spread, cell_index, discrepancy, spread


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
    determine are fitted on them alone and then held (Quartet's two stages; intervals hold the uncertainty of both). priors:
    {"alpha": (0.35, 0.05)}, mean and standard deviation of a Gaussian on an exponent or offset, for E and scales (value, relative
    deviation) of a log-normal. weights: SQL, how much a row counts beside the others (1/variance, the number of seeds behind a
    mean): only the ratios matter, they are scaled to a mean of 1. level: of the intervals. progress(done, total) is called during
    the bootstrap. Levels of a factor: 1 for the one called baseline, bf16, fp32, ... or for the one in fixed: {"effN[FP8]": 1}.

    Metrics: objective, gradient_norm, converged, starts, starts_agree, condition_number (of J'J in centred logs), rows, dof, dropped,
    residual_sd (of a row of weight 1), rmse, bic (rows ln rmse^2 + free constants ln rows), discrepancy, at_bound, ridges (directions
    that the design leaves open by more than 50 %), confounded (pairs of constants with correlation over 0.95), constant_terms (amplitudes
    of terms that no input moves), undetermined (constants in which starts of one objective end apart), held_out (rows, rmse, bias, worst;
    bias_nats with its 95 % interval, rmse_nats; covered: share in their prediction interval, half_width), notes, columns, where, holdout,
    loss, delta, prior_weight (of priors beside the rows: `scaling.priors`). Errors of ln loss are relative errors of the loss. ValueError, one
    line, for whatever cannot be fitted.
    """
    _refuse_options({"columns": columns, "ties": ties, "fixed": fixed, "priors": priors},
                    {"where": where, "holdout": holdout, "base": base, "weights": weights},
                    {"bootstrap": bootstrap, "seed": seed})
    if not (isinstance(level, Real) and 0 < level < 1):
        raise ValueError(f"level={level!r}: need a share between 0 and 1, such as 0.95")
    found = solved(table, law, columns=columns, where=where, holdout=holdout, loss=loss, delta=delta, ties=ties, fixed=fixed, base=base,
                   priors=priors, weights=weights)
    return _assemble(found, level, bootstrap, seed, progress,
                     {"loss": loss, "delta": found.delta, "where": where, "holdout": holdout, "base": base, "weights": weights,
                      "priors": {name: list(pair) for name, pair in (priors or {}).items()},
                      "prior_weight": (found.first or found.last).problem.prior_weight})


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


def _assemble(made: Solved, level: float, num_draws: int, seed: int, progress, asked: dict) -> Fit:
    """The solved problem with its uncertainty, held-out score and metrics, as a Fit."""
    problem, solution, delta = made.last.problem, made.last.solution, asked["delta"]
    law, required, first = problem.law, problem.law.measures, made.first
    around, draws, drift = _trusted(made.last, delta, num_draws, seed, progress)
    found = Joined(problem.free, problem.ties, problem.fixed, made.last.coordinates, around.scatter, draws)
    apart = undetermined(law, problem.free, problem.plain(solution.ends))
    if first:
        earlier, first_draws, first_drift = _trusted(first, delta, num_draws, seed + 1, progress)
        around = after(earlier, around)
        found = joined(first, made.last, (earlier.scatter, around.scatter), (first_draws, draws))
        drift = max(drift, first_drift)
        apart = undetermined(law, first.problem.free, first.problem.plain(first.solution.ends)) | apart
    stuck = [f"{', '.join(around.at_bound)} ended on {'its bound' if len(around.at_bound) == 1 else 'their bounds'}: linearised intervals "
             f"of the others hold for "
             "it there; a profile or the bootstrap lets it move"] if around.at_bound else []
    residuals = problem.residuals(solution.z[None])[0]
    rows = residuals.size
    mean_square = float(np.mean(problem.row_weights * residuals**2))
    metrics = {
        "objective": solution.objective, "gradient_norm": solution.gradient, "converged": made.converged, "starts": solution.starts,
        "starts_agree": solution.agree, "condition_number": around.condition, "rows": rows, "dof": around.dof,
        "dropped": made.observed.dropped, "residual_sd": around.residual_sd, "rmse": mean_square**0.5,
        "bic": float(rows * np.log(max(mean_square, 1e-300)) + len(found.free) * np.log(rows)),
        "discrepancy": drift, "at_bound": list(around.at_bound), "held_out": None,
        "notes": [*made.notes, *stuck], "ridges": ridges(law, found.free, found.coordinates, found.scatter),
        "constant_terms": [name for name, logs in zip(law.amplitudes, problem.log_terms(problem.theta(solution.z[None]))[0], strict=True)
                           if np.all(logs == logs[0])],
        "undetermined": apart,
        "confounded": confounded(found.free, found.scatter), "columns": made.observed.mapping, "bootstrap": num_draws, **asked,
    }
    params = constants(law, found.free, found.ties, found.fixed, found.coordinates)
    bare = Fit(law, made.label, params, {}, metrics, level, found.free, found.ties, found.fixed, found.coordinates, found.scatter, found.draws,
               _ranges(law, problem.columns, required))
    scored = replace(bare, metrics=_with_held_out(bare, made.observed))
    estimates = {name: bare.estimate(name) for name in params if name not in found.fixed}
    return replace(scored, intervals={name: (e.low, e.high) for name, e in estimates.items()})


def _trusted(stage: Stage, delta: float, num_draws: int, seed: int, progress) -> tuple[Spread, np.ndarray, float]:
    """(covariance, draws [S, F], discrepancy) of one stage."""
    problem, z_F = stage.problem, stage.solution.z
    required = problem.law.measures
    around = spread(problem, z_F, delta)
    draws = np.zeros((0, len(problem.free)))
    if num_draws:
        draws = resample(problem, z_F, cell_index(problem.columns, required), delta, num_draws, seed, progress)
    return around, draws, discrepancy(problem, z_F, delta, required, around.condition)


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
    score = {**errors_of(predicted, loss), **dict(zip(("bias_nats", "bias_low", "bias_high"), mean_interval(predicted - loss), strict=True)),
             "covered": None, "half_width": None}
    if fitted.converged and fitted.metrics["condition_number"] <= MAX_CONDITION:
        interval = fitted.predict(**columns, extrapolate=True)
        score["covered"] = float(np.mean((interval.low <= loss) & (loss <= interval.high)))
        score["half_width"] = float(np.median(0.5 * (interval.high - interval.low)))
        beyond = float(np.mean(np.log(interval.extrapolated)))
        if beyond > 0.0:  # a rate per e-fold, as `discrepancy` has it; rows inside the data tell nothing of it
            estimated = (np.log(interval.mean_high / interval.loss) / fitted.quantile) ** 2
            weights = 1.0 if observed.weights is None else observed.weights[observed.held] / observed.weights[~observed.held].mean()
            rate = float(np.mean(weights * (errors**2 - estimated)) - fitted.metrics["residual_sd"] ** 2) / beyond
            metrics["discrepancy"] = max(metrics["discrepancy"], max(rate, 0.0) ** 0.5)
    return metrics | {"held_out": score}
