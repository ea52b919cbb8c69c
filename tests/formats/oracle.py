"""Independent arithmetic to hold formats/ against: float64 on the host, where float32 products and powers are exact."""

from __future__ import annotations

import numpy as np


def bits_equal(got, want):
    """bool array: same float32 bits, or both NaN."""
    got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
    return (got.view(np.uint32) == want.view(np.uint32)) | (np.isnan(got) & np.isnan(want))


def values_equal(got, want):
    """bool array: equal as numbers (zeros of either sign are), or both NaN."""
    return (np.asarray(got) == np.asarray(want)) | (np.isnan(got) & np.isnan(want))


def random_patterns(num: int, seed: int = 0) -> np.ndarray:
    """float32 of uniformly random bits: every exponent, subnormals, infinities and NaNs."""
    return np.random.default_rng(seed).integers(0, 2**32, num, dtype=np.uint64).astype(np.uint32).view(np.float32)


def all_float16() -> np.ndarray:
    return np.arange(2**16, dtype=np.uint16).view(np.float16)


def decode(exp_bits: int, man_bits: int, variant: str, bias: int | None = None) -> np.ndarray:
    """Nonnegative finite values of a minifloat in code order, float64, from its code table."""
    if bias is None:
        bias = 0 if exp_bits == 0 else 2 ** (exp_bits - 1) - (0 if variant == "fnuz" else 1)
    codes = np.arange(2 ** (exp_bits + man_bits))
    field, man = codes >> man_bits, codes & (2**man_bits - 1)
    normal = (1 + man / 2.0**man_bits) * 2.0 ** (np.maximum(field, 1) - bias)
    value = np.where(field == 0, man / 2.0**man_bits * 2.0 ** (1 - bias), normal)
    if variant == "ieee" and exp_bits > 0:
        value = value[field < 2**exp_bits - 1]
    if variant == "fn" and 1 + exp_bits + man_bits > 6:
        value = value[:-1]
    return value


_INTEGER_OF = {
    "nearest_even": np.rint,
    "nearest_away": lambda t: np.sign(t) * np.floor(np.abs(t) + 0.5),
    "nearest_zero": lambda t: np.sign(t) * np.ceil(np.abs(t) - 0.5),
    "toward_zero": np.trunc,
    "toward_positive": np.ceil,
    "toward_negative": np.floor,
    "to_odd": lambda t: np.where(t == np.trunc(t), t, np.sign(t) * (2 * np.floor(np.abs(t) / 2) + 1)),
}
DETERMINISTIC = tuple(_INTEGER_OF)


def grid(x, man_bits: int, quantum_exp: int, mode: str) -> np.ndarray:
    """Finite float64 x to the nearest multiples of 2**max(floor(log2|x|) - man_bits, quantum_exp), in `mode`; no range."""
    x = np.asarray(x, np.float64)
    exponent = np.frexp(x)[1] - 1
    spacing = np.ldexp(1.0, np.maximum(exponent - man_bits, quantum_exp))
    return _INTEGER_OF[mode](x / spacing) * spacing


def saturated(x, man_bits: int, quantum_exp: int, low: float, high: float, mode: str = "nearest_even") -> np.ndarray:
    """`grid`, clamped to low .. high; infinities too, NaN stays."""
    with np.errstate(invalid="ignore"):  # signalling NaNs
        x = np.asarray(x).astype(np.float64)
    rounded = grid(np.where(np.isfinite(x), x, 0.0), man_bits, quantum_exp, mode)
    return np.clip(np.where(np.isfinite(x), rounded, x), low, high)


def probes(values: np.ndarray) -> np.ndarray:
    """float32 inputs that are hard for a grid of nonnegative values: each, each midpoint, +-1 and +-2 ulp, both signs,
    and what lies past the ends."""
    values = np.unique(np.asarray(values, np.float64))
    middle = (values[1:] + values[:-1]) / 2
    past = values[-1] + (values[-1] - values[-2]) * np.array([0.25, 0.5, 1.0, 2.0, 8.0]) if len(values) > 1 else []
    base = np.minimum(np.concatenate([values, middle, past]), 3.4e38).astype(np.float32)
    bits = base.view(np.int32)[:, None] + np.arange(-2, 3, dtype=np.int32)
    near = np.clip(bits, 0, 0x7F7FFFFF).astype(np.int32).view(np.float32).ravel()
    extreme = np.array([0.0, 1e-45, 1e-38, 3e38, np.inf], np.float32)
    both = np.concatenate([near, extreme])
    return np.concatenate([both, -both, np.array([np.nan], np.float32)])
