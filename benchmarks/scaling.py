"""What fitting costs, against scipy in the same run: `python -m benchmarks.scaling [--data CSV] [--sample K]`. Prints JSON.

Peers, timed in CPU seconds on the same rows and objective (sum of Huber losses of ln loss, delta 1e-3):
  recipe: the published one (Hoffmann et al. 2022; Besiroglu et al. 2024), L-BFGS-B with numerical gradients and default tolerances from each
          of 4500 starts; K of them are run, spread over the grid, and the time is scaled to all;
  tight:  one L-BFGS-B from the optimum with analytic gradients and tight tolerances, per bootstrap resample.
Rows: the Chinchilla points (--data, the CSV of Besiroglu et al.; the five largest losses dropped), or, without it, 240 rows drawn from the
published law with its residual noise.
"""
from __future__ import annotations

import argparse
import itertools
import json
import time

import numpy as np
import scipy.optimize
import scipy.special

import scaling
from scaling.laws import laws
from scaling.observations import observe
from scaling.problem import Problem
from scaling.solve import minimise, solve
from scaling.uncertainty import bootstrap

DELTA, STARTS, RESAMPLES = 1e-3, 4500, 1000
LIMITS = {"recipe / fit": (">=", 1000.0), "warm fit, seconds": ("<=", 0.1), "1000 resamples, seconds": ("<=", 6.0),
          "objective above scipy's best": ("<=", 1e-9)}


def rows(path: str | None) -> dict:
    """table, columns and where, as `scaling.fit` takes them."""
    if path:
        return {"table": path, "columns": {"N": '"Model Size"', "D": '"Training FLOP"/6/"Model Size"'},
                "where": "row_number() OVER (ORDER BY loss DESC) > 5"}
    rng = np.random.default_rng(0)
    n, compute = np.exp(rng.uniform(np.log(4e7), np.log(1.6e10), 240)), np.exp(rng.uniform(np.log(6e18), np.log(3e21), 240))
    d = compute / 6 / n
    loss = laws["chinchilla"].predict(laws["chinchilla"].published["epoch"], N=n, D=d) * np.exp(0.0075 * rng.standard_normal(240))
    return {"table": {"N": n, "D": d, "loss": loss}, "columns": None, "where": None}


def cpu_seconds(work, repeats: int = 1) -> tuple[float, object]:
    """(median CPU seconds of a call, its last result)."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        result = work()
        times.append(time.process_time() - start)
    return float(np.median(times)), result


def published_recipe(log_n, log_d, log_loss, sample: int) -> tuple[float, float]:
    """(CPU seconds per start, best objective) of `sample` starts of the published grid."""
    grid = list(itertools.product(np.arange(0.0, 30.0, 5.0), np.arange(0.0, 30.0, 5.0), np.arange(-1.0, 1.5, 0.5), np.arange(0.0, 2.5, 0.5),
                                  np.arange(0.0, 2.5, 0.5)))
    assert len(grid) == STARTS

    def objective(p):
        a, b, e, alpha, beta = p
        predicted = np.logaddexp(np.logaddexp(a - alpha * log_n, b - beta * log_d), e)  # scipy's logsumexp is ten times slower
        return scipy.special.huber(DELTA, predicted - log_loss).sum()

    chosen = grid[:: max(1, STARTS // sample)][:sample]
    seconds, found = cpu_seconds(lambda: [scipy.optimize.minimize(objective, start, method="L-BFGS-B").fun for start in chosen])
    return seconds / len(chosen), float(np.nanmin(found))


def tight_resamples(problem: Problem, z: np.ndarray, weights: np.ndarray) -> tuple[float, np.ndarray]:
    """(CPU seconds per resample, objectives) of scipy warm-started at the optimum with analytic gradients."""
    def objective(p, w):
        residuals, jacobian = (part[0] for part in problem.jacobian(p[None]))
        slope = w * np.clip(residuals, -DELTA, DELTA)
        return (w * scipy.special.huber(DELTA, residuals)).sum(), slope @ jacobian

    options = {"ftol": 1e-15, "gtol": 1e-10, "maxiter": 1000}
    seconds, found = cpu_seconds(lambda: [scipy.optimize.minimize(objective, z, args=(w,), jac=True, method="L-BFGS-B", options=options).fun
                                          for w in weights])
    return seconds / len(weights), np.array(found)


def measure(path: str | None, sample: int) -> dict:
    """Every figure, with its limit where there is one."""
    given = rows(path)
    law = laws["chinchilla"]
    observed = observe(given["table"], law, given["columns"], given["where"])
    problem = Problem(law, observed.columns, np.log(observed.loss), law.names, {}, {})
    best = solve(problem, DELTA)  # also warms numpy up
    fit_s, _ = cpu_seconds(lambda: solve(problem, DELTA), 9)
    whole_s, _ = cpu_seconds(lambda: scaling.fit(given["table"], law, columns=given["columns"], where=given["where"]), 3)
    cells = np.arange(problem.log_loss.size)
    bootstrap_s, _ = cpu_seconds(lambda: bootstrap(problem, best.z, cells, DELTA, RESAMPLES, 0))
    start_s, recipe_best = published_recipe(np.log(observed.columns["N"]), np.log(observed.columns["D"]), problem.log_loss, sample)
    weights = np.random.default_rng(1).exponential(size=(8, cells.size))
    tight_s, tight = tight_resamples(problem, best.z, weights)
    _, ours, _ = minimise(problem, np.repeat(best.z[None], len(weights), axis=0), weights, DELTA)
    figures = {
        "rows": cells.size, "objective": best.objective, "warm fit, seconds": fit_s, "fit with table, conditioning and discrepancy, seconds": whole_s,
        "1000 resamples, seconds": bootstrap_s, "recipe, seconds for 4500 starts": start_s * STARTS, "recipe / fit": start_s * STARTS / fit_s,
        "scipy per resample / ours": tight_s * RESAMPLES / bootstrap_s,
        "objective above scipy's best": best.objective / recipe_best - 1.0,
        "resamples where scipy is lower by 1e-6": int(np.sum(tight < ours * (1 - 1e-6))), "resamples compared": len(weights),
    }
    kept = {name: bool(figures[name] >= limit if sign == ">=" else figures[name] <= limit) for name, (sign, limit) in LIMITS.items()}
    return {"figures": figures, "limits": {name: f"{sign} {limit:g}" for name, (sign, limit) in LIMITS.items()}, "kept": kept}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="CSV of the Chinchilla points; rows drawn from the published law without it")
    parser.add_argument("--sample", type=int, default=60, help="starts of the published recipe to run (default 60)")
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.data, arguments.sample), indent=1))


if __name__ == "__main__":
    main()
