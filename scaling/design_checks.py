"""What a reviewer would hold against a fit before reading its constants: a design that confounds them, and constants that do no work.

`scaling.fit` refuses what cannot be fitted and notes what it had to hold; these are remarks on fits that went well.
"""
from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from scaling.laws.parameters import FULL_BITS
from scaling.observations import observe
from scaling.result import Fit
from scaling.statistics import UNQUANTIZED_BITS
from scaling.table import Source

CORRELATED = 0.8  # |correlation of ln N and ln D| from which the variance of an exponent is inflated by 1/(1 - r^2) = 2.8 or more
FIXED = 1.05      # D/N within this factor is one ratio
MIN_LEVELS = 3    # a power law with a floor has three constants per direction
DEAD = 1e-4       # share of the loss, below what seeds or evaluation ever resolve
FLAT = 1e-3       # relative variation of a term below which it is a constant


def design_checks(columns: Mapping[str, np.ndarray], fitted: Fit) -> list[str]:
    """Remarks, a sentence each, on the rows that `fitted` was fitted to. columns: input of the law -> [rows] (see `Observations.columns`);
    others are ignored. Empty when there is nothing to say."""
    known = {name: np.asarray(values) for name, values in columns.items() if name in fitted.law.inputs}
    return [*_ratio(known, fitted), *_levels(known, fitted), *_ties(fitted), *_terms(known, fitted), *_dropped(fitted)]


def _ratio(columns: Mapping[str, np.ndarray], fitted: Fit) -> list[str]:
    """D/N fixed, or ln N and ln D correlated."""
    if not {"N", "D"} <= set(columns):
        return []
    log_n, log_d = np.log(columns["N"]), np.log(columns["D"])
    if np.ptp(log_n) == 0 or np.ptp(log_d) == 0:
        return []
    correlation = float(np.corrcoef(log_n, log_d)[0, 1])
    ratio = columns["D"] / columns["N"]
    if ratio.max() <= FIXED * ratio.min():
        return [f"D/N is {np.median(ratio):.3g} in every row (correlation of ln N and ln D {correlation:.3f}): the fit cannot tell what "
                "parameters do "
                "from what tokens do; A, B, alpha, beta and every optimum that follows from them are one ridge. Train some sizes at other D/N"]
    said = any("correlation of logs" in note for note in fitted.metrics["notes"])
    if abs(correlation) >= CORRELATED and not said:
        return [f"ln N and ln D are correlated ({correlation:.3f}), which multiplies the variance of alpha and beta by "
                f"{1 / (1 - correlation**2):.1f}: D/N runs from {ratio.min():.3g} to {ratio.max():.3g}, cross sizes and budgets more widely"]
    return []


def _levels(columns: Mapping[str, np.ndarray], fitted: Fit) -> list[str]:
    """Fewer than three values of N, D or a number of bits."""
    found = []
    for name, values in columns.items():
        if name in ("N", "D"):
            levels = np.unique(values)
            said = any(note.startswith(f"{name} has only") for note in fitted.metrics["notes"])
            if 1 < levels.size < MIN_LEVELS and not said:
                found.append(f"{name} has {levels.size} levels ({_listed(levels)}): a power law with a floor needs {MIN_LEVELS}")
        elif name.endswith("_bits"):
            wide = (values >= UNQUANTIZED_BITS) & (values < FULL_BITS)
            if wide.any():
                found.append(f"{name} is {_listed(np.unique(values[wide]))} in {int(wide.sum())} rows, which the law takes for quantized "
                             "to that width: where it stands for an unquantized baseline (BF16), leave it empty")
            levels = np.unique(values[values < UNQUANTIZED_BITS])
            if 0 < levels.size < MIN_LEVELS:
                found.append(f"{name} has {levels.size} level{'s' * (levels.size > 1)} below {UNQUANTIZED_BITS:g} ({_listed(levels)}): between and "
                             "beyond them the curve over bits is the law's, not the data's")
    return found


def _ties(fitted: Fit) -> list[str]:
    exponents = {name: source for name, source in fitted.ties.items() if fitted.law.parameter(name).kind == "exponent"}
    remarks = [f"{name} is tied to {source}: no datum says so" for name, source in exponents.items()]
    if exponents.get("beta") == "alpha":
        precision = " and the optimal precision the same at every budget" if fitted.law.operands else ""
        remarks[list(exponents).index("beta")] += f"; the compute-optimal exponent is then 1/2{precision}, by assumption. Give the untied fit as well"
    return remarks


def _terms(columns: Mapping[str, np.ndarray], fitted: Fit) -> list[str]:
    """Terms that make no difference to any row, and terms that are as constant as E. A term's work is what the loss loses without it."""
    law = fitted.law
    if not set(law.inputs) <= set(columns):
        return []
    with np.errstate(all="ignore"):
        whole = np.asarray(law.predict(fitted.params, **columns), dtype=np.float64)
        work = {}
        for name in law.amplitudes:
            if name in fitted.params:
                gone = math.inf if law.parameter(name).kind == "divisor" else 0.0
                work[name] = 1.0 - np.asarray(law.predict(dict(fitted.params) | {name: gone}, **columns)) / whole
    work = {name: share for name, share in work.items() if np.isfinite(share).all()}
    dead = [name for name, share in work.items() if np.abs(share).max() < DEAD]
    remarks = [f"the term of {name} is dead: it makes at most {np.abs(work[name]).max():.1e} of the loss in any row, so "
               f"{_sharers(fitted, name)} could be anything; fit a law without it" for name in dead]
    flat = [name for name in work if name not in dead and np.ptp(work[name] * whole) < FLAT * np.abs(work[name] * whole).max()]
    if len(flat) > 1:
        remarks.append(f"the terms of {', '.join(flat)} are all constant over these rows: only their sum is known, and E is no entropy")
    return remarks


def _sharers(fitted: Fit, name: str) -> str:
    """The amplitude, with the exponent that goes with it where the names say which."""
    pairs = {"A": "alpha", "B": "beta"}
    return f"{name} and {pairs[name]}" if pairs.get(name) in fitted.free else name


def _dropped(fitted: Fit) -> list[str]:
    dropped = fitted.metrics["dropped"]
    if not dropped:
        return []
    total = fitted.metrics["rows"] + sum(dropped.values()) + (fitted.metrics["held_out"] or {"rows": 0})["rows"]
    reasons = ", ".join(f"{count} ({reason})" for reason, count in dropped.items())
    return [f"left out of this fit, of {total} rows: {reasons}; where that was a choice, report the fit with them too"]


def _listed(levels: np.ndarray) -> str:
    return ", ".join(f"{level:g}" for level in levels)


def check_table(source: Source, fitted: Fit) -> list[str]:
    """`design_checks` on the rows of `source` that `fitted` was fitted to: its own column mapping, filter and held-out rows."""
    m = fitted.metrics
    observed = observe(source, fitted.law, m["columns"], m["where"], m["holdout"])
    return design_checks(observed.rows(~observed.held)[0], fitted)
