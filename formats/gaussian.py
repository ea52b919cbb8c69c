"""How far a format moves Gaussian data: the number by which laws and tables compare quantizers."""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from formats.blocks import apply
from formats.catalogue import resolve
from formats.scaled import ELEMENTS, Granularity, Scaled

_ROWS, _COLUMNS = 64, 1024


def gaussian_mse(fmt) -> float:
    """E (q(x) - x)^2 / E x^2 for x ~ N(0, 1), nearest-even, saturating: deterministic, relative, 0.0 for float32.

    Fixed sample of 64 rows of 1024. One scale per tensor, channel or token sees one row of 1024 at a time; blocks lie
    along the row. Power-of-two scales make the error depend on the phase of sigma between powers of two, so there sigma
    runs log-uniformly over [1, 2) across the rows (each row's error counts relative to its own sigma).
    """
    fmt = resolve(fmt)
    x_RC = np.random.default_rng(0).standard_normal((_ROWS, _COLUMNS)).astype(np.float32)
    if isinstance(fmt, Scaled) and not fmt.exact:
        x_RC = x_RC * np.exp2((np.arange(_ROWS, dtype=np.float32) + 0.5) / _ROWS)[:, None]
    return float(_relative_mse(jnp.asarray(x_RC), _along_rows(fmt)))


def _along_rows(fmt):
    """fmt with its scales along the one dimension of a row."""
    if isinstance(fmt, ELEMENTS):
        return fmt
    if fmt.granularity is not Granularity.BLOCK:
        return dataclasses.replace(fmt, granularity=Granularity.TENSOR, axis=-1)
    return dataclasses.replace(fmt, axis=-1, block=math.prod(fmt.block) if isinstance(fmt.block, tuple) else fmt.block)


@jax.jit
def _relative_mse(x_RC, fmt):
    y_RC = jax.vmap(partial(apply, fmt=fmt))(x_RC)
    return jnp.mean(jnp.sum((y_RC - x_RC) ** 2, axis=1) / jnp.sum(x_RC**2, axis=1))
