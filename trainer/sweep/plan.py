"""From frozen configs to a plan: which runs are done, which share a program, which share a trunk."""
from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax

from trainer import build, checkpoint, distributed, lease
from trainer.cohort import Layout, choose_layout, global_layout, is_possible
from trainer.config import TrainConfig, run_id, trunk_id
from trainer.config.checks import in_range
from trainer.data import Dataset, load, num_windows
from trainer.records import NewerVersionError, Onlooker, RunFolder
from trainer.step import StepStructure
from trainer.sweep import planfile
from trainer.sweep.planfile import Composition

MAX_MEMBERS = 64  # of one cohort, unless the launch says otherwise


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
        """The layout that a run began in, as its config.json tells; None for one that is new."""
        about = _unless_damaged(self.folder.config)
        return Layout(**about["layout"]) if about else None

    @property
    def status(self) -> str | None:
        """done, diverged or failed by its record; None while there is none that is whole."""
        record = _unless_damaged(self.folder.record)
        return None if record is None else record["status"]

    @property
    def done(self) -> bool:
        """True when the run has a record that stands: done or diverged."""
        return self.status in ("done", "diverged")


def _unless_damaged(read: Callable[[], dict | None]) -> dict | None:
    """What a file holds; None for one that a kill or a full disk left in pieces, which the run writes again. NewerVersionError passes."""
    try:
        return read()
    except NewerVersionError:
        raise
    except ValueError:
        return None


@dataclass(frozen=True)
class Cohort:
    """Runs of one structure on one data set that are still to be trained, in one program, in the places that their composition gives
    them. Places of runs that are done, or that nobody asked for now, stay empty."""

    structure: StepStructure
    runs: tuple[PlannedRun, ...]
    composition: Composition

    @property
    def layout(self) -> Layout:
        return self.composition.layout

    @property
    def num_slots(self) -> int:
        return len(self.composition.slots)

    def slot(self, run: PlannedRun) -> int:
        """The run's place."""
        return self.composition.slots.index(run.run_id)

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
    """runs: all that were asked for; cohorts: what of them is to be trained; failed: what failed before, which is tried again only if
    `retry_failed`; max_members: of a new cohort."""

    root: Path
    runs: tuple[PlannedRun, ...]
    cohorts: tuple[Cohort, ...] = ()
    failed: tuple[PlannedRun, ...] = ()
    max_members: int = MAX_MEMBERS
    retry_failed: bool = False

    @property
    def num_done(self) -> int:
        return len(self.runs) - len(self.failed) - sum(len(c.runs) for c in self.cohorts)

    def formed(self, known: list[Composition]) -> Plan:
        """With cohorts of what is to be trained, by what is known of their composition."""
        statuses = {run.run_id: run.status for run in self.runs}
        failed = () if self.retry_failed else tuple(run for run in self.runs if statuses[run.run_id] == "failed")
        over = {run_id for run_id, status in statuses.items() if status in ("done", "diverged")} | {run.run_id for run in failed}
        return replace(self, cohorts=_cohorts(self.runs, over, known, self.max_members), failed=failed)


def _structure_key(run: PlannedRun):
    """Equal for runs that one compiled program can train together."""
    policy = jax.tree.structure(build.hyper(run.config).policy)
    return run.structure, policy, run.config.eval_sequences, run.dataset.sha256, run.config.options


def make_plan(configs: list[TrainConfig], max_members: int = MAX_MEMBERS, retry_failed: bool = False) -> Plan:
    """The plan for these configs; loads (and where necessary prepares) their data. Equal runs count once. Writes nothing in runs_dir."""
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
    options = configs[0].options
    root = Path(options.runs_dir) / options.sweep
    return Plan(root, tuple(runs.values()), max_members=max_members, retry_failed=retry_failed).formed(planfile.read(root)[1])


def settle(plan: Plan) -> Plan:
    """The plan with its cohorts as they stand in plan.json, where those that are new are written."""
    with planfile.settling(plan.root):
        run_ids, known = planfile.read(plan.root)
        plan = plan.formed(known)
        for run in plan.runs:
            if run.done:  # by a process that was killed between its record and the end of its lease
                lease.discard_dead(run.folder.lease)
        known += [c.composition for c in plan.cohorts if c.composition not in known]
        planfile.write(plan.root, list(dict.fromkeys([*run_ids, *(run.run_id for run in plan.runs)])), known)
    return plan


def split(cohort: Cohort, root: Path) -> tuple[Cohort, Cohort]:
    """Two cohorts of half its runs, trunks kept together where there are several, in place of one that needs more memory than there is."""
    trunks: dict[str, list[PlannedRun]] = {}
    for run in cohort.runs:
        trunks.setdefault(run.trunk_id, []).append(run)
    ordered = [run for trunk in trunks.values() for run in trunk]
    half = len(ordered) // 2
    if len(trunks) > 1:
        half = min(itertools.accumulate(len(trunk) for trunk in list(trunks.values())[:-1]), key=lambda count: abs(count - half))
    parts = tuple(Cohort(cohort.structure, tuple(part), _compose(part)) for part in (ordered[:half], ordered[half:]))
    with planfile.settling(root):
        run_ids, known = planfile.read(root)
        planfile.write(root, run_ids, [c for c in known if c != cohort.composition] + [part.composition for part in parts])
    return parts


def _cohorts(runs: Sequence[PlannedRun], over: set[str], known: list[Composition], max_members: int) -> tuple[Cohort, ...]:
    """What is not over, in cohorts, the smallest first: those that are known, and new ones for what is in none. A known one of more
    devices than there are is given up, since it cannot be had."""
    place = {run_id: index for index, composition in enumerate(known) if is_possible(composition.layout)
             for run_id in composition.slots if run_id is not None}
    begun: dict = {}
    groups: dict = {}
    for run in runs:
        if run.run_id not in place:
            key = (*_structure_key(run), run.begun_layout)
            groups.setdefault(key, {}).setdefault(run.trunk_id, []).append(run)
        elif run.run_id not in over:
            begun.setdefault((place[run.run_id], _structure_key(run)), []).append(run)
    cohorts = [Cohort(key[0], tuple(members), known[index]) for (index, key), members in begun.items()]
    for key, trunks in groups.items():
        for chunk in _chunks(list(trunks.values()), 1 if _sharded(key) else max_members):
            left = tuple(run for run in chunk if run.run_id not in over)
            if left:
                cohorts.append(Cohort(key[0], left, _compose(chunk, key[-1])))
    return tuple(sorted(cohorts, key=Cohort.flops))


def _sharded(key) -> bool:
    """True for runs that have all devices to themselves; a run that began in a cohort goes on in it."""
    *_, options, begun = key
    return options.sharding is not None if begun is None else begun.sharding is not None


def _compose(runs: list[PlannedRun], begun: Layout | None = None) -> Composition:
    """Places for runs that train together. begun: the layout that they began in, before compositions were written down."""
    layout, structure, sharding = begun, runs[0].structure, runs[0].config.options.sharding
    if layout is None or not is_possible(layout):
        parts = math.gcd(structure.batch_size // structure.accumulate, runs[0].config.eval_sequences)
        layout = choose_layout(len(runs), parts) if sharding is None else global_layout(sharding)
    return Composition.deal([(run.run_id, run.config.steps) for run in runs], layout)


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
