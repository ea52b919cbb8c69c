"""Do prediction intervals hold out of range? `python -m benchmarks.intervals --chinchilla CSV --quartet2 CSV [--laws A,B]`. Prints JSON lines.

Train below a compute cut, predict every run above it, nominal 95 %. Per cut and pooled: share covered, mean interval score of ln loss
(width + 40 times the miss: Gneiting and Raftery 2007, Eq. 43), median half-width over the held-out rms error. Rules:
  mean        the interval of the law's value alone (bootstrap)
  noise       that plus the scatter of runs about the law
  constant    that plus MARGIN times the mean excess error of the inner splits, the same at every distance
  mean_rate   that plus a variance that grows with ln(factor beyond the data), at the mean rate of the inner splits
  mean_sd     the same at the mean rate and one standard deviation of the rates more
  largest     the same at the largest rate
  all_error   the same at MARGIN times the mean rate, when the refits' own uncertainty is not subtracted from their errors
  calibrated  the same at MARGIN times the mean rate: what `fit.predict` gives
The rule was chosen on the Chinchilla points (SELECTION cuts; four fits, docs/intervals.md); quartet2-runs confirm it. Both are data of others,
so their paths are given.
"""
from __future__ import annotations

import argparse
import csv
import json

import numpy as np

import scaling
from scaling.laws import Law, Operand, amplitude, exponent, laws, namespace, scale
from scaling.observations import observe
from scaling.refits import problem_of
from scaling.uncertainty import MARGIN, inner_splits

SELECTION = tuple(compute / 6 for compute in (5e19, 1e20, 2e20, 3e20, 6e20, 1e21))
CRITERION = tuple(compute / 6 for compute in (1e20, 3e20, 1e21))  # N*D, as C = 6ND on these points
QUANTILES = (0.6, 0.75, 0.85)
MIN_ROWS = 18  # of a scheme of quartet2-runs
RULES = ("mean", "noise", "constant", "mean_rate", "mean_sd", "largest", "all_error", "calibrated")
UNTOUCHED = 1e12  # scheme number of the baseline


def chinchilla_points(path: str) -> dict[str, np.ndarray]:
    """N, D, loss of the 240 points of Besiroglu et al.'s fit (the five largest losses dropped)."""
    observed = observe(path, laws["chinchilla"], {"N": '"Model Size"', "D": '"Training FLOP"/6/"Model Size"'},
                       "row_number() OVER (ORDER BY loss DESC) > 5")
    return observed.columns | {"loss": observed.loss}


