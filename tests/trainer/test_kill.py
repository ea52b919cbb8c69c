"""kill -9 at random moments: the same command again ends in the bits of a run that was never stopped."""
from __future__ import annotations

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

from tests.trainer.tiny import TINY, folders, results
from trainer import checkpoint

ROOT = pathlib.Path(__file__).parents[2]
RUN = ["steps=800", "checkpoint.every_steps=10", "host_devices=2"]
SWEEP = ["steps=200,400", "seed=0,1", "checkpoint.every_steps=10", "host_devices=2", "steps_per_dispatch=10"]


def _start(verb, overrides, runs_dir, environment) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "bitlaw.py"), verb, *TINY, *overrides, f"runs_dir={runs_dir}"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def _finish(process) -> str:
    """What a process that ends well said on stderr."""
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return err


def _progress(runs_dir) -> int:
    """Sum of the newest checkpoints' steps: 0 until training has begun."""
    return sum(max(checkpoint.steps(folder.checkpoints), default=0) for folder in folders(runs_dir).values())


def _kill_once(process, runs_dir, seconds: float) -> int:
    """SIGKILL some time after the process has saved its first checkpoint; the steps that had been saved by then."""
    begun, deadline = _progress(runs_dir), time.monotonic() + 300
    while _progress(runs_dir) == begun:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
        time.sleep(0.002)
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL  # it was still at work
    return _progress(runs_dir)


@pytest.mark.slow
def test_a_run_killed_twice_and_damaged_ends_in_the_same_bits(tmp_path, environment):
    """Killed, run again, killed, its newest checkpoint damaged, run again: log, record and final state are those of a whole run."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    _finish(_start("train", RUN, whole, environment))
    moments = random.Random(os.getpid())  # other moments at every run of this test
    saved = [_kill_once(_start("train", RUN, killed, environment), killed, moments.uniform(0, 0.3)) for _ in range(2)]
    assert 0 < saved[0] < saved[1] < 800
    (folder,) = folders(killed).values()
    assert folder.record() is None
    newest = folder.checkpoints / str(checkpoint.steps(folder.checkpoints)[-1])
    largest = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-100])
    err = _finish(_start("train", RUN, killed, environment))
    assert f"checkpoint {newest} is damaged" in err and "trying the one before" in err
    assert results(killed) == results(whole)


@pytest.mark.slow
def test_a_killed_sweep_with_branches_ends_in_the_same_table(tmp_path, environment):
    """Two trunks and their branches on two devices, killed twice: every run's record, log and state are those of a whole sweep."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    _finish(_start("sweep", SWEEP, whole, environment))
    moments = random.Random(os.getpid())
    for _ in range(2):
        _kill_once(_start("sweep", SWEEP, killed, environment), killed, moments.uniform(0, 0.5))
    _finish(_start("sweep", SWEEP, killed, environment))
    assert len(results(whole)) == 4 and results(killed) == results(whole)
