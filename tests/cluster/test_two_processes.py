"""One run in two processes of four devices each, found through Slurm's variables: the record is that of one process with eight devices."""
from __future__ import annotations

import json
import math
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import pytest

from trainer import distributed

ROOT = pathlib.Path(__file__).resolve().parents[2]
RUN = ["model=2k", "model.num_layers=1", "data=synthetic", "data.vocab_size=16", "data.order=1", "data.tokens=20000", "batch_size=8", "seq_len=16",
       "eval.sequences=16", "schedule.warmup_steps=2", "steps=8", "probe=false", "log_every=1", "steps_per_dispatch=3",
       "precision=int4", "precision.weights.rounding=stochastic"]  # fmt: skip
ENTRY = "import sys, bitlaw; sys.exit(bitlaw.main(sys.argv[1:]))"


def _start(runs_dir, devices: int, env: dict, *overrides: str) -> subprocess.Popen:
    """`bitlaw train` in a process of its own."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    command = [sys.executable, "-c", ENTRY, "train", *RUN, f"runs_dir={runs_dir}", f"host_devices={devices}", *overrides]
    return subprocess.Popen(command, cwd=ROOT, env=inherited | {"JAX_PLATFORMS": "cpu"} | env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _slurm(processes: int, port: int) -> list[dict]:
    """What srun would set, and a port of our own: of two tasks on one node."""
    return [{"SLURM_JOB_ID": "4711", "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_NODES": "1", "SLURM_NTASKS": str(processes),
             "SLURM_PROCID": str(process), "SLURM_LOCALID": str(process), "JAX_COORDINATOR_PORT": str(port)} for process in range(processes)]  # fmt: skip


def _together(runs_dir, *overrides: str) -> list[tuple[int, str, str]]:
    """Two processes run to their end: (exit code, stdout, stderr) of each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [_start(runs_dir, 4, env, "sharding=fsdp", *overrides) for env in _slurm(2, port)]
    try:
        outputs = [process.communicate(timeout=600) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(processes, outputs)]


def _record(runs_dir) -> tuple[dict, list[dict]]:
    (folder,) = pathlib.Path(runs_dir).glob("train/*/")
    return json.loads((folder / "record.json").read_text()), [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_two_processes(tmp_path):
    """Layout, losses and log are those of one process to 1e-6 (collectives between processes may add up in another order), and a run that goes on from
    its checkpoint ends in the same bits; the second process prints nothing and writes nothing."""
    (first_code, out, err), (second_code, silent, err2) = _together(tmp_path / "two", "checkpoint.every_steps=4")
    assert (first_code, second_code) == (0, 0), err + err2
    assert "nats/token" not in silent and out.count("nats/token") == 1
    alone = _start(tmp_path / "one", 8, {}, "sharding=fsdp")
    assert alone.wait(600) == 0, alone.stderr.read()
    (folder,) = (tmp_path / "two/train").glob("*/")
    (folder / "record.json").rename(tmp_path / "before.json")
    shutil.rmtree(folder / "checkpoints/8")
    assert [code for code, *_ in _together(tmp_path / "two", "checkpoint.every_steps=4")] == [0, 0]
    assert json.loads((tmp_path / "before.json").read_text())["loss"] == _record(tmp_path / "two")[0]["loss"]
    (found, rows), (expected, expected_rows) = _record(tmp_path / "two"), _record(tmp_path / "one")
    assert found["layout"] == expected["layout"] == "fsdp/8" and found["run_id"] == expected["run_id"]
    assert math.isclose(found["loss"], expected["loss"], rel_tol=1e-6)
    assert [row["step"] for row in rows] == [row["step"] for row in expected_rows] == [*range(1, 9), 8]
    for row, other in zip(rows, expected_rows):
        assert all(math.isclose(row[name], other[name], rel_tol=1e-6) for name in ("loss", "val_loss") if name in row)


@pytest.mark.parametrize("env, expected", [
    ({"SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_NUM_NODES": "2", "SLURM_LOCALID": "0"}, []),
    ({"SLURM_NTASKS": "8", "SLURM_STEP_NODELIST": "n1", "SLURM_STEP_NUM_NODES": "1", "SLURM_LOCALID": "3"}, None),
    ({"SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_NUM_NODES": "2", "JAX_LOCAL_DEVICE_IDS": "0,1"}, None),
    ({}, []),
])  # fmt: skip
def test_one_process_per_node_has_all_its_devices(env, expected):
    """JAX would give the task of number SLURM_LOCALID that one device; an empty list lets it see all. Left to JAX where a node has
    several tasks, or the user says."""
    assert distributed.local_devices(env) == expected


def test_a_batch_script_is_no_step():
    """It has the job's SLURM_NTASKS, and runs once."""
    assert distributed.slurm_tasks({"SLURM_NTASKS": "4", "SLURM_JOB_ID": "1"}) == 1
    assert distributed.slurm_tasks({"SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "n[1-4]"}) == 4
