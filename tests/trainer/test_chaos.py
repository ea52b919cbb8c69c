"""A sweep of 24 runs under a rain of SIGKILL, damaged files and a full disk: the table at the end is that of a quiet one, to the bit."""
from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

import scaling
from tests.trainer.test_kill import _finish, _progress, _start
from tests.trainer.tiny import folders, results
from trainer import checkpoint
from trainer.sweep import planfile

KILLS = 30
SWEEP = ["seed=range(3)", "precision.bits=3,4,6,8", "steps=600,800", "host_devices=2", "steps_per_dispatch=20"]
DISTURBED = ["checkpoint.every_steps=20", "retry_failed=true"]
pytestmark = pytest.mark.slow


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of its own, of 96 MiB."""
    folder = tmp_path / "small disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96m", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("no right to mount a tmpfs, so that the disk could be full")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def _kill_somewhere(runs_dir, environment, rng, after_progress: bool) -> None:
    """A launcher, killed before it has got far (planning, compiling, restoring), or some time after it has saved something."""
    process = _start("sweep", [*SWEEP, *DISTURBED], runs_dir, environment)
    begun, deadline = _progress(runs_dir), time.monotonic() + 300
    if after_progress:
        while _progress(runs_dir) == begun and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    time.sleep(rng.uniform(0.0, 1.0 if after_progress else 5.0))
    process.send_signal(signal.SIGKILL)
    _, err = process.communicate()
    assert process.returncode == -signal.SIGKILL, err  # it was still at work


def _truncate_a_checkpoint(runs_dir, rng) -> None:
    folder = rng.choice([f for f in folders(runs_dir).values() if checkpoint.steps(f.checkpoints)])
    newest = folder.checkpoints / str(max(checkpoint.steps(folder.checkpoints)))
    largest = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)


def _half_write_a_record(runs_dir, rng) -> None:
    folder = rng.choice([f for f in folders(runs_dir).values() if not (f.path / "record.json").exists()])
    (folder.path / "record.json").write_text('{"run_id": "' + folder.path.name + '", "sta')


def _fill_the_disk(runs_dir: Path, environment) -> None:
    """A launcher that meets a full disk ends with one line; afterwards there is room again."""
    process = _start("sweep", [*SWEEP, *DISTURBED], runs_dir, environment)
    begun = _progress(runs_dir)
    while _progress(runs_dir) == begun and process.poll() is None:
        time.sleep(0.01)
    filler = runs_dir.parent / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"\0" * (1 << 16))
        except OSError:
            pass
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1 and "No space left" in err and "Traceback" not in err, err
    filler.unlink()


def test_a_disturbed_sweep_ends_in_the_table_of_a_quiet_one(tmp_path, small_disk, environment):
    rng, noisy = random.Random(7), small_disk / "läufe 1"
    for kill in range(KILLS):
        _kill_somewhere(noisy, environment, rng, after_progress=kill % 3 != 0)
        if kill == 10:
            _truncate_a_checkpoint(noisy, rng)
        if kill == 15:
            _half_write_a_record(noisy, rng)
        if kill == 20:
            _fill_the_disk(noisy, environment)
    assert sum((folder.path / "record.json").exists() for folder in folders(noisy).values()) < 24  # it went on to the last kill
    _finish(_start("sweep", [*SWEEP, *DISTURBED], noisy, environment))
    _finish(_start("sweep", SWEEP, tmp_path / "quiet", environment))
    found, expected = results(noisy), results(tmp_path / "quiet")
    assert len(found) == 24 and found == expected
    rows = scaling.table(noisy).select("run_id, status, loss").fetchall()
    assert sorted(run_id for run_id, _, _ in rows) == sorted(expected) and {status for _, status, _ in rows} == {"done"}
    assert planfile.read(noisy / "adhoc")[1] == planfile.read(tmp_path / "quiet" / "adhoc")[1]
    left = {path.name for path in noisy.rglob("*") if path.name.startswith(".") or path.name.endswith((".lease", ".removal", "alive.json"))}
    assert not left, left
