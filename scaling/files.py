"""Files that are written whole or not at all, and one process at a time where that matters."""
from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PATIENCE_S = 30.0  # for a file that another process has locked


def check_target(path: str | os.PathLike, suffixes: tuple[str, ...] = (), source: object = None) -> Path:
    """`path` when a file can be put there; ValueError, one line, when its folder is missing, it is a folder, its suffix is not in
    `suffixes`, or it is the file `source` that the work reads. To be called before the work whose result goes there."""
    path = Path(path)
    if suffixes and path.suffix not in suffixes:
        raise ValueError(f"out={path}: cannot write {path.suffix or 'a file without suffix'}; use {' or '.join(suffixes)}")
    if not path.parent.is_dir():
        raise ValueError(f"out={path}: the folder {path.parent} does not exist")
    if path.is_dir():
        raise ValueError(f"out={path}: is a folder; name a file in it")
    if isinstance(source, (str, os.PathLike)) and path.exists() and os.path.exists(source) and path.samefile(source):
        raise ValueError(f"out={path}: is the table that is read; name another file")
    return path


def write_whole(path: str | os.PathLike, write: Callable[[Path], object], suffixes: tuple[str, ...] = ()) -> Path:
    """Lets `write` fill a hidden file beside `path`, then renames it, so that no half-written file is ever seen. Returns the path."""
    path = check_target(path, suffixes)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


@contextmanager
def locked(path: str | os.PathLike, patience: float = PATIENCE_S) -> Iterator[None]:
    """Nobody else is inside `locked(path)` meanwhile, in this process or another. ValueError when it stays taken for `patience` seconds.

    The lock is the system's, on a hidden file beside `path`: it ends with the process that holds it, however that ends, so none is ever
    stale. Who holds it removes the file, so who gets a lock looks whether its file is still the one there.
    """
    path = Path(path)
    beside, since = path.with_name(f".{path.name}.lock"), time.monotonic()
    while True:
        handle = os.open(beside, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_there(handle, beside):
                break
        except BlockingIOError:
            if time.monotonic() - since > patience:
                os.close(handle)
                raise ValueError(f"{path}: another process has it locked since {patience:g} seconds; wait for it to end") from None
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
        time.sleep(0.01)
    try:
        yield
    finally:
        beside.unlink(missing_ok=True)
        os.close(handle)


def _is_there(handle: int, path: Path) -> bool:
    """Whether the open file is the one called `path`."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False
