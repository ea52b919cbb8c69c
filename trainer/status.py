"""`bitlaw status DIR`: how far the runs below a folder are, and which are not done."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import pathlib
from typing import Any

from rich.console import Console
from rich.table import Table

from trainer.records import STATUSES, RunFolder

# In this order. `stopped`: begun, not over, and no living process trains it; `missing`: planned and not begun.
STATES = ("done", "diverged", "running", "stopped", "failed", "missing")
_SETTLED = frozenset({"done", "diverged"})


@dataclasses.dataclass(frozen=True)
class RunState:
    """A run and how far it is; `note` says more where there is more to say."""

    run_id: str
    state: str
    folder: pathlib.Path | None
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Status:
    """The runs below a folder, sorted by state and id."""

    runs: tuple[RunState, ...]

    @property
    def counts(self) -> dict[str, int]:
        """Number of runs in each of STATES, zeros among them."""
        found = collections.Counter(run.state for run in self.runs)
        return {state: found[state] for state in STATES}

    @property
    def not_done(self) -> tuple[RunState, ...]:
        """What is left to do. A diverged run is done: it has its result."""
        return tuple(run for run in self.runs if run.state not in _SETTLED)


def status(folder: str | os.PathLike[str]) -> Status:
    """Looks through `folder` for run folders (a `config.json` or `record.json`) and sweep plans (`plan.json` with `run_ids`).

    A planned run is missing when no run folder below `folder` has its id as its name. ValueError, one line, when `folder`
    is none or a plan is not readable.
    """
    root = pathlib.Path(folder)
    if not root.is_dir():
        raise ValueError(f"{folder} is not a folder; 'bitlaw status' takes a run folder, or a folder that holds some")
    found: dict[str, RunState] = {}
    planned: dict[str, None] = {}
    for path, subfolders, files in os.walk(root):
        if "record.json" in files or "config.json" in files:
            subfolders.clear()
            run = _run_state(RunFolder(path))
            found[run.run_id] = run
        elif "plan.json" in files:
            planned |= dict.fromkeys(_planned_ids(pathlib.Path(path) / "plan.json"))
    missing = [RunState(run_id, "missing", None) for run_id in planned if run_id not in found]
    return Status(tuple(sorted([*found.values(), *missing], key=lambda run: (STATES.index(run.state), run.run_id))))


def _run_state(run: RunFolder) -> RunState:
    run_id = run.path.resolve().name
    try:
        record = run.record()
        holder = run.holder() if record is None else None
        rows = run.metrics() if record is None else []
    except ValueError as error:
        return RunState(run_id, "failed", run.path, str(error))
    if record is not None:
        state = record.get("status")
        if state not in STATUSES:
            return RunState(run_id, "failed", run.path, f"record.json has status {state!r}")
        return RunState(run_id, state, run.path, _diverged_note(record))
    step = f"step {rows[-1]['step']}" if rows else "no step logged"
    if holder is None:
        return RunState(run_id, "stopped", run.path, step)
    return RunState(run_id, "running", run.path, f"{step}, process {holder.pid} on {holder.host}")


def _diverged_note(record: dict[str, Any]) -> str:
    return f"at step {record['diverged_step']}" if record.get("diverged_step") is not None else ""


def _planned_ids(path: pathlib.Path) -> list[str]:
    try:
        plan = json.loads(path.read_text())
        return [str(run_id) for run_id in plan["run_ids"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a plan: a JSON object with a list 'run_ids' ({error})") from error


def status_main(argv: list[str]) -> int:
    """`bitlaw status DIR`: prints a line per state and the list of what is not done.

    Returns 0 when there are runs and all are done or diverged, else 1. ValueError for bad arguments.
    """
    if len(argv) != 1 or argv[0].startswith("-"):
        raise ValueError(f"bitlaw status takes one folder, not {' '.join(argv) or 'nothing'}: bitlaw status DIR")
    result = status(argv[0])
    console = Console(highlight=False)
    if not result.runs:
        console.print(f"no runs in {argv[0]}", markup=False)
        return 1
    table = Table(box=None, show_header=False, pad_edge=False)
    for state, count in result.counts.items():
        table.add_row(state, f"{count:6d}")
    console.print(table)
    diverged = [run for run in result.runs if run.state == "diverged"]
    for title, runs in (("diverged", diverged), ("not done", result.not_done)):
        if runs:
            console.print(f"\n{title}:", markup=False)
        for run in runs:
            # Plain and unwrapped, for grep and scripts.
            console.print(f"  {run.state:9}{run.run_id}  {run.note}".rstrip(), markup=False, soft_wrap=True)
    return 1 if result.not_done else 0
