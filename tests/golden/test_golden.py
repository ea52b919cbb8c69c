"""Golden runs: numbers do not change unless NUMERICS_VERSION says so."""
from __future__ import annotations

import jax
import pytest

from tests.golden import runs
from trainer.config import NUMERICS_VERSION

assert jax.device_count() == 8  # their layout


VERSION, LOSSES = runs.recorded()


def test_the_record_is_of_this_version():
    assert VERSION == NUMERICS_VERSION, "NUMERICS_VERSION was raised: run `python -m tests.golden.runs --write`"


@pytest.fixture
def losses():
    if LOSSES is None:
        pytest.skip(f"no golden runs are recorded for jax {jax.__version__}: `python -m tests.golden.runs --write` records them")
    return LOSSES


# What the default run trains; CI trains all of them.
DEFAULT = ("float32", "int4", "fp8", "stochastic")


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in DEFAULT else pytest.mark.slow) for name in runs.RUNS])
def test_loss_has_not_moved(name, losses, tmp_path, monkeypatch):
    """Trained again, each run ends at its recorded loss."""
    monkeypatch.setenv("BITLAW_CACHE", str(tmp_path))
    assert runs.moved(name, runs.loss(name), losses[name]) is None


def test_a_change_is_seen(losses):
    """Runs differ from each other by far more than the tolerance, and a move beyond it says what to do."""
    values = sorted(losses.values())
    assert all(other - one > 1e-4 for one, other in zip(values, values[1:]))
    assert runs.moved("int4", losses["int4"] * (1 + 5e-7), losses["int4"]) is None
    assert "NUMERICS_VERSION" in runs.moved("int4", losses["int4"] * (1 + 2e-6), losses["int4"])


def test_a_moved_loss_is_not_recorded_under_the_same_version(losses, tmp_path, monkeypatch):
    """The command that records refuses numbers that changed while NUMERICS_VERSION did not, and takes them once it was raised."""
    monkeypatch.setattr(runs, "PATH", tmp_path / "losses.json")
    runs.write(losses)
    runs.write(losses)
    other = {name: value + 1.0 for name, value in losses.items()}
    with pytest.raises(SystemExit, match="raise NUMERICS_VERSION"):
        runs.write(other)
    assert runs.recorded() == (VERSION, losses)
    monkeypatch.setattr(runs, "NUMERICS_VERSION", NUMERICS_VERSION + 1)
    runs.write(other)
    assert runs.recorded() == (NUMERICS_VERSION + 1, other)
