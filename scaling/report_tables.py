"""The tables of a report, and the account of how its numbers were made."""
from __future__ import annotations

import math

import numpy as np

from scaling import page
from scaling.analysis import Analysis
from scaling.compare import Comparison
from scaling.inputs import lacking
from scaling.result import MAX_CONDITION, Fit
from scaling.statistics import columns_of

FUNCTIONAL_NAMES = {"optimal_exponent": "a, in N_opt ∝ C^a", "optimal_bits": "compute-optimal width (bits)"}


def constants_table(fit: Fit, analysis: Analysis) -> str:
    """Every constant and derived number with its interval, or why it has none."""
    rows, classes = [], []
    for name in fit.params:
        if name in fit.ties:
            rows.append((name, f"= {fit.ties[name]}", "", "", "tied"))
        elif name in fit.fixed:
            rows.append((name, f"{fit.params[name]:g}", "", "", "held fixed"))
        else:
            rows.append((name, *_estimate_cells(fit.estimate(name)), fit.law.parameter(name).unit))
    for name, label in FUNCTIONAL_NAMES.items():
        by_tie = name == "optimal_exponent" and fit.ties.get("beta") == "alpha"  # then it is one half, whatever the data
        if name in fit.law.functionals and not lacking(fit.law, name) and not by_tie:
            rows.append((label, *_estimate_cells(fit.estimate(name)), ""))
    if fit.at_width(1.0) and "efficiency" in fit.law.functionals:
        for bits in sorted({run.bits for run in analysis.runs if math.isfinite(run.bits)}):
            estimate = fit.estimate("efficiency", **fit.at_width(bits))
            rows.append((f"N_eff/N, all operands at {bits:g} bits", *_estimate_cells(estimate), ""))
    return page.table(("", "value", f"{fit.level:.0%} interval", "rel. s.e.", ""), rows, (1, 3), classes)


def candidate_table(comparison: Comparison) -> str:
    """The candidates side by side: parameters, BIC, conditioning, held-out error."""
    rows, classes = [], []
    for fit in comparison.fits:
        score = fit.metrics["held_out"]
        rows.append((fit.label, len(fit.free), f"{fit.metrics['bic']:.1f}", f"{fit.metrics['rmse']:.2%}", f"{score['rmse']:.2%}" if score else "–",
                     f"{fit.metrics['condition_number']:.1e}", f"{fit.metrics['starts_agree']} of {fit.metrics['starts']}"))
        classes.append("chosen" if fit is comparison.best else "")
    rows += [(name, "–", "–", "–", "–", "–", why) for name, why in comparison.refused.items()]
    header = ("candidate", "parameters", "BIC", "rms residual", "held-out rms", "condition number", "starts that agree")
    return page.table(header, rows, (1, 2, 3, 4, 5), classes)


def held_out_table(fit: Fit, analysis: Analysis) -> list[str]:
    """Every held-out run: observed, predicted, interval, error."""
    largest = max(run.n_params for run in analysis.runs)
    runs = [run for run in analysis.covered() if run.n_params == largest]
    runs.sort(key=lambda run: (run.tokens, run.bits, run.precision, run.seed))
    if fit.metrics["condition_number"] > MAX_CONDITION:
        return [page.paragraph(f"Not stated: the design does not identify the law (condition number {fit.metrics['condition_number']:.1e}).")]
    losses = np.array([run.loss for run in runs])
    predicted = fit.predict(**analysis.inputs(fit, runs), extrapolate=True)
    rows, classes = [], []
    for i, run in enumerate(runs):
        inside = predicted.low[i] <= losses[i] <= predicted.high[i]
        rows.append((f"{run.n_params:,.0f}", f"{run.tokens:,.0f}", run.precision, run.seed, f"{losses[i]:.4f}", f"{predicted.loss[i]:.4f}",
                     f"{predicted.low[i]:.4f} to {predicted.high[i]:.4f}", f"{predicted.loss[i] - losses[i]:+.4f}", "yes" if inside else "no"))
        classes.append("" if inside else "bad")
    header = ("parameters", "tokens", "precision", "seed", "observed", "predicted", f"{fit.level:.0%} interval", "error", "inside")
    text = (f"Predicted by {fit.label}, fitted without these {len(runs)} runs of the largest size. Losses in nats per token; error is predicted "
            "minus observed; the interval is for a single run.")
    return [page.paragraph(text, "note"), page.table(header, rows, (0, 1, 3, 4, 5, 7), classes)]


