"""`bitlaw status DIR [--watch]`: how far the runs below a folder are, and which are not done."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import pathlib
import time
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from trainer.records import STATUSES, NewerVersionError, RunFolder, find

# In this order. `stopped`: begun, not over, and no living process trains it; `missing`: planned and not begun.
STATES = ("done", "diverged", "running", "stopped", "failed", "missing")
_SETTLED = frozenset({"done", "diverged"})
_REFRESH_S = 2.0
USAGE = "bitlaw status DIR [--watch]"

# Path of a record -> what its file was (time, size, inode), and what it said: a watch of thousands reads each record once.
Known = dict[pathlib.Path, tuple[tuple[int, int, int], "RunState"]]


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


def status(folder: str | os.PathLike[str], known: Known | None = None) -> Status:
    """Looks through `folder` for run folders (a `config.json` or `record.json`) and sweep plans (`plan.json` with `run_ids`).

    A planned run is missing when no run folder below `folder` has its id. Of several copies of a run (a sweep that was made on
    several machines) the one that is furthest counts, in the order of STATES. `known` is filled and used again by the next call.
    ValueError, one line, when `folder` is none, a plan is not readable, or a run folder is in a newer version.
    """
    root = pathlib.Path(folder)
    if not root.is_dir():
        raise ValueError(f"{folder} is not a folder; '{USAGE}' takes a run folder, or a folder that holds some")
    folders, plans = find(root)
    known = {} if known is None else known
    found: dict[str, RunState] = {}
    for one in folders:
        run = _run_state(one, known)
        other = found.get(run.run_id)
        if other is None or STATES.index(run.state) < STATES.index(other.state):
            found[run.run_id] = run
    planned = dict.fromkeys(run_id for path in plans for run_id in _planned_ids(path))
    missing = [RunState(run_id, "missing", None) for run_id in planned if run_id not in found]
    return Status(tuple(sorted([*found.values(), *missing], key=lambda run: (STATES.index(run.state), run.run_id))))


def _run_state(run: RunFolder, known: Known) -> RunState:
    name = run.path.resolve().name
    try:
        stamp = _stamp(run.path / "record.json")
        if stamp is None:
            return _unfinished(run, name)
        if run.path not in known or known[run.path][0] != stamp:
            record = run.record()
            if record is None:  # taken away since: a failed run that is being tried again
                return _unfinished(run, name)
            known[run.path] = stamp, _finished(run, name, record)
        return known[run.path][1]
    except NewerVersionError:
        raise
    except ValueError as error:
        return RunState(name, "failed", run.path, str(error))


def _stamp(path: pathlib.Path) -> tuple[int, int, int] | None:
    try:
        about = path.stat()
    except FileNotFoundError:
        return None
    return about.st_mtime_ns, about.st_size, about.st_ino


def _finished(run: RunFolder, name: str, record: dict[str, Any]) -> RunState:
    run_id, state = record.get("run_id") or name, record.get("status")
    if state not in STATUSES:
        return RunState(run_id, "failed", run.path, f"record.json has status {state!r}")
    diverged = record.get("diverged_step")
    return RunState(run_id, state, run.path, f"at step {diverged}" if diverged is not None else "")


def _unfinished(run: RunFolder, name: str) -> RunState:
    holder = run.holder()
    about, row = run.config() or {}, run.last_row()
    steps = (about.get("config") or {}).get("steps")
    note = "no step logged" if row is None else f"step {row.get('step')}" + (f" of {steps}" if steps else "")
    if row is not None and row.get("loss") is not None:
        note += f", loss {row['loss']:.4g}"
    run_id = about.get("run_id") or name
    if holder is None:
        return RunState(run_id, "stopped", run.path, note)
    return RunState(run_id, "running", run.path, f"{note}, process {holder.pid} on {holder.host}")


def _planned_ids(path: pathlib.Path) -> list[str]:
    try:
        plan = json.loads(path.read_text())
        return [str(run_id) for run_id in plan["run_ids"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a plan: a JSON object with a list 'run_ids' ({error})") from error


# --- the command ----------------------------------------------------------------------------------------------------


def status_main(argv: list[str]) -> int:
    """`bitlaw status DIR [--watch]`: prints a line per state and the list of what is not done; with --watch again and again.

    Returns 0 when all runs are done or diverged, else 1. ValueError for bad arguments, or where there are neither runs nor plans.
    """
    folders = [word for word in argv if word != "--watch"]
    if len(folders) != 1 or folders[0].startswith("-"):
        raise ValueError(f"bitlaw status takes one folder, not {' '.join(folders) or 'nothing'}: {USAGE}")
    console, known = Console(highlight=False), {}
    result = _some(folders[0], known)
    if "--watch" in argv:
        watch = _watch_terminal if console.is_terminal else _watch_log
        try:
            result = watch(console, folders[0], result, known)
        except KeyboardInterrupt:  # the way to leave; what is on the screen stays
            result = _some(folders[0], known)
    if "--watch" not in argv or console.is_terminal:
        _print(console, result)
    return 1 if result.not_done else 0


def _some(folder: str, known: Known) -> Status:
    result = status(folder, known)
    if not result.runs:
        raise ValueError(f"{folder} holds no runs: no folder at or below it has a config.json, record.json or plan.json; accepted: a run folder, or one that holds some")
    return result


def _moving(result: Status) -> bool:
    """Whether there is something to wait for."""
    return bool(result.counts["running"] or result.counts["missing"])


def _watch_terminal(console: Console, folder: str, result: Status, known: Known) -> Status:
    """Shows the counts and the running runs in place, until nothing runs and nothing is missing."""
    with Live(_view(console, result), console=console, transient=True, auto_refresh=False) as live:
        while _moving(result):
            time.sleep(_REFRESH_S)
            result = _some(folder, known)
            live.update(_view(console, result), refresh=True)
    return result


def _watch_log(console: Console, folder: str, result: Status, known: Known) -> Status:
    """One line whenever the counts change: for a file or a pipe."""
    said = None
    while True:
        line = ", ".join(f"{count} {state}" for state, count in result.counts.items() if count)
        if line != said:
            console.print(f"{time.strftime('%H:%M:%S')} {line}", markup=False, soft_wrap=True)
            said = line
        if not _moving(result):
            return result
        time.sleep(_REFRESH_S)
        result = _some(folder, known)


def _view(console: Console, result: Status) -> Group:
    """As much as fits on the screen."""
    running = [run for run in result.runs if run.state == "running"]
    room = max(1, console.size.height - len(STATES) - 3)
    lines = [Text(f"  {run.run_id}  {run.note}", overflow="ellipsis", no_wrap=True) for run in running[:room]]
    if len(running) > room:
        lines.append(Text(f"  and {len(running) - room} more"))
    return Group(_counts(result), Text(""), *lines)


def _counts(result: Status) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    for state, count in result.counts.items():
        table.add_row(state, f"{count:6d}")
    return table


def _print(console: Console, result: Status) -> None:
    console.print(_counts(result))
    diverged = [run for run in result.runs if run.state == "diverged"]
    lines = []
    for title, runs in (("diverged", diverged), ("not done", result.not_done)):
        if runs:
            lines += ["", f"{title}:", *(f"  {run.state:9}{run.run_id}  {run.note}".rstrip() for run in runs)]
    if lines:
        # Plain and unwrapped, for grep and scripts.
        console.print("\n".join(lines), markup=False, soft_wrap=True)
