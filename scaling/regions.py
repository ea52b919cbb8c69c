"""Which precision of forward and backward pass is the best for a model size and a budget (Castro et al. 2025, "Quartet", arXiv 2505.14669).

The forward pass in fewer bits makes the model smaller in effect (N effN), the backward pass the data (D effD); both make room for more.
A budget of inference N_max (parameters that may be served at the speed of the base precision) and of training N_max D_max then gives

    loss(N_max s_fw effN, D_max s_tr/s_fw effD),        1/s_tr = (1/3)/s_fw + (2/3)/s_bw

with s the speed-ups over the base precision (their section 3; a forward pass is a third of a training).
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq

Loss = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(N parameters, D tokens) -> nats per token of the base precision: `lambda N, D: fit.law.predict(fit.params, N=N, D=D)`."""


@dataclass(frozen=True)
class Scheme:
    """A precision of forward and of backward pass. Speed-ups over the base precision, efficiencies; all dimensionless."""

    name: str
    forward_speedup: float = 1.0
    backward_speedup: float = 1.0
    eff_N: float = 1.0
    eff_D: float = 1.0

    @property
    def training_speedup(self) -> float:
        """s_tr, the harmonic mean with weights 1/3 and 2/3."""
        return 3.0 / (1.0 / self.forward_speedup + 2.0 / self.backward_speedup)

    def loss(self, base: Loss, N_max, D_max):
        """Loss at the budgets of N_max parameters and N_max D_max parameter-tokens. Nats per token, broadcast shape."""
        return base(N_max * self.forward_speedup * self.eff_N, D_max * self.training_speedup / self.forward_speedup * self.eff_D)


def regions(base: Loss, schemes: Sequence[Scheme], N_max, tokens_per_param) -> np.ndarray:
    """Index of the best scheme at N_max (parameters) and D_max/N_max (tokens per parameter); integers of their broadcast shape."""
    N_max, ratio = np.broadcast_arrays(np.asarray(N_max, dtype=np.float64), np.asarray(tokens_per_param, dtype=np.float64))
    return np.argmin([scheme.loss(base, N_max, ratio * N_max) for scheme in schemes], axis=0)


def boundary(base: Loss, below: Scheme, above: Scheme, N_max: float, low: float = 1.0, high: float = 1e5) -> float:
    """D_max/N_max (tokens per parameter) up to which `below` is better at N_max parameters and from which `above` is.

    ValueError when they do not change places between `low` and `high`.
    """
    def advantage(log_ratio: float) -> float:
        tokens = N_max * math.exp(log_ratio)
        return float(above.loss(base, N_max, tokens) - below.loss(base, N_max, tokens))

    ends = advantage(math.log(low)), advantage(math.log(high))
    if not (ends[0] > 0.0 > ends[1]):
        raise ValueError(f"{below.name} and {above.name} do not change places between {low:g} and {high:g} tokens per parameter at "
                         f"N_max={N_max:g}")
    return math.exp(brentq(advantage, math.log(low), math.log(high), xtol=1e-12))
