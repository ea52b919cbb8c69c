"""Checkpoints: exact for every kind of leaf, atomic under kill -9, and never a wrong value from a damaged file."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from trainer import checkpoint

DTYPES = [
    "float32", "bfloat16", "float16", "int32", "uint8", "bool", "float8_e4m3fn", "float8_e5m2", "float4_e2m1fn", "int4", "uint2",
]  # fmt: skip


class Moments(NamedTuple):
    mu: object
    nu: object
    nothing: object = None


def _array(dtype: str, shape: tuple[int, ...], seed: int = 0) -> jax.Array:
    values = np.random.default_rng(seed).standard_normal(shape) * 3
    numpy_dtype = getattr(ml_dtypes, dtype, None) or np.dtype(dtype)
    return jnp.asarray((np.abs(values) if dtype.startswith("u") else values).astype(numpy_dtype))


def _state(seed: int = 0):
    return {
        "params": {"w": _array("float32", (3, 5), seed), "scalar": jnp.float32(seed + 0.5)},
        "opt": (Moments(_array("bfloat16", (7,), seed), np.arange(4, dtype=np.int64) + seed), ()),
        "key": jax.random.key(seed),
        "step": np.int32(seed),
    }


def _assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        assert type(one) is type(other) and one.dtype == other.dtype and one.shape == other.shape
        if jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
            assert jax.random.key_impl(one) == jax.random.key_impl(other)
            one, other = jax.random.key_data(one), jax.random.key_data(other)
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


@pytest.fixture(params=["packed", "alone"])
def storage(request, monkeypatch):
    """Both ways in which a leaf may travel, whatever its size."""
    if request.param == "alone":
        monkeypatch.setattr(checkpoint, "_PACK_BELOW", 1)
    return request.param


# --- values -------------------------------------------------------------------------------------------------------


def test_every_dtype_comes_back_bit_for_bit(tmp_path, storage):
    state = {dtype: _array(dtype, (6, 5)) for dtype in DTYPES}
    state["special"] = jnp.array([np.nan, -np.nan, np.inf, -0.0, 1e-45], jnp.float32)
    state["empty"] = jnp.zeros((0, 3))
    checkpoint.save(tmp_path, 0, state)
    step, found = checkpoint.restore(tmp_path, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state))
    assert step == 0
    _assert_same(found, state)


def test_structures_numpy_leaves_and_keys_come_back_as_they_were(tmp_path, storage):
    state = _state(3) | {"keys": jax.random.split(jax.random.key(1, impl="rbg"), 4), "numpy": np.ones((2, 2), np.float64)}
    state["six bits"] = np.arange(8).astype(ml_dtypes.float6_e2m3fn)  # NumPy only: JAX has no such array
    checkpoint.save(tmp_path, 12, state)
    step, found = checkpoint.restore(tmp_path, state)
    assert step == 12
    _assert_same(found, state)
    found["numpy"][0, 0] = 2.0  # writeable, as it was
    abstract = jax.eval_shape(lambda: {"key": jax.random.key(0)})
    checkpoint.save(tmp_path / "k", 1, {"key": jax.random.key(9)})
    _assert_same(checkpoint.restore(tmp_path / "k", abstract)[1], {"key": jax.random.key(9)})


def test_shardings_are_those_of_the_abstract_state(tmp_path, storage):
    mesh = jax.make_mesh((8,), ("member",), axis_types=(jax.sharding.AxisType.Auto,))
    spread, whole = NamedSharding(mesh, PartitionSpec("member")), NamedSharding(mesh, PartitionSpec())
    state = {"x": jax.device_put(_array("float32", (16, 3)), spread), "k": jax.device_put(jax.random.split(jax.random.key(0), 8), spread)}
    checkpoint.save(tmp_path, 5, state)
    _, same = checkpoint.restore(tmp_path, state)
    _assert_same(same, state)
    assert same["x"].sharding == spread and same["k"].sharding == spread
    _, other = checkpoint.restore(tmp_path, {"x": jax.ShapeDtypeStruct((16, 3), np.float32, sharding=whole), "k": state["k"]})
    assert other["x"].sharding == whole
    assert np.asarray(other["x"]).tobytes() == np.asarray(state["x"]).tobytes()


def test_a_large_leaf_is_an_array_of_its_own(tmp_path):
    state = {"big": _array("float32", (1100, 1000)), "big_numpy": np.arange(2**20, dtype=np.float64), "small": jnp.ones(3)}
    checkpoint.save(tmp_path, 0, state)
    _assert_same(checkpoint.restore(tmp_path, state)[1], state)


def test_a_restored_state_may_be_donated(tmp_path):
    state = {"w": _array("float32", (64, 64))}
    checkpoint.save(tmp_path, 0, state)
    _, found = checkpoint.restore(tmp_path, state)
    bump = jax.jit(lambda tree: jax.tree.map(lambda x: x + jnp.float32(1), tree), donate_argnums=0)
    for _ in range(3):
        found = bump(found)
    np.testing.assert_array_equal(found["w"], np.asarray(state["w"]) + 1 + 1 + 1)
    _assert_same(checkpoint.restore(tmp_path, state)[1], state)


# --- which steps --------------------------------------------------------------------------------------------------


def test_the_newest_are_kept(tmp_path):
    for step in (0, 10, 5_000, 20_000):
        checkpoint.save(tmp_path, step, _state(step), keep=2)
    assert checkpoint.steps(tmp_path) == [5_000, 20_000]
    assert sorted(os.listdir(tmp_path)) == ["20000", "5000"]
    step, found = checkpoint.restore(tmp_path, _state())
    assert step == 20_000
    _assert_same(found, _state(20_000))


def test_nothing_saved_is_none(tmp_path):
    assert checkpoint.restore(tmp_path / "absent", _state()) is None and checkpoint.steps(tmp_path / "absent") == []
    assert checkpoint.restore(tmp_path, _state()) is None
    with pytest.raises(ValueError, match="keep=0 must be 1 or more"):
        checkpoint.save(tmp_path, 0, _state(), keep=0)


def test_a_run_that_went_back_overwrites_what_it_left(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, _state(step), keep=3)
    checkpoint.save(tmp_path, 2, _state(22), keep=3)
    assert checkpoint.steps(tmp_path) == [1, 2]
    _assert_same(checkpoint.restore(tmp_path, _state())[1], _state(22))


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda s: s | {"params": {"w": jnp.zeros((3, 6)), "scalar": s["params"]["scalar"]}}, ["params/w float32[3,5]", "params/w float32[3,6]"]),
        (lambda s: s | {"step": np.int64(0)}, ["step int32[]", "step int64[]"]),
        (lambda s: s | {"key": jax.random.key(0, impl="rbg")}, ["key key<fry>[]", "key key<rbg>[]"]),
        (lambda s: s | {"zz": jnp.zeros(2)}, ["no more leaves", "zz float32[2]"]),
        (lambda s: {k: v for k, v in s.items() if k != "step"}, ["step int32[]", "no more leaves"]),
        (lambda s: {"a": s["params"]} | {k: v for k, v in s.items() if k != "params"}, ["key key<fry>[]", "a/scalar float32[]"]),
    ],
)  # fmt: skip
def test_another_state_is_refused_in_one_line(tmp_path, change, words):
    checkpoint.save(tmp_path, 7, _state())
    with pytest.raises(ValueError) as caught:
        checkpoint.restore(tmp_path, change(_state()))
    message = str(caught.value)
    assert "\n" not in message and "another state" in message and all(word in message for word in words)


def test_a_leaf_that_is_no_array_is_refused(tmp_path):
    with pytest.raises(ValueError, match="state leaf lr is a float"):
        checkpoint.save(tmp_path, 0, {"lr": 0.1})


# --- damage -------------------------------------------------------------------------------------------------------


def _all_files(folder: pathlib.Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _damages(folder: pathlib.Path):
    """Every file deleted, cut, extended, and with single bits flipped at places spread over it."""
    for name in _all_files(folder):
        raw = (folder / name).read_bytes()
        yield f"{name} deleted", name, None
        yield f"{name} extended", name, raw + b"x"
        for size in {0, len(raw) // 2, len(raw) - 1}:
            if 0 <= size < len(raw):
                yield f"{name} cut to {size}", name, raw[:size]
        for place in sorted({int(i) for i in np.linspace(0, len(raw) - 1, 9)}) if raw else ():
            yield f"{name} bit flipped at {place}", name, raw[:place] + bytes([raw[place] ^ 16]) + raw[place + 1 :]


def test_any_damage_falls_back_to_the_step_before(tmp_path, storage, capsys):
    checkpoint.save(tmp_path, 1, _state(1))
    checkpoint.save(tmp_path, 2, _state(2))
    count = 0
    for what, name, content in _damages(tmp_path / "2"):
        path = tmp_path / "2" / name
        raw = path.read_bytes()
        path.unlink() if content is None else path.write_bytes(content)
        step, found = checkpoint.restore(tmp_path, _state())
        assert step == 1, what
        path.write_bytes(raw)
        shown = capsys.readouterr().err
        assert shown.count("\n") == 1 and "2 is damaged" in shown and "trying the one before" in shown
        count += 1
    assert count > 80
    _assert_same(found, _state(1))
    assert checkpoint.restore(tmp_path, _state())[0] == 2


def test_a_missing_folder_and_a_renamed_step_are_damage(tmp_path, capsys):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, _state(step))
    shutil.rmtree(tmp_path / "2" / "state" / "state")
    shutil.copytree(tmp_path / "1", tmp_path / "3")
    (tmp_path / "4").mkdir()
    step, found = checkpoint.restore(tmp_path, _state())
    assert step == 1 and capsys.readouterr().err.count("is damaged") == 3
    _assert_same(found, _state(1))


def test_all_damaged_is_none_and_the_next_save_makes_good(tmp_path, capsys):
    for step in (10, 20):
        checkpoint.save(tmp_path, step, _state(step))
        (tmp_path / str(step) / "manifest.json").write_text("")
    assert checkpoint.restore(tmp_path, _state()) is None
    assert capsys.readouterr().err.count("\n") == 2
    checkpoint.save(tmp_path, 10, _state(10))
    assert checkpoint.steps(tmp_path) == [10]
    assert checkpoint.restore(tmp_path, _state())[0] == 10


# --- being killed -------------------------------------------------------------------------------------------------


class _Crash(BaseException):
    pass


@pytest.mark.parametrize("moment", range(6))
def test_a_stop_before_any_change_of_the_folder_loses_at_most_the_new_step(tmp_path, monkeypatch, moment):
    """Stops `save` before its first, second, ... change: Orbax's write, the manifest, each rename, each removal."""
    for step in (1, 2):
        checkpoint.save(tmp_path, step, _state(step), keep=2)
    calls, inside = [], []

    def stopping(real):
        def wrapped(*args, **kwargs):
            if inside:  # Orbax's own renames
                return real(*args, **kwargs)
            calls.append(real)
            if len(calls) > moment:
                raise _Crash
            inside.append(real)
            try:
                return real(*args, **kwargs)
            finally:
                inside.clear()

        return wrapped

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.v1, "save", stopping(checkpoint.v1.save))
        patch.setattr(checkpoint, "_write_manifest", stopping(checkpoint._write_manifest))
        patch.setattr(checkpoint.os, "rename", stopping(os.rename))
        patch.setattr(checkpoint.shutil, "rmtree", stopping(shutil.rmtree))
        try:
            checkpoint.save(tmp_path, 3, _state(3), keep=2)
            assert moment == 5
        except _Crash:
            assert moment < 5
    step, found = checkpoint.restore(tmp_path, _state())
    assert step == (2 if moment < 3 else 3)
    _assert_same(found, _state(step))
    checkpoint.save(tmp_path, 4, _state(4), keep=2)
    assert sorted(os.listdir(tmp_path)) == ["3" if moment >= 3 else "2", "4"]


