"""Compiled programs kept in a folder, for every later process that wants the same: JAX's persistent cache, one folder for each kind of host."""
from __future__ import annotations

import hashlib
import platform
from pathlib import Path

import jax

MIN_COMPILE_S = 0.5  # what is compiled faster is not kept


def keep(folder: str | Path) -> None:
    """Keep what is compiled from now on, and take what is kept. JAX_COMPILATION_CACHE_DIR of the environment, or one set before, stays."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(Path(folder).absolute() / host_kind()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_S)


def host_kind() -> str:
    """Equal for hosts whose processors take the same code: JAX's cache does not tell processors apart, and code for one may be illegal on another."""
    try:
        cpu = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        cpu = platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(' '.join(sorted(cpu.split())).encode()).hexdigest()[:8]}"
