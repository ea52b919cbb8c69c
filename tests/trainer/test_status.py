"""`bitlaw status`: every state is told apart, cheaply, once or until nothing moves."""

import io
import json
import os
import re

import pytest
from rich.console import Console

from trainer import lease
from trainer import status as module
from trainer.records import NewerVersionError, RunFolder
from trainer.status import STATES, status, status_main


def _record(**more):
    return {"run_id": "r", "status": "done"} | more


@pytest.fixture
def sweep(tmp_path):
    """One run in each state, as files on disk."""
    folder = tmp_path / "sweep"
    for run_id in ("aaa", "bbb"):
        RunFolder(folder / run_id).finish(_record(run_id=run_id))
    RunFolder(folder / "div").finish(_record(run_id="div", status="diverged", diverged_step=40))
    RunFolder(folder / "bad").finish(_record(run_id="bad", status="failed"))
    for run_id in ("begun", "killed"):
        RunFolder(folder / run_id).write_config({})
        RunFolder(folder / run_id).append_metrics([{"step": 7}])
    torn = RunFolder(folder / "torn")
    torn.write_config({})
    (torn.path / "record.json").write_text("{")
    planned = ["aaa", "bbb", "div", "bad", "begun", "killed", "torn", "never"]
    (folder / "plan.json").write_text(json.dumps({"sweep": "s", "run_ids": planned}))
    return folder


def test_each_state_is_told_apart(sweep, capsys):
    with lease.held([RunFolder(sweep / "begun").lease]):
        result = status(sweep)
        assert {run.run_id: run.state for run in result.runs} == {
            "aaa": "done", "bbb": "done", "div": "diverged", "bad": "failed", "begun": "running", "killed": "stopped",
            "torn": "failed", "never": "missing",
        }  # fmt: skip
        assert result.counts == {"done": 2, "diverged": 1, "running": 1, "stopped": 1, "failed": 2, "missing": 1}
        assert status(sweep.parent).counts == result.counts
        assert status_main([str(sweep)]) == 1
    shown = capsys.readouterr().out
    for state, count in result.counts.items():
        assert re.search(rf"^{state} +{count}$", shown, re.MULTILINE)
    for line in ("diverged div  at step 40", "stopped  killed  step 7", "missing  never", f"process {os.getpid()}"):
        assert line in shown
    assert "aaa" not in shown


def test_diverged_is_done_and_nothing_is_not(tmp_path, sweep):
    for run_id in ("bad", "begun", "killed", "torn", "never"):
        RunFolder(sweep / run_id).finish(_record(run_id=run_id, status="diverged", diverged_step=1))
    assert status_main([str(sweep)]) == 0
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match="nothing holds no runs: .*accepted: a run folder"):
        status_main([str(tmp_path / "nothing")])
    assert status(sweep / "aaa").counts["done"] == 1  # a run folder itself


def test_a_planned_sweep_that_never_began_is_missing(tmp_path):
    (tmp_path / "plan.json").write_text(json.dumps({"run_ids": ["x", "y"]}))
    assert status(tmp_path).counts["missing"] == 2
    assert tuple(status(tmp_path).counts) == STATES


@pytest.mark.parametrize("argv", [["no/such/folder"], [], ["a", "b"], ["--help-me"], ["--watch"], ["a", "--watch", "b"]])
def test_status_refuses_in_one_line(argv, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="bitlaw status") as caught:
        status_main(argv)
    assert "\n" not in str(caught.value)


def test_a_broken_plan_is_named(tmp_path):
    (tmp_path / "plan.json").write_text('{"runs": []}')
    with pytest.raises(ValueError, match="plan.json is not a plan.*run_ids"):
        status(tmp_path)


def test_a_running_run_says_how_far_it_is(tmp_path):
    run = RunFolder(tmp_path / "r")
    run.write_config({"run_id": "r", "config": {"steps": 500}})
    run.append_metrics([{"step": 6, "loss": 3.0}, {"step": 7, "loss": 3.25}])
    with lease.held([run.lease]):
        (found,) = status(tmp_path).runs
    assert found.note.startswith(f"step 7 of 500, loss 3.25, process {os.getpid()} on ")


