"""What a scale comes from: statistics of the values, given numbers, histories, zero points; against numpy and published constants."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import formats
from tests.formats.oracle import bits_equal

X = np.random.default_rng(7).standard_normal((8, 256)).astype(np.float32)


def _uniform(x, scale, top):
    return np.clip(np.rint(x / scale), -top, top) * scale


@pytest.mark.parametrize(("levels", "multiple", "error"), [  # Max 1960, tables I and II, as clip / rms and relative squared error
    (2, 0.7979, 0.363), (4, 1.4935, 0.1188), (8, 2.0511, 0.0374), (16, 2.5139, 0.01154), (32, 2.9161, 3.50e-3), (64, 3.2766, 1.04e-3)])
def test_gaussian_clip_is_the_published_one(levels, multiple, error):
    grid = formats.codebook(np.linspace(-1, 1, levels))
    assert formats.gaussian_clip(grid) == pytest.approx(multiple, rel=5e-3)
    fmt = formats.scaled(grid, amax="rms")
    assert formats.gaussian_mse(fmt) == pytest.approx(error, rel=0.05)


def test_ternary_has_its_gaussian_clip():
    assert formats.gaussian_clip(formats.get("ternary")) == pytest.approx(1.2240, rel=5e-3)


def test_rms_percentile_and_mean_by_numpy():
    rms = np.sqrt((X.astype(np.float64) ** 2).mean(axis=1, keepdims=True))
    want = {"rms": 2.0 * rms, "std": 2.0 * X.astype(np.float64).std(axis=1, keepdims=True), "percentile": np.quantile(np.abs(X), 0.99, axis=1, keepdims=True), "absmean": np.abs(X).mean(axis=1, keepdims=True)}
    given = {"rms": 2.0, "std": 2.0, "percentile": 0.99, "absmean": None}
    for name, amax in want.items():
        _, scale = formats.split(X, formats.scaled("int4", "token", amax=name, amax_at=given[name]))
        np.testing.assert_allclose(scale, amax / 7, rtol=2e-6, err_msg=name)


def test_statistics_of_a_short_last_block_leave_out_its_filling():
    x = X[:, :100]
    _, scale = formats.split(x, formats.block("int4", 64, rule="exact", scale_format="float32", amax="absmean"))
    np.testing.assert_allclose(scale[:, 64], np.abs(x[:, 64:]).mean(axis=1) / 7, rtol=2e-6)


def test_bitnet_ternary_is_round_clip_by_the_mean():
    """BitNet b1.58, equations 1 to 3: round(w / mean |w|) clipped to -1 .. 1, times the mean."""
    fmt = formats.scaled("ternary", amax="absmean")
    gamma = np.abs(X).mean(dtype=np.float64)
    np.testing.assert_allclose(formats.quantize(X, fmt), _uniform(X, gamma, 1), rtol=1e-6)


@pytest.mark.parametrize("name", ["int3", "dybit4", "mxfp4"])
def test_mse_search_is_no_worse_than_any_candidate(name):
    """The chosen scale against each of the documented candidates, given outright."""
    element = formats.get(name) if name != "mxfp4" else formats.get("float4_e2m1fn")
    power = {"rule": "floor"} if name == "mxfp4" else {}
    searched, plain = (formats.scaled(element, "token", amax=amax, **power) for amax in ("mse", "current"))
    errors = ((np.asarray(formats.quantize(X, searched)) - X) ** 2).sum(axis=1)
    amax = np.abs(X).max(axis=1, keepdims=True)
    for i in range(-40, 9):
        tried = ((np.asarray(formats.quantize(X, plain, amax=amax * np.float32(2.0 ** (i / 16)))) - X) ** 2).sum(axis=1)
        assert (errors <= tried * (1 + 1e-5)).all()
    assert errors.sum() < (1 + 1e-6 * bool(power)) * ((np.asarray(formats.quantize(X, plain)) - X) ** 2).sum()


def test_given_scales_and_amax():
    fmt = formats.scaled("int8", "token")
    scale = np.full((8, 1), 0.03125, np.float32)
    np.testing.assert_array_equal(formats.quantize(X, fmt, scale=scale), _uniform(X, 0.03125, 127))
    amax = np.full((8, 1), 127 * 0.0625, np.float32)
    np.testing.assert_array_equal(formats.quantize(X, fmt, amax=amax), _uniform(X, 0.0625, 127))
    assert bits_equal(formats.encode(X, fmt, scale=scale).decode(), formats.quantize(X, fmt, scale=scale)).all()


def test_delayed_scales_come_from_explicit_state():
    """TransformerEngine's recipe: scale by the history's maximum, then push this step's amax."""
    fmt = formats.scaled("float8_e4m3fn")

    def step(history, x):
        amax = jnp.max(jnp.abs(x))
        y = formats.quantize(x, fmt, amax=history.get(amax))
        return history.push(amax), y

    sizes = np.array([1.0, 4.0, 2.0, 8.0, 1.0], np.float32)
    tensors = jnp.asarray(X[0] / np.abs(X[0]).max() * sizes[:, None])
    history, rounded = jax.lax.scan(step, formats.amax_history(2), tensors)
    for y, x, amax in zip(rounded, tensors, [1, 1, 4, 4, 8], strict=True):  # of the two steps before
        np.testing.assert_array_equal(y, formats.quantize(x, fmt, amax=jnp.float32(amax)))
    np.testing.assert_array_equal(history.amax, [1, 8])
    assert history.get(0.0, "most_recent") == 1 and history.push(jnp.float32(np.nan)).amax[0] == 1
    np.testing.assert_array_equal(history.merge(formats.AmaxHistory(jnp.array([3.0, 3.0]))).amax, [3, 8])


