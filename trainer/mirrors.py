"""Mirrors of a run: `logger=wandb` copies what the run folder records to Weights & Biases, `logger=none` copies nothing.

The run folder is the record; a mirror may fail, and training then goes on without it after one line on stderr. W&B is
imported when the first mirror is made, never before, and stays offline unless WANDB_MODE says otherwise. Online, a server that
does not answer costs a run at most _START_S and _FINISH_S seconds, and the runs after it nothing for _RETRY_S: `bitlaw
wandb-sync` replays them (trainer/replay.py), and so that it need not replay what is mirrored whole, `wandb.json` in the run folder
says for each destination which state of the run is there (`sha256` of config, metrics and record), and in which folders.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from trainer.records import METRICS, RunFolder

NOTE = "wandb.json"  # in a run folder
_START_S, _FINISH_S, _RETRY_S = 10.0, 20.0, 600.0


class Mirror(Protocol):
    """What the loop calls, in this order. None of it raises for trouble on the mirror's side."""

    def start(self, run_id: str, sweep: str | None, config: Mapping[str, Any], folder: str | os.PathLike[str]) -> None:
        """Begins to mirror a run; `folder` is the run folder. A resumed run begins again, under the same id."""

    def log(self, row: Mapping[str, Any]) -> None:
        """Mirrors a metrics row; rows have a `step`, which does not fall. Rows of one step are one row."""

    def finish(self, record: Mapping[str, Any]) -> None:
        """Mirrors the record as the run's summary, and ends it."""


class NoMirror:
    """`logger=none`."""

    def start(self, run_id: str, sweep: str | None, config: Mapping[str, Any], folder: str | os.PathLike[str]) -> None:
        pass

    def log(self, row: Mapping[str, Any]) -> None:
        pass

    def finish(self, record: Mapping[str, Any]) -> None:
        pass


class WandbMirror:
    """`logger=wandb`: run id = id, sweep = group, model, precision and status = tags, and the files in `<run folder>/wandb`.

    Many may be active in one process, one for each member of a cohort. $WANDB_MODE (online, offline, disabled),
    $WANDB_PROJECT (default bitlaw), $WANDB_ENTITY and the rest of W&B's variables hold.

    `trouble` is what went wrong with this run's mirror, one line; None while nothing has.

    Args:
      said: what stderr is told after that.
      whole: everything will come, whatever the run folder holds already; else a run that was begun before is taken to be in pieces.
    """

    _unreachable_since: float | None = None  # of the process: when W&B failed last, online

    def __init__(self, said: str = "the run goes on, recorded in its folder only; bitlaw wandb-sync mirrors it later", whole: bool = False) -> None:
        try:
            import wandb
            from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError
        except ModuleNotFoundError as error:
            raise ValueError("logger=wandb needs the package 'wandb': pip install 'bitlaw[wandb]'; or logger=none") from error
        self._wandb = wandb
        # OSError: its service process died, the disk is full, the network is away. The mailbox errors: the same, seen
        # while waiting for an answer. ValueError: a WANDB_* variable that its settings refuse.
        self._troubles = (wandb.Error, OSError, HandleAbandonedError, MailboxClosedError, ValueError)
        self._run: Any = None
        self._pending: dict[str, Any] = {}
        self.trouble: str | None = None
        self._said = said
        self._folder = pathlib.Path()
        self._whole = whole

    def start(self, run_id: str, sweep: str | None, config: Mapping[str, Any], folder: str | os.PathLike[str]) -> None:
        if self._unreachable():
            self.trouble = "W&B failed a moment ago"  # that was told then
            return
        self._folder = pathlib.Path(folder)
        self._whole = self._whole or not (self._folder / METRICS).exists()
        self._run = self._guarded(lambda: self._init(run_id, sweep, config, self._folder))
        if self._run is not None and mode() != "disabled":
            self._guarded(lambda: note(self._folder, None, [*noted(self._folder)["folders"], pathlib.Path(self._run.settings.sync_dir).name]))

    def log(self, row: Mapping[str, Any]) -> None:
        # W&B holds back the newest step for more to come and would write it after the summary; so it is held here.
        if self._pending and self._pending["step"] != row["step"]:
            self._flush()
        self._pending |= row

    def finish(self, record: Mapping[str, Any]) -> None:
        if self._run is not None and self._unreachable():  # the rest of a cohort does not wait in turn
            self.trouble, self._run = "W&B failed a moment ago", None
        self._flush()
        present = {name: value for name, value in record.items() if value is not None}
        if self._run is not None:
            self._guarded(lambda: self._run.summary.update(present))
        if self._run is not None:
            self._guarded(lambda: setattr(self._run, "tags", _tags(*self._run.tags, record.get("precision"), record["status"])))
        if self._run is not None:
            self._guarded(lambda: self._run.finish(exit_code=1 if record.get("status") == "failed" else 0))
        if self._run is not None and self._whole and mode() != "disabled":
            self._guarded(lambda: note(self._folder, digest(self._folder), noted(self._folder)["folders"]))
        self._run = None

    @staticmethod
    def _unreachable() -> bool:
        since = WandbMirror._unreachable_since
        return mode() == "online" and since is not None and time.monotonic() - since < _RETRY_S

    def _init(self, run_id: str, sweep: str | None, config: Mapping[str, Any], folder: pathlib.Path) -> Any:
        folder.mkdir(parents=True, exist_ok=True)
        # One process, many runs: none takes over standard output or samples the machine; the record names the code.
        settings = self._wandb.Settings(
            reinit="create_new", silent=True, console="off", x_disable_stats=True, x_disable_machine_info=True,
            disable_git=True, disable_code=True, x_save_requirements=False, **self._patience(),
        )  # fmt: skip
        resume = "allow" if mode() == "online" else None  # offline it means nothing, and some versions say so each time
        return self._wandb.init(
            id=run_id, name=run_id, group=sweep, job_type="train", config=dict(config), dir=str(folder), resume=resume,
            mode=mode(), project=os.environ.get("WANDB_PROJECT", "bitlaw"), tags=_tags((config.get("model") or {}).get("name")), settings=settings,
        )  # fmt: skip

    def _patience(self) -> dict[str, Any]:
        """How long W&B may wait for its server, in those settings that this version of it has."""
        known = getattr(self._wandb.Settings, "model_fields", {})
        asked = {"login_timeout": _START_S, "init_timeout": _START_S, "finish_timeout": _FINISH_S, "finish_timeout_raises": True}
        given = {"init_timeout": "WANDB_INIT_TIMEOUT", "finish_timeout": "WANDB_FINISH_TIMEOUT"}  # the user's word holds
        return {name: value for name, value in asked.items() if name in known and given.get(name, "") not in os.environ}

    def _flush(self) -> None:
        row, self._pending = self._pending, {}
        if self._run is not None and row:
            step = row.pop("step")
            self._guarded(lambda: self._run.log(row, step=int(step), commit=True))

    def _guarded(self, call: Callable[[], Any]) -> Any:
        """The call's result; at the first trouble one line on stderr, and this run is mirrored no further."""
        try:
            return call()
        except self._troubles as error:
            self._run = None
            if mode() == "online":
                WandbMirror._unreachable_since = time.monotonic()
            self.trouble = " ".join(str(error).split()) or type(error).__name__
            print(f"bitlaw: W&B fails ({self.trouble}); {self._said}", file=sys.stderr)
            return None


