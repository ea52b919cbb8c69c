"""Sweeps through run folders: branches of a trunk, divergence, failure, interruption, and that a run is the same in all of them."""
from __future__ import annotations

import importlib
import json

import pytest

from tests.trainer.tiny import TINY, close, folders, launch, results
from trainer import cohort, loop
from trainer.cli import sweep_configs
from trainer.member import Member
from trainer.records import RECORD_COLUMNS
from trainer.status import status
from trainer.sweep import make_plan

plan_module = importlib.import_module("trainer.sweep.plan")
pytestmark = pytest.mark.usefixtures("shared_programs")
BRANCHES = ["steps=10,20", "seed=0,1"]  # cool-downs of 2 and 4: a branch leaves its trunk after 8 steps


@pytest.mark.slow
def test_branches_are_what_they_are_alone(tmp_path, one_device):
    """Runs that share a trunk compute it once; each is, to the bit, the run trained alone in that layout: record, log, state."""
    plan, outcome = launch(tmp_path / "together", *BRANCHES)
    assert len(plan.runs) == 4 and len(plan.cohorts) == 1 and not outcome.failed
    assert outcome.tokens == 2 * (20 + 2) * 32 and plan.cohorts[0].updates() == 0  # checkpoints hold them all now
    for steps in (10, 20):
        for seed in (0, 1):
            _, alone = launch(tmp_path / "alone", f"steps={steps}", f"seed={seed}")
            assert alone.tokens == steps * 32
    together, alone = results(tmp_path / "together"), results(tmp_path / "alone")
    assert together == alone
    assert len({record["trunk_id"] for record, _, _ in together.values()}) == 2
    assert len({record["loss"] for record, _, _ in together.values()}) == 4


@pytest.mark.slow
def test_default_layouts_agree(tmp_path, one_device, monkeypatch):
    """Four runs on four devices and one batch on four devices give, to rounding, what one device gives."""
    launch(tmp_path / "one", "steps=10,20", "seed=0,1", "precision.bits=32")
    monkeypatch.undo()
    launch(tmp_path / "four", "steps=10,20", "seed=0,1", "precision.bits=32")
    assert {f.record()["layout"] for f in folders(tmp_path / "four").values()} == {"map/4x1"}
    assert close(tmp_path / "one", tmp_path / "four") < 2e-6


def test_a_finished_sweep_trains_nothing(tmp_path, one_device):
    """The same command again plans no work and touches no file; a longer one trains what is new."""
    launch(tmp_path, *BRANCHES)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file() and path.name != "plan.json"}
    plan, outcome = launch(tmp_path, *BRANCHES)
    assert plan.num_done == 4 and plan.cohorts == () and outcome.records == [] and outcome.tokens == outcome.compiles == 0
    assert before == {path: path.stat().st_mtime_ns for path in before}
    plan, outcome = launch(tmp_path, "steps=10", "seed=0,1,2")
    assert plan.num_done == 2 and [record["seed"] for record in outcome.records] == [2]


def test_the_record_says_what_was_run(tmp_path, one_device):
    """Columns that follow from the config by hand, all of the run table's columns, and a log that fits."""
    launch(tmp_path, "steps=10", "eval.every_steps=4", "log_every=3", "precision.bits=5", "optimizer.lr=0.01")
    (folder,) = folders(tmp_path).values()
    record = folder.record()
    assert list(record) == list(RECORD_COLUMNS)
    expected = {
        "status": "done", "seed": 0, "cooldown_steps": 2, "n_params": 4 * 64 + 3 * 8 * 12 + 16 + 8, "n_params_total": 568 + 88, "tokens": 320,
        "flops": 320 * (6 * (4 * 64 + 3 * 8 * 12 + 11 * 8) + 12 * 8 * 8), "precision": "int5", "weights_format": "int5", "weights_bits": 5.0,
        "weights_granularity": "channel", "activations_granularity": "token", "weights_rounding": "stochastic", "activations_rounding": "nearest_even",
        "output_gradients_format": "float32", "output_gradients_bits": 32.0, "quantized_fraction": 544 / (544 + 88), "execution": "emulated",
        "layout": "solo/1", "lr": 0.01, "lr_rule": "mup", "batch_tokens": 32, "steps": 10, "schedule": "wsd", "data": "synthetic", "diverged_step": None,
    }  # fmt: skip
    assert {name: record[name] for name in expected} == expected
    assert 0 < record["loss_std_err"] < 0.2 and record["loss"] < 2.6 and record["wall_s"] > 0
    assert record["bits_per_byte"] == pytest.approx(record["loss"] / 0.6931472)
    rows = folder.metrics()
    assert [row["step"] for row in rows if "loss" in row] == [1, 3, 6, 9, 10]
    assert [row["step"] for row in rows if "val_loss" in row] == [4, 8, 10]
    assert rows[-1]["val_loss"] == record["loss"] and all(row["tokens"] == 32 * row["step"] for row in rows)
    assert json.loads((folder.path / "config.json").read_text())["config"]["optimizer"]["lr"] == 0.01


