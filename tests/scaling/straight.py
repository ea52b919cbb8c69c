"""A law whose log is linear in its coordinates: what least squares knows exactly is exact for it."""
from __future__ import annotations

import numpy as np

from scaling.laws import Law, amplitude, exponent

power = Law(name="power", about="L = A/N^alpha", cite="none", inputs=("N",), parameters=(amplitude("A"), exponent("alpha")),
            log_terms=lambda p, x: (-p["alpha"] * np.log(x["N"]),))


def runs(rows: int = 24, seed: int = 0, noise=None, copies: int = 1) -> dict[str, np.ndarray]:
    """N and loss of 30/N^0.3 with Gaussian noise of 1 %, or `noise(rng, ln N)`; `copies` rows at every N."""
    rng = np.random.default_rng(seed)
    log_n = np.repeat(np.linspace(7.0, 14.0, rows // copies), copies)
    scatter = 0.01 * rng.standard_normal(rows) if noise is None else noise(rng, log_n)
    return {"N": np.exp(log_n), "loss": np.exp(np.log(30.0) - 0.3 * log_n + scatter)}
