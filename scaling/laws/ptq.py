"""What post-training quantization of the weights to P_post bits adds to the loss.

kumar_ptq      trained unquantized: delta = C_T D^gamma_D / N^gamma_N exp(-P_post/gamma_post + n_post)      (Kumar et al. 2024, Eq. 4)
kumar_unified  trained in P_x bits: the same with N_eff for N, times prod_x (1 - exp(-C_x (P_x - P_post)))   (Kumar et al. 2024, Eq. 9)
ptq_power      delta = k D^gamma_D / (N^gamma_N P_post^gamma_P): the gap alone, no base law                  (Ouyang et al. 2024)

A row that is not quantized after training has no `ptq_bits` (or 32 and more): its delta is exactly 0.
The offset n_post only rescales C_T exp(n_post), so fits hold it at 0; predictions with published constants use it.
"""
from __future__ import annotations

import numpy as np

from scaling.laws import chinchilla
from scaling.laws.kumar import OPERANDS, bits_of, kumar, log_efficiency
from scaling.laws.law import Law, namespace
from scaling.laws.parameters import FULL_BITS, WIDTHS, Operand, amplitude, exponent, offset, scale


def _log_gap(p, x, log_N):
    """ln of delta / C_T; -inf where nothing is quantized after training."""
    xp = namespace(x["D"])
    bits = xp.asarray(x["ptq_bits"])
    quantized = bits < FULL_BITS
    log_gap = p["gamma_D"] * xp.log(x["D"]) - p["gamma_N"] * log_N - xp.where(quantized, bits, 1.0) / p["gamma_post"] + p.get("n_post", 0.0)
    return xp.where(quantized, log_gap, -np.inf)


def ptq_log_terms(p, x):
    """Logs of N^-alpha, D^-beta, 1 and the gap per C_T."""
    log_N = namespace(x["N"]).log(x["N"])
    return (*chinchilla.log_terms(p, x), _log_gap(p, x, log_N))


def _log_robustness(p, x):
    """ln prod_x (1 - exp(-C_x (P_x - P_post))), clipped at 0 from below: weights trained in no more bits than they end in lose nothing."""
    xp = namespace(x["D"])
    total = 0.0
    for name, constant in ROBUSTNESS.items():
        if constant in p:
            trained, after = xp.asarray(x[name]), xp.asarray(x["ptq_bits"])
            low = trained < FULL_BITS
            distance = xp.where(low & (trained > after), xp.where(low, trained, 1.0) - xp.where(after < FULL_BITS, after, 1.0), 1.0)
            factor = xp.log(-xp.expm1(-p[constant] * distance))
            total = total + xp.where(low, xp.where(trained > after, factor, -np.inf), 0.0)
    return total


def unified_log_terms(p, x):
    """Logs of N_eff^-alpha, D^-beta, 1 and the gap per C_T of a model trained in low precision."""
    xp = namespace(x["N"])
    log_N = xp.log(x["N"]) + log_efficiency(p, x)
    gap = _log_gap(p, x, log_N) + _log_robustness(p, x)
    return -p["alpha"] * log_N, -p["beta"] * xp.log(x["D"]), 0.0, xp.where(xp.isfinite(xp.real(gap)), gap, -np.inf)


def loss_gap(p, N, D, ptq_bits):
    """delta of a model trained unquantized. Nats per token."""
    return p["C_T"] * D ** p["gamma_D"] / N ** p["gamma_N"] * np.exp(-ptq_bits / p["gamma_post"] + p.get("n_post", 0.0))


def critical_tokens(p, N, ptq_bits):
    """D_crit: tokens beyond which more data raises the loss after quantization to `ptq_bits` (Kumar et al. 2024, Eq. 13)."""
    log_gap = np.log(p["C_T"]) - ptq_bits / p["gamma_post"] + p.get("n_post", 0.0) - p["gamma_N"] * np.log(N)
    return _turning_point(p, log_gap)


def _turning_point(p, log_gap):
    """The D at which B D^-beta falls as fast as the gap rises, which is exp(log_gap) at one token and grows as D^gamma_D."""
    with np.errstate(over="ignore"):
        return np.exp((np.log(p["beta"] * p["B"] / p["gamma_D"]) - log_gap) / (p["gamma_D"] + p["beta"]))


def unified_critical_tokens(p, N, ptq_bits, **bits):
    """D_crit of a model trained in `bits` (weights_bits, activations_bits, kv_bits; absent: unquantized): tokens beyond which more data
    raises the loss after quantization to `ptq_bits`. Kumar et al. print it for unquantized training alone (Eq. 13); this is the same
    minimum over D, with N_eff for N and C_T times the robustness. inf where quantization costs nothing, NaN where training diverges.
    ValueError for a width whose C_x the constants lack: the published ones were never printed.
    """
    x = bits_of(bits) | {"N": np.float64(N), "D": np.float64(1.0), "ptq_bits": np.float64(ptq_bits)}
    lacking = next((name for name in bits if ROBUSTNESS[name] not in p and (x[name] < FULL_BITS).any()), None)
    if lacking:
        raise ValueError(f"critical_tokens needs {ROBUSTNESS[lacking]} for {lacking} below {FULL_BITS:g}; these constants have {', '.join(p)}")
    tokens = _turning_point(p, np.log(p["C_T"]) + unified_log_terms(p, x)[3])  # the terms at one token
    return np.where(np.isneginf(log_efficiency(p, x)), np.nan, tokens)[()]


