"""What a launch says: what came out of it, on stdout and stderr."""
from __future__ import annotations

import re
import sys

from trainer import distributed
from trainer.sweep.execute import Outcome
from trainer.sweep.plan import Plan, PlannedRun

MAX_LISTED = 8


def report(plan: Plan, outcome: Outcome) -> int:
    """Say what came out, in the process that leads. The exit code: 0 if every run is done, or if the time given was up; 1 otherwise."""
    if not distributed.leads():
        return 1 if outcome.failed else 0
    for run in plan.runs if len(plan.runs) <= MAX_LISTED else ():
        _one(run)
    failed = [run for run in plan.runs if run.status == "failed"]
    if len(plan.runs) > MAX_LISTED:
        for run in failed[:MAX_LISTED]:
            _one(run)
        if len(failed) > MAX_LISTED:
            print(f"... and {len(failed) - MAX_LISTED} more; `bitlaw status {plan.root}` lists them", file=sys.stderr)
    if len(plan.runs) > 1:
        over = sum(run.status in ("done", "diverged") for run in plan.runs)
        spent = "" if not outcome.compiles else (f" in {outcome.seconds:.0f} s: {outcome.training_seconds:.0f} training, {outcome.event_seconds:.0f} evaluation "
                                                f"and checkpoints, {outcome.compile_seconds:.0f} for {outcome.compiles} compiles")
        of = "" if over == len(plan.runs) else f" of {len(plan.runs)}"
        print(f"{over}{of} runs done, {plan.num_done} of them before{spent}; {plan.root}")
    if failed:
        again = "the same command" if plan.retry_failed else "retry_failed=true"
        print(f"{len(failed)} of {len(plan.runs)} runs failed; {again} tries them again", file=sys.stderr)
    if outcome.stopped:
        print(f"bitlaw: stopped ({outcome.stopped}), everything is saved; {outcome.left} runs are left, and the same command goes on", file=sys.stderr)
    return 1 if failed or (outcome.stopped and not outcome.stopped.startswith("max_wall")) else 0


def _one(run: PlannedRun) -> None:
    """A line about a run that is over."""
    record = run.folder.record()
    if record is None:
        return
    if record["status"] == "failed":
        print(f"{run.run_id} failed: {reason(run)}", file=sys.stderr)
    elif record["status"] == "diverged":
        print(f"{run.run_id} diverged at step {record['diverged_step']}; {run.folder.path}")
    else:
        print(f"{run.run_id} {record['precision']} N={record['n_params']} D={record['tokens']} loss {record['loss']:.4f} "
              f"+- {record['loss_std_err']:.4f} nats/token ({record['bits_per_byte']:.4f} bits/byte), "
              f"{record['tokens_per_s']:.0f} tokens/s; {run.folder.path}")


def reason(run: PlannedRun) -> str:
    """The line of a failed run's traceback that names the error: JAX adds some of its own below it."""
    path = run.folder.path / "error.txt"
    lines = path.read_text().strip().splitlines() if path.exists() else []
    return next((line for line in reversed(lines) if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)), lines[-1] if lines else "no error.txt tells why")
