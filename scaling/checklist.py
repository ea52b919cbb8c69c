"""The checklist of "(Mis)Fitting" (Li, Kudugunta and Zettlemoyer 2025, arXiv 2502.18969, appendix) filled in from a fit and its table.

More than fifty papers were surveyed there; most leave out what is needed to repeat a fit. What a fit and a run table know is filled in; what they
do not is said to be unknown, never guessed.
"""
from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import numpy as np

from scaling import page
from scaling.eligible import eligible
from scaling.result import Fit
from scaling.statistics import columns_of
from scaling.table import Source

UNKNOWN = "unknown"
PARTS = {"form": "a. Form", "models": "b. Models and training", "measurement": "c. Measurement", "fitting": "d. Fitting",
         "validation": "e. Uncertainty and validation", "release": "f. Release"}


@dataclass(frozen=True)
class Item:
    """One question of a part (a key of PARTS) and its answer, or UNKNOWN."""

    part: str
    question: str
    answer: str

    @property
    def known(self) -> bool:
        return self.answer != UNKNOWN


def checklist(fitted: Fit, source: Source | None = None) -> list[Item]:
    """The checklist. source: the table that was fitted, for what the fit does not keep (sizes, data, seeds, schedules); without it these are
    unknown. Held-out rows count too."""
    m = fitted.metrics
    records = {} if source is None else columns_of(eligible(source, m["columns"], m["where"], None))
    parts = {"form": _form(fitted), "models": _models(fitted, records), "measurement": _measurement(fitted, records), "fitting": _fitting(fitted),
             "validation": _validation(fitted), "release": _release(records, source)}
    return [Item(part, question, answer or UNKNOWN) for part, answers in parts.items() for question, answer in answers.items()]


def as_json(items: Iterable[Item]) -> dict[str, dict[str, str]]:
    """part -> question -> answer, for FIT.json."""
    found: dict[str, dict[str, str]] = {}
    for item in items:
        found.setdefault(item.part, {})[item.question] = item.answer
    return found


def as_text(items: Iterable[Item]) -> list[str]:
    """A line per part and per item, and how many are unknown."""
    items, lines = list(items), []
    for part, title in PARTS.items():
        lines.append(title)
        lines += [f"  {item.question}: {item.answer}" for item in items if item.part == part]
    return [*lines, f"{sum(not item.known for item in items)} of {len(items)} items are unknown to this program: state them yourself"]


def as_html(items: Iterable[Item]) -> str:
    rows = [(PARTS[item.part], item.question, item.answer) for item in items]
    return page.details("The checklist of (Mis)Fitting (arXiv 2502.18969), as far as the fit and the run table know",
                        page.table(("", "question", "answer"), rows, (), ["" if row[2] != UNKNOWN else "bad" for row in rows]))


def _form(fitted: Fit) -> dict[str, str | None]:
    law, m = fitted.law, fitted.metrics
    units = {"N": "parameters", "D": "tokens", "loss": law.unit}
    used = [f"{name} = {sql}" + (f" ({units[name]})" if name in units else "") for name, sql in m["columns"].items()]
    held = [f"{name} = {value:g}" for name, value in fitted.fixed.items()] + [f"{name} = {source}" for name, source in fitted.ties.items()]
    return {"law": f"{law.about} ({law.cite})", "variables and where they come from": ", ".join(used),
            "free constants": ", ".join(fitted.free), "held fixed or tied": ", ".join(held) or "none",
            "why this form and not another": None}


def _models(fitted: Fit, records: dict[str, list]) -> dict[str, str | None]:
    m = fitted.metrics
    held = (m["held_out"] or {"rows": 0})["rows"]
    counted = {'"n_params"': "non-embedding parameters", '"n_params_total"': "all parameters"}.get(m["columns"].get("N", ""))
    spans = [f"{name} {low:.4g} to {high:.4g}" for name, (low, high) in fitted.ranges.items() if name in ("N", "D")]
    return {"number of models": f"{m['rows']} fitted" + (f", {held} held out" if held else ""), "sizes and budgets fitted": ", ".join(spans) or None,
            "how N is counted": counted, "how compute is counted": _constant_ratio(records), "training data": _values(records, "data"),
            "repetition of data": _repetition(records), "architecture": _values(records, "model", "architecture"),
            "optimizer": _values(records, "optimizer"), "learning rate and its rule": _values(records, "lr_rule", "lr"),
            "batch size (tokens)": _values(records, "batch_tokens"), "schedule": _values(records, "schedule"),
            "precisions": _values(records, "precision"), "hardware": _values(records, "device")}


