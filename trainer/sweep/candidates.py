"""The runs of a sweep as candidates: what each would be a row of, what it would take, and training some of them now.

For a caller that decides between cohorts what to train next (`bitlaw answer`). A chosen group is planned and carried out as any sweep:
recorded, leased, resumable; a run keeps its identity whichever group it comes in.
"""
from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax

from trainer import compiled, describe
from trainer.config import TrainConfig
from trainer.step import StepStructure
from trainer.stopping import Stop
from trainer.sweep import rates
from trainer.sweep.execute import execute
from trainer.sweep.options import LaunchOptions
from trainer.sweep.plan import Plan, PlannedRun, make_plan
from trainer.sweep.rates import COMPILE_S, FLOPS_PER_S, Rate
from trainer.sweep.show import reason


@dataclass(frozen=True)
class Candidate:
    """One run of the sweep. row: its columns of the run table that are known before it begins, n_params, tokens and widths among them.
    status: done, diverged or failed by its record, None before. seconds: expected of training, without evaluating; program: equal for runs
    that one group can train in one program; compile_seconds: expected of compiling it, for every group anew since groups differ in size."""

    run_id: str
    row: dict
    status: str | None
    seconds: float
    program: StepStructure
    compile_seconds: float


class Candidates:
    """A sweep, of which groups are trained within a time that begins now. root: its folder."""

    def __init__(self, configs: list[TrainConfig], options: LaunchOptions, budget_s: float):
        """budget_s: seconds from now after which training stops, with everything saved."""
        self._began, self._how = time.monotonic(), {"max_members": options.max_members, "retry_failed": options.retry_failed}
        self.plan: Plan = make_plan(configs, **self._how)
        self.root: Path = self.plan.root
        self.stop = Stop(budget_s, since_start=False)
        compiled.keep(configs[0].options)

    def spent(self) -> float:
        """Seconds since this was made."""
        return time.monotonic() - self._began

    def all(self) -> list[Candidate]:
        """Every run of the sweep as it stands now, with times by what cohorts took on this kind of device so far."""
        known = [rate for rate in rates.known() if rate.device == jax.devices()[0].device_kind]
        return [_candidate(run, known) for run in self.plan.runs]

    def measured(self) -> bool:
        """Whether anything was trained on this kind of device before: otherwise times are FLOPs at a fixed rate, of use for ranks only."""
        return any(rate.device == jax.devices()[0].device_kind for rate in rates.known())

    def train(self, run_ids: Sequence[str]) -> tuple[bool, list[str]]:
        """Trains these runs. (whether all are over, a line for each that failed)."""
        wanted = set(run_ids)
        plan = make_plan([run.config for run in self.plan.runs if run.run_id in wanted], **self._how)
        with self.stop.catching():
            outcome = execute(plan, stop=self.stop)
        return outcome.stopped is None, [f"{run.run_id} failed: {reason(run)}" for run in plan.runs if run.status == "failed"]


def _candidate(run: PlannedRun, known: Sequence[Rate]) -> Candidate:
    model, config = run.structure.model, run.config
    row = describe.config_columns(config, run.dataset, model) | {"tokens": config.tokens, "steps": config.steps}
    per_token, compiling = expected(known, model.flops_per_token(config.seq_len))
    return Candidate(run.run_id, row, run.status, config.tokens * per_token, run.structure, compiling)


def expected(known: Sequence[Rate], flops_per_token: float) -> tuple[float, float]:
    """(seconds of a token of one run in a cohort, seconds of compiling) by the newest cohort of the nearest model that tells, on a scale of
    ratios; FLOPS_PER_S and COMPILE_S where none does."""
    nearest = sorted(reversed(known), key=lambda rate: abs(math.log(rate.flops_per_token / flops_per_token)))
    per_token = nearest[0].seconds_per_token * flops_per_token / nearest[0].flops_per_token if nearest else flops_per_token / FLOPS_PER_S
    return per_token, next((rate.compile_seconds for rate in nearest if rate.compile_seconds), COMPILE_S)
