"""What quantization-aware training in blocks of G adds to the loss (Chen et al. 2025, arXiv 2505.14302).

    L = A/N^alpha + B/D^beta + E + k D^gamma_D (log2 G)^gamma_G / N^gamma_N

One set of (k, gamma_D, gamma_G, gamma_N) per precision (W4A4, ...): fit one precision beside its baseline (`group` missing), or hold the
base constants. Rows without `group` are not quantized: their gap is exactly 0.
"""
from __future__ import annotations

import numpy as np

from scaling.laws import chinchilla
from scaling.laws.law import Law, namespace
from scaling.laws.parameters import Operand, amplitude, exponent


def log_terms(p, x):
    """Logs of N^-alpha, D^-beta, 1 and the gap per k."""
    xp = namespace(x["N"])
    group = xp.asarray(x["group"])
    quantized = xp.isfinite(group)
    log_group = xp.log(xp.log2(xp.where(quantized, group, 4.0)))
    gap = p["gamma_D"] * xp.log(x["D"]) + p["gamma_G"] * log_group - p["gamma_N"] * xp.log(x["N"])
    return (*chinchilla.log_terms(p, x), xp.where(quantized, gap, -np.inf))


def loss_gap(p, N, D, group):
    """k D^gamma_D (log2 G)^gamma_G / N^gamma_N. Nats per token."""
    return p["k"] * D ** p["gamma_D"] * np.log2(group) ** p["gamma_G"] / N ** p["gamma_N"]


def _gap(k, gamma_N, gamma_D, gamma_G):
    return {"alpha": 0.3022, "beta": 0.3022, "k": k, "gamma_N": gamma_N, "gamma_D": gamma_D, "gamma_G": gamma_G}


_BASE = chinchilla.chinchilla.parameters
_SOURCE = ("{}; from a secondary source, checked only in that the ratios between precisions reproduce within 0.03. A, B and E were not found: "
           "these constants give `loss_gap`, not the loss. 268 runs")
_RANGE = {"N": (74e6, 595e6), "D": (10e9, 200e9)}
_PUBLISHED = {"W4A4": _gap(0.1582, 0.2186, 0.0745, 0.7779), "W4A16": _gap(0.2522, 0.3589, 0.1610, 0.3533),
              "W16A4": _gap(0.1004, 0.1816, 0.0331, 0.9812), "W4A4_fc2_8bit": _gap(0.3519, 0.2637, 0.0964, 0.3407),
              "W16A4_fc2_8bit": _gap(0.1273, 0.2347, 0.0827, 0.4491)}

qat = Law(
    name="qat",
    about="L = A/N^alpha + B/D^beta + E + k D^gamma_D log2(G)^gamma_G / N^gamma_N",
    cite="Chen et al. 2025, arXiv 2505.14302",
    inputs=("N", "D", "group"),
    parameters=(*_BASE[:3], amplitude("k"), *_BASE[3:], exponent("gamma_D"), exponent("gamma_N"), exponent("gamma_G", held=1.0)),
    log_terms=log_terms,
    operands=(Operand("group", ("k", "gamma_G"), np.inf, also=("gamma_N", "gamma_D")),),
    published=_PUBLISHED,
    sources={name: _SOURCE.format(name) for name in _PUBLISHED},
    validity={name: _RANGE for name in _PUBLISHED},
    functionals={"loss_gap": loss_gap},
    variants={"tied": {"ties": {"beta": "alpha"}}},
)
