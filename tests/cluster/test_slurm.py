"""Sweeps through a real Slurm: the same table as on this machine alone, whatever happens to tasks, nodes and launchers."""
from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cluster.slurm import missing
from tests.trainer.tiny import TINY, folders, results
from trainer import checkpoint

pytestmark = [pytest.mark.skipif(missing() is not None, reason=str(missing())), pytest.mark.slow]

ROOT = Path(__file__).parents[2]
# Two structures, so two tasks, of two runs that share a trunk; and one task of two runs that takes long enough to be hit.
SWEEP = ["steps=300,600", "seed=0", "batch_size=4,8", "checkpoint.every_steps=50", "host_devices=2", "steps_per_dispatch=10"]
LONG = ["steps=4000", "seed=0,1", "checkpoint.every_steps=50", "host_devices=2", "steps_per_dispatch=10"]


def _bitlaw(slurm, verb, *overrides, runs_dir, **how) -> subprocess.Popen:
    environment = {**slurm.environment, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(ROOT / "bitlaw.py"), verb, *TINY, *overrides, f"runs_dir='{runs_dir}'"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, **how)


def _submit(slurm, runs_dir, *overrides) -> tuple[str, list[str]]:
    """Submit a sweep: what the launch said, and the tasks' names."""
    process = _bitlaw(slurm, "sweep", *overrides, "launcher=slurm", "launcher.cpus_per_task=1", runs_dir=runs_dir)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out, sorted(job for path in Path(runs_dir).glob("*/logs/*.json") for job in json.loads(path.read_text()))


def _log(runs_dir, job) -> str:
    (path,) = Path(runs_dir).glob(f"*/logs/{job}.log")
    return path.read_text()


def _until_training(runs_dir, seconds=300) -> None:
    """Until a checkpoint is there."""
    deadline = time.monotonic() + seconds
    while not any(checkpoint.steps(folder.checkpoints) for folder in folders(runs_dir).values()):
        assert time.monotonic() < deadline, [path.read_text() for path in Path(runs_dir).glob("*/logs/*.log")]
        time.sleep(0.05)


@pytest.fixture(scope="module")
def local(slurm, tmp_path_factory):
    """Results of both sweeps, trained by this machine alone."""
    found = {}
    for name, overrides in (("sweep", SWEEP), ("long", LONG)):
        runs_dir = tmp_path_factory.mktemp(name)
        process = _bitlaw(slurm, "sweep", *overrides, runs_dir=runs_dir)
        assert process.wait(600) == 0, process.stderr.read()
        found[name] = results(runs_dir)
    return found


def test_a_sweep_through_slurm_is_the_local_one(slurm, local, tmp_path):
    """From a dry run that writes nothing to a table; a second launch while the first waits or runs adds no job; a third has nothing to do."""
    runs_dir = tmp_path / "on a cluster ü"
    dry = _bitlaw(slurm, "sweep", *SWEEP, "launcher=slurm", "launcher.cpus_per_task=1", "dry_run=true", runs_dir=runs_dir)
    shown, err = dry.communicate(timeout=300)
    assert dry.returncode == 0 and not runs_dir.exists(), err
    began = time.monotonic()
    said, jobs = _submit(slurm, runs_dir, *SWEEP)
    assert len(jobs) == 2 and "submitted 4 runs in 2 tasks" in said and str(runs_dir) in said
    array = jobs[0].partition("_")[0]
    script = (runs_dir / "adhoc" / "logs" / ".submitit" / f"{array}_submission.sh").read_text()
    assert script.strip() in shown
    again, same = _submit(slurm, runs_dir, *SWEEP)
    assert same == jobs and "4 runs are queued or running already" in again or slurm.job(jobs[0])["JobState"] == "COMPLETED"
    for job in jobs:
        assert slurm.until(job, "COMPLETED", "FAILED", seconds=600)["JobState"] == "COMPLETED", _log(runs_dir, job)
    assert time.monotonic() - began < 600
    assert results(runs_dir) == local["sweep"]
    assert any((runs_dir / ".compiled").rglob("*-cache"))  # one for all tasks
    said, same = _submit(slurm, runs_dir, *SWEEP)
    assert same == jobs and "4 runs done, 4 of them before" in said


