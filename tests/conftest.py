"""What every test runs under: strict JAX promotion rules, eight emulated CPU devices, and slow tests only on request."""

import os

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
