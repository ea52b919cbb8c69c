"""`data=file`: the user's own files, as bytes or as token ids of a given `tokenizer.json`.

`paths` are files, folders (every regular file below, hidden ones left out) or globs (`**` too); the order is that of the
entries, sorted by path inside each. Exact duplicates are dropped (the first stays). Nothing is put between files.

The split: with 20 files or more, whole files are taken into validation in the order of their content's hash for as long as
they fit into `validation_fraction` of the bytes (so the split does not depend on where the files lie); with fewer, the
last fraction of the bytes is validation, cut at a character's boundary.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from trainer.data import registry, store
from trainer.data.dataset import Dataset

_RULE = 1  # raise when the rule above, or how text is cut for the tokenizer, changes
_FILES_FOR_SPLIT_BY_FILE = 20
_CHUNK = 1 << 22  # bytes copied at a time
_TEXT_CHUNK = 1 << 20  # bytes of text per tokenizer call: long strings make pre-tokenizers slow and hungry


@dataclasses.dataclass(frozen=True)
class Span:
    """Bytes `begin` to `end` of a file."""

    path: pathlib.Path
    begin: int
    end: int


@registry.register("file")
def load(data: Any) -> Dataset:
    """The files in `data.paths`; reads `data.tokenizer` and `data.validation_fraction` too.

    uint8 and a vocabulary of 256 for bytes; with a tokenizer uint16 where its vocabulary fits, else uint32, and no special
    tokens added. Raises ValueError in one line: no paths, a path that matches nothing, a file that cannot be read, text
    that is not UTF-8 (with a tokenizer), a tokenizer that cannot be read or whose package is missing.
    """
    registry.check_fraction(data.validation_fraction)
    paths = expand(data.paths)
    tokenizer = pathlib.Path(data.tokenizer) if data.tokenizer else None
    if tokenizer is not None and not tokenizer.is_file():
        raise ValueError(f"data.tokenizer={data.tokenizer!r} is no file; give the path of a tokenizer.json, or nothing for bytes")
    identity = [_RULE, [_fingerprint(path) for path in paths], tokenizer and _fingerprint(tokenizer), data.validation_fraction]
    try:
        return store.open_or_prepare("file", identity, lambda: _prepare(paths, tokenizer, data.validation_fraction))
    except (FileNotFoundError, PermissionError) as error:
        raise ValueError(f"data.paths: cannot read {error.filename} ({error.strerror})") from error


def expand(entries: tuple[str, ...]) -> list[pathlib.Path]:
    """The regular files that the entries name, each once, in the order of the entries and sorted inside each."""
    if not entries:
        raise ValueError("data.paths is empty; data=file needs files, folders or globs, such as 'data.paths=[notes/*.txt]'")
    found: dict[pathlib.Path, None] = {}
    for entry in entries:
        expanded = os.path.expanduser(entry)
        if os.path.isdir(expanded):
            names = _walk(expanded)
        elif os.path.exists(expanded):
            names = [expanded]
        else:
            names = sorted(name for name in glob.glob(expanded, recursive=True) if os.path.isfile(name))
        if not names:
            raise ValueError(f"data.paths={entry!r} matches no file; give existing files, folders or globs")
        found |= {pathlib.Path(os.path.realpath(name)): None for name in names}
    return list(found)


def _walk(root: str) -> list[str]:
    names = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        names += [os.path.join(folder, name) for name in files if not name.startswith(".")]
    return sorted(name for name in names if os.path.isfile(name))


def _fingerprint(path: pathlib.Path) -> list[str | int]:
    stat = path.stat()
    return [str(path.resolve()), stat.st_size, stat.st_mtime_ns]


def _prepare(paths: list[pathlib.Path], tokenizer: pathlib.Path | None, fraction: float) -> store.Tokens:
    digests: dict[str, pathlib.Path] = {}
    for path in paths:
        with path.open("rb") as file:
            digests.setdefault(hashlib.file_digest(file, "sha256").hexdigest(), path)
    if len(digests) >= _FILES_FOR_SPLIT_BY_FILE:
        train, validation = _split_by_file(digests, fraction)
    else:
        train, validation = _split_by_position(list(digests.values()), fraction)
    if tokenizer is None:
        return store.Tokens(_bytes_of(train), _bytes_of(validation), np.dtype(np.uint8), vocab_size=256)
    encoder, vocab_size = _open_tokenizer(tokenizer)
    dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
    return store.Tokens(
        train=_ids_of(train, encoder, dtype),
        validation=_ids_of(validation, encoder, dtype),
        dtype=dtype,
        vocab_size=vocab_size,
        validation_bytes=sum(span.end - span.begin for span in validation),
    )


def _split_by_file(digests: dict[str, pathlib.Path], fraction: float) -> tuple[list[Span], list[Span]]:
    """Whole files for validation, in the order of their hashes, as long as they fit; the smallest one if none does."""
    sizes = {digest: path.stat().st_size for digest, path in digests.items()}
    room = fraction * sum(sizes.values())
    chosen: set[str] = set()
    for digest in sorted(digests):
        if 0 < sizes[digest] <= room:
            chosen.add(digest)
            room -= sizes[digest]
    if not chosen:
        chosen = {min((digest for digest in digests if sizes[digest]), key=lambda digest: (sizes[digest], digest))}
    spans = {digest: Span(path, 0, sizes[digest]) for digest, path in digests.items()}
    train = [span for digest, span in spans.items() if digest not in chosen]
    return train, [span for digest, span in spans.items() if digest in chosen]


def _split_by_position(paths: list[pathlib.Path], fraction: float) -> tuple[list[Span], list[Span]]:
    """All bytes before the cut train, all after validate; the cut never falls inside a UTF-8 character."""
    sizes = [path.stat().st_size for path in paths]
    cut = round((1.0 - fraction) * sum(sizes))
    train, validation, before = [], [], 0
    for path, size in zip(paths, sizes):
        inside = _character_boundary(path, min(max(cut - before, 0), size))
        train += [Span(path, 0, inside)] if inside else []
        validation += [Span(path, inside, size)] if inside < size else []
        before += size
    return train, validation


def _character_boundary(path: pathlib.Path, position: int) -> int:
    """`position`, or where the UTF-8 character that it cuts begins (bytes 10xxxxxx continue a character, at most three)."""
    with path.open("rb") as file:
        file.seek(max(position - 3, 0))
        before = file.read(min(position, 3))
        following = file.read(1)
    back = 0
    while following and following[0] & 0xC0 == 0x80 and back < len(before):
        back += 1
        following = before[-back:]
    return position - back


def _bytes_of(spans: list[Span]) -> Iterator[np.ndarray]:
    for span in spans:
        with span.path.open("rb") as file:
            file.seek(span.begin)
            left = span.end - span.begin
            while left and (chunk := file.read(min(left, _CHUNK))):
                left -= len(chunk)
                yield np.frombuffer(chunk, np.uint8)


def _open_tokenizer(path: pathlib.Path) -> tuple[Any, int]:
    """The tokenizer and the number of ids that it may give (one more than the largest: vocabularies have holes)."""
    try:
        import tokenizers
    except ModuleNotFoundError as error:
        raise ValueError("data.tokenizer needs the package 'tokenizers': pip install 'bitlaw[tokenizers]'") from error
    try:
        encoder = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:
        if type(error) is not Exception:  # the Rust side raises exactly Exception, whatever is wrong with the file
            raise
        raise ValueError(f"data.tokenizer={str(path)!r} is not a tokenizer.json that 'tokenizers' reads ({error})") from error
    encoder.no_truncation()
    encoder.no_padding()
    return encoder, max(encoder.get_vocab(with_added_tokens=True).values()) + 1


def _ids_of(spans: list[Span], encoder: Any, dtype: np.dtype) -> Iterator[np.ndarray]:
    """Ids of the spans' text, each span tokenized in pieces that end at a line's end."""
    for span in spans:
        for texts in _batched_texts(span):
            for encoding in encoder.encode_batch_fast(texts, add_special_tokens=False):
                yield np.asarray(encoding.ids, dtype)


def _batched_texts(span: Span, per_batch: int = 16) -> Iterator[list[str]]:
    """Lists of decoded pieces of about a megabyte; a piece ends after a newline where the text has one."""
    with span.path.open("rb") as file:
        file.seek(span.begin)
        left, batch = span.end - span.begin, []
        while left and (piece := file.read(min(left, _TEXT_CHUNK))):
            piece += file.readline(left - len(piece))
            left -= len(piece)
            batch.append(_decode(span.path, piece))
            if len(batch) == per_batch:
                yield batch
                batch = []
        if batch:
            yield batch


def _decode(path: pathlib.Path, piece: bytes) -> str:
    try:
        return piece.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"data.paths: {path} is not UTF-8 text ({error.reason}), which a tokenizer needs; leave data.tokenizer empty for bytes") from error
