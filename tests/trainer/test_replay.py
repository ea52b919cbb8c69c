"""`bitlaw wandb-sync`: what a run folder holds arrives in W&B's files, once; and a server that is not there delays nothing for long."""

import json
import math
import os
import pathlib
import socket
import subprocess
import sys
import time

import pytest

import bitlaw
from tests.trainer.tiny import TINY, folders, launch
from tests.trainer.wandb_files import read_back
from trainer import mirrors
from trainer.records import NewerVersionError, RunFolder
from trainer.replay import replay_main

pytest.importorskip("wandb")
ROOT = pathlib.Path(bitlaw.__file__).parent


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    for name in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_ENTITY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


ROWS = [{"step": 1, "loss": 3.5, "grad_norm": 1.0}, {"step": 2, "loss": math.nan, "grad_norm": math.inf}, {"step": 3, "loss": 3.0}, {"step": 3, "val_loss": 2.875}]
CONFIG = {"model": {"name": "2k", "d_model": 8}, "lr": 0.01}


def _run(path, status="done", rows=ROWS, **record):
    run = RunFolder(path)
    run.write_config({"run_id": path.name, "config": CONFIG})
    run.append_metrics(rows)
    if status:
        run.finish({"run_id": path.name, "sweep": "my-sweep", "status": status, "precision": "int4", "loss": 2.875 if status == "done" else None} | record)
    return run


def _places(folder) -> list[str]:
    return sorted(path.parents[1].name for path in folder.rglob("offline-run-*"))


def test_every_finished_run_arrives_as_it_was(tmp_path, capfd):
    for status in ("done", "diverged", "failed"):
        _run(tmp_path / "my sweep ü" / status, status, diverged_step=2 if status == "diverged" else None)
    _run(tmp_path / "my sweep ü" / "begun", status=None)
    assert replay_main([str(tmp_path)]) == 0
    out, err = capfd.readouterr()
    assert f"{tmp_path}: 3 runs replayed (offline), 0 already synced, 1 not over" in out and err == ""
    assert _places(tmp_path) == ["diverged", "done", "failed"]
    for status in ("done", "diverged", "failed"):
        found = read_back(tmp_path / "my sweep ü" / status)
        assert (found["id"], found["group"], found["tags"], found["exit_code"]) == (status, "my-sweep", ["2k", "int4", status], int(status == "failed"))
        assert {key: value for key, value in found["config"].items() if key != "_wandb"} == CONFIG
        rows = [{key: value for key, value in row.items() if key in ("_step", "loss", "grad_norm", "val_loss")} for row in found["history"]]
        assert rows[0] == {"_step": 1, "loss": 3.5, "grad_norm": 1.0} and rows[2:] == [{"_step": 3, "loss": 3.0, "val_loss": 2.875}]
        assert math.isnan(rows[1]["loss"]) and rows[1]["grad_norm"] == math.inf
        assert found["summary"]["status"] == status and found["summary"]["record_version"] == 1
        assert found["summary"].get("diverged_step") == (2 if status == "diverged" else None)
    # Again: nothing. Of the run that ended meanwhile: that. Of one whose record changed, or by force: in the place of what was there.
    before = {path.name for path in tmp_path.rglob("offline-run-*")}
    assert replay_main([str(tmp_path)]) == 0
    assert "0 runs replayed (offline), 3 already synced, 1 not over" in capfd.readouterr().out
    assert {path.name for path in tmp_path.rglob("offline-run-*")} == before
    RunFolder(tmp_path / "my sweep ü" / "begun").finish({"run_id": "begun", "status": "done", "loss": 2.0})
    _run(tmp_path / "my sweep ü" / "failed", "done", rows=[{"step": 4, "loss": 2.5}])
    assert replay_main([str(tmp_path)]) == 0
    assert "2 runs replayed (offline), 2 already synced, 0 not over" in capfd.readouterr().out
    assert replay_main([str(tmp_path), "--again"]) == 0
    assert "4 runs replayed (offline), 0 already synced, 0 not over" in capfd.readouterr().out
    assert _places(tmp_path) == ["begun", "diverged", "done", "failed"]
    assert [row["_step"] for row in read_back(tmp_path / "my sweep ü" / "failed")["history"]] == [1, 2, 3, 4]


def test_what_training_mirrored_whole_is_not_sent_again_and_pieces_are_replaced(tmp_path, capfd):
    """A run mirrored while it was trained is there already; one that was stopped and went on is in two pieces: they become one."""
    for name, pieces in (("whole", [[1, 2, 3]]), ("pieces", [[1, 2], [2, 3]])):
        run = RunFolder(tmp_path / name)
        for piece in pieces:
            mirror = mirrors.make("wandb")
            run.write_config({"run_id": name, "config": CONFIG})
            mirror.start(name, "s", CONFIG, run.path)
            run.truncate(piece[0] - 1)
            run.append_metrics([{"step": step} for step in piece])
            for step in piece:
                mirror.log({"step": step})
            if piece[-1] < 3:  # killed: all that a process leaves
                mirror._run.finish()
            time.sleep(1.1)  # W&B's folders are named by the second
        run.finish({"run_id": name, "status": "done"})
        mirror.finish(run.record())
    assert _places(tmp_path) == ["pieces", "pieces", "whole"]
    assert replay_main([str(tmp_path)]) == 0
    assert "1 runs replayed (offline), 1 already synced" in capfd.readouterr().out
    assert _places(tmp_path) == ["pieces", "whole"]
    assert [row["_step"] for row in read_back(tmp_path / "pieces")["history"]] == [1, 2, 3]


