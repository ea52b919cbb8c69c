"""Launchers: that stop early, that find too little memory, and that work on one sweep at once."""
from __future__ import annotations

import pytest

from tests.trainer import conftest
from tests.trainer.test_kill import _finish, _start
from tests.trainer.tiny import TINY, folders, launch, results
from trainer import cohort, lease
from trainer.cli import sweep_configs
from trainer.status import status
from trainer.stopping import Stop
from trainer.sweep import execute, make_plan, planfile

SWEEP = ["steps=10,20", "seed=0,1", "checkpoint.every_steps=1000"]


class Soon(Stop):
    """Says stop from the n-th question on."""

    def __init__(self, questions: int):
        super().__init__()
        self.left = questions

    @property
    def reason(self):
        self.left -= 1
        return None if self.left >= 0 else "max_wall=1s"


def _plan(runs_dir, *overrides, **how):
    return make_plan(sweep_configs([*TINY, f"runs_dir={runs_dir}", *overrides])[0], **how)


def test_a_launch_that_is_out_of_time_saves_all_and_goes_on(tmp_path, shared_programs):
    """In slices of a few dispatches: the bits of a launch that was not interrupted; nothing is trained twice."""
    _, whole = launch(tmp_path / "whole", *SWEEP)
    tokens, slices = 0, 0
    while status(tmp_path / "slices").not_done if slices else True:
        outcome = execute(_plan(tmp_path / "slices", *SWEEP), quiet=True, stop=Soon(4))
        tokens, slices = tokens + outcome.tokens, slices + 1
        assert outcome.stopped and slices < 9
    assert slices > 2 and tokens == whole.tokens
    assert results(tmp_path / "slices") == results(tmp_path / "whole")


def test_folders_of_two_machines_come_together(tmp_path, shared_programs):
    """Each trained half; one's run folders copied beside the other's are the whole sweep."""
    import shutil

    for seed in (0, 1):
        launch(tmp_path / f"machine{seed}", "steps=10,20", f"seed={seed}")
    for folder in folders(tmp_path / "machine1").values():
        shutil.copytree(folder.path, tmp_path / "machine0" / "adhoc" / folder.path.name)
    plan, outcome = launch(tmp_path / "machine0", *SWEEP)
    assert plan.num_done == 4 and outcome.tokens == 0


@pytest.mark.slow
def test_a_cohort_that_does_not_fit_is_split(tmp_path, monkeypatch):
    """By what the compiled program takes, not by a guess; and by an allocation that fails. A run that does not fit alone is a failure."""
    monkeypatch.setattr(conftest.plan, "choose_layout", lambda *_: cohort.Layout(1, 1, "map"))
    monkeypatch.setattr(cohort, "device_memory", lambda: None)
    wanted = []
    check = cohort.Program._check_memory
    monkeypatch.setattr(cohort.Program, "_check_memory", lambda self, size: (wanted.append(size), check(self, size)))
    launch(tmp_path / "two", "seed=0,1", "steps=5")
    launch(tmp_path / "four", "seed=range(4)", "steps=5")
    two, four = max(wanted[: len(wanted) // 2]), max(wanted[len(wanted) // 2:])
    assert two < four
    monkeypatch.setattr(cohort, "device_memory", lambda: (two + four) // 2)
    plan, outcome = launch(tmp_path / "little", "seed=range(4)", "steps=5")
    assert not outcome.failed and len(outcome.records) == 4
    assert [len(c.slots) for c in planfile.read(plan.root)[1]] == [2, 2]
    monkeypatch.setattr(cohort, "device_memory", lambda: 10)
    _, outcome = launch(tmp_path / "none", "seed=0,1", "steps=5")
    assert len(outcome.failed) == 2 and "GiB are wanted" in (next(iter(folders(tmp_path / "none").values())).path / "error.txt").read_text()


def test_a_composition_is_kept(tmp_path, shared_programs):
    """Asked for part of a sweep, or for more: what was settled stays as it is."""
    launch(tmp_path, "seed=range(4)", "steps=5")
    (first,) = planfile.read(tmp_path / "adhoc")[1]
    for folder in list(folders(tmp_path).values())[:2]:
        (folder.path / "record.json").unlink()
    plan = _plan(tmp_path, "seed=range(6)", "steps=5")
    assert [c.composition for c in plan.cohorts if c.composition == first] == [first]
    assert sorted(len(c.runs) for c in plan.cohorts) == [2, 2]
    known = next(c for c in plan.cohorts if c.composition == first)
    assert all(first.slots[known.slot(run)] == run.run_id for run in known.runs)


def test_a_lost_lease_ends_training_without_a_word_in_the_folder(tmp_path, shared_programs, monkeypatch):
    """Another launcher took the runs over: nothing more is written, and nothing is recorded as failed."""
    monkeypatch.setattr(lease.Lease, "lost", True, raising=False)
    monkeypatch.setattr(lease.Lease, "__init__", lambda self, path, token: self.__dict__.update(path=path, _token=token, lost=True))
    plan, outcome = launch(tmp_path, "steps=10")
    assert not outcome.failed and not outcome.records
    assert plan.runs[0].folder.record() is None and not plan.runs[0].folder.checkpoints.exists()


@pytest.mark.slow
def test_two_launchers_share_a_sweep(tmp_path, environment):
    """Five cohorts, two processes, begun together: each cohort is trained once, by one of them, and both end when all is done."""
    sweep = ["steps=60", "seed=0,1", "eval.sequences=8,7,6,5,4", "host_devices=1"]
    both = [_start("sweep", sweep, tmp_path / "shared", environment) for _ in range(2)]
    said = [_finish(process) for process in both]
    begun = [line for text in said for line in text.splitlines() if "runs (" in line and line.endswith("done")]
    assert len(begun) == 5, said
    _finish(_start("sweep", sweep, tmp_path / "alone", environment))
    assert results(tmp_path / "shared") == results(tmp_path / "alone")