def mode() -> str:
    """$WANDB_MODE, offline where it is not set."""
    return os.environ.get("WANDB_MODE", "offline")


# --- what is mirrored where -----------------------------------------------------------------------------------------


def destination() -> str:
    """Where W&B's variables send a run: `offline project`, `online https://... entity/project`."""
    project = "/".join(filter(None, (os.environ.get("WANDB_ENTITY"), os.environ.get("WANDB_PROJECT", "bitlaw"))))
    return f"{mode()} {os.environ.get('WANDB_BASE_URL', '') if mode() == 'online' else ''} {project}"


def digest(folder: pathlib.Path) -> str:
    """sha256 of a run's config, metrics and record."""
    found = hashlib.sha256()
    for name in ("config.json", METRICS, "record.json"):
        content = (folder / name).read_bytes() if (folder / name).exists() else b""
        found.update(f"{name} {len(content)} ".encode() + content)
    return found.hexdigest()


def noted(folder: pathlib.Path) -> dict[str, Any]:
    """What is noted of a run for the present destination: `sha256` (None: not whole) and `folders` in `wandb/`."""
    return {"sha256": None, "folders": []} | _notes(folder).get(destination(), {})


def note(folder: pathlib.Path, sha256: str | None, folders: list[str]) -> None:
    """Writes it. OSError where that cannot be."""
    RunFolder(folder).write_note(NOTE, _notes(folder) | {destination(): {"sha256": sha256, "folders": folders}})


def _notes(folder: pathlib.Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / NOTE).read_bytes()))
    except (FileNotFoundError, ValueError, TypeError):  # nothing, or nothing that can be read: it is mirrored again
        return {}


def _tags(*names: Any) -> tuple[str, ...]:
    """Each once; W&B takes 1 to 64 characters."""
    return tuple(dict.fromkeys(str(name)[:64] for name in names if name))


MIRRORS: dict[str, type[NoMirror] | type[WandbMirror]] = {"none": NoMirror, "wandb": WandbMirror}


def make(logger: str) -> Mirror:
    """A mirror for one run. ValueError, one line, for an unknown logger or one whose package is missing."""
    if logger not in MIRRORS:
        raise ValueError(f"logger={logger!r} is not known; known: {', '.join(MIRRORS)}")
    return MIRRORS[logger]()
