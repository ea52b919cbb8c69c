"""The one training loop: a cohort of runs from wherever each stands to its end.

The host decides where members stop (ends, branch points, evaluations, checkpoints), draws batches, and reads the metrics of one
dispatch while the next one runs. Everything that it does to a member's state goes through the host's copy of it.
"""
from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import jax
import numpy as np

from trainer import build, checkpoint, describe
from trainer.cohort import Program
from trainer.data import Dataset, batches, validation_windows
from trainer.fine_tune import given_params
from trainer.member import Member, link_branches
from trainer.optimizers import state_bytes
from trainer.step import Hyper, Probe


@dataclass(frozen=True)
class Progress:
    """What a watcher of a sweep is told after every dispatch. `tokens`: trained by it; `finished`: records written by it; `step`, `loss`: the
    furthest member's step, and the mean of the members' last training losses."""

    tokens: int
    seconds: float
    finished: list[dict] = field(default_factory=list)
    step: int = 0
    loss: float = float("nan")


OnProgress = Callable[[Progress], None]


class CohortRun:
    """The state of one cohort on its way through the program."""

    def __init__(self, members: list[Member], num_slots: int, program: Program, dataset: Dataset):
        self.members, self.num_slots, self.program, self.dataset = members, num_slots, program, dataset
        self.options = members[0].config.options
        self.model = program.structure.model
        by_slot = {member.slot: member for member in members}
        # Slots without a member hold a copy of the first one that is never run.
        hypers = [build.hyper(by_slot.get(slot, members[0]).config) for slot in range(num_slots)]
        self.hyper: Hyper = program.put(jax.tree.map(lambda *xs: np.stack(xs), *hypers))
        self.states = program.init(self.hyper)
        self.windows = validation_windows(dataset.validation, members[0].config.eval_sequences, program.structure.seq_len)
        self._restore()
        link_branches(members)
        program.prepare(self.states, self.hyper, self.windows, self._probed() if any(map(self._wants_probe, members)) else None)

    # --- state on the host ---

    def _host_states(self):
        return jax.tree.map(np.array, self.program.fetch(self.states))

    def _start_from(self) -> None:
        """Members that have `init_from`, and no checkpoint of their own, start with that run's parameters, those that it has; what it lacks
        (gains, learned scales) is fresh."""
        beginners = [m for m in self.members if m.config.init_from is not None and not checkpoint.steps(m.folder.checkpoints)]
        if not beginners:
            return
        host = self._host_states()
        for member in beginners:
            begun = self.program.fetch(self.program.begin(self.hyper, member.slot, given_params(self.model, member.config.init_from)))
            for there, here in zip(jax.tree.leaves(host), jax.tree.leaves(begun), strict=True):
                there[member.slot] = here
        self.states = self.program.put(host)

    def _restore(self) -> None:
        """Members that have a checkpoint go on from it."""
        self._start_from()
        if not any(checkpoint.steps(m.folder.checkpoints) for m in self.members):
            for member in self.members:
                member.restart()
            return
        host = self._host_states()
        for member in self.members:
            mine = jax.tree.map(lambda x: x[member.slot], host)
            restored = checkpoint.restore(member.folder.checkpoints, mine)
            if restored is None:
                member.restart()
            else:
                step, state = restored
                member.resume(step, int(state.diverged_step))
                for there, here in zip(jax.tree.leaves(host), jax.tree.leaves(state)):
                    there[member.slot] = here
        self.states = self.program.put(host)

    def _save(self, host, member: Member) -> None:
        """A checkpoint; the metrics up to it are on disk before it."""
        member.flush()
        state = jax.tree.map(lambda x: x[member.slot], host)
        checkpoint.save(member.folder.checkpoints, member.step, state, keep=self.options.checkpoint_keep)
        member.saved()

    def save(self) -> None:
        """A checkpoint of every member that has moved since its last one."""
        moved = [m for m in self.members if not m.waiting and not m.finished and m.step != max(m.saved_step, 0)]
        host = self._host_states() if moved else None
        for member in moved:
            self._save(host, member)

    def _branch(self, host, parent: Member) -> None:
        """Members waiting for this step of their parent start from its state, each with a checkpoint of its own."""
        for child in self.members:
            if child.waiting and child.parent is parent and child.fork_step == parent.step:
                for leaf in jax.tree.leaves(host):
                    leaf[child.slot] = leaf[parent.slot]
                child.branch_off()
                self._save(host, child)

    # --- one dispatch ---

    def _children(self, member: Member) -> list[Member]:
        return [m for m in self.members if m.parent is member]

    def _draw(self, stops: dict[int, tuple[Member, int]]) -> np.ndarray:
        """Batches [M, S, B, T+1] for the slots that run."""
        structure = self.program.structure
        length = self.options.steps_per_dispatch
        dtype = self.dataset.train.dtype
        shape = (self.num_slots, length, structure.batch_size, structure.seq_len + 1)
        tokens = np.zeros(shape, dtype)
        for slot, (member, stop) in stops.items():
            count = min(length, stop - member.step)
            steps = np.arange(member.step, member.step + count)
            tokens[slot, :count] = batches(self.dataset.train, member.config.seed, steps, structure.batch_size, structure.seq_len)
        return tokens

    def dispatch(self):
        """Start the next steps of every active member; returns what `collect` needs, or None when nothing is left to run."""
        active = {m.slot: (m, m.next_stop(self._children(m))) for m in self.members if m.active}
        if not active:
            return None
        tokens = self._draw(active)
        stops = np.zeros(tokens.shape[0], np.int32)
        spans = []
        for slot, (member, stop) in active.items():
            stops[slot] = stop
            count = min(self.options.steps_per_dispatch, stop - member.step)
            spans.append((member, member.step, count))
            member.step += count
        self.states, metrics, diverged = self.program.run(self.states, self.hyper, tokens, stops)
        return spans, metrics, diverged

    def collect(self, dispatched, lap: Callable[[], float]) -> Progress:
        """Wait for a dispatch and book its metrics."""
        spans, metrics, diverged = dispatched
        metrics, diverged = self.program.fetch((metrics, diverged))
        elapsed = lap()
        total = sum(count for _, _, count in spans)
        for member, first, count in spans:
            mine = jax.tree.map(lambda x: x[member.slot], metrics)
            member.take_metrics(first, count, mine, int(diverged[member.slot]), elapsed * count / total)
        losses = [member.train_loss for member, _, _ in spans if member.diverged_step is None]
        return Progress(total * self.program.structure.batch_size * self.program.structure.seq_len, elapsed, step=max(first + count for _, first, count in spans),
                        loss=sum(losses) / len(losses) if losses else float("nan"))

    # --- events at which the host acts ---

    def pending_events(self) -> bool:
        """True if some member stands where its state is needed on the host."""
        return any(self._needs_host(m) for m in self.members)

    def _needs_host(self, m: Member) -> bool:
        if m.waiting or m.finished:
            return False
        branching = any(c.waiting and c.fork_step == m.step for c in self._children(m))
        return branching or m.ended or m.due_checkpoint or m.due_eval

    def handle_events(self) -> list[dict]:
        """Branch, checkpoint, evaluate and finish the members that are due; returns the records written."""
        due = [m for m in self.members if self._needs_host(m)]
        losses = self._losses([m for m in due if m.due_eval or (m.ended and m.diverged_step is None)])
        probes = self._probes([m for m in due if m.ended and m.diverged_step is None])
        for member in due:
            if member.due_eval:
                member.log_eval(losses[member.slot])
        host = self._host_states()
        for member in due:
            self._branch(host, member)
        self.states = self.program.put(host)
        for member in due:
            if member.due_checkpoint or (member.ended and member.saved_step != member.step):
                self._save(host, member)
        return [record for m in due if m.ended for record in self._finish(m, losses, probes.get(m.slot))]

    def _losses(self, members: list[Member]) -> np.ndarray | None:
        """Losses on the validation windows [M, W], of these members only."""
        if not members:
            return None
        return np.asarray(self.program.evaluate(self.states, self.hyper, self.windows, self._wanted(members)))

    def _probes(self, members: list[Member]) -> dict[int, Probe]:
        """Slot -> what the precision does to gradients, of these members where it does anything."""
        return {m.slot: jax.tree.map(float, self.program.probe(self.states, self.hyper, self._probed(), m.slot)) for m in members if self._wants_probe(m)}

    def _wants_probe(self, member: Member) -> bool:
        return self.options.probe and describe.narrows(member.config.precision)

    def _probed(self) -> np.ndarray:
        """One micro-batch of validation windows."""
        structure = self.program.structure
        return self.windows[: structure.batch_size // structure.accumulate]

    def _wanted(self, members: list[Member]) -> np.ndarray:
        """bool for every slot: whether it is one of these members'."""
        wanted = np.zeros(self.num_slots, bool)
        wanted[[m.slot for m in members]] = True
        return wanted

    def _memory(self) -> dict[str, float]:
        """Bytes per parameter (embeddings included) that a member's weights and moments take, and at most everything on a device together,
        over the members that it holds."""
        slots, total = self.num_slots, self.model.num_params_total
        found = {f"{part}_bytes_per_param": state_bytes(tree) / slots / total for part, tree in
                 (("weights", self.states.params), ("moments", self.states.opt_state))}
        peak = self.program.peak_bytes()
        if peak is not None:
            found["peak_bytes_per_param"] = peak * self.program.layout.member_devices / slots / total
        return found

    def _finish(self, member: Member, losses, probe: Probe | None) -> Iterator[dict]:
        """The records of a run that ended, and of those that wait for a branch point which it will never reach."""
        healthy = member.diverged_step is None
        if healthy and not np.isfinite(losses[member.slot]).all():  # the last update did it
            member.diverged_step, healthy = member.step, False
        yield member.finish(self.dataset, self.program.layout.name, losses[member.slot] if healthy else None, self.model, probe, self._memory())
        for child in self._children(member):
            if child.waiting:  # the trunk diverged before the branch: so does every run that shares it
                child.diverge_with(member)
                yield child.finish(self.dataset, self.program.layout.name, None, self.model)


class _Clock:
    """Seconds since the last lap, without compilation."""

    def __init__(self, program: Program):
        self._program = program
        self._mark = self._now()

    def _now(self) -> float:
        return time.perf_counter() - self._program.compile_seconds

    def lap(self) -> float:
        """Seconds since the last lap."""
        now = self._now()
        elapsed, self._mark = now - self._mark, now
        return elapsed


def run_cohort(members: list[Member], num_slots: int, program: Program, dataset: Dataset, on_progress: OnProgress = lambda _: None,
               stop: Callable[[], bool] = lambda: False) -> list[dict]:
    """Train every member, in the slot that it has of num_slots, to its end; returns their records. Each is written the moment it is known. Where `stop`, asked after every
    dispatch, says so, every member is saved where it stands, and the records so far are returned."""
    run = CohortRun(members, num_slots, program, dataset)
    clock = _Clock(program)
    records: list[dict] = []
    in_flight = None
    while True:
        stopping = stop()
        following = None if stopping or run.pending_events() else run.dispatch()
        if in_flight is not None:
            on_progress(run.collect(in_flight, clock.lap))
        in_flight = following
        if stopping:
            run.save()
            return records
        if in_flight is None:
            if not run.pending_events():
                return records
            finished = run.handle_events()
            on_progress(Progress(0, clock.lap(), finished))
            records.extend(finished)