def power_gap(p, N, D, ptq_bits):
    """delta of Ouyang et al. Nats per token."""
    return p["k"] * D ** p["gamma_D"] / (N ** p["gamma_N"] * ptq_bits ** p["gamma_P"])


ROBUSTNESS = dict(zip(WIDTHS, ("C_w", "C_a", "C_kv"), strict=True))
_GAP = (amplitude("C_T"), exponent("gamma_D"), exponent("gamma_N", 0.0), scale("gamma_post", 0.05, 20.0, "bits"))
_BASE = chinchilla.chinchilla.parameters
_TRAINED = {"N": (30e6, 220e6), "D": (1.5e9, 26e9)}
_KUMAR_GAP = {"C_T": 0.0598, "gamma_D": 0.5068, "gamma_N": 0.3439, "gamma_post": 0.5907}

kumar_ptq = Law(
    name="kumar_ptq",
    about="L = A/N^alpha + B/D^beta + E + C_T D^gamma_D/N^gamma_N exp(-P_post/gamma_post)",
    cite="Kumar et al. 2024, arXiv 2411.04330, Eq. 4",
    inputs=("N", "D", "ptq_bits"),
    parameters=_BASE[:3] + _GAP[:1] + _BASE[3:] + _GAP[1:],
    log_terms=ptq_log_terms,
    operands=(Operand("ptq_bits", ("C_T", "gamma_post"), FULL_BITS, also=("gamma_N", "gamma_D")),),
    published={"kumar": {name: kumar.published["kumar"][name] for name in ("A", "B", "E", "alpha", "beta")} | _KUMAR_GAP | {"n_post": 1.1277},
               "kumar_no_offset": {name: kumar.published["kumar"][name] for name in ("A", "B", "E", "alpha", "beta")} | _KUMAR_GAP},
    sources={"kumar": "Table 2 with its offset b = 1.1277, whose sign is not printed: + as in the training law, a reading",
             "kumar_no_offset": "Table 2 without the offset"},
    validity={name: _TRAINED for name in ("kumar", "kumar_no_offset")},
    functionals=chinchilla.chinchilla.functionals | {"loss_gap": loss_gap, "critical_tokens": critical_tokens},
    variants={"tied": {"ties": {"beta": "alpha"}}},
)

kumar_unified = Law(
    name="kumar_unified",
    about="L = A/N_eff^alpha + B/D^beta + E + C_T D^gamma_D/N_eff^gamma_N exp(-P_post/gamma_post) prod_x(1 - exp(-C_x (P_x - P_post)))",
    cite="Kumar et al. 2024, arXiv 2411.04330, Eq. 9",
    inputs=("N", "D", *OPERANDS, "ptq_bits"),
    parameters=(*_BASE[:3], _GAP[0], *kumar.parameters[3:], *_GAP[1:],
                *(scale(name, 1e-3, 50.0, "1/bits") for name in ROBUSTNESS.values())),
    log_terms=unified_log_terms,
    operands=(*(Operand(name, parameters, FULL_BITS, also=(ROBUSTNESS[name],)) for name, parameters in OPERANDS.items()),
              Operand("ptq_bits", ("C_T", "gamma_post"), FULL_BITS, also=("gamma_N", "gamma_D", *ROBUSTNESS.values()))),
    published={"kumar": dict(kumar.published["kumar"]) | _KUMAR_GAP},
    sources={"kumar": "Table 2. The three C_x were fitted but never printed, so only unquantized training can be predicted with a gap; the sign "
                      "of the post-training offset is not printed and it is left out"},
    validity={"kumar": _TRAINED | {name: (3.0, 12.0) for name in OPERANDS}},
    functionals=kumar.functionals | {"ptq_gap": loss_gap, "critical_tokens": unified_critical_tokens},
    answers=kumar.answers,
    variants={"tied": {"ties": {"beta": "alpha"}}, "plain": {"fixed": {"n_w": 0.0, "n_a": 0.0, "n_kv": 0.0}}},
)

ptq_power = Law(
    name="ptq_power",
    about="gap = k D^gamma_D / (N^gamma_N P_post^gamma_P)",
    cite="Ouyang et al. 2024, arXiv 2411.17691",
    inputs=("N", "D", "ptq_bits"),
    parameters=(amplitude("k"), exponent("gamma_D"), exponent("gamma_N"), exponent("gamma_P", 0.05, 15.0)),
    log_terms=lambda p, x: (p["gamma_D"] * namespace(x["D"]).log(x["D"]) - p["gamma_N"] * namespace(x["N"]).log(x["N"])
                            - p["gamma_P"] * namespace(x["ptq_bits"]).log(x["ptq_bits"]),),
    published={"ouyang": {"k": 0.017, "gamma_D": 0.5251, "gamma_N": 0.2261, "gamma_P": 5.4967}},
    sources={"ouyang": "GPTQ to 2, 3, 4 bits. `loss` is the gap to the unquantized model, nats per token. The paper's Table 1 of token counts "
                       "does not follow from these constants. The range of D is from a secondary source, a summary of the paper"},
    validity={"ouyang": {"N": (160e6, 12e9), "D": (1e9, 206e9), "ptq_bits": (2.0, 4.0)}},
    functionals={"loss_gap": power_gap},
)