def test_copies_of_a_run_are_one_run_that_is_as_far_as_the_furthest(tmp_path):
    """A sweep that was made on several machines: ids are those of the records, however the folders are called."""
    for place, state in (("a", "failed"), ("b", "done"), ("c", "failed")):
        RunFolder(tmp_path / place / "r").finish(_record(status=state))
    RunFolder(tmp_path / "r (copy)").finish(_record(status="failed"))
    RunFolder(tmp_path / "d" / "r").write_config({"run_id": "r"})
    (tmp_path / "plan.json").write_text('{"run_ids": ["r"]}')
    (found,) = status(tmp_path).runs
    assert (found.run_id, found.state, found.folder) == ("r", "done", tmp_path / "b" / "r")


def test_a_newer_record_stops_it(sweep):
    """What it says is not known: no count would be true."""
    (sweep / "aaa" / "record.json").write_text('{"record_version": 9, "status": "done"}')
    with pytest.raises(NewerVersionError, match="record_version 9"):
        status(sweep)


def test_whole_metrics_are_not_read(sweep, monkeypatch):
    monkeypatch.setattr(RunFolder, "metrics", lambda self: pytest.fail("status read a whole metrics file"))
    assert next(run for run in status(sweep).runs if run.run_id == "killed").note == "step 7"


# --- watching -----------------------------------------------------------------------------------------------------


def _watched(sweep, monkeypatch, changes, terminal):
    """Exit code and output of a watch during which, instead of time passing, each of `changes` is called once."""
    left = iter(changes)
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=100, height=40, highlight=False)
    monkeypatch.setattr(module, "Console", lambda **_: console)
    monkeypatch.setattr(module.time, "sleep", lambda seconds: next(left)())
    code = status_main([str(sweep), "--watch"])
    assert next(left, None) is None, "it ended before everything had happened"
    return code, out.getvalue()


def _finish(sweep, *run_ids):
    for run_id in run_ids:
        RunFolder(sweep / run_id).finish(_record(run_id=run_id))


@pytest.mark.parametrize("terminal", [True, False])
def test_a_watch_ends_when_nothing_runs_and_nothing_is_missing(sweep, monkeypatch, terminal):
    claim = lease.held([RunFolder(sweep / "begun").lease])

    def begun_ends():
        claim.__exit__(None, None, None)
        _finish(sweep, "begun")

    with monkeypatch.context() as patch:
        claim.__enter__()
        code, out = _watched(sweep, patch, [lambda: None, begun_ends, lambda: _finish(sweep, "never")], terminal)
    assert code == 1  # failed, torn and stopped runs are left, and nothing that moves
    if terminal:
        assert f"begun  step 7, process {os.getpid()}" in out and "  failed   torn" in out
    else:
        lines = [line.split(maxsplit=1)[1] for line in out.splitlines()]
        assert lines == ["2 done, 1 diverged, 1 running, 1 stopped, 2 failed, 1 missing", "3 done, 1 diverged, 1 stopped, 2 failed, 1 missing",
                         "4 done, 1 diverged, 1 stopped, 2 failed"]  # fmt: skip
        _finish(sweep, "killed", "bad", "torn")
        assert _watched(sweep, monkeypatch, [], terminal)[0] == 0


def test_a_watch_reads_each_record_once(sweep, monkeypatch):
    read = []
    record = RunFolder.record
    monkeypatch.setattr(RunFolder, "record", lambda self: read.append(self.path.name) or record(self))
    _watched(sweep, monkeypatch, [lambda: None, lambda: _finish(sweep, "bad"), lambda: _finish(sweep, "never")], False)
    assert {name: read.count(name) for name in ("aaa", "div", "bad", "never")} == {"aaa": 1, "div": 1, "bad": 2, "never": 1}


def test_control_c_leaves_quietly(sweep, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    code, out = _watched(sweep, monkeypatch, [lambda: None, interrupt], True)
    assert code == 1 and "missing  never" in out.splitlines()[-1] and "Traceback" not in out
