"""A run so small that compiling it is all that it costs, as overrides; and what to compare of run folders."""
from __future__ import annotations

import functools
from pathlib import Path

import jax
import numpy as np

import trainer
from trainer import build, checkpoint, step
from trainer.cli import sweep_configs
from trainer.cohort import Program
from trainer.records import RunFolder
from trainer.sweep import execute, make_plan

# Stochastic rounding of the weights: whatever changes a key or an order changes the run.
TINY = ["model=2k", "model.num_layers=1", "model.d_model=8", "model.num_heads=2", "model.d_ff=12", "data=synthetic", "data.vocab_size=11",
        "data.order=1", "data.tokens=20000", "batch_size=4", "seq_len=8", "eval.sequences=8", "schedule.warmup_steps=2", "precision=int",
        "precision.weights.rounding=stochastic", "probe=false", "steps_per_dispatch=5", "log_every=1", "checkpoint.every_seconds=1000"]  # fmt: skip

shared_program = functools.cache(Program)  # in the place of Program: one for each structure and layout, for all tests

# Columns that tell of this launch and not of the run.
OF_THE_LAUNCH = {"wall_s", "peak_bytes_per_param", "tokens_per_s", "mfu", "code_version", "sweep"}


def launch(runs_dir, *overrides, **how):
    """Plans (how: as make_plan takes it) and carries out a sweep of the tiny run in runs_dir: (plan, outcome)."""
    configs, _ = sweep_configs([*TINY, f"runs_dir={runs_dir}", *overrides])
    plan = make_plan(configs, **how)
    return plan, execute(plan, quiet=True)


def folders(runs_dir) -> dict[str, RunFolder]:
    """Run id -> folder of everything that was run below runs_dir."""
    return {path.parent.name: RunFolder(path.parent) for path in Path(runs_dir).glob("*/*/config.json")}


def results(runs_dir) -> dict[str, tuple]:
    """Run id -> (record, metrics, step and bytes of the last checkpoint), without what tells of the launch."""
    found = {}
    for run_id, folder in folders(runs_dir).items():
        record = {name: value for name, value in folder.record().items() if name not in OF_THE_LAUNCH}
        metrics = [{name: value for name, value in row.items() if name != "wall_s"} for row in folder.metrics()]
        found[run_id] = (record, metrics, final_state(folder))
    return found


def final_state(folder: RunFolder) -> tuple[int, bytes] | None:
    """(step, bytes of every leaf) of the newest checkpoint; None for a run that never had a state of its own."""
    restored = checkpoint.restore(folder.checkpoints, _state_shapes())
    return restored and (restored[0], b"".join(leaf.tobytes() for leaf in jax.tree.leaves(restored[1])))


@functools.cache
def _state_shapes():
    """What a checkpoint of the tiny run holds."""
    config = trainer.config(*TINY, "steps=1")
    shapes = jax.eval_shape(functools.partial(step.init, build.step_structure(config, vocab_size=11)), build.hyper(config))
    return jax.tree.map(lambda x: np.empty(x.shape, x.dtype), shapes)


def close(runs_dir, other_dir) -> float:
    """Largest difference between the final losses of the same runs in two folders, nats."""
    here, there = ({run_id: folder.record()["loss"] for run_id, folder in folders(d).items()} for d in (runs_dir, other_dir))
    assert here.keys() == there.keys()
    return float(np.max([abs(here[run_id] - there[run_id]) for run_id in here]))
