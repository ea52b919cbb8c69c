"""The precision law of Kumar et al. 2024 ("Scaling Laws for Precision", arXiv 2411.04330, Eq. 3 and Appendix K).

    L = A N_eff^-alpha + B D^-beta + E,    N_eff = N * prod_x (1 - exp(-P_x/gamma_x + n_x)),   x in weights, activations, kv cache

P_x is the number of bits the operand was trained in. The offsets n_x belong to the fitted form; the text of the paper leaves them
out, and only with them do the printed constants give the printed optimum of 7 to 8 bits. They are kept at zero or above, as all
fitted ones are: below zero, an operand of no bits at all would train. An operand that is not quantized (32 bits
or more) has a factor of exactly 1. Where a factor is zero or less (P_x <= n_x gamma_x) the law says that training diverges: loss inf.
"""
from __future__ import annotations

import math

import numpy as np

from scaling.laws import chinchilla
from scaling.laws.law import Law, namespace
from scaling.laws.parameters import FULL_BITS, WIDTHS, Operand, amplitude, exponent, offset, scale

OPERANDS = dict(zip(WIDTHS, (("gamma_w", "n_w"), ("gamma_a", "n_a"), ("gamma_kv", "n_kv")), strict=True))


def _log_factor(bits, gamma, shift):
    """ln(1 - exp(-bits/gamma + shift)), 0 from 32 bits on, -inf where the factor is not positive."""
    xp = namespace(bits)
    quantized = bits < FULL_BITS
    finite_bits = xp.where(quantized, bits, 1.0)  # inf / complex is nan
    factor = 1.0 - xp.exp(-finite_bits / gamma + shift)
    positive = xp.real(factor) > 0.0
    log_factor = xp.log(xp.where(positive & quantized, factor, 1.0))
    return xp.where(positive | ~quantized, log_factor, -np.inf)


def log_efficiency(p, x):
    """ln(N_eff / N): the sum of the operands' log factors. Broadcast shape of the bits columns and the parameters."""
    total = 0.0
    for name, (gamma, shift) in OPERANDS.items():
        if gamma in p:
            bits = namespace(x[name]).asarray(x[name])
            total = total + _log_factor(bits, p[gamma], p.get(shift, 0.0))
    return total


def log_terms(p, x):
    """Logs of N_eff^-alpha, D^-beta and 1."""
    xp = namespace(x["N"])
    return -p["alpha"] * (xp.log(x["N"]) + log_efficiency(p, x)), -p["beta"] * xp.log(x["D"]), 0.0


def bits_of(columns):
    """The three bits columns, absent ones at infinity, as float64 arrays. ValueError for another name."""
    unknown = next((name for name in columns if name not in OPERANDS), None)
    if unknown:
        raise ValueError(f"{unknown}={columns[unknown]}: unknown; the widths are {', '.join(OPERANDS)}")
    return {name: np.asarray(columns.get(name, np.inf), dtype=np.float64) for name in OPERANDS}


def efficiency(p, **bits):
    """N_eff / N at the given weights_bits, activations_bits, kv_bits. Dimensionless, 0 where the law diverges."""
    return np.exp(log_efficiency(p, bits_of(bits)))


def loss_gap(p, N, D=None, **bits):
    """Loss at the given bits minus the loss of the unquantized model of the same N, the same at any D. Nats per token; inf where it diverges."""
    with np.errstate(over="ignore"):
        return p["A"] * N ** -p["alpha"] * np.expm1(-p["alpha"] * log_efficiency(p, bits_of(bits)))


def _fitted_bits(p, bits):
    """The same width for every operand that the constants know of."""
    return {name: bits for name, (gamma, _) in OPERANDS.items() if gamma in p}


def bits_for_gap(p, N, gap):
    """Smallest common width (a real number of bits) of all fitted operands whose loss gap at size N is at most `gap` nats per token.

    The gap falls monotonically in the width, so bisection to 1e-9 bit on [0, 32] finds it.
    """
    low, high = 0.0, FULL_BITS
    while high - low > 1e-9:
        middle = 0.5 * (low + high)
        low, high = (low, middle) if loss_gap(p, N, **_fitted_bits(p, middle)) <= gap else (middle, high)
    return high


