"""Delayed scales: against plain numpy, and histories that are the same however a step is cut up.

Shapes: N tokens (rows), K inputs, M outputs; H remembered steps, L layers, S linear sites of a layer.
"""
from __future__ import annotations

import dataclasses
import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

import formats
import trainer
from tests.trainer import numpy_quantizers as nq
from tests.trainer.products import FP8, K, M, N, assert_products, products
from trainer import checkpoint, step
from trainer import model as decoder
from trainer.cohort import Layout, Program
from trainer.linear import RowShards, linear
from trainer.optimizers import OptimizerNumbers
from trainer.precision import ROLES, Quantizer
from trainer.scales import Site
from trainer.schedules import ScheduleNumbers

# --- delayed ----------------------------------------------------------------------------------------------------------

SIZES = (1.0, 3.0, 0.2, 0.1, 8.0, 0.05)  # of the steps' tensors: both choices and forgetting show


def _remember(seen: list, length: int, choice: str):
    """The amax to scale by after those of earlier steps, by the definition; None before the first."""
    recent = seen[-length:]
    return None if not recent else recent[-1] if choice == "most_recent" else max(recent)


@pytest.mark.parametrize("name, choice", [("fp8", "max"), ("fp8", "most_recent"), ("nvfp4", "max")])
def test_delayed_scaling_equals_numpy(name, choice):
    """Over six steps the three products, and what is observed, are those of delayed scaling written out in numpy."""
    length = 2
    policy = trainer.policy(name, "precision.source=delayed", f"precision.history={length}", f"precision.history_choice={choice}")
    history = {role: formats.amax_history(policy.history) for role in ROLES}
    seen: dict[str, list] = {role: [] for role in ROLES}
    rng = np.random.default_rng(0)
    for size in SIZES:
        x, w, dy = ((rng.standard_normal(shape) * size).astype(np.float32) for shape in ((N, K), (K, M), (N, M)))
        remembered = {role: history[role].get(0.0, policy.history_choice) for role in ROLES}
        *found, amax = products(x, w, dy, policy, remembered)
        given = {role: _remember(seen[role], length, choice) for role in ROLES}
        quantize = {role: nq.nvfp4(amax=given[role]) if name == "nvfp4" else nq.minifloat(FP8[role], amax=given[role]) for role in ROLES}
        assert_products(found, x, w, dy, quantize)
        for role, tensor in (("activations", x), ("weights", w), ("output_gradients", dy)):
            assert float(amax[role]) == np.max(np.abs(tensor))
            seen[role].append(float(amax[role]))
            history[role] = history[role].push(amax[role])


def test_one_role_or_one_product_can_be_delayed():
    """Only the quantizers that say so go by the remembered amax, and only their roles report."""
    policy = trainer.policy("fp8", "precision.activations.wgrad.source=delayed", "precision.history=4")
    assert policy.roles(trainer.precision.Source.DELAYED) == ("activations",)
    rng = np.random.default_rng(1)
    x, w, dy = (rng.standard_normal(shape).astype(np.float32) for shape in ((N, K), (K, M), (N, M)))
    y, dx, dw, amax = products(x, w, dy, policy, {"activations": jnp.float32(0.5)})
    assert set(amax) == {"activations"}
    quantize = {role: nq.minifloat(FP8[role]) for role in ROLES}
    current = products(x, w, dy, trainer.policy("fp8"), {})
    np.testing.assert_array_equal(y, current[0])
    np.testing.assert_array_equal(dx, current[1])
    left, right = nq.minifloat("e4m3fn", amax=0.5)(x, 0).T, quantize["output_gradients"](dy, 0)
    assert np.all(np.abs(np.asarray(dw, np.float64) - left @ right) <= 2e-6 * np.abs(left) @ np.abs(right))


