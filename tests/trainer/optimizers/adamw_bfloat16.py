"""Collage's AdamW once more, in numpy with ml_dtypes.bfloat16 arithmetic (methods.md 2.3): the oracle. Nothing is shared with the code."""
from __future__ import annotations

import ml_dtypes
import numpy as np

F = ml_dtypes.bfloat16  # arrays of it round to nearest even after every operation


def _fast2sum(a, b):
    x = a + b
    return x, b - (x - a)


def _twosum(a, b):
    x = a + b
    bb = x - a
    aa = x - bb
    return x, (a - aa) + (b - bb)


def _twoprod(a, b):
    x = a * b
    return x, (a.astype(np.float64) * b.astype(np.float64) - x.astype(np.float64)).astype(F)


def _grow(x, y, a):
    u, v = _twosum(x, a)
    return _fast2sum(u, y + v)


def _mul(x, y, z, w):
    p, e = _twoprod(x, z)
    return _fast2sum(p, e + (x * w + y * z))


class Adam:
    """One parameter of any shape. theta, m, v, delta, v_delta: bfloat16 arrays."""

    def __init__(self, theta, variant: str):
        self.theta, self.variant, self.t = np.asarray(theta).astype(F), variant, 0
        self.m, self.v, self.delta, self.v_delta = (np.zeros(np.shape(theta), F) for _ in range(4))

    def step(self, grad, lr, b1, b2, eps, decay):
        """One update in place; all numbers are Python floats."""
        self.t += 1
        g = np.asarray(grad).astype(F)

        def const(value):
            return np.full(g.shape, value, np.float64).astype(F)

        self.m = const(b1) * self.m + const(1 - b1) * g
        fresh = const(1 - b2) * (g * g)
        if self.variant == "plus":
            high = const(b2)
            low = (np.full(g.shape, b2) - high.astype(np.float64)).astype(F)
            self.v, self.v_delta = _grow(*_mul(self.v, self.v_delta, high, low), fresh)
        else:
            self.v = const(b2) * self.v + fresh
        m_hat = self.m / const(1 - b1**self.t)
        v_hat = self.v / const(1 - b2**self.t)
        update = -const(lr) * (m_hat / (np.sqrt(v_hat) + const(eps)) + const(decay) * self.theta)
        if self.variant == "bfloat16":
            self.theta = self.theta + update
        elif self.variant == "kahan":
            y = update + self.delta
            new = self.theta + y
            self.delta = y - (new - self.theta)
            self.theta = new
        else:
            self.theta, self.delta = _grow(self.theta, self.delta, update)
        return update
