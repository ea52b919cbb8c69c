"""What lives between steps, through `trainer.step`: on its format after every step, at its size, the same packed, emulated and restored."""
from __future__ import annotations

import dataclasses
import functools
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import trainer
from formats import QArray
from trainer import checkpoint, describe, step, stored
from trainer import model as decoder
from trainer.optimizers import BlockwiseArray, OptimizerNumbers, state_bytes
from trainer.schedules import ScheduleNumbers

CHEAP = {"xla_backend_optimization_level": 0}  # compiling is what these tests cost
MODEL = decoder.ModelConfig(num_layers=1, d_model=8, num_heads=2, d_ff=12, vocab_size=11)
STRUCTURE = step.StepStructure(MODEL, "adamw", "constant", batch_size=4, seq_len=6)
TOKENS = np.random.default_rng(0).integers(0, 11, (4, 4, 7)).astype(np.int32)  # steps, B, T + 1
LR, BETA1, BETA2, EPS, DECAY = 0.01, 0.9, 0.95, 1e-8, 0.1
EMULATED = "precision.storage=emulated"

PRESETS = {
    "bf16_state": ("bf16_state",), "kahan": ("float32", "precision.optimizer_arithmetic=kahan"), "collage_light": ("collage_light",),
    "collage_plus": ("collage_plus",), "bf16_stochastic": ("bf16_stochastic",), "adam8bit": ("adam8bit",),
    "float16": ("float32", "precision.master_weights=float16", "precision.scaled_state=false"), "fp8_state": ("fp8_state",),
}  # fmt: skip
SLOW = ("bf16_state", "kahan", "collage_plus", "float16", "fp8_state")  # as the others, or long to compile
NAMES = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in PRESETS]
PAIRS = [name if name == "collage_light" else pytest.param(name, marks=pytest.mark.slow) for name in PRESETS]
NEAREST = ("bf16_stochastic", "precision.master_rounding=nearest_even", "precision.scaled_state=false")


@functools.cache
def hyper(*overrides, lr=LR, margin=2.0):
    numbers = OptimizerNumbers(*(np.float32(x) for x in (lr, BETA1, BETA2, EPS, DECAY, 1.0)))
    schedule = ScheduleNumbers(np.int32(100), np.int32(0), np.int32(20), np.float32(0.0))
    return step.Hyper(numbers, schedule, trainer.policy(*overrides), np.array([0, 5], np.uint32), np.float32(margin))


@partial(jax.jit, compiler_options=CHEAP)
def _init(hyper):
    return step.init(STRUCTURE, hyper)


@partial(jax.jit, compiler_options=CHEAP)
def _step(state, tokens, hyper):
    return step.step(STRUCTURE, decoder.blueprint(MODEL)[0], state, tokens, hyper)


@functools.cache
def trained(*overrides, lr=LR):
    """(states from the first on, metrics of every step)."""
    states, metrics = [_init(hyper(*overrides, lr=lr))], []
    for tokens in TOKENS:
        state, found = _step(states[-1], tokens, hyper(*overrides, lr=lr))
        states.append(state)
        metrics.append(found)
    return states, metrics


def _equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


# --- formats --------------------------------------------------------------------------------------------------------------------------------


def _is(dtype):
    def check(x):
        np.testing.assert_array_equal(x, x.astype(dtype).astype(np.float32))

    return check


def _is_fp8(x):
    """Matrices: float8_e4m3fn times a power of two for each layer; the others bfloat16."""
    matrices = x[0] if x.ndim == 3 else x
    if matrices.ndim < 2:
        return _is(ml_dtypes.bfloat16)(x)
    exponent = np.ceil(np.log2(np.max(np.abs(matrices)) / 448.0))
    scales = [np.float32(2.0 ** (exponent + more)) for more in (-1, 0, 1)]
    assert any(np.array_equal(matrices, (matrices / s).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * s) for s in scales)


ON = {"adam8bit": lambda x: None, "float16": _is(np.float16), "fp8_state": _is_fp8}


