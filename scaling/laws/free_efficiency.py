"""One efficiency of the parameters per scheme on Chinchilla (Frantar et al. 2025, arXiv 2502.16440; QuEST, arXiv 2502.05003).

    L = A/(N eff[scheme])^alpha + B/D^beta + E,    eff = 1 at the baseline
"""
from __future__ import annotations

from scaling.laws import chinchilla
from scaling.laws.law import Law, namespace
from scaling.laws.parameters import Factor


def log_terms(p, x):
    """Logs of (N eff)^-alpha, D^-beta and 1."""
    xp = namespace(x["N"])
    return -p["alpha"] * (xp.log(x["N"]) + xp.log(p["eff"])), -p["beta"] * xp.log(x["D"]), 0.0


def loss_gap(p, N, scheme, D=None):
    """Loss with `scheme` minus the baseline's at size N, the same at any D. Nats per token."""
    return p["A"] * N ** -p["alpha"] * (p[f"eff[{scheme}]"] ** -p["alpha"] - 1.0)


_QUEST = {"A": 8.134, "B": 86.41, "E": 0.0014, "alpha": 0.0627, "beta": 0.2413, "eff[baseline]": 1.0}
free_efficiency = Law(
    name="free_efficiency",
    aliases=("frantar",),
    about="L = A/(N eff[scheme])^alpha + B/D^beta + E",
    cite="Frantar et al. 2025, arXiv 2502.16440; constants: Panferov et al. 2025 (QuEST), arXiv 2502.05003",
    inputs=("N", "D", "scheme"),
    parameters=chinchilla.chinchilla.parameters,
    log_terms=log_terms,
    factors=(Factor("scheme", "eff"),),
    published={"quest": _QUEST | {"eff[int1]": 0.0205, "eff[int2]": 0.1519, "eff[int3]": 0.4331, "eff[int4]": 0.6918, "eff[int8]": 1.0162,
                                  "eff[fp4]": 0.6296, "eff[sparse24_int4]": 0.3812},
               "quest_no_hadamard": _QUEST | {"eff[int1]": 0.0156, "eff[int2]": 0.0784, "eff[int3]": 0.3221, "eff[int4]": 0.6033,
                                              "eff[int8]": 0.9376},
               "quest_weights_only": _QUEST | {"eff[int1]": 0.1384, "eff[int2]": 0.4137, "eff[int3]": 0.6531, "eff[int4]": 0.8404}},
    sources={"quest": "weights and activations in the same width, Hadamard; forward pass quantized only. Fitted by the authors as least squares "
                      "(residuals scaled by 1e-3 before a Huber scale of 1), without bounds: eff[int8] exceeds 1. D/N 25 to 100 only, so "
                      "A, alpha and E are one ridge",
             "quest_no_hadamard": "the same without the Hadamard transform", "quest_weights_only": "weights alone quantized"},
    validity={name: {"N": (30.48e6, 822.2e6), "D": (0.75e9, 80e9)} for name in ("quest", "quest_no_hadamard", "quest_weights_only")},
    functionals=chinchilla.chinchilla.functionals | {"loss_gap": loss_gap},
    variants={"tied": {"ties": {"beta": "alpha"}}},
)
