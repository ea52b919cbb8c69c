"""Mirrors of a run: `logger=wandb` copies what the run folder records to Weights & Biases, `logger=none` copies nothing.

The run folder is the record; a mirror may fail, and training then goes on without it after one line on stderr. W&B is
imported when the first mirror is made, never before, and stays offline unless WANDB_MODE says otherwise.
"""

from __future__ import annotations

import os
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any, Protocol


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
    """`logger=wandb`: run id = id, sweep = group, and the files in `<run folder>/wandb`.

    Many may be active in one process, one for each member of a cohort. $WANDB_MODE (online, offline, disabled),
    $WANDB_PROJECT (default bitlaw), $WANDB_ENTITY and the rest of W&B's variables hold.
    """

    def __init__(self) -> None:
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

    def start(self, run_id: str, sweep: str | None, config: Mapping[str, Any], folder: str | os.PathLike[str]) -> None:
        self._run = self._guarded(lambda: self._init(run_id, sweep, config, pathlib.Path(folder)))

    def log(self, row: Mapping[str, Any]) -> None:
        # W&B holds back the newest step for more to come and would write it after the summary; so it is held here.
        if self._pending and self._pending["step"] != row["step"]:
            self._flush()
        self._pending |= row

    def finish(self, record: Mapping[str, Any]) -> None:
        self._flush()
        present = {name: value for name, value in record.items() if value is not None}
        if self._run is not None:
            self._guarded(lambda: self._run.summary.update(present))
        if self._run is not None:
            self._guarded(lambda: self._run.finish(exit_code=1 if record.get("status") == "failed" else 0))
        self._run = None

    def _init(self, run_id: str, sweep: str | None, config: Mapping[str, Any], folder: pathlib.Path) -> Any:
        folder.mkdir(parents=True, exist_ok=True)
        # One process, many runs: none takes over standard output or samples the machine; the record names the code.
        settings = self._wandb.Settings(
            reinit="create_new", silent=True, console="off", x_disable_stats=True, x_disable_machine_info=True,
            disable_git=True, disable_code=True, x_save_requirements=False,
        )  # fmt: skip
        mode = os.environ.get("WANDB_MODE", "offline")
        resume = "allow" if mode == "online" else None  # offline it means nothing, and some versions say so each time
        return self._wandb.init(
            id=run_id, name=run_id, group=sweep, job_type="train", config=dict(config), dir=str(folder), resume=resume,
            mode=mode, project=os.environ.get("WANDB_PROJECT", "bitlaw"), settings=settings,
        )  # fmt: skip

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
            said = " ".join(str(error).split()) or type(error).__name__
            print(f"bitlaw: W&B fails ({said}); the run goes on, recorded in its folder only", file=sys.stderr)
            return None


MIRRORS: dict[str, type[NoMirror] | type[WandbMirror]] = {"none": NoMirror, "wandb": WandbMirror}


def make(logger: str) -> Mirror:
    """A mirror for one run. ValueError, one line, for an unknown logger or one whose package is missing."""
    if logger not in MIRRORS:
        raise ValueError(f"logger={logger!r} is not known; known: {', '.join(MIRRORS)}")
    return MIRRORS[logger]()
