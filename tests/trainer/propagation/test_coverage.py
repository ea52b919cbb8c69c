"""Every rule has a case that goes through the transform from user code."""
from __future__ import annotations

import jax
from jax import lax

from tests.trainer.propagation import test_collective, test_elementwise, test_moving, test_reducing, test_selecting, test_transcendental
from tests.trainer.propagation.harness import claimed
from trainer.propagation.rules import RULES

TABLES = (test_elementwise.TABLE, test_transcendental.TABLE, test_selecting.TABLE, test_reducing.TABLE, test_moving.TABLE)
# Primitives that this jax does not have.
ABSENT = {name for name in ("one_minus_square", "log2") if not hasattr(lax, f"{name}_p")}


def test_every_rule_has_a_case():
    covered = set().union(*map(claimed, TABLES)) | test_collective.covered()
    assert set(RULES) - covered - ABSENT == set()
    assert ABSENT <= set(RULES)
    assert not ABSENT or jax.__version_info__ < (0, 12)
