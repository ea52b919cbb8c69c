"""The three sentences that `bitlaw demo` ends with: what low precision costs, which bits suffice, how far off the held-out prediction was.

Each carries its interval, and none states a number that the design does not identify: then it says so, and what was measured instead.
"""
from __future__ import annotations

import math

from scaling.inputs import lacking
from scaling.result import Estimate, Fit
from scaling.statistics import UNQUANTIZED_BITS, Gap, Noise, Run, finished_runs, paired_gaps, reference_precision, seed_noise
from scaling.table import Source
from scaling.table import table as as_table

TOLERANCE = 0.01  # nats per token: what counts as no loss where there are no seeds to tell
MAX_TOLD = 8  # precisions in a sentence
MIN_SEED_DOF = 4  # below, the deviation between seeds is itself uncertain by more than 40 %


def summary(fit_chinchilla: Fit | None, fit_precision: Fit | None, table: Source) -> list[str]:
    """Three sentences. fit_precision: a kumar fit or None; table: the runs that were fitted (see `scaling.table`)."""
    runs = finished_runs(as_table(table))
    if not runs:
        return ["What low precision costs: no finished runs to tell.", "Which bits suffice: no finished runs to tell.",
                "How far off the prediction was: no finished runs to tell."]
    largest = max(run.n_params for run in runs)
    return [cost_sentence(fit_precision, runs, largest), bits_sentence(fit_precision, runs, largest, seed_noise(runs)),
            held_out_sentence(fit_precision or fit_chinchilla, runs)]


def cost_sentence(fit: Fit | None, runs: list[Run], n_params: float) -> str:
    """Loss gap of every trained precision against the reference, by the law at one size, or as measured."""
    reference = reference_precision(runs)
    if reference is None or not any(run.quantized for run in runs):
        return "What low precision costs: cannot be told, since there are no runs both with and without quantization."
    at_size, everywhere = paired_gaps(runs, n_params), {gap.precision: gap for gap in paired_gaps(runs)}
    measured = {gap.precision: gap for gap in at_size}
    by_law, by_pairs = [], []
    for name, gap in everywhere.items():
        widths = _law_widths(fit, [run for run in runs if run.precision == name]) if fit else None
        estimate = _estimate(fit, "loss_gap", N=n_params, **widths) if widths else None
        if estimate is not None and estimate.identified:
            form = _form(estimate.low, estimate.high)
            also = f"; measured {measured[name].mean:{form}}" if name in measured else ""
            by_law.append(f"{name} {estimate.value:{form}} ({estimate.low:{form}} to {estimate.high:{form}}{also})")
        else:
            by_pairs.append(_measured(gap))
    told = []
    if by_law:
        told.append(f"{_some(by_law)} (at {n_params:,.0f} parameters, by the fitted law with its {fit.level:.0%} interval)")
    if by_pairs:
        told.append(f"{_some(by_pairs)} (mean over matched runs with its 95% interval; no law tells it here)")
    if not told:
        return f"What low precision costs: cannot be told, since no quantized run has a {reference} run of its size, tokens, seed and settings."
    return f"What low precision costs: in nats per token over {reference}, {' and '.join(told)}."


def _estimate(fit: Fit | None, name: str, **columns) -> Estimate | None:
    """A number that follows from a law of widths; None for a law that has none, or that asks for more than these columns."""
    if fit is None or name not in fit.law.functionals or not fit.at_width(1.0):
        return None
    return None if lacking(fit.law, name, columns) else fit.estimate(name, **columns)


def _law_widths(fit: Fit, runs: list[Run]) -> dict[str, float] | None:
    """The widths of one precision as the law takes them, or None where it has no one answer: its runs differ in them, or their narrowest
    operand is one that the law does not see (output gradients)."""
    inputs = list(fit.at_width(1.0))
    if not inputs:
        return None
    found = {tuple(run.widths[name] for name in inputs) for run in runs}
    if len(found) != 1 or min(widths := found.pop()) != runs[0].bits:
        return None
    return dict(zip(inputs, widths, strict=True))