def _maximise(f, low, high, points=4001, rounds=4):
    """Argmax of f (vectorised, -inf allowed) on [low, high] by a grid refined around its best point."""
    for _ in range(rounds):
        grid = np.linspace(low, high, points)
        best = int(np.argmax(f(grid)))
        low, high = grid[max(best - 1, 0)], grid[min(best + 1, points - 1)]
    return float(grid[best])


def optimal_bits(p):
    """The width P* of all fitted operands that minimises the loss at a fixed cost C = (6/16) N D P, with N and D free. Bits.

    Minimising over N and D first leaves L - E proportional to (F(P) C/P)^(-alpha beta/(alpha+beta)) with F = N_eff/N, so P*
    maximises F(P)/P whatever C, alpha and beta are (Kumar et al. 2024, section 4.3 and App. E, show it for alpha = beta). Where one operand
    alone is known, this too is as if the cost followed its width; `scaling.plan` charges the wider of weights and activations.
    """
    return _maximise(lambda bits: log_efficiency(p, bits_of(_fitted_bits(p, bits))) - np.log(bits), 0.05, FULL_BITS - 1e-6)


def optimal_bits_at_size(p, N, compute):
    """The width that minimises the loss when N is fixed and D = 16 C / (6 N P) shrinks as the width grows. Bits; `compute` in FLOP."""
    def negative_loss(bits):
        tokens = 16.0 * compute / (6.0 * N * bits)
        with np.errstate(over="ignore"):
            small = p["A"] * np.exp(-p["alpha"] * (math.log(N) + log_efficiency(p, bits_of(_fitted_bits(p, bits)))))
        return -(small + p["B"] * tokens ** -p["beta"])
    return _maximise(negative_loss, 0.05, FULL_BITS - 1e-6)


def optimal_tokens_per_param(p, compute, bits=16.0):
    """D/N at the optimum for `compute` FLOP when all fitted operands have `bits` and C = (6/16) N D bits. Tokens per parameter."""
    effective = dict(p) | {"A": p["A"] * efficiency(p, **_fitted_bits(p, bits)) ** -p["alpha"]}
    return chinchilla.optimal_tokens_per_param(effective, compute, cost_per_pair=6.0 * bits / 16.0)


kumar = Law(
    name="kumar",
    aliases=("precision",),
    about="L = A/(N prod_x(1 - exp(-P_x/gamma_x + n_x)))^alpha + B/D^beta + E",
    cite="Kumar et al. 2024, arXiv 2411.04330",
    inputs=("N", "D", *OPERANDS),
    parameters=(
        amplitude("A"), amplitude("B"), amplitude("E", "nats/token"), exponent("alpha"), exponent("beta"),
        *(part for gamma, shift in OPERANDS.values() for part in (scale(gamma, 0.1, 20.0, "bits", start=(0.3, 6.0)),
                                                                  offset(shift, 0.0, 8.0, start=(0.0, 2.5))))),
    log_terms=log_terms,
    operands=tuple(Operand(name, parameters, FULL_BITS) for name, parameters in OPERANDS.items()),
    published={"kumar": {"A": 4299.0, "B": 18060.0, "E": 2.7648, "alpha": 0.4965, "beta": 0.4965, "gamma_w": 2.6745, "n_w": 0.3037,
                         "gamma_a": 2.2102, "n_a": 1.4072, "gamma_kv": 0.9578, "n_kv": 2.4185}},
    sources={"kumar": "Table 2 (alpha = beta tied); 465 runs, N 30M-220M, D 1.5B-26B, P 3-12 bits. Sign of n not printed: + is the one "
                      "consistent with the paper's P* and its divergence at 3 bits. The authors say that the numbers do not transfer"},
    validity={"kumar": {"N": (30e6, 220e6), "D": (1.5e9, 26e9)} | {name: (3.0, 12.0) for name in OPERANDS}},
    functionals={"optimal_bits": optimal_bits, "optimal_bits_at_size": optimal_bits_at_size, "efficiency": efficiency,
                 "loss_gap": loss_gap, "bits_for_gap": bits_for_gap, "optimal_tokens_per_param": optimal_tokens_per_param,
                 "optimal_exponent": chinchilla.optimal_exponent, "irreducible_loss": chinchilla.irreducible_loss},
    answers={"optimal_bits": "weights_bits", "optimal_bits_at_size": "weights_bits", "bits_for_gap": "weights_bits"},
    variants={"tied": {"ties": {"beta": "alpha"}}, "plain": {"fixed": {"n_w": 0.0, "n_a": 0.0, "n_kv": 0.0}}},
)