@pytest.mark.parametrize("name", ["fp8", "nvfp4"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_shows(name, bad):
    """A NaN or an infinity makes NaN of the product, as with current scales, and is not remembered."""
    policy = trainer.policy(name, "precision.source=delayed")
    x, w, dy = np.ones((N, K), np.float32), np.ones((K, M), np.float32), np.ones((N, M), np.float32)
    x[3, 5] = bad
    y, _, dw, amax = products(x, w, dy, policy, {role: jnp.float32(1.0) for role in ROLES})
    assert np.all(np.isnan(y[3])) and np.all(np.isnan(dw[5])) and not np.isfinite(amax["activations"])
    assert float(formats.amax_history(2).push(2.0).push(amax["activations"]).get(0.0)) == 2.0


# --- histories in a step ----------------------------------------------------------------------------------------------

MODEL = decoder.ModelConfig(num_layers=2, d_model=8, num_heads=2, d_ff=12, vocab_size=11)
STRUCTURE = step.StepStructure(MODEL, "adamw", "constant", batch_size=4, seq_len=6)
TOKENS = np.random.default_rng(0).integers(0, 11, (4, 4, 7)).astype(np.int32)  # steps, B, T + 1
LENGTH = 3


def _hyper(*overrides, lr=0.01, margin=2.0):
    policy = trainer.policy("fp8", *(overrides or ("precision.source=delayed", f"precision.history={LENGTH}")))
    numbers = OptimizerNumbers(*(np.float32(x) for x in (lr, 0.9, 0.95, 1e-8, 0.1, 1.0)))
    schedule = ScheduleNumbers(np.int32(100), np.int32(0), np.int32(20), np.float32(0.0))
    return step.Hyper(numbers, schedule, policy, np.array([0, 5], np.uint32), np.float32(margin))


@partial(jax.jit, static_argnums=0)
def _init(structure, hyper):
    return step.init(structure, hyper)


@partial(jax.jit, static_argnums=0)
def _step(structure, state, tokens, hyper):
    return step.step(structure, decoder.blueprint(structure.model)[0], state, tokens, hyper)


def _after(structure, hyper, num_steps=len(TOKENS), state=None):
    state = _init(structure, hyper) if state is None else state
    for tokens in TOKENS[:num_steps]:
        state, metrics = _step(structure, state, tokens, hyper)
    return state, metrics


def _amax(state) -> dict[str, np.ndarray]:
    return {role: np.asarray(history.amax) for role, history in state.histories.items()}


def test_histories_are_of_every_layer_and_site():
    """Newest first, the oldest forgotten: of weights the largest of each matrix that the steps began with, of activations for one the
    first norm's; every entry is a number."""
    hyper, state = _hyper(), _init(STRUCTURE, _hyper())
    weights, norms = [], []
    for tokens in TOKENS:
        layers = jax.tree.map(np.asarray, state.params["layers"])
        weights.append(np.stack([np.max(np.abs(layers[name]), axis=(1, 2)) for name in decoder.SITES], 1))
        h = np.asarray(state.params["embedding"], np.float64)[tokens[:, :-1].reshape(-1)] * 8**0.5
        norms.append(np.max(np.abs(h / np.sqrt(np.mean(h * h, 1, keepdims=True) + 1e-6) * layers["attention_norm"][0])))
        state, _ = _step(STRUCTURE, state, tokens, hyper)
    found = _amax(state)
    assert {role: amax.shape for role, amax in found.items()} == dict.fromkeys(ROLES, (LENGTH, 2, 4))
    np.testing.assert_array_equal(found["weights"], np.stack(weights[:-LENGTH - 1:-1]))
    np.testing.assert_allclose(found["activations"][:, 0, 0], norms[:-LENGTH - 1:-1], rtol=1e-6)
    assert all(np.all(np.isfinite(amax)) and np.all(amax > 0) for amax in found.values())
    assert len({float(x) for amax in found.values() for x in amax.ravel()}) == 3 * LENGTH * 2 * 4  # no place has another's


@pytest.mark.parametrize("change", [{"accumulate": 2}, {"scan_layers": True, "remat": True}])
def test_histories_are_the_same_however_the_step_is_cut(change):
    """Micro-batches by their maximum, layers under scan and rematerialised: what the plain step remembers, to summation order. (Not
    from an empty history: there each micro-batch has its own current scale.)"""
    hyper = _hyper()
    begun, _ = _after(STRUCTURE, hyper, 1)
    model = dataclasses.replace(MODEL, **{name: value for name, value in change.items() if name != "accumulate"})
    structure = dataclasses.replace(STRUCTURE, model=model, accumulate=change.get("accumulate", 1))
    (one, _), (other, _) = _after(STRUCTURE, hyper, 1, begun), _after(structure, hyper, 1, begun)
    for role, amax in _amax(one).items():
        np.testing.assert_allclose(_amax(other)[role], amax, rtol=2e-5)
        np.testing.assert_array_equal(_amax(other)[role][1:], amax[1:])


def test_the_meter_is_no_gradient():
    """The gradient norm is that of what the optimizer got, which is gradients of parameters alone: not of amax, each of which is larger."""
    state, metrics = _after(STRUCTURE, _hyper(), 1)
    mean = state.opt_state[0].mu
    clip = min(1.0, 1.0 / float(metrics.grad_norm))
    norm = np.sqrt(sum(np.sum(np.float64(m) ** 2) for m in jax.tree.leaves(mean))) / (1 - 0.9) / clip
    assert float(metrics.grad_norm) == pytest.approx(norm, rel=1e-6)
    assert jax.tree.structure(state.params) == jax.tree.structure(mean)
    assert np.min(_amax(state)["activations"][0]) > 0.2 * metrics.grad_norm


def test_a_frozen_run_remembers_nothing_more():
    hyper = _hyper()
    state, _ = _after(STRUCTURE, hyper, 2)
    broken = dataclasses.replace(state, params={**state.params, "final_norm": state.params["final_norm"] * jnp.nan})
    for bad in (broken, dataclasses.replace(state, first_loss=jnp.float32(-9.0))):
        after, _ = _step(STRUCTURE, bad, TOKENS[2], hyper)
        assert int(after.diverged_step) == 2
        jax.tree.map(np.testing.assert_array_equal, after.histories, state.histories)


def test_other_sources_have_no_histories():
    """No state, and no argument of the compiled step, is there for scales that nobody delays."""
    shapes = partial(jax.eval_shape, partial(step.init, STRUCTURE))
    for source in ("current", "static", "none"):
        assert shapes(_hyper(f"precision.source={source}")).histories == {}
    partly = shapes(_hyper("precision.weights.source=delayed"))
    assert set(partly.histories) == {"weights"} and partly.histories["weights"].amax.shape == (1024, 2, 4)


# --- devices, members, checkpoints, evaluation ------------------------------------------------------------------------

SMALL = dataclasses.replace(STRUCTURE, model=dataclasses.replace(MODEL, num_layers=1))
program = functools.cache(Program)
ONE, TWO, WIDE = Layout(1, 1, "map"), Layout(1, 2, "map"), Layout(1, 1, "vmap")
WINDOWS = np.random.default_rng(9).integers(0, 11, (8, 7)).astype(np.int32)
PAIR = [_hyper(lr=0.01), _hyper(lr=0.3)]


def _run(layout, hypers, states=None, tokens=TOKENS, evaluate=True):
    """(states, losses on the validation windows) of members that see the same batches, on the host."""
    prog = program(SMALL, layout)
    stacked = prog.put(jax.tree.map(lambda *xs: np.stack(xs), *hypers))
    states = prog.init(stacked) if states is None else prog.put(states)
    stops = np.asarray(jax.device_get(states.step)) + len(tokens)
    filled = np.concatenate([tokens, TOKENS[: len(TOKENS) - len(tokens)]])  # a program is compiled for their number
    states, _, _ = prog.run(states, stacked, np.stack([filled] * len(hypers)), stops)
    losses = prog.evaluate(states, stacked, WINDOWS, np.ones(len(hypers), bool)) if evaluate else None
    return jax.device_get((states, losses))


@pytest.mark.parametrize("empty", [True, False])
def test_two_devices_see_what_one_does(empty):
    """Bit for bit: amax is that of the global tensor, for the scales of the first step too. (All sums are of whole numbers.)"""
    rng = np.random.default_rng(2)
    x, w, dy = (rng.integers(-7, 8, shape).astype(np.float32) for shape in ((N, K), (K, M), (N, M)))
    x[: N // 2] *= 16.0  # one device has the largest values
    dy[N // 2 :] *= 16.0
    policy = trainer.policy("fp8", "precision.source=delayed")
    remembered = {role: jnp.float32(0.0 if empty else 448.0) for role in ROLES}
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",), axis_types=(AxisType.Auto,))

    def local(x, w, dy):
        y, dx, dw, amax = products(x, w, dy, policy, remembered, RowShards("data"))
        return y, dx, lax.psum(dw, "data"), amax

    specs = (P("data"), P(), P("data"))
    sharded = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(P("data"), P("data"), P(), P()), check_vma=False))(x, w, dy)
    *whole, amax = products(x, w, dy, policy, remembered)
    jax.tree.map(np.testing.assert_array_equal, sharded[3], amax)
    if not empty:  # scales of 1 and 2**-7: products of whole numbers and their 128ths
        jax.tree.map(np.testing.assert_array_equal, sharded[:3], tuple(whole))


@pytest.mark.slow
def test_a_split_batch_remembers_what_a_whole_one_does():
    """To summation order; parameters are held still."""
    begun, _ = _run(ONE, PAIR)
    one, two = (_run(layout, [_hyper(lr=0.0)] * 2, begun, evaluate=False)[0] for layout in (ONE, TWO))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-6), one.histories, two.histories)


