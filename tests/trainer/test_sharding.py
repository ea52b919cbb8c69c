"""One run over eight devices as a whole (`sharding=data`, `sharding=fsdp`) is the run on one device, in every precision.

Shapes: S steps, B batch, T time, as everywhere.
"""
from __future__ import annotations

import functools
import importlib
import json
import shutil

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import trainer
from tests.trainer.tiny import folders, launch, results
from trainer import build
from trainer.cohort import Layout, Program
from trainer.config import config_dir
from trainer.global_program import GlobalProgram
from trainer.sharding import DATA as AXIS
from trainer.sharding import Sharding, over_rows, spec

execute = importlib.import_module("trainer.sweep.execute")  # the package's `execute` is the function

STEPS, VOCAB = 6, 16
# 64 wide: several blocks of 32 along every contraction, and a device's eighth of a matrix ends inside one.
SMALL = ["model=2k", "model.num_layers=1", "model.d_model=64", "model.d_ff=96", "model.num_heads=2", "data=synthetic", f"data.vocab_size={VOCAB}", "data.order=1",
         "batch_size=8", "seq_len=16", f"steps={STEPS}", "schedule.warmup_steps=2", "probe=false"]  # fmt: skip
RANDOM = ("precision=bf16_stochastic",)  # weights are kept in bfloat16, rounded stochastically
# Most of what a step is made of: random bits in products, micro-batches, layers under scan and remat, blocks under two scales, 8-bit codes of flattened tensors.
MIXED = ("precision=nvfp4", "precision.output_gradients.rounding=stochastic", "precision.adam_m=blockwise8", "precision.adam_v=float8_e4m3fn",
         "batch_size=16", "accumulate=2", "model.num_layers=2", "model.scan_layers=true", "model.remat=true")  # fmt: skip
ONE, DATA, FSDP = Layout(1, 1, "map"), Layout(1, 8, "data"), Layout(1, 8, "fsdp")


@functools.cache
def _program(layout: Layout, overrides: tuple[str, ...]) -> tuple[Program, object]:
    """(program, hyper on its devices) of the small run."""
    config = trainer.config(*SMALL, *overrides)
    program = (GlobalProgram if layout.sharding else Program)(build.step_structure(config, VOCAB), layout)
    return program, program.put(jax.tree.map(lambda x: np.stack([x]), build.hyper(config)))


def _tokens(batch: int) -> np.ndarray:
    """[1, S, B, T+1]: the next token follows from the last, most of the time."""
    rng = np.random.default_rng(0)
    return ((np.arange(17) + rng.integers(0, VOCAB, (1, STEPS, batch, 1)) + (rng.random((1, STEPS, batch, 17)) < 0.2)) % VOCAB).astype(np.uint8)


@functools.cache
def _fresh(overrides: tuple[str, ...]):
    """The state before the first step, on the host."""
    program, hyper = _program(ONE, overrides)
    return program.fetch(program.init(hyper))


@functools.cache
def _trained(layout: Layout, overrides: tuple[str, ...], steps: int = STEPS):
    """(state on the devices, losses [S]) after that many steps."""
    program, hyper = _program(layout, overrides)
    state, metrics, _ = program.run(program.put(_fresh(overrides)), hyper, _tokens(program.structure.batch_size), np.array([steps], np.int32))
    return state, np.asarray(program.fetch(metrics.loss))[0, :steps]


# --- the same numbers ----------------------------------------------------------------------------------------------------

PRESETS = sorted(path.stem for path in (config_dir() / "precision").glob("*.yaml"))
NEEDS = {"bitnet_finetune": ("precision.ramp_steps=4",)}  # a ramp within the run
SAME, TIPPED = 1e-6, 1e-3
# Where a product of another number of rows, as XLA:CPU computes it, tips a 4-bit value already in the first forward pass (in 2 windows of 64
# by 2e-4, in the layouts `solo/8`, `data/8` and `fsdp/8` the same ones): the batch's first loss.
FIRST = {"precision=mxfp4": 1e-4, "precision=mxfp4_forward": 1e-4}


def _close(layout: Layout, overrides: tuple[str, ...]) -> None:
    """Losses of one device and of eight. The first, of the same parameters, to the order of float32 sums (1e-6 relative): no scale and no
    random bit is another one. Later ones to 1e-3 over six steps: where a sum differs in its last bit a value may be rounded to the
    other side, and training carries that on. One device does the same to itself: with weights moved by one unit in the last place the
    losses of fp8, fp8_tiles and bitnet move by up to 3e-4 in six steps; here they move by up to 2e-4."""
    (_, expected), (_, found) = _trained(ONE, overrides), _trained(layout, overrides)
    difference = np.abs(found / expected - 1)
    assert expected[-1] < expected[0] - 0.2  # it learns
    assert difference[0] <= FIRST.get(overrides[0], SAME) and difference.max() <= TIPPED


