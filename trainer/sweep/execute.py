"""Carry out a plan on this machine: one cohort after another, each in one program; what fails is recorded and the rest goes on.

Several launchers may work on one plan: a cohort's runs are leased while it trains, and whoever comes second takes another.
"""
from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import jax

from trainer import describe, distributed, lease, mirrors
from trainer.cohort import Program
from trainer.config.frozen import NUMERICS_VERSION
from trainer.global_program import GlobalProgram
from trainer.loop import Progress, run_cohort
from trainer.member import Member
from trainer.stopping import Stop
from trainer.sweep.check import check_beginnings
from trainer.sweep import planfile, rates
from trainer.sweep.plan import Cohort, Plan, PlannedRun, settle, split
from trainer.sweep.progress import Watch, watch

POLL_S = 2.0  # between looks at what others train
NO_SPACE = os.strerror(errno.ENOSPC)  # as the system says it, and tensorstore after it
MIN_TOKENS = 10_000  # of a member, below which a rate tells nothing


OnProgress = Callable[[Path], None]


@dataclass
class Outcome:
    """What a launch did. Seconds: whole launch, and its parts spent in training steps, evaluation and checkpoints, compiling. stopped: why it
    ended before all was done, None if it did not; left: how many runs it leaves."""

    records: list[dict] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    compiles: int = 0
    seconds: float = 0.0
    training_seconds: float = 0.0
    event_seconds: float = 0.0
    compile_seconds: float = 0.0
    tokens: int = 0
    stopped: str | None = None
    left: int = 0


class LeaseLost(RuntimeError):
    """Another launcher took over, since this process gave no sign of life for minutes; nothing more may be written."""


def _open_member(run: PlannedRun, cohort: Cohort) -> Member:
    """The run's folder described, its mirror started."""
    config, layout = dataclasses.asdict(run.config), cohort.layout
    for stale in ("error.txt", "record.json") if distributed.leads() else ():  # of a failed try
        (run.folder.path / stale).unlink(missing_ok=True)
    if run.begun_layout != layout:
        run.folder.write_config({"run_id": run.run_id, "trunk_id": run.trunk_id, "data_sha256": run.dataset.sha256,
                                 "numerics_version": NUMERICS_VERSION, "code_version": describe.code_version(),
                                 "layout": dataclasses.asdict(layout), "config": config})
    mirror = mirrors.make(run.config.options.logger if distributed.leads() else "none")
    mirror.start(run.run_id, run.config.options.sweep, config, run.folder.path)
    return Member(run.config, run.run_id, run.trunk_id, run.folder, mirror, cohort.slot(run))


class Launch:
    """One launcher at work on a plan. patience: seconds after which it ends when nothing is left but what others train."""

    def __init__(self, plan: Plan, stop: Stop, view: Watch, outcome: Outcome, on_progress: OnProgress, patience: float):
        self.plan, self.stop, self.view, self.outcome = plan, stop, view, outcome
        self.on_progress, self.patience, self._rested = on_progress, patience, 0.0
        self._programs: dict[tuple, Program] = {}  # a structure that fills several cohorts is compiled once

    def run(self, wait: bool) -> None:
        """Every cohort, and those that others have when they give them up or die. wait=False: ValueError for the first that is another's."""
        queue, others = deque(self.plan.cohorts), deque()
        while queue and not self._stopping():
            cohort = queue.popleft()
            found = self._cohort(cohort, queue)
            if found is not None:
                if not wait:
                    run = cohort.runs[0].folder.path
                    raise ValueError(f"run {run} is being trained by process {found.pid} on {found.host}; wait for it or stop it")
                others.append(cohort)
            if not queue and others:
                if found is not None and not self._rest(found, len(others)):
                    return
                queue, others = others, deque()

    def _rest(self, holder: lease.Holder, cohorts: int) -> bool:
        """Wait a moment for others; False when it is time to stop."""
        if self._rested > self.patience:
            return False
        self.view.waiting(holder, cohorts)
        self._rested += POLL_S
        until = time.monotonic() + POLL_S
        while time.monotonic() < until and not self.stop.reason:
            time.sleep(0.1)
        return not self._stopping()

    def _stopping(self) -> bool:
        """Whether it is time to stop; the same in all processes of a distributed run."""
        return distributed.agreed(self.stop.reason is not None)

    def _cohort(self, cohort: Cohort, queue: deque[Cohort]) -> lease.Holder | None:
        """One cohort: lease its runs, train them, record what failed; or who else has them."""
        with _leased(cohort) as leases:
            if isinstance(leases, lease.Holder):
                return leases
            # Another launcher may have finished some of them since the plan was made.
            settled = ("done", "diverged") if self.plan.retry_failed else ("done", "diverged", "failed")
            cohort = dataclasses.replace(cohort, runs=tuple(run for run in cohort.runs if run.status not in settled))
            if not cohort.runs:
                return None
            check_beginnings(cohort)
            members: list[Member] = []
            self._rested = 0.0
            self.view.cohort(cohort)
            try:
                members.extend(_open_member(run, cohort) for run in cohort.runs)
                self._train(cohort, members, leases)
            except LeaseLost as error:
                self.view.failure(str(error), 0)
            except Exception as error:  # whatever it was: the other cohorts do not depend on it, and it is on record
                if distributed.several():
                    self.view.failure(f"{type(error).__name__}: {error}", self._record_failures(cohort, members))
                    raise  # the other processes wait for this one's part: they go down with it
                if NO_SPACE in str(error):  # no fault of the runs, and nothing could be written about them
                    raise OSError(errno.ENOSPC, NO_SPACE, str(self.plan.root)) from error
                if _out_of_memory(error) and len(cohort.runs) > 1:
                    self._programs.clear()  # and what they hold
                    queue.extendleft(split(cohort, self.plan.root))
                    self.view.splits(len(cohort.runs), str(error))
                else:
                    self.view.failure(f"{type(error).__name__}: {error}", self._record_failures(cohort, members))
        return None

    def _program(self, cohort: Cohort) -> Program:
        key = cohort.structure, cohort.layout
        if key not in self._programs:
            self._programs[key] = (GlobalProgram if cohort.layout.sharding else Program)(*key)
        return self._programs[key]

    def _train(self, cohort: Cohort, members: list[Member], leases: list[lease.Lease]) -> None:
        """Run a cohort to its end; what it took is added to the outcome also when it fails."""
        outcome, program = self.outcome, self._program(cohort)
        per_token = cohort.structure.model.flops_per_token(cohort.structure.seq_len)
        compiles, compile_seconds = program.compiles, program.compile_seconds

        def on_progress(progress: Progress) -> None:
            outcome.tokens += progress.tokens
            if progress.tokens:
                outcome.training_seconds += progress.seconds
            else:
                outcome.event_seconds += progress.seconds
            outcome.records.extend(progress.finished)
            self.view.advance(progress, per_token)
            self.on_progress(self.plan.root)

        seconds, tokens = outcome.training_seconds, outcome.tokens
        try:
            run_cohort(members, cohort.num_slots, program, cohort.runs[0].dataset, on_progress, self._asked_to_stop(leases))
        finally:
            outcome.compiles += program.compiles - compiles
            outcome.compile_seconds += program.compile_seconds - compile_seconds
            if outcome.tokens - tokens >= MIN_TOKENS * len(members) and distributed.leads():
                _note_rate(cohort, program, (outcome.training_seconds - seconds) / (outcome.tokens - tokens), program.compile_seconds - compile_seconds)

    def _asked_to_stop(self, leases: list[lease.Lease]) -> Callable[[], bool]:
        def asked() -> bool:
            lost = next((held for held in leases if held.lost), None)
            if lost is not None:
                raise LeaseLost(f"{lost.path} is another process's by now")
            return self._stopping()

        return asked

    def _record_failures(self, cohort: Cohort, members: list[Member]) -> int:
        """For every run that did not get to its end: record.json with status failed, and the traceback beside it."""
        mirrored = {member.run_id: member.mirror for member in members}
        unfinished = [run for run in cohort.runs if not run.done]
        for run in unfinished:
            if distributed.leads():
                (run.folder.path / "error.txt").write_text(traceback.format_exc())
            record = describe.config_columns(run.config, run.dataset, cohort.structure.model) | {
                "run_id": run.run_id, "trunk_id": run.trunk_id, "status": "failed"}
            run.folder.finish(record)
            if run.run_id in mirrored:
                mirrored[run.run_id].finish(record)
            self.outcome.failed.append(run.run_id)
        return len(unfinished)


