"""The standard analysis of a folder of runs: which rows, which laws, which choice, what is held out. `bitlaw demo` and the report use it."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import duckdb
import numpy as np

from scaling.compare import Comparison, compare
from scaling.fit import fit
from scaling.laws import Law, resolve
from scaling.mapped import mapped_rows, one_line
from scaling.observations import RUN_ALIASES
from scaling.result import Fit
from scaling.statistics import Gap, Noise, Run, columns_of, finished_runs, indistinct, paired_gaps, reference_precision, seed_noise
from scaling.table import RUN_COLUMNS, Source, quote, table

CHINCHILLA = ("chinchilla:tied", "chinchilla")
PRECISION = ("kumar:tied+plain", "kumar:plain", "kumar:tied", "kumar")
MIN_SIZES_TO_HOLD_OUT = 3
LARGEST = "N = max(N) OVER ()"
OWN_COLUMNS = {law: quote(column) for law, column in RUN_ALIASES.items()}
"""Told to every fit: a table that is mapped may have an N of its own, in millions."""
DONE = "coalesce(status, 'done') = 'done'"
MEASURED = "coalesce(isfinite(loss) AND n_params IS NOT NULL AND tokens IS NOT NULL, false)"
CORPUS = "coalesce(CAST(data_sha256 AS VARCHAR), CAST(data AS VARCHAR))"  # as in finished_runs


@dataclass(frozen=True)
class Analysis:
    """whole: the run table; relation: its rows that are analysed, of one data set; runs: the done ones of these; chinchilla, precision:
    comparisons of the candidate laws, or None; why: law -> why there is none; unconverged: law -> its candidates, when none of them
    converged; holdout: SQL of the held-out rows or None; noise: between
    seeds or None; gaps: paired, per precision; reference: the precision that gaps are against; notes: remarks on what was left out."""

    whole: duckdb.DuckDBPyRelation
    relation: duckdb.DuckDBPyRelation
    runs: tuple[Run, ...]
    chinchilla: Comparison | None
    precision: Comparison | None
    why: dict[str, str]
    unconverged: dict[str, tuple[Fit, ...]]
    holdout: str | None
    noise: Noise | None
    gaps: tuple[Gap, ...]
    reference: str | None
    notes: tuple[str, ...]

    @property
    def fit_chinchilla(self) -> Fit | None:
        return self.chinchilla.best if self.chinchilla else None

    def covered(self) -> list[Run]:
        """The runs that the precision fit speaks of, or, where there is none, the Chinchilla fit: its baseline runs."""
        baseline = [run for run in self.runs if not run.quantized]
        return list(self.runs) if self.precision or not baseline else baseline

    @property
    def fit_precision(self) -> Fit | None:
        return self.precision.best if self.precision else None

    def inputs(self, fit: Fit, runs: Sequence[Run]) -> dict[str, np.ndarray]:
        """What the law of `fit` takes at these runs, by the columns that it was fitted to; operands that a run lacks are unquantized."""
        told = {name: sql for name, sql in fit.metrics["columns"].items() if name in fit.law.inputs}
        rows = self.relation.project(", ".join(["run_id", *(f"({sql})" for sql in told.values())])).fetchall()
        by_run = {str(run_id): values for run_id, *values in rows}
        untouched = {operand.input: operand.untouched for operand in fit.law.operands}
        columns = zip(*(by_run[run.run_id] for run in runs), strict=True)
        return {name: np.array([untouched.get(name) if value is None else value for value in values])
                for name, values in zip(told, columns, strict=True)}


def analyse(source: Source, bootstrap: int = 200, progress: Callable[[int, int], None] | None = None, columns: Mapping[str, str] | None = None,
            where: str | None = None, laws: Sequence[str | Law] | None = None) -> Analysis:
    """Fits Chinchilla to the unquantized runs and the precision law to all of them, the largest size held out when there are three.
    laws: what to choose the law of all runs from, in place of the variants of Kumar's.

    alpha = beta tied, and no offsets, unless the data say otherwise: every variant is fitted, and BIC on the fitted rows chooses. A law
    that the runs cannot carry is left out with its reason: a small or one-sided folder is described, not refused. ValueError only when
    `source` is no run table at all, or `bootstrap` is negative. source: whatever `scaling.table` takes; absent columns count as
    NULL. columns: column of a run table -> SQL expression over the source's own, for tables with other names ({"n_params":
    '"Model Size"'}); N and D stand for n_params and tokens. where: SQL, rows to use.
    """
    if bootstrap < 0:
        raise ValueError(f"bootstrap={bootstrap}: need bootstrap >= 0")
    for law in laws or ():
        resolve(law)  # a misspelt name is an error, not a law that these rows cannot fit
    whole = with_run_columns(table(source), columns, where)
    relation, runs, notes = _analysed(whole)
    holdout = LARGEST if len({run.n_params for run in runs}) >= MIN_SIZES_TO_HOLD_OUT else None
    if runs and holdout is None:
        notes.append(f"fewer than {MIN_SIZES_TO_HOLD_OUT} sizes: nothing is held out")
    baseline = _are(run for run in runs if not run.quantized)
    if len({run.precision for run in runs}) == 1 and runs[0].quantized:
        notes.append(f"every run is {runs[0].precision}: chinchilla is fitted to these")
        baseline = None
    fits, why, unconverged = {}, {}, {}
    for name, tried, extra in (("chinchilla", CHINCHILLA, baseline), ("precision", laws or PRECISION, None)):
        rows = relation.filter(extra) if extra else relation
        candidates = _candidates(rows, tried, holdout, "" if laws and name == "precision" and runs else _refusal(name, runs, baseline))
        if isinstance(candidates, str):
            why[name] = candidates
        elif candidates.supported:
            fits[name] = _with_bootstrap(candidates, rows, tried, holdout, bootstrap, progress)
        else:
            unconverged[name] = candidates.fits
            why[name] = f"no candidate converged ({', '.join(fitted.label for fitted in candidates.fits)})"
    return Analysis(whole, relation, tuple(runs), fits.get("chinchilla"), fits.get("precision"), why, unconverged, holdout, seed_noise(runs),
                    tuple(paired_gaps(runs)), reference_precision(runs), tuple(notes))


def _are(runs: Iterable[Run]) -> str:
    """SQL: the rows of these runs."""
    ids = ", ".join("'" + run.run_id.replace("'", "''") + "'" for run in runs)
    return f"run_id IN ({ids})" if ids else "false"


def _analysed(whole: duckdb.DuckDBPyRelation) -> tuple[duckdb.DuckDBPyRelation, list[Run], list[str]]:
    """(rows, runs, notes): the rows that can be analysed together, their finished runs, and what was left out. A name is no identity:
    "file" is another text on every machine, and "stdlib" with every Python, so data sets are told apart by their sha256."""
    relation, runs, notes = whole, finished_runs(whole), []
    lost = len(relation.filter(f"{DONE} AND NOT {MEASURED}"))
    if lost:
        notes.append(f"{lost} finished run(s) without size, tokens or a finite loss are left out")
        relation = relation.filter(f"NOT {DONE} OR {MEASURED}")
    corpora = [run.corpus for run in runs]
    if len(set(corpora)) > 1:
        common = max(dict.fromkeys(corpora), key=corpora.count)
        name = next(run.data for run in runs if run.corpus == common) or "unnamed data"
        told = name if common in (name, None) else f"{name} (sha256 {common[:12]})"
        notes.append(f"{len(set(corpora))} data sets in one folder: only the {corpora.count(common)} runs on {told} are analysed")
        literal = "NULL" if common is None else "'" + common.replace("'", "''") + "'"
        relation = relation.filter(f"{CORPUS} IS NOT DISTINCT FROM {literal}")
        runs = finished_runs(relation)  # again, since a precision is named by the widths that occur beside it
    alike = len(indistinct(runs))
    if alike:
        notes.append(f"{alike} runs share size, tokens, precision, seed, data, batch and schedule with another run: they are in the fits, "
                     "but in no matched pair and not in the noise between seeds")
    return relation, runs, notes


def with_run_columns(relation: duckdb.DuckDBPyRelation, columns: Mapping[str, str] | None = None,
                     where: str | None = None) -> duckdb.DuckDBPyRelation:
    """The relation with every column of a run table, those of `columns` by their expressions, the absent ones NULL, and the rows where
    `where`. ValueError when it has no loss: then it is no run table."""
    given = {RUN_ALIASES.get(name, name): sql for name, sql in (columns or {}).items()}
    unknown = next((name for name in given if name not in RUN_COLUMNS), None)
    if unknown:
        raise ValueError(f"columns: {unknown!r} is no column of a run table; known are N, D, precision, weights_bits, activations_bits, "
                         f"seed, and {len(RUN_COLUMNS)} in all: RUN_COLUMNS of scaling/table.py")
    given |= {column: quote(law) for law, column in RUN_ALIASES.items() if column not in (*given, *relation.columns) and law in relation.columns}
    missing = [name for name in ("n_params", "tokens", "loss") if name not in (*given, *relation.columns)]
    if missing:
        raise ValueError(f"a run table needs {', '.join(missing)}; this one has {', '.join(relation.columns)} "
                         f"(name them: --columns {','.join(name + '=...' for name in missing)})")
    kinds = RUN_COLUMNS | dict.fromkeys(RUN_ALIASES.values(), "DOUBLE")  # expressions of sizes need not be whole
    own = {name: str(kind) for name, kind in zip(relation.columns, relation.types, strict=True)}
    given |= {name: quote(name) for name, kind in kinds.items() if kind == "DOUBLE" and own.get(name) == "VARCHAR" and name not in given}
    if given or where:
        filters = {f"where {where}": where} if where else {}
        cast = {name: sql if kinds[name] == "DOUBLE" else f"CAST(({sql}) AS {kinds[name]})" for name, sql in given.items()}
        stages = mapped_rows(relation, cast, [name for name in cast if kinds[name] == "DOUBLE"], filters, "a run table")
        relation = stages[-1]
        with one_line("columns", relation.columns):
            columns_of(relation.project(", ".join(given or ["loss"])))  # relations are lazy: a cast that fails is told here
        if where and not len(relation):
            raise ValueError(f"where {where} leaves none of {len(stages[0])} rows")
    below = len(relation.filter("loss <= 0"))
    if below:
        raise ValueError(f"loss is zero or negative in {below} of {len(relation)} rows; a run table needs positive losses, so filter these "
                         "out with where")
    if "run_id" not in relation.columns:  # numbered by their values: a query gives its rows in any order
        order = ["n_params", "tokens", "loss", *(quote(name) for name in relation.columns if name not in ("n_params", "tokens", "loss"))]
        relation = relation.project(f"*, 'row ' || row_number() OVER (ORDER BY {', '.join(order)}) AS run_id")
    absent = [f"CAST(NULL AS {kind}) AS {name}" for name, kind in RUN_COLUMNS.items() if name not in relation.columns]
    return relation.project(", ".join(["*", *absent]))


def _refusal(name: str, runs: list[Run], baseline: str | None) -> str:
    """Why a law has nothing to fit here, or nothing."""
    if not runs:
        return "no finished run with a finite loss"
    if name == "precision" and not any(run.quantized for run in runs):
        return "no quantized run: there is no precision to fit"
    if name == "precision" and len({(run.bits, *run.widths.values()) for run in runs}) == 1:
        return "one precision only: there is nothing to compare it with"
    if name == "chinchilla" and baseline and all(run.quantized for run in runs):
        return "no unquantized run: there is no baseline to fit"
    return ""


def _candidates(relation, laws: Sequence[str | Law], holdout: str | None, refusal: str) -> Comparison | str:
    """The laws on these rows, without a bootstrap, which only the chosen one then gets; or why none can be fitted: `refusal`, unless empty."""
    if refusal:
        return refusal
    try:
        return compare(relation, laws, holdout=holdout, columns=OWN_COLUMNS)
    except ValueError as error:  # every variant was refused: too few rows, an input that does not vary
        return str(error)


def _with_bootstrap(candidates: Comparison, relation, laws: Sequence[str | Law], holdout: str | None, bootstrap: int, progress) -> Comparison:
    """The comparison with the chosen fit made again, with its resamples."""
    if not bootstrap:
        return candidates
    best = candidates.best
    chosen = next((law for law in laws if getattr(law, "name", law) == best.label), best.label)
    final = fit(relation, chosen, columns=OWN_COLUMNS, holdout=holdout, bootstrap=bootstrap, progress=progress)
    return Comparison(tuple(final if fitted is best else fitted for fitted in candidates.fits), candidates.refused)
