"""Run folders with known truth: the design of `bitlaw demo`, losses from Chinchilla x Kumar plus noise. No training.

`python tests/scaling/fake_runs.py FOLDER` writes one; tests call `write_runs`.
"""
from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

SIZES = {"2k": 2_304, "5k": 5_120, "10k": 10_368, "25k": 24_576}
BUDGETS = (600_000, 1_500_000, 3_800_000)
BITS = {"int3": 3.0, "int4": 4.0, "int6": 6.0, "float32": 32.0}
TRUTH = {"A": 42.0, "B": 330.0, "E": 1.05, "alpha": 0.42, "beta": 0.42, "gamma": 1.4}
BATCH_TOKENS = 4_096


def true_loss(n_params, tokens, bits, truth=TRUTH):
    """Nats per token by the truth: weights and activations at `bits`, one gamma, written out here on purpose."""
    factor = np.where(np.asarray(bits) >= 32, 1.0, 1.0 - np.exp(-np.asarray(bits) / truth["gamma"]))
    return truth["A"] / (n_params * factor**2) ** truth["alpha"] + truth["B"] / tokens ** truth["beta"] + truth["E"]


def rows(noise=0.004, seeds=1, sizes=SIZES, budgets=BUDGETS, bits=BITS, rng_seed=0, truth=TRUTH):
    """Column -> array of a whole design: n_params, tokens, seed, precision, weights_bits, activations_bits, loss."""
    rng = np.random.default_rng(rng_seed)
    grid = [(n, d, name, p, s) for n in sizes.values() for d in budgets for name, p in bits.items() for s in range(seeds)]
    n, d, name, p, s = (np.array(column) for column in zip(*grid, strict=True))
    loss = true_loss(n, d, p, truth) * np.exp(noise * rng.standard_normal(len(grid)))
    return {"n_params": n, "tokens": d, "seed": s, "precision": name, "weights_bits": p, "activations_bits": p, "loss": loss}


def write_runs(folder: Path, diverge: tuple[int, ...] = (), fail: tuple[int, ...] = (), **design) -> Path:
    """Writes record.json and metrics.jsonl for every row of `rows(**design)`; `diverge`, `fail`: indices of runs that did."""
    table = rows(**design)
    for i in range(len(table["loss"])):
        row = {name: values[i].item() for name, values in table.items()}
        size = next((name for name, n in SIZES.items() if n == row["n_params"]), str(row["n_params"]))
        run_id = f"{size}-{row['tokens'] // 1000}k-{row['precision']}-s{row['seed']}"
        status = "diverged" if i in diverge else "failed" if i in fail else "done"
        record = row | {"run_id": run_id, "sweep": "fake", "status": status, "n_params_total": row["n_params"] + 256 * 32,
                        "flops": 6.0 * row["n_params"] * row["tokens"], "loss_std_err": 0.004, "bits_per_byte": row["loss"] / np.log(2.0),
                        "loss_train": row["loss"] - 0.01, "wall_s": 2.5, "tokens_per_s": row["tokens"] / 2.5, "data": "stdlib",
                        "device": "cpu", "steps": row["tokens"] // BATCH_TOKENS, "batch_tokens": BATCH_TOKENS, "lr": 0.01,
                        "trunk_id": f"{size}-{row['precision']}-s{row['seed']}"}
        if status != "done":
            record |= {"loss": None, "loss_std_err": None, "bits_per_byte": None, "diverged_step": 120 if status == "diverged" else None}
        path = folder / run_id
        path.mkdir(parents=True)
        (path / "record.json").write_text(json.dumps(record))
        (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in _curve(row)))
    return folder


def _curve(row: dict):
    """Training loss that falls from ln 256 to the final loss as a power of the tokens seen."""
    for share in np.geomspace(0.02, 1.0, 20):
        loss = row["loss"] + (np.log(256) - row["loss"]) * max(share**-0.3 - 1.0, 0.0) / (0.02**-0.3 - 1.0)
        yield {"step": int(row["steps"] * share) if "steps" in row else int(row["tokens"] * share) // BATCH_TOKENS,
               "tokens": int(row["tokens"] * share), "loss": float(loss), "lr": 0.01, "grad_norm": 1.0}


if __name__ == "__main__":
    print(write_runs(Path(sys.argv[1]), diverge=(12,)))
