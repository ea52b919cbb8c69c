"""Carry out a plan on this machine: one cohort after another, each in one program; what fails is recorded and the rest goes on."""
from __future__ import annotations

import contextlib
import dataclasses
import math
import time
import traceback
from dataclasses import dataclass, field

from trainer import describe, mirrors
from trainer.cohort import Program, choose_layout
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


def _open_member(run: PlannedRun) -> Member:
    """The run's folder described, its mirror started."""
    config = dataclasses.asdict(run.config)
    about = {"run_id": run.run_id, "trunk_id": run.trunk_id, "data_sha256": run.dataset.sha256, "numerics_version": NUMERICS_VERSION,
             "code_version": describe.code_version()}
    for stale in ("error.txt", "record.json"):  # of a failed try
        (run.folder.path / stale).unlink(missing_ok=True)
    if run.folder.config() is None:
        run.folder.write_config({**about, "config": config})
    options = run.config.options
    mirror = mirrors.make(options.logger)
    mirror.start(run.run_id, options.sweep, config, run.folder.path)
    return Member(run.config, run.run_id, run.trunk_id, run.folder, mirror)


def _run(cohort: Cohort, outcome: Outcome, view: Watch) -> None:
    first = cohort.runs[0]
    layout = choose_layout(cohort.planned, math.gcd(cohort.structure.batch_size // cohort.structure.accumulate, first.config.eval_sequences))
    per_token = cohort.structure.model.flops_per_token(cohort.structure.seq_len)
    program = Program(cohort.structure, layout)

    def on_progress(progress: Progress) -> None:
        outcome.tokens += progress.tokens
        if progress.tokens:
            outcome.training_seconds += progress.seconds
        else:
            outcome.event_seconds += progress.seconds
        outcome.records.extend(progress.finished)
        view.advance(progress, per_token)

    try:
        members = [_open_member(run) for run in cohort.runs]
        view.cohort(first.config.model.name, len(members), layout.name)
        run_cohort(members, program, first.dataset, on_progress)
    finally:
        outcome.compiles += program.compiles
        outcome.compile_seconds += program.compile_seconds


def _record_failures(cohort: Cohort, outcome: Outcome) -> None:
    """For every run that did not get to its end: record.json with status failed, and the traceback beside it."""
    for run in cohort.runs:
        if not run.done:
            (run.folder.path / "error.txt").write_text(traceback.format_exc())
            run.folder.finish({"run_id": run.run_id, "sweep": run.config.options.sweep, "status": "failed", "seed": run.config.seed,
                               "trunk_id": run.trunk_id, "precision": describe.precision_name(run.config.precision)})
            outcome.failed.append(run.run_id)


def execute(plan: Plan, quiet: bool = False) -> Outcome:
    """Train everything in the plan that is not done. A cohort that fails is recorded run by run and does not stop the others.

    ValueError when another living process trains one of the runs.
    """
    outcome = Outcome()
    began = time.perf_counter()
    for run in plan.runs[:1]:
        mirrors.make(run.config.options.logger)  # a missing package is the user's to mend before anything compiles
    write_plan(plan)
    with watch(plan, quiet) as view:
        for cohort in plan.cohorts:
            with contextlib.ExitStack() as claims:
                for run in cohort.runs:
                    claims.enter_context(run.folder.claim())
                try:
                    _run(cohort, outcome, view)
                except Exception as error:  # whatever it was: the other cohorts do not depend on it, and it is on record
                    _record_failures(cohort, outcome)
                    view.failure(f"{type(error).__name__}: {error}", len(outcome.failed))
    outcome.seconds = time.perf_counter() - began
    return outcome
