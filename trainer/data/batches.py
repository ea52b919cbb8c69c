"""Batches as a pure function of (seed, step): exact resume, elastic restarts and many runs over one memmap follow.

A corpus of n tokens has (n - 1) // T windows of T + 1 tokens (T inputs, T targets; neighbours share one token). An epoch
shows each window once, in an order that is a keyed permutation of the window numbers: a four-round Feistel network on
Z_a x Z_b with a, b near the square root of the number of windows, walked along its cycle where it leaves the range
(Black and Rogaway, "Ciphers with arbitrary finite domains", 2002, methods 2 and 3). Its round functions are random tables
of a or b entries, so nothing of the corpus's size is ever built. The tail shorter than a window is never shown.
"""

from __future__ import annotations

import functools

import numpy as np

_ROUNDS = 4


def num_windows(tokens: np.ndarray, seq_len: int) -> int:
    """Windows of one epoch. ValueError when the corpus is shorter than one window."""
    count = (tokens.size - 1) // seq_len
    if count < 1:
        raise ValueError(f"{tokens.size} tokens are fewer than one window of seq_len + 1 = {seq_len + 1}; give more data or a smaller seq_len")
    return count


def batch(tokens: np.ndarray, seed: int, step: int, batch_size: int, seq_len: int) -> np.ndarray:
    """The batch of a step: int32 [batch_size, seq_len + 1].

    Args:
      tokens: 1-D uint8, uint16 or uint32 (ids below 2**31), usually a memmap.
      seed: which order; any integer from 0.
      step: counts from 0. Batch `step` holds windows step * batch_size and following of the endless sequence of epochs.
    """
    return _batches(tokens, seed, step * batch_size + np.arange(batch_size), seq_len)


def batches(tokens: np.ndarray, seed: int, steps: np.ndarray, batch_size: int, seq_len: int) -> np.ndarray:
    """The batches of several steps in one call: int32 [len(steps), batch_size, seq_len + 1]; row i is `batch(.., steps[i], ..)`."""
    positions_K1 = np.asarray(steps, np.int64)[:, None] * batch_size
    return _batches(tokens, seed, positions_K1 + np.arange(batch_size), seq_len)


def validation_windows(tokens: np.ndarray, num: int, seq_len: int) -> np.ndarray:
    """`num` fixed windows spread evenly over the tokens, without overlap of targets: int32 [num, seq_len + 1]."""
    available = num_windows(tokens, seq_len)
    if not 1 <= num <= available:
        raise ValueError(f"{num} validation windows of {seq_len} tokens were asked for; the validation part holds 1 to {available}")
    windows = np.arange(num) * available // num
    return _gather(tokens, windows * seq_len, seq_len)


def _batches(tokens: np.ndarray, seed: int, positions: np.ndarray, seq_len: int) -> np.ndarray:
    count = num_windows(tokens, seq_len)
    epochs, places = positions // count, positions % count
    first, last = int(epochs.min()), int(epochs.max())
    if first == last:
        windows = _permuted(places, count, seed, first)
    else:
        windows = np.empty_like(places)
        for epoch in np.unique(epochs):
            inside = epochs == epoch
            windows[inside] = _permuted(places[inside], count, seed, int(epoch))
    return _gather(tokens, windows * seq_len, seq_len)


def _gather(tokens: np.ndarray, starts: np.ndarray, seq_len: int) -> np.ndarray:
    # A view of every window, then one fancy index over windows: rows are copied whole, several times as fast as an index
    # per token. The plain-array view avoids memmap's cost per operation.
    plain = tokens.view(np.ndarray)
    shape, strides = (plain.size - seq_len, seq_len + 1), plain.strides * 2
    return np.lib.stride_tricks.as_strided(plain, shape, strides, writeable=False)[starts].astype(np.int32)


def _permuted(places: np.ndarray, count: int, seed: int, epoch: int) -> np.ndarray:
    """Where the permutation of epoch `epoch` sends `places`, all in [0, count)."""
    keys = _round_tables(count, seed, epoch)
    result = _feistel(places, keys)
    while (outside := result >= count).any():
        result[outside] = _feistel(result[outside], keys)
    return result


def _feistel(places: np.ndarray, tables: tuple[np.ndarray, ...]) -> np.ndarray:
    """A permutation of [0, a * b): left half in Z_a, right half in Z_b, each in turn shifted by a table look-up of the other."""
    size_a, size_b = tables[1].size, tables[0].size
    left, right = np.divmod(places, size_b)
    for shift_left, shift_right in zip(tables[0::2], tables[1::2]):
        left = (left + shift_left[right]) % size_a
        right = (right + shift_right[left]) % size_b
    return left * size_b + right


@functools.lru_cache(maxsize=64)
def _round_tables(count: int, seed: int, epoch: int) -> tuple[np.ndarray, ...]:
    """Tables of the rounds: even ones map Z_b to Z_a, odd ones Z_a to Z_b, with a * b >= count and a * b - count < b."""
    size_b = max(1, round(count**0.5))
    size_a = -(-count // size_b)
    raw = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(_ROUNDS // 2 * (size_a + size_b))
    words = (raw >> np.uint64(1)).astype(np.int64)
    tables, used = [], 0
    for length, modulus in ((size_b, size_a), (size_a, size_b)) * (_ROUNDS // 2):
        tables.append(words[used : used + length] % modulus)
        used += length
    return tuple(tables)
