"""What a person sees while a sweep runs: a live table on a terminal, one plain line per cohort elsewhere."""
from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from trainer.lease import Holder
from trainer.loop import Progress as Advance
from trainer.sweep.plan import Cohort, Plan

SHOWN = 12  # cohorts in the table: those at work and around them


@dataclass
class Row:
    """One cohort as it is seen. flops: done and of all; busy: seconds of training steps."""

    name: str
    runs: int
    flops_total: float
    steps: int
    state: str = "waits"
    step: int = 0
    flops: float = 0.0
    tokens: int = 0
    busy: float = 0.0
    loss: float = math.nan
    finished: int = 0
    diverged: int = 0


class Watch:
    """Counts runs and work done. Work is floating-point operations, so that a small model's tokens count for less."""

    def __init__(self, plan: Plan, console: Console, live: Live | None):
        self._console, self._live = console, live
        self._runs_done, self._runs = plan.num_done, len(plan.runs)
        self._rows = {_key(cohort): _row(cohort) for cohort in plan.cohorts}
        self._at: Row | None = None
        self._began, self._waiting_for = time.monotonic(), None
        self._show()

    def cohort(self, cohort: Cohort) -> None:
        """A cohort begins."""
        self._at = self._rows.setdefault(_key(cohort), _row(cohort))
        self._at.state, self._at.runs = "compiles", len(cohort.runs)
        if self._live is None:
            self._console.print(f"{self._at.name}: {self._runs_done}/{self._runs} runs done", highlight=False)
        self._show()

    def advance(self, progress: Advance, flops_per_token: float) -> None:
        """A dispatch or an event is over."""
        row = self._at
        self._runs_done += len(progress.finished)
        row.finished += len(progress.finished)
        row.tokens += progress.tokens
        row.flops += progress.tokens * flops_per_token
        row.state = "done" if row.finished >= row.runs else "trains"
        if progress.tokens:
            row.busy += progress.seconds
            row.step, row.loss = progress.step, progress.loss
        for record in progress.finished:
            if record["status"] == "diverged":
                row.diverged += 1
                self._console.print(f"run {record['run_id']} diverged at step {record['diverged_step']}; recorded", highlight=False)
        self._show()

    def failure(self, reason: str, count: int) -> None:
        """A cohort failed."""
        self._at.state = "failed"
        self._console.print(f"{self._at.name} failed ({' '.join(reason.split())[:300]}); {count} runs recorded as failed, see error.txt in their folders", highlight=False)
        self._show()

    def splits(self, count: int, reason: str) -> None:
        """A cohort did not fit."""
        self._at.state = "split"
        self._console.print(f"{self._at.name} needs more memory than there is ({' '.join(reason.split())[:200]}); its {count} runs are split over two cohorts", highlight=False)
        self._show()

    def waiting(self, holder: Holder, cohorts: int) -> None:
        """Nothing is left but what others train."""
        if self._waiting_for != holder:
            self._console.print(f"waiting for {cohorts} cohorts that process {holder.pid} on {holder.host} and maybe others train", highlight=False)
        self._waiting_for = holder

    def _show(self) -> None:
        if self._live is not None:
            self._live.update(self._rendered())

    def _rendered(self) -> Group:
        rows = list(self._rows.values())
        done, total = sum(r.flops for r in rows), sum(r.flops_total for r in rows)
        elapsed = time.monotonic() - self._began
        left = elapsed * (total / done - 1.0) if done else None
        summary = f"{self._runs_done}/{self._runs} runs, {clock(elapsed)} so far" + ("" if left is None else f", {clock(left)} left")
        return Group(_table(rows, self._at), ProgressBar(total=max(total, 1.0), completed=done, width=60), Text(f" {summary}"))


def _table(rows: list[Row], at: Row | None) -> Table:
    """The cohorts around the one at work."""
    table = Table(box=None, pad_edge=False)
    for column in ("cohort", "", "step", "tokens/s", "loss", "left", "diverged"):
        table.add_column(column, justify="left" if column in ("cohort", "") else "right")
    place = next((i for i, row in enumerate(rows) if row is at), 0)
    first = max(0, min(place - SHOWN // 2, len(rows) - SHOWN))
    for row in rows[first : first + SHOWN]:
        rate = f"{row.tokens / row.busy:,.0f}" if row.busy else ""
        left = clock(row.busy * (row.flops_total / row.flops - 1.0)) if row.flops and row.state == "trains" else ""
        table.add_row(row.name, row.state, f"{row.step}/{row.steps}" if row.step else "", rate, "" if math.isnan(row.loss) else f"{row.loss:.3f}", left,
                      str(row.diverged) if row.diverged else "")
    if len(rows) > SHOWN:
        table.add_row(f"{first + 1} to {first + SHOWN} of {len(rows)} cohorts")
    return table


def _key(cohort: Cohort) -> tuple:
    return cohort.composition.slots


def _row(cohort: Cohort) -> Row:
    return Row(f"{cohort.runs[0].config.model.name} x {len(cohort.runs)} runs ({cohort.layout.name})", len(cohort.runs), cohort.flops(),
               max(run.config.steps for run in cohort.runs))


def clock(seconds: float) -> str:
    """h:mm:ss, or m:ss."""
    minutes, rest = divmod(int(max(seconds, 0)), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


@contextlib.contextmanager
def watch(plan: Plan, quiet: bool = False) -> Iterator[Watch]:
    """A Watch on stderr; live only on a terminal."""
    console = Console(stderr=True, quiet=quiet)
    if not console.is_terminal or quiet:
        yield Watch(plan, console, None)
        return
    with Live(console=console, refresh_per_second=4) as live:
        yield Watch(plan, console, live)
