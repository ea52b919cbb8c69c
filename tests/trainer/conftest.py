"""What the trainer's tests share: eight devices whatever runs first, prepared data in a temporary folder, programs compiled once."""
from __future__ import annotations

import importlib
import os

import jax
import pytest

from tests.trainer.tiny import shared_program
from trainer import cohort

plan = importlib.import_module("trainer.sweep.plan")
execute = importlib.import_module("trainer.sweep.execute")  # the package's `execute` is the function

# The command line asks for one device per core unless JAX is already running: let it run, with the eight of ../conftest.py.
assert jax.device_count() == 8


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory):
    """Prepared data of a session lies in a folder of its own."""
    patch = pytest.MonkeyPatch()
    patch.setenv("BITLAW_CACHE", str(tmp_path_factory.mktemp("bitlaw-cache")))
    yield
    patch.undo()


@pytest.fixture
def shared_programs(monkeypatch):
    """Sweeps of all tests that ask for this use one compiled program for each structure and layout."""
    monkeypatch.setattr(execute, "Program", shared_program)


@pytest.fixture
def one_device(monkeypatch, shared_programs):
    """Every cohort, also of one run, runs member after member on one device: then all share a layout."""
    monkeypatch.setattr(plan, "choose_layout", lambda *_: cohort.Layout(1, 1, "map"))


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """For helper processes: compiled programs are kept between them, since each would compile the same."""
    cache = tmp_path_factory.mktemp("compiled")
    return {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}  # fmt: skip
