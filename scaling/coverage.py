"""Do the intervals of a fit cover? Its own design is simulated from its own law and residuals, refitted, and the truth looked up.

Three answers: the share of simulations whose interval holds the truth, for every constant or functional asked for and for a new run; the
ranks of the truth, uniform where the stated uncertainty is right; and TARP, the same for all constants at once.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import stdtr

from scaling.problem import Problem
from scaling.refits import observed_of, problem_of
from scaling.result import Estimate, Fit
from scaling.solve import WARM, minimise
from scaling.table import Source
from scaling.uncertainty import CHUNK, spread

BAND = 1.358  # 95 % point of sqrt(n) times the Kolmogorov-Smirnov distance (Smirnov 1948)
TARP_DRAWS = 400
TARP_REACH = 3.0  # distance of the reference points, in standard errors


@dataclass(frozen=True)
class Coverage:
    """level: nominal. covered: name -> share of the simulations whose interval holds the truth; "a new run": mean share of the fitted
    rows' prediction intervals that hold a new run there. ranks: free parameter -> those of the S in which it
    did not end on its bound, in (0, 1). tarp: [S], in (0, 1)."""

    level: float
    simulations: int
    covered: Mapping[str, float]
    ranks: Mapping[str, np.ndarray]
    tarp: np.ndarray

    @property
    def standard_error(self) -> float:
        """Of a share in `covered` when its true coverage is the level: sqrt(level (1 - level) / simulations)."""
        return math.sqrt(self.level * (1.0 - self.level) / self.simulations)

    @property
    def band(self) -> float:
        """Distance from uniform that ranks which are uniform exceed once in twenty."""
        return BAND / math.sqrt(self.simulations)

    def lines(self) -> list[str]:
        """The summary, a line each."""
        told = [f"coverage of the {self.level:.0%} intervals in {self.simulations} simulations (standard error {self.standard_error:.1%}):"]
        told += [f"  {name} {share:.1%}{'' if abs(share - self.level) <= 3 * self.standard_error else ' (off by more than 3 standard errors)'}"
                 for name, share in self.covered.items()]
        distances = {name: uniform_distance(ranks) for name, ranks in self.ranks.items()} | {"all constants (TARP)": uniform_distance(self.tarp)}
        told.append("distance of the ranks from uniform, at most "
                    f"{self.band:.2f} in 95 % if calibrated: " + ", ".join(f"{name} {value:.2f}" for name, value in distances.items()))
        return told


def uniform_distance(ranks: np.ndarray) -> float:
    """Kolmogorov-Smirnov distance of `ranks` [S] from the uniform distribution on (0, 1)."""
    ordered = np.sort(ranks)
    steps = np.arange(len(ordered) + 1) / len(ordered)
    return float(max(np.max(steps[1:] - ordered), np.max(ordered - steps[:-1])))


def coverage(fit: Fit, table: Source, simulations: int = 200, names: Iterable[str] | Mapping[str, Mapping] | None = None, seed: int = 0,
             progress: Callable[[int, int], None] | None = None) -> Coverage:
    """Coverage of the linearised intervals of `fit` by simulation on its own design. table: the one that it was fitted to.

    names: parameters and functionals; a mapping gives each its columns, {"bits_for_gap": {"N": 1e9, "gap": 0.01}}. By default the free
    parameters, and those functionals that need no columns and can vary. Truth is the fitted law; the scatter is drawn from its residuals with random
    signs, stretched by sqrt(rows / dof), each as its row's weight has it; priors are drawn about the truth with their own deviation. So it tests the intervals where the law is
    right: what a law's discrepancy does beyond the data, `benchmarks.intervals` measures on real runs. Refits are warm. ValueError for fewer
    than 20 simulations, an unknown name, another table.

    Ranks: Student's distribution function at (truth - estimate) / standard error. TARP: Lemos et al. 2023, arXiv 2302.03026, with reference
    points scattered about each estimate: the share of the draws that lie nearer to its reference point than the truth does.
    """
    if simulations < 20:
        raise ValueError(f"simulations={simulations}: need at least 20")
    asked = _asked(fit, names)
    problem, z_F, delta = problem_of(fit, table)
    about = problem.priors_about(z_F)
    observed = observed_of(fit, table)
    rows, _ = observed.rows(~observed.held)
    rng = np.random.default_rng(seed)
    law_R = problem.log_loss + problem.residuals(z_F[None])[0]
    root_R = np.sqrt(problem.row_weights) * np.ones(law_R.size)
    scatter = root_R * (law_R - problem.log_loss) * math.sqrt(law_R.size / max(fit.metrics["dof"], 1))

    def noise(size: int) -> np.ndarray:  # of rows of weight 1
        return rng.choice(scatter, (size, law_R.size)) * rng.choice([-1.0, 1.0], (size, law_R.size))

    truth = {name: float(fit.quantity(name, columns)[0](fit.params)) for name, columns in asked.items()}
    hits, run_hits, ranks, tarp = {name: 0 for name in asked}, 0.0, [], []
    for start in range(0, simulations, CHUNK):
        size = min(CHUNK, simulations - start)
        losses_SR = law_R + noise(size) / root_R
        z_SF, *_ = minimise(about, np.repeat(z_F[None], size, axis=0), 1.0, delta, shift_SR=losses_SR - problem.log_loss,
                            prior_shift_SF=problem.prior_noise(size, rng), damping=WARM)
        for z, losses, new in zip(z_SF, losses_SR, noise(size), strict=True):
            again = _simulated(fit, replace(problem, log_loss=losses), z, delta)
            for name, columns in asked.items():
                estimate = again.estimate(name, **columns)
                hits[name] += estimate.low <= truth[name] <= estimate.high
            run = again.predict(**rows, extrapolate=True)
            run_hits += float(np.mean((run.low <= np.exp(law_R + new)) & (np.exp(law_R + new) <= run.high)))
            ranks.append(_ranks(again, fit.coordinates))
            tarp.append(_tarp(again, fit.coordinates, rng))
        if progress:
            progress(start + size, simulations)
    shares = {name: count / simulations for name, count in hits.items()} | {"a new run": run_hits / simulations}
    by_name = {name: found[~np.isnan(found)] for name, found in zip(fit.free, np.array(ranks).T, strict=True)}
    return Coverage(fit.level, simulations, shares, {name: found for name, found in by_name.items() if found.size}, np.array(tarp))


def _asked(fit: Fit, names) -> dict[str, dict]:
    """name -> columns."""
    if names is not None:
        asked = {name: dict(names[name]) if isinstance(names, Mapping) else {} for name in names}
    else:
        asked = {name: {} for name in fit.free}
        for name in fit.law.functionals:
            try:
                estimate = fit.estimate(name)
            except ValueError:  # it needs columns, which only the caller knows
                continue
            if isinstance(estimate, Estimate) and estimate.low < estimate.high:  # tied parameters leave some functionals nothing to vary
                asked[name] = {}
    for name, columns in asked.items():
        estimate = fit.estimate(name, **columns)  # refuses unknown names
        if not isinstance(estimate, Estimate):
            raise ValueError(f"coverage: {name} is a name ({estimate.value}), which has no interval; give constants, or functionals that are numbers")
    return asked


def _simulated(fit: Fit, problem: Problem, z_F: np.ndarray, delta: float) -> Fit:
    """The fit that these losses would have given, without resamples."""
    around = spread(problem, z_F, delta)
    plain = problem.plain(z_F[None])[0]
    metrics = {**fit.metrics, "condition_number": min(around.condition, fit.metrics["condition_number"]), "residual_sd": around.residual_sd,
               "dof": around.dof, "at_bound": list(around.at_bound), "discrepancy": 0.0}
    return replace(fit, params=fit.constants_at(plain), intervals={}, metrics=metrics, coordinates=plain, scatter=around.scatter,
                   draws=np.zeros((0, len(fit.free))))


def _ranks(again: Fit, truth_F: np.ndarray) -> np.ndarray:
    """[F]; NaN for a constant without an error, which ended on its bound."""
    errors = np.sqrt((again.scatter**2).sum(axis=1))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = (truth_F - again.coordinates) / errors
    return stdtr(max(again.metrics["dof"], 1), np.where(errors > 0.0, ratio, np.nan))


def _tarp(again: Fit, truth_F: np.ndarray, rng: np.random.Generator) -> float:
    """Distances are Euclidean in the coordinates that the fit's own covariance makes round."""
    rank = again.scatter.shape[1]
    dof = max(again.metrics["dof"], 1)
    draws = rng.standard_normal((TARP_DRAWS, rank)) * np.sqrt(dof / rng.chisquare(dof, (TARP_DRAWS, 1)))
    truth = np.linalg.pinv(again.scatter) @ (truth_F - again.coordinates)
    reference = TARP_REACH * rng.standard_normal(rank)
    nearer = np.linalg.norm(draws - reference, axis=1) < np.linalg.norm(truth - reference)
    return float((nearer.sum() + rng.uniform()) / (TARP_DRAWS + 1))
