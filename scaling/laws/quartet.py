"""The law of Quartet (Castro et al. 2025, arXiv 2505.14669 v4): one efficiency per forward scheme and one per backward scheme.

    L = E + (A/(N effN[forward])^alpha + B/(D effD[backward])^beta)^gamma

Efficiencies are 1 at the baseline. The authors fit the six base constants on baseline runs and hold them for the efficiencies;
`fit(..., base="forward = 'BF16' AND backward = 'BF16'")` does the same, without `base` all constants are fitted together.
"""
from __future__ import annotations

from scaling.laws.busbridge import CHINCHILLA_FUNCTIONALS, PARAMETERS, QUARTET_BASE, combine
from scaling.laws.law import Law, namespace
from scaling.laws.parameters import Factor


def log_terms(p, x):
    """Logs of (N effN)^-alpha, (D effD)^-beta and 1."""
    xp = namespace(x["N"])
    return (-p["alpha"] * (xp.log(x["N"]) + xp.log(p["effN"])), -p["beta"] * (xp.log(x["D"]) + xp.log(p["effD"])), 0.0)


def loss_gap(p, N, D, forward=None, backward=None):
    """Loss with the forward and backward schemes (None: baseline) minus the baseline's at the same N and D. Nats per token."""
    eff_N = 1.0 if forward is None else p[f"effN[{forward}]"]
    eff_D = 1.0 if backward is None else p[f"effD[{backward}]"]
    reducible = p["A"] / (N * eff_N) ** p["alpha"] + p["B"] / (D * eff_D) ** p["beta"]
    return reducible ** p["gamma"] - (p["A"] / N ** p["alpha"] + p["B"] / D ** p["beta"]) ** p["gamma"]


quartet = Law(
    name="quartet",
    about="L = E + (A/(N effN[forward])^alpha + B/(D effD[backward])^beta)^gamma",
    cite="Castro et al. 2025, arXiv 2505.14669 v4",
    inputs=("N", "D", "forward", "backward"),
    parameters=PARAMETERS,
    log_terms=log_terms,
    combine=combine,
    factors=(Factor("forward", "effN"), Factor("backward", "effD")),
    published={"quartet": QUARTET_BASE | {"effN[baseline]": 1.0, "effN[SR]": 0.42, "effN[RTN]": 0.59, "effN[QuEST]": 0.64,
                                          "effD[baseline]": 1.0, "effD[SR]": 0.88, "effD[RTN]": 0.93, "effD[QuEST]": 0.83}},
    sources={"quartet": "v4, MXFP4 schemes: SR and RTN with absmax scales, QuEST with the RMSE-optimal clip. Earlier versions recommended SR for "
                        "the backward pass: an implementation bug had hurt RTN"},
    validity={"quartet": {"N": (30.48e6, 203.19e6), "D": (0.75e9, 80e9)}},
    functionals=CHINCHILLA_FUNCTIONALS | {"loss_gap": loss_gap},
    variants={"chinchilla": {"fixed": {"gamma": 1.0}}, "tied": {"ties": {"beta": "alpha"}}},
)