@pytest.mark.parametrize("name", NAMES)
def test_parameters_lie_on_their_format_after_every_step(name):
    """And they move. What is packed has the dtype that its format says."""
    states, metrics = trained(*PRESETS[name])
    for state in states:
        for path, leaf in jax.tree_util.tree_leaves_with_path(stored.wide(state.params)):
            x = np.asarray(leaf)
            ON.get(name, _is(ml_dtypes.bfloat16))(x[0] if path[0].key == "layers" and x.ndim < 3 else x)
    before, after = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(stored.wide(s.params))]) for s in (states[0], states[-1]))
    assert np.mean(before != after) > 0.3 and all(np.isfinite(m.loss) for m in metrics) and int(states[-1].step) == len(TOKENS)
    dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(states[-1].params)}
    expected = {"adam8bit": {"float32"}, "float16": {"float16"}}.get(name, {"bfloat16"})
    assert dtypes == expected or (name == "fp8_state" and "float32" not in dtypes)


@pytest.mark.parametrize("name", PAIRS)
def test_emulated_storage_trains_alike(name):
    """Losses, parameters and moments bit for bit, from the first state on; the emulated ones are float32."""
    (states, metrics), (others, other_metrics) = trained(*PRESETS[name]), trained(*PRESETS[name], EMULATED)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(others[0].params))
    for one, other in zip(states, others):
        _equal(stored.wide(one.params), stored.wide(other.params))
    assert [float(m.loss) for m in metrics] == [float(m.loss) for m in other_metrics]


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_goes_on_bit_for_bit(name, tmp_path):
    """Saved after two steps, restored from disk into an empty state, trained to the end."""
    states, _ = trained(*PRESETS[name])
    checkpoint.save(tmp_path, 2, jax.device_get(states[2]))
    number, state = checkpoint.restore(tmp_path, jax.tree.map(np.zeros_like, jax.device_get(states[0])))
    assert number == 2
    _equal(state, jax.device_get(states[2]))
    for tokens in TOKENS[2:]:
        state, _ = _step(state, tokens, hyper(*PRESETS[name]))
    _equal(jax.device_get(state), jax.device_get(states[-1]))


@pytest.mark.parametrize("name", NAMES)
def test_a_diverged_run_freezes_what_is_packed(name):
    """Nothing of weights, second words or moments moves once the loss is beyond the margin."""
    states, _ = trained(*PRESETS[name])
    bad = dataclasses.replace(states[2], first_loss=jnp.float32(-9.0))
    after, _ = _step(bad, TOKENS[2], hyper(*PRESETS[name]))
    assert int(after.diverged_step) == 2 and int(after.step) == 2
    _equal((after.params, after.opt_state), (bad.params, bad.opt_state))


# --- one step by hand -----------------------------------------------------------------------------------------------------------------------


def test_a_step_in_bfloat16_equals_numpy():
    """AdamW in float32 on the gradients at the rounded weights; weights and moments go to the nearest bfloat16. What lies within float32's
    error of the middle of two numbers may go to the other one: at most one element in a hundred."""
    states, metrics = trained(*NEAREST)
    graphdef, exact = decoder.blueprint(MODEL)[0], trainer.policy("float32")
    gradients = jax.jit(lambda params, tokens: step.loss_and_gradients(STRUCTURE, graphdef, params, tokens, exact, None), compiler_options=CHEAP)

    def nearest(x):
        return x.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)

    off, total = 0, 0
    for t, (before, after, tokens) in enumerate(zip(states[:2], states[1:], TOKENS)):
        params = stored.wide(before.params)
        grads = gradients(params, tokens)[1]
        norm = np.sqrt(sum(np.sum(np.float64(g) ** 2) for g in jax.tree.leaves(grads)))
        moments = [jax.tree.leaves(getattr(_adam(state), field)) for state in (before, after) for field in ("mu", "nu")]
        for (path, p), g, m, v, m_new, v_new, p_new in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(grads), *moments,
                                                           jax.tree.leaves(stored.wide(after.params)), strict=True):
            p, g, m, v = (np.asarray(x).astype(np.float64) for x in (p, g, m, v))
            g = g * min(1.0, 1.0 / norm)
            m, v = BETA1 * m + (1 - BETA1) * g, BETA2 * v + (1 - BETA2) * g * g
            decay = 0.0 if path[-1].key.endswith("norm") else DECAY
            p = p - LR * (m / (1 - BETA1 ** (t + 1)) / (np.sqrt(v / (1 - BETA2 ** (t + 1))) + EPS) + decay * p)
            for one, other in ((p_new, p), (m_new, m), (v_new, v)):
                one, other = np.asarray(one).astype(np.float64), nearest(other)
                assert np.all(np.abs(one - other) <= np.abs(other) * 2.0**-7)
                off, total = off + np.sum(one != other), total + one.size
    assert off <= 0.01 * total and total > 3000
    assert metrics[0].edq != 1


