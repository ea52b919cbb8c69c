"""What telemetry costs, as ratios of steps with it over steps without: python -m benchmarks.telemetry [--every K] [--sizes 32,64,128]

Batch 16 x 128 bytes, all host devices, one process. A dispatch of K updates, one of which is measured (every layer, linear site and
role: "on"), takes turns with the same dispatch without telemetry ("off"), and with one that measures every update ("each": K times the
cost, which noise hides less); in float32, and in e4m3 with per-tensor scales, which are quantized too.
"""
from __future__ import annotations

import argparse
import sys

from benchmarks import timing

SIZES = (32, 64, 128)
GOAL = 1.03


def measure(width: int, every: int, rounds: int, repeats: int) -> dict[str, timing.Samples]:
    """Seconds per update by program, one figure for each round."""
    from benchmarks import our_step

    config = our_step.model(width)
    programs = {}
    for name, policy in (("float32", our_step.FLOAT32), ("quantized", our_step.QUANTIZED)):
        for state, telemetry_every in (("off", 0), ("on", every), ("each", 1)):
            programs[f"{name}/{state}"] = our_step.program(config, policy, steps=every, telemetry_every=telemetry_every)
    return timing.interleave({name: lambda p=p: timing.visit(p, repeats) for name, p in programs.items()}, rounds)


def judge(samples: dict[str, timing.Samples], every: int) -> dict:
    """The ratios with their goals: of one update in K, and of every update, K times as far from 1."""
    result = {}
    for name in ("float32", "quantized"):
        for state, goal in (("on", GOAL), ("each", 1 + every * (GOAL - 1))):
            result[f"{name}, {state} over off"] = timing.judged(timing.ratio(samples, f"{name}/{state}", f"{name}/off"), at_most=round(goal, 3))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.telemetry", description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int, default=10, help="updates from one measurement to the next")
    parser.add_argument("--devices", type=int, default=timing.cores(), help="host devices (default: one per core)")
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="widths, of 32, 64, 128")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=3, help="timed dispatches of a visit")
    options = parser.parse_args()
    import jax

    jax.config.update("jax_num_cpu_devices", options.devices)
    sizes = {}
    for width in map(int, options.sizes.split(",")):
        print(f"d {width}: compiling, then {options.rounds} rounds", file=sys.stderr, flush=True)
        samples = measure(width, options.every, options.rounds, options.repeats)
        sizes[f"d {width}"] = {"programs": {name: s.milliseconds() for name, s in samples.items()}, "ratios": judge(samples, options.every)}
    met = all(r["met"] for size in sizes.values() for r in size["ratios"].values())
    timing.print_json({"machine": timing.machine(("jax", "jaxlib", "numpy")), "every": options.every, "devices": options.devices, "all_met": met, **sizes})


if __name__ == "__main__":
    main()
