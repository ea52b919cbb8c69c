"""`data=stdlib`: the Python source of the running interpreter's own standard library, as bytes.

It lies on every machine that can run this program. The rule: every `.py` file under the standard library's folder, except
under `site-packages`, `dist-packages` and `__pycache__`, and except the build's own records (`_sysconfigdata*`, `config-*`),
which hold paths and flags of the machine that built the interpreter. Sorted by relative POSIX path, exact duplicates
dropped (the first stays), concatenated with nothing between. A file is validation when the hash of its relative path says
so: a file keeps its side from one Python version to the next, and adding files moves none. Content, and with it the sha256,
changes with the Python patch version and with how a distributor packages it.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import sys
import sysconfig
from typing import Any

import numpy as np

from trainer.data import registry, store
from trainer.data.dataset import Dataset

_RULE = 1  # raise when the rule above changes
_SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__"})


@registry.register("stdlib")
def load(data: Any) -> Dataset:
    """Bytes (vocabulary 256) of the standard library; reads `data.validation_fraction` only."""
    registry.check_fraction(data.validation_fraction)
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    # sys.version tells patch version and build: a distributor's security update changes it too.
    identity = [_RULE, str(root), sys.version, data.validation_fraction]
    return store.open_or_prepare("stdlib", identity, lambda: _prepare(root, data.validation_fraction))


def _prepare(root: pathlib.Path, validation_fraction: float) -> store.Tokens:
    seen: set[bytes] = set()
    train: list[np.ndarray] = []
    validation: list[np.ndarray] = []
    for relative in source_files(root):
        content = (root / relative).read_bytes()
        digest = hashlib.sha256(content).digest()
        if digest not in seen:
            seen.add(digest)
            side = validation if in_validation(relative, validation_fraction) else train
            side.append(np.frombuffer(content, np.uint8))
    if not seen:
        raise ValueError(f"data=stdlib finds no .py files in {root} (a zipped standard library?); use data=file")
    return store.Tokens(train, validation, np.dtype(np.uint8), vocab_size=256)


def source_files(root: pathlib.Path) -> list[str]:
    """Relative POSIX paths of the files that count, sorted as strings (code points, not the locale)."""
    found: list[str] = []
    for folder, subfolders, files in os.walk(root):
        at_root = pathlib.Path(folder) == root
        subfolders[:] = [
            name for name in subfolders if name not in _SKIPPED_FOLDERS and not (at_root and name.startswith("config-"))
        ]
        found += [
            (pathlib.Path(folder) / name).relative_to(root).as_posix()
            for name in files
            if name.endswith(".py") and not name.startswith("_sysconfigdata")
        ]
    return sorted(found)


def in_validation(relative_path: str, fraction: float) -> bool:
    """Whether a file is validation: its path's sha256, read as a number in [0, 1), lies below the fraction."""
    word = int.from_bytes(hashlib.sha256(relative_path.encode()).digest()[:8], "big")
    return word < fraction * 2.0**64
