"""Timing by comparison: programs take turns in rotated order, and only ratios taken within one round are believed.

A figure in milliseconds depends on the machine and on who else uses it; a ratio of two programs that ran moments apart
hardly does. A `visit` to a program is one untimed call, so that it is timed with warm caches, and the thread pools of the others
asleep, and then a few timed ones, of which the median counts.
"""
from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Visit = Callable[[], float]  # seconds of one unit of work


@dataclass(frozen=True)
class Program:
    """Something to time. `work` does `units` units of work and does not return before they are done (`jax.block_until_ready`);
    it keeps its own state and donates it."""

    work: Callable[[], object]
    units: int = 1


@dataclass(frozen=True)
class Samples:
    """Seconds of one program, one number for each round, in the order of the rounds."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def minimum(self) -> float:
        return min(self.seconds)

    def milliseconds(self) -> dict[str, float]:
        return {"median_ms": round(1e3 * self.median, 3), "minimum_ms": round(1e3 * self.minimum, 3)}


def timed(work: Callable[[], object]) -> float:
    """Seconds that work() takes. work must not return before it is done."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def visit(program: Program, repeats: int = 3) -> float:
    """Seconds of one unit: the median of `repeats` calls after an untimed one."""
    program.work()
    return statistics.median(timed(program.work) for _ in range(repeats)) / program.units


def interleave(visits: dict[str, Visit], rounds: int) -> dict[str, Samples]:
    """Every program once a round, the first of a round being another one each time: whoever comes first pays (measured: 14 %)."""
    names = list(visits)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for index in range(rounds):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(visits[name]())
    return {name: Samples(tuple(values)) for name, values in seconds.items()}


def ratio(samples: dict[str, Samples], over: str, under: str) -> dict[str, float]:
    """How many times as long `over` takes as `under`: the median of the rounds' ratios, and the ratio of the minima."""
    per_round = [a / b for a, b in zip(samples[over].seconds, samples[under].seconds, strict=True)]
    return {"ratio": round(statistics.median(per_round), 3),
            "ratio_of_minima": round(samples[over].minimum / samples[under].minimum, 3)}


def judged(measured: dict[str, float], *, at_most: float | None = None, at_least: float | None = None) -> dict:
    """The ratio beside its goal; `met` goes by the median ratio."""
    goal = {"at_most": at_most} if at_most is not None else {"at_least": at_least}
    met = measured["ratio"] <= at_most if at_most is not None else measured["ratio"] >= at_least
    return {**measured, "goal": goal, "met": met}


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def machine(packages: Sequence[str] = ("jax", "numpy")) -> dict:
    """What a figure has to be read with: cores, load, Python and package versions (null where not installed)."""
    return {"cores": cores(), "load": [round(x, 1) for x in os.getloadavg()], "processor": _processor(),
            "python": platform.python_version(), **{name: _version(name) for name in packages}}


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def print_json(result: dict) -> None:
    """One JSON document on standard output."""
    print(json.dumps(result, indent=2), flush=True)
