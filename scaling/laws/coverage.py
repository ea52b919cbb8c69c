"""Coverage against samples (Brown et al. 2024, "Large Language Monkeys", arXiv 2407.21787): pass@k = exp(-a k^-b).

The paper writes ln c = a k^b with a, b < 0; both are positive here. The fitted column (`loss`) is the coverage itself, in (0, 1], and its
estimate should be the unbiased pass@k, 1 - C(n-c, k)/C(n, k), before the curve is fitted.
"""
from __future__ import annotations

import numpy as np

from scaling.laws.law import Law, namespace
from scaling.laws.parameters import amplitude, exponent


def combine(p, terms, x):
    """exp(-T)."""
    return namespace(terms[0]).exp(-terms[0])


def samples_for(p, coverage):
    """k at which the coverage is reached: (a / -ln c)^(1/b). Samples."""
    return (p["a"] / -np.log(coverage)) ** (1.0 / p["b"])


coverage = Law(
    name="coverage",
    about="pass@k = exp(-a k^-b)",
    unit="pass@k",
    cite="Brown et al. 2024, arXiv 2407.21787",
    inputs=("k",),
    parameters=(amplitude("a", span=(-5.0, 3.0)), exponent("b", 0.01, 3.0)),
    log_terms=lambda p, x: (-p["b"] * namespace(x["k"]).log(x["k"]),),
    combine=combine,
    sources={"none": "none published: each model and task has a pair of its own, and no single one is printed"},
    functionals={"samples_for": samples_for},
)