def bits_sentence(fit: Fit | None, runs: list[Run], n_params: float, noise: Noise | None) -> str:
    """The smallest width whose gap is within the noise between seeds, or within TOLERANCE where there are too few seeds."""
    limit, name = noise_level(noise)
    within = f"{limit:.2g} nats per token ({name})"
    trained = sorted({run.bits for run in runs if run.quantized})
    if not trained or reference_precision(runs) is None:
        return "Which bits suffice: cannot be told, since there are no runs both with and without quantization."
    estimate = _estimate(fit, "bits_for_gap", N=n_params, gap=limit)
    if estimate is not None and estimate.value < trained[0]:
        narrowest = fit.estimate("loss_gap", N=n_params, **fit.at_width(trained[0]))
        if narrowest.identified and narrowest.high <= limit:
            return (f"Which bits suffice: all that were trained; already at {trained[0]:g} bits the loss is {narrowest.value:+.4f} "
                    f"({narrowest.low:+.4f} to {narrowest.high:+.4f}), within {within}.")
    if estimate is None or not estimate.identified:
        products = {run.precision for run in runs if min(run.widths["weights_bits"], run.widths["activations_bits"]) < UNQUANTIZED_BITS}
        why = estimate.reason if estimate else f"{fit.label} tells no width" if fit else "no precision law was fitted"
        return _measured_bits([gap for gap in paired_gaps(runs) if gap.precision in products], limit, within, why)
    enough = math.ceil(estimate.high - 1e-9)
    beyond = f", wider than the {trained[-1]:g} bits trained, so an extrapolation" if enough > trained[-1] else ""
    return (f"Which bits suffice: {enough} bits{beyond}; at {n_params:,.0f} parameters the gap falls within {within} at "
            f"{estimate.value:.1f} bits ({fit.level:.0%} interval {estimate.low:.1f} to {estimate.high:.1f}).")


def noise_level(noise: Noise | None) -> tuple[float, str]:
    """(gap that counts as none, what it is): the deviation between seeds, or TOLERANCE where there are too few seeds to know it."""
    if noise is not None and noise.dof >= MIN_SEED_DOF:
        return noise.sd, f"the noise between seeds, {noise.dof} degrees of freedom"
    return TOLERANCE, "a stated tolerance: too few seeds to measure their noise"


def held_out_sentence(fit: Fit | None, runs: list[Run]) -> str:
    """The error of the predictions for the held-out runs, with the interval of its mean and the coverage of theirs."""
    if fit is None:
        return "How far off the prediction was: no law could be fitted, so nothing was predicted."
    score = fit.metrics["held_out"]
    if not score:
        return "How far off the prediction was: nothing was held out (fewer than three sizes), so it was not tested."
    if score["covered"] is None:
        return (f"How far off the prediction was: not stated; the design does not identify the law "
                f"(condition number {fit.metrics['condition_number']:.1e}).")
    interval = f"95% interval {score['bias_low']:+.3f} to {score['bias_high']:+.3f}" if score["rows"] > 1 else "one run, so no interval"
    return (f"How far off the prediction was: the {score['rows']} run{'s' * (score['rows'] > 1)} at {max(run.n_params for run in runs):,.0f} "
            "parameters, held out, "
            f"came out {abs(score['bias_nats']):.3f} nats per token {'below' if score['bias_nats'] > 0 else 'above'} the prediction on average "
            f"(mean error {score['bias_nats']:+.3f}, {interval}; root mean square "
            f"{score['rmse_nats']:.3f}, {score['rmse']:.1%} of the loss); {score['covered'] * score['rows']:.0f} of {score['rows']} fell in "
            f"their {fit.level:.0%} prediction interval (±{score['half_width']:.3f}).")


def _some(told: list[str]) -> str:
    """The first few, and how many more there are."""
    more = len(told) - MAX_TOLD
    return ", ".join(told) if more <= 1 else f"{', '.join(told[:MAX_TOLD])}, and {more} more precisions, which the report's gallery shows"


def _form(low: float, high: float) -> str:
    """Format of a number of nats: as many decimals as its interval deserves."""
    return "+.4f" if high - low < 5e-3 else "+.3f"


def _measured(gap: Gap) -> str:
    if math.isnan(gap.low):
        return f"{gap.precision} {gap.mean:+.3f} (one pair, no interval)"
    form = _form(gap.low, gap.high)
    return f"{gap.precision} {gap.mean:{form}} ({gap.low:{form}} to {gap.high:{form}}, {len(gap.values)} pairs)"


def _measured_bits(gaps: list[Gap], limit: float, within: str, reason: str) -> str:
    """The answer from matched runs alone: the narrowest precision whose whole interval is within the limit."""
    enough = [gap for gap in gaps if not math.isnan(gap.high) and gap.high <= limit]
    told = f"by the law: {reason}"
    if not enough:
        return f"Which bits suffice: none of those trained is within {within} with its whole interval ({told})."
    gap = enough[0]
    return (f"Which bits suffice: {gap.precision}, the narrowest whose measured gap is within {within}: {gap.mean:+.4f} "
            f"({gap.low:+.4f} to {gap.high:+.4f}, {len(gap.values)} pairs); {told}.")
