"""`run(verb, argv)`: the verbs of the command line that belong to scaling. Results on stdout, errors as one line on stderr.

Exit codes: 0 done; 1 a fit did not converge; 2 bad input. What a verb alone needs it imports itself: a table needs no SciPy.
"""
from __future__ import annotations

import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from scaling.arguments import joined, mixed, numbers, parser, priors
from scaling.choice import Choice
from scaling.files import check_target
from scaling.plugins import load_plugins
from scaling.reach import reaches
from scaling.table import RUN_COLUMNS, TABLE_SUFFIXES, is_query, table, write_table

if TYPE_CHECKING:
    from scaling.analysis import Analysis
    from scaling.compare import Comparison
    from scaling.derived import Derived
    from scaling.result import Fit


def run(verb: str, argv: list[str]) -> int:
    """Runs `bitlaw verb argv`. Returns the exit code."""
    try:
        arguments = parser(verb).parse_args(joined(argv))
        load_plugins(arguments.plugins)
        return VERBS[verb](arguments)
    except ValueError as error:
        print(f"bitlaw: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except SystemExit as done:  # argparse leaves this way after printing --help
        return int(done.code or 0)


def conclude(folder: str | Path) -> int:
    """What `bitlaw demo` does once its runs are there: fits, writes the run table, both fits and the report beside the runs, says where
    they are, and ends with the three sentences. Returns the exit code: 1 when a fit did not converge."""
    from scaling.report import report as write_report

    folder = Path(folder)
    analysis = _analyse(folder, 200)
    written = [write_table(analysis.whole, folder / "runs.parquet"), write_table(analysis.whole, folder / "runs.csv")]
    for name, fitted in (("chinchilla", analysis.fit_chinchilla), ("precision", analysis.fit_precision)):
        if fitted:
            written.append(fitted.save(folder / f"fit-{name}.json"))
    written.append(write_report(folder, folder / "report.html", analysis))
    return _tell(analysis, written)


def _table(arguments) -> int:
    check_target(arguments.out, TABLE_SUFFIXES)
    relation = _rows_of(arguments.sources)
    if arguments.columns or arguments.where or not all(name in relation.columns for name in RUN_COLUMNS):
        from scaling.analysis import with_run_columns

        relation = with_run_columns(relation, arguments.columns, arguments.where)
    if not len(relation):
        raise ValueError(f"{', '.join(arguments.sources)}: no run below it is over; a table has a row for each that is")
    out = write_table(relation, arguments.out)
    states = dict(relation.aggregate("coalesce(status, 'no status') AS state, count(*) AS number", "state").order("state").fetchall())
    print(f"{out}: {sum(states.values())} runs ({', '.join(f'{number} {state}' for state, number in states.items())})")
    return 0


def _rows_of(sources: list[str]):
    """Folders of runs together, or one file or query. ValueError for a mixture: which row is a copy of which, only folders tell."""
    others = [source for source in sources if not Path(source).is_dir() and (Path(source).is_file() or is_query(source))]
    if others and len(sources) > 1:
        raise ValueError(f"table: {others[0]} is a file or a query, which is read alone; put several together by a query: "
                         "\"FROM 'a.csv' UNION ALL BY NAME FROM 'b.csv'\"")
    return table(others[0] if others else sources)


def _fit(arguments) -> int:
    from scaling.checklist import as_json, as_text, checklist
    from scaling.derived import derived
    from scaling.design_checks import check_table
    from scaling.fit import fit as fit_law
    from scaling.trust import check_trust, trusted

    if arguments.out:
        check_target(arguments.out, (".json",), arguments.table)
    check_trust(arguments)
    with _progress() as progress:
        later = {"bootstrap": 0} if arguments.resample == "wild" else {}
        fitted = fit_law(arguments.table, arguments.law, ties=arguments.tie, level=arguments.level, priors=priors(arguments.prior), progress=progress,
                         **_row_options(arguments) | later)
        if not fitted.converged:
            return _not_converged(fitted)
        fitted, trust = trusted(fitted, arguments, progress)
    follows, lacking = derived(fitted, mixed(arguments.at))
    _console().print(_constants(fitted))
    if follows:
        _console().print(_following(follows, fitted.level))
    remarks, items = check_table(arguments.table, fitted), checklist(fitted, arguments.table)
    for line in (*_lacking(lacking), *_facts(fitted), *trust, *(f"note: {remark}" for remark in remarks),
                 *(as_text(items) if arguments.checklist else ())):
        print(line)
    if arguments.out:
        told = dict(fitted.metrics) | {"design_checks": remarks, "checklist": as_json(items), "derived": [one.as_json() for one in follows]}
        print(f"written: {replace(fitted, metrics=told).save(arguments.out)}")
    return 0


def _compare(arguments) -> int:
    from scaling.compare import compare as compare_laws
    from scaling.compare_text import check_guard, left_out_table, reasons, with_guard

    check_guard(arguments)
    laws = [name.strip() for name in arguments.laws.split(",") if name.strip()]
    with _progress() as progress:
        comparison = compare_laws(arguments.table, laws, leave=arguments.leave, progress=progress, **_row_options(arguments))
    comparison, guard_lines = with_guard(comparison, arguments) if arguments.guard else (comparison, [])
    _console().print(_side_by_side(comparison))
    if comparison.left_out:
        _console().print(left_out_table(comparison.left_out, comparison.unit))
    for line in (*reasons(comparison.left_out), *guard_lines):
        print(line)
    for name, why in comparison.refused.items():
        print(f"{name}: not fitted, {why}")
    failed = [fitted for fitted in comparison.fits if not fitted.converged]
    for fitted in failed:
        _not_converged(fitted)
    if len(failed) < len(comparison.fits):
        print(f"{comparison.reason()}.")
        if comparison.left_out:
            print(comparison.verdict())
    return 1 if failed else 0


def _predict(arguments) -> int:
    from scaling.result import load

    fitted = load(arguments.fit)
    quantity = arguments.inputs[0] if arguments.inputs[0] in {*fitted.params, *fitted.law.functionals} else None
    pairs = {}
    for text in arguments.inputs[1 if quantity else 0:]:
        name, sign, value = text.partition("=")
        if not sign:
            raise ValueError(f"{text!r}: not NAME=VALUE; law {fitted.law.name} takes {', '.join(fitted.law.inputs)}; before these may come one of "
                             f"{', '.join((*fitted.law.functionals, *fitted.params))}")
        if name in pairs:
            raise ValueError(f"input {name} is given twice: {pairs[name]} and {value}")
        pairs[name] = value
    if quantity:
        return _quantity(fitted, quantity, pairs)
    names = {f.input for f in fitted.law.factors} | {o.input for o in fitted.law.operands if o.from_name}
    named = {name: value for name, value in mixed(pairs).items() if name in names and isinstance(value, str)}
    inputs = numbers({name: value for name, value in pairs.items() if name not in named}, "input")
    endless = next((name for name in fitted.law.measures if inputs.get(name) == float("inf")), None)
    if endless:
        raise ValueError(f"input {endless}={pairs[endless]}: must be finite")
    bad = next((name for name, value in inputs.items() if not value > 0 and not (value == 0 and name in {*names, *fitted.law.zero_allowed})), None)
    if bad:
        raise ValueError(f"input {bad}={pairs[bad]}: must be positive")
    inputs |= named
    predicted = fitted.predict(**inputs, extrapolate=arguments.extrapolate)
    if not predicted.loss < float("inf"):
        print(f"bitlaw: {fitted.label} says that training diverges at {' '.join(arguments.inputs)}: it has no loss there", file=sys.stderr)
        return 1
    print(f"loss {predicted.loss:.6g} {fitted.law.unit}, {fitted.level:.0%} interval for one run {predicted.low:.6g} to {predicted.high:.6g} "
          f"(for the law's value {predicted.mean_low:.6g} to {predicted.mean_high:.6g})")
    if predicted.extrapolated > 1.0 + 1e-9:
        print(f"extrapolated: {predicted.extrapolated:.3g} times beyond the fitted range; the interval includes the law's discrepancy there "
              f"({float(fitted.discrepancy_at(predicted.extrapolated)):.2%} of the loss)")
        for _, sentence in reaches(fitted.ranges, inputs).values():
            print(f"extrapolated: {sentence}")
    return 0


def _quantity(fitted: Fit, name: str, pairs: dict[str, str]) -> int:
    """A constant or functional with its interval. Exit code 1 when the design does not identify it."""
    estimate = fitted.estimate(name, **mixed(pairs))
    told = f"{name}{' at ' * bool(pairs)}{', '.join(f'{key}={value}' for key, value in pairs.items())}"
    if not estimate.identified:
        print(f"bitlaw: {told}: {estimate.reason}", file=sys.stderr)
        return 1
    if isinstance(estimate, Choice):
        print(f"{told}: {estimate}")
    else:
        print(f"{told}: {estimate.value + 0.0:.6g}, {fitted.level:.0%} interval {estimate.low + 0.0:.6g} to {estimate.high:.6g}")
    return 0


def _plan(arguments) -> int:
    from scaling.plan_text import run_plan

    return run_plan(arguments, _console())


def _stats(arguments) -> int:
    from scaling.stats_text import run_stats

    return run_stats(arguments, _console())


def _report(arguments) -> int:
    from scaling.report import report as write_report

    check_target(arguments.out, (".html", ".htm"), arguments.table)
    analysis = _analyse(arguments.table, arguments.bootstrap, columns=arguments.columns, where=arguments.where, laws=arguments.laws)
    return _tell(analysis, [write_report(arguments.table, arguments.out, analysis, arguments.refresh, arguments.tuned)])


def _analyse(source, bootstrap: int, **rows) -> Analysis:
    from scaling.analysis import analyse

    with _progress() as progress:
        return analyse(source, bootstrap=bootstrap, progress=progress, **rows)


def _tell(analysis: Analysis, written: list[Path]) -> int:
    """Constants and conditioning of both fits, files, and the three sentences last. Exit code 1 when a fit did not converge."""
    from scaling.summary import summary

    code = 0
    for name, comparison in (("chinchilla", analysis.chinchilla), ("precision", analysis.precision)):
        if comparison is None:
            print(f"no {name} fit: {analysis.why[name]}")
            for fitted in analysis.unconverged.get(name, ()):
                code = _not_converged(fitted)
        else:
            _console().print(_constants(comparison.best))
            print(f"chosen: {comparison.reason()}")
            for line in _facts(comparison.best):
                print(line)
            print()
    for note in analysis.notes:
        print(f"note: {note}")
    for path in written:
        print(f"written: {path}")
    print()
    for sentence in summary(analysis.fit_chinchilla, analysis.fit_precision, analysis.relation):
        print(sentence)
    return code


def _not_converged(fitted: Fit) -> int:
    m = fitted.metrics
    print(f"bitlaw: {fitted.label} did not converge: objective {m['objective']:.6g}, gradient {m['gradient_norm']:.1e}, {m['starts_agree']} of "
          f"{m['starts']} starts agree; its constants are not printed", file=sys.stderr)
    return 1


def _row_options(arguments) -> dict:
    names = ("columns", "where", "holdout", "loss", "delta", "base", "weights", "bootstrap", "seed")
    return {name: getattr(arguments, name) for name in names} | {"fixed": numbers(arguments.fix, "--fix")}


def _constants(fitted: Fit) -> Table:
    """Parameters with intervals, or why they have none."""
    made = Table(title=fitted.label, title_justify="left")
    for name, justify in (("constant", "left"), ("value", "right"), (f"{fitted.level:.0%} interval", "left"), ("rel. s.e.", "right")):
        made.add_column(name, justify=justify)
    for name in fitted.params:
        if name in fitted.ties:
            made.add_row(name, f"= {fitted.ties[name]}", "", "")
        elif name in fitted.fixed:
            made.add_row(name, f"{fitted.params[name]:g}", "held fixed", "")
        else:
            estimate = fitted.estimate(name)
            cells = (f"{estimate.value:.6g}", f"{estimate.low:.5g} to {estimate.high:.5g}", f"{estimate.relative_se:.1%}")
            made.add_row(name, *(cells if estimate.identified else ("", estimate.reason, "")))
    return made


def _following(follows: list[Derived], level: float) -> Table:
    """What follows from the constants, at which inputs, with intervals."""
    made = Table(title="what follows", title_justify="left")
    for name, justify in (("quantity", "left"), ("at", "left"), ("value", "right"), (f"{level:.0%} interval", "left")):
        made.add_column(name, justify=justify)
    for one in follows:
        at = " ".join(f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in one.at.items())
        e = one.estimate
        plain = e.identified and not isinstance(e, Choice)
        cells = (f"{e.value:.5g}", f"{e.low:.5g} to {e.high:.5g}") if plain else ("", str(e))
        made.add_row(one.name, at, *cells)
    return made


def _lacking(lacking: dict[str, tuple[str, ...]]) -> list[str]:
    """One line about what could be told as well."""
    told = "; ".join(f"{name} ({', '.join(needs)})" for name, needs in lacking.items())
    return [f"also with --at: {told}"] if told else []


def _facts(fitted: Fit) -> list[str]:
    """What the fit says about itself, a line each."""
    from scaling.ridges import told

    m = fitted.metrics
    dropped = "".join(f", {number} dropped ({reason})" for reason, number in m["dropped"].items())
    rule = "sum of squares / 2" if m["loss"] == "least_squares" else f"sum of Huber losses, delta {m['delta']:g}"
    lines = [fitted.law.about,
             f"objective {m['objective']:.10g} ({rule} of ln loss), gradient {m['gradient_norm']:.1e}, {m['starts_agree']} of "
             f"{m['starts']} starts agree",
             f"condition number {m['condition_number']:.2e}, {m['rows']} rows fitted{dropped}, residual sd {m['residual_sd']:.3%}, BIC "
             f"{m['bic']:.1f}"]
    score = m["held_out"]
    if score:
        covered = "not predicted: not identified" if score["covered"] is None else f"{score['covered']:.0%} in their intervals"
        lines.append(f"held out: {score['rows']} rows, rms error {score['rmse']:.3%} ({score['rmse_nats']:.4f} {fitted.law.unit}), mean "
                     f"{score['bias']:+.3%}, {covered}")
    return lines + told(m) + [f"note: {note}" for note in m["notes"]]


def _side_by_side(comparison: Comparison) -> Table:
    """Laws as columns: scores first, then every parameter that any of them has."""
    made = Table("", *(fitted.label for fitted in comparison.fits))
    scores = {"free parameters": lambda f: f"{len(f.free)}", "BIC": lambda f: f"{f.metrics['bic']:.1f}",
              "rms residual": lambda f: f"{f.metrics['rmse']:.3%}",
              "held-out rms": lambda f: _held_out(f, "rmse", ".3%"),
              f"held-out rms, {comparison.unit}": lambda f: _held_out(f, "rmse_nats", ".4f"),
              "condition number": lambda f: f"{f.metrics['condition_number']:.1e}",
              "starts that agree": lambda f: f"{f.metrics['starts_agree']} of {f.metrics['starts']}"}
    for name, score in scores.items():
        made.add_row(name, *(score(fitted) for fitted in comparison.fits))
    made.add_section()
    for name in dict.fromkeys(name for fitted in comparison.fits for name in fitted.params):
        made.add_row(name, *(_cell(fitted, name) for fitted in comparison.fits))
    return made


def _held_out(fitted: Fit, name: str, spec: str) -> str:
    """A figure of the held-out rows; what a guard does not tell is empty."""
    score = fitted.metrics["held_out"]
    return "" if score is None or score[name] != score[name] else format(score[name], spec)


def _cell(fitted: Fit, name: str) -> str:
    if name not in fitted.params or not fitted.converged:
        return ""
    if name in fitted.ties:
        return f"= {fitted.ties[name]}"
    if name in fitted.fixed:
        return f"{fitted.params[name]:g} (fixed)"
    return f"{fitted.params[name]:.6g}" if fitted.identified(name) else "not identified"


def _console() -> Console:
    """stdout; wide enough for whole tables when it is not a terminal. No markup: effN[FP4] is a name."""
    console = Console(markup=False)
    return console if console.is_terminal else Console(width=160, markup=False)


@contextmanager
def _progress():
    """A callback (done, total) that draws a bar on a terminal's stderr and does nothing elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (TextColumn("bootstrap"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("bootstrap", total=None, visible=False)
        yield lambda done, total: bar.update(task, completed=done, total=total, visible=True)


VERBS = {"table": _table, "fit": _fit, "compare": _compare, "predict": _predict, "plan": _plan, "stats": _stats, "report": _report}
