"""What thousands of run folders cost to read, against their goals: python -m benchmarks.records [--runs 2000] [--rows 200]

Makes run folders as a sweep leaves them (two thirds done, some diverged, failed, running, stopped, missing; each with a metrics file, a
checkpoint's files and, the running ones, a living process), and times the commands in processes of their own, imports and all: `bitlaw
status`, `bitlaw table` to Parquet and to CSV, and `scaling.curves`, which reads every row. Memory is the peak of the process.
"""
from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import timing

GOALS_S = {"status": 2.0, "table to parquet": 3.0, "table to csv": 3.0}
GOAL_MIB = 512
STATES = ("done",) * 14 + ("diverged", "failed", "running", "stopped", "missing", "done")  # a cycle of 20 runs
CHECKPOINT_FILES = ("manifest.json", "state/packed/c/0", "state/_METADATA")


def state(index: int) -> str:
    return STATES[index % len(STATES)]


def make(root: Path, runs: int, rows: int) -> None:
    """The folders of a sweep of `runs` runs, `rows` metrics rows each."""
    from trainer.records import RECORD_VERSION, RunFolder, complete

    ids = [f"{index:016x}" for index in range(runs)]
    root.mkdir(parents=True)
    (root / "plan.json").write_text(json.dumps({"sweep": "synthetic", "run_ids": ids}))
    for index, run_id in enumerate(ids):
        if state(index) == "missing":
            continue
        run = RunFolder(root / run_id)
        run.path.mkdir()  # plain writes below: those of a run wait for the disk
        (run.path / "config.json").write_text(json.dumps({"record_version": RECORD_VERSION, "run_id": run_id, "config": _config(index)}, indent=1))
        run.append_metrics({"step": 10 * (row + 1), "tokens": 40960 * (row + 1), "loss": 5.5 - 0.01 * row, "lr": 0.01, "grad_norm": 1.0 + 1e-3 * row,
                            "wall_s": 0.25 * row, "tokens_per_s": 163840.0} for row in range(rows))
        for name in CHECKPOINT_FILES:
            (run.checkpoints / "2000" / name).parent.mkdir(parents=True, exist_ok=True)
            (run.checkpoints / "2000" / name).write_text("{}")
        if state(index) in ("done", "diverged", "failed"):
            (run.path / "record.json").write_text(json.dumps(complete(_record(index, run_id)), indent=1))


def _config(index: int) -> dict:
    return {"seed": index, "steps": 2000, "model": {"name": "25k", "num_layers": 2, "d_model": 32}, "precision": {"name": "int", "weights": {"bits": 4}}}


def _record(index: int, run_id: str) -> dict:
    """Most columns filled, as a quantized run fills them."""
    from trainer.records import RECORD_COLUMNS

    example = {str: "int4", int: 1000 + index, float: 3.0 + 1e-4 * index}
    done = state(index) == "done"
    return {name: example[kind] for name, kind in RECORD_COLUMNS.items()} | {
        "run_id": run_id, "sweep": "synthetic", "status": state(index), "loss": 3.0 + 1e-4 * index if done else None,
        "diverged_step": 40 if state(index) == "diverged" else None, "ptq_int4": 3.5}


def measured(command: list[str], expected: str, codes: tuple[int, ...]) -> dict[str, float]:
    """Seconds and peak memory, MiB, of a command of Python's; RuntimeError when it did not do what it should."""
    began = time.perf_counter()
    with subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=Path(__file__).parents[1]) as process:
        said = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - began
    if process.returncode not in codes or not re.search(expected, said, re.MULTILINE):
        raise RuntimeError(f"{' '.join(command)} exited with {process.returncode} and said {said[-500:]}")
    return {"seconds": round(seconds, 3), "peak_mib": round(usage.ru_maxrss / 1024, 1)}


def measure(root: Path, runs: int, rows: int, repeats: int) -> dict:
    """Every command's best seconds and largest peak of `repeats`, beside its goal."""
    from trainer import lease
    from trainer.records import RunFolder

    count = {name: sum(state(index) == name for index in range(runs)) for name in set(STATES)}
    over = count["done"] + count["diverged"] + count["failed"]
    curves = f"import scaling; print(len(scaling.curves({str(root)!r})), 'rows')"
    commands = {
        "status": (["-m", "bitlaw", "status", str(root)], f"^running +{count['running']}$", (1,)),
        "table to parquet": (["-m", "bitlaw", "table", str(root), "--out", str(root.parent / "t.parquet")], f"{over} runs", (0,)),
        "table to csv": (["-m", "bitlaw", "table", str(root), "--out", str(root.parent / "t.csv")], f"{over} runs", (0,)),
        "curves": (["-c", curves], f"{(runs - count['missing']) * rows} rows", (0,)),
    }
    result = {}
    running = [RunFolder(root / f"{index:016x}").lease for index in range(runs) if state(index) == "running"]
    with lease.held(running):
        for name, command in commands.items():
            print(f"{name}: {repeats} times", file=sys.stderr, flush=True)
            figures = [measured(*command) for _ in range(repeats)]
            result[name] = {"seconds": min(f["seconds"] for f in figures), "all_seconds": [f["seconds"] for f in figures],
                            "peak_mib": max(f["peak_mib"] for f in figures)}
            if name in GOALS_S:
                goal = {"seconds_at_most": GOALS_S[name], "peak_mib_at_most": GOAL_MIB}
                result[name] |= {"goal": goal, "met": result[name]["seconds"] <= GOALS_S[name] and result[name]["peak_mib"] <= GOAL_MIB}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.records", description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--rows", type=int, default=200, help="metrics rows of each")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "synthetic"
        print(f"writing {options.runs} run folders", file=sys.stderr, flush=True)
        make(root, options.runs, options.rows)
        result = measure(root, options.runs, options.rows, options.repeats)
    met = all(figures.get("met", True) for figures in result.values())
    timing.print_json({"machine": timing.machine(("duckdb", "rich")), "runs": options.runs, "rows": options.rows, "all_met": met, **result})


if __name__ == "__main__":
    main()
