"""Run folders: what a run writes, appends and leaves behind. Local, append-only, readable by anything that reads JSON.

A run folder, named by its run id, holds
  `config.json`    the frozen config, written first;
  `metrics.jsonl`  one JSON object per logged step, appended while it trains;
  `telemetry.jsonl`  with telemetry_every=K, one per layer, linear site and role of every K-th step (and the first), likewise:
                   step, layer, site, role, rms and amax of the tensor; where it is quantized the shares `underflow` (was not zero,
                   became zero) and `overflow` (beyond the largest value) of all its values, and `exponent`, the mean log2 of its scales;
  `alive.json`     which process trains it, while one does; its modification time is the heartbeat;
  `record.json`    one object with every column of the run table, written once, at the end.

JSON has no NaN and no infinity. In a metrics row such a value is null, and the row says what it was:
`{"step": 7, "loss": null, "nonfinite": {"loss": "nan"}}`; `metrics()` puts it back. In a record it is null, because the run
table is SQL: `status` and `diverged_step` tell why.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

_ROLES = ("weights", "activations", "output_gradients", "kv", "scores", "probabilities", "master_weights", "adam_m", "adam_v")
_ROLE_COLUMNS: dict[str, type] = {
    "format": str, "granularity": str, "bits": float, "bits_effective": float, "exp_bits": int, "man_bits": int, "block": int, "rounding": str,
    "source": str, "log_mse": float,
}  # fmt: skip

# The run table's columns in order, with their types; every record has them all. (Section 4 of the design.)
RECORD_COLUMNS: dict[str, type] = {
    "run_id": str, "sweep": str, "status": str, "seed": int, "trunk_id": str, "cooldown_steps": int, "unique_tokens": int,
    "n_params": int, "n_params_total": int, "tokens": int, "flops": float, "loss": float, "loss_std_err": float,
    "loss_train": float, "bits_per_byte": float, "precision": str,
    **{f"{role}_{name}": kind for role in _ROLES for name, kind in _ROLE_COLUMNS.items()},
    "quantized_fraction": float, "dot_precision": str, "execution": str, "layout": str, "lr_rule": str, "lr": float,
    "batch_tokens": int, "steps": int, "schedule": str, "diverged_step": int, "wall_s": float, "tokens_per_s": float, "mfu": float,
    "edq": float, "lost_updates": float, "updates_per_ulp": float, "gradient_cosine": float, "gradient_magnitude": float,
    **{f"{role}_{what}": float for role in _ROLES[:3] for what in ("underflow", "overflow")},
    "weights_bytes_per_param": float, "moments_bytes_per_param": float, "peak_bytes_per_param": float,
    "device": str, "n_devices": int, "jax_version": str, "code_version": str, "data": str, "data_sha256": str,
}  # fmt: skip

METRICS, TELEMETRY = "metrics.jsonl", "telemetry.jsonl"
STATUSES = ("done", "diverged", "failed")
_PTQ = "ptq_"  # columns ptq_<format>: loss after post-training quantization, float
_NONFINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_HEARTBEAT_S = 900.0  # a run on another host without a sign of life for longer counts as stopped


def complete(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with every column in the table's order, absent ones None, values as plain Python.

    Raises:
      ValueError: one line, for a missing run_id or status, an unknown column or status, or a value of the wrong type.
    """
    unknown = [name for name in record if name not in RECORD_COLUMNS and not name.startswith(_PTQ)]
    if unknown:
        raise ValueError(f"record column {unknown[0]!r} is not in the run table; known are RECORD_COLUMNS and {_PTQ}<format>")
    kinds = RECORD_COLUMNS | {name: float for name in record if name not in RECORD_COLUMNS}
    filled = {name: _typed(name, record.get(name), kind) for name, kind in kinds.items()}
    if filled["run_id"] is None:
        raise ValueError("record column 'run_id' is missing; every record names its run")
    if filled["status"] not in STATUSES:
        raise ValueError(f"record column 'status' is {filled['status']!r}; it must be one of {', '.join(STATUSES)}")
    return filled


def _typed(name: str, value: Any, kind: type) -> Any:
    plain = value.item() if hasattr(value, "item") else value
    if plain is None:
        return None
    if kind is float and type(plain) in (int, float):
        return float(plain) if math.isfinite(plain) else None
    if type(plain) is not kind:
        raise ValueError(f"record column {name!r} is {value!r} ({type(value).__name__}); it must be {kind.__name__} or null")
    return plain


