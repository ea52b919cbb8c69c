"""What emulating a precision costs: a training step under it over our float32 step. python -m benchmarks.policies [--only fp8,qwix]

The step is the program that every run uses (1m model: width 128, 4 layers, batch 16 x 128 bytes, AdamW), on one host device, with the same seed
and data under every policy; all six operands of the linear layers are quantized (nvfp4_recipe: all but the last block's). The policies are those
of configs/precision; where a name does not say it all, ARMS does. Programs of one process take turns in rotated order; a ratio is the median
of the rounds' ratios.

    fp8            e4m3 forward, e5m2 output gradients, a scale per tensor
    int8           integers with a scale for every row along the contraction, each product quantizing for itself (int_rowwise)
    int8 kept      a scale per output channel of weights, per token of activations and output gradients; the second product reads the first's numbers
    int8 native    as int8, multiplied as int8 x int8 -> int32 (int8_native)
    mxfp4, nvfp4   blocks of 32 and 16 along the contraction, nearest
    quartet        rotations, QuEST forward, stochastic MXFP4 backward from the quantized operands, masks
    fp8_rowwise, fp8_tiles, nvfp4_recipe, luq    as configs/precision says; without a goal

qwix: Google's library for quantized training in JAX, where it is installed (pip install -e '.[qwix]'): qwix_products.py says what is compared.
"""
from __future__ import annotations

import argparse
import importlib.util
import sys

from benchmarks import timing

WIDTH = 128
KEPT_INT8 = ("int8", "precision.output_gradients.format=integer", "precision.output_gradients.bits=8", "precision.output_gradients.granularity=token")
# name: (arguments of trainer.policy, at most so many times the float32 step)
ARMS = {
    "fp8": (("fp8",), 1.15),
    "int8": (("int_rowwise",), 1.25),
    "int8 kept": (KEPT_INT8, 1.25),
    "mxfp4": (("mxfp4",), 1.4),
    "nvfp4": (("nvfp4",), 1.5),
    "quartet": (("quartet",), 2.0),
    "fp8_rowwise": (("fp8_rowwise",), None),
    "fp8_tiles": (("fp8_tiles",), None),
    "nvfp4_recipe": (("nvfp4_recipe",), None),
    "luq": (("luq",), None),
    "int8 native": (("int8_native",), None),
}
QWIX = "qwix"
QWIX_GOAL = 1.0
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "qwix")


def policy(name: str):
    """The policy of an arm. ValueError if it leaves one of the six operands in float32."""
    from trainer import policy as composed
    from trainer.precision import ROLES

    found = composed(*ARMS[name][0])
    for role in ROLES:
        operand = getattr(found, role)
        if operand.first is None or not (operand.shared or operand.second is not None):
            raise ValueError(f"{name} leaves {role} in float32; every arm quantizes all six operands")
    return found


def programs(config, names) -> dict[str, timing.Program]:
    """The training step in float32 and under each policy."""
    from benchmarks import our_step

    made = {"float32": our_step.program(config, our_step.FLOAT32)}
    for name in names:
        print(f"compiling {name}", file=sys.stderr, flush=True)
        made[name] = our_step.program(config, policy(name))
    return made


def measure(made: dict[str, timing.Program], rounds: int, repeats: int) -> dict[str, timing.Samples]:
    """Seconds of a step by program, one figure for each round."""
    for program in made.values():
        program.work()  # compiled before anything is timed
    return timing.interleave({name: lambda p=p: timing.visit(p, repeats) for name, p in made.items()}, rounds)


def over_float32(config, names, rounds: int, repeats: int) -> dict:
    """Milliseconds of a step, and its ratio to float32 with the goal, by policy."""
    samples = measure(programs(config, names), rounds, repeats)
    ratios = {}
    for name in names:
        found, goal = timing.ratio(samples, name, "float32"), ARMS[name][1]
        ratios[name] = found if goal is None else timing.judged(found, at_most=goal)
    return {"programs": {name: s.milliseconds() for name, s in samples.items()}, "over float32": ratios}


def against_qwix(config, rounds: int, repeats: int) -> dict:
    """Our quantized products over qwix's in the same models; says so where qwix is not installed."""
    if importlib.util.find_spec("qwix") is None:
        return {"skipped": "qwix is not installed: pip install -e '.[qwix]'"}
    from benchmarks import qwix_products

    result = {}
    for place, maker in qwix_products.MODELS.items():
        print(f"qwix, {place}: compiling, then {rounds} rounds", file=sys.stderr, flush=True)
        made = {name: maker(config, product) for name, product in qwix_products.products().items()}
        samples = measure(made, rounds, repeats)
        pairs = {f"{ours} over {theirs}": timing.ratio(samples, ours, theirs) for ours, theirs in qwix_products.PAIRS}
        ratios = {name: timing.judged(found, at_most=QWIX_GOAL) for name, found in pairs.items()}
        result[place] = {"programs": {name: s.milliseconds() for name, s in samples.items()}, "ratios": ratios}
    result["products of the linear layers by dtype"] = qwix_products.dtypes_of_products(config)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.policies", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join((*ARMS, QWIX)), help=f"of {', '.join((*ARMS, QWIX))}, separated by commas")
    parser.add_argument("--width", type=int, default=WIDTH, help="32, 64 or 128")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=1, help="timed dispatches of a visit, of five steps each")
    options = parser.parse_args()
    wanted = options.only.split(",")
    unknown = [name for name in wanted if name not in (*ARMS, QWIX)]
    if unknown:
        parser.error(f"--only {','.join(unknown)}; accepted: {', '.join((*ARMS, QWIX))}")
    import jax

    jax.config.update("jax_num_cpu_devices", 1)
    from benchmarks import our_step

    config = our_step.model(options.width)
    result = {"machine": timing.machine(PACKAGES), "width": options.width, "rounds": options.rounds, "host devices": 1}
    names = [name for name in wanted if name != QWIX]
    if names:
        result |= over_float32(config, names, options.rounds, options.repeats)
    if QWIX in wanted:
        result[QWIX] = against_qwix(config, options.rounds, options.repeats)
    timing.print_json(result)


if __name__ == "__main__":
    main()
