"""`bitlaw stats`: what a table says of itself without any law: variances, gaps by matched seed, best of k, accuracies."""
from __future__ import annotations

import math

from rich.console import Console
from rich.table import Table

from scaling import accuracies
from scaling.analysis import with_run_columns
from scaling.mapped import mapped_rows, one_line, project
from scaling.observations import RUN_ALIASES
from scaling.searches import Search, searches, shown_counts
from scaling.seed_variance import VarianceParts, seed_variance
from scaling.statistics import finished_runs, indistinct, paired_gaps, reference_precision
from scaling.table import quote, table

MEASURES = ("n_params", "tokens", "loss")


def run_stats(arguments, console: Console) -> int:
    """Prints every statistic that the table carries. Returns the exit code. ValueError, one line, when it carries none."""
    if not 0.0 < arguments.level < 1.0:
        raise ValueError(f"--level {arguments.level:g}: need a share between 0 and 1, such as 0.95")
    relation = _with_accuracies(table(arguments.table), arguments.columns)
    given = {RUN_ALIASES.get(name, name): sql for name, sql in arguments.columns.items() if name not in accuracies.COLUMNS}
    answered = accuracies.carries(relation.columns)
    if not answered or given or set(MEASURES) <= set(relation.columns):
        relation = with_run_columns(relation, given, arguments.where)
        _of_runs(relation, arguments, console)
    elif arguments.where:
        relation = mapped_rows(relation, {}, (), {f"where {arguments.where}": arguments.where}, "stats")[-1]
    if answered:
        found = accuracies.accuracies(relation, arguments.reference, arguments.level)
        if not found:
            raise ValueError("stats: no row has both correct and a number of questions, or both correct and a question")
        console.print(_accuracy_table(found, arguments.level))
    elif arguments.reference:
        raise ValueError(f"--reference {arguments.reference}: the table has no column question; it pairs models that answered the same questions")
    return 0


def _with_accuracies(relation, columns):
    given = {name: sql for name, sql in columns.items() if name in accuracies.COLUMNS}
    if not given:
        return relation
    kept = [quote(name) for name in relation.columns if name not in given]
    plain = project(relation, ", ".join(f"({sql}) AS {name}" for name, sql in given.items()), "columns")
    truths = {name for name, kind in zip(plain.columns, map(str, plain.types), strict=True) if kind == "BOOLEAN"}
    own = [f"({sql}) AS {name}" if name in truths else f"CAST(({sql}) AS {accuracies.COLUMNS[name]}) AS {name}" for name, sql in given.items()]
    made = project(relation, ", ".join(own + kept), "columns")
    with one_line("columns"):
        made.fetchall()  # relations are lazy: a cast that fails is told here
    return made


def _of_runs(relation, arguments, console: Console) -> None:
    runs = finished_runs(relation)
    print(f"{len(runs)} finished runs of {len(relation)} rows")
    if alike := len(indistinct(runs)):
        print(f"note: {alike} runs share size, tokens, precision, seed, data, batch, learning rate and schedule with another run: only "
              "a search over what tells them apart (--tuned) can use them")
    try:
        parts = seed_variance(relation, same_tokens=not arguments.independent_evaluation, level=arguments.level)
    except ValueError as error:
        print(f"variance between seeds: {error}")
    else:
        console.print(_variance_table(parts))
        for note in parts.notes:
            print(f"note: {note}")
    gaps, reference = paired_gaps(runs, level=arguments.level), reference_precision(runs)
    if gaps:
        console.print(_gap_table(gaps, reference, arguments.level))
    else:
        print("gaps by matched seed: " + ("no quantized run matches an unquantized one in all but the precision" if reference
                                          else "no unquantized run to take them against"))
    found = searches(relation, arguments.tuned)
    if found:
        console.print(_search_table(found, arguments.tuned))
        for line in search_notes(found):
            print(f"note: {line}")
    else:
        print(f"best of k: no two runs of a cell and seed differ in {', '.join(arguments.tuned)} (--tuned names other columns)")