@pytest.mark.slow
@pytest.mark.parametrize("sharding", [DATA, FSDP], ids=lambda layout: layout.name)
@pytest.mark.parametrize("name", PRESETS)
def test_same_losses_in_every_precision(name, sharding):
    """The presets, rounded as they are."""
    _close(sharding, (f"precision={name}", "precision.pad=true", *NEEDS.get(name, ())))


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [RANDOM, MIXED], ids=["random", "mixed"])
def test_same_losses(overrides):
    """The state divided, and rounded at random."""
    _close(FSDP, overrides)


@pytest.mark.slow
def test_same_beginning_and_evaluation():
    """Fresh states to the bit, and the losses of one state to 1e-6, on one device and on eight."""
    program, hyper = _program(FSDP, RANDOM)
    jax.tree.map(np.testing.assert_array_equal, program.fetch(program.init(hyper)), _fresh(RANDOM))
    losses = []
    state = _program(FSDP, RANDOM)[0].fetch(_trained(FSDP, RANDOM)[0])
    windows = np.random.default_rng(1).integers(0, VOCAB, (16, 17)).astype(np.uint8)
    for layout in (ONE, FSDP):
        program, hyper = _program(layout, RANDOM)
        losses.append(program.evaluate(program.put(state), hyper, windows, np.ones(1, bool)))
    np.testing.assert_allclose(*losses, rtol=SAME)


def _values(layout: Layout, steps: int) -> dict[str, np.ndarray]:
    """Path -> leaf of parameters and moments after that many steps of RANDOM."""
    program, _ = _program(layout, RANDOM)
    state = _trained(layout, RANDOM, steps)[0]
    host = program.fetch((state.params, state.opt_state))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(host)}


@pytest.mark.slow
def test_random_bits_are_those_of_one_device():
    """After one update of the same parameters, weights, rounded stochastically to bfloat16, and moments are the same but for one in a hundred, where
    what is rounded differs in its last bits. Other random bits would change one weight in three."""
    expected, found = _values(ONE, 1), _values(FSDP, 1)
    assert expected.keys() == found.keys()
    matrices = [path for path, leaf in expected.items() if leaf.size > 1000 and leaf.dtype != np.float32]
    assert len(matrices) == 15  # weights and both moments
    for path in matrices:
        assert np.mean(expected[path] != found[path]) < 0.01, path


N, K, M = 256, 64, 96  # 32 tokens a device; 8 columns of a weight
KEY = np.array([21, 22], np.uint32)


def _products(x_NK, w_KM, g_NM, policy):
    y_NM, backward = jax.vjp(lambda x, w: trainer.linear(over_rows(x), w, policy, KEY), x_NK, w_KM)
    return (y_NM, *backward(g_NM))


WITH_MEMORY = {"fp8_delayed", "int8_fake_quant", "lsq"}  # scales from earlier steps, or learned: a product alone has none; the runs above have


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name == "luq" else pytest.mark.slow) for name in PRESETS if name not in WITH_MEMORY])
def test_same_products_in_every_precision(name):
    """y, dx, dw of the same x, w and g, rows and weights divided, to the order of float32 sums: from the same numbers no value is rounded to
    another side, and no block or tensor has another scale. The largest values lie on one device."""
    rng = np.random.default_rng(23)
    x, w, g = (rng.standard_normal(shape).astype(np.float32) for shape in ((N, K), (K, M), (N, M)))
    x[40:50] *= 7.0
    g[200:210] *= 7.0
    mesh = Mesh(np.array(jax.devices()), (AXIS,), axis_types=(AxisType.Auto,))
    rows, columns = (NamedSharding(mesh, P(*axes)) for axes in ((AXIS, None), (None, AXIS)))
    policy = trainer.policy(name, *(["precision.ramp_steps=1"] if name in NEEDS else []))
    expected = jax.jit(_products)(x, w, g, policy)
    with jax.set_mesh(mesh):
        found = jax.jit(_products, out_shardings=(rows, rows, columns))(*(jax.device_put(a, at) for a, at in ((x, rows), (w, columns), (g, rows))), policy)
    for one, other in zip(found, expected):
        assert np.linalg.norm(one - other) <= 1e-6 * np.linalg.norm(other)


# --- where it lies -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_fsdp_divides_the_state():
    """Each device has an eighth of every matrix and of the codes of its moments, at most a sixth of the state in all; with `data` each has all."""
    state = _trained(FSDP, RANDOM, 1)[0]
    here = {device: 0 for device in jax.devices()}
    leaves = jax.tree.leaves((state.params, state.opt_state))
    for leaf in leaves:
        for shard in leaf.addressable_shards:
            here[shard.device] += shard.data.nbytes
            assert leaf.size <= 1000 or shard.data.size * 8 == leaf.size
    assert max(here.values()) <= sum(leaf.nbytes for leaf in leaves) / 6


