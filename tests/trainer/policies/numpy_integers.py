"""Quantizers to integers in numpy float64, written from the papers; functions as in numpy_policies."""
from __future__ import annotations

import numpy as np

from tests.trainer.policies.numpy_policies import Grid, layer, rotated, stochastic

INT8 = Grid(7, 7, 127.0)  # steps of 1 below 256


def largest_code(bits: int) -> float:
    return 2.0 ** (bits - 1) - 1


def rows(bits: int):
    """A scale amax / largest for every row along the contraction; one bit is sign(x) mean|x| (XNOR-Net, equation 6), zero counts as positive."""

    def quantize(x, axis, draw):
        if bits == 1:
            return np.where(x >= 0, 1.0, -1.0) * np.mean(np.abs(x), axis=axis, keepdims=True)
        scale = np.max(np.abs(x), axis=axis, keepdims=True) / largest_code(bits)
        scale = np.where(scale > 0, scale, 1.0)
        return np.rint(x / scale) * scale

    return quantize


def tensor8(random=False):
    """One scale, to nearest or floor(x + u)."""

    def quantize(x, axis, draw):
        scale = np.max(np.abs(x)) / 127
        return scale * (stochastic(x / scale, INT8, draw(x.shape)) if random else np.rint(x / scale))

    return quantize


def nothing(x, axis, draw):
    return x


# Step over RMS of 2, 4, 8 and 16 evenly spaced levels for Gaussian data: Max 1960, table II.
MAX_1960 = {1: 1.596, 2: 0.9957, 3: 0.5860, 4: 0.3352}


def quest(bits: int, multiple: float | None = None, mask="rotated"):
    """Panferov et al. 2025, algorithm 1. multiple: largest level over RMS; mask "none" or "unrotated": wrong variants."""
    half = 2.0 ** (bits - 1) - 0.5
    multiple = half * MAX_1960[bits] if multiple is None else multiple

    def project(t, axis):
        step = multiple / half * np.sqrt(np.mean(t * t, axis=axis, keepdims=True))
        numbers = np.clip(np.floor(t / step) + 0.5, -half, half) * step
        return numbers, np.abs(numbers - t) <= step / 2

    def run(x, w, words):
        (x_q, x_inside), (w_q, w_inside) = project(rotated(x, 1, 32), 1), project(rotated(w, 0, 32), 0)

        def backward(g):
            dx, dw = g @ w_q.T, x_q.T @ g
            if mask == "rotated":
                dx, dw = dx * x_inside, dw * w_inside
            dx, dw = rotated(dx, 1, 32)[:, : x.shape[1]], rotated(dw, 0, 32)[: w.shape[0]]
            return (dx * x_inside[:, : x.shape[1]], dw * w_inside[: w.shape[0]]) if mask == "unrotated" else (dx, dw)

        return x_q @ w_q, backward

    return run


def rowwise(bits: int, spared: str | None = None):
    """Six operands; those of one product left alone."""
    q = {gemm: nothing if gemm == spared else rows(bits) for gemm in ("forward", "dgrad", "wgrad")}
    return layer(q["forward"], q["forward"], q["dgrad"], q["wgrad"], q["dgrad"], q["wgrad"])


def first_step(rms, bits):
    """2 <|v|> / sqrt(Q_P), section 2.1; of Gaussian data <|v|> is sqrt(2 / pi) of the RMS."""
    return 2 * np.sqrt(2 / np.pi) * float(rms) / np.sqrt(largest_code(bits))


class Lsq:
    """One operand (Esser et al. 2020, equations 1 to 3): value, and what straight-through takes its derivatives for."""

    def __init__(self, v, step, bits):
        largest = largest_code(bits)
        self.scaled = v / step
        self.inside = np.abs(self.scaled) < largest
        self.codes = np.clip(np.rint(self.scaled), -largest, largest)
        self.value = self.codes * step
        self.slope = np.where(self.inside, self.codes - self.scaled, self.codes)  # of the value along the step

    def pretended(self, v, step):
        """What is differentiated: roundings and sides are constants."""
        return np.where(self.inside, v + step * (self.codes - self.scaled), step * self.codes)


def affine(x, reach):
    """uint8 with the integer code of zero (Krishnamoorthi 2018, section 2.1): (values, where |x - value| <= half a step)."""
    scale = (reach[0] + reach[1]) / 255
    zero = np.rint(reach[0] / scale)
    value = (np.clip(np.rint(x / scale) + zero, 0, 255) - zero) * scale
    return value, np.abs(x - value) <= scale / 2 * (1 + 1e-6)
