"""Run folders: what a run writes, appends and leaves behind. Local, append-only, readable by anything that reads JSON.

A run folder, named by its run id, holds
  `config.json`    the frozen config, written first;
  `metrics.jsonl`  one JSON object per logged step, appended while it trains;
  `telemetry.jsonl`  with telemetry_every=K, one per layer, linear site and role of every K-th step (and the first), likewise:
                   step, layer, site, role, rms and amax of the tensor; where it is quantized the shares `underflow` (was not zero,
                   became zero) and `overflow` (beyond the largest value) of all its values, and `exponent`, the mean log2 of its scales;
                   and one per layer for each of kv, scores and probabilities that it quantizes, of site `attention`;
  `alive.json`     which process trains it, while one does: a lease (`trainer.lease`);
  `record.json`    one object with every column of the run table, written once, at the end.

JSON has no NaN and no infinity. In a metrics row such a value is null, and the row says what it was:
`{"step": 7, "loss": null, "nonfinite": {"loss": "nan"}}`; `metrics()` puts it back. In a record it is null, because the run
table is SQL: `status` and `diverged_step` tell why.

`config.json` and `record.json` say in which version of this layout they are, `record_version`; those without it are of version 1.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from trainer import lease

_ROLES = ("weights", "activations", "output_gradients", "kv", "scores", "probabilities", "master_weights", "adam_m", "adam_v")
_ROLE_COLUMNS: dict[str, type] = {
    "format": str, "granularity": str, "bits": float, "bits_effective": float, "exp_bits": int, "man_bits": int, "block": int, "rounding": str,
    "source": str, "log_mse": float,
}  # fmt: skip

# The run table's columns in order, with their types; every record has them all. (Section 4 of the design.)
RECORD_COLUMNS: dict[str, type] = {
    "run_id": str, "sweep": str, "status": str, "seed": int, "trunk_id": str, "cooldown_steps": int, "unique_tokens": int,
    "n_params": int, "n_params_total": int, "tokens": int, "flops": float, "loss": float, "loss_std_err": float,
    "loss_train": float, "bits_per_byte": float, "precision": str, "exemptions": str,
    **{f"{role}_{name}": kind for role in _ROLES for name, kind in _ROLE_COLUMNS.items()},
    "quantized_fraction": float, "dot_precision": str, "execution": str, "layout": str, "lr_rule": str, "lr": float,
    "batch_tokens": int, "steps": int, "schedule": str, "diverged_step": int, "wall_s": float, "tokens_per_s": float, "mfu": float,
    "edq": float, "lost_updates": float, "updates_per_ulp": float, "gradient_cosine": float, "gradient_magnitude": float,
    **{f"{role}_{what}": float for role in _ROLES[:6] for what in ("underflow", "overflow")},
    "weights_bytes_per_param": float, "moments_bytes_per_param": float, "peak_bytes_per_param": float,
    "device": str, "n_devices": int, "jax_version": str, "code_version": str, "data": str, "data_sha256": str, "record_version": int,
}  # fmt: skip

# Raise when a reader that knows only the versions before would misread a run folder; a new column is no reason.
RECORD_VERSION = 1

METRICS, TELEMETRY = "metrics.jsonl", "telemetry.jsonl"
STATUSES = ("done", "diverged", "failed")
_PTQ = "ptq_"  # columns ptq_<format>: loss after post-training quantization, float
_NONFINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_TAIL = 4096  # bytes; a metrics row has some 200


class NewerVersionError(ValueError):
    """A file of a run folder is in a version that this bitlaw does not read."""


def complete(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with every column in the table's order, absent ones None, values as plain Python.

    Raises:
      ValueError: one line, for a missing run_id or status, an unknown column or status, or a value of the wrong type.
    """
    unknown = [name for name in record if name not in RECORD_COLUMNS and not name.startswith(_PTQ)]
    if unknown:
        raise ValueError(f"record column {unknown[0]!r} is not in the run table; known are RECORD_COLUMNS and {_PTQ}<format>")
    kinds = RECORD_COLUMNS | {name: float for name in record if name not in RECORD_COLUMNS}
    filled = {name: _typed(name, record.get(name), kind) for name, kind in kinds.items()} | {"record_version": RECORD_VERSION}
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
        """Writes `config.json`, with its version, atomically."""
        _write_atomically(self.path / "config.json", json.dumps({"record_version": RECORD_VERSION} | dict(config), indent=1, allow_nan=False))

    @property
    def lease(self) -> pathlib.Path:
        """The file that says which process trains the run (`trainer.lease`)."""
        return self.path / "alive.json"

    def write_note(self, name: str, content: Mapping[str, Any]) -> None:
        """Writes a JSON file of that name beside the run's own, atomically: what others keep of the run."""
        _write_atomically(self.path / name, json.dumps(content, indent=1, allow_nan=False))

    def append_metrics(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Appends rows (each with a `step`) in one write. A torn line that a kill left is cut off first."""
        self._append(METRICS, rows)

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
        """The config, None before it is written. ValueError as for the record."""
        return _read_versioned(self.path / "config.json")

    def record(self) -> dict[str, Any] | None:
        """The record, None while the run is not over. ValueError, one line, when the file is no JSON object; NewerVersionError, which
        is one, when its version is newer than RECORD_VERSION."""
        return _read_versioned(self.path / "record.json")

    def metrics(self) -> list[dict[str, Any]]:
        """The rows in order, without a torn last line; non-finite values as they were. ValueError for another broken line."""
        return self._rows(METRICS)

    def last_row(self) -> dict[str, Any] | None:
        """The last whole row of the metrics, read from the file's tail however long it is; None where there is none. ValueError for a
        broken one."""
        line = _last_line(self.path / METRICS)
        return None if line is None else _parsed(line, f"{self.path / METRICS}, the last line,")

    def telemetry(self) -> list[dict[str, Any]]:
        """The rows of telemetry.jsonl, read as `metrics` are; none where there is no file."""
        return self._rows(TELEMETRY)

    def _rows(self, name: str) -> list[dict[str, Any]]:
        path = self.path / name
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        return [_parsed(line, f"{path} line {number}") for number, line in enumerate(lines, start=1)]

    def holder(self) -> lease.Holder | None:
        """The living process that trains the run, else None."""
        return lease.holder(self.lease)


def find(root: str | os.PathLike[str]) -> tuple[list[RunFolder], list[pathlib.Path]]:
    """The run folders at or below `root` (those with a `config.json` or `record.json`; nothing inside one is looked at) and the
    sweep plans (`plan.json`), in the order of their paths."""
    runs, plans = [], []
    for path, subfolders, files in os.walk(root):
        subfolders.sort()
        if "record.json" in files or "config.json" in files:
            subfolders.clear()
            runs.append(RunFolder(path))
        elif "plan.json" in files:
            plans.append(pathlib.Path(path) / "plan.json")
    return runs, plans


def _parsed(line: bytes, where: str) -> dict[str, Any]:
    """A row of metrics or telemetry, non-finite values as they were."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON ({error})") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where} is not a JSON object")
    return row | {key: _NONFINITE[what] for key, what in row.pop("nonfinite", {}).items()}


def _last_line(path: pathlib.Path) -> bytes | None:
    """What stands between the last two newlines of a file, or before the only one; None without a newline or a file."""
    try:
        with path.open("rb") as file:
            size, span = file.seek(0, os.SEEK_END), _TAIL
            while True:
                file.seek(max(0, size - span))
                lines = file.read(min(size, span)).split(b"\n")
                if len(lines) > 2 or span >= size:
                    return lines[-2] if len(lines) > 1 else None
                span *= 4
    except FileNotFoundError:
        return None


class Onlooker(RunFolder):
    """The folder as the processes of a distributed run have it that do not lead: they read it and leave writing to the first."""

    def write_config(self, config: Mapping[str, Any]) -> None:
        pass

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


def _read_versioned(path: pathlib.Path) -> dict[str, Any] | None:
    content = _read_object(path)
    version = 1 if content is None else content.get("record_version", 1)
    if type(version) is not int:
        raise ValueError(f"{path} has record_version {version!r}, which is no version; remove the run's folder to train it again")
    if version > RECORD_VERSION:
        raise NewerVersionError(f"{path} has record_version {version}; this bitlaw reads up to {RECORD_VERSION}: use the bitlaw that wrote it, or a newer one")
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