@contextlib.contextmanager
def _leased(cohort: Cohort) -> Iterator[list[lease.Lease] | lease.Holder]:
    """The leases of a cohort's runs, or who has one of them. Of a distributed run the first process takes them for all."""
    if not distributed.leads():
        yield lease.Holder("another", 0) if distributed.agreed(False) else []
        return
    for run in cohort.runs:
        run.folder.path.mkdir(parents=True, exist_ok=True)
    with lease.held([run.folder.lease for run in cohort.runs]) as leases:
        distributed.agreed(isinstance(leases, lease.Holder))
        yield leases


def _settled(plan: Plan) -> Plan:
    """`settle`, by the first process of a distributed run; the others read what it wrote."""
    distributed.wait("planned")  # all have read the folders as they were
    if distributed.leads():
        plan = settle(plan)
    distributed.wait("settled")
    return plan if distributed.leads() else plan.formed(planfile.read(plan.root)[1])


def _note_rate(cohort: Cohort, program: Program, seconds_per_token: float, compile_seconds: float) -> None:
    """For later dry runs."""
    structure, layout, peak = cohort.structure, cohort.layout, program.peak_bytes()
    per_device = -(-cohort.num_slots // layout.member_devices)
    rates.note(rates.Rate(jax.devices()[0].device_kind, layout.num_devices, layout.inner, structure.model.num_params_total, structure.model.flops_per_token(structure.seq_len),
                          describe.precision_name(cohort.runs[0].config.precision), seconds_per_token, compile_seconds or None, peak and peak / per_device))


def _out_of_memory(error: Exception) -> bool:
    """Whether the host, the device or the measurement of a program says so."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


def execute(plan: Plan, quiet: bool = False, stop: Stop | None = None, wait: bool = True, on_progress: OnProgress = lambda _: None,
            patience: float = float("inf")) -> Outcome:
    """Train everything in the plan that is to be trained. A cohort that fails is recorded run by run and does not stop the others; one that
    does not fit in memory is split. `stop`: when to end early, with everything saved. What another living process trains is waited for, for
    `patience` seconds when nothing else is left; with wait=False it raises ValueError, as when a run is to go on from a checkpoint of another
    model. on_progress: called with the sweep's folder after every dispatch.
    """
    outcome, stop = Outcome(), stop or Stop()
    began = time.perf_counter()
    for run in plan.runs[:1]:
        mirrors.make(run.config.options.logger)  # a missing package is the user's to mend before anything compiles
    plan = _settled(plan)
    leads = distributed.leads()
    with watch(plan, quiet or not leads) as view:
        Launch(plan, stop, view, outcome, on_progress if leads else lambda _: None, patience).run(wait)
    distributed.wait("done")  # records are there to be read
    outcome.seconds = time.perf_counter() - began
    outcome.stopped = stop.reason
    outcome.left = 0 if stop.reason is None else sum(run.status is None for cohort in plan.cohorts for run in cohort.runs)
    return outcome
