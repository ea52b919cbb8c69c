"""Checkpoints: a small face over Orbax v1 that is atomic, verified, and cheap for the small states of a sweep.

`folder/<step>/` holds `state/` (Orbax) and `manifest.json` (ours: what each leaf is, and size and sha256 of every file). A
step appears by one rename, so a process killed at any moment leaves the step before usable; what it leaves half-written
begins with a dot and goes at the next save. A restore verifies every byte against the manifest before Orbax opens a file:
a damaged step is passed over with a line on stderr, and what Orbax then raises is a bug, not damage.

Orbax takes a millisecond or two for each array. Leaves below 4 MiB therefore travel together as the bytes of one array;
larger ones are arrays of their own, sharded as they are. Nothing is flushed to the disk itself: after a power failure
the manifest tells which steps survived.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import logging
import math
import os
import pathlib
import re
import shutil
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1

from trainer import distributed

Tree = Any
_MANIFEST = "manifest.json"
_STATE = "state"
_PACKED = "packed"
_PACK_BELOW = 4 << 20  # bytes
# What Orbax's storage (tensorstore 0.1.86) can hold as an array of its own; of other dtypes leaves travel packed at any size.
_STORABLE = frozenset(
    "bool int2 int4 int8 int16 int32 int64 uint8 uint16 uint32 uint64 bfloat16 float16 float32 float64 complex64 complex128 "
    "float4_e2m1fn float8_e3m4 float8_e4m3fn float8_e4m3fnuz float8_e4m3b11fnuz float8_e5m2 float8_e5m2fnuz "
    "float8_e8m0fnu".split()
)
_VERSION = 1  # raise when what a step holds changes


@dataclasses.dataclass(frozen=True)
class LeafSpec:
    """What the manifest says of a leaf: its path in the tree, shape, dtype (a key's: `key<...>`) and how it is stored."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    key_impl: str | None
    packed: bool

    def __str__(self) -> str:
        return f"{self.path} {self.dtype}[{','.join(map(str, self.shape))}]"


class _Damaged(Exception):
    """A step's files are not what was written."""


def save(folder: str | os.PathLike[str], step: int, state: Tree, keep: int = 2) -> None:
    """Writes `state` as the checkpoint of `step`, then removes all but the newest `keep`.

    Checkpoints of later steps are removed too: they can only be damaged ones that a restore passed over.

    Args:
      folder: of this run's checkpoints; made when absent. One process writes to it; those of a distributed run call together, with
        the same arrays, and the first one writes.
      step: 0 or more.
      state: pytree of NumPy and JAX arrays of any dtype, typed PRNG keys among them.
      keep: how many steps stay, 1 or more.
    """
    if keep < 1:
        raise ValueError(f"keep={keep} must be 1 or more")
    root, leads = pathlib.Path(folder), distributed.leads()
    if leads:
        root.mkdir(parents=True, exist_ok=True)
        _sweep(root)
    work = root / f".{step}-{distributed.agreed(os.getpid())}"
    specs, leaves = _described(state)
    raw = [jax.random.key_data(leaf) if spec.key_impl else leaf for spec, leaf in zip(specs, leaves)]
    tree = {_name(index): raw[index] for index, spec in enumerate(specs) if not spec.packed}
    tree[_PACKED] = _pack([leaf for spec, leaf in zip(specs, raw) if spec.packed])
    with _context(), _unlogged():
        v1.save(work.resolve() / _STATE, tree)
    if leads:
        _write_manifest(work, step, specs)
        _publish(root, work, step, keep)
    distributed.wait(f"checkpoint {step}")


def restore(folder: str | os.PathLike[str], abstract_state: Tree) -> tuple[int, Tree] | None:
    """The newest checkpoint that is whole, as (step, state), or None where there is none.

    Args:
      folder: what was given to `save`.
      abstract_state: pytree of the state's structure, of arrays or `jax.ShapeDtypeStruct`. NumPy leaves come back as
        NumPy, others as JAX arrays with the leaf's sharding (uncommitted, on the default device, where it has none).

    Raises:
      ValueError: one line, when the newest whole checkpoint is of another structure, shape or dtype.
    """
    root = pathlib.Path(folder)
    for step in reversed(steps(root)):
        try:
            specs = _verified_specs(root / str(step), step)
        except _Damaged as damage:
            print(f"bitlaw: checkpoint {root / str(step)} is damaged ({damage}); trying the one before", file=sys.stderr)
            continue
        return step, _load(root / str(step), specs, abstract_state)
    return None


def check(folder: str | os.PathLike[str], abstract_state: Tree) -> None:
    """ValueError, one line, when the newest step is of another structure, shape or dtype; reads its manifest only. A damaged one is
    passed over: `restore` deals with it."""
    root = pathlib.Path(folder)
    for step in reversed(steps(root)):
        try:
            specs = _manifest_specs(root / str(step), step)[0]
        except _Damaged:
            continue
        _check_same(root / str(step), specs, _described(abstract_state)[0])
        return


def leaves(folder: str | os.PathLike[str], prefix: str) -> dict[str, np.ndarray]:
    """The leaves of the newest whole checkpoint whose path begins with `prefix`, by the rest of their path, as NumPy arrays; empty where
    there is none. For runs that start from another one's parameters."""
    root = pathlib.Path(folder)
    for step in reversed(steps(root)):
        try:
            specs = _verified_specs(root / str(step), step)
        except _Damaged:
            continue
        blank = [np.empty(spec.shape, _dtype(spec)) for spec in specs]
        found = _read(root / str(step), specs, blank, blank)
        return {spec.path.removeprefix(prefix): leaf for spec, leaf in zip(specs, found) if spec.path.startswith(prefix)}
    return {}


def steps(folder: str | os.PathLike[str]) -> list[int]:
    """The steps that have a checkpoint (whole or damaged), ascending; empty where the folder does not exist."""
    root = pathlib.Path(folder)
    names = os.listdir(root) if root.is_dir() else []
    return sorted(int(name) for name in names if name.isascii() and name.isdigit())


# --- leaves -------------------------------------------------------------------------------------------------------


def _described(tree: Tree) -> tuple[list[LeafSpec], list[Any]]:
    """The leaves and what each is, in flattening order."""
    specs, leaves = [], []
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not hasattr(leaf, "dtype"):
            raise ValueError(f"state leaf {name} is a {type(leaf).__name__}; a checkpoint takes NumPy and JAX arrays")
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        key_impl = str(jax.random.key_impl(leaf)) if is_key and isinstance(leaf, jax.Array) else None
        small = leaf.ndim == 0 or math.prod(leaf.shape) * leaf.dtype.itemsize < _PACK_BELOW
        packed = small or str(leaf.dtype) not in _STORABLE
        specs.append(LeafSpec(name, tuple(leaf.shape), str(leaf.dtype), key_impl, packed))
        leaves.append(leaf)
    return specs, leaves


def _name(index: int) -> str:
    return f"leaf{index:05d}"


def _pack(leaves: list[Any]) -> np.ndarray:
    """The leaves' bytes in order, uint8, after one byte of zero: Orbax writes no empty array."""
    return np.frombuffer(b"\0" + b"".join(np.asarray(leaf).tobytes() for leaf in leaves), np.uint8)


def _load(folder: pathlib.Path, specs: list[LeafSpec], abstract_state: Tree) -> Tree:
    wanted, targets = _described(abstract_state)
    _check_same(folder, specs, wanted)
    raw = [jax.eval_shape(jax.random.key_data, leaf) if spec.key_impl else leaf for spec, leaf in zip(specs, targets)]
    return jax.tree.unflatten(jax.tree.structure(abstract_state), _read(folder, specs, targets, raw))


def _read(folder: pathlib.Path, specs: list[LeafSpec], targets: list[Any], raw: list[Any]) -> list[Any]:
    """The leaves as their targets are. raw: the targets with keys as their data."""
    sizes = [math.prod(leaf.shape) * leaf.dtype.itemsize if spec.packed else 0 for spec, leaf in zip(specs, raw)]
    abstract = {_name(index): _abstract(targets[index]) for index, spec in enumerate(specs) if not spec.packed}
    abstract[_PACKED] = np.empty(1 + sum(sizes), np.uint8)
    with _context():
        loaded = v1.load(folder.resolve() / _STATE, abstract)
    begins = itertools.accumulate(sizes, initial=1)
    found = []
    for index, (spec, size, begin) in enumerate(zip(specs, sizes, begins)):
        if spec.packed:
            values = loaded[_PACKED][begin : begin + size].tobytes()
            array = np.frombuffer(values, raw[index].dtype).reshape(raw[index].shape)
            found.append(_placed(array, spec.key_impl, targets[index]))
        else:
            found.append(loaded[_name(index)])
    return found


def _dtype(spec: LeafSpec) -> np.dtype:
    """The dtype of a leaf that is no key."""
    return jnp.dtype(spec.dtype)


def _check_same(folder: pathlib.Path, stored: list[LeafSpec], wanted: list[LeafSpec]) -> None:
    """Refuses a checkpoint of another state, naming the first leaf that differs."""
    for there, here in itertools.zip_longest(stored, wanted):
        if there is None or here is None or (there.path, there.shape, there.dtype) != (here.path, here.shape, here.dtype):
            raise ValueError(
                f"checkpoint {folder} is of another state: it has {there or 'no more leaves'} where this run has "
                f"{here or 'no more leaves'}; use another run folder, or remove these checkpoints"
            )


def _sharding(target: Any) -> jax.sharding.Sharding | None:
    """The sharding that a leaf is committed to, None for the default device."""
    if isinstance(target, jax.Array) and not target.committed:
        return None
    return target.sharding


def _abstract(target: Any) -> Any:
    """What Orbax is asked for in place of a leaf that is stored alone."""
    if isinstance(target, (np.ndarray, np.generic)):
        return np.empty(target.shape, target.dtype)
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(target.shape, target.dtype, sharding=_sharding(target) or default)


def _placed(array: np.ndarray, key_impl: str | None, target: Any) -> Any:
    """A packed leaf as the kind of array that its target is."""
    if isinstance(target, np.generic):
        return array[()]
    if isinstance(target, np.ndarray):
        return array.copy()  # writeable, as what was saved
    # A copy too: the buffer may be donated, and must not be this array's.
    leaf = jnp.array(array)
    leaf = jax.random.wrap_key_data(leaf, impl=key_impl) if key_impl else leaf
    return leaf if _sharding(target) is None else jax.device_put(leaf, _sharding(target))


# --- files --------------------------------------------------------------------------------------------------------


def _context() -> v1.Context:
    """Orbax without what the manifest already tells (validation, shardings, array metadata), and without compression,
    which gains 7 % on float32 weights."""
    context = v1.Context()
    saving = context.array.saving
    saving.use_compression = False
    saving.enable_post_merge_validation = False
    saving.enable_write_sharding_file = False
    saving.array_metadata_store = None
    return context


@contextlib.contextmanager
def _unlogged() -> Iterator[None]:
    """Without Orbax's tracebacks of what it raises as well (a full disk)."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _publish(root: pathlib.Path, work: pathlib.Path, step: int, keep: int) -> None:
    """Makes `work` the checkpoint of `step`, and removes what no longer counts. Each change is one rename."""
    final = root / str(step)
    if final.exists():  # a damaged one, or the same step of a run that was resumed
        os.rename(final, root / f".{step}-replaced")
    os.rename(work, final)
    found = steps(root)
    kept = [other for other in found if other <= step][-keep:]
    for other in set(found) - set(kept):
        os.rename(root / str(other), root / f".{other}-removed")
    _sweep(root)


def _sweep(root: pathlib.Path) -> None:
    """Removes the folders that a save made and did not bring to an end, or put out of the way."""
    for name in os.listdir(root):
        if re.fullmatch(r"\.\d+-(\d+|replaced|removed)", name):
            shutil.rmtree(root / name)


def _files(folder: pathlib.Path) -> list[str]:
    """Relative POSIX paths of the files under a folder, sorted, the manifest left out."""
    paths = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in paths if path != _MANIFEST)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _write_manifest(folder: pathlib.Path, step: int, specs: list[LeafSpec]) -> None:
    """The manifest is one line of JSON after a line with that line's own sha256."""
    files = {}
    for name in _files(folder):
        with (folder / name).open("rb") as file:
            files[name] = hashlib.file_digest(file, "sha256").hexdigest()
    content = {"version": _VERSION, "step": step, "leaves": [dataclasses.astuple(spec) for spec in specs], "files": files}
    line = json.dumps(content)
    (folder / _MANIFEST).write_text(f"{_sha256(line.encode())}\n{line}")


def _verified_specs(folder: pathlib.Path, step: int) -> list[LeafSpec]:
    """The leaves that a step holds, once every file has been found to be what was written. Raises _Damaged."""
    specs, files = _manifest_specs(folder, step)
    try:
        for name, expected in files.items():
            with (folder / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                    raise _Damaged(f"{name} is not what was written")
    except OSError as error:
        raise _Damaged(f"{error.strerror}: {error.filename}") from error
    return specs


def _manifest_specs(folder: pathlib.Path, step: int) -> tuple[list[LeafSpec], dict[str, str]]:
    """What a step's manifest says: its leaves, and the sha256 of each file. Raises _Damaged."""
    try:
        digest, _, line = (folder / _MANIFEST).read_bytes().partition(b"\n")
    except OSError as error:
        raise _Damaged(f"{error.strerror}: {error.filename}") from error
    if digest != _sha256(line).encode():
        raise _Damaged(f"{_MANIFEST} is not what was written")
    content = json.loads(line)
    if (content["version"], content["step"]) != (_VERSION, step):
        raise _Damaged(f"it holds step {content['step']} in layout {content['version']}, not step {step} in {_VERSION}")
    return [LeafSpec(path, tuple(shape), dtype, impl, packed) for path, shape, dtype, impl, packed in content["leaves"]], content["files"]
