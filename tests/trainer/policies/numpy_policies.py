"""Low-precision linear layers in numpy float64, written from the equations of the papers. Of the code under test they take the random words
alone: key and salts are documented there, what is done with the words is done here.

A policy is a function (x [N, K], w [K, M], words) -> (y [N, M], backward), backward(g [N, M]) -> (dx [N, K], dw [K, M]). A quantizer is a
function (tensor [A, B], axis, draw) -> the numbers that it stands for; axis is contracted, draw(shape) gives uint32 words.
"""
from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from scipy.linalg import hadamard

from formats import noise
from trainer.keys import fold_in

X_FORWARD, W_FORWARD, X_WGRAD, W_DGRAD, G_DGRAD, G_WGRAD, SIGNS = range(7)  # salts of a layer's key


@partial(jax.jit, static_argnums=2)
def _random_words(key, salt, shape):
    return noise.random_bits(fold_in(key, salt), shape)


class Words(NamedTuple):
    """The random words of one call of a layer."""

    key: object

    def of(self, salt: int):
        return lambda shape: np.asarray(_random_words(self.key, salt, shape))

    def signs(self, size: int) -> np.ndarray:
        """+1 where the highest bit is 0."""
        return np.where(self.of(SIGNS)((size,)) < 2**31, 1.0, -1.0)


# --- one number ---------------------------------------------------------------------------------------------------------------------------


class Grid(NamedTuple):
    """A minifloat: mantissa bits, exponent of the smallest normal number, largest value."""

    man_bits: int
    min_exp: int
    largest: float


E2M1, E2M3, E3M2 = Grid(1, 0, 6.0), Grid(3, 0, 7.5), Grid(2, -2, 28.0)
E4M3, E5M2 = Grid(3, -6, 448.0), Grid(2, -14, 57344.0)
E3M0 = Grid(0, -2, 16.0)  # 0 and seven powers of two: the largest is 64 times the smallest


def floor_log2(x):
    """Exact for float64."""
    return np.frexp(np.where(x > 0, x, 1.0))[1] - 1


def _steps(magnitude, grid: Grid):
    return np.exp2(np.maximum(floor_log2(magnitude), grid.min_exp) - float(grid.man_bits))


def nearest(x, grid: Grid):
    """To nearest, ties to even, saturating."""
    step = _steps(np.abs(x), grid)
    return np.clip(np.rint(x / step) * step, -grid.largest, grid.largest)


def stochastic(x, grid: Grid, words):
    """floor(|x| / step + u): u is made of as many low bits of the word as a float32 x has below the step; 31 under the smallest step."""
    magnitude = np.abs(x)
    step = _steps(magnitude, grid)
    dropped = 23.0 + np.log2(step) - floor_log2(magnitude)
    dropped = np.where(magnitude < 2.0 ** (grid.min_exp - grid.man_bits), 31.0, dropped)
    u = np.mod(words.astype(np.float64), np.exp2(dropped)) / np.exp2(dropped)
    return np.sign(x) * np.minimum(np.floor(magnitude / step + u) * step, grid.largest)


# --- values that share a scale ------------------------------------------------------------------------------------------------------------


