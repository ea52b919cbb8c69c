"""Statistics of a run table that need no law: the noise between seeds, and loss gaps between runs that differ in precision alone."""
from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import stdtrit

from scaling.laws.parameters import WIDTHS

UNQUANTIZED_BITS = 16.0  # float32, bfloat16 and float16 runs count as references
GROUP = ("batch_tokens", "cooldown_steps", "lr_rule", "lr", "schedule")  # columns; other batches or schedules are other experiments


@dataclass(frozen=True)
class Run:
    """One finished run. n_params, tokens; bits: the narrowest width of weights, activations and output gradients (inf when none is
    below 16); widths: bits columns as the laws take them; loss, nats/token; data: name of the data set; corpus: what tells data
    sets apart, their sha256 or, where there is none, their name; group: what else must match for two runs to be a pair
    (GROUP)."""

    run_id: str
    n_params: float
    tokens: float
    bits: float
    widths: dict[str, float]
    precision: str
    seed: int
    loss: float
    data: str | None
    corpus: str | None
    group: tuple

    @property
    def quantized(self) -> bool:
        return self.bits < UNQUANTIZED_BITS

    @property
    def setting(self) -> tuple:
        """All that a run shares with the runs it is compared with, precision and seed aside."""
        return self.n_params, self.tokens, self.corpus, self.group


@dataclass(frozen=True)
class Noise:
    """Standard deviation of the final loss between seeds, nats per token; dof: degrees of freedom; groups: how many were pooled."""

    sd: float
    dof: int
    groups: int


@dataclass(frozen=True)
class Gap:
    """Loss of a precision minus its reference, nats/token, over runs matched in `Run.setting` and seed. low, high: Student interval of the
    mean at the level asked for, NaN for one pair; values: the pairs."""

    precision: str
    bits: float
    mean: float
    low: float
    high: float
    values: tuple[float, ...]


def finished_runs(relation) -> list[Run]:
    """The done runs of a run table (see `scaling.table`) that have a size, tokens and a finite loss. Order of the table."""
    wanted = ("run_id", "status", "n_params", "tokens", *WIDTHS, "output_gradients_bits", "precision", "exemptions", "seed", "loss",
              "data_sha256", "data", *GROUP)
    arrays = columns_of(relation)
    runs, exemptions = [], []
    for i in range(len(relation)):
        row = {name: arrays[name][i] if name in arrays else None for name in wanted}
        if row["status"] not in (None, "done") or any(row[name] is None for name in ("n_params", "tokens", "loss")):
            continue
        if not math.isfinite(row["loss"]):
            continue
        widths = [row[name] for name in (*WIDTHS, "output_gradients_bits") if row[name] is not None]
        law_widths = {name: math.inf if row[name] is None else float(row[name]) for name in WIDTHS}
        corpus = row["data"] if row["data_sha256"] is None else row["data_sha256"]
        bits = min((float(width) for width in widths if width < UNQUANTIZED_BITS), default=math.inf)
        runs.append(Run(str(row["run_id"] or i), float(row["n_params"]), float(row["tokens"]), bits, law_widths,
                        str(row["precision"] or _width_name(bits)), int(row["seed"] or 0), float(row["loss"]),
                        None if row["data"] is None else str(row["data"]),
                        None if corpus is None else str(corpus), tuple(row[name] for name in GROUP)))
        exemptions.append(row["exemptions"])
    return _one_name_per_width(_one_name_per_exemptions(runs, exemptions))


def _one_name_per_exemptions(runs: list[Run], exemptions: list[str | None]) -> list[Run]:
    """The runs with names such that one precision is one set of exempt places: "int4" with the last block high beside "int4" without becomes
    "int4(last1:high)". What has places of its own is named by them wherever nothing else is quantized: "float32(head:int8)" is no reference."""
    found = defaultdict(set)
    for run, places in zip(runs, exemptions):
        found[run.precision].add(places)
    return [replace(run, precision=f"{run.precision}({places})") if places and (len(found[run.precision]) > 1 or not run.quantized) else run
            for run, places in zip(runs, exemptions)]


