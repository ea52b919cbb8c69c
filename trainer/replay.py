"""`bitlaw wandb-sync DIR [--again]`: replays finished runs from their folders to Weights & Biases, through the mirror that training uses.

Same id, group, tags, config, metrics and summary as a run mirrored while it was trained. What is there already, as `wandb.json` in the run
folder tells, is not sent twice. Offline, a replay takes the place of the run's earlier `wandb/offline-run-*` folders.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
from collections.abc import Iterable

from rich.console import Console
from rich.progress import track

from trainer import mirrors
from trainer.records import STATUSES, NewerVersionError, RunFolder, find

USAGE = "bitlaw wandb-sync DIR [--again]"
_SAID = "stopped here; the same command goes on"


@dataclasses.dataclass(frozen=True)
class Found:
    """The runs below a folder: those that are over, each with its record and once; ids of those that are not; how many records are broken."""

    over: tuple[tuple[RunFolder, dict], ...]
    unfinished: frozenset[str]
    broken: int


@dataclasses.dataclass
class Outcome:
    """Numbers of runs: replayed, there already, not readable; and W&B's trouble, which ended the replay."""

    replayed: int = 0
    already: int = 0
    broken: int = 0
    trouble: str | None = None


def replay_main(argv: list[str]) -> int:
    """Returns 0 when every run below the folder that is over is mirrored, else 1. ValueError, one line, for bad input."""
    folders = [word for word in argv if word != "--again"]
    if len(folders) != 1 or folders[0].startswith("-"):
        raise ValueError(f"bitlaw wandb-sync takes one folder, not {' '.join(folders) or 'nothing'}: {USAGE}")
    mode = mirrors.mode()
    if mode not in ("offline", "online"):
        raise ValueError(f"WANDB_MODE={mode} replays nothing; accepted: offline (the default), online")
    runs = found(folders[0])
    mirrors.make("wandb")  # a missing package is told before anything else
    console = Console(stderr=True)
    over = track(runs.over, "replaying", console=console, transient=True) if console.is_terminal else runs.over
    outcome = replay(over, again="--again" in argv)
    left = len(runs.over) - outcome.replayed - outcome.already + runs.broken
    print(f"{folders[0]}: {outcome.replayed} runs replayed ({mode}), {outcome.already} already synced, {len(runs.unfinished)} not over"
          + (f", {left} left" if left else ""))  # fmt: skip
    if outcome.replayed and mode == "offline":
        print("to upload them: wandb sync RUN/wandb/offline-run-*, or the same command with WANDB_MODE=online")
    return 1 if left else 0


def found(folder: str | os.PathLike[str]) -> Found:
    """Looks for runs at and below `folder`. Of copies of a run the first that is done or diverged counts, or else the first that failed.
    ValueError, one line, when it is no folder, holds no run, or a run is in a newer version; a broken record is a line on stderr."""
    if not os.path.isdir(folder):
        raise ValueError(f"{folder} is not a folder; '{USAGE}' takes a run folder, or a folder that holds some")
    folders, _ = find(folder)
    if not folders:
        raise ValueError(f"{folder} holds no runs: no folder at or below it has a config.json or record.json; accepted: a run folder, or one that holds some")
    over: dict[str, tuple[RunFolder, dict]] = {}
    unfinished, broken = set(), 0
    for run in folders:
        name = run.path.resolve().name
        try:
            record = run.record()
            if record is not None and record.get("status") not in STATUSES:
                raise ValueError(f"{run.path / 'record.json'} has status {record.get('status')!r}; a run that is over is {', '.join(STATUSES)}")
            if record is None:
                unfinished.add((run.config() or {}).get("run_id") or name)
                continue
        except NewerVersionError:
            raise
        except ValueError as error:
            print(f"bitlaw: {error}", file=sys.stderr)
            broken += 1
            continue
        run_id = record.get("run_id") or name
        if run_id not in over or (over[run_id][1]["status"] == "failed" and record["status"] != "failed"):
            over[run_id] = run, record | {"run_id": run_id}
    return Found(tuple(over.values()), frozenset(unfinished - over.keys()), broken)


def replay(over: Iterable[tuple[RunFolder, dict]], again: bool = False) -> Outcome:
    """Replays the runs that are not mirrored as they are now, or, `again`, all. Ends at W&B's first trouble; a run whose config or metrics
    are broken is a line on stderr. ValueError, one line, when a folder cannot be written."""
    outcome = Outcome()
    for run, record in over:
        if not again and mirrors.noted(run.path)["sha256"] == mirrors.digest(run.path):
            outcome.already += 1
            continue
        try:
            about, rows = run.config() or {}, run.metrics()
        except ValueError as error:
            print(f"bitlaw: {error}", file=sys.stderr)
            outcome.broken += 1
            continue
        outcome.trouble = _send(run, record, about, rows)
        if outcome.trouble is not None:
            return outcome
        outcome.replayed += 1
    return outcome


def _send(run: RunFolder, record: dict, about: dict, rows: list[dict]) -> str | None:
    """Mirrors one run; W&B's trouble, or None."""
    try:
        for name in mirrors.noted(run.path)["folders"] if mirrors.mode() == "offline" else ():
            shutil.rmtree(run.path / "wandb" / name, ignore_errors=True)
        mirrors.note(run.path, None, [])
    except OSError as error:
        raise ValueError(f"{run.path} cannot be written ({error.strerror}); wandb-sync writes wandb/ and {mirrors.NOTE} in each run's folder") from error
    mirror = mirrors.WandbMirror(_SAID, whole=True)
    mirror.start(record["run_id"], record.get("sweep"), about.get("config") or {}, run.path)
    for row in rows:
        mirror.log(row)
    mirror.finish(record)
    return mirror.trouble
