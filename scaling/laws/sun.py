"""The floating-point law of Sun et al. 2025 ("Scaling Laws for Floating-Point Quantization Training", arXiv 2501.02423).

    L = n/N^alpha + d/D^beta + eps + (D^beta/N^alpha) log2(B) / (gamma (E + 1/2)^delta (M + 1/2)^nu)

E, M: exponent and mantissa bits of the quantized operands (`exp_bits`, `man_bits`; with the sign P = E + M + 1); B: values that share a
scale (`block`). A channel-wise scale counts as log2 B = 13.1567; the constants of tensor-wise ones are not printed.
"""
from __future__ import annotations

import math

import numpy as np

from scaling.laws.law import Law, namespace
from scaling.laws.parameters import amplitude, divisor, exponent

CHANNEL_BLOCK = 2.0 ** 13.1567


def log_terms(p, x):
    """Logs of N^-alpha, D^-beta, 1 and gamma times the quantization term."""
    xp = namespace(x["N"])
    size, data = -p["alpha"] * xp.log(x["N"]), -p["beta"] * xp.log(x["D"])
    width = p["delta"] * xp.log(x["exp_bits"] + 0.5) + p["nu"] * xp.log(x["man_bits"] + 0.5)
    return size, data, 0.0, size - data + xp.log(xp.log2(x["block"])) - width


def capacity(p, exp_bits, man_bits):
    """gamma (E + 1/2)^delta (M + 1/2)^nu: what the layout buys. Dimensionless."""
    return p["gamma"] * (exp_bits + 0.5) ** p["delta"] * (man_bits + 0.5) ** p["nu"]


def loss_gap(p, N, D, exp_bits, man_bits, block):
    """The quantization term. Nats per token."""
    return D ** p["beta"] / N ** p["alpha"] * np.log2(block) / capacity(p, exp_bits, man_bits)


def critical_tokens(p, N, exp_bits, man_bits, block):
    """D_crit: tokens beyond which more data raises the loss of a model trained in this layout (Sun et al. 2025, section 4.3)."""
    return (p["d"] * N ** p["alpha"] * capacity(p, exp_bits, man_bits) / np.log2(block)) ** (0.5 / p["beta"])


def layout_bits(p, bits):
    """(E, M), integers with E + M + 1 = bits, of the largest capacity (Sun et al. 2025, Figure 5)."""
    bits = int(bits)
    if bits < 2:
        raise ValueError(f"bits={bits}: a layout has a sign and at least one more bit; give 2 or more")
    best = max(range(bits), key=lambda exp_bits: capacity(p, exp_bits, bits - 1 - exp_bits))
    return best, bits - 1 - best


def best_layout(p, bits):
    """The best layout of `bits` bits as a name, "E4M3"."""
    return "E{}M{}".format(*layout_bits(p, bits))


def best_exp_bits(p, bits):
    """Exponent bits of the best layout of `bits` bits."""
    return layout_bits(p, bits)[0]


def best_man_bits_real(p, bits):
    """M* = nu P/(delta + nu) - 1/2, the best number of mantissa bits if it could be any number (Sun et al. 2025, Eq. 9)."""
    return p["nu"] * bits / (p["delta"] + p["nu"]) - 0.5


def _gamma_rho(p):
    """Capacity of the best real-valued layout is gamma_rho P^(delta + nu)."""
    delta, nu = p["delta"], p["nu"]
    return p["gamma"] * delta ** delta * nu ** nu / (delta + nu) ** (delta + nu)


def optimal_bits(p, compute, block, cost_per_pair=6.0):
    """P* with N and D free at cost C = (cost_per_pair/16) N D P (Sun et al. 2025, section 4.4). Bits; `compute` in FLOP.

    P^((delta+nu)(alpha+beta)/beta + alpha) = lambda (gamma_D log2 B)^((alpha+beta)/beta) (C/k)^alpha
    """
    a, b, w = p["alpha"], p["beta"], p["delta"] + p["nu"]
    ratio = p["d"] * b / (p["n"] * a) * (w - a) / (w + b)
    gamma_D = (w - a) / (p["n"] * a * _gamma_rho(p))
    pairs = compute / (cost_per_pair / 16.0)
    with np.errstate(divide="ignore"):  # a block of one value has no error: any width does
        power = math.log(ratio) + (a + b) / b * np.log(gamma_D * math.log2(block)) + a * math.log(pairs)
    return float(np.exp(power / (w * (a + b) / b + a)))


def optimal_bits_at_tokens(p, D, block):
    """P* when D is fixed and N shrinks as the width grows: P^(delta+nu) = gamma_D D^beta log2 B. Bits."""
    w = p["delta"] + p["nu"]
    return ((w - p["alpha"]) / (p["n"] * p["alpha"] * _gamma_rho(p)) * D ** p["beta"] * math.log2(block)) ** (1.0 / w)


sun = Law(
    name="sun",
    aliases=("floating_point",),
    about="L = n/N^alpha + d/D^beta + eps + (D^beta/N^alpha) log2(B) / (gamma (E + 1/2)^delta (M + 1/2)^nu)",
    cite="Sun et al. 2025, arXiv 2501.02423",
    inputs=("N", "D", "exp_bits", "man_bits", "block"),
    zero_allowed=("exp_bits", "man_bits"),
    parameters=(amplitude("n"), amplitude("d"), amplitude("eps", "nats/token"), divisor("gamma"), exponent("alpha"), exponent("beta"),
                exponent("delta", 0.05, 8.0), exponent("nu", 0.05, 8.0)),
    log_terms=log_terms,
    published={"sun": {"n": 69.2343, "d": 68973.0621, "eps": 1.9061, "gamma": 11334.5197, "alpha": 0.2368, "beta": 0.5162, "delta": 3.1926,
                       "nu": 2.9543}},
    sources={"sun": "Table 2; 359 runs (the text says 358) of N 41M-679M, checked on 12 of 1.2B, 7B and 71B; BF16 counts as E8M7. How it was "
                    "fitted is not stated"},
    validity={"sun": {"N": (41e6, 679e6), "D": (10.5e9, 105e9), "exp_bits": (0.0, 8.0), "man_bits": (0.0, 7.0), "block": (32.0, CHANNEL_BLOCK)}},
    functionals={"critical_tokens": critical_tokens, "best_layout": best_layout, "best_exp_bits": best_exp_bits, "loss_gap": loss_gap,
                 "best_man_bits_real": best_man_bits_real, "optimal_bits": optimal_bits, "optimal_bits_at_tokens": optimal_bits_at_tokens,
                 "capacity": capacity},
)
