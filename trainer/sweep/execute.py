"""Carry out a plan on this machine: one cohort after another, each in one program; what fails is recorded and the rest goes on."""
from __future__ import annotations

import contextlib
import dataclasses
import time
import traceback
from dataclasses import dataclass, field

from trainer import describe, distributed, mirrors
from trainer.cohort import Layout, Program
from trainer.global_program import GlobalProgram
from trainer.config.frozen import NUMERICS_VERSION
from trainer.loop import Progress, run_cohort
from trainer.member import Member
from trainer.sweep.plan import Cohort, Plan, PlannedRun, write_plan
from trainer.sweep.progress import Watch, watch


@dataclass
class Outcome:
    """What a launch did. Seconds: whole launch, and its parts spent in training steps, evaluation and checkpoints, compiling."""

    records: list[dict] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    compiles: int = 0
    seconds: float = 0.0
    training_seconds: float = 0.0
    event_seconds: float = 0.0
    compile_seconds: float = 0.0
    tokens: int = 0


def _open_member(run: PlannedRun, layout: Layout) -> Member:
    """The run's folder described, its mirror started."""
    config = dataclasses.asdict(run.config)
    for stale in ("error.txt", "record.json") if distributed.leads() else ():  # of a failed try
        (run.folder.path / stale).unlink(missing_ok=True)
    if run.begun_layout != layout:
        run.folder.write_config({"run_id": run.run_id, "trunk_id": run.trunk_id, "data_sha256": run.dataset.sha256,
                                 "numerics_version": NUMERICS_VERSION, "code_version": describe.code_version(),
                                 "layout": dataclasses.asdict(layout), "config": config})
    mirror = mirrors.make(run.config.options.logger if distributed.leads() else "none")
    mirror.start(run.run_id, run.config.options.sweep, config, run.folder.path)
    return Member(run.config, run.run_id, run.trunk_id, run.folder, mirror)


def _train(cohort: Cohort, members: list[Member], program: Program, outcome: Outcome, view: Watch) -> None:
    """Run a cohort to its end; what it took is added to the outcome also when it fails."""
    per_token = cohort.structure.model.flops_per_token(cohort.structure.seq_len)
    compiles, compile_seconds = program.compiles, program.compile_seconds

    def on_progress(progress: Progress) -> None:
        outcome.tokens += progress.tokens
        if progress.tokens:
            outcome.training_seconds += progress.seconds
        else:
            outcome.event_seconds += progress.seconds
        outcome.records.extend(progress.finished)
        view.advance(progress, per_token)

    try:
        run_cohort(members, program, cohort.runs[0].dataset, on_progress)
    finally:
        outcome.compiles += program.compiles - compiles
        outcome.compile_seconds += program.compile_seconds - compile_seconds


def _record_failures(cohort: Cohort, members: list[Member], outcome: Outcome) -> int:
    """For every run that did not get to its end: record.json with status failed, and the traceback beside it."""
    mirrored = {member.run_id: member.mirror for member in members}
    unfinished = [run for run in cohort.runs if not run.done]
    for run in unfinished:
        (run.folder.path / "error.txt").write_text(traceback.format_exc())
        record = describe.config_columns(run.config, run.dataset, cohort.structure.model) | {
            "run_id": run.run_id, "trunk_id": run.trunk_id, "status": "failed"}
        run.folder.finish(record)
        if run.run_id in mirrored:
            mirrored[run.run_id].finish(record)
        outcome.failed.append(run.run_id)
    return len(unfinished)


def _run(cohort: Cohort, programs: dict, outcome: Outcome, view: Watch) -> None:
    """One cohort: claim its runs, train them, record what failed."""
    with contextlib.ExitStack() as claims:
        for run in cohort.runs:
            claims.enter_context(run.folder.claim())
        # Another launcher may have finished some of them since the plan was made.
        cohort = dataclasses.replace(cohort, runs=tuple(run for run in cohort.runs if not run.done))
        if not cohort.runs:
            return
        members: list[Member] = []
        layout = cohort.layout
        view.cohort(cohort.runs[0].config.model.name, len(cohort.runs), layout.name)
        try:
            members.extend(_open_member(run, layout) for run in cohort.runs)
            if (cohort.structure, layout) not in programs:
                programs[cohort.structure, layout] = (GlobalProgram if layout.sharding else Program)(cohort.structure, layout)
            _train(cohort, members, programs[cohort.structure, layout], outcome, view)
        except Exception as error:  # whatever it was: the other cohorts do not depend on it, and it is on record
            view.failure(f"{type(error).__name__}: {error}", _record_failures(cohort, members, outcome))
            if distributed.several():
                raise  # the other processes wait for this one's part: they go down with it


def execute(plan: Plan, quiet: bool = False) -> Outcome:
    """Train everything in the plan that is not done. A cohort that fails is recorded run by run and does not stop the others.

    ValueError when another living process trains one of the runs.
    """
    outcome = Outcome()
    began = time.perf_counter()
    for run in plan.runs[:1]:
        mirrors.make(run.config.options.logger)  # a missing package is the user's to mend before anything compiles
    distributed.wait("planned")  # all have read the folders as they were
    if distributed.leads():
        write_plan(plan)
    programs: dict = {}  # a structure that fills several cohorts is compiled once
    with watch(plan, quiet or not distributed.leads()) as view:
        for cohort in plan.cohorts:
            _run(cohort, programs, outcome, view)
    distributed.wait("done")  # records are there to be read
    outcome.seconds = time.perf_counter() - began
    return outcome
