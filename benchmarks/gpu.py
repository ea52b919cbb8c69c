"""Native FP8 and INT8 against bfloat16 in linear layers on a GPU: python -m benchmarks.gpu [--shapes 4096x4096,8192x8192] [--tokens 8192]

Compared: `trainer.linear` forward and backward (y, dx, dw; three products of 2 N K M operations), float32 in and out, quantization or casts included,
under execution=native against precision=bfloat16 in the same run. fp8: e4m3 forward, e5m2 output gradients, a scale per tensor; fp8_rowwise: a
scale per row along each contraction; int8: the same, integers. Also, on the first 1024 tokens, how far native is from emulated execution (products
in float32), as the largest difference over the largest magnitude; and what the compiler made of the products: "__cublas$lt$matmul$f8" has to be
there three times under fp8. Where there is no GPU, one line says so.

What XLA:GPU needs to run a product in FP8 (xla/service/gpu/transforms/gemm_rewriter.cc, and the cuBLASLt manual), else it widens both operands:
- compute capability 8.9 and up, CUDA 12; one operand float8_e4m3fn, the other that or float8_e5m2: e5m2 x e5m2 does not exist;
- both operands float8 at the dot (or widened and multiplied by a scalar there), one contracted and one free dimension each; a result in float32,
  bfloat16 or float16. Scales are scalars: one for each operand. A scalar that multiplies the result is folded in; scales by rows are not, they
  cost a pass over the result;
- cuBLASLt has the "TN" form alone, both operands with the contraction innermost, on Hopper and Ada: XLA transposes the narrow copies of the
  others (w in the forward product, both operands of wgrad), and pads dims to multiples of 16;
- `precision`: DEFAULT on both operands adds up in the tensor cores alone ("fast accumulation", about 14 bits on Hopper), anything higher promotes
  partial sums to float32, which is slower. Usual: DEFAULT forward, HIGHEST backward; trainer.linear asks for HIGHEST throughout.
INT8 needs int8 x int8 -> int32 (with an int8 result: 2.8 TOp/s on an A100, openxla/xla#7117) and dims in multiples of 4. Blocks (MXFP8, NVFP4) would
need `jax.nn.scaled_matmul` on Blackwell. None of this has been measured by us.
"""
from __future__ import annotations

import argparse
import re
from collections import Counter

from benchmarks import timing

SHAPES, TOKENS, CALLS = "4096x4096,4096x14336,8192x8192", 8192, 10
BASE = "bfloat16"
# name: (the precision, at least so many times the speed of bfloat16)
ARMS = {"fp8": ("fp8", 1.4), "fp8_rowwise": ("fp8_rowwise", None), "int8": ("int_rowwise", None)}
AGREEMENT_TOKENS, AGREEMENT = 1024, 2.0**-10  # between the accumulators of tensor cores and float32
_KINDS = re.compile(r'custom_call_target="([^"]+)"|"kind":"(__triton[^"]*)"')


def policy(name: str, execution: str = "native"):
    """The policy of an arm, its products in the narrow dtype or emulated in float32; or that of the baseline."""
    from trainer import policy as composed

    return composed(ARMS[name][0], f"precision.execution={execution}") if name in ARMS else composed(name)


def layer(policy):
    """(x, w, dy) -> (y, dx, dw), jitted."""
    import jax

    from trainer import linear

    def run(x_NK, w_KM, g_NM):
        y_NM, backward = jax.vjp(lambda x, w: linear(x, w, policy), x_NK, w_KM)
        return y_NM, *backward(g_NM)

    return jax.jit(run)


def data(tokens: int, inputs: int, outputs: int):
    """Gaussian x of unit variance, w that keeps it, small output gradients; float32."""
    import jax

    keys = jax.random.split(jax.random.key(0), 3)
    x, w, g = (jax.random.normal(key, shape) for key, shape in zip(keys, ((tokens, inputs), (inputs, outputs), (tokens, outputs))))
    return x, w * inputs**-0.5, g * 1e-3


def program(run, arguments, calls: int) -> timing.Program:
    """`calls` calls, dispatched one after another and awaited together."""
    import jax

    def work() -> None:
        out = None
        for _ in range(calls):
            out = run(*arguments)
        jax.block_until_ready(out)

    return timing.Program(work, units=calls)


def differences(name: str, arguments) -> dict:
    """Native against emulated: the largest difference over the largest magnitude, by result."""
    import jax.numpy as jnp

    native, emulated = (layer(policy(name, execution))(*arguments) for execution in ("native", "emulated"))
    found = {part: float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b))) for part, a, b in zip(("y", "dx", "dw"), native, emulated)}
    return {**{part: float(f"{value:.2e}") for part, value in found.items()}, "at_most": AGREEMENT, "met": max(found.values()) <= AGREEMENT}


def kinds(compiled_text: str) -> dict[str, int]:
    """What an optimized program calls for its products: names of libraries' routines and of Triton fusions, each with its number."""
    return dict(Counter(a or b for a, b in _KINDS.findall(compiled_text)))


def measure(tokens: int, inputs: int, outputs: int, rounds: int, calls: int = CALLS) -> dict:
    """Speeds, ratios to bfloat16, agreement and kinds of products of one shape, by arm."""
    arguments = data(tokens, inputs, outputs)
    runs = {name: layer(policy(name)).lower(*arguments).compile() for name in (BASE, *ARMS)}
    programs = {name: program(run, arguments, calls) for name, run in runs.items()}
    for made in programs.values():
        made.work()
    samples = timing.interleave({name: lambda p=p: timing.visit(p, 1) for name, p in programs.items()}, rounds)
    few = min(tokens, AGREEMENT_TOKENS)
    x, w, g = arguments
    result = {}
    for name, found in samples.items():
        entry = {**found.milliseconds(), "tokens/s": round(tokens / found.median),
                 "TFLOP/s": round(6e-12 * tokens * inputs * outputs / found.median, 3), "products": kinds(runs[name].as_text())}
        if name in ARMS:
            speed, goal = timing.ratio(samples, BASE, name), ARMS[name][1]
            entry[f"speed over {BASE}"] = speed if goal is None else timing.judged(speed, at_least=goal)
            entry["native from emulated"] = differences(name, (x[:few], w, g[:few]))
        result[name] = entry
    return result


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default=SHAPES, help="inputs x outputs of the layers, e.g. 4096x4096,4096x14336")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args(arguments)
    import jax

    device = jax.devices()[0]
    if device.platform != "gpu":
        print(f"no GPU: JAX runs on {device.platform} here, so there is nothing to measure (pip install -e '.[cuda13]' on a machine with one)")
        return
    result = {"machine": timing.machine(("jax", "jaxlib", "numpy")), "device": device.device_kind,
              "compute capability": getattr(device, "compute_capability", None), "tokens": options.tokens}
    for shape in options.shapes.split(","):
        inputs, outputs = map(int, shape.split("x"))
        result[shape] = measure(options.tokens, inputs, outputs, options.rounds)
    timing.print_json(result)


if __name__ == "__main__":
    main()
