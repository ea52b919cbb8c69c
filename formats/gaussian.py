"""How far a format moves Gaussian data: the number by which laws and tables compare quantizers."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from formats.blocks import Granularity, Scaled, apply
from formats.catalogue import get
from formats.elements import Element
from formats.scales import Rule

_ROWS, _COLUMNS = 64, 1024


def gaussian_mse(fmt: Element | Scaled | str) -> float:
    """E (q(x) - x)^2 / E x^2 for x ~ N(0, 1), nearest-even, saturating: deterministic, relative, 0.0 for float32.

    Fixed sample of 64 rows of 1024. One scale per tensor, channel or token sees one row of 1024 at a time; blocks lie
    along the row. Power-of-two scales make the error depend on the phase of sigma between powers of two, so there sigma
    runs log-uniformly over [1, 2) across the rows (each row's error counts relative to its own sigma).
    """
    fmt = get(fmt) if isinstance(fmt, str) else fmt
    x_RC = np.random.default_rng(0).standard_normal((_ROWS, _COLUMNS)).astype(np.float32)
    if isinstance(fmt, Scaled) and fmt.rule is not Rule.EXACT:
        x_RC = x_RC * np.exp2((np.arange(_ROWS, dtype=np.float32) + 0.5) / _ROWS)[:, None]
    return float(_relative_mse(jnp.asarray(x_RC), _along_rows(fmt)))


def _along_rows(fmt):
    """fmt with its scales along the one dimension of a row."""
    if isinstance(fmt, Element):
        return fmt
    granularity = fmt.granularity if fmt.granularity is Granularity.BLOCK else Granularity.TENSOR
    return Scaled(fmt.element, fmt.scale_element, granularity, -1, fmt.block, fmt.rule)


@jax.jit
def _relative_mse(x_RC, fmt):
    y_RC = jax.vmap(partial(apply, fmt=fmt))(x_RC)
    return jnp.mean(jnp.sum((y_RC - x_RC) ** 2, axis=1) / jnp.sum(x_RC**2, axis=1))