@pytest.mark.parametrize("path, shape, sharding, expected", [
    ("params/layers/down", (1, 8, 96, 64), "fsdp", P(None, None, "data")),
    ("params/layers/gate_up", (1, 8, 64, 192), "fsdp", P(None, None, None, "data")),
    ("0/opt_state/0/mu/layers/gate_up", (1, 8, 64, 192), "fsdp", P(None, None, None, "data")),
    ("opt_state/inner/0/nu/layers/qkv/codes", (1, 24576), "fsdp", P(None, "data")),
    ("params/layers/down", (1, 8, 97, 64), "fsdp", P(None, None, None, "data")),
    ("params/layers/down", (1, 8, 97, 63), "fsdp", P()),
    ("params/embedding", (1, 1000, 64), "fsdp", P(None, "data")),
    ("params/layers/mlp_norm", (1, 8, 64), "fsdp", P()),
    ("params/layers/steps/weights", (1, 8, 4), "fsdp", P()),
    ("step", (1,), "fsdp", P()),
    ("histories/weights/amax", (1, 8, 4, 1024), "fsdp", P()),
    ("params/layers/down", (1, 8, 96, 64), "data", P()),
])  # fmt: skip
def test_rules(path, shape, sharding, expected):
    """Over eight devices: the largest dimension that they divide, never that of layers; gains, counts and histories are whole."""
    assert spec(path, shape, Sharding(sharding), 8) == expected


# --- runs ----------------------------------------------------------------------------------------------------------------

SHARDED = ("precision=float32", "precision.weights.rounding=null", "batch_size=8", "steps=10", "checkpoint.every_steps=4", "sharding=fsdp")


@pytest.fixture
def shared(monkeypatch):
    """Launches of a test, and of others, use one compiled program."""
    monkeypatch.setattr(execute, "GlobalProgram", _shared)


_shared = functools.cache(GlobalProgram)


@pytest.mark.slow
def test_a_resumed_run_is_the_same(tmp_path, shared):
    """From the checkpoint at step 8, bit for bit, in the layout that it began in: also where the second launch does not ask for it."""
    launch(tmp_path, *SHARDED)
    expected = results(tmp_path)
    ((folder, (record, _, state)),) = zip(folders(tmp_path).values(), expected.values())
    assert record["layout"] == "fsdp/8" and state[0] == 10
    (folder.path / "record.json").unlink()
    shutil.rmtree(folder.checkpoints / "10")
    launch(tmp_path, *SHARDED[:-1])
    assert results(tmp_path) == expected


@pytest.mark.slow
def test_start_from_another_run_and_probe(tmp_path, shared):
    """`init_from` and the probe of gradients, as where each device has a program of its own: the first loss to 1e-6, what follows to 1e-3."""
    run = ("batch_size=8", "precision=int4", "probe=true", "precision.weights.rounding=null")
    launch(tmp_path / "first", *run, "steps=10")
    (source,) = folders(tmp_path / "first").values()
    found = {}
    for layout, sharding in (("solo/8", "null"), ("fsdp/8", "fsdp")):
        launch(tmp_path / sharding, *run, "steps=2", f"sharding={sharding}", f"init_from={source.path}")
        (folder,) = folders(tmp_path / sharding).values()
        found[layout] = folder.record() | {"first": folder.metrics()[0]["loss"]}
        assert found[layout]["layout"] == layout
    assert found["fsdp/8"]["first"] < source.metrics()[0]["loss"] - 0.1 and found["fsdp/8"]["gradient_cosine"] < 0.999
    for column, tolerance in (("first", SAME), ("loss", TIPPED), ("gradient_cosine", TIPPED), ("gradient_magnitude", TIPPED)):
        np.testing.assert_allclose(found["fsdp/8"][column], found["solo/8"][column], rtol=tolerance)


def test_layouts_of_old_folders_are_read():
    """As config.json has them."""
    assert Layout(**json.loads('{"member_devices": 1, "data_devices": 8, "inner": "map"}')).name == "solo/8"
    assert Layout(**json.loads('{"member_devices": 1, "data_devices": 8, "inner": "fsdp"}')).name == "fsdp/8"


@pytest.mark.parametrize("overrides, words", [
    (["sharding=tensor"], ["sharding=tensor", "accepted: data, fsdp"]),
    (["distributed=true"], ["distributed=true", "sharding=null", "data or fsdp"]),
    (["sharding=fsdp", "batch_size=12"], ["batch_size=12", "8 devices"]),
    (["sharding=data", "batch_size=8", "accumulate=2"], ["accumulate=2", "4 sequences", "8 devices"]),
])  # fmt: skip
def test_refusals(tmp_path, overrides, words):
    """One line, and nothing is written."""
    with pytest.raises(ValueError) as caught:
        launch(tmp_path, "steps=1", *overrides)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
