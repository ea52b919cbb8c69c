"""Gaussian priors on constants, and how much they weigh against rows whose noise the fit itself has to tell."""
from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from scaling.problem import Problem
from scaling.solve import Solution, solve
from scaling.uncertainty import deviance_scale, spread


def with_priors(problem: Problem, delta: float, priors: Mapping[str, tuple[float, float]]) -> tuple[Problem, Solution]:
    """The problem with Gaussian priors, solved. Their weight against the rows follows from a first fit without them.

    The rows know a constant with precision J'J E[psi']^2 / E[psi^2] (Huber 1964) while their objective has curvature J'J E[psi'], so a
    prior of precision 1/sd^2 enters the objective times E[psi^2]/E[psi'], under Gaussian residuals of the first fit's deviation, as the
    covariance has it (`scaling.uncertainty`): residuals themselves are smaller than the scatter where rows are few.
    """
    for name, (mean, sd) in priors.items():
        _refuse_prior(problem, name, mean, sd)
    first = solve(problem, delta)
    unit = deviance_scale(delta, spread(problem, first.z, delta).residual_sd)
    posed = posed_with(problem, priors, unit)
    return posed, solve(posed, delta, first.z[None])


def posed_with(problem: Problem, priors: Mapping[str, tuple[float, float]], weight: float) -> Problem:
    """The problem with priors that enter its objective times `weight`."""
    return replace(problem, priors={name: (float(problem.law.parameter(name).coordinate(mean)), sd) for name, (mean, sd) in priors.items()},
                   prior_weight=weight)


def _refuse_prior(problem: Problem, name: str, mean: float, sd: float) -> None:
    """ValueError for a prior on what is not fitted, or outside of where it can be."""
    parameter, told = problem.law.parameter(name), f"priors {name}={mean:g}, {sd:g}"
    possible = [free for free in problem.free if free == "E" or free not in problem.amplitudes]
    if name not in problem.free:
        raise ValueError(f"priors: {name} is not fitted here (tied, fixed, or not seen by these rows); give a prior on one of {', '.join(possible)}")
    if name in problem.amplitudes and name != "E":
        raise ValueError(f"priors: {name} trades off with its exponent; give the prior on one of {', '.join(possible)}")
    if not 0 < sd < math.inf:
        raise ValueError(f"{told}: need a positive deviation, and a finite one" + (", relative to the value" if parameter.logarithmic else ""))
    if not parameter.takes(mean) or (parameter.logarithmic and not mean > 0):
        raise ValueError(f"{told}: law {problem.law.name} takes for {name} {'a positive number' if parameter.multiplies else parameter.accepted}")
