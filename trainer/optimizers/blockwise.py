"""Block-wise 8-bit tensors for optimizer state: dynamic (tree) quantization, absmax of every 256 values of the flattened tensor.

Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization", arXiv 2110.02861, section 2; the map is `create_dynamic_map` of
bitsandbytes, which torchao uses too. Seven decades, 10**-6 to 1, share the codes: decade i has 2**i levels on each side of zero
(signed) or 2**(i+1) (unsigned), the middles of as many equal parts of [0.1, 1] times the decade. 0 and 1 are levels; -1 is not, so
a block whose largest magnitude is negative has it stored as 0.993 of itself.

A value is looked up by the top 16 bits of its float32 pattern: no two thresholds share them, so a table says the code at their
beginning and, in the low 16 bits, the threshold beyond which it is the next. That is exact (it is built from, and tested against,
the search among all levels) and costs one gather, where comparing with all levels costs about a hundred copies of the tensor.
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from formats.noise import random_bits

_DECADES = 7
_LOWEST, _HIGHEST = 0x3300, 0x3F80  # top 16 bits of magnitudes: 2**-25, below every threshold, and 1
_SPAN = _HIGHEST - _LOWEST + 1
_NO_THRESHOLD = 0xFFFF
_ROUNDINGS = ("nearest_even", "stochastic")
_LARGEST_SCALE = np.float32(2.0**126)  # whose reciprocal is a normal float32


@cache
def dynamic_map(signed: bool) -> np.ndarray:
    """The 256 levels, increasing, float32, rounded from float64 (bitsandbytes makes them in float32: some differ in the last bit)."""
    levels = [0.0, 1.0]
    for i in range(_DECADES):
        edges = np.linspace(0.1, 1.0, 2 ** (i if signed else i + 1) + 1)
        middles = 10.0 ** (i - _DECADES + 1) * (edges[:-1] + edges[1:]) / 2
        levels.extend([*middles, *-middles] if signed else middles)
    return np.sort(np.array(levels)).astype(np.float32)


def _nearest(x: np.ndarray, signed: bool) -> np.ndarray:
    """Codes of the nearest levels, by searching float64 midpoints (exact, since levels are float32); the lower one of two."""
    levels = dynamic_map(signed).astype(np.float64)
    return np.searchsorted((levels[:-1] + levels[1:]) / 2, x.astype(np.float64), side="left")


def _below(x: np.ndarray, signed: bool) -> np.ndarray:
    """Codes of the largest levels not above x, 0 where all are, 254 at most: the lower ends of intervals."""
    return np.clip(np.searchsorted(dynamic_map(signed), x, side="right") - 1, 0, 254)


@cache
def _table(signed: bool, search) -> np.ndarray:
    """int32[2 * _SPAN], for positive then negative values by their top 16 bits: code at the beginning << 16 | the last low 16 bits that
    have it."""
    top = np.concatenate([np.arange(_LOWEST, _HIGHEST + 1), np.arange(_LOWEST, _HIGHEST + 1) + 0x8000]).astype(np.uint32) << 16

    def codes(low):
        return search((top | low.astype(np.uint32)).view(np.float32), signed).astype(np.int64)

    first, last = codes(np.zeros_like(top)), codes(np.full_like(top, 0xFFFF))
    assert (np.abs(last - first) <= 1).all() and first.max() <= 255
    low, high = np.zeros(top.shape, np.int64), np.full(top.shape, 0xFFFF)  # codes(low) == first; codes(high) == last
    for _ in range(16):
        middle = (low + high + 1) // 2
        same = codes(middle) == first
        low, high = np.where(same, middle, low), np.where(same, high, middle - 1)
    return (first << 16 | np.where(first == last, _NO_THRESHOLD, low)).astype(np.int32)


def _lookup(normed, signed: bool, search):
    """int32 codes of float32 values in about [-1, 1], as `search` finds them."""
    bits = lax.bitcast_convert_type(normed, jnp.int32)
    place = jnp.clip(((bits >> 16) & 0x7FFF) - _LOWEST, 0, _SPAN - 1)
    place = jnp.where(bits < 0, place + _SPAN, place)
    entry = jnp.asarray(_table(signed, search)).at[place].get(mode="promise_in_bounds")
    # beyond +-1 by an ulp (the reciprocal's) is the last place, which has no threshold
    step = ((bits & 0xFFFF) > (entry & 0xFFFF)).astype(jnp.int32)
    return (entry >> 16) + jnp.where(bits < 0, -step, step)


@partial(jax.tree_util.register_dataclass, data_fields=("codes", "absmax"), meta_fields=("format", "shape"))
@dataclass(frozen=True)
class BlockwiseArray:
    """A float32 tensor of `shape` as it is stored: codes uint8 [n], its flattened values' places in the map, and absmax float32
    [ceil(n / block)]. A pytree of two arrays, so it passes jit, vmap, scan and checkpoints as it is."""

    codes: jax.Array
    absmax: jax.Array
    format: Blockwise8
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales: 1 + 4 / block for each value."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in (self.codes, self.absmax))

    def decode(self):
        """float32 values of `shape`: map[code] * absmax."""
        levels = jnp.asarray(dynamic_map(self.format.signed)).at[self.codes.astype(jnp.int32)].get(mode="promise_in_bounds")
        values = self.format.cut(levels) * self.absmax[:, None]
        return values.reshape(-1)[: self.codes.size].reshape(self.shape)


@dataclass(frozen=True)
class Blockwise8:
    """A format of whole tensors, made by `blockwise8`. signed: map with negative levels (first moments) or without (second ones)."""

    signed: bool
    block: int = 256

    def cut(self, flat):
        """[n] -> [blocks, block], filled up with zeros."""
        return jnp.pad(flat, (0, -flat.shape[0] % self.block)).reshape(-1, self.block)

    def encode(self, x, *, rounding="nearest_even", key=None, keep_positive=False) -> BlockwiseArray:
        """x (float32, float16, bfloat16; any shape) as stored. A block with NaN or infinity is NaN, absmax and all; one of zeros has
        absmax 0. Negative values of an unsigned format are 0.

        rounding: "nearest_even" is to the nearest level, of two the lower one (no level is even); "stochastic" goes to one of the two
        around it, unbiased between the end levels; key: uint32[2] or PRNG key, used by stochastic alone. keep_positive: a positive
        value never becomes 0, but the first level, 3.25e-7 absmax (unsigned) or 5.5e-7 absmax. ValueError for other roundings.
        """
        if rounding not in _ROUNDINGS:
            raise ValueError(f"rounding={rounding!r} with blockwise8; accepted: {', '.join(_ROUNDINGS)}")
        blocks = self.cut(jnp.asarray(x).astype(jnp.float32).reshape(-1))
        absmax = jnp.max(jnp.abs(blocks), axis=1, initial=0.0)
        absmax = jnp.where(jnp.isfinite(absmax), jnp.minimum(absmax, _LARGEST_SCALE), np.float32(np.nan))
        # as bitsandbytes: the reciprocal once a block; the barrier keeps XLA from making it once a value
        absmax, inverse = lax.optimization_barrier((absmax, jnp.where(absmax == 0, np.float32(1.0), 1.0 / absmax)))
        normed = blocks * inverse[:, None]
        codes = self._drawn(normed, key) if rounding == "stochastic" else _lookup(normed, self.signed, _nearest)
        if keep_positive:
            zero = int(np.flatnonzero(dynamic_map(self.signed) == 0)[0])
            codes = jnp.where((codes == zero) & (blocks > 0), zero + 1, codes)
        size = math.prod(jnp.shape(x))
        return BlockwiseArray(codes.astype(jnp.uint8).reshape(-1)[:size], absmax, self, tuple(jnp.shape(x)))

    def _drawn(self, normed, key):
        """Codes after stochastic rounding; bits belong to the place in the flattened tensor."""
        code, levels = _lookup(normed, self.signed, _below), jnp.asarray(dynamic_map(self.signed))
        low, high = (levels.at[code + up].get(mode="promise_in_bounds") for up in (0, 1))
        part = (normed - low) / (high - low)
        drawn = (random_bits(key, normed.shape) >> 8).astype(jnp.float32) * np.float32(2.0**-24)  # uniform in [0, 1)
        return code + (drawn < part).astype(jnp.int32)


def blockwise8(signed: bool, block: int = 256) -> Blockwise8:
    """Block-wise dynamic 8-bit quantization of whole flattened tensors; signed for first moments, unsigned for second ones. Not a
    `formats` format, whose blocks lie along dimensions. ValueError for a block that is not a positive integer."""
    if not isinstance(block, int) or isinstance(block, bool) or block < 1:
        raise ValueError(f"block={block!r} of blockwise8; accepted: a positive integer, 256 in the paper")
    return Blockwise8(bool(signed), block)
