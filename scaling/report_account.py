"""The end of "How these numbers were made" in a report: remarks on the design, and the checklist of (Mis)Fitting."""
from __future__ import annotations

from scaling import page
from scaling.analysis import Analysis
from scaling.checklist import as_html, checklist
from scaling.design_checks import design_checks
from scaling.result import Fit
from scaling.statistics import Run


def account(analysis: Analysis) -> list[str]:
    """HTML pieces; none when nothing was fitted."""
    fit = analysis.fit_precision or analysis.fit_chinchilla
    if fit is None:
        return []
    remarks = [page.paragraph(f"Design: {remark}.", "note") for remark in design_checks(analysis.inputs(fit, _fitted_runs(analysis, fit)), fit)]
    return [*remarks, as_html(checklist(fit, analysis.relation))]


def _fitted_runs(analysis: Analysis, fit: Fit) -> list[Run]:
    """Those that `fit` was fitted to: the largest size is what an analysis holds out."""
    runs = analysis.covered()
    if fit.metrics["held_out"]:
        largest = max(run.n_params for run in runs)
        runs = [run for run in runs if run.n_params < largest]
    return runs
