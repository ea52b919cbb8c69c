"""Repeated data (Muennighoff et al. 2023, arXiv 2305.16264): tokens seen again, and parameters beyond what the unique ones need, decay.

    L = A/N'^alpha + B/D'^beta + E,    X' = U_X + U_X R*_X (1 - exp(-R_X/R*_X)),    R_X = X/U_X - 1
    U_D = min(unique_tokens, D),  U_N = min(N_opt(U_D), N),  N_opt(U_D) = G (U_D G)^(beta/alpha),  G = (alpha A/(beta B))^(1/(alpha+beta))

A and B decide U_N, so the law is no plain sum in them.
"""
from __future__ import annotations

import math

from scaling.laws import chinchilla
from scaling.laws.law import Law, namespace
from scaling.laws.parameters import amplitude, exponent, scale


def _log_decayed(xp, log_excess, half_life):
    """ln(X'/X) where ln(X/U_X) = log_excess, at least 0."""
    repeats = xp.expm1(log_excess)
    return xp.log1p(half_life * -xp.expm1(-repeats / half_life)) - log_excess


def combine(p, terms, x):
    """T_N (N'/N)^-alpha + T_D (D'/D)^-beta + E; A and B are read off the terms, T_N = A N^-alpha."""
    xp = namespace(terms[0])
    alpha, beta = p["alpha"], p["beta"]
    log_N, log_D = xp.log(x["N"]), xp.log(x["D"])
    log_unique = xp.minimum(xp.log(x["unique_tokens"]), log_D)
    log_G = (xp.log(terms[0]) + alpha * log_N + xp.log(alpha) - xp.log(terms[1]) - beta * log_D - xp.log(beta)) / (alpha + beta)
    log_needed = log_G + beta / alpha * (log_unique + log_G)
    excess = log_N - log_needed
    excess = xp.where(xp.real(excess) > 0.0, excess, 0.0 * excess)
    return (terms[0] * xp.exp(-alpha * _log_decayed(xp, excess, p["R_N"]))
            + terms[1] * xp.exp(-beta * _log_decayed(xp, log_D - log_unique, p["R_D"])) + terms[2])


def effective_tokens(p, D, unique_tokens):
    """D': fresh tokens that D tokens of `unique_tokens` different ones are worth. Tokens."""
    unique = min(unique_tokens, D)
    return unique + unique * p["R_D"] * -math.expm1(-(D / unique - 1.0) / p["R_D"])


data_constrained = Law(
    name="data_constrained",
    aliases=("muennighoff",),
    about="L = A/N'^alpha + B/D'^beta + E, X' = U_X + U_X R_X (1 - exp(-(X/U_X - 1)/R_X))",
    cite="Muennighoff et al. 2023, arXiv 2305.16264",
    inputs=("N", "D", "unique_tokens"),
    parameters=(amplitude("A", span=(-4.0, 1.0)), amplitude("B", span=(-4.0, 1.0)), amplitude("E", "nats/token", span=(-3.0, 1.0)),
                exponent("alpha"), exponent("beta"), scale("R_D", 0.3, 300.0), scale("R_N", 0.3, 300.0)),
    log_terms=chinchilla.log_terms,
    combine=combine,
    published={"muennighoff": {"A": math.exp(6.255414), "B": math.exp(7.3049974), "E": math.exp(0.6254804), "alpha": 0.3526596,
                               "beta": 0.3526596, "R_D": 15.387756, "R_N": 5.309743}},
    sources={"muennighoff": "the authors' code; alpha and beta tied; 400+ runs up to 9B parameters and 900B tokens (the lower ends of the "
             "range are from memory)"},
    validity={"muennighoff": {"N": (7e6, 9e9), "D": (1e8, 9e11)}},
    functionals={"effective_tokens": effective_tokens},
    variants={"tied": {"ties": {"beta": "alpha"}}},
)
