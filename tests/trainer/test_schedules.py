"""Schedules at chosen steps by hand, and what branches rest on: a stable phase that knows nothing of its end."""
from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer import schedules


def _numbers(total, warmup, cooldown, final):
    return schedules.ScheduleNumbers(np.int32(total), np.int32(warmup), np.int32(cooldown), np.float32(final))


BY_HAND = [
    # name, (total, warm-up, cool-down, final factor), {step: factor}
    ("constant", (100, 4, 0, 0.0), {0: 0.25, 1: 0.5, 3: 1.0, 4: 1.0, 99: 1.0}),
    ("constant", (100, 0, 0, 0.0), {0: 1.0, 99: 1.0}),
    # half a cosine over the 80 steps after the warm-up: a quarter of it in is (1 + cos(pi / 4)) / 2
    ("cosine", (100, 20, 0, 0.0), {0: 0.05, 19: 1.0, 20: 1.0, 40: 0.5 + 0.5 * 0.5**0.5, 60: 0.5, 100: 0.0}),
    ("cosine", (100, 20, 0, 0.1), {20: 1.0, 60: 0.55, 100: 0.1}),
    # 1 - sqrt(progress) over the last 16 steps
    ("wsd", (100, 10, 16, 0.0), {0: 0.1, 9: 1.0, 50: 1.0, 84: 1.0, 85: 0.75, 88: 0.5, 93: 0.25, 100: 0.0}),
    ("wsd", (100, 10, 16, 0.2), {50: 1.0, 88: 0.6, 100: 0.2}),
    ("wsd", (10, 0, 0, 0.0), {0: 1.0, 9: 1.0}),
]


@pytest.mark.parametrize("name, numbers, expected", BY_HAND)
def test_factors_by_hand(name, numbers, expected):
    schedule = jax.jit(schedules.SCHEDULES[name])
    for step, factor in expected.items():
        assert float(schedule(np.int32(step), _numbers(*numbers))) == pytest.approx(factor, abs=2e-6), step


@settings(max_examples=200, deadline=None)
@given(st.floats(0, 1, width=32), st.integers(1, 500), st.integers(0, 200))
def test_stable_phase_is_one_to_the_bit(final, cooldown, before):
    """Until the cool-down starts the factor is exactly 1 whatever follows: siblings of one trunk are the same run until then."""
    total = before + cooldown
    assert np.asarray(_wsd(np.int32(before), _numbers(total, 0, cooldown, final))) == np.float32(1.0)


_wsd = jax.jit(schedules.wsd)