def test_copies_of_a_run_are_sent_once(tmp_path, capfd):
    _run(tmp_path / "a" / "r", "failed")
    _run(tmp_path / "b" / "r", "done")
    _run(tmp_path / "c" / "r", None)
    assert replay_main([str(tmp_path)]) == 0
    assert "1 runs replayed (offline), 0 already synced, 0 not over" in capfd.readouterr().out
    assert read_back(tmp_path / "b" / "r")["tags"][-1] == "done" and len(list(tmp_path.rglob("offline-run-*"))) == 1


def test_what_is_broken_is_told_and_the_rest_replayed(tmp_path, capfd):
    (_run(tmp_path / "record").path / "record.json").write_text('{"status"')
    (_run(tmp_path / "metrics").path / "metrics.jsonl").write_text('{"step": 1\n{"step": 2}\n')
    _run(tmp_path / "whole")
    assert replay_main([str(tmp_path)]) == 1
    out, err = capfd.readouterr()
    assert "1 runs replayed (offline), 0 already synced, 0 not over, 2 left" in out and _places(tmp_path) == ["whole"]
    assert len(err.splitlines()) == 2 and "record.json is not JSON" in err and "metrics.jsonl line 1 is not JSON" in err


@pytest.mark.parametrize("argv, words", [([], "nothing: bitlaw wandb-sync DIR"), (["a", "b"], "a b: bitlaw"), (["--now"], "--now: bitlaw"), (["no"], "no is not a folder"),
                                         (["."], "holds no runs")])  # fmt: skip
def test_refusals_are_one_line(argv, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as caught:
        replay_main(argv)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_more_refusals(tmp_path, monkeypatch):
    run = _run(tmp_path / "r")
    for mode in ("disabled", "sometimes"):
        monkeypatch.setenv("WANDB_MODE", mode)
        with pytest.raises(ValueError, match=f"WANDB_MODE={mode} replays nothing; accepted: offline .*, online"):
            replay_main([str(tmp_path)])
    monkeypatch.delenv("WANDB_MODE")
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write_note", lambda *_: (_ for _ in ()).throw(OSError(30, "Read-only file system", "x")))
        with pytest.raises(ValueError, match=r"r cannot be written \(Read-only file system\); wandb-sync writes"):
            replay_main([str(tmp_path)])
    (run.path / "record.json").write_text('{"record_version": 9}')
    with pytest.raises(NewerVersionError, match="record_version 9"):
        replay_main([str(tmp_path)])


# --- a server that is not there ---------------------------------------------------------------------------------------


def _online(**more) -> dict:
    """An environment whose W&B server refuses every connection."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    return env | {"WANDB_MODE": "online", "WANDB_BASE_URL": f"http://127.0.0.1:{port}", "WANDB_API_KEY": "0" * 40, "JAX_PLATFORMS": "cpu"} | more


@pytest.mark.slow
def test_training_without_the_server_gives_the_same_records(tmp_path):
    """Three runs: one line, one wait of some ten seconds, and the records of a training without a mirror; then a replay says that it cannot."""
    overrides = ["steps=3", "seed=0,1,2"]
    launch(tmp_path / "without", *overrides)
    began = time.monotonic()
    command = ["sweep", *TINY, f"runs_dir={tmp_path / 'with'}", "logger=wandb", *overrides]
    script = "import jax; jax.config.update('jax_num_cpu_devices', 8); import sys, bitlaw; sys.exit(bitlaw.main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", script, *command], cwd=ROOT, env=_online(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 100  # ten of them for the server; measured 25 with imports and compiling on two busy cores
    said = [line for line in done.stderr.splitlines() if line.startswith("bitlaw: ")]
    assert len(said) == 1 and "W&B fails" in said[0] and "the run goes on, recorded in its folder only" in said[0] and "Traceback" not in done.stderr
    losses = [{run_id: folder.record()["loss"] for run_id, folder in folders(tmp_path / name).items()} for name in ("with", "without")]
    assert losses[0].keys() == losses[1].keys() and len(losses[0]) == 3
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)  # bitwise on the same layout; the other process may lay them out otherwise
    assert all(len(folder.metrics()) == 4 for folder in folders(tmp_path / "with").values())
    replayed = subprocess.run([sys.executable, "bitlaw.py", "wandb-sync", str(tmp_path / "with")], cwd=ROOT, env=_online(), capture_output=True, text=True, timeout=100)
    assert replayed.returncode == 1 and "0 runs replayed (online), 0 already synced, 0 not over, 3 left" in replayed.stdout
    assert replayed.stderr.count("W&B fails") == 1 and "the same command goes on" in replayed.stderr


def test_a_note_of_another_destination_does_not_count(tmp_path, monkeypatch, capfd):
    """Offline is not online, nor one project the other."""
    run = _run(tmp_path / "r")
    assert replay_main([str(tmp_path)]) == 0
    monkeypatch.setenv("WANDB_PROJECT", "other")
    assert mirrors.noted(run.path) == {"sha256": None, "folders": []}
    (run.path / mirrors.NOTE).write_text("{")  # damaged: as if there were none
    monkeypatch.delenv("WANDB_PROJECT")
    assert mirrors.noted(run.path)["sha256"] is None
    assert json.loads((run.path / "record.json").read_text())["status"] == "done"
