"""Launching on a cluster, without one: settings to an sbatch script, groups of runs to tasks, what a task does when it is stopped."""
from __future__ import annotations

import importlib
import json
import os
import stat

import pytest

import bitlaw
from tests.trainer.tiny import TINY
from trainer.cli import sweep_configs
from trainer.cohort import Layout
from trainer.config.launcher import launcher
from trainer.sweep import make_plan, planfile, slurm
from trainer.sweep.planfile import Composition


def _options(script: str) -> set[str]:
    return {line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")}


def _plan(tmp_path, *overrides):
    configs, options = sweep_configs([*TINY, f"runs_dir={tmp_path}", *overrides])
    return make_plan(configs, options.max_members)


def test_settings_become_a_script(tmp_path):
    """One process per node that has all its GPUs and CPUs; a warning before the time is up; one log per task, which is written on."""
    settings = launcher("slurm", ("launcher.time=1-12:00:30", "launcher.partition=gpu", "launcher.account=lab", "launcher.gpus_per_node=8", "launcher.cpus_per_task=16",
                                  "launcher.mem=64G", "launcher.array_parallelism=3", "launcher.sbatch.qos=high", "launcher.sbatch={exclusive: true, nice: 5}",
                                  "launcher.signal_delay_s=90", "launcher.setup=[module load cuda]", "launcher.python=python3.12"))  # fmt: skip
    plan = _plan(tmp_path, "steps=3", "batch_size=4,8,12,16", "seed=0,1")
    script = slurm.script(plan, settings)
    logs = tmp_path / "adhoc" / "logs"
    assert _options(script) == {"array=0-3%3", "time=2161", "partition=gpu", "account=lab", "gpus-per-node=8", "cpus-per-task=16", "mem=64G", "qos=high", "exclusive", "nice=5",
                                "signal=USR2@90", "requeue", "open-mode=append", "nodes=1", "ntasks-per-node=1", "job-name=bitlaw-adhoc", f"output={logs}/%A_%a.log"}  # fmt: skip
    lines = script.splitlines()
    assert lines.index("module load cuda") < next(i for i, line in enumerate(lines) if line.startswith("srun"))
    srun = lines[-1]
    assert f"--output {logs}/%A_%a.log --open-mode=append --cpus-per-task=16 python3.12 -c " in srun and srun.endswith(f"' -u -m submitit.core._submit {logs}/.submitit")
    assert not (tmp_path / "adhoc").exists()


@pytest.mark.parametrize("text, minutes", [("90m", 90), ("90min", 90), ("1.5h", 90), ("2d", 2880), ("00:00:01", 1), ("02:30:00", 150), ("10-00:00:00", 14400)])
def test_times(text, minutes):
    assert launcher("slurm", (f"launcher.time={text}", "launcher.signal_delay_s=30")).minutes == minutes


def test_a_launcher_of_ones_own(tmp_path):
    """A file in --config-dir/launcher is a launcher by its name: its keys, then those of the command line; a key that is none is refused."""
    (tmp_path / "launcher").mkdir()
    (tmp_path / "launcher" / "jura.yaml").write_text("partition: a100\nsbatch: {qos: long}\n")
    (tmp_path / "launcher" / "bad.yaml").write_text("partitoin: a100\n")
    settings = launcher("jura", ("launcher.sbatch.nice=5", "launcher.nodes=2"), str(tmp_path))
    assert (settings.partition, settings.nodes, settings.sbatch, settings.minutes) == ("a100", 2, (("qos", "long"), ("nice", 5)), None)
    with pytest.raises(ValueError, match="partitoin is not a key; accepted keys: partition,"):
        launcher("bad", (), str(tmp_path))
    with pytest.raises(ValueError, match="accepted: local, slurm, bad, jura"):
        launcher("jur", (), str(tmp_path))


def test_runs_of_a_settled_composition_stay_in_one_task(tmp_path):
    """Also one of more devices than the machine that submits has; what is in none is grouped as planned."""
    plan = _plan(tmp_path, "steps=3", "seed=0,1,2,3", "batch_size=4,8")
    small, large = ([run.run_id for run in cohort.runs] for cohort in plan.cohorts)
    settled = Composition(Layout(64, 1, "map"), (small[3], small[0], *[None] * 62))
    groups = slurm._groups(plan, [settled])
    assert [[run.run_id for run in group] for group in groups] == [[small[0], small[3]], [small[1], small[2]], large]


def _programs(folder, monkeypatch, **scripts) -> None:
    """Commands of Slurm that only note how they were called, and say what they are told to."""
    for name, script in scripts.items():
        (folder / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {folder}/calls\n{script}\n')
        (folder / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


def test_launches_of_one_sweep(tmp_path, monkeypatch, capsys):
    """The first submits a task per cohort and has its runs in the plan; while they are queued the second submits only what is new; what sbatch
    refuses is one line."""
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    _programs(bin_dir, monkeypatch, sbatch="echo Submitted batch job 12", srun="", squeue="echo 12_0; echo 12_1; echo 99")
    sweep = ["sweep", *TINY, f"runs_dir={tmp_path / 'runs'}", "launcher=slurm", "steps=3"]
    assert bitlaw.main([*sweep, "seed=0,1", "batch_size=4,8"]) == 0
    root = tmp_path / "runs" / "adhoc"
    whose = json.loads((root / "logs" / "12.json").read_text())
    assert sorted(whose) == ["12_0", "12_1"] and sorted(sum(whose.values(), [])) == sorted(planfile.read(root)[0])
    assert "submitted 4 runs in 2 tasks: 12_0 to 12_1" in capsys.readouterr().out
    assert bitlaw.main([*sweep, "seed=0,1", "batch_size=4,8"]) == 0
    assert "4 runs are queued or running already: 12_0, 12_1" in capsys.readouterr().out
    _programs(bin_dir, monkeypatch, sbatch="echo Submitted batch job 13", srun="", squeue="echo 12_1")
    assert bitlaw.main([*sweep, "seed=0,1", "batch_size=4,8"]) == 0
    out = capsys.readouterr().out
    assert "2 runs are queued or running already: 12_1" in out and "submitted 2 runs in 1 tasks: 13;" in out
    assert json.loads((root / "logs" / "13.json").read_text()) == {"13": whose["12_0"]}
    calls = (bin_dir / "calls").read_text()
    assert calls.count("sbatch ") == 2
    _programs(bin_dir, monkeypatch, sbatch="echo sbatch: error: invalid partition specified: gpu >&2; exit 1", squeue="true")
    assert bitlaw.main([*sweep, "seed=0,1", "batch_size=4,8", "launcher.partition=gpu"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "invalid partition specified: gpu" in err


@pytest.mark.parametrize("state, restarts, code, requeued", [("RUNNING", "0", 0, True), ("RUNNING", "3", 1, False), ("COMPLETING", "0", 1, False), ("", "0", 1, False)])
def test_a_task_queues_again_unless_slurm_has_ended_it(state, restarts, code, requeued, tmp_path, monkeypatch):
    """By its place in the array: SLURM_JOB_ID of one task is the whole array's."""
    _programs(tmp_path, monkeypatch, squeue=f"echo {state}", scontrol="")
    for name, value in {"SLURM_JOB_ID": "12", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "7", "SLURM_RESTART_COUNT": restarts}.items():
        monkeypatch.setenv(name, value)
    assert slurm.requeue(max_requeues=3) == code
    assert ("scontrol requeue 12_7" in (tmp_path / "calls").read_text()) == requeued


def test_a_task_does_not_wait_long_for_others(tmp_path, monkeypatch):
    """What another host trains is left to it, when all the rest is done."""
    execution = importlib.import_module("trainer.sweep.execute")
    monkeypatch.setattr(execution, "POLL_S", 0.1)
    plan = _plan(tmp_path, "steps=3")
    folder = plan.runs[0].folder
    folder.path.mkdir(parents=True)
    folder.lease.write_text(json.dumps({"host": "elsewhere", "pid": 1, "process_start": None, "token": "theirs"}))
    outcome = execution.execute(plan, quiet=True, patience=0.3)
    assert outcome.records == [] and outcome.stopped is None and folder.lease.exists()


def test_what_slurm_refuses_to_queue_again_fails(tmp_path, monkeypatch, capsys):
    _programs(tmp_path, monkeypatch, squeue="echo RUNNING", scontrol="echo Requested operation is presently disabled >&2; exit 1")
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    assert slurm.requeue(max_requeues=3) == 1
    assert "presently disabled" in capsys.readouterr().out


def test_a_job_is_submitted_from_within_another(monkeypatch):
    """Without its variables, which would overrule the new one's; with the user's own defaults for sbatch."""
    for name in ("SLURM_JOB_ID", "SLURM_CONF", "SLURM_MEM_PER_NODE", "SBATCH_ACCOUNT"):
        monkeypatch.setenv(name, "1")
    with slurm._no_job_of_our_own():
        assert {name for name in os.environ if name.startswith(("SLURM", "SBATCH"))} == {"SLURM_CONF", "SBATCH_ACCOUNT"}
    assert os.environ["SLURM_MEM_PER_NODE"] == "1"
