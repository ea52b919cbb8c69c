"""Compiled programs kept in a folder, for every later process that wants the same: JAX's persistent cache, one folder for each kind of host."""
from __future__ import annotations

import hashlib
import platform
from pathlib import Path

import jax

from trainer.config.frozen import Options

AUTO, FOLDER = "auto", ".compiled"
JAX_MIN_COMPILE_S, MIN_COMPILE_S = 1.0, 0.5  # what is compiled faster is not kept: by JAX's default, and here


def keep(options: Options) -> None:
    """Keep what is compiled from now on where `compile_cache` says, and take what is kept there. What the environment says of JAX's cache
    (JAX_COMPILATION_CACHE_DIR, ...) stays. For processes that are bitlaw's own: it holds for everything that they compile."""
    if options.compile_cache is None or jax.config.jax_compilation_cache_dir is not None:
        return
    folder = Path(options.runs_dir) / FOLDER if options.compile_cache == AUTO else Path(options.compile_cache)
    jax.config.update("jax_compilation_cache_dir", str(folder.absolute() / host_kind()))
    if jax.config.jax_persistent_cache_min_compile_time_secs == JAX_MIN_COMPILE_S:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_S)


def host_kind() -> str:
    """Equal for hosts whose processors take the same code: JAX's cache does not tell processors apart, and code for one may be illegal on another."""
    try:
        cpu = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        cpu = platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(' '.join(sorted(cpu.split())).encode()).hexdigest()[:8]}"
