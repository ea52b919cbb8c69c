"""Folders that are not what they should be: each one clear line on stderr, exit code 2, and nothing half-written."""
from __future__ import annotations

import importlib
import json
import shutil

import pytest

import bitlaw
from tests.trainer.tiny import TINY, folders, shared_program
from trainer import lease

TRAIN = ["train", *TINY, "steps=3", "checkpoint.every_steps=3"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("BITLAW_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(importlib.import_module("trainer.sweep.execute"), "Program", shared_program)


def _one_line(capfd, arguments, *expected):
    capfd.readouterr()
    assert bitlaw.main(arguments) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("bitlaw: ") and err.count("\n") == 1, err
    assert [text for text in expected if text not in err] == [], err


READERS = {"status": ["status", "DIR"], "watch": ["status", "DIR", "--watch"], "table": ["table", "DIR", "--out", "t.csv"], "fit": ["fit", "DIR", "--law", "chinchilla"],
           "report": ["report", "DIR", "--out", "r.html"], "wandb-sync": ["wandb-sync", "DIR"]}  # fmt: skip


@pytest.mark.parametrize("verb", READERS)
@pytest.mark.parametrize("name, content, expected", [
    ("notes.txt", "no run", ["DIR"]), ("r/record.json", '{"record_version": 7, "status": "done"}', ["record.json", "record_version 7", "up to 1", "newer"]),
])  # fmt: skip
def test_readers_refuse_what_is_no_run_and_what_is_newer(verb, name, content, expected, tmp_path, capfd):
    folder = tmp_path / "my folder ü"
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_text(content)
    _one_line(capfd, [word.replace("DIR", str(folder)) for word in READERS[verb]], *(text.replace("DIR", str(folder)) for text in expected))
    assert list((tmp_path / "here").iterdir()) == [] and [path.name for path in folder.rglob("*") if path.is_file()] == [name.split("/")[-1]]


def test_training_refuses_a_record_of_a_newer_version(capfd):
    assert bitlaw.main(TRAIN) == 0
    (run,) = folders("runs").values()
    (run.path / "record.json").write_text('{"record_version": 7, "status": "done"}')
    _one_line(capfd, TRAIN, str(run.path / "record.json"), "record_version 7")
    assert json.loads((run.path / "record.json").read_text())["record_version"] == 7


def _last_line(capfd, arguments, *expected):
    """As _one_line, after what the sweep's progress says on stderr."""
    capfd.readouterr()
    assert bitlaw.main(arguments) == 2
    lines = capfd.readouterr().err.splitlines()
    assert lines[-1].startswith("bitlaw: ") and sum(line.startswith("bitlaw: ") for line in lines) == 1
    assert [text for text in expected if text not in lines[-1]] == [], lines[-1]


@pytest.mark.slow
def test_a_checkpoint_of_another_model(capfd):
    """The user's to mend, and no failure of the run: nothing is recorded."""
    assert bitlaw.main(TRAIN) == 0 and bitlaw.main([*TRAIN, "runs_dir=wide", "model.d_model=16"]) == 0
    (mine,), (wide,) = folders("runs").values(), folders("wide").values()
    (mine.path / "record.json").unlink()
    shutil.rmtree(mine.checkpoints)
    shutil.copytree(wide.checkpoints, mine.checkpoints)
    _last_line(capfd, TRAIN, str(mine.checkpoints), "embedding float32[11,16]", "float32[11,8]")
    assert mine.record() is None and not (mine.path / "error.txt").exists() and mine.holder() is None
    assert bitlaw.main(["status", "runs"]) == 1
    _last_line(capfd, [*TRAIN, "seed=9", f"init_from={wide.path}"], "init_from=", "embedding float32[11, 16]", "[11, 8]")
    assert len(folders("runs")) == 1  # none was begun


def test_unicode_and_spaces_in_paths(capfd, tmp_path):
    place = tmp_path / "my runs" / "größe [1] ✓ 'a'"
    place.mkdir(parents=True)
    quoted = str(place).replace("'", "\\'")
    assert bitlaw.main([*TRAIN, f"runs_dir='{quoted}'"]) == 0
    (run,) = folders(place).values()
    table = place / "t ü.parquet"
    for arguments in (["status", str(place)], ["table", str(place), "--out", str(table)]):
        assert bitlaw.main(arguments) == 0, capfd.readouterr().err
    assert bitlaw._part("scaling").table(table).select("run_id").fetchall() == [(run.path.name,)]
    assert len(bitlaw._part("scaling").curves(place)) == 4


def test_folders_that_cannot_be_written(capfd, monkeypatch, tmp_path):
    """As on a read-only file system, in which root writes nothing either: /proc, and files in the place of folders."""
    (tmp_path / "here" / "file").write_text("")
    for arguments in ([*TRAIN, "runs_dir=file"], [*TRAIN, "runs_dir=/proc"], [*TRAIN, "runs_dir=file/below"]):
        _one_line(capfd, arguments, arguments[-1].removeprefix("runs_dir="), "cannot be ")
    assert bitlaw.main(TRAIN) == 0
    for out in ("/proc/t.csv", "/proc/t.parquet"):
        _one_line(capfd, ["table", "runs", "--out", out], f"out={out}", "cannot be written")

    def refuse(*_):
        raise PermissionError(30, "Read-only file system", "runs/train/r/alive.json")

    with monkeypatch.context() as patch:
        patch.setattr(lease, "take", refuse)
        _one_line(capfd, [*TRAIN, "seed=3"], "runs", "Read-only file system")


def test_a_full_disk_is_no_bad_input(capfd, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(importlib.import_module("trainer.status"), "status", full)
    assert bitlaw.main(["status", "."]) == 1
    assert capfd.readouterr().err == "bitlaw: a file cannot be read or written (No space left on device)\n"


def test_a_damaged_record_does_not_break_the_table_of_the_others(capfd):
    assert bitlaw.main(TRAIN) == 0 and bitlaw.main([*TRAIN, "seed=1"]) == 0
    first, second = folders("runs").values()
    whole = (first.path / "record.json").read_bytes()
    (first.path / "record.json").write_bytes(whole[: len(whole) // 2])
    capfd.readouterr()
    assert bitlaw.main(["table", "runs", "--out", "t.csv"]) == 0
    out, err = capfd.readouterr()
    assert "1 runs (1 done)" in out and err.count("\n") == 1 and f"{first.path / 'record.json'} is left out" in err
    (second.path / "record.json").unlink()
    assert bitlaw.main(["table", "runs", "--out", "u.csv"]) == 2
    assert "no run below it is over" in capfd.readouterr().err
