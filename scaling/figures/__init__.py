"""Figures as a paper prints them: each a function of a `Fit` and the table it was fitted to that returns a matplotlib Figure, one column wide.

    from scaling import figures
    figures.loss_against_compute(fit, "runs.csv").savefig("frontier.pdf")

The table is read again through the fit's own columns and filters. Losses are nats per token, N parameters, D tokens, compute is 6 N D FLOP.
Held-out runs are hollow. ValueError, one line, when there is nothing to draw. `scaling.plots` has the figures of the report.
"""
from scaling.figures.budgets import isoflop, loss_against_compute
from scaling.figures.calibration import calibration
from scaling.figures.errors import held_out, interval_fan, residuals
from scaling.figures.precisions import bits_curves, effective_parameters
from scaling.figures.region_map import region_map

__all__ = ["bits_curves", "calibration", "effective_parameters", "held_out", "interval_fan", "isoflop", "loss_against_compute", "region_map",
           "residuals"]
