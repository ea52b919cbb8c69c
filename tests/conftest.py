"""What every test runs under: strict JAX promotion rules, eight emulated CPU devices, and slow tests only on request."""

import functools
import gc
import itertools
import os
import sys
from pathlib import Path

# Before JAX is imported: tests never look for an accelerator, and the host's devices are the eight emulated ones.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# No test talks to Weights & Biases; the offline mode is also what users get by default.
os.environ.setdefault("WANDB_MODE", "offline")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_enable_compilation_cache", False)  # every process of tests compiles what it runs
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    skip = pytest.mark.skip(reason="slow: run with --slow")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


_tests_run = itertools.count(1)
_Cache = type(functools.cache(len))


@pytest.fixture(autouse=True)
def programs_freed():
    """A process of tests keeps some hundreds of memory maps for every program that it compiled and still holds, and dies at the
    kernel's limit (vm.max_map_count, 65530). Looked at every twentieth test: a third of the limit, and all held programs are let go."""
    yield
    maps = Path("/proc/self/maps")
    if next(_tests_run) % 20 or not maps.exists() or maps.read_bytes().count(b"\n") < 20_000:
        return
    for module in [module for name, module in list(sys.modules.items()) if name.partition(".")[0] == "tests"]:
        for value in list(vars(module).values()):
            if isinstance(value, _Cache):
                value.cache_clear()
    jax.clear_caches()
    gc.collect()
