"""The joint law of Kaplan et al. 2020 (arXiv 2001.08361, Eq. 1.5).

    L = [ (N_c/N)^(alpha_N/alpha_D) + D_c/D ]^alpha_D

N counts non-embedding parameters; there is no irreducible loss.
"""
from __future__ import annotations

from scaling.laws.law import Law, namespace
from scaling.laws.parameters import amplitude, exponent


def log_terms(p, x):
    """Logs of 1/N and 1/D."""
    xp = namespace(x["N"])
    return -xp.log(x["N"]), -xp.log(x["D"])


def combine(p, terms, x):
    """[T_N^(alpha_N/alpha_D) + T_D]^alpha_D."""
    xp = namespace(terms[0])
    return xp.exp(p["alpha_D"] * xp.log(xp.exp(p["alpha_N"] / p["alpha_D"] * xp.log(terms[0])) + terms[1]))


def size_limit(p, N):
    """L(N) with unlimited data, (N_c/N)^alpha_N. Nats per token."""
    return (p["N_c"] / N) ** p["alpha_N"]


def data_limit(p, D):
    """L(D) of an unlimited model, (D_c/D)^alpha_D. Nats per token."""
    return (p["D_c"] / D) ** p["alpha_D"]


kaplan = Law(
    name="kaplan",
    about="L = ((N_c/N)^(alpha_N/alpha_D) + D_c/D)^alpha_D",
    cite="Kaplan et al. 2020, arXiv 2001.08361, Eq. 1.5",
    inputs=("N", "D"),
    # A loss of 3 nats at an exponent of 0.1 is a term of e^11: the box of starts is high up.
    parameters=(amplitude("N_c", span=(0.0, 20.0)), amplitude("D_c", span=(-2.0, 20.0)), exponent("alpha_N", 0.01, 1.0),
                exponent("alpha_D", 0.01, 1.0)),
    log_terms=log_terms,
    combine=combine,
    published={"kaplan": {"N_c": 6.4e13, "D_c": 1.8e13, "alpha_N": 0.076, "alpha_D": 0.103}},
    sources={"kaplan": "joint fit, two digits; from memory, not re-read. The one-variable fits differ: alpha_N 0.076, N_c 8.8e13; alpha_D 0.095, "
                       "D_c 5.4e13. no range: that of the joint fit's runs was not re-read"},
    functionals={"size_limit": size_limit, "data_limit": data_limit},
)