def _adam(state):
    """The state of Adam, wherever it is wrapped."""
    return next(x for x in jax.tree.leaves(state.opt_state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(x, "mu"))


# --- float16 has a scale, however it is rounded -----------------------------------------------------------------------------------------------

FLOAT16 = [f"precision.{part}=float16" for part in ("master_weights", "adam_m", "adam_v")]
STOCHASTIC = ("precision.master_rounding=stochastic", "precision.adam_rounding=stochastic")


def _one_update(*overrides):
    """(update over lr, v) of the first step of AdamW (no decay) at gradients of 1e-5."""
    params = {"embedding": jnp.ones((4, 300)), "layers": {"down": jnp.ones((2, 3, 5)), "mlp_norm": jnp.ones((2, 5))}}
    numbers = OptimizerNumbers(*(jnp.float32(x) for x in (1e-3, 0.9, 0.95, 1e-8, 0.0, 1.0)))
    chain = stored.optimizer("adamw", numbers, jax.tree.map(lambda _: jnp.float32(1e-3), params), jax.tree.map(lambda _: False, params),
                             trainer.policy("float32", *overrides), np.array([0, 5], np.uint32))
    with jax.numpy_dtype_promotion("standard"):
        gradients, state = jax.tree.map(lambda x: jnp.full(x.shape, 1e-5), params), chain.init(params)
        for _ in range(2):  # the second step reads what was stored
            updates, state = chain.update(gradients, state, params)
    inner = next(x for x in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "nu")) if hasattr(x, "nu"))
    v = jax.tree.map(lambda x: x.decode() if isinstance(x, QArray) else x.astype(jnp.float32), inner.nu, is_leaf=lambda x: isinstance(x, QArray))
    return tuple(np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (jax.tree.map(lambda u: u / -1e-3, updates), v))


@pytest.mark.parametrize("name", [pytest.param("float16", marks=pytest.mark.slow), "bfloat16"])
def test_small_second_moments_survive_stochastic_rounding(name):
    """v of gradients of 1e-5 is 1e-11 (1 - 0.95**2): below float16's smallest number, 6e-8. Adam's update stays the learning rate."""
    updates, v = _one_update(f"precision.adam_v={name}", "precision.adam_rounding=stochastic")
    np.testing.assert_allclose(v, 1e-10 * (1 - 0.95**2), rtol=2.0**-6)
    np.testing.assert_allclose(updates, 0.999, rtol=2.0**-6)


def test_scaled_state_false_is_plain_float16():
    """What was asked for: 1e-11 is raised to the smallest number, and the update is 60 times too small."""
    updates, v = _one_update("precision.adam_v=float16", "precision.adam_rounding=stochastic", "precision.scaled_state=false")
    assert set(v) == {np.float32(2.0**-24)} and np.max(updates) < 0.05


