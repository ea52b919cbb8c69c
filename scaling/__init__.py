"""Precision-aware scaling laws: tables of runs in, fitted constants with intervals out. Never imports trainer."""
from scaling.fit import fit
from scaling.laws import Law, laws
from scaling.result import Estimate, Fit, Prediction, load
from scaling.table import curves, table, write_table

__all__ = ["Estimate", "Fit", "Law", "Prediction", "curves", "fit", "laws", "load", "table", "write_table"]
