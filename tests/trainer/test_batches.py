"""Batches: the pure function of (seed, step) that they claim to be, each window once an epoch, in a well mixed order."""

import math
import time

import numpy as np
import pytest

from trainer import data as td
from trainer.data.cli import DataRequest


@pytest.mark.parametrize("num_tokens, batch_size, seq_len", [(1001, 4, 10), (1009, 7, 10), (130, 3, 64), (65, 2, 64), (5003, 16, 1)])
def test_an_epoch_shows_every_window_once(num_tokens, batch_size, seq_len):
    tokens = np.arange(num_tokens, dtype=np.uint16)
    count = (num_tokens - 1) // seq_len
    steps = -(-3 * count // batch_size)
    rows = np.concatenate([td.batch(tokens, 5, step, batch_size, seq_len) for step in range(steps)])
    assert rows.dtype == np.int32 and rows.shape == (steps * batch_size, seq_len + 1)
    np.testing.assert_array_equal(rows, rows[:, :1] + np.arange(seq_len + 1))
    assert set(rows[:, 0] % seq_len) == {0}
    orders = [tuple(rows[epoch * count : (epoch + 1) * count, 0] // seq_len) for epoch in range(3)]
    for order in orders:
        assert sorted(order) == list(range(count))
    if count > 50:
        assert len(set(orders)) == 3


def test_batches_of_several_steps_are_the_single_ones():
    tokens = np.random.default_rng(0).integers(0, 60_000, 2000).astype(np.uint16)
    steps = np.array([40, 3, 0, 41, 1000, 7])
    together = td.batches(tokens, 9, steps, 8, 16)
    assert together.dtype == np.int32
    for row, step in zip(together, steps):
        np.testing.assert_array_equal(row, td.batch(tokens, 9, int(step), 8, 16))


def test_the_order_is_well_mixed():
    count = 4096
    tokens = np.arange(count + 1, dtype=np.uint32)
    orders = np.stack([td.batch(tokens, seed, 0, count, 1)[:, 0] for seed in range(64)]).astype(float)
    place = np.arange(count)
    # Correlation of a random order with the place, and of neighbours, has standard deviation 1 / sqrt(count); the mean of
    # 64 seeds an eighth of that. Five standard deviations.
    limit = 5 / math.sqrt(count) / 8
    assert abs(np.mean([np.corrcoef(order, place)[0, 1] for order in orders])) < limit
    assert abs(np.mean([np.corrcoef(order[:-1], order[1:])[0, 1] for order in orders])) < limit
    # Where the first window goes is uniform over seeds: chi-square over 8 bins, 7 degrees of freedom, p = 1e-4 at 29.9.
    first = np.array([td.batch(tokens, seed, 0, 1, 1)[0, 0] for seed in range(1000)])
    counts = np.bincount(first * 8 // count, minlength=8)
    assert ((counts - 125) ** 2 / 125).sum() < 29.9


def test_order_of_a_seed_stays_what_it_is():
    tokens = np.arange(1001, dtype=np.uint16)
    assert td.batch(tokens, 0, 0, 6, 10)[:, 0].tolist() == GOLDEN_ORDER[0]
    assert td.batch(tokens, 1, 100, 6, 10)[:, 0].tolist() == GOLDEN_ORDER[1]


GOLDEN_ORDER = [[200, 720, 810, 270, 800, 770], [420, 10, 630, 440, 320, 460]]


def test_validation_windows_are_fixed_spread_and_disjoint():
    tokens = np.arange(1005, dtype=np.uint16)
    windows = td.validation_windows(tokens, 7, 10)
    assert windows.shape == (7, 11) and windows.dtype == np.int32
    starts = windows[:, 0]
    np.testing.assert_array_equal(windows, starts[:, None] + np.arange(11))
    assert (np.diff(starts) >= 10).all() and np.ptp(np.diff(starts)) <= 10
    np.testing.assert_array_equal(td.validation_windows(tokens, 100, 10)[:, 0], np.arange(100) * 10)
    with pytest.raises(ValueError, match="101 validation windows .* 1 to 100"):
        td.validation_windows(tokens, 101, 10)


def test_a_corpus_shorter_than_a_window_is_refused():
    with pytest.raises(ValueError, match="64 tokens are fewer than one window of seq_len \\+ 1 = 65"):
        td.batch(np.zeros(64, np.uint8), 0, 0, 4, 64)


def test_batches_are_fast():
    tokens = td.load(DataRequest("stdlib")).train
    steps = np.arange(64)
    td.batches(tokens, 0, steps, 16, 128)
    took = []
    for repeat in range(5):
        start = time.perf_counter()
        td.batches(tokens, 0, steps + 64 * repeat, 16, 128)
        took.append(time.perf_counter() - start)
    assert 64 * 16 * 128 / min(took) > 50e6  # tokens per second; about 600e6 on a quiet core