def gap_table(analysis: Analysis) -> list[str]:
    """Noise between seeds, and the mean gap of every precision over all matched pairs."""
    noise = analysis.noise
    parts = [page.paragraph(f"Final losses of runs that differ in seed alone have a standard deviation of {noise.sd:.4f} nats per token "
                            f"({noise.groups} groups, {noise.dof} degrees of freedom)." if noise else
                            "No two runs differ in seed alone, so the noise between seeds is unknown.", "note")]
    if not analysis.gaps:
        return parts
    rows = [(gap.precision, f"{gap.bits:g}", len(gap.values), f"{gap.mean:+.4f}",
             "one pair" if math.isnan(gap.low) else f"{gap.low:+.4f} to {gap.high:+.4f}", f"{min(gap.values):+.4f}", f"{max(gap.values):+.4f}")
            for gap in analysis.gaps]
    header = ("precision", "bits", "pairs", f"mean gap to {analysis.reference}", "95% interval of the mean", "smallest", "largest")
    note = ("Pairs match in size, tokens, seed, data, batch, learning rate and schedule; nats per token. The gap depends on size and "
            "tokens, so the mean is over this design.")
    return [*parts, page.table(header, rows, (1, 2, 3, 5, 6)), page.paragraph(note, "note")]


def run_table(analysis: Analysis) -> str:
    """Every run of the table, those that diverged or failed first."""
    wanted = ("run_id", "status", "n_params", "tokens", "precision", "seed", "loss", "loss_std_err", "bits_per_byte", "tokens_per_s", "wall_s",
              "diverged_step")
    records = columns_of(analysis.whole.project(", ".join(wanted)))
    rows = list(zip(*records.values(), strict=True))
    rows.sort(key=lambda row: (row[1] == "done", row[2] or 0, row[3] or 0, str(row[4]), row[5] or 0))
    cells, classes = [], []
    for run_id, status, n, tokens, precision, seed, loss, error, bits, speed, wall, step in rows:
        state = f"{status} at step {step}" if status == "diverged" and step is not None else status
        value = _number(loss, ".4f") + (f" ± {error:.4f}" if loss is not None and error is not None else "")
        cells.append((run_id, state or "–", _number(n, ",.0f"), _number(tokens, ",.0f"), precision or "–", _number(seed, ".0f"), value,
                      _number(bits, ".3f"), _number(speed, ",.0f"), _number(wall, ",.1f")))
        classes.append("" if status in ("done", None) else "bad")
    header = ("run", "status", "parameters", "tokens", "precision", "seed", "loss ± s.e.", "bits/byte", "tokens/s", "seconds")
    return page.table(header, cells, (2, 3, 5, 6, 7, 8, 9), classes)


def method_notes(analysis: Analysis) -> list[str]:
    """How fits, intervals and choices were made, with the figures that a reviewer asks for."""
    fit = analysis.fit_precision or analysis.fit_chinchilla
    if fit is None:
        return [page.paragraph("No law was fitted; measured gaps are means over matched runs with Student intervals.", "note")]
    m = fit.metrics
    rule = f"Huber losses (delta {m['delta']:g})" if m["loss"] == "huber" else "squares"
    dropped = "".join(f"; {count} rows dropped ({reason})" for reason, count in m["dropped"].items()) or "; none dropped"
    texts = [
        f"Objective: the sum of {rule} of ln predicted − ln observed over {m['rows']} runs{dropped}. Starts cover the exponents with the "
        f"amplitudes projected out; {m['starts_agree']} of {m['starts']} polished starts agree on the optimum ({m['objective']:.6g}, gradient "
        f"{m['gradient_norm']:.1e}). Parameters counted are non-embedding; losses are nats per token on the fixed validation set.",
        "Intervals of constants: the hull of the linearised covariance (price of the Huber loss included) and "
        f"{m['bootstrap']} bootstrap refits that reweight whole (N, D) cells. A number whose relative standard error exceeds 50%, or any number "
        f"of a design with a condition number above {MAX_CONDITION:.0e}, is called not identified and not printed.",
        f"Intervals of predictions add the scatter of runs about the law ({m['residual_sd']:.2%}) and, outside the fitted range, the law's own "
        f"discrepancy there ({m['discrepancy']:.2%} at a factor of 2.7, growing with the root of the factor's logarithm): what the errors of refits "
        "on the smaller runs that predict the larger ones exceed that scatter and the refits' own uncertainty by. The held-out "
        "runs chose nothing and widened nothing in the intervals shown for them.",
        f"Law: {fit.law.cite}."]
    return [page.paragraph(text, "note") for text in texts]


def _estimate_cells(estimate) -> tuple[str, str, str]:
    """(value, interval, relative standard error); an unidentified number is not shown."""
    if not estimate.identified:
        return "–", estimate.reason, ""
    return f"{estimate.value:.4g}", f"{estimate.low:.4g} to {estimate.high:.4g}", f"{estimate.relative_se:.1%}"


def _number(value, spec: str) -> str:
    return "–" if value is None or (isinstance(value, float) and not math.isfinite(value)) else format(value, spec)