@pytest.mark.parametrize("more, digits", [((), 2.0**-10), (("precision.scaled_state=false",), 1.0)])
def test_small_float16_weights_keep_their_digits(more, digits):
    """Weights of 1e-7: 11 significant bits with a scale for each tensor of each layer, gains too; one at most without. At two bytes."""
    which = trainer.policy("float32", FLOAT16[0], STOCHASTIC[0], *more)
    rng = np.random.default_rng(3)
    params = {"embedding": rng.uniform(1e-7, 2e-7, (7, 8)), "layers": {"down": rng.uniform(1e-7, 2e-7, (2, 3, 5)), "mlp_norm": rng.uniform(1, 2, (2, 5))}}
    params["layers"]["down"][1] *= 1e5
    params = jax.tree.map(jnp.float32, params)
    on = stored.initial(params, which, np.array([0, 5], np.uint32))
    held = stored.held_params(on, which)
    _equal(stored.wide(held), on)
    assert state_bytes(held) <= 2 * sum(x.size for x in jax.tree.leaves(params)) + 8
    errors = [np.max(np.abs(a / b - 1)) for a, b in zip(jax.tree.leaves(on), jax.tree.leaves(params))]
    assert max(errors) <= digits and (not more or max(errors) > 0.1)


@pytest.mark.slow
def test_float16_state_trains_alike_packed_and_emulated():
    """Stochastic masters and moments with their scales: the same bits, and what bytes say."""
    (states, metrics), (others, more) = trained("float32", *FLOAT16, *STOCHASTIC), trained("float32", *FLOAT16, *STOCHASTIC, EMULATED)
    for one, other in zip(states, others):
        _equal(stored.wide(one.params), stored.wide(other.params))
    assert [float(m.loss) for m in metrics] == [float(m.loss) for m in more] and metrics[0].edq != 1
    assert all(leaf.dtype != jnp.float32 for leaf in jax.tree.leaves(states[-1].params))


# --- bytes ----------------------------------------------------------------------------------------------------------------------------------

# Bytes per parameter: weights, and what the optimizer keeps. The second words of weights are the optimizer's.
BYTES = {"bf16_state": (2, 4), "kahan": (2, 6), "collage_light": (2, 6), "collage_plus": (2, 8), "bf16_stochastic": (2, 4), "fp8_state": (1, 2),
         "adam8bit": (4, 2), "float16": (2, 8)}  # fmt: skip


@pytest.mark.parametrize("name", BYTES)
def test_state_has_the_size_of_its_format(name, tmp_path):
    """In memory and on disk, to 3 percent for scales, gains and counts; nothing of it is float32 that need not be. (Shapes alone: nothing is
    compiled.)"""
    model = dataclasses.replace(MODEL, num_layers=2, d_model=64, d_ff=176, vocab_size=256)
    structure = dataclasses.replace(STRUCTURE, model=model)
    shapes = jax.eval_shape(partial(step.init, structure), hyper(*PRESETS[name]))
    weights, moments = (state_bytes(tree) / model.num_params_total for tree in (shapes.params, shapes.opt_state))
    expected = BYTES[name]
    assert expected[0] <= weights <= expected[0] * 1.03 + 0.01 and expected[1] <= moments <= expected[1] * 1.03 + 0.02, (weights, moments)
    rng = np.random.default_rng(0)

    def noise(x):  # which no file compresses
        return np.frombuffer(rng.bytes(x.dtype.itemsize * int(np.prod(x.shape))), x.dtype).reshape(x.shape)

    state = jax.tree.map(noise, shapes)
    checkpoint.save(tmp_path, 1, state)
    files = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) / model.num_params_total
    assert sum(expected) * 0.97 <= files <= sum(expected) * 1.03 + 0.25, files
    leaves = jax.tree.leaves(shapes, is_leaf=lambda x: isinstance(x, QArray | BlockwiseArray))
    held = [leaf for leaf in leaves if isinstance(leaf, QArray | BlockwiseArray)]
    assert bool(held) == (name in ("fp8_state", "adam8bit"))


