"""Files that are written whole or not at all."""
from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


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
