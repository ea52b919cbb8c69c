"""Mirrors: a real offline W&B run is written and read back byte by byte, and no trouble of W&B's reaches training."""

import math
import os
import pathlib
import subprocess
import sys

import pytest

from tests.trainer.wandb_files import read_back
from trainer import mirrors

wandb = pytest.importorskip("wandb")


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)


def test_an_offline_run_reads_back_as_it_was(tmp_path, offline, capfd):
    mirror = mirrors.make("wandb")
    config = {"model": {"d_model": 32, "name": "2k"}, "lr": 0.01, "plugins": ["a"]}
    mirror.start("abc123", "my-sweep", config, tmp_path / "abc123")
    mirror.log({"step": 10, "loss": 3.5, "lr": 0.01})
    mirror.log({"step": 20, "loss": 3.25})
    mirror.log({"step": 20, "val_loss": 3.125})
    mirror.log({"step": 30, "loss": math.nan})
    mirror.finish({"run_id": "abc123", "loss": 3.0, "status": "diverged", "diverged_step": 30, "trunk_id": None, "precision": "int4"})
    found = read_back(tmp_path / "abc123")
    assert (found["id"], found["group"], found["project"], found["exit_code"]) == ("abc123", "my-sweep", "bitlaw", 0)
    assert found["tags"] == ["2k", "int4", "diverged"]
    assert {key: value for key, value in found["config"].items() if key != "_wandb"} == config
    rows = [{key: value for key, value in row.items() if key in ("_step", "loss", "lr", "val_loss")} for row in found["history"]]
    assert rows[:2] == [{"_step": 10, "loss": 3.5, "lr": 0.01}, {"_step": 20, "loss": 3.25, "val_loss": 3.125}]
    assert rows[2]["_step"] == 30 and math.isnan(rows[2]["loss"]) and len(rows) == 3
    # The record's loss, not the last logged one.
    assert found["summary"]["loss"] == 3.0 and found["summary"]["status"] == "diverged"
    assert found["summary"]["diverged_step"] == 30 and "trunk_id" not in found["summary"]
    assert capfd.readouterr() == ("", "")


def test_members_of_a_cohort_are_mirrored_side_by_side(tmp_path, offline):
    members = {run_id: mirrors.make("wandb") for run_id in ("one", "two")}
    for run_id, mirror in members.items():
        mirror.start(run_id, None, {}, tmp_path / run_id)
    for step in (1, 2):
        for run_id, mirror in members.items():
            mirror.log({"step": step, "loss": step * (10.0 if run_id == "one" else 20.0)})
    for run_id, mirror in members.items():
        mirror.finish({"status": "failed" if run_id == "two" else "done"})
    for run_id, scale, code in (("one", 10.0, 0), ("two", 20.0, 1)):
        found = read_back(tmp_path / run_id)
        assert [row["loss"] for row in found["history"]] == [scale, 2 * scale]
        assert (found["id"], found["exit_code"]) == (run_id, code)


def test_the_mode_of_the_environment_holds(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    mirror = mirrors.make("wandb")
    mirror.start("abc", None, {}, tmp_path / "abc")
    mirror.log({"step": 1, "loss": 1.0})
    mirror.finish({"status": "done"})
    assert not list(tmp_path.glob("abc/wandb/offline-run-*"))


# Kills W&B's service process in the middle of a run, as a full disk or an out-of-memory killer would.
_SERVICE_DIES = """
import os, signal, sys
from trainer import mirrors
import psutil
mirror = mirrors.make("wandb")
mirror.start("abc", "s", {}, sys.argv[1])
mirror.log({"step": 1, "loss": 1.0})
for child in psutil.Process().children(recursive=True):
    child.kill()
    child.wait()
for step in range(2, 6):
    mirror.log({"step": step, "loss": 1.0})
mirror.finish({"status": "done"})
other = mirrors.make("wandb")
other.start("def", "s", {}, sys.argv[1])
other.log({"step": 1, "loss": 1.0})
other.finish({"status": "done"})
print("trained to the end", flush=True)
os._exit(0)  # W&B's own clean-up at exit complains about the dead service
"""


def test_training_outlives_the_service(tmp_path, offline):
    pytest.importorskip("psutil")
    root = pathlib.Path(mirrors.__file__).parents[1]
    # W&B leaves the address of its service in the environment: without it the new process has a service of its own.
    env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")} | {"PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", _SERVICE_DIES, str(tmp_path)], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and done.stdout == "trained to the end\n", done.stderr
    warnings = [line for line in done.stderr.splitlines() if line.startswith("bitlaw: ")]
    assert len(warnings) == 2 and all("W&B fails" in line for line in warnings), done.stderr  # once for each run
    assert "Traceback" not in done.stderr


def test_a_setting_that_wandb_refuses_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "sometimes")
    mirror = mirrors.make("wandb")
    mirror.start("abc", None, {}, tmp_path / "abc")
    mirror.log({"step": 1, "loss": 1.0})
    mirror.finish({"status": "done"})
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and "W&B fails" in shown and "sometimes" in shown


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, offline, capsys):
    (tmp_path / "file").write_text("")
    mirror = mirrors.make("wandb")
    mirror.start("abc", None, {}, tmp_path / "file" / "abc")
    mirror.log({"step": 1, "loss": 1.0})
    mirror.finish({"status": "done"})
    assert capsys.readouterr().err.count("W&B fails") == 1


def test_none_mirrors_nothing_and_wandb_is_imported_only_when_asked_for(tmp_path):
    script = """
import sys
from trainer import mirrors
mirror = mirrors.make("none")
mirror.start("abc", None, {}, sys.argv[1])
mirror.log({"step": 1})
mirror.finish({"status": "done"})
print("wandb" in sys.modules)
sys.modules["wandb"] = None  # as where it is not installed
try:
    mirrors.make("wandb")
except ValueError as error:
    print(error)
"""
    root = pathlib.Path(mirrors.__file__).parents[1]
    shown = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    assert shown == ["False", "logger=wandb needs the package 'wandb': pip install 'bitlaw[wandb]'; or logger=none"]
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_logger_is_refused():
    with pytest.raises(ValueError, match="logger='tensorboard' is not known; known: none, wandb"):
        mirrors.make("tensorboard")
