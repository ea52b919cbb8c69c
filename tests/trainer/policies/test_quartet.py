"""What defines Quartet: an unbiased backward of the numbers that the forward saved, no value clipped in it, and the errors of its quantizers.

Shapes: N tokens, K inputs, M outputs.
"""
from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

import formats
import trainer
from tests.trainer.policies.networks import RULES, policy
from tests.trainer.policies.numpy_policies import Words, along, per_block, quest, rotated
from trainer.keys import streams
from trainer.operands import STREAMS, Use, narrow

N, K, M, NUM_KEYS = 64, 32, 96, 1000
ROLES = {"weights": "dgrad", "activations": "wgrad", "output_gradients": None}
BACKWARD = tuple(f"precision.{role}" + (f".{gemm}" if gemm else "") for role, gemm in ROLES.items())


@partial(jax.jit, static_argnums=2)
def _narrow(x, quantizer, use, key):
    return narrow(x, quantizer, use, None if key is None else streams(key, STREAMS), None, None, trainer.PrecisionPolicy())


def _arrays():
    rng = np.random.default_rng(3)
    shapes = ((N, K), (K, M), (N, M))
    return [(rng.standard_normal(s) * np.exp(rng.uniform(-1, 1, (s[0], 1)))).astype(np.float32) for s in shapes]


@jax.jit
def _gradients(keys, which, x, w, g):
    """dx, dw for every key."""
    return jax.lax.map(lambda key: jax.vjp(lambda x, w: trainer.linear(x, w, which, key), x, w)[1](g), keys, batch_size=50)


def _expected(x, w, g, rule="rround"):
    """dx, dw with exact products of the numbers that the forward saved: masked in the rotated domain, then rotated back."""
    x, w, g = (a.astype(np.float64) for a in (x, w, g))
    (x_q, x_mask), (w_q, w_mask) = quest(rotated(x, 1, 32), 1, rule), quest(rotated(w, 0, 32), 0, rule)
    return rotated(g @ w_q.T * x_mask, 1, 32), rotated(x_q.T @ g * w_mask, 0, 32)


def _scores(which):
    """Of dx and dw: z of every element's mean, and of the projection of whole gradients on what is expected."""
    x, w, g = _arrays()
    keys = np.random.default_rng(4).integers(0, 2**32, (NUM_KEYS, 2), dtype=np.uint32)
    for found, expected in zip(_gradients(keys, which, x, w, g), _expected(x, w, g)):
        found = np.asarray(found, np.float64)
        along_it = np.tensordot(found, expected, 2) / np.sum(expected**2) - 1
        z = (found.mean(0) - expected) / (found.std(0, ddof=1) / np.sqrt(NUM_KEYS))
        yield z, along_it.mean() / (along_it.std(ddof=1) / np.sqrt(NUM_KEYS))


def test_backward_is_unbiased():
    """No element's mean lies further off than the largest of that many standard normals does once in a thousand; they scatter as they
    should, and the size of the gradient is right to 4 standard errors (of 0.05 percent)."""
    for z, projection in _scores(policy("quartet")):
        assert np.max(np.abs(z)) < norm.isf(1e-3 / 2 / z.size)
        assert 0.8 < np.mean(z**2) < 1.2 and abs(projection) < 4


def test_without_three_quarters_it_is_biased():
    """The test above can fail: scales without the factor clip what lies above 6."""
    for z, projection in _scores(policy("quartet", *(f"{path}.pre_scale=1.0" for path in BACKWARD))):
        assert projection < -20 and np.mean(z**2) > 1.2


