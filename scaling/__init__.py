"""Precision-aware scaling laws: tables of runs in, fitted constants with intervals, predictions and a report out. Never imports trainer.

    runs = scaling.table("runs/demo")                  a DuckDB relation; also .csv, .parquet, .json, or a mapping of arrays
    fit = scaling.fit(runs, "kumar:tied", holdout="N = max(N) OVER ()", bootstrap=200)
    fit.estimate("bits_for_gap", N=25_000, gap=0.01)   a number with its interval, or why the design does not identify it
    fit.predict(N=1e5, D=1e7, weights_bits=4, activations_bits=4)
    scaling.plan(fit, compute=1e14)                    the best N, D and width for a budget, with intervals
    scaling.profile(fit, runs, "alpha")                profile likelihood; scaling.resample: wild bootstrap; scaling.coverage: does it cover?
    scaling.scipy_check(fit, runs)                     the same objective minimised by SciPy, from other starts
    scaling.report("runs/demo", "report.html")         analyse() first when the sentences of summary() are wanted too

Names are imported when first used: `bitlaw table` needs neither SciPy nor matplotlib.
"""
import importlib
import sys
import types

_HOMES = {
    "scaling.analysis": ("Analysis", "analyse"),
    "scaling.best_of": ("best_of", "best_of_curve", "pass_at", "worst_of"),
    "scaling.checklist": ("checklist",),
    "scaling.compare": ("Comparison", "compare"),
    "scaling.coverage": ("Coverage", "coverage"),
    "scaling.derived": ("Derived", "derived"),
    "scaling.design": ("next_runs",),
    "scaling.design_checks": ("check_table", "design_checks"),
    "scaling.fit": ("fit",),
    "scaling.gaps": ("loss_gaps",),
    "scaling.held_out": ("leave_out",),
    "scaling.laws": ("Law", "laws"),
    "scaling.plan": ("Plan", "plan"),
    "scaling.independent": ("scipy_check",),
    "scaling.profile": ("Profile", "profile"),
    "scaling.proportions": ("paired", "proportion"),
    "scaling.report": ("report",),
    "scaling.resample": ("resample",),
    "scaling.choice": ("Choice",),
    "scaling.result": ("Estimate", "Fit", "Prediction", "load"),
    "scaling.seed_variance": ("seed_variance", "variance_parts"),
    "scaling.summary": ("summary",),
    "scaling.table": ("curves", "table", "telemetry", "write_table"),
    "scaling.thresholdout": ("Thresholdout",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = ["Analysis", "Choice", "Comparison", "Coverage", "Derived", "Estimate", "Fit", "Law", "Plan", "Prediction", "Profile",
           "Thresholdout", "analyse", "best_of", "best_of_curve", "check_table", "checklist", "compare", "coverage", "curves",
           "derived", "design_checks", "fit", "laws", "leave_out", "load", "loss_gaps", "next_runs", "paired", "pass_at", "plan",
           "profile", "proportion", "report", "resample", "scipy_check", "seed_variance", "summary", "table", "telemetry",
           "variance_parts", "worst_of", "write_table"]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'scaling' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Face(types.ModuleType):
    """`scaling.fit`, `scaling.table` and others are functions. The modules of these names, once imported, do not take their places."""

    def __setattr__(self, name: str, value) -> None:
        if not (name in _HOME and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Face