# --- what becomes of updates ----------------------------------------------------------------------------------------------------------------


def _quality(*overrides):
    _, metrics = trained(*overrides, lr=1e-4)
    return tuple(np.mean([float(getattr(m, name)) for m in metrics]) for name in ("edq", "lost", "updates_per_ulp"))


def test_descent_quality_tells_the_formats_apart():
    """Small updates of about a sixth of an ulp: nearest bfloat16 loses most of them, a second word and random rounding do not."""
    plain, light, random = (_quality(*PRESETS[name]) for name in ("bf16_state", "collage_light", "bf16_stochastic"))
    assert plain[0] < 0.9 and plain[1] > 0.3 and plain[2] < 0.5
    assert light[0] == pytest.approx(1, abs=0.02) and light[1] < 0.05
    assert random[0] == pytest.approx(1, abs=0.4) and random[1] > 0.3  # most stay, some move by a whole ulp
    assert _quality(*NEAREST)[0] < 0.9


@pytest.mark.slow
def test_descent_quality_of_what_loses_nothing():
    """Second words of the moments too; float32, in which a small update is a hundred ulps and more."""
    plus, exact = (_quality(*PRESETS.get(name, (name,))) for name in ("collage_plus", "float32"))
    assert plus[0] == pytest.approx(1, abs=0.02) and plus[1] < 0.05
    assert exact[0] == pytest.approx(1, abs=1e-3) and exact[1] < 1e-3 and exact[2] > 100


@pytest.mark.parametrize("name, bits", [("bfloat16", 7), ("float16", 10), ("float32", 23)])
def test_ulps_are_those_of_the_masters_format(name, bits):
    """Also of ScaledArrays, whose update the optimizer does not measure itself: 1.5 moved by 2**-9 (float32: 2**23 of them make 1)."""
    which = trainer.policy("float32", f"precision.master_weights={name}")
    before = {"embedding": jnp.full((4, 4), 1.5)}
    new = jax.tree.map(lambda x: x + 2.0**-9, before)
    found = jax.jit(lambda held: stored.quality((), before, new, held, jnp.int32(0), which))(stored.held_params(new, which))
    assert float(found.updates_per_ulp) == pytest.approx(2.0 ** (bits - 9), rel=1e-5)
    assert stored.loses_updates(which) == (name != "float32")


def test_records_say_nothing_of_updates_that_nothing_could_lose():
    """Float32 weights: edq and lost_updates are null, whatever the moments are; bfloat16 weights: the mean of the last quarter."""
    rows = [{"step": step, "edq": 0.5, "lost": 0.25, "updates_per_ulp": 8.0} for step in (1, 2)]
    specs = {name: trainer.config(f"precision={name}", "steps=1").precision for name in ("float32", "adam8bit", "bf16_state", "bf16_stochastic", "collage_light")}
    found = {name: describe.measured(spec, rows, None) for name, spec in specs.items()}
    for name, columns in found.items():
        expected = (None, None) if name in ("float32", "adam8bit") else (0.5, 0.25)
        assert (columns["edq"], columns["lost_updates"]) == expected and columns["updates_per_ulp"] == 8.0


def test_the_probe_counts_where_something_is_quantized():
    """A site that is exempt has no share of values that became zero; the others still have one. Where all are exempt there is none."""
    graphdef, found = decoder.blueprint(MODEL)[0], {}
    for name, places in {"one": "down: high", "all": "layer0: high"}.items():
        mine = hyper("int4", "model.num_layers=1", f"precision.exemptions={{{places}}}")
        probe = jax.jit(partial(step.probe, STRUCTURE, graphdef), compiler_options=CHEAP)
        found[name] = probe(_init(mine), TOKENS[0], mine)
    assert 0 < found["one"].underflow["weights"] < 1 and 0 <= found["one"].overflow["activations"] < 1
    assert np.isnan(found["one"].underflow["output_gradients"]) and all(np.isnan(x) for x in found["all"].underflow.values())