def per_block(x, sizes, statistic=lambda tiles: np.max(np.abs(tiles), axis=(1, 3))):
    """A statistic of every tile of `sizes`, repeated for each of its elements. The last tiles are filled up with zeros."""
    (rows, columns), (a, b) = x.shape, sizes
    tiles = np.pad(x, ((0, -rows % a), (0, -columns % b)))
    found = statistic(tiles.reshape(tiles.shape[0] // a, a, -1, b))
    return np.repeat(np.repeat(found, a, axis=0), b, axis=1)[:rows, :columns]


def along(axis: int, size: int):
    """Blocks along one dimension as tiles."""
    return (1, size) if axis == 1 else (size, 1)


def _rounded(x, scale, grid: Grid, words=None):
    scale = np.where(scale > 0, scale, 1.0)
    return scale * (nearest(x / scale, grid) if words is None else stochastic(x / scale, grid, words))


def scaled(grid: Grid, granularity="tensor", random=False):
    """A real scale amax / largest: for the tensor, for every row along the contraction, for blocks along it, or for square tiles."""

    def quantize(x, axis, draw):
        sizes = {"tensor": x.shape, "row": along(axis, x.shape[axis])}.get(granularity)
        if sizes is None:
            sizes = granularity if isinstance(granularity, tuple) else along(axis, granularity)
        return _rounded(x, per_block(x, sizes) / grid.largest, grid, draw(x.shape) if random else None)

    return quantize


def integer_rms(bits: int, multiple: float):
    """Integers of one scale: the largest stands for a multiple of the root mean square, and what lies beyond it is clipped."""
    largest = 2.0 ** (bits - 1) - 1

    def quantize(x, axis, draw):
        scale = multiple * np.sqrt(np.mean(x * x)) / largest
        return np.clip(np.rint(x / scale), -largest, largest) * scale

    return quantize


def mx(grid: Grid, size=32):
    """OCP MX v1.0, section 6.3: scales 2**(floor(log2 amax) - floor(log2 largest))."""

    def quantize(x, axis, draw):
        exponent = floor_log2(per_block(x, along(axis, size))) - floor_log2(grid.largest)
        return _rounded(x, np.exp2(exponent.astype(float)), grid)

    return quantize


def nvfp4_scales(x, sizes):
    """Scales of blocks: E4M3 numbers relative to amax / (448 * 6) of the whole tensor."""
    tensor = np.max(np.abs(x)) / (448 * 6)
    return np.maximum(nearest(per_block(x, sizes) / 6 / tensor, E4M3), 2.0**-9) * tensor


def nvfp4(tile=None, random=False, rotate=False, signs=None):
    """Blocks of 16 along the contraction, or tiles; of wgrad operands rotated: signs, then Hadamard of 16."""

    def quantize(x, axis, draw):
        if rotate:
            x = rotated(x, axis, 16, before=1.0 if signs is None else signs)
        return _rounded(x, nvfp4_scales(x, tile or along(axis, 16)), E2M1, draw(x.shape) if random else None)

    return quantize


def rotated(x, axis: int, size: int, before=1.0, after=1.0):
    """Blocks of `size` along an axis, the last one filled up with zeros: diag(before) Hadamard diag(after)."""
    rows = np.moveaxis(x, axis, 1)
    rows = np.pad(rows, ((0, 0), (0, -rows.shape[1] % size)))
    blocks = rows.reshape(len(rows), -1, size) * before @ (hadamard(size) / np.sqrt(size)) * after
    return np.moveaxis(blocks.reshape(rows.shape), 1, axis)


# --- layers -------------------------------------------------------------------------------------------------------------------------------


def layer(x_forward, w_forward, w_dgrad, x_wgrad, g_dgrad, g_wgrad):
    """Every operand of the three products by its quantizer; None: the numbers of the role's first product."""

    def run(x, w, words: Words):
        x_1, w_1 = x_forward(x, 1, words.of(X_FORWARD)), w_forward(w, 0, words.of(W_FORWARD))

        def backward(g):
            w_2 = w_1 if w_dgrad is None else w_dgrad(w, 1, words.of(W_DGRAD))
            x_2 = x_1 if x_wgrad is None else x_wgrad(x, 0, words.of(X_WGRAD))
            g_1 = g_dgrad(g, 1, words.of(G_DGRAD))
            g_2 = g_1 if g_wgrad is None else g_wgrad(g, 0, words.of(G_WGRAD))
            return g_1 @ w_2.T, x_2.T @ g_2

        return x_1 @ w_1, backward

    return run


def nvfp4_recipe(tile=(16, 16), rotate=True, signed=True, random=True, random_activations=False):
    """NVIDIA 2025 (arXiv 2509.25149, section 4). Weights in tiles, the same in dgrad; gradients stochastic; wgrad's operands rotated."""

    def run(x, w, words: Words):
        turn = {"rotate": rotate, "signs": words.signs(16) if signed else None}
        one = layer(nvfp4(random=random_activations), nvfp4(tile), None if tile else nvfp4(), nvfp4(**turn), nvfp4(random=random),
                    nvfp4(random=random, **turn))  # fmt: skip
        return one(x, w, words)

    return run


def quest(t, axis: int, rule: str):
    """QuEST projection of a rotated tensor: (numbers, mask). Scales from the standard deviation of groups of 32, as released."""
    def deviation(tiles):
        return np.sqrt(np.mean(tiles**2, axis=(1, 3)) - np.mean(tiles, axis=(1, 3)) ** 2)

    scale = 2.92247856 / 6 * per_block(t, along(axis, 32), deviation) + 1e-8
    rules = {"rfloor": np.floor, "rround": np.rint, "rceil": np.ceil}
    scale = np.exp2(rules[rule](np.log2(scale))) if rule in rules else scale
    return nearest(t / scale, E2M1) * scale, np.abs(t / scale) < 6


def backward_group(t, axis: int, signs, words, pre=0.75, after=False, scales_along=None):
    """Q_g of Quartet: signs, Hadamard of 32, scales 2**(floor(log2 amax) - 2) / (3/4), rounded stochastically (words None: to nearest)."""
    t = rotated(t, axis, 32, after=signs) if after else rotated(t, axis, 32, before=signs)
    scale = np.exp2(floor_log2(per_block(t, along(axis if scales_along is None else scales_along, 32))) - 2.0) / pre
    return _rounded(t, scale, E2M1, None if words is None else words(t.shape))


def quartet(rule="rround", random=True, mask="rotated", after=False, raw=False, pre=0.75, wrong_axis=False):
    """Quartet (Castro et al. 2025, algorithm 1). Wrong variants: mask "none" or "unrotated" (applied after rotating back), signs after the
    Hadamard, raw: the backward reads the rotated operands unquantized, pre=1, wrong_axis: scales across the contraction."""

    def run(x, w, words: Words):
        x_h, w_h = rotated(x, 1, 32), rotated(w, 0, 32)
        (x_q, x_mask), (w_q, w_mask) = quest(x_h, 1, rule), quest(w_h, 0, rule)

        def backward(g):
            def again(t, axis, salt):
                axes = {"scales_along": 1 - axis} if wrong_axis else {}
                return backward_group(t, axis, words.signs(32), words.of(salt) if random else None, pre, after, **axes)

            dx = again(g, 1, G_DGRAD) @ again(w_h if raw else w_q, 1, W_DGRAD).T
            dw = again(x_h if raw else x_q, 0, X_WGRAD).T @ again(g, 0, G_WGRAD)
            return to_tensor(dx, x_mask, 1, x.shape[1]), to_tensor(dw, w_mask, 0, w.shape[0])

        def to_tensor(gradient, passed, axis, size):
            if mask == "rotated":
                gradient = gradient * passed
            gradient = rotated(gradient, axis, 32)
            if mask == "unrotated":
                gradient = gradient * passed
            return gradient[:, :size] if axis == 1 else gradient[:size]

        return x_q @ w_q, backward

    return run


INT4_MULTIPLE = 2.4725506  # of the RMS: least squared error of 15 levels on Gaussian data (test_luq.py computes it)


def luq():
    """Chmiel et al. 2023, with int4 clipped at a fixed multiple of the RMS in the place of SAWB's."""
    int4, gradient = integer_rms(4, INT4_MULTIPLE), scaled(E3M0, random=True)
    return layer(int4, int4, None, None, gradient, None)


def fp8():
    return layer(scaled(E4M3), scaled(E4M3), None, None, scaled(E5M2), None)


def fp8_rowwise():
    forward, gradient = scaled(E4M3, "row"), scaled(E5M2, "row")
    return layer(forward, forward, forward, forward, gradient, gradient)


def fp8_tiles(tile=(128, 128)):
    """DeepSeek-V3 (2024, section 3.3.2)."""
    row = scaled(E4M3, 128)
    return layer(row, scaled(E4M3, tile), None, row, row, row)


def blocks_each(forward, gradient):
    """Every product quantizes along its own contraction."""
    return layer(forward, forward, forward, forward, gradient, gradient)


POLICIES = {
    "quartet rround": quartet(), "quartet rfloor": quartet("rfloor"), "quartet exact": quartet("exact"), "quartet_nearest": quartet(random=False),
    "nvfp4_recipe": nvfp4_recipe(), "luq": luq(), "fp8": fp8(), "fp8_rowwise": fp8_rowwise(), "fp8_tiles": fp8_tiles(),
    "mxfp4": blocks_each(mx(E2M1), mx(E2M1)), "mxfp6": blocks_each(mx(E2M3), mx(E3M2)), "mxfp8": blocks_each(mx(E4M3), mx(E5M2)),
    "nvfp4": blocks_each(nvfp4(), nvfp4()),
}  # fmt: skip
