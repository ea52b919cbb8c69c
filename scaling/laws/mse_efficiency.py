"""Efficiency as a function of the quantizer's error on Gaussian data: one curve for all widths and formats, trained ones or not.

    L = A/(N eff)^alpha + B/D^beta + E,    eff = prod_x rho(mse_x),  x in weights, activations
    mse_efficiency        rho = exp(-c mse^kappa)
    mse_efficiency_tanh   rho = tanh(F (log_{1/4} mse)^C)          (after Panferov et al. 2025, arXiv 2506.01863, from memory)

mse is relative, E (q(x) - x)^2 / E x^2: `formats.gaussian_mse`. A format's name in the column stands for that number (`error_of`), and 0
(or no value) for an operand that is not quantized, whose factor is exactly 1.
"""
from __future__ import annotations

import functools
import math

import numpy as np

from scaling.laws import chinchilla
from scaling.laws.law import Law, namespace
from scaling.laws.parameters import BASELINES, Operand, exponent, scale

EXP = {"weights_mse": ("c_w", "kappa_w"), "activations_mse": ("c_a", "kappa_a")}
TANH = {"weights_mse": ("F_w", "C_w"), "activations_mse": ("F_a", "C_a")}


@functools.cache
def error_of(name: str) -> float:
    """The relative Gaussian error of the format called `name`, 0 for a baseline's (bf16, fp32, none, ...). ValueError, one line, for an unknown one.

    An element format has no scale of its own ("int4" rounds to whole numbers), so it gets an exact one per channel, a row of 1024 values:
    another granularity has another error, which the caller then gives as a number.
    """
    if name.lower() in BASELINES and not name.isdigit():
        return 0.0
    import formats  # needs JAX, which a column of numbers does not

    fmt = formats.get(name)
    if isinstance(fmt, formats.Scaled) or formats.gaussian_mse(fmt) == 0.0:
        return float(formats.gaussian_mse(fmt))
    return float(formats.gaussian_mse(formats.scaled(fmt, "channel", axis=0)))


def _log_exp(p, mse, names):
    return -p[names[0]] * namespace(mse).exp(p[names[1]] * namespace(mse).log(mse))


def _log_tanh(p, mse, names):
    xp = namespace(mse)
    depth = -xp.log(mse) / math.log(4.0)  # log_{1/4}: bits, for a quantizer that halves its error with each
    return xp.log(xp.tanh(p[names[0]] * xp.exp(p[names[1]] * xp.log(depth))))


def _terms(curve, operands):
    def log_efficiency(p, x):
        """ln(N_eff/N): 0 where nothing is quantized, -inf for an error as large as the data."""
        total = 0.0
        for name, names in operands.items():
            if names[0] in p:
                xp = namespace(x[name])
                mse = xp.asarray(x[name])
                inside = (mse > 0.0) & (mse < 1.0)
                total = total + xp.where(inside, curve(p, xp.where(inside, mse, 0.5), names), xp.where(mse >= 1.0, -np.inf, 0.0))
        return total

    def log_terms(p, x):
        xp = namespace(x["N"])
        return -p["alpha"] * (xp.log(x["N"]) + log_efficiency(p, x)), -p["beta"] * xp.log(x["D"]), 0.0

    def efficiency(p, **mse):
        """N_eff / N at the given weights_mse, activations_mse (numbers or names of formats). Dimensionless."""
        unknown = next((name for name in mse if name not in operands), None)
        if unknown:
            raise ValueError(f"{unknown}={mse[unknown]}: unknown; the errors are {', '.join(operands)}")
        numbers = {name: np.asarray(error_of(mse[name]) if isinstance(mse.get(name), str) else mse.get(name, 0.0), dtype=np.float64)
                   for name in operands}
        return np.exp(log_efficiency(p, numbers))

    def loss_gap(p, N, D=None, **mse):
        """Loss with these quantizers minus the unquantized loss at size N, the same at any D. Nats per token."""
        return p["A"] * N ** -p["alpha"] * (efficiency(p, **mse) ** -p["alpha"] - 1.0)

    return log_terms, {"efficiency": efficiency, "loss_gap": loss_gap}


def _law(name, about, curve, operands, parameters, source):
    log_terms, functionals = _terms(curve, operands)
    return Law(
        name=name, about=f"L = A/(N prod_x {about})^alpha + B/D^beta + E", cite="after Panferov et al. 2025, arXiv 2506.01863",
        inputs=("N", "D", *operands), parameters=(*chinchilla.chinchilla.parameters, *parameters), log_terms=log_terms,
        operands=tuple(Operand(column, names, 0.0, below=True, from_name=error_of) for column, names in operands.items()),
        sources={"none": source}, functionals=chinchilla.chinchilla.functionals | functionals,
        variants={"tied": {"ties": {"beta": "alpha"}}})


mse_efficiency = _law(
    "mse_efficiency", "exp(-c_x mse_x^kappa_x)", _log_exp, EXP,
    [part for c, kappa in EXP.values() for part in (scale(c, 0.01, 1000.0), exponent(kappa, 0.05, 2.5, held=0.5))],
    "none published: the curve is ours, chosen on the QuEST runs")
mse_efficiency_tanh = _law(
    "mse_efficiency_tanh", "tanh(F_x (log_(1/4) mse_x)^C_x)", _log_tanh, TANH,
    [part for f, c in TANH.values() for part in (scale(f, 0.01, 100.0), exponent(c, 0.05, 5.0, held=1.0))],
    "none here: the formula is from memory, and the three constants of Panferov et al. were not read")
