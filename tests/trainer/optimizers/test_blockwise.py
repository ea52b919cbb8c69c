"""Block-wise dynamic 8-bit tensors against a literal transcription of bitsandbytes: its map, its blocks, its search among all levels."""
from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trainer.optimizers import blockwise8, state_bytes
from trainer.optimizers.blockwise import dynamic_map


def _create_dynamic_map(signed, max_exponent_bits=7, total_bits=8):
    """bitsandbytes/functional.py, with numpy for torch, in float64."""
    data = []
    non_sign_bits = total_bits - 1
    additional_items = 2 ** (non_sign_bits - max_exponent_bits) - 1
    for i in range(max_exponent_bits):
        fraction_items = int(2 ** (i + non_sign_bits - max_exponent_bits) + 1 if signed else 2 ** (i + non_sign_bits - max_exponent_bits + 1) + 1)
        boundaries = np.linspace(0.1, 1, fraction_items)
        means = (boundaries[:-1] + boundaries[1:]) / 2.0
        data += ((10 ** (-(max_exponent_bits - 1.0) + i)) * means).tolist()
        if signed:
            data += (-(10 ** (-(max_exponent_bits - 1.0) + i)) * means).tolist()
    assert additional_items == 0
    data.append(0)
    data.append(1.0)
    assert len(data) == 2**total_bits
    data.sort()
    return np.array(data, np.float32)


def _quantize(x, code, block=256):
    """codes, absmax, values: float32 scaling by the reciprocal, then argmin over exact distances to all 256 levels."""
    flat = x.reshape(-1)
    padded = np.zeros(-(-flat.size // block) * block, np.float32)
    padded[: flat.size] = flat
    blocks = padded.reshape(-1, block)
    absmax = abs(blocks).max(1)
    scaled = blocks * np.where(absmax == 0, np.float32(1), np.float32(1) / np.where(absmax == 0, 1, absmax).astype(np.float32))[:, None]
    codes = np.stack([np.argmin(abs(row.astype(np.float64)[:, None] - code.astype(np.float64)), axis=1) for row in scaled])
    values = (code[codes] * absmax[:, None]).reshape(-1)[: flat.size].reshape(x.shape)
    return codes.reshape(-1)[: flat.size], absmax, values


def _tensor(shape, signed: bool, seed=0):
    """Values over nine decades, some blocks' largest negative."""
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=shape) * 10 ** rng.uniform(-9, 0, shape)).astype(np.float32)
    return x if signed else abs(x)


@pytest.mark.parametrize("signed", [True, False])
def test_map_is_that_of_bitsandbytes(signed):
    code = dynamic_map(signed)
    np.testing.assert_array_equal(code, _create_dynamic_map(signed))
    assert code.size == 256 and code[-1] == 1 and (code[0] == 0) == (not signed)
    smallest = code[code > 0][0]
    assert smallest == np.float32(0.55e-6 if signed else 0.325e-6)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape", [(), (5,), (256,), (3, 7, 50), (1000,)])
def test_codes_and_values_are_those_of_the_search_among_all(signed, shape):
    x = _tensor(shape, signed)
    stored = jax.jit(blockwise8(signed).encode)(x)
    codes, absmax, values = _quantize(x, _create_dynamic_map(signed))
    np.testing.assert_array_equal(stored.codes, codes)
    np.testing.assert_array_equal(stored.absmax, absmax)
    np.testing.assert_array_equal(jax.jit(lambda s: s.decode())(stored), values)
    assert stored.nbytes == state_bytes(stored) == x.size + 4 * -(-x.size // 256)


@pytest.mark.parametrize("signed", [True, False])
def test_lookup_at_every_threshold_and_beside(signed):
    """All midpoints, the float32 next to them on either side, and levels: where a table could be off by one."""
    code = dynamic_map(signed).astype(np.float64)
    middles = ((code[:-1] + code[1:]) / 2).astype(np.float32)
    points = np.concatenate([middles, code.astype(np.float32), [np.float32(1e-30), np.float32(-1e-30)]])
    x = np.concatenate([points, np.nextafter(points, np.float32(2)), np.nextafter(points, np.float32(-2))])
    x = np.clip(x, -1 if signed else 0, 1).astype(np.float32)
    x = np.pad(x, (0, -x.size % 255)).reshape(-1, 255)
    x = np.concatenate([x, np.ones((x.shape[0], 1), np.float32)], axis=1)  # absmax 1 in each block
    np.testing.assert_array_equal(blockwise8(signed).encode(x).codes, _quantize(x, dynamic_map(signed))[0])


@pytest.mark.parametrize("signed", [True, False])
def test_stochastic_rounding_is_unbiased_between_neighbours(signed):
    fmt, num = blockwise8(signed), 4000
    x = np.concatenate([[1.0], _tensor((255,), signed, 1) * 0.2]).astype(np.float32)
    draw = jax.jit(jax.vmap(lambda key: fmt.encode(x, rounding="stochastic", key=key).decode()))
    keys = np.stack([np.arange(num), np.full(num, 7)], 1).astype(np.uint32)
    y = np.asarray(draw(keys), np.float64)
    level = dynamic_map(signed).astype(np.float64)
    low = np.searchsorted(level, x, side="right") - 1
    high = np.minimum(low + 1, 255)
    assert ((y == np.float32(level[low])) | (y == np.float32(level[high]))).all()
    part = np.where(high > low, (x - level[low]) / np.where(high > low, level[high] - level[low], 1), 0)
    error = (level[high] - level[low]) * np.sqrt(part * (1 - part) / num)
    assert (abs(y.mean(0) - x) <= 4.5 * error + 1e-7 * abs(x)).all()
    again = draw(keys[:2])
    np.testing.assert_array_equal(again, y[:2])
    assert (y[0] != y[1]).any()


def test_what_is_positive_stays_so():
    x = np.zeros(512, np.float32)
    x[:256] = np.geomspace(1e-12, 1.0, 256)
    for rounding, key in (("nearest_even", None), ("stochastic", np.array([1, 2], np.uint32))):
        encode = jax.jit(lambda x, keep, rounding=rounding, key=key: blockwise8(False).encode(x, rounding=rounding, key=key, keep_positive=keep),
                         static_argnums=1)
        kept, lost = (np.asarray(encode(x, keep).decode()) for keep in (True, False))
        assert (kept[:256] > 0).all() and (kept[256:] == 0).all() and (lost[:256] == 0).sum() > 50
        np.testing.assert_array_equal(kept[lost > 0], lost[lost > 0])
        assert set(kept[(lost == 0) & (x > 0)]) == {np.float32(0.325e-6)}


def test_nothing_is_made_up_of_what_is_not_finite():
    x = np.ones((4, 256), np.float32)
    x[0, 3], x[1, 3], x[2, 3] = np.nan, np.inf, -np.inf
    y = np.asarray(jax.jit(lambda x: blockwise8(True).encode(x).decode())(x))
    assert np.isnan(y[:3]).all() and (y[3] == 1).all()


def test_errors():
    with pytest.raises(ValueError, match="block=0 of blockwise8; accepted: a positive integer, 256 in the paper"):
        blockwise8(True, 0)
    with pytest.raises(ValueError, match="rounding='to_odd' with blockwise8; accepted: nearest_even, stochastic"):
        blockwise8(True).encode(jnp.ones(3), rounding="to_odd")
