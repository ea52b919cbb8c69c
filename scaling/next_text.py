"""`bitlaw plan FIT.json --next QUANTITY --candidates ...`: the runs that are expected to tell most about one quantity, as a table."""
from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from scaling.arguments import mixed, numbers
from scaling.costs import cost_model
from scaling.design import Suggestion, next_runs
from scaling.reach import refuse_far
from scaling.result import Fit

SHOWN = 20
EXAMPLE = "N=1e6,2e6 D=2e7,4e7"


def run_next(fit: Fit, arguments, console: Console) -> int:
    """Prints the candidates, the best first. Returns the exit code. ValueError, one line, for what cannot be ranked."""
    runs = candidates_of(fit, arguments.candidates)
    if not arguments.extrapolate:
        for run in runs:
            refuse_far(fit.ranges, {name: value for name, value in run.items() if name in ("N", "D")}, "plan --next")
    model = cost_model(arguments.cost_model or "flops")
    at = mixed(arguments.at) if arguments.next == "loss" else numbers(arguments.at, "--at")
    found = next_runs(fit, runs, arguments.next, at=at, count=arguments.count, cost=lambda run: float(model.training(run["N"], run["D"], run)))
    console.print(_table(fit, arguments.next, found[:SHOWN] if arguments.count is None else found, arguments.count is None))
    if arguments.count is None and len(found) > SHOWN:
        print(f"{len(found) - SHOWN} more are not shown")
    print(f"cost: {model.about}")
    print("half-widths are expected ones, of the linearised law: they know where a run lies, not what its loss will be, and not whether "
          "the law is right")
    return 0


def candidates_of(fit: Fit, texts: Sequence[str]) -> list[dict[str, float | str]]:
    """["N=1e6,2e6", "bits=4,8"] as all combinations; bits: every width that the fit has constants for. ValueError for an axis that is none."""
    law, axes = fit.law, {}
    widths = tuple(fit.at_width(1.0))
    names = {factor.input for factor in law.factors} | {operand.input for operand in law.operands if operand.from_name}
    known = (*law.inputs, *(("bits",) if widths else ()))
    for text in texts:
        name, sign, values = text.partition("=")
        if not sign or name not in known:
            raise ValueError(f"--candidates {text}: not NAME=V1,V2 of a name among {', '.join(known)}")
        if name in axes:
            raise ValueError(f"--candidates {text}: {name} is given twice")
        axes[name] = [mixed({name: value})[name] for value in values.split(",")]
        bad = next((value for value in axes[name] if name not in names and not (isinstance(value, float) and value > 0)), None)
        if bad is not None:
            raise ValueError(f"--candidates {text}: {bad} is no positive number")
    both = [name for name in widths if name in axes and "bits" in axes]
    if both:
        raise ValueError(f"--candidates: {both[0]} and bits are both given; bits stands for {', '.join(widths)}, so give one or the other")
    missing = [name for name in law.inputs if name not in axes and name not in law.optional]
    if missing:
        raise ValueError(f"--candidates: also needs {', '.join(missing)}: {EXAMPLE}")
    runs = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    return [{**{name: value for name, value in run.items() if name != "bits"},
             **(dict.fromkeys(widths, run["bits"]) if "bits" in run else {})} for run in runs]


def _table(fit: Fit, quantity: str, found: Sequence[Suggestion], alone: bool) -> Table:
    made = Table(title=f"{fit.label}: half-width of the {fit.level:.0%} interval of {quantity}, "
                 + ("each run by itself" if alone else "each given the runs above it"),
                 title_justify="left")
    inputs = list(dict.fromkeys(name for suggestion in found for name in suggestion.columns))
    for name in (*inputs, "cost (FLOP of 16 bits)", "half-width now", "with this run", "shrunk per FLOP"):
        made.add_column(name, justify="right")
    for suggestion in found:
        made.add_row(*(_cell(suggestion.columns, name) for name in inputs), f"{suggestion.cost:.4g}", f"{suggestion.before:.4g}",
                     f"{suggestion.half_width:.4g}", f"{suggestion.gain:.3g}")
    return made


def _cell(columns: Mapping, name: str) -> str:
    value = columns.get(name, "")
    return f"{value:.4g}" if isinstance(value, float) else str(value)