def quartet2_runs(path: str, schemes: bool) -> dict[str, np.ndarray]:
    """N, D, loss of the baselines, or, with `schemes`, of every configuration with MIN_ROWS runs as well, numbered in the column scheme."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    options = [name for name in rows[0] if name == "group" or (name[0] in "fbs" and name != "bops")]
    groups: dict[tuple, list] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in options), []).append(row)
    kept = [group for group in groups.values() if len(group) >= MIN_ROWS and (schemes or group[0]["group"] == "baseline")]
    kept.sort(key=lambda group: group[0]["group"] != "baseline")
    number = [UNTOUCHED if i == 0 else float(i) for i, group in enumerate(kept) for _ in group]
    flat = [row for group in kept for row in group]
    table = {to: np.array([float(row[of]) for row in flat]) for to, of in (("N", "N_nonemb"), ("D", "D_tokens"), ("loss", "loss"))}
    return table | ({"scheme": np.array(number)} if schemes else {})


def efficiency_per_scheme(count: int) -> Law:
    """Chinchilla with N times a free efficiency for each of `count` schemes, 1 for the baseline."""
    names = tuple(f"eff_{i}" for i in range(1, count + 1))

    def log_terms(p, x):
        xp = namespace(x["N"])
        log_eff = sum(xp.where(x["scheme"] == i, xp.log(p[name]), 0.0) for i, name in enumerate(names, 1))
        return -p["alpha"] * (xp.log(x["N"]) + log_eff), -p["beta"] * xp.log(x["D"]), 0.0

    return Law(name="efficiency_per_scheme", about="L = A/(eff_scheme N)^alpha + B/D^beta + E", cite="Frantar et al. 2025, arXiv 2502.16440",
               inputs=("N", "D", "scheme"), log_terms=log_terms, operands=(Operand("scheme", names, UNTOUCHED),),
               parameters=(amplitude("A"), amplitude("B"), amplitude("E"), exponent("alpha"), exponent("beta"),
                           *(scale(name, 0.02, 2.0) for name in names)))


def half_widths(table: dict, law: str | Law, cut: float, bootstrap: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """|errors| of ln loss above the cut in N*D, and the half-width there by every rule. Nothing above the cut is seen by the fit."""
    below = table["N"] * table["D"] <= cut
    small = {name: values[below] for name, values in table.items()}
    fit = scaling.fit(small, law, bootstrap=bootstrap)
    columns = {name: table[name][~below] for name in fit.law.inputs if name in table}
    predicted = fit.predict(**columns, extrapolate=True)
    t, noise = fit.quantile, fit.metrics["residual_sd"] ** 2
    mean = (np.log(predicted.mean_high / predicted.loss) / t) ** 2
    problem, z, delta = problem_of(fit, small)
    inner = inner_splits(problem, z, delta, ("N", "D"), fit.metrics["condition_number"])
    excess, drift = ([max(np.mean(errors**2 - part * variance) - noise, 0.0) for errors, _, variance in inner] for part in (0.0, 1.0))
    far = [np.mean(distance) for _, distance, _ in inner]
    rates = np.divide(drift, far) if inner else np.zeros(1)
    distance = np.log(predicted.extrapolated)
    beyond = {"mean": -noise, "noise": 0.0, "constant": MARGIN * np.mean(drift or [0.0]), "mean_rate": np.mean(rates) * distance,
              "mean_sd": (np.mean(rates) + np.std(rates)) * distance, "largest": np.max(rates) * distance,
              "all_error": MARGIN * np.mean(np.divide(excess, far) if inner else 0.0) * distance}
    halves = {name: t * np.sqrt(mean + noise + variance) for name, variance in beyond.items()}
    return np.abs(np.log(table["loss"][~below] / predicted.loss)), halves | {"calibrated": np.log(predicted.high / predicted.loss)}


def score(errors: np.ndarray, half: np.ndarray) -> dict[str, float]:
    """Of one rule on some rows."""
    missed = np.maximum(errors - half, 0.0)
    rms = float(np.sqrt(np.mean(errors**2)))
    return {"covered": float(np.mean(missed == 0.0)), "score": float(np.mean(2.0 * half + 40.0 * missed)), "half_width": float(np.median(half)),
            "half_width/rms": float(np.median(half)) / rms}


def measure(table: dict, law: str | Law, cuts, bootstrap: int = 200) -> dict:
    """Scores by rule: of each cut, and pooled over the cuts."""
    parts = [half_widths(table, law, cut, bootstrap) for cut in cuts]
    by_rule = {}
    for rule in RULES:
        each = [score(errors, halves[rule]) for errors, halves in parts]
        pooled = score(np.concatenate([errors for errors, _ in parts]), np.concatenate([halves[rule] for _, halves in parts]))
        by_rule[rule] = {"pooled": pooled, "cuts": each, "worst cut": min(one["covered"] for one in each)}
    return {"rows above": [len(errors) for errors, _ in parts], "rms": [float(np.sqrt(np.mean(errors**2))) for errors, _ in parts],
            "rules": by_rule}


def kept(result: dict) -> dict[str, bool]:
    """The promises: at least 85 % of all, at least 75 % at every cut, a better score than noise alone, at most twice the error wide."""
    ours, noise = result["rules"]["calibrated"], result["rules"]["noise"]
    return {"pooled >= 0.85": ours["pooled"]["covered"] >= 0.85, "every cut >= 0.75": ours["worst cut"] >= 0.75,
            "score < noise": ours["pooled"]["score"] < noise["pooled"]["score"], "half-width <= 2 rms": ours["pooled"]["half_width/rms"] <= 2.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chinchilla", metavar="CSV", help="the Chinchilla points of Besiroglu et al.")
    parser.add_argument("--quartet2", metavar="CSV", help="the runs of Quartet II")
    parser.add_argument("--laws", default="chinchilla", help="laws of N and D to fit, by name (default chinchilla)")
    parser.add_argument("--bootstrap", type=int, default=200)
    arguments = parser.parse_args()
    if not (arguments.chinchilla or arguments.quartet2):
        parser.error("nothing to measure: give --chinchilla, --quartet2 or both")
    work = []
    for law in arguments.laws.split(","):
        if arguments.chinchilla:
            points = chinchilla_points(arguments.chinchilla)
            work += [("chinchilla points, selection", law, points, SELECTION), ("chinchilla points", law, points, CRITERION)]
        if arguments.quartet2:
            baselines = quartet2_runs(arguments.quartet2, schemes=False)
            work.append(("quartet2-runs, baselines", law, baselines, np.quantile(baselines["N"] * baselines["D"], QUANTILES)))
    if arguments.quartet2:
        runs = quartet2_runs(arguments.quartet2, schemes=True)
        law = efficiency_per_scheme(int(np.unique(runs["scheme"]).size) - 1)
        work.append(("quartet2-runs, schemes", law, runs, np.quantile(runs["N"] * runs["D"], QUANTILES)))
    for name, law, table, cuts in work:
        result = measure(table, law, cuts, arguments.bootstrap)
        print(json.dumps({"table": name, "law": law if isinstance(law, str) else law.name, **result, "kept": kept(result)}))


if __name__ == "__main__":
    main()