@dataclasses.dataclass(frozen=True)
class Holder:
    """The process that trains a run."""

    host: str
    pid: int


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """The files of one run, at `path`; the folder is made at the first write."""

    path: pathlib.Path

    def __init__(self, path: str | os.PathLike[str]):
        object.__setattr__(self, "path", pathlib.Path(path))

    @property
    def checkpoints(self) -> pathlib.Path:
        """Where the run's checkpoints lie."""
        return self.path / "checkpoints"

    # --- writing ---

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Writes `config.json` atomically."""
        _write_atomically(self.path / "config.json", json.dumps(config, indent=1, allow_nan=False))

    @contextlib.contextmanager
    def claim(self) -> Iterator[None]:
        """Marks the run as trained by this process for as long as the context lasts.

        Raises ValueError, one line, when a living process trains it already.
        """
        holder = self.holder()
        if holder is not None and holder != Holder(socket.gethostname(), os.getpid()):
            raise ValueError(f"run {self.path} is being trained by process {holder.pid} on {holder.host}; wait for it or stop it")
        mark = {"host": socket.gethostname(), "pid": os.getpid(), "process_start": _process_start(os.getpid())}
        _write_atomically(self.path / "alive.json", json.dumps(mark))
        try:
            yield
        finally:
            (self.path / "alive.json").unlink(missing_ok=True)

    def append_metrics(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Appends rows (each with a `step`) in one write, and beats the heart. A torn line that a kill left is cut off first."""
        self._append(METRICS, rows)
        with contextlib.suppress(FileNotFoundError):
            os.utime(self.path / "alive.json")

    def append_telemetry(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Appends rows (each with a `step`) in one write, as `append_metrics` does."""
        self._append(TELEMETRY, rows)

    def truncate(self, step: int) -> None:
        """Drops the metrics and telemetry after `step`, each file atomically: what a resumed run will log again."""
        for name in (METRICS, TELEMETRY):
            path = self.path / name
            rows = self._rows(name)
            kept = [row for row in rows if row["step"] <= step]
            if path.exists() and (len(kept) < len(rows) or not _ends_whole(path)):
                _write_atomically(path, "".join(_row_json(row) + "\n" for row in kept))

    def _append(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        text = "".join(_row_json(row) + "\n" for row in rows)
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / name).open("ab") as file:
            if file.tell() and not _ends_whole(self.path / name):
                file.truncate(_whole_length(self.path / name))
            file.write(text.encode())

    def finish(self, record: Mapping[str, Any]) -> None:
        """Writes `complete(record)` to `record.json`, atomically and durably: with it the run is over."""
        _write_atomically(self.path / "record.json", json.dumps(complete(record), indent=1, allow_nan=False) + "\n")

    # --- reading ---

    def config(self) -> dict[str, Any] | None:
        """The config, None before it is written."""
        return _read_object(self.path / "config.json")

    def record(self) -> dict[str, Any] | None:
        """The record, None while the run is not over. ValueError, one line, when the file is no JSON object."""
        return _read_object(self.path / "record.json")

    def metrics(self) -> list[dict[str, Any]]:
        """The rows in order, without a torn last line; non-finite values as they were. ValueError for another broken line."""
        return self._rows(METRICS)

    def telemetry(self) -> list[dict[str, Any]]:
        """The rows of telemetry.jsonl, read as `metrics` are; none where there is no file."""
        return self._rows(TELEMETRY)

    def _rows(self, name: str) -> list[dict[str, Any]]:
        path = self.path / name
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        rows = []
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path} line {number} is not JSON ({error})") from error
            rows.append(row | {key: _NONFINITE[what] for key, what in row.pop("nonfinite", {}).items()})
        return rows

    def holder(self) -> Holder | None:
        """The living process that trains the run, else None.

        On this host a process is alive when its id belongs to a process that started when the marked one did. Of another
        host it is believed while the heartbeat is younger than 15 minutes.
        """
        mark = _read_object(self.path / "alive.json")
        if mark is None:
            return None
        if mark["host"] == socket.gethostname():
            alive = _process_alive(mark["pid"]) and _process_start(mark["pid"]) == mark["process_start"]
        else:
            alive = time.time() - (self.path / "alive.json").stat().st_mtime < _HEARTBEAT_S
        return Holder(mark["host"], mark["pid"]) if alive else None


class Onlooker(RunFolder):
    """The folder as the processes of a distributed run have it that do not lead: they read it and leave writing to the first."""

    def write_config(self, config: Mapping[str, Any]) -> None:
        pass

    @contextlib.contextmanager
    def claim(self) -> Iterator[None]:
        yield

    def truncate(self, step: int) -> None:
        pass

    def _append(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        pass

    def finish(self, record: Mapping[str, Any]) -> None:
        pass


def _row_json(row: Mapping[str, Any]) -> str:
    plain = {key: value.item() if hasattr(value, "item") else value for key, value in row.items()}
    odd = {key: repr(value) for key, value in plain.items() if isinstance(value, float) and not math.isfinite(value)}
    if odd:
        plain |= dict.fromkeys(odd) | {"nonfinite": odd}
    return json.dumps(plain, allow_nan=False)


def _write_atomically(path: pathlib.Path, text: str) -> None:
    """The file is the old one or the new one, also after a power failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    work = path.with_name(f".{path.name}-{os.getpid()}")
    with work.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(work, path)


def _read_object(path: pathlib.Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); remove the run's folder to train it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not hold a JSON object; remove the run's folder to train it again")
    return content


def _ends_whole(path: pathlib.Path) -> bool:
    """Whether a file is empty or ends with a newline."""
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return True
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def _whole_length(path: pathlib.Path) -> int:
    """Length of a file up to and with its last newline."""
    return path.read_bytes().rfind(b"\n") + 1


def _process_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's, but there
        return True
    return True


def _process_start(pid: int) -> str | None:
    """When a process started, in clock ticks since boot; None where the system does not tell (no /proc)."""
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return stat.rpartition(")")[2].split()[19]  # field 22; the name in field 2 may hold spaces and brackets