def _one_name_per_width(runs: list[Run]) -> list[Run]:
    """The runs with names such that one precision is one width: "int" at 4 and 32 bits becomes "int/4" and "int/unquantized"."""
    widths = defaultdict(set)
    for run in runs:
        widths[run.precision].add(run.bits)
    return [replace(run, precision=f"{run.precision}/{_width_name(run.bits)}") if len(widths[run.precision]) > 1 else run for run in runs]


def columns_of(relation) -> dict[str, list]:
    """Column -> list of Python values, None for NULL."""
    rows = relation.fetchall()
    return {name: [row[i] for row in rows] for i, name in enumerate(relation.columns)}


def indistinct(runs: list[Run]) -> list[Run]:
    """The runs that share setting, precision and seed with a run of another run_id: they differ in something that no column here
    names, so none of them can stand for that seed, and pairs and seed noise go without them."""
    return [run for same in _by_identity(runs).values() if len(same) > 1 for run in same.values()]


def _distinct(runs: list[Run]) -> list[Run]:
    return [run for same in _by_identity(runs).values() if len(same) == 1 for run in same.values()]


def _by_identity(runs: list[Run]) -> dict[tuple, dict[str, Run]]:
    """(setting, precision, seed) -> run_id -> run; a run that is in the table twice is there once."""
    found = defaultdict(dict)
    for run in runs:
        found[run.setting, run.precision, run.seed][run.run_id] = run
    return found


def seed_noise(runs: list[Run]) -> Noise | None:
    """Pooled deviation between seeds over groups that share everything else; None when no group has two seeds. Without `indistinct` runs."""
    groups = defaultdict(dict)
    for run in _distinct(runs):
        groups[run.setting, run.precision][run.seed] = run.loss
    samples = [np.array(list(losses.values())) for losses in groups.values() if len(losses) > 1]
    if not samples:
        return None
    dof = sum(len(sample) - 1 for sample in samples)
    return Noise(math.sqrt(sum(float(((s - s.mean()) ** 2).sum()) for s in samples) / dof), dof, len(samples))


def reference_precision(runs: list[Run]) -> str | None:
    """The precision that gaps are taken against: float32 if there, else the most common unquantized one; None when all are quantized."""
    names = [run.precision for run in runs if not run.quantized]
    if not names:
        return None
    return "float32" if "float32" in names else max(dict.fromkeys(names), key=names.count)


def paired_gaps(runs: list[Run], n_params: float | None = None, level: float = 0.95) -> list[Gap]:
    """One Gap per quantized precision, narrowest first, over all matched pairs (or those of one size). Without `indistinct` runs.
    level: of the intervals."""
    reference = reference_precision(runs)
    chosen = [run for run in _distinct(runs) if n_params is None or run.n_params == n_params]
    base = {(run.setting, run.seed): run.loss for run in chosen if run.precision == reference}
    pairs = defaultdict(list)
    for run in chosen:
        key = (run.setting, run.seed)
        if run.quantized and key in base:
            pairs[run.bits, run.precision].append(run.loss - base[key])
    return [_gap(precision, bits, values, level) for (bits, precision), values in sorted(pairs.items())]


def mean_interval(values, level: float = 0.95) -> tuple[float, float, float]:
    """(mean, low, high) by Student's t; low and high NaN for a single value."""
    values = np.asarray(values, dtype=np.float64)
    mean = float(values.mean())
    if values.size < 2:
        return mean, math.nan, math.nan
    half_width = float(stdtrit(values.size - 1, 0.5 + 0.5 * level)) * float(values.std(ddof=1)) / math.sqrt(values.size)
    return mean, mean - half_width, mean + half_width


def _gap(precision: str, bits: float, values: list[float], level: float) -> Gap:
    return Gap(precision, bits, *mean_interval(values, level), tuple(values))


def _width_name(bits: float) -> str:
    return f"{bits:g}" if math.isfinite(bits) else "unquantized"
