"""Rescales by hand: which statistic is brought to [1, 2), on which of the two passes, for each leading index; and the fewest that keep drifting data near."""
from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.trainer.propagation.harness import value
from trainer import ScaledArray, propagate_scales
from trainer.propagation import calibrate, rescale

STATISTICS = {"rms": lambda x: np.sqrt(np.mean(x * x)), "amax": lambda x: np.max(np.abs(x)), "mean_abs": lambda x: np.mean(np.abs(x))}
X = np.random.default_rng(0).standard_normal((3, 40)).astype(np.float32)


def at(data, exponent=0):
    return ScaledArray(jnp.asarray(data, jnp.float32), jnp.asarray(exponent, jnp.int32))


@pytest.mark.parametrize("by", STATISTICS)
def test_the_statistic_is_brought_to_unit_scale(by):
    got = propagate_scales(lambda x: rescale(x * x * 1000.0, by=by))(at(X, 40))
    assert 1 <= STATISTICS[by](np.float64(got.data)) < 2
    np.testing.assert_array_equal(value(got), np.ldexp(np.float64(X * X * np.float32(1000.0)), 80))


@pytest.mark.parametrize("by", STATISTICS)
def test_each_leading_index_by_itself(by):
    rows = X * np.float32([[1.0], [2.0**-20], [2.0**30]])
    got = propagate_scales(jax.vmap(lambda x: rescale(x * 3.0, by=by)))(at(rows, [0, 5, -7]))
    assert got.exponent.shape == (3,)
    for data in np.float64(got.data):
        assert 1 <= STATISTICS[by](data) < 2
    np.testing.assert_array_equal(value(got), np.ldexp(np.float64(rows * np.float32(3.0)), np.int32([[0], [5], [-7]])))


@pytest.mark.parametrize("on, forward, backward", [("forward", True, False), ("cotangent", False, True), ("both", True, True)])
def test_the_pass_that_is_named(on, forward, backward):
    """What comes out of the forward and of the backward pass has unit scale where it was rescaled, and what it had otherwise."""

    def passes(on):
        def run(x, g):
            y, pull = jax.vjp(lambda x: (x if on is None else rescale(x, by="amax", on=on)) * 2.0**20, x)
            return y, pull(g)[0]

        return propagate_scales(run)(at(X), at(X * X))

    plain, rescaled = passes(None), passes(on)
    for before, after, moved in zip(plain, rescaled, (forward, backward)):
        np.testing.assert_array_equal(value(before), value(after))
        assert 1 <= np.max(np.abs(after.data)) < 2 if moved else int(after.exponent) == int(before.exponent)


def test_outside_the_transform_it_is_nothing():
    np.testing.assert_array_equal(jax.jit(lambda x: rescale(x, on="both"))(X), X)


@pytest.mark.parametrize("key, wrong, accepted", [("by", "median", "rms, amax, mean_abs"), ("on", "backward", "forward, cotangent, both")])
def test_a_wrong_choice_is_named(key, wrong, accepted):
    with pytest.raises(ValueError, match=f"rescale: {key}='{wrong}'; accepted: {accepted}"):
        rescale(X, **{key: wrong})


@pytest.mark.parametrize("products, places", [(2, 0), (5, 1), (8, 2)])
def test_calibration_places_the_fewest_rescales(products, places):
    """Each product loses 4.3 powers of two, or a few more, which no exponent knows: within 2^-12, every third one needs a rescale."""

    def program(x):
        y = x
        for number in range(products):
            y = y * jnp.exp((-3.0 - number / 64) * x)
        return y

    x = at(np.ones(4))
    plan = calibrate(program, x, threshold=12)
    assert len(plan.places) == places
    assert (plan.drift[0] < -12) == bool(places)
    assert -12 <= plan.remaining[0] <= plan.remaining[1] <= 12
    got = propagate_scales(program, rescale=plan)(x)
    np.testing.assert_allclose(value(got), np.exp(-sum(3.0 + number / 64 for number in range(products))), rtol=1e-5)
    assert propagate_scales(program, rescale=plan).report(x).rescales == places
