"""What fitting costs, against scipy in the same run: `python -m benchmarks.scaling [--data CSV] [--sample K]`. Prints JSON.

All times are CPU seconds of this process, medians where they are short; each is told beside a ratio to scipy. Peers, on the same rows and
objective (sum of Huber losses of ln loss, delta 1e-3):
  recipe: the published one (Hoffmann et al. 2022; Besiroglu et al. 2024), L-BFGS-B with numerical gradients and default tolerances from each
          of 4500 starts; K of them are run, spread over the grid, and the time is scaled to all;
  tight:  one L-BFGS-B from the optimum with analytic gradients and tight tolerances, per bootstrap resample;
  start:  of a precision law (Kumar et al. 2024, its published constants on a copy of its design, 0.5 % noise), L-BFGS-B with numerical
          gradients and default tolerances, per start.
Rows: the Chinchilla points (--data, the CSV of Besiroglu et al., by default that of ../shared/data where there is one; the five largest losses
dropped), or else 240 rows drawn from the published law with its residual noise.
"""
from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import scipy.optimize
import scipy.special

import scaling
from benchmarks.timing import machine, print_json
from scaling.laws import laws
from scaling.observations import observe
from scaling.pose import pose
from scaling.problem import Problem
from scaling.solve import minimise, solve
from scaling.starts import low_discrepancy
from scaling.uncertainty import bootstrap

DELTA, STARTS, RESAMPLES = 1e-3, 4500, 1000
EPOCH = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "epoch-chinchilla" / "svg_extracted_data.csv"
OPTIMUM = 0.0010182740178  # of the Chinchilla points without the five largest losses: scipy from 4500 starts with tight tolerances
GOALS = {"warm fit, seconds": ("<=", 0.1), "warm scaling.fit of the table, seconds": ("<=", 0.1), "first scaling.fit of a process, seconds": ("<=", 3.0),
         "recipe / warm fit": (">=", 1000.0), "1000 resamples, seconds": ("<=", 6.0), "objective above scipy's best": ("<=", 1e-9),
         "objective from the published optimum": ("<=", 1e-9), "precision fit above scipy's best": ("<=", 1e-6)}


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


def precision_problem() -> Problem:
    """Kumar's law on a copy of its design: each operand alone in low precision, and all together."""
    widths = [(32.0,) * 3, *(tuple(b if i == j else 32.0 for j in range(3)) for i in range(3) for b in (4.0, 5.0, 6.0, 8.0, 12.0)),
              *((b, b, b) for b in (4.0, 5.0, 6.0, 8.0, 12.0))]
    sizes, tokens, k = (part.ravel() for part in np.meshgrid([3e7, 6e7, 1.1e8, 2.2e8], [1.5e9, 3e9, 6e9, 1.3e10], np.arange(len(widths)), indexing="ij"))
    inputs = {"N": sizes, "D": tokens, **dict(zip(("weights_bits", "activations_bits", "kv_bits"), np.array(widths)[k].T, strict=True))}
    loss = laws["kumar"].predict(laws["kumar"].published["kumar"], **inputs) * np.exp(0.005 * np.random.default_rng(0).standard_normal(k.size))
    return pose(laws["kumar"], observe(inputs | {"loss": loss}, laws["kumar"]), {}, {})[0]


def precision_figures(sample: int) -> dict:
    """A precision fit against scipy: all of ours against one start of it."""
    problem = precision_problem()
    ours_s, ours = cpu_seconds(lambda: solve(problem, DELTA), 3)
    low, high = problem.box()
    live = np.array([name in problem.amplitudes for name in problem.free])
    starts = np.where(live, problem.level - 1.0, low + (high - low) * low_discrepancy(sample, len(low)))  # every term alive

    def objective(z):
        return scipy.special.huber(DELTA, np.nan_to_num(problem.residuals(z[None])[0], nan=1e3, posinf=1e3, neginf=-1e3)).sum()

    bounds = list(zip(*problem.bounds(), strict=True))
    theirs_s, found = cpu_seconds(lambda: [scipy.optimize.minimize(objective, z, method="L-BFGS-B", bounds=bounds).fun for z in starts])
    best = float(np.min(found))
    return {"precision fit: rows, parameters, starts polished": [problem.log_loss.size, len(problem.free), ours.starts],
            "precision fit, seconds": ours_s, "scipy per start / precision fit": theirs_s / sample / ours_s,
            "scipy for as many starts / precision fit": theirs_s / sample * ours.starts / ours_s,
            "precision fit above scipy's best": ours.objective / best - 1.0,
            "scipy's starts within 1e-4 of ours": int(np.sum(np.array(found) <= ours.objective * (1 + 1e-4))), "scipy's starts": sample}


