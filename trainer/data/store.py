"""Prepared tokens on disk: written once, atomically, checked at each opening, then mapped into memory.

An entry is a folder `<cache>/<name>-<key>` with `train.bin`, `validation.bin` and `meta.json`. It appears by one rename,
so that a killed process leaves no half entry and two processes that prepare the same data do not meet. `meta.json` holds
each file's size, modification time and sha256. Where size and time are as recorded the entry is trusted as it is
(microseconds); where they differ the content is hashed again: the same content is stamped anew (a copied cache), another
content is dropped and prepared again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from trainer.data.dataset import Dataset

_META = "meta.json"
_PARTS = ("train", "validation")
_VERSION = 1  # raise when the layout of an entry changes: older entries are then simply not found


@dataclasses.dataclass(frozen=True)
class Tokens:
    """What a preparer hands over: chunks of ids for each part, and what the memmaps alone do not tell."""

    train: Iterable[np.ndarray]
    validation: Iterable[np.ndarray]
    dtype: np.dtype
    vocab_size: int
    # Bytes of text behind the validation part; None where a token is a byte or stands for no text.
    validation_bytes: int | None = None
    context_entropies: tuple[float, ...] = ()


def cache_folder() -> pathlib.Path:
    """`$BITLAW_CACHE`, by default `~/.cache/bitlaw`; prepared data lies in `data/` under it."""
    root = os.environ.get("BITLAW_CACHE")
    return (pathlib.Path(root).expanduser() if root else pathlib.Path.home() / ".cache" / "bitlaw") / "data"


def open_or_prepare(name: str, identity: Any, prepare: Callable[[], Tokens]) -> Dataset:
    """Opens the entry of (`name`, `identity`), preparing it where it is absent or damaged.

    Args:
      name: the data set's name, also the beginning of the folder's name.
      identity: anything that JSON can hold, from which the same content always follows.
      prepare: produces the tokens; called only when needed. A ValueError from it passes through, nothing is left.
    """
    key = hashlib.sha256(json.dumps([_VERSION, name, identity], sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_folder() / f"{name}-{key}"
    meta = _verified_meta(folder)
    if meta is None:
        _write_entry(folder, prepare())
        meta = _verified_meta(folder)
        if meta is None:
            raise OSError(f"{folder} is damaged just after it was written: check the disk, or set BITLAW_CACHE elsewhere")
    dtype = np.dtype(meta["dtype"])
    train, validation = (np.memmap(folder / f"{part}.bin", dtype=dtype, mode="r") for part in _PARTS)
    return Dataset(
        name=name,
        train=train,
        validation=validation,
        vocab_size=meta["vocab_size"],
        sha256=meta["sha256"],
        bytes_per_token=meta["bytes_per_token"],
        folder=folder,
        context_entropies=tuple(meta["context_entropies"]),
    )


def _verified_meta(folder: pathlib.Path) -> dict[str, Any] | None:
    """The entry's metadata when its files are those that were written, else None; a damaged entry is said so."""
    try:
        text = (folder / _META).read_text()
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        meta = json.loads(text)
        recorded = {part: meta["files"][part] for part in _PARTS}
        if meta["self_sha256"] != _self_sha256(meta):
            raise ValueError("its metadata were altered")
        changed = [part for part in _PARTS if _stamp(folder / f"{part}.bin") != recorded[part]["stamp"]]
        for part in changed:
            if _sha256_of(folder / f"{part}.bin") != recorded[part]["sha256"]:
                raise ValueError(f"{part}.bin is not what was written")
    except (ValueError, KeyError, TypeError, OSError) as error:
        print(f"bitlaw: cached data in {folder} is damaged ({error}); preparing it again", file=sys.stderr)
        return None
    if changed and os.access(folder, os.W_OK):  # a shared cache may be read-only; it is then hashed at each opening
        _write_meta(folder, meta)
    return meta


def _write_entry(folder: pathlib.Path, tokens: Tokens) -> None:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise ValueError(f"BITLAW_CACHE={folder.parent.parent} cannot be written ({error.strerror}); set it to a folder that can") from error
    try:
        counts, digests = {}, {}
        for part in _PARTS:
            counts[part], digests[part] = _write_part(work / f"{part}.bin", getattr(tokens, part), tokens.dtype)
        bytes_per_token = 1.0 if tokens.validation_bytes is None else tokens.validation_bytes / counts["validation"]
        content = [tokens.dtype.name, tokens.vocab_size, [[counts[part], digests[part]] for part in _PARTS]]
        meta = {
            "dtype": tokens.dtype.name,
            "vocab_size": tokens.vocab_size,
            "sha256": hashlib.sha256(json.dumps(content).encode()).hexdigest(),
            "bytes_per_token": bytes_per_token,
            "context_entropies": list(tokens.context_entropies),
            "files": {part: {"tokens": counts[part], "sha256": digests[part]} for part in _PARTS},
        }
        _write_meta(work, meta)
        _publish(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _publish(work: pathlib.Path, folder: pathlib.Path) -> None:
    """Renames `work` to `folder`. Where another process was faster its entry stays; a damaged one makes room."""
    if folder.exists():
        if _verified_meta(folder) is not None:
            return
        # Moved aside before it is removed, so that nobody opens a half-removed entry.
        aside = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        os.rename(folder, aside / "damaged")
        shutil.rmtree(aside, ignore_errors=True)
    try:
        os.rename(work, folder)
    except OSError:
        if not (folder / _META).exists():  # not the race that was lost: a full or read-only disk
            raise


def _write_part(path: pathlib.Path, chunks: Iterable[np.ndarray], dtype: np.dtype) -> tuple[int, str]:
    """Writes the chunks one after another; returns the number of tokens and the sha256 of their bytes."""
    digest, count = hashlib.sha256(), 0
    little_endian = dtype.newbyteorder("<")
    with path.open("wb") as file:
        for chunk in chunks:
            data = chunk.astype(little_endian, copy=False).tobytes()
            digest.update(data)
            file.write(data)
            count += chunk.size
        file.flush()
        os.fsync(file.fileno())
    if count == 0:
        raise ValueError(f"the {path.stem} part is empty: give more data or another data.validation_fraction")
    return count, digest.hexdigest()


def _write_meta(folder: pathlib.Path, meta: dict[str, Any]) -> None:
    """Stamps the files as they are now and writes the metadata atomically."""
    files = {part: meta["files"][part] | {"stamp": _stamp(folder / f"{part}.bin")} for part in _PARTS}
    stamped = meta | {"files": files}
    stamped["self_sha256"] = _self_sha256(stamped)
    work = folder / f".{_META}-{os.getpid()}"
    work.write_text(json.dumps(stamped, indent=1))
    os.replace(work, folder / _META)


def _self_sha256(meta: dict[str, Any]) -> str:
    rest = {key: value for key, value in meta.items() if key != "self_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _stamp(path: pathlib.Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _sha256_of(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
