"""Packing against a plain Python big integer as bit stream: every width, odd lengths, leading dimensions, vmap."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from formats import packing

SHAPES = [(1,), (5,), (24,), (3, 37), (2, 1, 8), (0, 5), (2, 0)]


def big_integer_stream(codes, width: int):
    """uint8 [..., ceil(n * width / 8)]: each row as one integer, code i at bit i * width, in little-endian bytes."""
    size = -(-codes.shape[-1] * width // 8)
    packed = np.zeros((*codes.shape[:-1], size), np.uint8)
    for row in np.ndindex(*codes.shape[:-1]):
        stream = sum(int(code) << (i * width) for i, code in enumerate(codes[row]))
        packed[row] = np.frombuffer(stream.to_bytes(size, "little"), np.uint8)
    return packed


@pytest.mark.parametrize("width", range(1, 9))
def test_every_width_and_length_is_the_bit_stream(width):
    rng = np.random.default_rng(width)
    for shape in SHAPES:
        codes = rng.integers(0, 2**width, shape).astype(np.uint8)
        packed = packing.pack(jnp.asarray(codes), width)
        assert packed.dtype == jnp.uint8
        np.testing.assert_array_equal(packed, big_integer_stream(codes, width))
        back = packing.unpack(packed, width, shape[-1])
        assert back.dtype == jnp.uint8
        np.testing.assert_array_equal(back, codes)


@pytest.mark.parametrize("width", [1, 2, 3, 4, 6])
def test_vmap_and_jit_pack_row_by_row(width):
    codes = np.random.default_rng(0).integers(0, 2**width, (5, 2, 19)).astype(np.uint8)
    packed = jax.jit(jax.vmap(lambda rows: packing.pack(rows, width)))(jnp.asarray(codes))
    np.testing.assert_array_equal(packed, big_integer_stream(codes, width))
    back = jax.jit(jax.vmap(lambda rows: packing.unpack(rows, width, 19)))(packed)
    np.testing.assert_array_equal(back, codes)
