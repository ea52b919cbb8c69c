"""The host's view of one run inside a cohort: where it stands, when it must stop next, what it writes."""
from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import numpy as np

from trainer import describe, distributed, stored, telemetry
from trainer.config.frozen import TrainConfig
from trainer.data import Dataset
from trainer.mirrors import Mirror
from trainer.model import ModelConfig, sites_of
from trainer.optimizers import DescentQuality
from trainer.records import RunFolder


@dataclass
class Member:
    """One run. `step` is what the device has been asked to reach; metrics arrive a dispatch later."""

    config: TrainConfig
    run_id: str
    trunk_id: str
    folder: RunFolder
    mirror: Mirror
    slot: int = -1
    step: int = 0
    parent: Member | None = None  # the run that this one branches off
    fork_step: int = 0
    waiting: bool = False  # for the parent to reach fork_step
    diverged_step: int | None = None
    train_loss: float = math.nan
    wall_s: float = 0.0
    finished: bool = False
    saved_step: int = -1
    evaluated_step: int = 0
    _saved_at: float = field(default_factory=time.monotonic)
    _rows: list[dict] = field(default_factory=list)
    _telemetry: list[dict] = field(default_factory=list)

    @property
    def ended(self) -> bool:
        """True when there is no step left to take."""
        return self.diverged_step is not None or self.step >= self.config.steps

    @property
    def active(self) -> bool:
        return not self.waiting and not self.ended

    @property
    def due_checkpoint(self) -> bool:
        """True when the configured steps or seconds have passed since the last checkpoint, and there is something to save."""
        options = self.config.options
        if self.step == max(self.saved_step, 0):
            return False
        by_step = options.checkpoint_steps is not None and self.step % options.checkpoint_steps == 0
        return by_step or distributed.agreed(time.monotonic() - self._saved_at > options.checkpoint_seconds)

    @property
    def due_eval(self) -> bool:
        """True at the configured steps before the end, once each."""
        every = self.config.options.eval_every_steps
        return every is not None and not self.ended and self.step % every == 0 and self.step > self.evaluated_step

    def next_stop(self, children: list[Member]) -> int:
        """The next step at which the host needs this member's state, or its end."""
        stops = [self.config.steps, *(c.fork_step for c in children if c.waiting and c.fork_step > self.step)]
        for every in (self.config.options.eval_every_steps, self.config.options.checkpoint_steps):
            if every:
                stops.append((self.step // every + 1) * every)
        return min(stops)

    def take_metrics(self, first_step: int, count: int, metrics, diverged_step: int, elapsed: float) -> None:
        """Book the metrics of `count` updates from first_step; metrics are arrays [S], of which the first `count` count. A row's
        `step` is the number of updates done, its loss that of the batch of the last of them."""
        if self.diverged_step is not None:  # dispatched before the divergence was known
            return
        self.wall_s += elapsed
        for i in range(count):
            step = first_step + i
            row = {"step": step + 1, "tokens": (step + 1) * self.config.batch_tokens, "loss": float(metrics.loss[i]),
                   "grad_norm": float(metrics.grad_norm[i]), "lr": float(metrics.lr[i]), **{name: float(f"{getattr(metrics, name)[i]:.6g}") for name in self._qualities}, "wall_s": round(self.wall_s, 3)}
            if diverged_step == step:
                self.diverged_step = self.step = step
                self._rows.append(row | {"step": step, "diverged": True})  # of an update that was not applied
                return
            self.train_loss = row["loss"]
            if (step + 1) % self.config.options.log_every == 0 or step + 1 in (1, self.config.steps):
                self._rows.append(row)
            every = self.config.options.telemetry_every
            if every and telemetry.due(step, every):
                mine = {role: values[i] for role, values in metrics.sites.items()}
                self._telemetry.extend(telemetry.rows(step + 1, mine, {role: sites_of(role) for role in mine}, describe.quantized_roles(self.config.precision)))

    @property
    def _qualities(self) -> tuple[str, ...]:
        """What there is to say of updates: where weights are held in float32, how large they are and no more (`stored.quality`)."""
        return DescentQuality._fields if stored.loses_updates(self.config.precision) else ("updates_per_ulp",)

    def log_eval(self, losses_W: np.ndarray) -> None:
        """Book an evaluation before the end."""
        mean, stderr = describe.mean_and_stderr(losses_W)
        self._rows.append({"step": self.step, "tokens": self.step * self.config.batch_tokens, "val_loss": mean, "val_stderr": stderr})
        self.evaluated_step = self.step

    def flush(self) -> None:
        """Append the rows gathered so far to metrics.jsonl, and to the mirror; those of telemetry to its file."""
        if self._telemetry:
            self.folder.append_telemetry(self._telemetry)
            self._telemetry = []
        if self._rows:
            self.folder.append_metrics(self._rows)
            for row in self._rows:
                self.mirror.log(row)
            self._rows = []

    def saved(self) -> None:
        """Note that a checkpoint of the present step is on disk."""
        self.saved_step, self._saved_at = self.step, time.monotonic()

    def restart(self) -> None:
        """From the beginning: whatever an earlier try logged is dropped."""
        self.folder.truncate(0)

    def resume(self, step: int, diverged_step: int) -> None:
        """From a checkpoint at `step`; rows logged after it are dropped and will be written again."""
        self.step = self.saved_step = self.evaluated_step = step
        self.diverged_step = None if diverged_step < 0 else diverged_step
        self.folder.truncate(step)
        for row in self.folder.metrics():
            self.wall_s = row.get("wall_s", self.wall_s)
            self.train_loss = row.get("loss", self.train_loss)

    def branch_off(self) -> None:
        """Become a copy of the parent, which stands at fork_step; its log up to here is this run's too."""
        self.parent.flush()
        self._rows = [row for row in self.parent.folder.metrics() if row["step"] <= self.fork_step]
        self._telemetry = [row for row in self.parent.folder.telemetry() if row["step"] <= self.fork_step]
        self.step, self.evaluated_step, self.waiting = self.fork_step, self.fork_step, False
        self.wall_s, self.train_loss = self.parent.wall_s, self.parent.train_loss

    def diverge_with(self, trunk: Member) -> None:
        """The trunk diverged before this run's branch point: so would this run have, being the same run until then."""
        self.diverged_step = self.step = trunk.diverged_step
        self.waiting, self.wall_s, self.train_loss = False, trunk.wall_s, trunk.train_loss
        self._rows, self._telemetry = list(trunk.folder.metrics()), list(trunk.folder.telemetry())

    def finish(self, dataset: Dataset, layout: str, losses_W: np.ndarray | None, model: ModelConfig, probe=None, memory: dict | None = None) -> dict:
        """Write record.json. `losses_W`: the final evaluation's loss per window, None for a diverged run; `probe`: a `step.Probe`;
        `memory`: columns of it."""
        if losses_W is not None and not any("val_loss" in row and row["step"] == self.step for row in self.folder.metrics()):
            self.log_eval(losses_W)
        self.flush()
        record = describe.record(self, dataset, layout, losses_W, model) | describe.measured(self.config.precision, self.folder.metrics(), probe) | (memory or {})
        self.folder.finish(record)
        self.mirror.finish(record)
        self.finished = True
        return record


def link_branches(members: list[Member]) -> None:
    """Let runs that share a trunk share its computation: the longest run of each trunk carries it, the others wait for their
    cool-down to start and then take over a copy of its state. Only runs that have not begun wait."""
    trunks: dict[str, list[Member]] = {}
    for member in members:
        trunks.setdefault(member.trunk_id, []).append(member)
    for group in trunks.values():
        carrier = max(group, key=lambda m: m.config.steps)
        for member in group:
            fork = member.config.steps - member.config.schedule.cooldown_steps
            carried = carrier.config.steps - carrier.config.schedule.cooldown_steps
            if member is not carrier and member.step == 0 and carrier.step <= fork <= carried and fork > 0:
                member.parent, member.fork_step, member.waiting = carrier, fork, True