def variance_rows(parts: VarianceParts) -> list[tuple[str, str, str]]:
    """(part, standard deviation, what it is): nats per token."""
    def deviation(variance: float) -> str:
        return "unknown" if math.isnan(variance) else f"{math.sqrt(variance):.4g}"

    interval = f"{math.sqrt(parts.within_low):.4g} to {math.sqrt(parts.within_high):.4g}"
    return [("between cells", deviation(parts.between_cells), f"{parts.cells} cells: sizes, tokens, precisions, schedules"),
            ("between seeds", deviation(parts.between_seeds), f"{parts.runs} runs, {parts.dof} degrees of freedom"),
            ("between runs of a cell, as observed", deviation(parts.within), f"{parts.level:.0%} interval {interval}"),
            ("evaluation", deviation(parts.evaluation), "its own standard error, root mean square")]


def search_cells(search: Search, counts: list[int]) -> tuple[str, ...]:
    """A row of the table of searches; k beyond the search is empty, and the last is that of its largest k: as many runs as the shortest of
    its seeds has, so the mean of the lowest losses where all have as many."""
    told = [f"{search.curve[k - 1]:.4f}" if k <= len(search.curve) else "" for k in counts] + [f"{search.curve[-1]:.4f}"]
    best = ", ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in search.best)
    return (f"{search.n_params:.4g}", f"{search.tokens:.4g}", search.precision, f"{search.runs}", f"{search.seeds}", *told, best)


def search_header(found: list[Search], tuned) -> tuple[tuple[str, ...], list[int]]:
    """(header, the k of its columns)."""
    counts = shown_counts(max(len(search.curve) for search in found))
    return ("parameters", "tokens", "precision", "runs", "seeds", *(f"k={k}" for k in counts), "largest k", f"best {', '.join(tuned)}"), counts


def search_notes(found: list[Search]) -> list[str]:
    """What a reader must know of searches with runs that are in no curve."""
    diverged, repeated = (sum(getattr(search, name) for search in found) for name in ("diverged", "repeated"))
    notes = []
    if diverged:
        notes.append(f"{diverged} diverged runs of these cells are in no curve: a search would have paid for them, so its best of k is "
                     "higher than told")
    if repeated:
        notes.append(f"{repeated} runs share seed and tuned values with another run of their cell and are left out: they differ in something else")
    return notes


def accuracy_cells(one: accuracies.Accuracy) -> tuple[str, ...]:
    """A row of the table of accuracies."""
    pair = one.against
    told = ("", "", "", "") if pair is None else (f"{one.shared}", f"{pair.difference:+.2%}", f"{pair.low:+.2%} to {pair.high:+.2%}",
                                                  f"{pair.better:.1%}")
    return (one.model, f"{one.correct} of {one.questions}", f"{one.share.value:.2%}", f"{one.share.low:.2%} to {one.share.high:.2%}", *told)


ACCURACY_HEADER = ("model", "right", "accuracy", "interval", "shared questions", "minus the reference", "interval", "chance to be better")


def _variance_table(parts: VarianceParts) -> Table:
    made = _bare("standard deviations of the final loss (nats/token)", ("part", "sd", ""), (1,))
    for row in variance_rows(parts):
        made.add_row(*row)
    return made


def _gap_table(gaps, reference: str, level: float) -> Table:
    made = _bare(f"loss minus that of {reference}, over runs matched in all else, seed too (nats/token)",
                 ("precision", "bits", "pairs", "mean gap", f"{level:.0%} interval of the mean", "smallest", "largest"), (1, 2, 3, 5, 6))
    for gap in gaps:
        made.add_row(gap.precision, f"{gap.bits:g}", f"{len(gap.values)}", f"{gap.mean:+.4f}",
                     "one pair" if math.isnan(gap.low) else f"{gap.low:+.4f} to {gap.high:+.4f}", f"{min(gap.values):+.4f}",
                     f"{max(gap.values):+.4f}")
    return made


def _search_table(found: list[Search], tuned) -> Table:
    header, counts = search_header(found, tuned)
    made = _bare(f"expected lowest loss of k runs of a search over {', '.join(tuned)} (nats/token)", header, range(3, len(header)), left=(2,))
    for search in found:
        made.add_row(*search_cells(search, counts))
    return made


def _accuracy_table(found, level: float) -> Table:
    made = _bare(f"accuracies, {level:.0%} credible intervals", ACCURACY_HEADER, (1, 2, 4, 5, 7))
    for one in found:
        made.add_row(*accuracy_cells(one))
    return made


def _bare(title: str, header, right=(), left=()) -> Table:
    made = Table(title=title, title_justify="left")
    for i, name in enumerate(header):
        made.add_column(name, justify="right" if i in right and i not in left else "left", overflow="fold")
    return made
