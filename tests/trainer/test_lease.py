"""Leases: one holder at a time, whoever dies, and however many want it."""
from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trainer import lease

ROOT = Path(__file__).parents[2]
ME = lease.Holder(socket.gethostname(), os.getpid())


@pytest.fixture
def path(tmp_path):
    return tmp_path / "alive.json"


def _mark(path, **change):
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def test_a_lease_lasts_until_it_is_released(path):
    assert lease.holder(path) is None
    held = lease.take(path)
    assert lease.holder(path) == ME
    inner = lease.take(path)  # the same process may
    inner.release()
    assert lease.holder(path) == ME
    held.release()
    assert lease.holder(path) is None and list(path.parent.iterdir()) == []


def test_a_living_process_keeps_others_out_and_a_dead_one_does_not(path):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        lease.take(path)
        _mark(path, pid=other.pid, process_start=lease.process_start(other.pid))
        assert lease.take(path) == lease.Holder(socket.gethostname(), other.pid)
        with lease.held([path, path.with_name("another")]) as found:
            assert found == lease.Holder(socket.gethostname(), other.pid)
        assert not path.with_name("another").exists()  # all or none
        _mark(path, process_start="1")  # the id was given to another process since
        assert lease.holder(path) is None
        _mark(path, process_start=lease.process_start(other.pid))
        other.communicate(b"\n")
    taken = lease.take(path)
    assert isinstance(taken, lease.Lease) and lease.holder(path) == ME
    taken.release()


def test_another_host_is_believed_while_it_is_touched(path):
    lease.take(path)
    _mark(path, host="elsewhere")
    assert lease.take(path) == lease.Holder("elsewhere", os.getpid())
    os.utime(path, (1, 1))
    assert lease.holder(path) is None
    lease.take(path).release()


def test_a_holder_that_was_taken_for_dead_notices(path):
    """It neither touches nor removes the lease of the one that took over."""
    held = lease.take(path)
    held.beat()
    assert not held.lost
    _mark(path, host="elsewhere", token="theirs")
    os.utime(path, (5, 5))
    held.beat()
    held.release()
    assert held.lost and path.stat().st_mtime == 5 and json.loads(path.read_text())["token"] == "theirs"


def test_an_unreadable_lease_is_held_while_it_is_fresh(path):
    path.write_text("")
    assert isinstance(lease.take(path), lease.Holder)
    os.utime(path, (1, 1))
    lease.take(path).release()


RACE = """
import os, sys, time
from pathlib import Path
from trainer import lease
path, log, index = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
for attempt in range(60):
    taken = lease.take(path)
    if isinstance(taken, lease.Lease):
        with log.open("a") as file:
            file.write(f"in {time.monotonic_ns()}\\n"); file.flush()
            time.sleep(0.001)
            file.write(f"out {time.monotonic_ns()}\\n")
        if attempt > 20 and index % 3 == 0:
            os._exit(9)  # dies with the lease
        taken.release()
    else:
        time.sleep(0.002)
"""


def test_many_that_race_for_a_dead_lease_take_turns(path, tmp_path):
    """Twelve processes, some of which die holding it: no two have it at once."""
    logs = [tmp_path / f"log{index}" for index in range(12)]
    racers = [subprocess.Popen([sys.executable, "-c", RACE, str(path), str(log), str(index)], env={**os.environ, "PYTHONPATH": str(ROOT)})
              for index, log in enumerate(logs)]
    for racer in racers:
        racer.wait(timeout=120)
    spans = []
    for log in logs:
        times = [int(line.split()[1]) for line in (log.read_text().splitlines() if log.exists() else [])]
        spans += list(zip(times[::2], times[1::2]))
    spans.sort()
    assert len(spans) > 12 and all(before[1] <= after[0] for before, after in zip(spans, spans[1:]))
    assert any(racer.returncode == 9 for racer in racers)
    time.sleep(0.01)
    taken = lease.take(path)
    assert isinstance(taken, lease.Lease)
    taken.release()
