"""How fast a training step is, as ratios within one run: python -m benchmarks.train_step [--devices N] [--sizes 32,64,128]

Batch 16 x 128 bytes. The programs, each in a process of its kind and visited in turn:
    one/float32, one/quantized     our step on one host device: in float32, and in e4m3 (six operands, per-tensor scales)
    one/scan, one/unrolled         the same model in textbook JAX (plain_decoder.py), one host device
    all/float32, all/quantized     our step on N host devices (default: one per core), the batch split over them: the default
    all/cohort                     eight runs in one program on N host devices; its time is per run
    torch/eager                    the same model in eager PyTorch on all cores (torch_decoder.py; needs the `torch` extra)
"""
from __future__ import annotations

import argparse
import contextlib
import importlib.util
import operator
import sys

from benchmarks import timing
from benchmarks.workers import Worker

SIZES = (32, 64, 128)
COHORT = 8
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch")
QUANTIZED_GOAL, PLAIN_ONE_GOAL, PLAIN_ALL_GOAL, COHORT_GOAL = 1.15, 0.85, 0.6, 1.35
TORCH_GOALS = {32: 0.8, 64: 1.05, 128: 1.15}


def jax_programs(width: int, devices: int, kinds: tuple[str, ...]) -> dict:
    """{kind: program} in this process, which has not started JAX yet."""
    import jax

    jax.config.update("jax_num_cpu_devices", devices)
    from benchmarks import our_step

    config = our_step.model(width)
    makers = {
        "float32": lambda: our_step.program(config, our_step.FLOAT32),
        "quantized": lambda: our_step.program(config, our_step.QUANTIZED),
        "cohort": lambda: our_step.program(config, our_step.FLOAT32, COHORT),
        "scan": lambda: plain(config, scan=True),
        "unrolled": lambda: plain(config, scan=False),
    }
    return {kind: makers[kind]() for kind in kinds}


def plain(config, scan: bool, product=operator.matmul) -> timing.Program:
    """Training steps of the plain decoder; product: of its linear layers."""
    import jax
    import jax.numpy as jnp

    from benchmarks import our_step, plain_decoder
    from trainer.model import init_params

    init, steps = plain_decoder.train_step(config, scan=scan, product=product)
    state = init(init_params(config, jax.random.key(0)))
    tokens = jnp.asarray(our_step.tokens(shape=(our_step.STEPS, our_step.BATCH, our_step.SEQ_LEN + 1)), jnp.int32)

    def update() -> None:
        nonlocal state
        state, losses = steps(state, tokens)
        jax.block_until_ready((state, losses))

    return timing.Program(update, units=our_step.STEPS)


def torch_programs(width: int) -> dict:
    """The PyTorch step on all cores, in this process."""
    import jax
    import torch

    from benchmarks import our_step, torch_decoder
    from trainer.model import init_params

    torch.set_num_threads(timing.cores())
    config = our_step.model(width)
    _, step = torch_decoder.train_step(init_params(config, jax.random.key(0)), config)
    tokens = torch.tensor(our_step.tokens(), dtype=torch.int64)
    return {"eager": timing.Program(lambda: step(tokens))}


def measure(width: int, devices: int, rounds: int, repeats: int) -> dict[str, timing.Samples]:
    """Seconds per update of one run, by program, one figure for each round."""
    factory = f"{__package__}.train_step"
    with contextlib.ExitStack() as stack:
        def add(prefix: str, function: str, **arguments) -> None:
            worker = stack.enter_context(Worker(f"{factory}.{function}", width=width, **arguments))
            visits.update(worker.visits(prefix, repeats))

        visits: dict[str, timing.Visit] = {}
        add("one/", "jax_programs", devices=1, kinds=("float32", "quantized", "scan", "unrolled"))
        add("all/", "jax_programs", devices=devices, kinds=("float32", "quantized", "cohort"))
        if importlib.util.find_spec("torch"):
            add("torch/", "torch_programs")
        return timing.interleave(visits, rounds)


def judge(width: int, samples: dict[str, timing.Samples]) -> dict:
    """The ratios that the project set itself, each with its goal."""
    faster = min(("one/scan", "one/unrolled"), key=lambda name: samples[name].median)
    result = {}
    for where in ("one", "all"):
        measured = timing.ratio(samples, f"{where}/quantized", f"{where}/float32")
        result[f"quantized over float32, {where}"] = timing.judged(measured, at_most=QUANTIZED_GOAL)
        goal = PLAIN_ONE_GOAL if where == "one" else PLAIN_ALL_GOAL
        for plain in ("one/scan", "one/unrolled"):
            note = " (the faster plain one)" if plain == faster else ""
            measured = timing.ratio(samples, f"{where}/float32", plain)
            result[f"float32, {where}, over plain {plain[4:]}{note}"] = timing.judged(measured, at_most=goal)
    if "torch/eager" in samples:
        result["float32, one, over torch"] = timing.ratio(samples, "one/float32", "torch/eager")
        measured = timing.ratio(samples, "all/float32", "torch/eager")
        result["float32, all, over torch"] = timing.judged(measured, at_most=TORCH_GOALS[width])
    measured = timing.ratio(samples, "one/float32", "all/cohort")
    result[f"tokens/s of a cohort of {COHORT}, all, over a single run, one"] = timing.judged(measured, at_least=COHORT_GOAL)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_step", description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, default=timing.cores(), help="host devices of 'all' (default: one per core)")
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="widths, of 32, 64, 128")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=3, help="timed steps of a visit")
    options = parser.parse_args()
    sizes = {}
    for width in map(int, options.sizes.split(",")):
        print(f"d {width}: compiling, then {options.rounds} rounds", file=sys.stderr, flush=True)
        samples = measure(width, options.devices, options.rounds, options.repeats)
        sizes[f"d {width}"] = {"programs": {name: s.milliseconds() for name, s in samples.items()}, "ratios": judge(width, samples)}
    met = all(r.get("met", True) for size in sizes.values() for r in size["ratios"].values())
    timing.print_json({"machine": timing.machine(PACKAGES), "devices": {"one": 1, "all": options.devices}, "all_met": met, **sizes})


if __name__ == "__main__":
    main()
