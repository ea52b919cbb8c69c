"""Parameters that live on a format: every update lands on it exactly, nearest rounding stalls, stochastic rounding is unbiased."""
from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import formats
from trainer.optimizers import low_precision_params, round_params

FP8 = formats.scaled("float8_e4m3fn", rule="rceil")
KEY = jax.random.key(3)


@pytest.fixture(autouse=True)
def _promotion():
    """optax adds float32 updates to bfloat16 parameters and divides by integers, which strict promotion (tests/conftest.py) forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def _params(seed=0, size=1.0):
    rng = np.random.default_rng(seed)
    return {"a": (rng.normal(size=(16, 32)) * size).astype(np.float32), "b": {"c": (rng.normal(size=50) * size).astype(np.float32)}}


def _stepper(transformation):
    """A compiled (params, grads, state) -> (new params, updates, new state)."""

    @jax.jit
    def step(params, grads, state):
        updates, state = transformation.update(grads, state, params)
        return optax.apply_updates(params, updates), updates, state

    return step


CASES = {  # format, dtype of the parameters, rounding
    "bfloat16": ("bfloat16", "float32", "nearest_even"), "bfloat16 arrays": ("bfloat16", "bfloat16", "stochastic"),
    "float16 arrays": ("float16", "float16", "nearest_even"),
    "fp8 in bfloat16": (FP8, "bfloat16", "stochastic"), "mxfp8": ("mxfp8_e4m3", "float32", "stochastic"),
    "int8": (formats.scaled("int8", rule="floor"), "float32", "nearest_even"),
}


@pytest.mark.parametrize("case", CASES)
def test_params_plus_update_is_the_rounded_parameter(case):
    """Updates from nothing to all of the parameters; and the rounded parameters, updated by zero, are what they were."""
    fmt, dtype, rounding = CASES[case]
    quantize = jax.jit(lambda x: formats.quantize(x, fmt))
    params = jax.tree.map(lambda p: jnp.asarray(p).astype(dtype), round_params(_params(), fmt))
    transformation = low_precision_params(optax.sgd(1.0), fmt, rounding, KEY)
    step, state = _stepper(transformation), transformation.init(params)
    for size in (1e-3, 0.1, 1.0):
        new, updates, state = step(params, _params(1, size), state)
        for leaf, update in zip(jax.tree.leaves(new), jax.tree.leaves(updates), strict=True):
            assert leaf.dtype == dtype and update.dtype == jnp.float32
            np.testing.assert_array_equal(quantize(leaf.astype(jnp.float32)), leaf.astype(jnp.float32))
        if rounding == "nearest_even":
            wanted = jax.tree.map(lambda p, g: quantize(p.astype(jnp.float32) - g), params, _params(1, size))
            jax.tree.map(lambda one, other: np.testing.assert_array_equal(one.astype(jnp.float32), other), new, wanted)
        for _ in range(3):
            again, _, state = step(new, _params(1, 0.0), state)
            jax.tree.map(np.testing.assert_array_equal, again, new)
        params = new


def test_exact_scales_are_refused_for_what_they_do():
    """The reason for power-of-two scales: old + (new - old) misses values of 24 bits."""
    exact = formats.scaled("float8_e4m3fn")
    old = formats.quantize(_params()["a"], exact)
    new = formats.quantize(old * 0.9 + 0.1 * _params(1)["a"], exact)
    assert np.mean(np.asarray(old + (new - old)) != np.asarray(new)) > 0.005
    with pytest.raises(ValueError, match="format with rule='exact', .* accepted: power-of-two scales such as formats.scaled"):
        low_precision_params(optax.sgd(1.0), exact)


@pytest.mark.parametrize(("fmt", "spacing"), [("bfloat16", 2.0**-7), (FP8, 2.0**-3)], ids=["bfloat16", "fp8"])
def test_stochastic_rounding_is_unbiased_and_fresh(fmt, spacing):
    """Mean over 2000 members, each with its key, of one update: within 4 standard errors of the exact sum, and independent between
    leaves and steps."""
    num = 2000
    params = {"a": np.full(64, 1.5, np.float32), "b": np.full(64, 1.5, np.float32)}
    params["a"][0] = params["b"][0] = 1.75  # amax
    grads = {name: np.append(0, np.linspace(0.02, 0.98, 63) * spacing).astype(np.float32) for name in params}
    keys = np.stack([np.arange(num), np.full(num, 11)], 1).astype(np.uint32)

    @jax.jit
    @jax.vmap
    def updates_of(key):
        transformation = low_precision_params(optax.sgd(1.0), fmt, "stochastic", key)
        first, state = transformation.update(grads, transformation.init(params), params)
        second, _ = transformation.update(grads, state, params)
        return first, second

    first, second = updates_of(keys)
    for update in (first["a"], first["b"], second["a"]):
        update = np.asarray(update, np.float64)
        error = update.std(0) / np.sqrt(num)
        assert (abs(update.mean(0) + grads["a"]) <= 4 * error + 1e-7).all() and (error[1:] > 0).all()
        assert set(np.unique(update)) == {0.0, -spacing}
    centred = [np.asarray(u) - np.asarray(u).mean(0) for u in (first["a"], first["b"], second["a"])]
    for other in centred[1:]:
        correlation = (centred[0] * other).mean(0)[1:] / np.maximum((centred[0].std(0) * other.std(0))[1:], 1e-30)
        assert abs(correlation).max() < 5 / np.sqrt(num)


def test_plain_bfloat16_stalls_where_stochastic_rounding_moves():
    moved = {}
    for rounding in ("nearest_even", "stochastic"):
        transformation = low_precision_params(optax.adamw(1e-5, weight_decay=0.0), "bfloat16", rounding, KEY, measure=True)
        params = jnp.ones(4096, jnp.bfloat16)

        @jax.jit
        def run(params, transformation=transformation):
            def step(carry, _):
                params, state = carry
                updates, state = transformation.update(jnp.ones_like(params), state, params)
                return (optax.apply_updates(params, updates), state), state.quality

            return jax.lax.scan(step, (params, transformation.init(params)), length=200)

        (params, _), quality = run(params)
        moved[rounding] = 1 - float(jnp.mean(params.astype(jnp.float32)))
        edq = float(jnp.mean(quality.edq))
        if rounding == "nearest_even":
            assert moved[rounding] == 0 and edq == 0 and (quality.lost == 1).all()
        else:
            # 4096 * 200 draws of probability 1e-5 / 2**-8: 4 standard errors are 7 %
            assert moved[rounding] == pytest.approx(2e-3, rel=0.07) and edq == pytest.approx(1, abs=0.07) and (quality.lost > 0.9).all()
        np.testing.assert_allclose(quality.updates_per_ulp[0], 1e-5 * 2**7, rtol=1e-3)


def test_formats_by_leaf_and_widths_traced():
    params = _params()

    def by_name(path, leaf):
        del leaf
        return FP8 if path[-1].key == "a" else None

    transformation = low_precision_params(optax.sgd(0.125), by_name)
    new, updates, _ = _stepper(transformation)(params, _params(1), transformation.init(params))
    np.testing.assert_array_equal(formats.quantize(new["a"], FP8), new["a"])
    np.testing.assert_array_equal(updates["b"]["c"], -0.125 * _params(1)["b"]["c"])

    def member(man_bits):
        fmt = formats.minifloat(8, man_bits)
        start = round_params(params, fmt)
        transformation = low_precision_params(optax.sgd(0.125), fmt, measure=True)
        updates, state = transformation.update(_params(1), transformation.init(start), start)
        return start, optax.apply_updates(start, updates), state.quality.updates_per_ulp

    start, new, ulps = jax.jit(jax.vmap(member))(np.int32([3, 7, 23]))
    for i, bits in enumerate((3, 7, 23)):
        np.testing.assert_array_equal(start["a"][i], formats.quantize(params["a"], formats.minifloat(8, bits)))
        exact = np.asarray(start["a"][i]) - np.float32(0.125) * _params(1)["a"]
        np.testing.assert_array_equal(new["a"][i], formats.quantize(exact, formats.minifloat(8, bits)))
    np.testing.assert_allclose(ulps[2] / ulps[1], 2.0**16, rtol=0.02)


def test_errors_say_the_fix():
    with pytest.raises(ValueError, match=r"rounding='stochastic' with key=None draws no bits: give key=jax.random.key\(SEED\), or a uint32\[2\]"):
        low_precision_params(optax.sgd(1.0), "bfloat16", "stochastic")
    with pytest.raises(ValueError, match="rounding='random' must be one of nearest_even"):
        low_precision_params(optax.sgd(1.0), "bfloat16", "random")
    with pytest.raises(ValueError, match="format='bf16' is not known; accepted: "):
        low_precision_params(optax.sgd(1.0), "bf16")
    with pytest.raises(ValueError, match="format=Codebook of parameters has values of 24 bits, .* accepted: floats and integers"):
        low_precision_params(optax.sgd(1.0), "nf4")
    transformation = low_precision_params(optax.sgd(1.0), "bfloat16")
    with pytest.raises(ValueError, match="params=None in update of low_precision_params; accepted: the parameters"):
        transformation.update(_params(), transformation.init(_params()))
