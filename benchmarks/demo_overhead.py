"""Where the time of `bitlaw demo` goes: python -m benchmarks.demo_overhead [--fraction 0.05]

Runs the demo's sweep with every budget shortened to a fraction, in an empty folder, then the fits and the report. Everything but the
training steps takes as long as in the demo itself, so its share there follows: training seconds divided by the fraction, the rest as
measured. Goal: at most a fifth outside training steps and evaluation.
"""
from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks import timing

GOAL = 0.2
SWEEP = "demo"


@contextlib.contextmanager
def evaluation_timed() -> Iterator[list[float]]:
    """Seconds of every evaluation in the block, compilation excluded; a launch reports them together with checkpoints."""
    from trainer.cohort import Program

    original, seconds = Program.evaluate, []

    def evaluate(self, *arguments):
        began, compiling = time.perf_counter(), self.compile_seconds
        losses = original(self, *arguments)
        seconds.append(time.perf_counter() - began - (self.compile_seconds - compiling))
        return losses

    Program.evaluate = evaluate
    try:
        yield seconds
    finally:
        Program.evaluate = original


def shortened(fraction: float, runs_dir: str, overrides: list[str]):
    """The demo's configs with every number of steps times the fraction (distinct ones stay distinct, and at least 8 apart)."""
    from trainer.cli import sweep_configs

    original = sorted({config.steps for config in sweep_configs([f"sweep={SWEEP}", *overrides])[0]})
    budgets = [max(round(steps * fraction), 8 * (i + 1)) for i, steps in enumerate(original)]
    configs, _ = sweep_configs([f"sweep={SWEEP}", f"runs_dir={runs_dir}", f"steps={','.join(map(str, budgets))}", *overrides])
    return configs, sum(original) / sum(budgets)


def measure(fraction: float, overrides: list[str]) -> tuple[dict[str, float], float, dict]:
    """(seconds by part, how much more the demo trains, counts) of one shortened demo."""
    began = time.perf_counter()
    from scaling.cli import conclude
    from trainer.cohort import use_host_devices
    from trainer.sweep import execute, make_plan

    with tempfile.TemporaryDirectory() as folder, evaluation_timed() as evaluations:
        configs, longer = shortened(fraction, folder, overrides)
        use_host_devices(configs[0].options.host_devices)
        plan = make_plan(configs)
        planned = time.perf_counter()
        outcome = execute(plan)
        trained = time.perf_counter()
        conclude(Path(folder) / SWEEP)
        concluded = time.perf_counter()
    if outcome.failed:
        raise RuntimeError(f"{len(outcome.failed)} of {len(plan.runs)} runs failed")
    seconds = {
        "imports, data and plan": planned - began,
        "training steps": outcome.training_seconds,
        "evaluation": sum(evaluations),
        "checkpoints and records": outcome.event_seconds - sum(evaluations),
        "compilation": outcome.compile_seconds,
        "other": outcome.seconds - outcome.training_seconds - outcome.event_seconds - outcome.compile_seconds,
        "fits and report": concluded - trained,
    }
    counts = {"runs": len(plan.runs), "programs": len(plan.cohorts), "compiles": outcome.compiles, "evaluations": len(evaluations),
              "tokens": outcome.tokens, "tokens_per_s": round(outcome.tokens / outcome.training_seconds)}
    return seconds, longer, counts


def outside(seconds: dict[str, float]) -> float:
    """The share of the time that is neither a training step nor evaluation."""
    return 1.0 - (seconds["training steps"] + seconds["evaluation"]) / sum(seconds.values())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo_overhead", description=__doc__.splitlines()[0])
    parser.add_argument("--fraction", type=float, default=0.05, help="of the demo's training steps (1: all of it)")
    parser.add_argument("overrides", nargs="*", help="KEY=VALUE, as `bitlaw sweep` takes them")
    options = parser.parse_args()
    with contextlib.redirect_stdout(sys.stderr):
        seconds, longer, counts = measure(options.fraction, options.overrides)
    demo = {**seconds, "training steps": seconds["training steps"] * longer}
    share = outside(demo)

    def rounded(parts: dict[str, float]) -> dict[str, float]:
        return {name: round(value, 1) for name, value in parts.items()} | {"total": round(sum(parts.values()), 1)}

    timing.print_json({
        "machine": timing.machine(), **counts,
        "measured": {"fraction": options.fraction, "seconds": rounded(seconds), "share_outside": round(outside(seconds), 3)},
        "demo": {"seconds": rounded(demo), "share_outside": round(share, 3), "goal": {"at_most": GOAL}, "met": share <= GOAL},
    })


if __name__ == "__main__":
    main()