FRESH = """
import sys, time, json
import scaling
given = json.loads(sys.argv[1])
scaling.fit
start = time.process_time()
scaling.fit(given["table"], "chinchilla", columns=given["columns"], where=given["where"])
print(time.process_time() - start)
"""


def fresh_process(given: dict) -> float:
    """CPU seconds of the first `scaling.fit` of a process, after its imports."""
    table = given["table"] if isinstance(given["table"], str) else {name: values.tolist() for name, values in given["table"].items()}
    command = [sys.executable, "-c", FRESH, json.dumps(given | {"table": table})]
    return float(subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).resolve().parents[1]).stdout)


def chinchilla_figures(path: str | None, sample: int) -> dict:
    """The Chinchilla fit and its bootstrap against the published recipe and tight refits."""
    given, law = rows(path), laws["chinchilla"]
    observed = observe(given["table"], law, given["columns"], given["where"])
    problem = Problem(law, observed.columns, np.log(observed.loss), law.names, {}, {})
    best = solve(problem, DELTA)  # also warms numpy up
    fit_s, _ = cpu_seconds(lambda: solve(problem, DELTA), 9)
    whole_s, _ = cpu_seconds(lambda: scaling.fit(given["table"], law, columns=given["columns"], where=given["where"]), 9)
    cells = np.arange(problem.log_loss.size)
    bootstrap_s, _ = cpu_seconds(lambda: bootstrap(problem, best.z, cells, DELTA, RESAMPLES, 0))
    start_s, recipe_best = published_recipe(np.log(observed.columns["N"]), np.log(observed.columns["D"]), problem.log_loss, sample)
    weights = np.random.default_rng(1).exponential(size=(8, cells.size))
    tight_s, tight = tight_resamples(problem, best.z, weights)
    _, ours, _ = minimise(problem, np.repeat(best.z[None], len(weights), axis=0), weights, DELTA)
    published = {"objective from the published optimum": abs(best.objective / OPTIMUM - 1.0)} if path else {}
    return {
        "rows": cells.size, "objective": best.objective, **published, "warm fit, seconds": fit_s, "warm scaling.fit of the table, seconds": whole_s,
        "first scaling.fit of a process, seconds": fresh_process(given), "recipe, seconds for 4500 starts": start_s * STARTS,
        "recipe / warm fit": start_s * STARTS / fit_s, "recipe / warm scaling.fit": start_s * STARTS / whole_s, "1000 resamples, seconds": bootstrap_s,
        "scipy per resample / ours": tight_s * RESAMPLES / bootstrap_s, "objective above scipy's best": best.objective / recipe_best - 1.0,
        "resamples where scipy is lower by 1e-6": int(np.sum(tight < ours * (1 - 1e-6))), "resamples compared": len(weights),
    }


def measure(path: str | None, sample: int, precision_sample: int = 6) -> dict:
    """Every figure, and the goals of those that have one."""
    figures = chinchilla_figures(path, sample) | precision_figures(precision_sample)
    goals = {name: {"value": figures[name], "goal": f"{sign} {limit:g}", "met": bool(figures[name] >= limit if sign == ">=" else figures[name] <= limit)}
             for name, (sign, limit) in GOALS.items() if name in figures}
    return {"machine": machine(("numpy", "scipy", "duckdb")), "figures": figures, "goals": goals}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=str(EPOCH) if EPOCH.is_file() else None, help="CSV of the Chinchilla points (default: that of ../shared/data "
                        "where there is one); without it, rows drawn from the published law")
    parser.add_argument("--sample", type=int, default=60, help="starts of the published recipe to run (default 60)")
    arguments = parser.parse_args()
    print_json(measure(arguments.data, arguments.sample))


if __name__ == "__main__":
    main()
