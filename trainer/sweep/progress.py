"""What a person sees while a sweep runs: one live line on a terminal, one plain line per cohort elsewhere."""
from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from trainer.lease import Holder
from trainer.loop import Progress as Advance
from trainer.sweep.plan import Plan


class Watch:
    """Counts runs and work done. Work is floating-point operations, so that a small model's tokens count for less."""

    def __init__(self, plan: Plan, console: Console, bar: Progress | None):
        self._console, self._bar = console, bar
        self._runs_done, self._runs = plan.num_done, len(plan.runs)
        self._flops, self._flops_total = 0.0, sum(c.flops() for c in plan.cohorts)
        self._tokens, self._busy, self._began = 0, 0.0, time.monotonic()
        self._label, self._waiting_for = "", None
        self._task = bar.add_task("", total=max(self._flops_total, 1.0)) if bar else None
        self._show()

    def cohort(self, model: str, members: int, layout: str) -> None:
        """A cohort begins."""
        self._label = f"{model} x {members} runs ({layout})"
        if self._bar is None:
            self._console.print(f"{self._label}: {self._runs_done}/{self._runs} runs done", highlight=False)
        self._show()

    def advance(self, progress: Advance, flops_per_token: float) -> None:
        """A dispatch or an event is over."""
        self._runs_done += len(progress.finished)
        self._tokens += progress.tokens
        self._flops += progress.tokens * flops_per_token
        if progress.tokens:
            self._busy += progress.seconds
        for record in progress.finished:
            if record["status"] == "diverged":
                self._console.print(f"run {record['run_id']} diverged at step {record['diverged_step']}; recorded", highlight=False)
        self._show()

    def failure(self, reason: str, count: int) -> None:
        """A cohort failed."""
        self._console.print(f"{self._label} failed ({' '.join(reason.split())[:300]}); {count} runs recorded as failed, see error.txt in their folders", highlight=False)

    def splits(self, count: int, reason: str) -> None:
        """A cohort did not fit."""
        self._console.print(f"{self._label} needs more memory than there is ({' '.join(reason.split())[:200]}); its {count} runs are split over two cohorts", highlight=False)

    def waiting(self, holder: Holder, cohorts: int) -> None:
        """Nothing is left but what others train."""
        if self._waiting_for != holder:
            self._console.print(f"waiting for {cohorts} cohorts that process {holder.pid} on {holder.host} and maybe others train", highlight=False)
        self._waiting_for = holder

    def _show(self) -> None:
        if self._bar is None:
            return
        rate = f"{self._tokens / self._busy / 1e3:.0f}k tokens/s" if self._busy else "compiling"
        elapsed = time.monotonic() - self._began
        left = elapsed * (self._flops_total / self._flops - 1.0) if self._flops else None
        remaining = "" if left is None else f", {int(max(left, 0)) // 60}:{int(max(left, 0)) % 60:02d} left"
        text = f"{self._runs_done}/{self._runs} runs  {self._label}  {rate}{remaining}"
        self._bar.update(self._task, completed=self._flops, description=text)


@contextlib.contextmanager
def watch(plan: Plan, quiet: bool = False) -> Iterator[Watch]:
    """A Watch on stderr; live only on a terminal."""
    console = Console(stderr=True, quiet=quiet)
    if not console.is_terminal or quiet:
        yield Watch(plan, console, None)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:3.0f}%"), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        yield Watch(plan, console, bar)
