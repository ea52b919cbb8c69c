"""Moments in few bits: the same training packed or not, at the size that the format says, around any optax transformation."""
from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import formats
from trainer.optimizers import blockwise8, low_precision_moments, low_precision_params, state_bytes

KEY = np.array([1, 2], np.uint32)
PAIRS = {
    "bfloat16": ("bfloat16", "bfloat16"), "float16": ("float16", formats.get("float16")),
    "fp8": (formats.scaled("float8_e4m3fn"), formats.scaled("float8_e5m2")),
    "blocks": ("mxfp8_e4m3", formats.scaled("float8_e4m3fn", "block", block=16)),
    "blockwise8": (blockwise8(True), blockwise8(False)), "m alone": ("nvfp4", None), "v alone": (None, blockwise8(False)),
}


@pytest.fixture(autouse=True)
def _promotion():
    """optax's bias correction raises a float to an int, which strict promotion (tests/conftest.py) forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def _params():
    rng = np.random.default_rng(0)
    return {"a": rng.normal(size=(16, 40)).astype(np.float32)}


def _train(transformation, steps=20):
    params = _params()
    target = jax.tree.map(lambda p: p[::-1], params)

    @jax.jit
    def run(params):
        def step(carry, t):
            params, state = carry
            grads = jax.tree.map(lambda p, q: (p - q) * (1 + 0.5 * jnp.sin(p * 40 + t)), params, target)
            updates, state = transformation.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, transformation.init(params)), jnp.arange(steps, dtype=jnp.float32))[0]

    return run(params)


@pytest.mark.parametrize("name", ["bfloat16", "fp8", "blocks", "blockwise8", "m alone"])
def test_packed_or_not_is_the_same_training(name):
    (m, v), rounding = PAIRS[name], "stochastic" if name in ("bfloat16", "fp8", "blockwise8") else "nearest_even"
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, b2=0.95))
    found = [_train(low_precision_moments(inner, m, v, rounding, KEY, packed)) for packed in (True, False)]
    jax.tree.map(np.testing.assert_array_equal, found[0][0], found[1][0])
    plain = _train(inner)[0]
    assert any((found[0][0][leaf] != plain[leaf]).any() for leaf in plain)
    for leaf in plain:
        assert np.mean(abs(found[0][0][leaf] - plain[leaf])) < 0.05


def test_sizes_are_those_of_codes_and_scales():
    params = {"a": np.zeros((16, 40), np.float32), "b": np.zeros(32, np.float32)}
    num = 16 * 40 + 32
    plain = state_bytes(optax.scale_by_adam().init(params))
    assert plain == 4 + 8 * num

    def size(pair, **options):
        state = jax.eval_shape(low_precision_moments(optax.scale_by_adam(), *pair, **options).init, params)
        return state_bytes(state) - 8  # two counts

    sizes = {name: size(pair) for name, pair in PAIRS.items()}
    assert sizes == {
        "bfloat16": 4 * num, "float16": 4 * num, "fp8": 2 * num + 4 * 4,  # a float32 scale for each of four tensors
        "blocks": num + 16 * 2 + 1 + num + 4 * (16 * 3 + 2),  # blocks of 32 with a byte, of 16 with four, along rows of 40
        "blockwise8": 2 * (num + 4 * (3 + 1)), "m alone": num // 2 + 16 * 3 + 2 + 2 * 4 + 4 * num, "v alone": 4 * num + num + 4 * (3 + 1),
    }
    state = low_precision_moments(optax.scale_by_adam(), *PAIRS["blockwise8"]).init(params)
    assert state_bytes(state) - 8 == sizes["blockwise8"] == sum(x.nbytes for tree in state.inner[1:] for x in tree.values())
    assert size(PAIRS["fp8"], packed=False) == 8 * num


def test_stochastic_draws_are_fresh_every_step_and_leaf():
    """m of a constant gradient, b1 = 0: the same value to round each time, between two bfloat16 values."""
    params = {"a": np.ones(1000, np.float32), "b": np.ones(1000, np.float32)}
    grads = jax.tree.map(lambda p: p * np.float32(1 + 2**-9), params)
    transformation = low_precision_moments(optax.scale_by_adam(b1=0.0), m="bfloat16", rounding="stochastic", key=jax.random.key(0))
    _, state = transformation.update(grads, transformation.init(params), params)
    _, later = transformation.update(grads, state, params)
    draws = [np.asarray(m, np.float32) > 1 for m in (state.inner.mu["a"], state.inner.mu["b"], later.inner.mu["a"])]
    for draw in draws:
        assert abs(draw.mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 1000)
    for other in draws[1:]:
        assert abs((draws[0] == other).mean() - 0.625) < 0.08


@pytest.mark.parametrize(("v", "rounding"), [
    ("float16", "nearest_even"), (formats.scaled("float8_e4m3fn"), "stochastic"), (formats.block("int8", 16, rule="rceil"), "nearest_even"),
    (blockwise8(False), "stochastic")], ids=["float16", "fp8", "int8 blocks", "blockwise8"])
def test_small_second_moments_stay_positive_and_updates_bounded(v, rounding):
    """Gradients over four decades that come every second step: a v that is stored as zero lets updates explode."""
    rng = np.random.default_rng(1)
    size = (10 ** rng.uniform(-4, 0, 2048) * 1e-2).astype(np.float32)
    inner = optax.scale_by_adam(b1=0.9, b2=0.95)

    def largest(keep):
        transformation = low_precision_moments(inner, v=v, rounding=rounding, key=KEY, keep_positive=keep)

        @jax.jit
        def run():
            def step(state, t):
                grads = size * jnp.cos(t * size * 1e4) * (t % 2)
                updates, state = transformation.update(grads, state)
                return state, jnp.max(jnp.abs(updates))

            return jax.lax.scan(step, transformation.init(size), jnp.arange(60, dtype=jnp.float32))

        state, updates = run()
        nu = state.inner.nu
        return float(updates.max()), np.asarray(nu.decode() if hasattr(nu, "decode") else nu.astype(jnp.float32))

    (kept, nu), (exploded, zeros) = largest(True), largest(False)
    assert kept < 3 and (nu > 0).all()
    assert exploded > 30 and (zeros == 0).mean() > 0.1


def test_moments_are_found_however_nested():
    inner = optax.chain(optax.identity(), optax.chain(optax.scale_by_adam(), optax.scale(-1.0)))
    transformation = low_precision_moments(inner, v="bfloat16")
    state = transformation.init(_params())
    assert state.inner[1][0].nu["a"].dtype == jnp.bfloat16 and state.inner[1][0].mu["a"].dtype == jnp.float32
    lion = low_precision_moments(optax.scale_by_lion(), m="bfloat16").init(_params())
    assert lion.inner.mu["a"].dtype == jnp.bfloat16


def test_members_with_learning_rates_of_their_own():
    """vmap over the whole of it, parameters and moments in few bits, against one at a time."""

    def member(lr, key):
        inner = low_precision_moments(optax.adamw(lr, b2=0.95), blockwise8(True), formats.scaled("float8_e5m2"), "stochastic", key)
        return _train(low_precision_params(inner, "bfloat16", "stochastic", key), 8)

    lrs, keys = np.float32([1e-3, 1e-2]), np.array([[1, 2], [3, 4]], np.uint32)
    together = jax.jit(jax.vmap(member))(lrs, keys)
    for i in range(2):
        alone = member(lrs[i], keys[i])
        jax.tree.map(lambda one, other, i=i: np.testing.assert_array_equal(one, other[i]), alone, together)


def test_traced_widths_when_not_packed():
    def member(man_bits):
        fmt = formats.minifloat(8, man_bits)
        return _train(low_precision_moments(optax.adam(1e-2), fmt, fmt, packed=False), 5)[0]

    some = jax.lax.map(member, np.int32([2, 7]))  # vmap would make no branch, see `apart`
    alone = _train(low_precision_moments(optax.adam(1e-2), "bfloat16", "bfloat16"), 5)[0]
    jax.tree.map(lambda one, other: np.testing.assert_array_equal(one[1], other), some, alone)


def test_errors_say_what_is_accepted():
    with pytest.raises(ValueError, match=r"m: format='int' is not known; accepted: .*; or blockwise8\(signed=True\)"):
        low_precision_moments(optax.adam(1e-3), m="int")
    with pytest.raises(ValueError, match=r"rounding='stochastic' with key=None draws no bits: give key=jax.random.key\(SEED\)"):
        low_precision_moments(optax.adam(1e-3), m="bfloat16", rounding="stochastic")
    with pytest.raises(ValueError, match="v='bfloat16' with a state that has no field nu, ScaleByLionState; accepted: transformations such as"):
        low_precision_moments(optax.scale_by_lion(), v="bfloat16").init(_params())
