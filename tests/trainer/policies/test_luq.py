"""What defines LUQ: gradients on powers of two, unbiased also below the smallest, none clipped; and the clipping of its integers."""
from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import minimize_scalar
from scipy.stats import norm

from tests.trainer.policies.networks import policy
from tests.trainer.policies.numpy_policies import INT4_MULTIPLE
from trainer.keys import streams
from trainer.operands import STREAMS, Use, narrow

NUM_KEYS = 4000
USE = Use("output_gradients", 1, 4)


def _gradient():
    """Over fourteen octaves alike, of which the lower eight lie below the smallest level."""
    rng = np.random.default_rng(13)
    return (np.exp2(rng.uniform(-14, 0, (24, 24))) * rng.choice([-1, 1], (24, 24))).astype(np.float32)


@jax.jit
def _rounded(g, which, keys):
    def one(key):
        found = narrow(g, which.output_gradients.first, USE, streams(key, STREAMS), None, None, which)
        return found.values * found.scale

    return jax.vmap(one)(keys)


def test_gradients_are_unbiased_powers_of_two():
    g, keys = _gradient(), np.random.default_rng(14).integers(0, 2**32, (NUM_KEYS, 2), dtype=np.uint32)
    found = np.asarray(_rounded(g, policy("luq"), keys), np.float64)
    size = np.abs(g.astype(np.float64))
    alpha = size.max() / 2.0**6  # 2^3 codes of an exponent, one of them zero, leave seven levels
    levels = np.unique(np.abs(found)) / alpha
    np.testing.assert_allclose(levels, [0, 1, 2, 4, 8, 16, 32, 64], rtol=1e-6)
    assert np.all(found[:, size == size.max()] == g[size == size.max()])  # the largest is kept, so nothing is clipped
    # Each goes to one of the two levels around it: the variance is known, (x - low) (high - x), and the mean is x.
    low = np.where(size < alpha, 0, alpha * np.exp2(np.floor(np.log2(np.maximum(size, alpha) / alpha * (1 + 1e-6)))))
    high = np.where(size < alpha, alpha, 2 * low)
    deviation = np.sqrt(np.maximum((size - low) * (high - size), 0) / NUM_KEYS)
    between, below = size < size.max(), size < alpha
    assert 0.3 < below.mean() < 0.7
    for of in (below, between & ~below):
        rare = (NUM_KEYS * np.minimum(size - low, high - size) / np.maximum(high - low, 1e-30) < 20) & of  # too few draws for a normal mean
        z = ((found.mean(0) - g) / np.maximum(deviation, 1e-30))[of & ~rare]
        assert z.size > 60 and np.max(np.abs(z)) < norm.isf(1e-3 / 2 / z.size) and abs(np.mean(z**2) - 1) < 4 * (2 / z.size) ** 0.5
    everything = np.abs(found[:, below]).sum(1)  # also the rarest, in one sum
    assert abs(everything.mean() - size[below].sum()) < 4 * np.sqrt(np.sum(deviation[below] ** 2))
    assert np.all((np.abs(found) <= high * (1 + 1e-6)) & (np.abs(found) >= low * (1 - 1e-6)))


def test_integers_are_clipped_where_the_error_is_least():
    """The multiple of the RMS that 15 levels from -7 to 7 want for Gaussian data, by integrating the squared error; to the search's steps
    of 2^(1/500). (The paper's own, 12.1 rms - 12.2 mean|x|, is 2.366 there.)"""
    def error(multiple):
        step = multiple / 7
        edges = (np.arange(-6, 8) - 0.5) * step
        low, high = np.r_[-np.inf, edges], np.r_[edges, np.inf]
        level = np.arange(-7, 8) * step
        weight, mean = norm.cdf(high) - norm.cdf(low), norm.pdf(low) - norm.pdf(high)
        return 1 - 2 * np.sum(level * mean) + np.sum(level**2 * weight)

    best = minimize_scalar(error, bounds=(1.5, 4), method="bounded", options={"xatol": 1e-6})
    which = policy("luq")
    for operand in (which.weights, which.activations):
        assert abs(np.log2(float(operand.first.format.amax_at) / best.x)) < 1 / 500 + 1e-4
        assert np.float32(INT4_MULTIPLE) == operand.first.format.amax_at
        x = np.random.default_rng(15).standard_normal((256, 256)).astype(np.float32)
        found = narrow(x, operand.first, Use("weights", 0, 1), None, None, None, which)
        mse = np.mean((np.asarray(found.values * found.scale, np.float64) - x) ** 2)
        assert abs(mse / best.fun - 1) < 0.03 and np.max(np.abs(found.values)) == 7  # 4 standard errors of 65536 squared errors


def test_forward_takes_no_key():
    """Two keys, one y: random are gradients alone."""
    which = policy("luq")
    assert not any(q.stochastic for q in (which.weights.first, which.activations.first)) and which.output_gradients.first.stochastic
    g = jnp.asarray(_gradient())
    assert not np.array_equal(*_rounded(g, which, jnp.array([[1, 2], [1, 3]], jnp.uint32)))
