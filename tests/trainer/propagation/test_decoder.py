"""The built-in decoder under scale propagation: the same training as without, bit for bit where powers of two move, and in float16."""
from __future__ import annotations

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import trainer
from trainer import ScaledArray, build, propagate_scales, scaled, step, unscaled
from trainer import model as decoder
from trainer.propagation import calibrate, is_scaled

VOCABULARY = 64
TINY = ["model=2k", "steps=1000", "batch_size=4", "seq_len=16", "schedule.warmup_steps=5"]
STRUCTURED = ["model.scan_layers=true", "model.remat=true", "accumulate=2"]


@functools.cache
def _setting(*overrides):
    """(structure, hyper, graphdef, tokens by step)."""
    config = trainer.config(*TINY, *overrides)
    structure = build.step_structure(config, VOCABULARY)
    # A chain that goes round, with a step that depends on the window: there is something to learn.
    start = np.random.default_rng(0).integers(0, VOCABULARY, (100, config.batch_size, 1))
    stride = np.random.default_rng(1).integers(1, 5, (100, config.batch_size, 1))
    tokens = (start + stride * np.arange(config.seq_len + 1)) % VOCABULARY
    return structure, jax.tree.map(jnp.asarray, build.hyper(config)), decoder.blueprint(structure.model)[0], tokens.astype(np.int32)


def _gradients(structure, hyper, graphdef, policy=None):
    return lambda params, tokens: step.loss_and_gradients(structure, graphdef, params, tokens, policy or hyper.policy, hyper.key)


@functools.cache
def _carried():
    """The compiled gradients of the structured decoder with scales carried, from ScaledArray parameters, as arrays."""
    structure, hyper, graphdef, _ = _setting("precision=float32", *STRUCTURED)
    carried = propagate_scales(_gradients(structure, hyper, graphdef), on_fallback="raise")
    return jax.jit(lambda params, tokens: unscaled(carried(params, tokens)))


def _distance(a, b) -> float:
    """Norm of the difference over the norm of a."""
    squares = [(np.sum((np.asarray(x, np.float64) - np.asarray(y, np.float64)) ** 2), np.sum(np.asarray(x, np.float64) ** 2))
               for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)]  # fmt: skip
    return float(np.sqrt(sum(d for d, _ in squares) / sum(n for _, n in squares)))


@pytest.mark.slow
def test_gradients_equal_the_plain_ones_at_each_of_100_steps():
    """Scan, remat and gradient accumulation; every step starts from the plain trajectory."""
    structure, hyper, graphdef, tokens = _setting("precision=float32", *STRUCTURED)
    plain = jax.jit(_gradients(structure, hyper, graphdef))
    update = jax.jit(lambda state, t: step.step(structure, graphdef, state, t, hyper)[0])
    state = jax.jit(lambda: step.init(structure, hyper))()
    for t in tokens:
        (loss, grads), (loss_carried, grads_carried) = plain(state.params, t), _carried()(scaled(state.params), t)
        assert _distance(grads, grads_carried) <= 1e-6
        assert abs(float(loss) - float(loss_carried)) <= 1e-6
        state = update(state, t)


@pytest.mark.slow
def test_training_with_carried_scales_runs_beside_the_plain_one():
    """100 free-running steps of the trainer's own step: losses within 1e-4."""
    structure, hyper, graphdef, tokens = _setting("precision=float32", *STRUCTURED)
    losses = {}
    for dtype in (None, "float32"):
        mine = replace(hyper, policy=replace(hyper.policy, data_dtype=dtype))
        state = jax.jit(lambda h: step.init(structure, h))(mine)
        _, metrics = jax.jit(lambda s, t, h: jax.lax.scan(lambda s, t: step.step(structure, graphdef, s, t, h), s, t))(state, tokens, mine)
        losses[dtype] = np.asarray(metrics.loss)
    assert losses[None][-1] < losses[None][0] - 0.5, "it trains"
    np.testing.assert_allclose(losses["float32"], losses[None], atol=1e-4, rtol=0)


