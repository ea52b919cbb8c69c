"""A Slurm of this machine for the tests here; without its packages, or without --slow, they are skipped."""
from __future__ import annotations

import pytest

from tests.cluster.slurm import Slurm, missing


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = missing()
    for item in items:
        if "cluster" in item.nodeid.split("::")[0].split("/"):
            item.add_marker(pytest.mark.slow)
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    cluster = Slurm(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
