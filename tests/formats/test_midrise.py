"""Uniform levels without a zero, against a codebook of the same levels and against published errors."""
from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import formats


def _x(bits: int) -> np.ndarray:
    """Levels, middles and numbers an ulp beside them, far ones, zeros and subnormals."""
    points = np.arange(-(2**bits) - 4, 2**bits + 5, dtype=np.float32) / 4
    near = [np.nextafter(points, np.float32(s), dtype=np.float32) for s in (-np.inf, np.inf)]
    rest = np.random.default_rng(bits).standard_normal(500).astype(np.float32) * 2.0 ** (bits - 2)
    return np.concatenate([points, *near, rest, np.array([0.0, -0.0, 1e-40, -1e-40, 1e-9, -1e-9, 1e30, -1e30, np.inf, -np.inf, np.nan], np.float32)])


@pytest.mark.parametrize("mode", [mode.value for mode in formats.Rounding if mode.value != "stochastic_equal"])
@pytest.mark.parametrize("bits", [1, 2, 3, 6])
def test_rounds_as_the_codebook_of_its_levels(bits, mode):
    levels = formats.codebook(np.arange(2**bits) - 2 ** (bits - 1) + 0.5)
    x = _x(bits)
    more = {"random_bits": formats.random_bits(jax.random.key(1), x.shape)} if mode == "stochastic" else {}
    got = np.asarray(formats.quantize(x, formats.midrise(bits), rounding=mode, **more))
    want = np.asarray(formats.quantize(x, levels, rounding=mode, **more))
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(("bits", "clip", "error"), [  # QuEST's multiples of the standard deviation, and the errors that methods.md lists
    (1, 0.7979, 0.363), (2, 1.4935, 0.1188), (3, 2.0511, 0.0374), (4, 2.5139, 0.01154), (5, 2.9161, 3.50e-3), (6, 3.2766, 1.04e-3)])
def test_published_clips_and_errors(bits, clip, error):
    assert formats.gaussian_clip(formats.midrise(bits)) == pytest.approx(clip, rel=5e-3)
    assert formats.gaussian_mse(formats.scaled(formats.midrise(bits), amax="rms", amax_at=clip)) == pytest.approx(error, rel=3e-2)


def test_widths_may_be_traced_and_codes_round_trip():
    x = _x(4)
    by_width = jax.jit(lambda x, bits: formats.quantize(x, formats.midrise(bits)))
    for bits in (1, 3, 5):
        np.testing.assert_array_equal(by_width(x, jnp.int32(bits)), formats.quantize(x, f"midrise{bits}"))
        stored = formats.encode(x[:-1], f"midrise{bits}")
        np.testing.assert_array_equal(stored.decode(), formats.quantize(x[:-1], f"midrise{bits}"))
    assert formats.describe(formats.midrise(5))["name"] == "midrise5"
    for bits in (0, 17, 2.5):
        with pytest.raises(ValueError, match="bits="):
            formats.midrise(bits)
