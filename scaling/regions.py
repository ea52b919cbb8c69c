"""Which precision of forward and backward pass is the best for a model size and a budget (Castro et al. 2025, "Quartet", arXiv 2505.14669).

The forward pass in fewer bits makes the model smaller in effect (N effN), the backward pass the data (D effD); both make room for more.
A budget of inference N_max (parameters that may be served at the speed of the base precision) and of training N_max D_max then gives

    loss(N_max s_fw effN, D_max s_tr/s_fw effD),        1/s_tr = (1/3)/s_fw + (2/3)/s_bw

with s the speed-ups over the base precision (their section 3; a forward pass is a third of a training). That is the budget
"training+inference". Where only the training has to be paid, "training", the size stays what it is and all of the speed-up buys data:

    loss(N effN, D s_tr effD)
"""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import brentq

Loss = Callable[..., np.ndarray]
"""(N parameters, D tokens, **inputs of a scheme) -> nats per token: `lambda N, D: fit.law.predict(fit.params, N=N, D=D)`."""
BUDGETS = ("training+inference", "training")
POINTS = 1000  # ratios at which changes of the best scheme are looked for: two changes nearer than 1.2 % are seen as one


@dataclass(frozen=True)
class Scheme:
    """A precision of forward and of backward pass. Speed-ups over the base precision, efficiencies; all dimensionless. inputs: of the law,
    where it knows the scheme itself ({"forward": "QuEST"}, {"weights_bits": 4.0}); they are handed to the base loss."""

    name: str
    forward_speedup: float = 1.0
    backward_speedup: float = 1.0
    eff_N: float = 1.0
    eff_D: float = 1.0
    inputs: Mapping[str, object] = field(default_factory=dict)

    @property
    def training_speedup(self) -> float:
        """s_tr, the harmonic mean with weights 1/3 and 2/3."""
        return 3.0 / (1.0 / self.forward_speedup + 2.0 / self.backward_speedup)

    def growth(self, budget: str = BUDGETS[0]) -> tuple[float, float]:
        """(parameters over N_max, tokens over D_max) that the budgets allow."""
        larger = self.forward_speedup if budget == BUDGETS[0] else 1.0
        return larger, self.training_speedup / larger

    def loss(self, base: Loss, N_max, D_max, budget: str = BUDGETS[0]):
        """Loss at the budgets of N_max parameters and N_max D_max parameter-tokens. Nats per token, broadcast shape."""
        larger, longer = self.growth(budget)
        return base(N_max * larger * self.eff_N, D_max * longer * self.eff_D, **self.inputs)


def regions(base: Loss, schemes: Sequence[Scheme], N_max, tokens_per_param, budget: str = BUDGETS[0]) -> np.ndarray:
    """Index of the best scheme at N_max (parameters) and D_max/N_max (tokens per parameter); integers of their broadcast shape."""
    N_max, ratio = np.broadcast_arrays(np.asarray(N_max, dtype=np.float64), np.asarray(tokens_per_param, dtype=np.float64))
    losses = np.array([scheme.loss(base, N_max, ratio * N_max, budget) for scheme in schemes])
    return np.argmin(np.where(np.isnan(losses), np.inf, losses), axis=0)


def boundary(base: Loss, below: Scheme, above: Scheme, N_max: float, low: float = 1.0, high: float = 1e5, budget: str = BUDGETS[0]) -> float:
    """D_max/N_max (tokens per parameter) up to which `below` is better at N_max parameters and from which `above` is.

    ValueError when they do not change places between `low` and `high`.
    """
    def advantage(log_ratio: float) -> float:
        tokens = N_max * math.exp(log_ratio)
        return float(above.loss(base, N_max, tokens, budget) - below.loss(base, N_max, tokens, budget))

    ends = advantage(math.log(low)), advantage(math.log(high))
    if not (ends[0] > 0.0 > ends[1]):
        raise ValueError(f"{below.name} and {above.name} do not change places between {low:g} and {high:g} tokens per parameter at "
                         f"N_max={N_max:g}")
    return math.exp(brentq(advantage, math.log(low), math.log(high), xtol=1e-12))


@dataclass(frozen=True)
class Span:
    """The scheme of the lowest loss (its index) for low <= D_max/N_max <= high, tokens per parameter."""

    best: int
    low: float
    high: float


def spans(base: Loss, schemes: Sequence[Scheme], N_max: float, low: float = 1.0, high: float = 1e5, budget: str = BUDGETS[0]) -> list[Span]:
    """Which scheme is the best at N_max parameters, from `low` to `high` tokens per parameter: the spans in order, their ends the boundaries."""
    ratios = np.geomspace(low, high, POINTS)
    best = regions(base, schemes, N_max, ratios, budget)
    turns = np.flatnonzero(np.diff(best))
    ends = [boundary(base, schemes[best[i]], schemes[best[i + 1]], N_max, ratios[i], ratios[i + 1], budget) for i in turns]
    return [Span(int(best[i]), start, end) for i, start, end in zip([*turns, POINTS - 1], [low, *ends], [*ends, high], strict=True)]
