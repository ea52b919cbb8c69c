"""Effective descent quality against float64 numpy, over sizes of updates whose squares no float32 holds."""
from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from trainer.optimizers import descent_quality, grow


def _bfloat16(x):
    return np.asarray(x).astype(ml_dtypes.bfloat16)


def _expected(intended, before, after, man_bits=7):
    """edq, lost, geometric mean of |dtheta| / ulp, in float64 over flattened arrays."""
    d, old, new = (np.asarray(x, np.float64).reshape(-1) for x in (intended, before, after))
    hat = new - old
    both = (d != 0) & (old != 0)
    ulp = 2.0 ** (np.floor(np.log2(abs(old[both]))) - man_bits)
    return d @ hat / (d @ d), np.mean((d != 0) & (hat == 0)), np.exp(np.mean(np.log(abs(d[both]) / ulp)))


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e-3, 1.0, 1e20])
def test_against_float64(size):
    rng = np.random.default_rng(0)
    before = {"a": _bfloat16(rng.normal(size=(50, 40)) * size * 50), "b": _bfloat16(rng.normal(size=7) * size * 50)}
    intended = {name: (rng.normal(size=x.shape) * size).astype(np.float32) for name, x in before.items()}
    intended["b"][0], before["a"][0, 0] = 0, 0
    after = {name: _bfloat16(x.astype(np.float32) + intended[name]) for name, x in before.items()}
    found = jax.jit(descent_quality)(intended, before, after)
    flat = [np.concatenate([np.asarray(tree[name], np.float64).reshape(-1) for name in "ab"]) for tree in (intended, before, after)]
    for one, other in zip(found, _expected(*flat), strict=True):
        assert one.dtype == jnp.float32
        np.testing.assert_allclose(one, other, rtol=2e-5)
    assert 0 < found.lost < 0.5


def test_second_words_count():
    """An expansion underwent its update though its first word did not move."""
    theta, update = jnp.ones(64), jnp.full(64, 1e-4)
    first, second = grow(theta, jnp.zeros(64), jnp.asarray(_bfloat16(update)).astype(jnp.float32))
    assert (first == 1).all()
    one = descent_quality(update, theta, first)
    two = descent_quality(update, theta, first, second_before=jnp.zeros(64), second_after=second)
    assert float(one.edq) == 0 and float(one.lost) == 1
    assert float(two.edq) == pytest.approx(1, abs=2**-8) and float(two.lost) == 0


def test_bits_for_each_leaf_and_none():
    before, intended = {"a": jnp.full(3, 1.5), "b": jnp.full(5, 3.0)}, {"a": jnp.full(3, 0.25), "b": jnp.full(5, 0.25)}
    after = jax.tree.map(jnp.add, before, intended)
    # ulps of 1.5 with 2 bits and of 3 with 1 bit: 1/4 and 1, ratios of 1 and 1/4
    assert float(descent_quality(intended, before, after, man_bits=[2, 1]).updates_per_ulp) == pytest.approx(4 ** (-5 / 8))
    assert float(descent_quality(intended, before, after, man_bits=[2, None]).updates_per_ulp) == pytest.approx(1)
    assert np.isnan(descent_quality(intended, before, after, man_bits=None).updates_per_ulp)


def test_no_update_has_no_quality_and_one_second_word_is_refused():
    zero = jnp.zeros(4)
    quality = descent_quality(zero, jnp.ones(4), jnp.ones(4))
    assert np.isnan(quality.edq) and float(quality.lost) == 0 and np.isnan(quality.updates_per_ulp)
    with pytest.raises(ValueError, match="second_before and second_after must be given together"):
        descent_quality(zero, zero, zero, second_before=zero)
