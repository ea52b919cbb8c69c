"""Plain numpy quantizers, written from the formats' definitions: what tests of the low-precision linear layer are held against.

A quantizer here is a function (x [A, B] float32, contracted dim) -> quantized values [A, B] float64: narrow value times scale.
"""
from __future__ import annotations

import ml_dtypes
import numpy as np

ELEMENTS = {
    "e4m3fn": (ml_dtypes.float8_e4m3fn, 448.0), "e5m2": (ml_dtypes.float8_e5m2, 57344.0), "e2m3": (ml_dtypes.float6_e2m3fn, 7.5),
    "e3m2": (ml_dtypes.float6_e3m2fn, 28.0), "e2m1": (ml_dtypes.float4_e2m1fn, 6.0),
}  # fmt: skip


def _to_element(x, element: str) -> np.ndarray:
    """float32 x to a minifloat, to nearest even, saturating; float32."""
    dtype, largest = ELEMENTS[element]
    return np.clip(x, -np.float32(largest), np.float32(largest)).astype(dtype).astype(np.float32)


def _exact(x, axis, largest: float, to_element, amax=None) -> np.ndarray:
    """One scale amax / largest for all values that differ in `axis` only (None: for all); float32 arithmetic throughout."""
    amax = np.max(np.abs(x), axis=axis, keepdims=True) if amax is None else np.float32(amax)
    scale = amax / np.float32(largest)
    inverse = np.float32(1.0) / scale
    return to_element(x * inverse).astype(np.float64) * scale.astype(np.float64)


def nothing(x, contract):
    """float32: not quantized."""
    del contract
    return x.astype(np.float64)


def bfloat16(x, contract):
    """A cast of the product's inputs."""
    del contract
    return x.astype(ml_dtypes.bfloat16).astype(np.float64)


def integer(bits: int, per: str, amax=None):
    """Symmetric integers; `per`: "vector" (a scale per channel or token) or "tensor"; amax: given instead of the tensor's."""
    largest = 2.0 ** (bits - 1) - 1.0

    def quantize(x, contract):
        return _exact(x, contract if per == "vector" else None, largest, lambda v: np.clip(np.rint(v), -largest, largest), amax)

    return quantize


def minifloat(element: str, per: str = "tensor", amax=None):
    """A minifloat with one scale amax / largest per tensor, or per vector along the contraction; amax: given instead."""

    def quantize(x, contract):
        axis = contract if per == "vector" else None
        return _exact(x, axis, ELEMENTS[element][1], lambda v: _to_element(v, element), amax)

    return quantize


def mx(element: str, size: int = 32):
    """OCP MX v1.0, section 6.3: along the contraction, blocks of `size` (the last one may be short) share a scale
    2**(floor(log2 amax) - floor(log2 largest)); values saturate."""
    largest_exponent = int(np.floor(np.log2(ELEMENTS[element][1])))

    def quantize(x, contract):
        rows = np.moveaxis(x, contract, 1)
        result = np.empty(rows.shape, np.float64)
        for begin in range(0, rows.shape[1], size):
            block = rows[:, begin : begin + size].astype(np.float64)
            amax = np.max(np.abs(block), axis=1, keepdims=True)
            exponent = np.frexp(np.where(amax > 0, amax, 1.0))[1] - 1 - largest_exponent
            scale = np.exp2(exponent.astype(np.float64))
            result[:, begin : begin + size] = _to_element((block / scale).astype(np.float32), element) * scale
        return np.moveaxis(result, 1, contract)

    return quantize


def nvfp4(size: int = 16, amax=None):
    """Blocks along the contraction with e4m3 scales relative to amax / (448 * 6), in float32 steps; amax: given instead of the tensor's."""

    def quantize(x, contract):
        rows = np.moveaxis(x, contract, 1)
        result = np.empty(rows.shape, np.float64)
        tensor = (np.max(np.abs(x)) if amax is None else np.float32(amax)) / np.float32(448 * 6)
        for begin in range(0, rows.shape[1], size):
            block = rows[:, begin : begin + size]
            largest = np.max(np.abs(block), axis=1, keepdims=True)
            factor = np.maximum(_to_element(largest / np.float32(6) / tensor, "e4m3fn"), 2.0**-9).astype(np.float32) * tensor
            result[:, begin : begin + size] = _to_element(block * (np.float32(1) / factor), "e2m1") * factor.astype(np.float64)
        return np.moveaxis(result, 1, contract)

    return quantize


def unscaled(element: str):
    """The element's own range: no scale."""
    return lambda x, contract: _to_element(x, element).astype(np.float64)