@pytest.mark.parametrize("layout", [ONE, pytest.param(WIDE, marks=pytest.mark.slow)], ids=lambda layout: layout.name)
def test_every_member_has_its_own_histories(layout):
    """A member's histories and losses are, to the bit, those beside other members."""
    states, losses = _run(layout, PAIR)
    reverse, other_losses = _run(layout, PAIR[::-1])
    jax.tree.map(lambda one, other: np.testing.assert_array_equal(one, other[::-1]), (states.histories, losses), (reverse.histories, other_losses))
    assert not np.array_equal(*states.histories["weights"].amax)


def test_a_checkpoint_keeps_the_histories(tmp_path):
    """Stopped after two steps and resumed from what was saved: the bits of a run that went on."""
    whole, losses = _run(ONE, PAIR)
    half, _ = _run(ONE, PAIR, tokens=TOKENS[:2])
    checkpoint.save(tmp_path, 2, half)
    _, restored = checkpoint.restore(tmp_path, jax.tree.map(np.zeros_like, half))
    assert np.all(restored.histories["weights"].amax[0, :2] > 0)
    again, same_losses = _run(ONE, PAIR, restored, TOKENS[2:])
    jax.tree.map(np.testing.assert_array_equal, (again, same_losses), (whole, losses))


def test_evaluation_goes_by_the_histories():
    """Ten times the remembered amax is a coarser grid: other losses. Losses are those of a forward pass with numbers remembered."""
    states, losses = _run(ONE, PAIR)
    larger = dataclasses.replace(states, histories=jax.tree.map(lambda x: x * np.float32(10.0), states.histories))
    prog = program(SMALL, ONE)
    stacked = prog.put(jax.tree.map(lambda *xs: np.stack(xs), *PAIR))
    others = np.asarray(prog.evaluate(prog.put(larger), stacked, WINDOWS, np.ones(2, bool)))
    assert np.all(np.isfinite(others)) and not np.array_equal(others, losses)
    remembered = {role: jnp.asarray(np.max(history.amax[0], axis=0)) for role, history in states.histories.items()}
    params = jax.tree.map(lambda x: x[0], states.params)
    call, graphdef = decoder.Call(PAIR[0].policy, sites=Site(remembered)), decoder.blueprint(SMALL.model)[0]
    expected = jax.jit(lambda params: decoder.next_token_losses(graphdef, params, WINDOWS, call))(params)
    np.testing.assert_allclose(losses[0], np.mean(expected, axis=1), rtol=1e-6)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_delayed_needs_something_that_remembers():
    policy = trainer.policy("fp8", "precision.source=delayed")
    x, w = jnp.ones((4, 4)), jnp.ones((4, 4))
    with pytest.raises(ValueError, match="source='delayed' of weights.*accepted: current, static, none"):
        linear(x, w, policy)
    with pytest.raises(ValueError, match="source='delayed'"):
        trainer.dot_general(policy)(x, w, (((1,), (0,)), ((), ())))


E4M3 = formats.get("float8_e4m3fn")


@pytest.mark.parametrize("fmt, source, words", [
    (E4M3, "delayed", ["'delayed'", "Element", "none"]),
    (E4M3, "current", ["'current'", "formats.scaled"]),
    (formats.scaled(E4M3), "none", ["'none'", "Scaled", "current, delayed, static"]),
    (formats.scaled(E4M3), "guessed", ["'guessed'", "current, delayed, static"]),
    (formats.scaled(E4M3, "token"), "delayed", ["granularity=token", "granularity=tensor"]),
    (formats.get("mxfp8_e4m3"), "static", ["no scale of the whole tensor", "source=current"]),
    (formats.scaled(formats.integer(8), zero_point=True), "delayed", ["zero_point", "source=current"]),
    (formats.scaled(E4M3, amax="rms"), "static", ["amax='current'", "source=current"]),
])  # fmt: skip
def test_sources_that_a_format_cannot_have(fmt, source, words):
    with pytest.raises(ValueError) as caught:
        Quantizer(fmt, source=source)
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words)
