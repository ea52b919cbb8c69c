"""Run folders on disk: which there are, what their records say, and one for each run, however many copies of it lie about.

A folder of runs may be read while they are trained, and may have been copied together from several machines. A record that is
damaged (truncated, half copied) is left out and said so in one line on stderr; a record that goes away while it is read (a failed run
that is tried again) is none.
"""
from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

RECORD_VERSION = 1
"""The newest version of run folders that is read here; those without `record_version` are of version 1."""

_RUN_FILES = frozenset({"record.json", "config.json", "metrics.jsonl", "telemetry.jsonl"})
_RANKS = {"done": 0, "diverged": 0, "failed": 1}


@dataclasses.dataclass(frozen=True)
class Run:
    """A run folder; `record` is None while the run is not over, or when it cannot be read."""

    run_id: str
    path: Path
    record: dict | None


class _Damaged(Exception):
    """A record is not what a run writes."""


def find(folders: list[Path], name: str) -> list[Path]:
    """The run folders at or below `folders`, each once, in the order of `folders`, then of their paths. ValueError, naming the wanted file,
    when a folder is missing or there is no run folder."""
    if not folders:
        raise ValueError("table: no folder given; give a run folder, a list of them, or a .csv/.parquet/.json file")
    for folder in folders:
        if not folder.exists():
            raise ValueError(f"{folder}: no such file or folder; give a run folder or a .csv/.parquet/.json file")
        if not folder.is_dir():
            raise ValueError(f"{folder}: is a file; a list may hold run folders only")
    found: dict[Path, None] = {}
    for folder in folders:
        for path, subfolders, files in os.walk(folder):
            subfolders.sort()
            if not _RUN_FILES.isdisjoint(files):
                subfolders.clear()  # checkpoints, mirrors
                found.setdefault(Path(os.path.abspath(path)))
    if not found:
        raise ValueError(f"{', '.join(map(str, folders))}: no {name} below it; give a folder of runs")
    return list(found)


def runs(folders: list[Path], columns: Mapping[str, str], name: str = "record.json", tell: bool = True) -> list[Run]:
    """One `Run` for every run id below `folders`. Of copies, one that is done or diverged before one that failed, that before one that is
    not over; among equals the first found, among those not over the one that logged most.

    columns: name -> SQL type of the columns that are known, which a record must fit. tell: say on stderr what is left out.
    ValueError, one line, for a record in a newer version.
    """
    best: dict[str, tuple[tuple, Run]] = {}
    for path in find(folders, name):
        try:
            record = _record(path / "record.json", columns)
        except _Damaged as damage:
            record = None
            if tell:
                print(f"bitlaw: {path / 'record.json'} is left out: {damage}", file=sys.stderr)
        run_id = str((record or _about(path)).get("run_id") or path.name)
        rank = (_RANKS.get(record.get("status"), 2), 0) if record else (3, -_size(path / "metrics.jsonl"))
        if run_id not in best or rank < best[run_id][0]:
            best[run_id] = rank, Run(run_id, path, record)
    return [run for _, run in best.values()]


def unfinished(folder: Path) -> int:
    """How many runs below a folder have no record yet: those that were begun, and those that the plan of a sweep there names."""
    found = runs([folder], {}, tell=False)
    over = {run.run_id for run in found if run.record is not None}
    try:
        planned = json.loads((folder / "plan.json").read_bytes())["run_ids"]
    except (OSError, ValueError, KeyError, TypeError):
        planned = []
    return len({run.run_id for run in found}.union(planned) - over)


def _record(path: Path, columns: Mapping[str, str]) -> dict | None:
    try:
        record = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise _Damaged(f"not a JSON record ({error})") from None
    if not isinstance(record, dict):
        raise _Damaged(f"a record is a JSON object, this is a {type(record).__name__}")
    version = record.get("record_version", 1)
    if type(version) is int and version > RECORD_VERSION:
        raise ValueError(f"{path} has record_version {version}; this bitlaw reads up to {RECORD_VERSION}: use the bitlaw that wrote it, "
                         "or a newer one")
    for column, kind in columns.items():
        value = record.get(column)
        if value is not None and not isinstance(value, str if kind == "VARCHAR" else (int, float)):
            raise _Damaged(f"{column} is {value!r}, which is no {'text' if kind == 'VARCHAR' else 'number'}")
    return record


def _about(path: Path) -> dict:
    """What config.json says, nothing where it cannot be read: it is asked for the run's id only."""
    try:
        about = json.loads((path / "config.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return about if isinstance(about, dict) else {}


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
