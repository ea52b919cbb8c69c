"""A realistic table for every law: a design like the paper's, losses of published constants, seeded noise. What no paper printed is said beside it."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

import scaling
from scaling.laws import laws
from tests.scaling.conftest import shared

HOFFMANN = laws["chinchilla"].published["hoffmann"]
KUMAR = laws["kumar"].published["kumar"]


@dataclass(frozen=True)
class Planted:
    """law: its name, with variants; truth: its constants; design: () -> columns; noise: deviation of ln loss."""

    law: str
    truth: Mapping[str, float]
    design: Callable[[], dict[str, np.ndarray]]
    noise: float = 0.005

    def table(self, seed: int) -> dict[str, np.ndarray]:
        """The design with losses of this seed."""
        columns = self.design()
        loss = laws[self.law.partition(":")[0]].predict(self.truth, **columns)
        return columns | {"loss": loss * np.exp(self.noise * np.random.default_rng(seed).standard_normal(loss.size))}


def crossed(**levels) -> dict[str, np.ndarray]:
    """Every combination of the levels."""
    grids = np.meshgrid(*levels.values(), indexing="ij")
    return {name: grid.ravel() for name, grid in zip(levels, grids, strict=True)}


def per_param(sizes, ratios, **more) -> dict[str, np.ndarray]:
    """Sizes crossed with tokens per parameter."""
    columns = crossed(N=sizes, D=ratios, **more)
    return columns | {"D": columns["N"] * columns["D"]}


def pairs(columns: dict[str, np.ndarray], **rows) -> dict[str, np.ndarray]:
    """Every row of `columns` with every row of `rows`: {"weights_bits": [...], "activations_bits": [...]} of one length."""
    at = crossed(i=np.arange(len(next(iter(columns.values())))), k=np.arange(len(next(iter(rows.values())))))
    return {name: np.asarray(values)[at["i"]] for name, values in columns.items()} | {name: np.asarray(values)[at["k"]] for name, values in rows.items()}


LLAMA = (30.48e6, 49.56e6, 102.78e6, 203.19e6)  # of Quartet and QuEST
OLMO = dict(N=[3e7, 6e7, 1.1e8, 2.2e8], D=[1.5e9, 3e9, 6e9, 1.3e10])  # of Kumar et al.
ALONE = [(b, 32.0, 32.0) for b in (3.0, 4, 5, 6, 7, 8, 12)] + [(32.0, b, 32.0) for b in (4.0, 5, 6, 7, 8, 12)] + [(32.0, 32.0, b) for b in (4.0, 5, 6, 7, 8, 12)]
TOGETHER = [(b, b, b) for b in (4.0, 5, 6, 7, 8, 12)]
NAMES = ("weights_bits", "activations_bits", "kv_bits")


def widths(rows) -> dict[str, list[float]]:
    return {name: [row[i] for row in rows] for i, name in enumerate(NAMES)}


def sun_design() -> dict[str, np.ndarray]:
    """The 343 configurations of Sun et al. that were fitted and have a block of stated size."""
    rows = scaling.table(shared("data/sun2025-design/configs.csv")).filter("fitting AND log2B_used IS NOT NULL").fetchnumpy()
    rows = {name: np.asarray(values, dtype=np.float64) for name, values in rows.items() if name in ("N", "D", "E", "M", "log2B_used")}
    return {"N": rows["N"], "D": rows["D"], "exp_bits": rows["E"], "man_bits": rows["M"], "block": 2.0 ** rows["log2B_used"]}


def quartet_design() -> dict[str, np.ndarray]:
    """Baselines, and every scheme of a pass with the other pass at the baseline or at RTN."""
    schemes = ["baseline", "SR", "RTN", "QuEST"]
    both = [(f, b) for f in schemes for b in schemes if "baseline" in (f, b) or "RTN" in (f, b)]
    return pairs(per_param(LLAMA, [25.0, 50, 100, 200, 400, 800]), forward=[f for f, _ in both], backward=[b for _, b in both])


def repeated_design() -> dict[str, np.ndarray]:
    """Sizes that do and do not exceed what the unique tokens need, seen 1 to 100 times."""
    columns = crossed(N=[7e6, 2e7, 8e7, 2.8e8, 1e9, 4e9], unique_tokens=[1e8, 4e8, 1.6e9, 6e9, 2.5e10], epochs=[1.0, 3, 10, 30, 100])
    return {"N": columns["N"], "unique_tokens": columns["unique_tokens"], "D": columns["unique_tokens"] * columns["epochs"]}


QUEST_MSE = (0.363, 0.119, 0.0374, 0.0115, 0.00349, 1e-4)  # of uniform grids of 1 to 5 and 8 bits on Gaussian data, rounded
MSE_ROWS = dict(weights_mse=[0.0, *QUEST_MSE, *[0.0] * 6, *QUEST_MSE], activations_mse=[0.0, *[0.0] * 6, *QUEST_MSE, *QUEST_MSE])
BASE = {name: HOFFMANN[name] for name in ("A", "B", "E", "alpha", "beta")}

PLANTED = {
    "chinchilla": Planted("chinchilla", laws["chinchilla"].published["epoch_huber"],
                          lambda: crossed(N=[6e7, 1.6e8, 4e8, 1e9, 2.6e9, 6.5e9, 1.6e10], D=[1e9, 3e9, 1e10, 3e10, 1e11, 3e11])),
    "kaplan": Planted("kaplan", laws["kaplan"].published["kaplan"],
                      lambda: crossed(N=[4e5, 3e6, 1.3e7, 8.5e7, 3e8, 7e8], D=[2.1e7, 8.5e7, 3.4e8, 1.4e9, 5.5e9, 2.3e10])),
    "busbridge": Planted("busbridge", laws["busbridge"].published["quartet_baseline"],
                         lambda: per_param((*LLAMA, 443.1e6, 822.2e6), [5.0, 25, 50, 100, 200, 400, 800])),
    "kumar": Planted("kumar:tied", KUMAR, lambda: pairs(crossed(**OLMO), **widths([(32.0, 32.0, 32.0), *ALONE, *TOGETHER]))),
    "kumar_ptq": Planted("kumar_ptq", laws["kumar_ptq"].published["kumar_no_offset"], lambda: crossed(**OLMO, ptq_bits=[2.0, 3, 4, 5, 32]), 0.003),
    # C_w, C_a, C_kv were never printed: 0.5, 0.4, 0.6 are ours.
    "kumar_unified": Planted("kumar_unified:tied", laws["kumar_unified"].published["kumar"] | {"C_w": 0.5, "C_a": 0.4, "C_kv": 0.6},
                             lambda: pairs(crossed(**OLMO, ptq_bits=[2.0, 3, 4, 32]), **widths([(32.0, 32.0, 32.0), *ALONE, *TOGETHER])), 0.003),
    "sun": Planted("sun", laws["sun"].published["sun"], sun_design, 0.003),
    "quartet": Planted("quartet", laws["quartet"].published["quartet"], quartet_design),
    "free_efficiency": Planted("free_efficiency", {n: v for n, v in laws["free_efficiency"].published["quest"].items() if "fp4" not in n and "sparse" not in n},
                               lambda: per_param((*LLAMA, 430e6, 800e6), [25.0, 50, 100], scheme=["baseline", "int1", "int2", "int3", "int4", "int8"])),
    # The next two have no published constants: Hoffmann's base, and curves like those that the QuEST runs choose.
    "mse_efficiency": Planted("mse_efficiency", BASE | {"c_w": 3.0, "kappa_w": 0.7, "c_a": 4.0, "kappa_a": 0.8}, lambda: pairs(
        per_param((3e7, 1e8, 3e8, 1e9), [10.0, 40, 160]), **MSE_ROWS)),
    "mse_efficiency_tanh": Planted("mse_efficiency_tanh", BASE | {"F_w": 0.5, "C_w": 0.8, "F_a": 0.4, "C_a": 0.9}, lambda: pairs(
        per_param((3e7, 1e8, 3e8, 1e9), [10.0, 40, 160]), **MSE_ROWS)),
    # Chen et al.'s A, B and E were not found: Hoffmann's stand for them.
    "qat": Planted("qat:tied", laws["qat"].published["W4A4"] | {name: HOFFMANN[name] for name in ("A", "B", "E")}, lambda: crossed(
        N=[7.4e7, 1.45e8, 2.97e8, 5.95e8], D=[1e10, 2e10, 5e10, 1e11, 2e11], group=[np.inf, 32.0, 64, 128, 256, 1024]), 0.003),
    "ptq_power": Planted("ptq_power", laws["ptq_power"].published["ouyang"], lambda: crossed(
        N=[1.6e8, 4.1e8, 1e9, 2.8e9, 6.9e9, 1.2e10], D=[2e9, 1e10, 5e10, 2e11, 3e11], ptq_bits=[2.0, 3, 4]), 0.01),
    "data_constrained": Planted("data_constrained:tied", laws["data_constrained"].published["muennighoff"], repeated_design),
    # Brown et al. print no single pair: a curve like those of their figures.
    "coverage": Planted("coverage", {"a": 2.0, "b": 0.4}, lambda: {"k": np.geomspace(1, 1e4, 25)}, 0.01),
}