@pytest.mark.parametrize("how", ["USR2", "TERM", "requeue", "urgent", "at once"])
def test_a_preempted_task_goes_on_and_ends_in_the_same_bits(how, slurm, local, tmp_path):
    """Signalled as Slurm does before a time limit (USR2) or a pre-emption (TERM), requeued by an administrator, pushed aside by a job of a
    higher partition, signalled while it still imports JAX: it saves everything, waits in the queue, goes on from there."""
    _, (job,) = _submit(slurm, tmp_path, *LONG)
    if how == "at once":
        slurm.until(job, "RUNNING")
        time.sleep(0.5)
        slurm.ask("scancel", "--signal=USR2", job)
    else:
        _until_training(tmp_path)
    if how in ("USR2", "TERM"):
        slurm.ask("scancel", f"--signal={how}", job)
    elif how == "requeue":
        slurm.ask("scontrol", "requeue", job)
    elif how == "urgent":
        slurm.ask("srun", "--partition=urgent", "--exclusive", "--immediate=60", "sleep", "1")
    done = slurm.until(job, "COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", seconds=600)
    log = _log(tmp_path, job)
    assert done["JobState"] == "COMPLETED" and int(done["Restarts"]) >= 1, log
    assert re.search(r"stopped \((SIGUSR2|SIGTERM)\), everything is saved; [12] runs are left", log), log
    assert results(tmp_path) == local["long"]


def test_a_task_whose_time_is_up_queues_again(slurm, tmp_path):
    """Slurm's own warning reaches it."""
    _, (job,) = _submit(slurm, tmp_path, "steps=10000000", "host_devices=2", "launcher.time=1m", "launcher.signal_delay_s=20")
    deadline = time.monotonic() + 180
    while not int(slurm.job(job)["Restarts"]) and time.monotonic() < deadline:
        time.sleep(0.5)
    restarts = int(slurm.job(job)["Restarts"])
    slurm.ask("scancel", job)
    log = _log(tmp_path, job)
    assert restarts == 1 and "stopped (SIGUSR2), everything is saved; 1 runs are left" in log and "back in the queue" in log, log
    (folder,) = folders(tmp_path).values()
    assert checkpoint.steps(folder.checkpoints)


def test_a_cancelled_task_stays_cancelled(slurm, local, tmp_path):
    """`scancel` is meant: the task saves everything and does not come back by itself; the same command goes on."""
    _, (job,) = _submit(slurm, tmp_path, *LONG)
    _until_training(tmp_path)
    slurm.ask("scancel", job)
    slurm.until(job, "CANCELLED", seconds=120)
    time.sleep(3)
    assert slurm.job(job)["JobState"] == "CANCELLED" and "everything is saved" in _log(tmp_path, job)
    _, jobs = _submit(slurm, tmp_path, *LONG)
    (second,) = set(jobs) - {job}
    assert slurm.until(second, "COMPLETED", "FAILED", seconds=600)["JobState"] == "COMPLETED"
    assert results(tmp_path) == local["long"]


def test_a_drained_node_and_a_killed_launcher(slurm, local, tmp_path):
    """Tasks wait while their node is drained; a launcher that is killed while it submits leaves nothing that the next one stumbles over."""
    slurm.ask("scontrol", "update", f"NodeName={slurm.host}", "State=DRAIN", "Reason=test")
    try:
        for seconds in (2.0, 5.0):
            process = _bitlaw(slurm, "sweep", *SWEEP, "launcher=slurm", runs_dir=tmp_path)
            time.sleep(seconds)
            process.send_signal(signal.SIGKILL)
            process.communicate()
        _, jobs = _submit(slurm, tmp_path, *SWEEP)
        time.sleep(3)
        assert {slurm.job(job)["JobState"] for job in jobs} == {"PENDING"}
    finally:
        slurm.ask("scontrol", "update", f"NodeName={slurm.host}", "State=RESUME")
    for job in jobs:
        assert slurm.until(job, "COMPLETED", "FAILED", seconds=600)["JobState"] == "COMPLETED", _log(tmp_path, job)
    assert results(tmp_path) == local["sweep"]


def test_a_failed_run_fails_its_task(slurm, tmp_path):
    """What a person reads from Slurm, from the log and from `bitlaw status` is the same; other tasks do not suffer."""
    plugin = tmp_path / "broken_plugin.py"
    plugin.write_text("import os\nif 'SLURM_JOB_ID' in os.environ:\n    import trainer.loop\n    def fail(*a, **k): raise RuntimeError('no luck')\n"
                      "    import trainer.sweep.execute\n    import sys\n    sys.modules['trainer.sweep.execute'].run_cohort = fail\n")
    slurm.environment["PYTHONPATH"] = str(tmp_path)
    try:
        _, (job,) = _submit(slurm, tmp_path / "runs", "steps=20", "plugins=[broken_plugin]")
    finally:
        del slurm.environment["PYTHONPATH"]
    done = slurm.until(job, "COMPLETED", "FAILED", seconds=300)
    assert (done["JobState"], done["ExitCode"]) == ("FAILED", "1:0")
    assert "no luck" in _log(tmp_path / "runs", job)
    status = subprocess.run([sys.executable, str(ROOT / "bitlaw.py"), "status", str(tmp_path / "runs")], capture_output=True, text=True, check=False)
    assert status.returncode == 1 and "failed" in status.stdout
