"""The dry run: what a launch would do, and about how long it would take."""
from __future__ import annotations

import jax
from rich.console import Console
from rich.table import Table

from trainer.describe import precision_name
from trainer.sweep import rates
from trainer.sweep.plan import Cohort, Plan
from trainer.sweep.show import MAX_LISTED, reason

COMPILES = 4  # of a structure in a layout: init, run, evaluate, probe


def print_plan(plan: Plan) -> None:
    """A line for each cohort, sums, what failed before."""
    known, device = rates.known(), jax.devices()[0].device_kind
    estimates = [_estimate(known, device, cohort) for cohort in plan.cohorts]
    programs = {(cohort.structure, cohort.layout, cohort.num_slots) for cohort in plan.cohorts}
    compiling, seen = 0.0, set()
    table = Table(title=f"{len(plan.runs)} runs, {plan.num_done} done, {len(plan.failed)} failed before; {len(plan.cohorts)} cohorts, {len(programs)} programs; {plan.root}")
    for column in ("model", "runs", "updates", "FLOPs", "time", "memory", "layout", "precisions"):
        table.add_column(column, justify="left" if column in ("model", "layout", "precisions") else "right", overflow="fold")
    for cohort, expected in zip(plan.cohorts, estimates):
        names = dict.fromkeys(precision_name(run.config.precision) for run in cohort.runs)
        key = cohort.structure, cohort.layout, cohort.num_slots
        compiling += 0.0 if key in seen else expected.compile_seconds
        seen.add(key)
        about = "" if expected.measured else "~"
        table.add_row(cohort.runs[0].config.model.name, str(len(cohort.runs)), str(cohort.updates()), f"{cohort.flops():.2e}", about + duration(expected.seconds),
                      about + size(expected.bytes), cohort.layout.name, ", ".join(names))
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=140)
    console.print(table)
    training = sum(e.seconds for e in estimates)
    guessed = sum(not e.measured for e in estimates)
    basis = "measured here before" if not guessed else f"~: {guessed} cohorts by the nearest that was measured here" if known else "~: nothing was measured here yet"
    console.print(f"in all {sum(c.flops() for c in plan.cohorts):.2e} FLOPs, {COMPILES * len(programs)} compiles; expected {duration(training)} of training "
                  f"and {duration(compiling)} of compiling ({basis})", soft_wrap=True)
    for run in plan.failed[:MAX_LISTED]:
        console.print(f"failed before: {run.run_id}  {reason(run)}", markup=False, soft_wrap=True)
    if plan.failed:
        console.print("retry_failed=true tries them again", markup=False)


def _estimate(known: list[rates.Rate], device: str, cohort: Cohort) -> rates.Estimate:
    tokens = cohort.updates() * cohort.structure.batch_size * cohort.structure.seq_len
    return rates.estimate(known, device, cohort.structure, cohort.layout, precision_name(cohort.runs[0].config.precision), tokens, cohort.num_slots)


def size(count: float) -> str:
    """Of bytes on a device."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{max(count / 2**20, 1):.0f} MiB"


def duration(seconds: float) -> str:
    """"3 s", "5 min", "2.3 h", "4.5 days"."""
    for size, unit, form in ((86400.0 * 2, "days", ".1f"), (5400.0, "h", ".1f"), (90.0, "min", ".0f")):
        if seconds >= size:
            return f"{seconds / {'days': 86400.0, 'h': 3600.0, 'min': 60.0}[unit]:{form}} {unit}"
    return f"{seconds:.0f} s"
