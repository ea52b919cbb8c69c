"""The best N, D and precision of a law with known constants, under a budget of cost, of memory, or with some of them given.

Works on `law.predict(params, N=..., D=..., **precision)` alone, by grids that are refined around their best point: no gradient, no closed
form, so any law that takes N and D will do. Shapes: P precisions or sets of constants, G grid points.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from scaling.costs import CostModel, operand_widths
from scaling.laws import Law

SMALLEST = 1.0  # parameters, tokens: where searches begin
LEAST_SHARE = 1e-9  # of the tokens that could be had: where the search for too much data begins


@dataclass(frozen=True)
class Budget:
    """What may be spent. model: of costs. compute: training plus inference, FLOP of 16 bits, None for no limit. inference_tokens: to be
    read and written by the trained model. memory: of the weights, bytes, N * weights_bits / 8 at most. N, D: given sizes."""

    model: CostModel
    compute: float | None = None
    inference_tokens: float = 0.0
    memory: float | None = None
    N: float | None = None
    D: float | None = None

    def cost(self, N, D, precision: Mapping):
        """Cost of training and inference, FLOP of 16 bits."""
        return self.model.training(N, D, precision) + self.model.inference(N, self.inference_tokens, precision)


@dataclass(frozen=True)
class Sweep:
    """A common width, any real number of bits in [low, high], for the inputs `names`; `rest`: what else the precision consists of."""

    names: tuple[str, ...]
    low: float
    high: float
    rest: Mapping[str, object] = field(default_factory=dict)

    def at(self, bits) -> dict:
        return dict(self.rest) | dict.fromkeys(self.names, bits)


@dataclass(frozen=True)
class Optimum:
    """N (parameters), D (tokens), loss (nats per token; inf when nothing fits the budget), precision (law inputs and widths of costs)."""

    N: float
    D: float
    loss: float
    precision: Mapping[str, object]


Choices = Sweep | Sequence[Mapping[str, object]]


def optimise(law: Law, params: Mapping[str, float], budget: Budget, choices: Choices) -> Optimum:
    """The lowest loss within the budget over `choices`: a Sweep of widths, or a list of precisions, each a mapping that holds law inputs
    and widths (bits) that costs depend on. N, D and bits to about 1e-7, relative: nearer, the loss is flat in float64.
    """
    return optimise_all(law, [params], budget, choices, fine=True)[0]


def optimise_all(law: Law, several: Sequence[Mapping[str, float]], budget: Budget, choices: Choices, fine: bool = False) -> list[Optimum]:
    """`optimise` for each of several sets of constants of one fit, all at once; to about 1e-4 unless `fine`."""
    params_P = {name: np.array([params[name] for params in several]) for name in several[0]}
    size = len(several)
    if isinstance(choices, Sweep):
        def losses(bits_PG):
            flat = {name: np.repeat(values, bits_PG.shape[1]) for name, values in params_P.items()}
            return best_sizes(law, flat, budget, choices.at(bits_PG.ravel()), bits_PG.size, fine)[2].reshape(bits_PG.shape)
        bits_P = zoom(losses, np.full(size, choices.low), np.full(size, choices.high), fine)
        N_P, D_P, loss_P = best_sizes(law, params_P, budget, choices.at(bits_P), size, fine)
        return [Optimum(*map(float, row[:3]), choices.at(float(row[3]))) for row in zip(N_P, D_P, loss_P, bits_P, strict=True)]
    found = [best_sizes(law, params_P, budget, precision, size, fine) for precision in choices]
    best_P = np.argmin([loss for _, _, loss in found], axis=0)
    return [Optimum(*(float(part[i]) for part in found[best]), dict(choices[best])) for i, best in enumerate(best_P)]


def best_sizes(law: Law, params: Mapping, budget: Budget, precision: Mapping, size: int, fine: bool = True):
    """N, D, loss, each [P] with P = `size`, of the best sizes for each precision; values of `params` and `precision` are scalars or [P].

    Loss inf where no size fits. A budget need not be spent: where more data would harm (D above the law's critical tokens), D is less.
    """
    columns_P1 = {name: _column(value, size) for name, value in precision.items() if name in law.inputs}
    params = {name: _column(value, size) for name, value in params.items()}
    per_pair_P, per_answer_P = (np.broadcast_to(cost, (size,)) for cost in (budget.model.per_pair(precision), budget.model.per_answer(precision)))
    fixed_P = per_answer_P * budget.inference_tokens  # cost per parameter, whatever D
    compute = math.inf if budget.compute is None else budget.compute
    memory_P = np.broadcast_to(math.inf if budget.memory is None else 8.0 * budget.memory / operand_widths(precision)[0], (size,))

    def tokens(N_PG):
        return (compute / N_PG - fixed_P[:, None]) / per_pair_P[:, None]

    def loss_of(N_PG, D_PG):
        with np.errstate(all="ignore"):
            loss_PG = np.asarray(law.predict(params, N=N_PG, D=D_PG, **columns_P1), dtype=np.float64)
        return np.where(np.isnan(loss_PG) | (D_PG <= 0.0), np.inf, np.broadcast_to(loss_PG, np.broadcast_shapes(N_PG.shape, D_PG.shape)))

    if budget.N is not None:
        N_P = np.full(size, float(budget.N))
    elif budget.D is not None:
        N_P = np.minimum(compute / (per_pair_P * budget.D + fixed_P), memory_P)
    else:
        largest_P = np.minimum(compute / (per_pair_P * SMALLEST + fixed_P), memory_P)
        log_N_P = zoom(lambda x_PG: loss_of(np.exp(x_PG), tokens(np.exp(x_PG))), np.full(size, math.log(SMALLEST)),
                       np.log(np.maximum(largest_P, SMALLEST)), fine)
        N_P = np.minimum(np.exp(log_N_P), largest_P)
    D_P = np.full(size, float(budget.D)) if budget.D is not None else tokens(N_P[:, None])[:, 0]
    fits_P = (D_P > 0.0) & (N_P > 0.0) & (N_P <= memory_P * (1 + 1e-12)) & (budget.cost(N_P, D_P, precision) <= compute * (1 + 1e-12))
    if budget.D is None and (budget.N is not None or budget.memory is not None):  # a free N could be larger for the tokens that harm
        most_P = np.log(np.where(fits_P, D_P, 1.0))
        log_share_P = zoom(lambda x_PG: loss_of(N_P[:, None], np.exp(most_P[:, None] + x_PG)), np.full(size, math.log(LEAST_SHARE)),
                           np.zeros(size), fine)
        D_P = D_P * np.exp(log_share_P)
    return N_P, D_P, np.where(fits_P, loss_of(N_P[:, None], D_P[:, None])[:, 0], np.inf)


def zoom(f: Callable[[np.ndarray], np.ndarray], low_P: np.ndarray, high_P: np.ndarray, fine: bool = True) -> np.ndarray:
    """[P]: argmin of f ([P, G] -> [P, G], inf allowed) on [low, high] of each row: a grid, made anew around its best point each round.

    Right when f has one minimum at the resolution of the first grid. An end of the range is returned exactly.
    """
    points, rounds = (65, 8) if fine else (33, 4)
    steps_G = np.linspace(0.0, 1.0, points)
    for _ in range(rounds):
        x_PG = low_P[:, None] * (1.0 - steps_G) + high_P[:, None] * steps_G
        best_P = np.argmin(f(x_PG), axis=1)
        rows_P = np.arange(len(low_P))
        x_P = x_PG[rows_P, best_P]
        low_P, high_P = x_PG[rows_P, np.maximum(best_P - 1, 0)], x_PG[rows_P, np.minimum(best_P + 1, points - 1)]
    return x_P


def _column(value, size: int):
    """A precision's value beside a grid: [P, 1] numbers, or what is no number (the name of a scheme) as it is."""
    return value if isinstance(value, str) else np.broadcast_to(np.asarray(value, dtype=np.float64), (size,))[:, None]
