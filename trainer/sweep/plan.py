"""From frozen configs to a plan: which runs are done, which share a program, which share a trunk."""
from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import jax

from trainer import build, checkpoint, distributed
from trainer.cohort import Layout, choose_layout, global_layout, is_possible
from trainer.config import TrainConfig, run_id, trunk_id
from trainer.config.checks import in_range
from trainer.data import Dataset, load, num_windows
from trainer.records import Onlooker, RunFolder
from trainer.step import StepStructure

MAX_MEMBERS = 64  # of one cohort


@dataclass(frozen=True)
class PlannedRun:
    config: TrainConfig
    run_id: str
    trunk_id: str
    dataset: Dataset
    folder: RunFolder

    @property
    def structure(self) -> StepStructure:
        return build.step_structure(self.config, self.dataset.vocab_size)

    @property
    def begun_layout(self) -> Layout | None:
        """The layout that a run began in, as its config.json tells; None for one that is new or over."""
        about = None if self.done else self.folder.config()
        return Layout(**about["layout"]) if about else None

    @property
    def done(self) -> bool:
        """True when the run has a record that stands: done or diverged. A failed run is tried again."""
        record = self.folder.record()
        return record is not None and record["status"] in ("done", "diverged")


@dataclass(frozen=True)
class Cohort:
    """Runs of one structure on one data set that are still to be trained, in one program. A run that has begun goes on in the
    layout that it began in, and with the runs that began in it, so that it ends in the bits of one that was never stopped; for new
    runs the layout follows from how many were `planned`, done ones included."""

    structure: StepStructure
    runs: tuple[PlannedRun, ...]
    planned: int
    begun_layout: Layout | None

    @property
    def layout(self) -> Layout:
        """Where the cohort's members lie. A layout of more devices than there are is given up, since it cannot be had."""
        if self.begun_layout is not None and is_possible(self.begun_layout):
            return self.begun_layout
        sharding = self.runs[0].config.options.sharding
        if sharding is not None:
            return global_layout(sharding)
        parts = math.gcd(self.structure.batch_size // self.structure.accumulate, self.runs[0].config.eval_sequences)
        return choose_layout(self.planned, parts)

    def updates(self) -> int:
        """Optimizer updates left to compute: a trunk once, and each branch's cool-down, less what checkpoints hold."""
        trunks: dict[str, list[PlannedRun]] = {}
        for run in self.runs:
            trunks.setdefault(run.trunk_id, []).append(run)
        total = 0
        for group in trunks.values():
            longest = max(group, key=lambda run: run.config.steps)
            for run in group:
                saved = checkpoint.steps(run.folder.checkpoints)
                start = 0 if run is longest else run.config.steps - run.config.schedule.cooldown_steps
                total += run.config.steps - max([start, *saved])
        return total

    def flops(self) -> float:
        """Floating-point operations of those updates."""
        tokens = self.updates() * self.structure.batch_size * self.structure.seq_len
        return tokens * self.structure.model.flops_per_token(self.structure.seq_len)


@dataclass(frozen=True)
class Plan:
    root: Path
    runs: tuple[PlannedRun, ...]
    cohorts: tuple[Cohort, ...] = field(default=())  # of what is not done

    @property
    def num_done(self) -> int:
        return len(self.runs) - sum(len(c.runs) for c in self.cohorts)


def _structure_key(run: PlannedRun):
    """Equal for runs that one compiled program can train together."""
    policy = jax.tree.structure(build.hyper(run.config).policy)
    return run.structure, policy, run.config.eval_sequences, run.dataset.sha256, run.config.options, run.begun_layout


def _sharded(key) -> bool:
    """True for runs that have all devices to themselves; a run that began in a cohort goes on in it."""
    *_, options, begun = key
    return options.sharding is not None if begun is None else begun.sharding is not None


def make_plan(configs: list[TrainConfig], max_members: int = MAX_MEMBERS) -> Plan:
    """The plan for these configs; loads (and where necessary prepares) their data. Equal runs count once."""
    datasets: dict = {}
    runs: dict[str, PlannedRun] = {}
    for config in configs:
        if config.data not in datasets:
            datasets[config.data] = load(config.data)
        dataset = datasets[config.data]
        _check_data(config, dataset)
        _check_devices(config)
        name = run_id(config, dataset.sha256)
        folder = (RunFolder if distributed.leads() else Onlooker)(Path(config.options.runs_dir) / config.options.sweep / name)
        runs.setdefault(name, PlannedRun(config, name, trunk_id(config, dataset.sha256), dataset, folder))
    groups: dict = {}
    for run in runs.values():
        groups.setdefault(_structure_key(run), {}).setdefault(run.trunk_id, []).append(run)
    chunks = [(key, chunk) for key, trunks in groups.items() for chunk in _chunks(list(trunks.values()), 1 if _sharded(key) else max_members)]
    cohorts = [Cohort(key[0], tuple(run for run in chunk if not run.done), len(chunk), key[-1]) for key, chunk in chunks]
    options = configs[0].options
    return Plan(Path(options.runs_dir) / options.sweep, tuple(runs.values()), tuple(sorted((c for c in cohorts if c.runs), key=Cohort.flops)))


def _check_data(config: TrainConfig, dataset: Dataset) -> None:
    """ValueError if the data are too short for the config: known once they are loaded, said before anything compiles."""
    for part in ("train", "validation"):
        tokens = getattr(dataset, part).size
        if tokens <= config.seq_len:
            raise ValueError(f"seq_len={config.seq_len} is not possible; accepted: less than the {tokens} {part} tokens of data={dataset.name}")
    available = num_windows(dataset.validation, config.seq_len)
    in_range("eval.sequences", config.eval_sequences, 2, available, f"2 to {available}, the validation windows of {config.seq_len} tokens in data={dataset.name}")


def _check_devices(config: TrainConfig) -> None:
    """ValueError if a run cannot lie over the devices, or processes, as the config says."""
    sharding, micro = config.options.sharding, config.batch_size // config.accumulate
    if sharding is None and distributed.several():
        raise ValueError(f"sharding=null gives {jax.process_count()} processes nothing to share; accepted: sharding=data or fsdp")
    if sharding is not None and micro % jax.device_count():
        raise ValueError(f"batch_size={config.batch_size} with accumulate={config.accumulate} is {micro} sequences at once, which "
                         f"sharding={sharding} deals out to {jax.device_count()} devices; accepted: a multiple of them")


def _chunks(trunks: list[list[PlannedRun]], max_members: int):
    """Runs in chunks of at most max_members; a trunk's runs stay together where they fit."""
    chunk: list[PlannedRun] = []
    for trunk in trunks:
        if chunk and len(chunk) + len(trunk) > max_members:
            yield chunk
            chunk = []
        chunk.extend(trunk)
        while len(chunk) > max_members:
            yield chunk[:max_members]
            chunk = chunk[max_members:]
    if chunk:
        yield chunk


def write_plan(plan: Plan) -> None:
    """plan.json in the sweep's folder: every run that was ever planned there, so that `bitlaw status` knows what is missing."""
    path = plan.root / "plan.json"
    known = json.loads(path.read_text())["run_ids"] if path.exists() else []
    ids = list(dict.fromkeys([*known, *(run.run_id for run in plan.runs)]))
    try:
        plan.root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"runs_dir={plan.root.parent} cannot be written ({error.strerror}); accepted: a folder that can") from error
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"sweep": plan.root.name, "run_ids": ids}, indent=1))
    temporary.replace(path)
