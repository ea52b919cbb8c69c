"""`scaling.report`: a folder of runs as one self-contained HTML file: what was found, the figures, the constants, the runs.

Every section stands on its own: a folder with one size, one precision or nothing but diverged runs gives a shorter report that says
what is missing and why, never an error.
"""
from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from scaling import folders, page
from scaling.analysis import Analysis, analyse
from scaling.files import check_target, write_whole
from scaling.gallery import exhibits, table
from scaling.report_account import account
from scaling.report_figures import MIN_EXHIBITS, figures
from scaling.report_statistics import accuracy_section, search_section, variance_table
from scaling.report_tables import candidate_table, constants_table, gap_table, held_out_table, method_notes, run_table
from scaling.searches import TUNED
from scaling.statistics import columns_of
from scaling.summary import summary
from scaling.table import Source

MAX_LISTED = 60  # runs shown before the list is folded


def report(source: Source, out: str | os.PathLike, fits: Analysis | None = None, refresh: int | None = None, tuned: Sequence[str] = TUNED) -> Path:
    """Writes the report of `source` (a run folder or table) to the HTML file `out` and returns its path.

    fits: an `analyse(source)` that has been made already. refresh: seconds after which the page loads itself anew. tuned: columns
    that a search went over, whose best of k is then shown. ValueError, one line, when the source is no run table or `out` cannot
    be.
    """
    check_target(out)
    analysis = fits or analyse(source)
    body = [*_head(analysis, _unfinished(source)), *figures(analysis, source, tuned), *_tables(analysis, tuned)]
    text = page.page(_title(analysis), body, refresh)
    return write_whole(out, lambda partial: partial.write_text(text, encoding="utf-8"))


def _title(analysis: Analysis) -> str:
    sweeps = sorted({str(name) for name in columns_of(analysis.whole.project("sweep"))["sweep"] if name})
    return "Loss and precision" + (f": {', '.join(sweeps[:3])}" + (" and others" if len(sweeps) > 3 else "") if sweeps else "")


def _unfinished(source: Source) -> int:
    return folders.unfinished(Path(source)) if isinstance(source, (str, os.PathLike)) and os.path.isdir(source) else 0


def _head(analysis: Analysis, left: int) -> list[str]:
    """Title, provenance, the three sentences, key figures, and whatever a reader must know before trusting them."""
    records = columns_of(analysis.whole)
    states = records["status"]
    distinct = {name: sorted({str(v) for v in records[name] if v is not None}) for name in ("data", "device", "jax_version", "code_version")}
    meta = [f"{len(states)} runs", *(f"{name.replace('_', ' ')} {', '.join(values)}" for name, values in distinct.items() if values)]
    fit = analysis.fit_precision or analysis.fit_chinchilla
    score = fit.metrics["held_out"] if fit else None
    sizes, budgets = {run.n_params for run in analysis.runs}, {run.tokens for run in analysis.runs}
    bad = {state: sum(s == state for s in states) for state in ("diverged", "failed")}
    key_figures = [(f"{len(analysis.runs)} of {len(states)}", "runs analysed"),
               (f"{len(sizes)} × {len(budgets)} × {len({run.precision for run in analysis.runs})}", "sizes × budgets × precisions"),
               (f"{fit.metrics['condition_number']:.1e}" if fit else "–", "condition number of the fit"),
               (f"{score['rmse']:.1%}" if score else "–", "held-out error (rms, of the loss)"),
               (f"{analysis.noise.sd:.4f}" if analysis.noise else "–", "seed noise (nats/token, sd)")]
    parts = [f"<h1>{page.escape(_title(analysis))}</h1>", page.paragraph(" · ".join(meta), "meta"),
             page.summary_box(summary(analysis.fit_chinchilla, analysis.fit_precision, analysis.relation)), page.facts(key_figures)]
    for state, count in bad.items():
        if count:
            named = [str(name) for name, s in zip(records["run_id"], states, strict=True) if s == state]
            shown = ", ".join(named[:8]) + (f" and {count - 8} more" if count > 8 else "")
            parts.append(f'<p class="note alert">{count} run{"s" * (count > 1)} {state}: {page.escape(shown)}. '
                         "They are in no fit and in no figure of final losses.</p>")
    if left:
        parts.append(page.paragraph(f"{left} run{'s' * (left > 1)} of {left + len(states)} {'are' if left > 1 else 'is'} not over yet.",
                                    "note alert"))
    parts += [page.paragraph(f"No {name} fit: {why}.", "note") for name, why in analysis.why.items()]
    parts += [page.paragraph(f"Note: {note}.", "note") for note in analysis.notes]
    return parts


def _tables(analysis: Analysis, tuned: Sequence[str]) -> list[str]:
    """Constants, candidates, held-out runs, gaps, method and runs."""
    parts = []
    for comparison in filter(None, (analysis.precision, analysis.chinchilla)):
        fit = comparison.best
        parts += [f"<h2>Fitted constants: {page.escape(fit.label)}</h2>", f"<p><code>{page.escape(fit.law.about)}</code></p>",
                  constants_table(fit, analysis), page.paragraph(
                      f"Choice: {'; '.join((comparison.reason(), *fit.metrics['notes']))}.", "note"), candidate_table(comparison)]
    scored = next((fit for fit in (analysis.fit_precision, analysis.fit_chinchilla) if fit and fit.metrics["held_out"]), None)
    if scored:
        parts += ["<h2>Held-out predictions</h2>", *held_out_table(scored, analysis)]
    if analysis.gaps or analysis.noise:
        parts += ["<h2>Seed noise and matched gaps</h2>", *gap_table(analysis), *variance_table(analysis)]
    parts += [*search_section(analysis, tuned), *accuracy_section(analysis)]
    shown = exhibits(analysis.runs, analysis.relation)
    if len(shown) >= MIN_EXHIBITS:
        parts += ["<h2>Gallery of precisions</h2>", table(shown, analysis.reference), page.paragraph(
            "Gradient cosine and magnitude: of one batch's gradients against those in float32 at the end of a run; EDQ (effective descent "
            "quality, Collage) and updates lost: over the last quarter of the logged steps; means over the runs of a precision.", "note")]
    listing = run_table(analysis)
    num_runs = len(analysis.whole)
    parts += ["<h2>Runs</h2>", listing if num_runs <= MAX_LISTED else page.details(f"All {num_runs} runs", listing)]
    return [*parts, "<h2>How these numbers were made</h2>", *method_notes(analysis), *account(analysis)]
