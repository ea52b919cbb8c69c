"""A sweep in cohorts against its runs one by one: python -m benchmarks.sweeps [--steps 200] [--processes 4]

64 runs: the 10k and 25k models, 8 widths, 4 seeds. Three ways to train them:
    cohorts      `execute` as `bitlaw sweep` calls it, members dealt to one host device per core
    lax.map      the same on one host device (a process of its own, since devices are settled when JAX starts)
    processes    `bitlaw train`, a process for each run; a sample is run (every width, sizes and seeds in turn), the rest follows from its mean

Goals: at most 0.5 s per run outside training steps in a cohort; planning and recording at most 2 % of the whole. On an accelerator
instead: tokens/s of cohorts of 16 and 64 over a single run's, of models of width 64 and 128 (goal: 8).
"""
from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import timing

MODELS, WIDTHS, SEEDS = ("10k", "25k"), (2, 3, 4, 5, 6, 8, 12, 32), 4
OUTSIDE_S, BOOKKEEPING, GPU_GOAL = 0.5, 0.02, 8.0
RUN = ("data=synthetic", "precision=int", "batch_size=8", "seq_len=64", "eval.sequences=256", "log_every=20", "compile_cache=null")


def cohorts(steps: int, host_devices: str) -> dict:
    """The sweep in an empty folder, in this process."""
    began = time.perf_counter()
    from trainer.cli import sweep_configs
    from trainer.cohort import use_host_devices
    from trainer.sweep import execute, make_plan

    imported = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        configs, _ = sweep_configs([*RUN, f"model={','.join(MODELS)}", f"precision.bits={','.join(map(str, WIDTHS))}", f"seed=range({SEEDS})", f"steps={steps}",
                                    f"runs_dir={folder}", f"host_devices={host_devices}"])
        use_host_devices(configs[0].options.host_devices)
        plan = make_plan(configs)
        planned = time.perf_counter()
        outcome = execute(plan, quiet=True)
    if outcome.failed or len(outcome.records) != len(plan.runs):
        raise RuntimeError(f"{len(outcome.failed)} of {len(plan.runs)} runs failed")
    wall = time.perf_counter() - began
    # What is neither steps nor evaluation nor compiling: making the plan, folders, records, batches, waiting.
    bookkeeping = planned - imported + outcome.seconds - outcome.training_seconds - outcome.event_seconds - outcome.compile_seconds
    return {"runs": len(plan.runs), "cohorts": len(plan.cohorts), "layout": plan.cohorts[0].layout.name, "compiles": outcome.compiles, "wall_s": wall,
            "training_s": outcome.training_seconds, "compile_s": outcome.compile_seconds, "events_s": outcome.event_seconds, "planning_s": planned - imported,
            "bookkeeping_s": bookkeeping, "outside_s_per_run": (wall - outcome.training_seconds) / len(plan.runs), "tokens": outcome.tokens}


def own_process(*arguments: str) -> dict:
    """This module's --part in a process of its own: what it prints."""
    done = subprocess.run([sys.executable, "-m", "benchmarks.sweeps", *arguments], check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    return json.loads(done.stdout)


def processes(steps: int, count: int) -> dict:
    """A process for each of `count` of the runs: mean wall time, and the part of it that is not training."""
    walls, outside = [], []
    with tempfile.TemporaryDirectory() as folder:
        for index in range(count):
            choice = (f"model={MODELS[index % len(MODELS)]}", f"precision.bits={WIDTHS[index % len(WIDTHS)]}", f"seed={index % SEEDS}", f"steps={steps}", f"runs_dir={folder}/{index}")
            began = time.perf_counter()
            subprocess.run([sys.executable, "bitlaw.py", "train", *RUN, *choice], check=True, capture_output=True, cwd=Path(__file__).parents[1])
            walls.append(time.perf_counter() - began)
            record = json.loads(next(Path(folder, str(index)).rglob("record.json")).read_text())
            outside.append(walls[-1] - record["wall_s"])
    runs = len(MODELS) * len(WIDTHS) * SEEDS
    return {"sample": count, "wall_s_per_run": sum(walls) / count, "outside_s_per_run": sum(outside) / count, "wall_s": runs * sum(walls) / count, "compiles": 4 * runs}


def accelerator() -> dict:
    """Tokens/s of cohorts over those of one run, of models by their width."""
    from benchmarks import our_step

    found = {}
    for width in (64, 128):  # about 150k and 1m parameters
        config = our_step.model(width)
        programs = {str(members): our_step.program(config, our_step.FLOAT32, members) for members in (1, 16, 64)}
        seconds = {name: timing.visit(program) for name, program in programs.items()}
        found[f"width {width}"] = {f"cohort of {members}": seconds["1"] / seconds[members] for members in ("16", "64")}
    return {"tokens_per_s_over_one_run": found, "goal": {"at_least": GPU_GOAL}}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweeps", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--processes", type=int, default=4, help="how many runs of the sweep are also trained in a process each")
    parser.add_argument("--part", choices=("cohorts", "map"), help="print this part alone")
    options = parser.parse_args()
    if options.part:
        print(json.dumps(cohorts(options.steps, "null" if options.part == "cohorts" else "1")))
        return
    found = {part: own_process("--part", part, "--steps", str(options.steps)) for part in ("cohorts", "map")}
    found["processes"] = processes(options.steps, options.processes)
    ours = found["cohorts"]
    share = ours["bookkeeping_s"] / ours["wall_s"]
    result = {
        "machine": timing.machine(), **found,
        "speedup": {"over_processes": found["processes"]["wall_s"] / ours["wall_s"], "training_over_lax_map": found["map"]["training_s"] / ours["training_s"]},
        "outside_s_per_run": {"value": ours["outside_s_per_run"], "goal": {"at_most": OUTSIDE_S}, "met": ours["outside_s_per_run"] <= OUTSIDE_S},
        "bookkeeping_share": {"value": share, "goal": {"at_most": BOOKKEEPING}, "met": share <= BOOKKEEPING},
    }
    import jax

    if jax.devices()[0].platform != "cpu":
        result["accelerator"] = accelerator()
    timing.print_json(result)


if __name__ == "__main__":
    main()
