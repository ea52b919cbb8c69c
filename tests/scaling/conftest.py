"""Shared data of the scaling tests: the Chinchilla points (skipped where they are absent) and a folder of simulated runs."""
from __future__ import annotations

from pathlib import Path

import pytest

from tests.scaling import fake_runs

EPOCH = Path(__file__).resolve().parents[3] / "shared" / "data" / "epoch-chinchilla" / "svg_extracted_data.csv"
QUARTET2 = EPOCH.parents[1] / "quartet2-runs" / "runs.csv"
EPOCH_COLUMNS = {"N": '"Model Size"', "D": '"Training FLOP"/6/"Model Size"'}
SHARED = Path(__file__).resolve().parents[3] / "shared"
DROP_FIVE = "row_number() OVER (ORDER BY loss DESC) > 5"


@pytest.fixture(scope="session")
def epoch():
    """Keyword arguments of `scaling.fit` for the published refit: 245 points without the five largest losses."""
    if not EPOCH.is_file():
        pytest.skip("the Chinchilla points of ../shared/data/epoch-chinchilla are not here")
    return {"table": EPOCH, "columns": EPOCH_COLUMNS, "where": DROP_FIVE}


def shared(name: str) -> Path:
    """A file of ../shared, skipped where it is absent."""
    path = SHARED / name
    if not path.is_file():
        pytest.skip(f"../shared/{name} is not here")
    return path


@pytest.fixture(scope="session")
def quartet2():
    """Path of the table of Quartet II's runs."""
    if not QUARTET2.is_file():
        pytest.skip("the runs of ../shared/data/quartet2-runs are not here")
    return QUARTET2


@pytest.fixture(scope="session")
def demo_runs(tmp_path_factory):
    """A run folder of the demo's design with known truth; one run diverged, one failed."""
    return fake_runs.write_runs(tmp_path_factory.mktemp("runs") / "demo", diverge=(0,), fail=(5,))