@pytest.mark.slow
def test_powers_of_two_move_freely_between_the_data_and_the_scale_of_parameters():
    structure, _, _, tokens = _setting("precision=float32", *STRUCTURED)
    carried = _carried()
    params = scaled(decoder.init_params(structure.model, jax.random.key(3)))
    reference = jax.tree.leaves(carried(params, tokens[0]))
    rng = np.random.default_rng(0)

    def move(x, k):
        return ScaledArray(np.ldexp(x.data, k), x.exponent - k)

    leaves, tree = jax.tree.flatten(params, is_leaf=is_scaled)
    for far in (2, 8, 60, 100):
        steps = [int(k) for k in rng.integers(-far, far + 1, len(leaves))]
        moved = carried(jax.tree.unflatten(tree, map(move, leaves, steps)), tokens[0])
        for a, b in zip(reference, jax.tree.leaves(moved), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("preset, state", [pytest.param("fp16_scaled", {}, marks=pytest.mark.slow), pytest.param("fp8_scaled", {}, marks=pytest.mark.slow),
                                            pytest.param("fp8_scaled_fp16_state", {"mu", "nu", "params"}, marks=pytest.mark.slow)])
def test_presets_train_as_float32_does(preset, state):
    """Their state has the dtypes that they say, and 100 steps get as far as float32 gets."""
    final = {}
    for name in ("float32", preset):
        structure, hyper, graphdef, tokens = _setting(f"precision={name}")
        begun = jax.jit(lambda h, s=structure: step.init(s, h))(hyper)
        ended, metrics = jax.jit(lambda s, t, h, g=graphdef, st=structure: jax.lax.scan(lambda s, t: step.step(st, g, s, t, h), s, t))(begun, tokens, hyper)
        final[name] = float(np.mean(metrics.loss[-10:]))
        assert final[name] < float(metrics.loss[0]) - 0.5
    assert abs(final[preset] - final["float32"]) < 0.1
    adam = next(s for s in jax.tree.leaves(ended.opt_state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(s, "mu"))
    for name, tree in (("mu", adam.mu), ("nu", adam.nu), ("params", ended.params)):
        narrow = {leaf.dtype == jnp.float16 for leaf in jax.tree.leaves(tree, is_leaf=is_scaled) if is_scaled(leaf)}
        assert narrow == ({True} if name in state else set())
    if state:
        assert ended.params["layers"]["qkv"].exponent.shape == (structure.model.num_layers,)


@pytest.mark.slow
@pytest.mark.parametrize("source", ["propagated", "current", "delayed", "static"])
def test_one_policy_runs_with_every_source_of_scales(source):
    """Two steps of fp8 data under carried scales: losses near each other, whatever the source."""
    structure, hyper, graphdef, tokens = _setting("precision=fp8_scaled", f"precision.source={source}", "accumulate=2")
    state = jax.jit(lambda h: step.init(structure, h))(hyper)
    state, metrics = jax.jit(lambda s, t, h: jax.lax.scan(lambda s, t: step.step(structure, graphdef, s, t, h), s, t))(state, tokens[:2], hyper)
    plain_structure, plain, plain_graph, _ = _setting("precision=float32")
    want = step.step(plain_structure, plain_graph, step.init(plain_structure, plain), tokens[0], plain)[1]
    assert abs(float(metrics.loss[0]) - float(want.loss)) < 0.02
    assert abs(float(metrics.grad_norm[0]) / float(want.grad_norm) - 1) < 0.05
    assert set(state.histories) == ({"weights", "activations", "output_gradients"} if source == "delayed" else set())
    if source == "delayed":
        seen = state.histories["activations"].amax
        assert np.all(np.asarray(seen[:2]) > 0) and not np.any(np.asarray(seen[2:]))


@pytest.mark.slow
@pytest.mark.parametrize("source", ["current", "static", "none"])
def test_carried_scales_quantize_as_plain_ones(source):
    """Gradients under fp8_scaled with a source that looks at values are as near to float32's as those of fp8 with it, and nearer to them than
    both are to float32; also where the scale says little of the data, as "static" of 1 / tokens and "none" do of output gradients."""
    found = {}
    for preset, options in (("float32", ()), ("fp8", (f"precision.source={source}",)), ("fp8_scaled", (f"precision.source={source}",))):
        structure, hyper, graphdef, tokens = _setting(f"precision={preset}", *options, "batch_size=16")
        state = step.init(structure, hyper)
        found[preset] = jax.jit(lambda s, t, h, st=structure, g=graphdef: step._observe(st, g, s, t, h, None, None)[1])(state, tokens[0], hyper)
    of_format = _distance(found["float32"], found["fp8"])
    assert _distance(found["float32"], found["fp8_scaled"]) < 1.1 * of_format
    assert 0 < _distance(found["fp8"], found["fp8_scaled"]) < 0.9 * of_format


@pytest.mark.slow
def test_blocks_under_a_propagated_scale():
    """granularity=block: the blocks have scales of their own, relative to what is carried."""
    structure, hyper, graphdef, tokens = _setting("precision=fp8_scaled", "precision.granularity=block", "precision.two_level=true", "precision.pad=true")
    plain_structure, plain, plain_graph, _ = _setting("precision=float32")
    params = decoder.init_params(structure.model, jax.random.key(0))
    loss, grads = jax.jit(_gradients(structure, hyper, graphdef))(params, tokens[0])
    want = jax.jit(_gradients(plain_structure, plain, plain_graph))(params, tokens[0])
    assert abs(float(loss) - float(want[0])) < 0.02
    assert _distance(want[1], grads) < 0.15


@pytest.mark.slow
def test_a_calibrated_decoder_stays_near_unit_scale():
    """What rescale="auto" finds in the decoder by the rules of primitives alone, in float16: few places, and nothing beyond the limits."""
    structure, hyper, graphdef, tokens = _setting("precision=float32")
    params = decoder.init_params(structure.model, jax.random.key(0))
    plan = calibrate(_gradients(structure, hyper, graphdef), params, tokens[0], data_dtype="float16", threshold=10)
    assert len(plan.places) <= 2 * structure.model.num_layers
    assert -10 <= plan.remaining[0] <= plan.remaining[1] <= 10
