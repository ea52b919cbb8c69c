"""Compiled programs that a process keeps for the next one."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.trainer.tiny import TINY, results

ROOT = Path(__file__).parents[2]
# `bitlaw train`, then how many programs came from the cache.
CODE = """import sys, jax
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
import bitlaw
code = bitlaw.main(sys.argv[1:])
print("hits", hits.count("/jax/compilation_cache/cache_hits"))
sys.exit(code)
"""


def _train(runs_dir, *overrides) -> tuple[int, str]:
    """(programs that were loaded, stderr)"""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "PYTHONPATH": str(ROOT)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    command = [sys.executable, "-c", CODE, "train", *TINY, "steps=20", "host_devices=2", f"runs_dir={runs_dir}", *overrides]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.rpartition("hits ")[2]), done.stderr


@pytest.mark.slow
def test_a_second_process_loads_what_the_first_compiled(tmp_path):
    """And trains to the same bits, as one that keeps nothing does; a damaged entry is compiled again."""
    kept = f"compile_cache={tmp_path / 'kept'}"
    _train(tmp_path / "first", kept)
    entries = sorted((tmp_path / "kept").rglob("*-cache"))
    assert len(entries) >= 3  # to begin, to train, to evaluate
    hits, _ = _train(tmp_path / "second", kept)
    assert hits >= 3
    for entry in entries:
        entry.write_bytes(entry.read_bytes()[:-100])
    hits, err = _train(tmp_path / "damaged", kept)
    assert hits == 0 and "Error reading persistent compilation cache" in err
    hits, _ = _train(tmp_path / "none", "compile_cache=null")
    assert hits == 0 and not (tmp_path / "none" / ".compiled").exists()
    _train(tmp_path / "auto")
    assert any((tmp_path / "auto" / ".compiled").rglob("*-cache"))
    assert results(tmp_path / "first") == results(tmp_path / "second") == results(tmp_path / "damaged") == results(tmp_path / "none")
