"""Codes of 1 to 8 bits in bytes: a little-endian bit stream along the last dimension.

Code i of a row takes bits i * width ... of the row's bytes, least significant first: two 4-bit codes are low | high << 4 in one byte,
four 6-bit codes fill three.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jax import lax


def pack(codes, width: int):
    """uint8 [..., ceil(n * width / 8)] of codes uint8 [..., n], each below 2**width."""
    count = codes.shape[-1]
    if width == 8 or codes.size == 0:
        return codes[..., : -(-count * width // 8)]
    group = 8 // math.gcd(8, width)
    filled = -(-count // group) * group
    if filled != count:
        codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, filled - count)])
    if width in (2, 4):
        word, dtype = (4, jnp.uint32) if width == 2 else (2, jnp.uint16)
        words = lax.bitcast_convert_type(codes.reshape(*codes.shape[:-1], filled // word, word), dtype)
        folded = words
        for place in range(1, word):
            folded = folded | (words >> dtype(place * (8 - width)))
        return folded.astype(jnp.uint8)
    codes = codes.reshape(*codes.shape[:-1], filled // group, group).astype(jnp.uint32)
    size = group * width // 8
    packed = jnp.stack([_byte(codes, width, place) for place in range(size)], axis=-1)
    return packed.reshape(*packed.shape[:-2], -1)[..., : -(-count * width // 8)]


def _byte(codes, width: int, place: int):
    """Byte `place` of each group of codes [..., group]."""
    byte = jnp.zeros(codes.shape[:-1], jnp.uint32)
    for i in range(codes.shape[-1]):
        shift = i * width - 8 * place
        if -width < shift < 8:
            code = codes[..., i]
            byte = byte | (code << np.uint32(shift) if shift >= 0 else code >> np.uint32(-shift))
    return byte.astype(jnp.uint8)


def unpack(packed, width: int, count: int):
    """uint8 [..., count]: the inverse of `pack`."""
    if width == 8:
        return packed[..., :count]
    if packed.size == 0:
        return jnp.zeros((*packed.shape[:-1], count), jnp.uint8)
    if width in (2, 4):
        word, dtype, mask = (4, jnp.uint32, 0x03030303) if width == 2 else (2, jnp.uint16, 0x0F0F)
        wide = packed.astype(dtype)
        spread = wide
        for place in range(1, word):
            spread = spread | (wide << dtype(place * (8 - width)))
        codes = lax.bitcast_convert_type(spread & dtype(mask), jnp.uint8)
        return codes.reshape(*packed.shape[:-1], -1)[..., :count]
    group = 8 // math.gcd(8, width)
    size = group * width // 8
    filled = -(-count // group) * size
    packed = jnp.pad(packed, [(0, 0)] * (packed.ndim - 1) + [(0, filled - packed.shape[-1])])
    data = packed.reshape(*packed.shape[:-1], filled // size, size).astype(jnp.uint32)
    codes = jnp.stack([_code(data, width, i) for i in range(group)], axis=-1)
    return codes.reshape(*codes.shape[:-2], -1)[..., :count]


def _code(data, width: int, i: int):
    """Code i of each group of bytes [..., size]."""
    first, shift = divmod(i * width, 8)
    code = data[..., first] >> np.uint32(shift)
    if shift + width > 8:
        code = code | (data[..., first + 1] << np.uint32(8 - shift))
    return (code & np.uint32(2**width - 1)).astype(jnp.uint8)