@pytest.mark.parametrize("dim", [0, 1])
def test_nothing_is_clipped_in_the_backward(dim):
    """In units of its scale the largest value of every block, rotated by numpy, lies in [3, 6); without the factor some are above 6."""
    _, _, g = _arrays()
    key, use = jnp.array([5, 6], jnp.uint32), Use("output_gradients", dim, 4)
    for pre_scale, low, high in ((0.75, 3.0, 6.0), (1.0, 4.0, 8.0)):
        which = policy("quartet", *(f"{path}.pre_scale={pre_scale}" for path in BACKWARD))
        values, scale = (np.asarray(a, np.float64) for a in _narrow(g, which.output_gradients.first, use, key)[:2])
        power = np.log2(scale * pre_scale)
        assert np.max(np.abs(power - np.rint(power))) < 1e-6 and np.max(np.abs(values)) == 6
        turned = rotated(g.astype(np.float64), dim, 32, before=Words(key).signs(32))
        top = per_block(turned / scale, along(dim, 32))
        assert low <= top.min() < low * 1.2 and high / 1.2 < top.max() < high
        assert np.max(np.abs(turned / scale - values)) < (2.0 if pre_scale == 0.75 else 2.01)  # less than the widest step, 4 to 6


# --- mean squared errors on Gaussian data (methods.md, 2.1) -------------------------------------------------------------------------------

GROUPS = 1 << 16


@jax.jit
def _block_errors(x, fmt, bits):
    y = formats.quantize(x, fmt, rounding="nearest_even" if bits is None else "stochastic", random_bits=bits)
    return jnp.mean(jnp.square(y - x), axis=1)


def _mse(fmt, spread: bool, stochastic=False):
    """Of Gaussian groups of 32, relative to the variance, and its standard error; spread: sigma log-uniform in [1, 2)."""
    rng = np.random.default_rng(6)
    sigma = np.exp2((np.arange(GROUPS)[:, None] + 0.5) / GROUPS * spread)
    x = (rng.standard_normal((GROUPS, 32)) * sigma).astype(np.float32)
    bits = rng.integers(0, 2**32, x.shape, dtype=np.uint32) if stochastic else None
    errors = np.asarray(_block_errors(x, fmt, bits), np.float64) / sigma[:, 0] ** 2
    return errors.mean(), errors.std() / np.sqrt(GROUPS)


PUBLISHED = {  # (preset, rounding or rule) -> the figure, and half a unit of its last digit
    ("quartet", "stochastic"): (2.82e-2, 5e-5), ("quartet_nearest", "nearest"): (1.39e-2, 5e-5), ("quartet", "rfloor"): (2.24e-2, 5e-5),
    ("quartet", "rround"): (1.34e-2, 5e-5), ("quartet", "rceil"): (1.55e-2, 5e-5), ("quartet", "exact"): (1.24e-2, 5e-5),
}  # fmt: skip


@pytest.mark.parametrize(("preset", "what"), PUBLISHED, ids=lambda name: name)
def test_errors_on_gaussian_data(preset, what):
    """The figures of the note: of the backward at sigma = 1, of the projection by rule averaged over sigma; to their digits and 4 standard
    errors."""
    which = policy(f"{preset} {what}" if what in RULES else preset)
    quantizer = which.weights.first if what in RULES else which.output_gradients.first
    found, error = _mse(quantizer.format, what in RULES, what == "stochastic")
    expected, digit = PUBLISHED[preset, what]
    assert abs(found - expected) < digit + 4 * error and error < 0.005 * expected, (found, error)


def test_projection_scales_and_mask():
    """Of weights that are rotated already: the numbers and the mask of the paper's projection, of which 0.5 to 5 percent are clipped."""
    _, w, _ = _arrays()
    turned = rotated(w.astype(np.float64), 0, 32).astype(np.float32)
    found = _narrow(turned, replace(policy("quartet").weights.first, transform=None), Use("weights", 0, 1), None)
    expected, mask = quest(turned.astype(np.float64), 0, "rround")
    np.testing.assert_allclose(np.asarray(found.values, np.float64) * found.scale, expected, rtol=1e-6, atol=1e-6)
    assert np.array_equal(found.inside, mask) and 0.005 < 1 - mask.mean() < 0.05

