"""The law with an outer exponent of Busbridge et al. 2025 ("Distillation Scaling Laws", arXiv 2502.08606), supervised form.

    L = E + (A/N^alpha + B/D^beta)^gamma

gamma = 1 is Chinchilla. Quartet (Castro et al. 2025, arXiv 2505.14669) builds on it.
"""
from __future__ import annotations

from scaling.laws import chinchilla
from scaling.laws.law import Law, namespace
from scaling.laws.parameters import amplitude, exponent


def combine(p, terms, x):
    """E + (T_N + T_D)^gamma."""
    reducible = terms[0] + terms[1]
    xp = namespace(reducible)
    return terms[2] + xp.exp(p["gamma"] * xp.log(reducible))


PARAMETERS = (amplitude("A", span=(-4.0, 6.0)), amplitude("B", span=(-4.0, 6.0)), amplitude("E", "nats/token", span=(-3.0, 1.0)),
              exponent("alpha"), exponent("beta"), exponent("gamma", 0.05, 2.0))
CHINCHILLA_FUNCTIONALS = {
    # The outer exponent and E do not move the optimum: it minimises A/N^alpha + B/D^beta.
    "optimal_exponent": chinchilla.optimal_exponent, "optimal_params": chinchilla.optimal_params,
    "optimal_tokens_per_param": chinchilla.optimal_tokens_per_param, "irreducible_loss": chinchilla.irreducible_loss}
QUARTET_BASE = {"A": 1.52e5, "B": 5.25e5, "E": 1.35, "alpha": 0.589, "beta": 0.544, "gamma": 0.274}

busbridge = Law(
    name="busbridge",
    about="L = E + (A/N^alpha + B/D^beta)^gamma",
    cite="Busbridge et al. 2025, arXiv 2502.08606 (supervised form); constants: Castro et al. 2025, arXiv 2505.14669",
    inputs=("N", "D"),
    parameters=PARAMETERS,
    log_terms=chinchilla.log_terms,
    combine=combine,
    published={"quartet_baseline": QUARTET_BASE},
    sources={"quartet_baseline": "Quartet's stage 1, baseline runs on C4, Huber delta 1e-4 of ln L (v4 of 2505.14669). Busbridge et al.'s own "
                                 "constants are not here: they were not re-read"},
    validity={"quartet_baseline": {"N": (30.48e6, 203.19e6), "D": (0.75e9, 80e9)}},
    functionals=CHINCHILLA_FUNCTIONALS,
    variants={"tied": {"ties": {"beta": "alpha"}}, "chinchilla": {"fixed": {"gamma": 1.0}}},
)
