"""AdamW in bfloat16: bit for bit a numpy transcription, in any loop that optax is used in."""
from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from tests.trainer.optimizers.adamw_bfloat16 import Adam
from trainer.optimizers import collage_adamw, round_bfloat16, state_bytes

VARIANTS = ("bfloat16", "kahan", "light", "plus")
STEPS, LR, B1, B2, EPS, DECAY = 50, 3e-4, 0.9, 0.999, 1e-8, 0.1
SHAPES = {"w": (6, 5), "deep": {"gain": (7,), "scalar": ()}}


@pytest.fixture(autouse=True)
def _promotion():
    """optax adds float32 updates to bfloat16 parameters, which JAX's strict promotion (tests/conftest.py) forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def _trees(seed: int, count: int, scale: float):
    """A tree of SHAPES with a leading dimension of count, float32 values on the bfloat16 grid."""
    rng = np.random.default_rng(seed)

    def leaf(shape):
        return (rng.normal(size=(count, *shape)) * scale).astype(ml_dtypes.bfloat16).astype(np.float32)

    return jax.tree.map(leaf, SHAPES, is_leaf=lambda s: isinstance(s, tuple))


PARAMS = jax.tree.map(lambda x: x[0], _trees(0, 1, 1.0))
GRADS = _trees(1, STEPS, 1e-2)
MASK = {"w": True, "deep": {"gain": False, "scalar": True}}


def _run(transformation, params, grads):
    """(params, state, states of every step) of a scan over the gradients."""

    @jax.jit
    def run(params, grads):
        def step(carry, grad):
            params, state = carry
            updates, state = transformation.update(grad, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), (params, state)

        return jax.lax.scan(step, (params, transformation.init(params)), grads)

    (params, state), every = run(params, grads)
    return params, state, every


@pytest.mark.parametrize(("variant", "dtype"), [*((variant, "bfloat16") for variant in VARIANTS), ("plus", "float32")])
def test_every_step_is_the_transcription(variant, dtype):
    params = jax.tree.map(lambda x: jnp.asarray(x).astype(dtype), PARAMS)
    lr = {"w": LR, "deep": {"gain": LR / 2, "scalar": LR * 4}}
    _, _, (thetas, states) = _run(collage_adamw(lr, B1, B2, EPS, DECAY, MASK, variant), params, GRADS)
    for path, theta in jax.tree_util.tree_leaves_with_path(PARAMS):
        name = jax.tree_util.keystr(path)
        grads, rate, decayed, theta_t, mu, nu = (_at(tree, path) for tree in (GRADS, lr, MASK, thetas, states.mu, states.nu))
        assert theta_t.dtype == dtype and mu.dtype == nu.dtype == jnp.bfloat16
        oracle = Adam(theta, variant)
        for t in range(STEPS):
            oracle.step(grads[t], rate, B1, B2, EPS, DECAY if decayed else 0.0)
            found = {"theta": theta_t[t], "m": mu[t], "v": nu[t]}
            if variant != "bfloat16":
                found["delta"] = _at(states.delta, path)[t]
            if variant == "plus":
                found["v_delta"] = _at(states.nu_delta, path)[t]
            for field, value in found.items():
                np.testing.assert_array_equal(np.float32(value), np.float32(getattr(oracle, field)), err_msg=f"{name} {field} step {t}")


def _at(tree, path):
    for key in path:
        tree = tree[key.key]
    return tree


def test_state_holds_bfloat16_and_nothing_else():
    sizes = {}
    num = sum(leaf.size for leaf in jax.tree.leaves(PARAMS))
    for variant in VARIANTS:
        state = collage_adamw(LR, variant=variant).init(PARAMS)
        assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype("bfloat16"), jnp.dtype("int32")}
        sizes[variant] = (state_bytes(state) - 4) / num
    assert sizes == {"bfloat16": 4, "kahan": 6, "light": 6, "plus": 8}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_updates_land_on_the_new_word_whatever_the_sizes(dtype):
    """Second words and updates from 2**-60 to 2**6 of the parameter, also ones that cancel it: bfloat16(params + u) is a bfloat16 value
    that, with the second word, is the sum to the precision of two words."""
    rng = np.random.default_rng(2)
    num = 20_000
    theta = rng.normal(size=num).astype(ml_dtypes.bfloat16).astype(np.float64)
    delta = (theta * np.exp2(-rng.uniform(9, 60, num))).astype(ml_dtypes.bfloat16).astype(np.float64)
    intended = theta * np.exp2(rng.uniform(-60, 6, num)) * rng.choice([-1, 1], num)
    intended[:5000] = -theta[:5000]
    # with betas of 0 the direction is g / |g|: the learning rate is the update
    intended = intended.astype(ml_dtypes.bfloat16).astype(np.float64)

    @jax.jit
    def step(theta, delta, rates):
        def one(theta, delta, rate):
            transformation = collage_adamw(rate, 0.0, 0.0, 0.0, 0.0, variant="light")
            state = transformation.init(theta)._replace(delta=delta)
            updates, state = transformation.update(jnp.ones_like(theta), state, theta)
            return optax.apply_updates(theta, updates), state.delta, updates

        return jax.vmap(one)(theta, delta, rates)

    new, second, updates = step(jnp.asarray(theta, dtype), jnp.asarray(delta, jnp.bfloat16), np.float32(-intended))
    assert updates.dtype == jnp.float32 and new.dtype == dtype
    new, second = np.asarray(new, np.float64), np.asarray(second, np.float64)
    np.testing.assert_array_equal(new, new.astype(ml_dtypes.bfloat16).astype(np.float64))
    exact = theta + delta + intended
    # where theta and the update cancel, what is left is the second word, exactly
    np.testing.assert_array_equal((new + second)[:5000], delta[:5000])
    # one rounding of the second word, which is at most an ulp of the largest number that took part
    assert (abs(new + second - exact) <= 2.0**-16 * (abs(theta) + abs(intended))).all()
    assert (abs(new + second - exact)[5000:] > 0).any()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_float32_parameters_give_their_lost_bits_to_the_second_word(dtype):
    params = jnp.asarray(np.random.default_rng(5).normal(size=100).astype(np.float32))
    state = collage_adamw(LR).init(params)
    theta = params.astype(jnp.bfloat16).astype(dtype)
    error = abs(np.asarray(theta, np.float64) + np.asarray(state.delta, np.float64) - np.asarray(params, np.float64))
    assert (error <= 2.0**-17 * abs(np.asarray(params))).all() and (np.asarray(state.delta, np.float32) != 0).mean() > 0.9


def test_tiny_updates_move_two_words_and_not_one():
    """500 updates of 1e-4 on a parameter of 1, which is 2**-8 from the next bfloat16 below. Two words have their end too: once the
    second is 2**-11, half its ulp is more than 1e-6, and the updates of that size are lost again."""
    moved = {}
    for variant in VARIANTS:

        @jax.jit
        def total(lr, variant=variant):
            params, state, _ = _run(collage_adamw(lr, b2=0.95, variant=variant), jnp.ones(8), jnp.ones((500, 8)))
            second = 0.0 if state.delta is None else state.delta.astype(jnp.float32)
            return jnp.mean(1 - params - second)

        moved[variant] = [float(total(lr)) for lr in (1e-4, 1e-6)]
    assert moved["bfloat16"] == [0, 0]
    for variant in ("kahan", "light", "plus"):
        assert moved[variant] == [pytest.approx(0.05, rel=0.03), 2.0**-11], variant


def test_chain_vmap_and_traced_numbers_change_no_bit():
    """optax.chain with clipping, vmap over members with learning rates and betas of their own, against one member at a time."""
    lrs, b2s = np.float32([1e-4, 1e-3, 1e-2]), np.float32([0.95, 0.99, 0.999])

    @jax.jit
    def member(lr, b2):
        numbers = {"b1": jnp.float32(B1), "eps": jnp.float32(EPS), "weight_decay": jnp.float32(DECAY)}
        transformation = optax.chain(optax.clip_by_global_norm(0.05), collage_adamw(lr, b2=b2, mask=MASK, variant="plus", **numbers))
        params, _, every = _run(transformation, PARAMS, GRADS)
        return params, every[0]

    together = jax.vmap(member)(lrs, b2s)
    for i, (lr, b2) in enumerate(zip(lrs, b2s, strict=True)):
        alone = member(lr, b2)
        for one, other in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
            np.testing.assert_array_equal(one, other[i])


def test_schedules_and_mask_functions():
    schedule = optax.linear_schedule(1e-2, 0.0, 4)
    transformation = collage_adamw(schedule, weight_decay=DECAY, mask=lambda params: MASK)
    _, _, (thetas, _) = _run(transformation, PARAMS, jax.tree.map(lambda g: g[:6], GRADS))
    w = np.asarray(thetas["w"])
    assert (w[3] != w[2]).any() and (w[5] == w[4]).all()
    oracle = Adam(PARAMS["deep"]["gain"], "light")  # not decayed
    for t in range(6):
        oracle.step(GRADS["deep"]["gain"][t], 1e-2 * max(0, 1 - t / 4), B1, B2, EPS, 0.0)
    np.testing.assert_array_equal(thetas["deep"]["gain"][5], np.float32(oracle.theta))


@pytest.mark.parametrize("variant", ["bfloat16", "light"])
def test_measured_quality_is_that_of_the_update(variant):
    state = _run(collage_adamw(1e-3, variant=variant, measure=True), PARAMS, GRADS)[1]
    edq, lost, ulps = (float(x) for x in state.quality)
    assert 0.01 < ulps < 0.1
    assert (edq > 0.98 and lost < 0.1) if variant == "light" else (edq < 0.1 and lost > 0.9)


def test_errors_say_what_is_accepted():
    with pytest.raises(ValueError, match="variant='medium' of collage_adamw; accepted: bfloat16, kahan, light, plus"):
        collage_adamw(LR, variant="medium")
    transformation = collage_adamw({"w": LR})
    state = transformation.init(PARAMS)
    with pytest.raises(ValueError, match="params=None in update of collage_adamw"):
        transformation.update(PARAMS, state)
    with pytest.raises(ValueError, match="learning_rate is a tree with structure .* accepted: one number, or a tree like the parameters"):
        transformation.update(PARAMS, state, PARAMS)


def test_rounding_to_bfloat16_survives_fusion():
    """A sum of many rounded sums under jit, where dropping one rounding changes the result."""
    x = jnp.asarray(np.random.default_rng(6).normal(size=(64, 100)).astype(np.float32))

    @jax.jit
    def total(x):
        acc = jnp.zeros(100)
        for row in x:
            acc = round_bfloat16(acc + round_bfloat16(row))
        return acc

    acc = np.zeros(100, ml_dtypes.bfloat16)
    for row in np.asarray(x):
        acc = acc + row.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(total(x), acc.astype(np.float32))
