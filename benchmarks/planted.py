"""Trainers that train nothing, for measuring `answer`: losses are drawn from a planted law with noise, or looked up in a run table. Costs are
FLOP, 6 N D a run."""
from __future__ import annotations

from dataclasses import dataclass

import duckdb
import numpy as np

from scaling.answer import Cell

SIZES, BUDGETS, WIDTHS = (2_304, 6_912, 13_824, 24_576, 50_000), (300_000, 600_000, 1_500_000, 3_800_000), (2.0, 3.0, 4.0, 6.0, 8.0, 32.0)
SEEDS = 3


def planted_loss(truth, N, D, bits):
    """Nats per token by Kumar's law with one gamma for weights and activations, written out here on purpose."""
    factor = 1.0 if bits >= 32 else 1.0 - np.exp(-bits / truth["gamma"])
    return truth["A"] / (N * factor**2) ** truth["alpha"] + truth["B"] / D ** truth["alpha"] + truth["E"]


def world(rng) -> dict:
    """Constants about those of small runs; gamma 2 to 4 bits, so that the optimum, 1.2564 gamma, lies within the widths."""
    return {"A": 42.0 * rng.lognormal(0, 0.2), "B": 330.0 * rng.lognormal(0, 0.2), "E": 1.05, "alpha": rng.uniform(0.36, 0.48), "gamma": rng.uniform(2.0, 4.0)}


OPTIMUM = 1.2564312086261697  # x e^-x * 2 = 1 - e^-x: where (1 - e^-x)^2 / x is largest


@dataclass(frozen=True)
class Seeded(Cell):
    """A cell with the seed that its run would have."""

    seed: int = 0


class Planted:
    """A `scaling.rounds.Trainer`. noise: deviation of ln loss, Gaussian, of every run."""

    def __init__(self, truth, rng, noise=0.004, seeds=SEEDS):
        self.truth, self.rng, self.noise = truth, rng, noise
        self._cells = [Seeded(f"{n}-{d}-{b:g}-{s}", {"N": float(n), "D": float(d), "weights_bits": b, "activations_bits": b}, 6.0 * n * d, seed=s)
                       for s in range(seeds) for n in SIZES for d in BUDGETS for b in WIDTHS]
        self._done, self._losses = [], []

    def cells(self):
        done = {cell.key for cell in self._done}
        return [cell for cell in self._cells if cell.key not in done]

    def table(self):
        there = [dict(cell.columns) for cell in self._done]
        columns = {name: np.array([row[name] for row in there]) for name in (there[0] if there else ())}
        return (columns | {"loss": np.array(self._losses)} if there else None), there

    def train(self, cells):
        self._losses += [self._loss(cell) for cell in cells]
        self._done += cells
        return True

    def spent(self):
        return sum(cell.cost for cell in self._done)

    def _loss(self, cell):
        loss = planted_loss(self.truth, cell.columns["N"], cell.columns["D"], cell.columns["weights_bits"])
        return loss * np.exp(self.noise * self.rng.standard_normal())


class Recorded(Planted):
    """The finished runs of a run table (CSV or Parquet); nothing but what is asked for is seen of their losses."""

    def __init__(self, path: str):
        rows = duckdb.read_csv(path) if path.endswith(".csv") else duckdb.read_parquet(path)
        rows = rows.filter("status = 'done'").project("run_id, n_params, tokens, coalesce(weights_bits, 32), coalesce(activations_bits, 32), seed, loss")
        self._cells, self._recorded, self._done, self._losses = [], {}, [], []
        for run_id, n, d, weights, activations, seed, loss in rows.fetchall():
            columns = {"N": float(n), "D": float(d), "weights_bits": float(weights), "activations_bits": float(activations)}
            self._cells.append(Seeded(run_id, columns, 6.0 * n * d, seed=seed))
            self._recorded[run_id] = loss

    def _loss(self, cell):
        return self._recorded[cell.key]
