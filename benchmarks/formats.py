"""What quantizing costs, in copies of the array: `python -m benchmarks.formats [--size N] [--rounds K]`.

Unit: a jitted `-x` on the same 1e7 float32, in the same run. Programs run interleaved in rotated order (whoever goes first
is slow); the figure is the ratio of medians, with the ratio of minima beside it. Freed memory is kept (malloc settings set
before Python starts), since page faults of fresh results cost three copies and hide every difference. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time

_KEEP_FREED_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**36), "MALLOC_TOP_PAD_": str(2**28)}

# Limits on the ratio to a copy.
LIMITS = {"e4m3fn nearest, static": 1.2, "e4m3fn nearest, traced": 1.2, "e5m2 stochastic": 1.4, "mxfp4": 1.9,
          "int4 per channel, last axis": 2.1, "int4 per channel, first axis": 2.6, "traced / static": 1.15}


def programs(size: int) -> dict:
    """name -> (jitted function, arguments). Arrays are [size / 1000, 1000], blocks cut from rows of 1600."""
    import jax
    import jax.numpy as jnp
    import ml_dtypes
    import numpy as np

    import formats

    x = jnp.asarray(np.random.default_rng(0).standard_normal((size // 1000, 1000)), jnp.float32)
    x_blocks = x.reshape(-1)[: size // 1600 * 1600].reshape(-1, 1600)
    e4m3, e5m2, int4 = formats.get("float8_e4m3fn"), formats.get("float8_e5m2"), formats.integer(4)
    key = jnp.array([1, 2], jnp.uint32)
    quantize = jax.jit(formats.quantize, static_argnames=("rounding", "overflow"))
    stochastic = jax.jit(lambda x, fmt, key: formats.quantize(x, fmt, rounding="stochastic", key=key))
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
        "float4 blocks of 16, float8_e4m3fn scales": (
            quantize, (x_blocks, formats.scaled("float4_e2m1fn", "block", block=16, scale_format="float8_e4m3fn"))),
        "peer: jax clip and cast to float8_e4m3fn and back": (
            jax.jit(lambda x: jnp.clip(x, -448, 448).astype(jnp.float8_e4m3fn).astype(jnp.float32)), (x,)),
        "peer: jax threefry bits": (jax.jit(lambda x: jax.random.bits(jax.random.key(0), x.shape)), (x,)),
    }
    host = np.asarray(x)
    made["peer: ml_dtypes cast to float8_e4m3fn and back"] = (
        lambda: host.astype(ml_dtypes.float8_e4m3fn).astype(np.float32), ())
    return made


def measure(made: dict, rounds: int) -> dict:
    """name -> list of seconds, `rounds` of them (slow peers: every fourth round)."""
    import jax

    seconds = {name: [] for name in made}
    for function, arguments in made.values():
        jax.block_until_ready(function(*arguments))
    names = list(made)
    for turn in range(rounds):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            if name.startswith("peer") and turn % 4:
                continue
            function, arguments = made[name]
            begin = time.perf_counter()
            jax.block_until_ready(function(*arguments))
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def report(seconds: dict) -> dict:
    """Ratios to the copy of the same run, against their limits."""
    median = {name: statistics.median(times) for name, times in seconds.items()}
    least = {name: min(times) for name, times in seconds.items()}
    ratios = {name: {"copies": round(median[name] / median["copy"], 2),
                     "copies_of_minima": round(least[name] / least["copy"], 2)} for name in seconds}
    static, traced = "e4m3fn nearest, static", "e4m3fn nearest, traced"
    ratios["traced / static"] = {"copies": round(median[traced] / median[static], 2),
                                 "copies_of_minima": round(least[traced] / least[static], 2)}
    for name, limit in LIMITS.items():
        ratios[name] |= {"limit": limit, "within": ratios[name]["copies"] <= limit}
    return {"unit": "median of a jitted -x", "copy_ms": round(median["copy"] * 1e3, 2), "ratios": ratios}


def main() -> None:
    if any(os.environ.get(name) != value for name, value in _KEEP_FREED_MEMORY.items()):
        os.environ.update(_KEEP_FREED_MEMORY)
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.formats", *sys.argv[1:]])
    parser = argparse.ArgumentParser(prog="python -m benchmarks.formats", description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=10_000_000, help="number of float32 values")
    parser.add_argument("--rounds", type=int, default=31)
    given = parser.parse_args()
    result = report(measure(programs(given.size), given.rounds))
    print(json.dumps({"size": given.size, "rounds": given.rounds, **result}, indent=2))


if __name__ == "__main__":
    main()
