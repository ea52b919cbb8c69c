"""What quantizing costs, in copies of the array: `python -m benchmarks.formats [--size N] [--rounds K]`.

Unit: a jitted `-x` on the same 1e7 float32, in the same run (timing.py says how programs take turns). Freed memory is
kept (malloc settings set before Python starts), since page faults of fresh results cost three copies and hide every
difference. Prints JSON.
"""

from __future__ import annotations

import argparse
import os
import sys

from benchmarks import timing

_KEEP_FREED_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**36), "MALLOC_TOP_PAD_": str(2**28)}

# Limits on the ratio to a copy.
LIMITS = {"e4m3fn nearest, static": 1.2, "e4m3fn nearest, traced": 1.2, "e5m2 stochastic": 1.4, "mxfp4": 1.9, "nvfp4": 2.8, "lns8": 1.5, "lns8, gamma 5": 4.0,
          "int4 per channel, last axis": 2.1, "int4 per channel, first axis": 2.6, "encode mxfp4": 1.9, "decode mxfp4": 1.4, "encode float4_e2m1fn": 1.9, "decode float4_e2m1fn": 1.4, "traced / static": 1.15}


def programs(size: int) -> dict:
    """name -> (jitted function, arguments). Arrays are [size / 1000, 1000], blocks cut from rows of 1600."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import formats
    from benchmarks.format_peers import peers

    x = jnp.asarray(np.random.default_rng(0).standard_normal((size // 1000, 1000)), jnp.float32)
    x_blocks = x.reshape(-1)[: size // 1600 * 1600].reshape(-1, 1600)
    e4m3, e5m2, int4 = formats.get("float8_e4m3fn"), formats.get("float8_e5m2"), formats.integer(4)
    key = jnp.array([1, 2], jnp.uint32)
    quantize = jax.jit(formats.quantize, static_argnames=("rounding", "overflow"))
    stochastic = jax.jit(lambda x, fmt, key: formats.quantize(x, fmt, rounding="stochastic", key=key))
    encode = jax.jit(formats.encode, static_argnums=1)
    decode = jax.jit(lambda q: q.decode())
    made = {
        "copy": (jax.jit(lambda x: -x), (x,)),
        "e4m3fn nearest, static": (jax.jit(lambda x: formats.quantize(x, e4m3)), (x,)),
        "e4m3fn nearest, traced": (quantize, (x, e4m3)),
        "e4m3fn nearest, traced, ieee": (jax.jit(lambda x, f: formats.quantize(x, f, overflow="ieee")), (x, e4m3)),
        "e5m2 stochastic": (stochastic, (x, e5m2, key)),
        "random bits": (jax.jit(lambda x, key: formats.random_bits(key, x.shape)), (x, key)),
        "e4m3fn per tensor": (quantize, (x, formats.scaled(e4m3))),
        "e4m3fn per tensor, power of two": (quantize, (x, formats.scaled(e4m3, rule="floor"))),
        "int4 per channel, last axis": (quantize, (x, formats.scaled(int4, "channel", axis=-1))),
        "int4 per channel, first axis": (quantize, (x, formats.scaled(int4, "channel", axis=0))),
        "mxfp4": (quantize, (x_blocks, formats.get("mxfp4"))),
        "mxfp4 stochastic": (stochastic, (x_blocks, formats.get("mxfp4"), key)),
        "nvfp4": (quantize, (x_blocks, formats.get("nvfp4"))),
        "nf4": (quantize, (x, formats.get("nf4"))),
        "lns8": (quantize, (x, formats.get("lns8"))),
        "lns8, gamma 5": (quantize, (x, formats.lns(8, 5))),
        "encode mxfp4": (encode, (x_blocks, "mxfp4")),
        "decode mxfp4": (decode, (formats.encode(x_blocks, "mxfp4"),)),
        "encode float4_e2m1fn": (encode, (x, "float4_e2m1fn")),
        "decode float4_e2m1fn": (decode, (formats.encode(x, "float4_e2m1fn"),)),
        "encode float8_e4m3fn": (encode, (x, "float8_e4m3fn")),
        "decode float8_e4m3fn": (decode, (formats.encode(x, "float8_e4m3fn"),)),
        "encode float6_e3m2fn": (encode, (x, "float6_e3m2fn")),
        "encode nvfp4": (encode, (x_blocks, "nvfp4")),
        "decode nvfp4": (decode, (formats.encode(x_blocks, "nvfp4"),)),
    }
    made.update(peers(x, x_blocks))
    return made


def measure(made: dict, rounds: int) -> dict[str, timing.Samples]:
    """name -> seconds of a call, one figure for each round."""
    import jax

    def visit(function, arguments):
        program = timing.Program(lambda: jax.block_until_ready(function(*arguments)))
        return lambda: timing.visit(program, repeats=1)

    return timing.interleave({name: visit(*made[name]) for name in made}, rounds)


def report(samples: dict[str, timing.Samples]) -> dict:
    """Ratios to the copy of the same run, against their limits."""
    ratios = {name: timing.ratio(samples, name, "copy") for name in samples}
    traced, static = "e4m3fn nearest, traced", "e4m3fn nearest, static"
    if traced in samples and static in samples:
        ratios["traced / static"] = timing.ratio(samples, traced, static)
    ratios.update({name: timing.judged(ratios[name], at_most=limit) for name, limit in LIMITS.items() if name in ratios})
    return {"unit": "a jitted -x", "copy": samples["copy"].milliseconds(), "ratios": ratios}


def main() -> None:
    if any(os.environ.get(name) != value for name, value in _KEEP_FREED_MEMORY.items()):
        os.environ.update(_KEEP_FREED_MEMORY)
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.formats", *sys.argv[1:]])
    parser = argparse.ArgumentParser(prog="python -m benchmarks.formats", description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=10_000_000, help="number of float32 values")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--only", default="", help="programs whose name contains this, and the copy")
    given = parser.parse_args()
    made = {name: program for name, program in programs(given.size).items() if given.only in name or name == "copy"}
    result = report(measure(made, given.rounds))
    timing.print_json({"machine": timing.machine(("jax", "numpy", "ml_dtypes", "gfloat", "pychop", "qwix")), "size": given.size, "rounds": given.rounds, **result})


if __name__ == "__main__":
    main()