def test_divergence_is_recorded_and_shared_by_branches(tmp_path, one_device):
    """A trunk that blows up takes its branches with it, each with a record that says so; the others are as without it."""
    _, outcome = launch(tmp_path / "wild", "steps=10,20", "optimizer.lr=0.016,1e3", "divergence_margin=0.1")
    assert not outcome.failed
    wild = [folder for folder in folders(tmp_path / "wild").values() if folder.record()["lr"] == 1e3]
    assert len(wild) == 2 and len({folder.record()["trunk_id"] for folder in wild}) == 1
    (diverged,) = {folder.record()["diverged_step"] for folder in wild}
    assert 0 < diverged < 8
    for folder in wild:
        record, last = folder.record(), folder.metrics()[-1]
        assert (record["status"], record["loss"], record["steps"]) == ("diverged", None, diverged)
        assert last["diverged"] is True and last["step"] == diverged
    assert status(tmp_path / "wild").counts["diverged"] == 2 and not status(tmp_path / "wild").not_done
    for steps in (10, 20):
        launch(tmp_path / "calm", f"steps={steps}", "divergence_margin=0.1")
    calm = results(tmp_path / "calm")
    assert len(calm) == 2 and {name: results_of for name, results_of in results(tmp_path / "wild").items() if name in calm} == calm


def test_a_failure_is_recorded_and_the_sweep_goes_on(tmp_path, one_device, monkeypatch):
    """Two cohorts, of which the first cannot draw its second batches: its runs are recorded as failed and the other's are done. On
    request the failed ones are tried again, from their checkpoints."""
    draw, calls = loop.batches, []

    def batches(*args):
        calls.append(args)
        if len(calls) == 3:
            raise RuntimeError("the disk is gone")
        return draw(*args)

    monkeypatch.setattr(loop, "batches", batches)
    sweep = [*BRANCHES, "eval.sequences=8,4", "checkpoint.every_steps=5"]  # another evaluation is another cohort
    plan, outcome = launch(tmp_path / "failing", *sweep)
    failed = {run_id: folder for run_id, folder in folders(tmp_path / "failing").items() if folder.record()["status"] == "failed"}
    assert set(outcome.failed) == failed.keys() == {run.run_id for run in plan.cohorts[0].runs} and len(failed) == 4
    assert all("the disk is gone" in (folder.path / "error.txt").read_text() for folder in failed.values())
    assert status(tmp_path / "failing").counts == {"done": 4, "diverged": 0, "running": 0, "stopped": 0, "failed": 4, "missing": 0}
    plan, outcome = launch(tmp_path / "failing", *sweep)
    assert not outcome.records and {run.run_id for run in plan.failed} == failed.keys() and plan.num_done == 4
    _, outcome = launch(tmp_path / "failing", *sweep, retry_failed=True)
    assert not outcome.failed and {record["run_id"] for record in outcome.records} == failed.keys() and outcome.tokens == 2 * (15 + 2) * 32
    assert not list(tmp_path.rglob("error.txt"))
    launch(tmp_path / "whole", *sweep)
    assert results(tmp_path / "failing") == results(tmp_path / "whole")


@pytest.mark.parametrize("devices, after", [pytest.param(8, 5, marks=pytest.mark.slow), pytest.param(2, 4, marks=pytest.mark.slow)])
def test_an_interrupted_sweep_resumes_to_the_same_table(tmp_path, monkeypatch, devices, after):
    """Stopped after some of its six runs were finished, then run again with the same command: each run is, to the bit, what it is in
    a sweep that was not stopped, although fewer runs are left for the devices."""
    monkeypatch.setattr(plan_module, "choose_layout", lambda *args: cohort.choose_layout(*args, num_devices=devices))
    sweep = ["steps=10,20,30", "seed=0,1", "checkpoint.every_steps=3"]
    launch(tmp_path / "whole", *sweep)
    finish, finished = Member.finish, []

    def interrupted(self, *args):
        if len(finished) == after:
            raise KeyboardInterrupt
        finished.append(self)
        return finish(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Member, "finish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            launch(tmp_path / "stopped", *sweep)
    assert status(tmp_path / "stopped").counts["done"] == after
    launch(tmp_path / "stopped", *sweep)
    assert results(tmp_path / "stopped") == results(tmp_path / "whole")


def test_plans(tmp_path):
    """Equal runs count once; runs of one structure share a cohort, up to its size, with trunks kept together."""
    configs, _ = sweep_configs([*TINY, f"runs_dir={tmp_path}", "precision.bits=3,4,4", "seed=0,1", "steps=10,20", "model.d_ff=12,16"])
    plan = make_plan(configs, max_members=5)
    assert len(configs) == 24 and len(plan.runs) == 16
    assert [len(group.runs) for group in plan.cohorts] == [4, 4, 4, 4]
    for group in plan.cohorts:
        assert len({run.structure for run in group.runs}) == 1 and len({run.trunk_id for run in group.runs}) == 2
    assert [group.flops() for group in plan.cohorts] == sorted(group.flops() for group in plan.cohorts)