def _measurement(fitted: Fit, records: dict[str, list]) -> dict[str, str | None]:
    cooled = [steps for steps in records.get("cooldown_steps", []) if steps is not None]
    dropped = fitted.metrics["dropped"]
    own = "run_id" in records and "loss_train" in records  # a table of bitlaw's own runs: `loss` is the final evaluation
    checkpoints = ("final evaluation of every run" + (f"; {len(cooled)} are cooldowns of a trunk" if cooled else "")) if own else None
    errors = [e for e in records.get("loss_std_err", []) if e is not None and math.isfinite(e)]
    return {"final or intermediate checkpoints": checkpoints, "evaluation set": _values(records, "data_sha256") and (
                f"validation part of {_values(records, 'data')} (sha256 {_values(records, 'data_sha256')})"),
            "standard error of the evaluation": f"median {np.median(errors):.2g} {fitted.law.unit}" if errors else None,
            "seeds": _values(records, "seed"),
            "exclusions": ", ".join(f"{count} rows ({reason})" for reason, count in dropped.items()) or "no row was dropped",
            "row filter": fitted.metrics["where"] or "none"}


def _fitting(fitted: Fit) -> dict[str, str | None]:
    m = fitted.metrics
    rules = {"huber": f"sum of Huber losses, delta {m['delta']:g}", "least_squares": "sum of squares / 2",
             "lad": f"sum of absolute values, as Huber losses of delta {m['delta']:g}"}
    return {"objective": f"{rules.get(m['loss'], m['loss'])}, of ln predicted - ln observed; value {m['objective']:.10g}",
            "optimizer and starts": f"starts over boxes of the constants, the best polished by Levenberg-Marquardt; {m['starts_agree']} "
            f"of {m['starts']} "
            "polished starts agree", "convergence": f"{'converged' if m['converged'] else 'not converged'}, gradient {m['gradient_norm']:.1e}",
            "weights": str(m.get("weights") or "every row counts the same"), "priors": ", ".join(m.get("priors") or ()) or "none",
            "software": ", ".join(f"{name} {_version(name)}" for name in ("bitlaw", "numpy", "scipy")) + f", Python {platform.python_version()}"}


def _validation(fitted: Fit) -> dict[str, str | None]:
    m, score = fitted.metrics, fitted.metrics["held_out"]
    resampled = {"wild": "wild resamples of the residuals"}.get(m.get("resampled"), "resamples of whole cells")
    intervals = f"{fitted.level:.0%}, linearised covariance" + (f" and {m['bootstrap']} {resampled}" if m["bootstrap"] else "")
    unknown = [name for name in fitted.params if name not in fitted.fixed and name not in fitted.ties and not fitted.identified(name)]
    tested = score and (f"{score['rows']} rows held out ({m['holdout']}): rms error {score['rmse']:.3%}, mean {score['bias']:+.3%} of the loss")
    return {"intervals": intervals, "constants that the design does not identify": ", ".join(unknown) or "none",
            "conditioning": f"condition number {m['condition_number']:.2e} (J'J in centred logs)",
            "goodness of fit": f"rms residual {m['rmse']:.3%} of the loss, BIC {m['bic']:.1f}",
            "test on rows not fitted": tested or "none: no rows were held out", "sensitivity to delta, filters and starts": None}


def _release(records: dict[str, list], source: Source | None) -> dict[str, str | None]:
    path = os.path.basename(os.path.normpath(source)) if isinstance(source, (str, os.PathLike)) else None
    table = f"{path} (whether it is public is not known here)" if path else None
    return {"table of runs": table, "code of the runs": _values(records, "code_version")}


def _values(records: dict[str, list], *names: str) -> str | None:
    """The distinct values of columns, "a, b and 7 more"; None when no row has one."""
    told = []
    for name in names:
        found = sorted({value for value in records.get(name, []) if value is not None}, key=lambda v: (isinstance(v, str), v))
        if found:
            texts = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in found[:6]]
            told.append((f"{name} " if len(names) > 1 else "") + ", ".join(texts) + (f" and {len(found) - 6} more" if len(found) > 6 else ""))
    return "; ".join(told) or None


def _repetition(records: dict[str, list]) -> str | None:
    pairs = [(t, u) for t, u in zip(records.get("tokens", []), records.get("unique_tokens", [])) if t and u]
    if not pairs:
        return None
    most = max(tokens / unique for tokens, unique in pairs)
    return "none: no run saw more tokens than the data has" if most <= 1 else f"up to {most:.3g} epochs"


def _constant_ratio(records: dict[str, list]) -> str | None:
    """Whether the column of FLOP is 6 N D, or how far from it."""
    ratios = [c / (6.0 * n * d) for c, n, d in zip(records.get("flops", []), records.get("n_params", []), records.get("tokens", [])) if c and n and d]
    if not ratios:
        return None
    return "6 N D" if max(abs(r - 1) for r in ratios) < 1e-3 else f"column flops, {min(ratios):.3g} to {max(ratios):.3g} times 6 N D"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return UNKNOWN