_WRITER = """
import sys
import numpy as np
from trainer import checkpoint
step = int(sys.argv[2])
while True:
    step += 1
    checkpoint.save(sys.argv[1], step, {"x": np.full((200, 1000), step, np.int32)})
    print(step, flush=True)
"""


@pytest.mark.slow
def test_kill_9_at_any_moment_leaves_a_whole_checkpoint(tmp_path, capsys):
    abstract = {"x": np.empty((200, 1000), np.int32)}
    root = pathlib.Path(checkpoint.__file__).parents[1]
    last = 0
    for attempt in range(3):
        writer = subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(tmp_path), str(last)],
            stdout=subprocess.PIPE, text=True, cwd=root, env=os.environ | {"PYTHONPATH": str(root)},
        )  # fmt: skip
        with writer:
            told = [int(writer.stdout.readline()) for _ in range(3 + attempt)]
            time.sleep(0.003 + 0.011 * attempt)
            writer.send_signal(signal.SIGKILL)
            told += [int(line) for line in writer.stdout.read().split()]
        step, found = checkpoint.restore(tmp_path, abstract)
        assert step >= told[-1] > last  # what was said to be saved is there
        np.testing.assert_array_equal(found["x"], np.full((200, 1000), step, np.int32))
        last = step
    assert capsys.readouterr().err == ""  # a killed save is not damage


# --- cost ---------------------------------------------------------------------------------------------------------


def test_a_small_state_costs_a_fraction_of_an_array_per_leaf(tmp_path, monkeypatch):
    params = {f"layer{i}": {name: _array("float32", (32, 43)) for name in "qkvogud"} for i in range(3)}
    state = {"params": params, "mu": params, "nu": params, "key": jax.random.key(0), "step": jnp.int32(0)}
    took = {"packed": [], "alone": []}
    for step in range(6):
        for way, below in (("packed", checkpoint._PACK_BELOW), ("alone", 1)):
            with monkeypatch.context() as patch:
                patch.setattr(checkpoint, "_PACK_BELOW", below)
                start = time.perf_counter()
                checkpoint.save(tmp_path / way, step, state)
                checkpoint.restore(tmp_path / way, state)
                took[way].append(time.perf_counter() - start)
    # Save and restore together: about 45 and 150 ms with the machine's other work going on.
    assert min(took["packed"]) < 0.6 * min(took["alone"])
