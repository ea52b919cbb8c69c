"""Precision-aware scaling laws: tables of runs in, fitted constants with intervals, predictions and a report out. Never imports trainer.

    runs = scaling.table("runs/demo")                  a DuckDB relation; also .csv, .parquet, .json, or a mapping of arrays
    fit = scaling.fit(runs, "kumar:tied", holdout="N = max(N) OVER ()", bootstrap=200)
    fit.estimate("bits_for_gap", N=25_000, gap=0.01)   a number with its interval, or why the design does not identify it
    fit.predict(N=1e5, D=1e7, weights_bits=4, activations_bits=4)
    scaling.report("runs/demo", "report.html")         analyse() first when the sentences of summary() are wanted too
"""
from scaling.analysis import Analysis, analyse
from scaling.compare import Comparison, compare
from scaling.fit import fit
from scaling.laws import Law, laws
from scaling.report import report
from scaling.result import Estimate, Fit, Prediction, load
from scaling.summary import summary
from scaling.table import curves, table, telemetry, write_table

__all__ = ["Analysis", "Comparison", "Estimate", "Fit", "Law", "Prediction", "analyse", "compare", "curves", "fit", "laws", "load", "report",
           "summary", "table", "telemetry", "write_table"]
