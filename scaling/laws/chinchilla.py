"""The Chinchilla law L = A/N^alpha + B/D^beta + E (Hoffmann et al. 2022, arXiv 2203.15556, Approach 3)."""
from __future__ import annotations

import math

from scaling.laws.law import Law, namespace
from scaling.laws.parameters import amplitude, exponent


def log_terms(p, x):
    """Logs of N^-alpha, D^-beta and 1."""
    xp = namespace(x["N"])
    return -p["alpha"] * xp.log(x["N"]), -p["beta"] * xp.log(x["D"]), 0.0


def optimal_exponent(p):
    """a in N_opt proportional to C^a when C = 6 N D: beta / (alpha + beta). Dimensionless."""
    return p["beta"] / (p["alpha"] + p["beta"])


def optimal_params(p, compute, cost_per_pair=6.0):
    """N that minimises the loss at `compute` FLOP when C = cost_per_pair * N * D. Parameters.

    Stationarity of A N^-alpha + B (cN/C)^beta, Hoffmann et al. 2022, Eq. 4.
    """
    pairs = compute / cost_per_pair
    ratio = p["alpha"] * p["A"] / (p["beta"] * p["B"])
    return ratio ** (1.0 / (p["alpha"] + p["beta"])) * pairs ** optimal_exponent(p)


def optimal_tokens_per_param(p, compute, cost_per_pair=6.0):
    """D/N at the optimum for `compute` FLOP. Tokens per parameter."""
    return compute / cost_per_pair / optimal_params(p, compute, cost_per_pair) ** 2


def irreducible_loss(p):
    """E, the loss that neither size nor data removes. Nats per token."""
    return p["E"]


chinchilla = Law(
    name="chinchilla",
    about="L = A/N^alpha + B/D^beta + E",
    cite="Hoffmann et al. 2022, arXiv 2203.15556; refit: Besiroglu et al. 2024, arXiv 2404.10102",
    inputs=("N", "D"),
    parameters=(amplitude("A"), amplitude("B"), amplitude("E", "nats/token"), exponent("alpha"), exponent("beta")),
    log_terms=log_terms,
    published={
        "hoffmann": {"A": math.exp(6.0073404), "B": math.exp(6.0179186), "E": math.exp(0.5267228),
                     "alpha": 0.33917084, "beta": 0.2849083},
        "hoffmann_rounded": {"A": 406.4, "B": 410.7, "E": 1.69, "alpha": 0.34, "beta": 0.28},
        "epoch": {"A": 482.01, "B": 2085.43, "E": 1.8172, "alpha": 0.3478, "beta": 0.3658},
        "epoch_huber": {"A": 477.83, "B": 2143.4, "E": 1.81722, "alpha": 0.34731, "beta": 0.36717},
    },
    sources={
        "hoffmann": "Approach 3 before rounding, from the comment after Eq. 10 in the arXiv source of 2203.15556",
        "hoffmann_rounded": "the digits printed in the paper; rounding moves D/N at 5.9e23 FLOP from 59 to 93",
        "epoch": "Besiroglu et al. 2024, Table 1: a Huber density with free scale, in effect the least-absolute-deviation optimum",
        "epoch_huber": "the optimum of the stated objective, sum of Huber with delta 1e-3, on the same 240 points",
    },
    validity={name: {"N": (70e6, 16e9), "D": (5e9, 500e9)} for name in ("hoffmann", "hoffmann_rounded")}
    | {name: {"N": (5.73e+07, 1.62e+10), "D": (8.19e+08, 3.18e+11)} for name in ("epoch", "epoch_huber")},
    functionals={"optimal_exponent": optimal_exponent, "optimal_params": optimal_params,
                 "optimal_tokens_per_param": optimal_tokens_per_param, "irreducible_loss": irreducible_loss},
    variants={"tied": {"ties": {"beta": "alpha"}}},
)