def test_zero_points_by_numpy():
    """Asymmetric uint4: code = round(x / s) + z with s = (max - min) / 15, z = round(-min / s); zero itself is exact."""
    x = np.concatenate([X + 2, np.zeros((8, 1), np.float32)], axis=1)
    low, high = np.minimum(x.min(axis=1, keepdims=True), 0), np.maximum(x.max(axis=1, keepdims=True), 0)
    scale = (high - low) / np.float32(15)
    zero = np.clip(np.rint(-low / scale), 0, 15)
    want = (np.clip(np.rint(x * (1 / scale)) + zero, 0, 15) - zero) * scale
    fmt = formats.scaled("uint4", "token", zero_point=True)
    got = np.asarray(formats.quantize(x, fmt))
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert (got[:, -1] == 0).all()
    stored = formats.encode(x, fmt)
    np.testing.assert_array_equal(stored.zero_points, zero)
    errors = [np.square(np.asarray(formats.quantize(x, f)) - x).mean() for f in (fmt, formats.scaled("int4", "token"))]
    assert errors[0] < 0.5 * errors[1]


def test_pre_scale_keeps_every_block_from_clipping():
    """Quartet: amax in [6, 8) times 2**k would clip at 6 2**k; after 3/4 it does not, and stochastic rounding has no bias."""
    x = X * np.exp2(np.arange(8, dtype=np.float32))[:, None]
    plain, scaled = formats.block("float4_e2m1fn", 32), formats.block("float4_e2m1fn", 32, pre_scale=0.75)
    key = jnp.array([5, 6], jnp.uint32)
    draws = jax.vmap(lambda k: formats.quantize(x, scaled, rounding="stochastic", key=k))(jnp.stack([key + i for i in range(2000)]).astype(jnp.uint32))
    mean, spread = np.asarray(draws, np.float64).mean(axis=0), np.asarray(draws, np.float64).std(axis=0)
    assert (np.abs(mean - x) <= 5 * spread / np.sqrt(2000) + 1e-6 * np.abs(x)).all()
    inside = jax.vjp(lambda x: formats.quantize(x, plain, gradient="clipped"), jnp.asarray(x))[1](jnp.ones_like(x))[0]
    assert (np.asarray(inside) == 0).any()
    inside = jax.vjp(lambda x: formats.quantize(x, scaled, gradient="clipped"), jnp.asarray(x))[1](jnp.ones_like(x))[0]
    assert (np.asarray(inside) == 1).all()


@pytest.mark.parametrize(("make", "complaint"), [
    (lambda: formats.scaled("int4", amax="max"), "amax='max' must be one of current, percentile, rms, std, absmean, mse"),
    (lambda: formats.scaled("int4", amax="percentile", amax_at=99.9), "amax_at=99.9 with amax='percentile' must be above 0 and at most 1"),
    (lambda: formats.scaled("int4", amax_at=2.0), "amax_at=2.0 goes with amax='rms', 'std' or 'percentile'"),
    (lambda: formats.scaled("int4", pre_scale=-1), "pre_scale=-1 must be a positive number"),
    (lambda: formats.scaled("int4", two_level=True), "two_level=True needs granularity='block'"),
    (lambda: formats.scaled("int4", rule="floor", zero_point=True), "zero_point=True needs an integer element"),
    (lambda: formats.scaled("nf4", rule="even"), "rule='even' rounds to the mantissa bits"),
    (lambda: formats.block("int4", (4, 4)), r"block=\(4, 4\) with axis=-1"),
    (lambda: formats.quantize(jnp.ones(4), "int4", scale=jnp.float32(1)), "amax and scale need a format with scales"),
    (lambda: formats.quantize(jnp.ones(32), "mxfp4", scale=jnp.ones(1)), "scale= needs a format with rule='exact'"),
    (lambda: formats.codebook([1.0, 0.0]), "must be 2 to 256 increasing float32 numbers"),
    (lambda: formats.lns(8, 0), "gamma=0 must be an integer from 1 to 4096"),
    (lambda: formats.dybit(9), "bits=9 must be an integer from 2 to 8"),
    (lambda: formats.amax_history(0), "length=0 must be a positive integer"),
    (lambda: formats.quantize(jnp.ones(4), "int4", sr_bits=4), "sr_bits=4 with sr_rule='full'"),
    (lambda: formats.quantize(jnp.ones(4), "int4", sr_bits=4, sr_rule="A"), "sr_bits=4 needs rounding='stochastic'"),
    (lambda: formats.mode_number("stochastic"), "only nearest_even, .* can be traced"),
])
def test_what_does_not_fit_is_refused_in_one_line(make, complaint):
    with pytest.raises(ValueError, match=complaint) as refusal:
        make()
    assert "\n" not in str(refusal.value)
