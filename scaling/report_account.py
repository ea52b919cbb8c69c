"""The end of "How these numbers were made" in a report: remarks on the design, and the checklist of (Mis)Fitting."""
from __future__ import annotations

import numpy as np

from scaling import page
from scaling.analysis import Analysis
from scaling.checklist import as_html, checklist
from scaling.design_checks import design_checks
from scaling.result import Fit


def account(analysis: Analysis) -> list[str]:
    """HTML pieces; none when nothing was fitted."""
    fit = analysis.fit_precision or analysis.fit_chinchilla
    if fit is None:
        return []
    remarks = [page.paragraph(f"Design: {remark}.", "note") for remark in design_checks(_fitted_columns(analysis, fit), fit)]
    return [*remarks, as_html(checklist(fit, analysis.relation))]


def _fitted_columns(analysis: Analysis, fit: Fit) -> dict[str, np.ndarray]:
    """Inputs of the rows that `fit` was fitted to: the largest size is what an analysis holds out."""
    runs = analysis.covered()
    if fit.metrics["held_out"]:
        largest = max(run.n_params for run in runs)
        runs = [run for run in runs if run.n_params < largest]
    columns = {"N": np.array([run.n_params for run in runs]), "D": np.array([run.tokens for run in runs])}
    return columns | {name: np.array([run.widths[name] for run in runs]) for name in fit.law.inputs if name not in columns}
