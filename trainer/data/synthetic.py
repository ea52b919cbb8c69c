"""`data=synthetic`: an order-k Markov source of known entropy, so that the loss no model can beat is known exactly.

The next token depends on the last k. Its distribution in each context is drawn once from the seed, skewed (weights go as
the fourth power of a uniform number), and held in units of 2**-32: the samples follow these very probabilities, and the
entropy is computed from them. Only integers, correctly rounded divisions and PCG64's raw stream (which NumPy promises to
keep) decide which token comes, so a seed gives the same tokens everywhere.

Legend: C contexts (vocab_size ** order; a context is the last k tokens as one number, the newest in the lowest digit),
V vocabulary, L steps per lane, N lanes.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from trainer.data import registry, store
from trainer.data.dataset import Dataset

_RULE = 1  # raise when the tokens of a seed change
_MAX_TABLE = 1 << 20  # entries of the transition table: seconds of preparation
_UNIT = 2**32  # probabilities are multiples of 1 / _UNIT
_MAX_SWEEPS = 100_000


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """A Markov source. `cumulative_CV` (uint64): upper ends of each token's share of [0, 2**32) in a context."""

    vocab_size: int
    order: int
    cumulative_CV: np.ndarray

    @property
    def probabilities_CV(self) -> np.ndarray:
        """float64, rows sum to 1 exactly."""
        return np.diff(self.cumulative_CV.astype(np.float64), axis=1, prepend=0.0) / _UNIT


@registry.register("synthetic")
def load(data: Any) -> Dataset:
    """`data.tokens` tokens of the source (`data.vocab_size`, `data.order`, `data.seed`), the last fraction for validation."""
    registry.check_fraction(data.validation_fraction)
    _check(data)
    identity = [_RULE, data.vocab_size, data.order, data.seed, data.tokens, data.validation_fraction]
    return store.open_or_prepare("synthetic", identity, lambda: _prepare(data))


def _check(data: Any) -> None:
    if data.order < 1:
        raise ValueError(f"data.order={data.order} must be 1 or more (how many tokens the next one depends on)")
    if data.vocab_size < 2 or data.vocab_size ** (data.order + 1) > _MAX_TABLE:
        raise ValueError(
            f"data.vocab_size={data.vocab_size} with data.order={data.order}: the vocabulary must be 2 or more and "
            f"vocab_size ** (order + 1) at most {_MAX_TABLE}"
        )
    if data.tokens < 2:
        raise ValueError(f"data.tokens={data.tokens} must be 2 or more (training and validation tokens together)")
    if data.seed < 0:
        raise ValueError(f"data.seed={data.seed} must be 0 or more")


def _prepare(data: Any) -> store.Tokens:
    source = make_source(data.vocab_size, data.order, data.seed)
    stationary_C = stationary(source)
    tokens = sample(source, stationary_C, data.seed, data.tokens)
    cut = round((1.0 - data.validation_fraction) * data.tokens)
    return store.Tokens(
        train=[tokens[:cut]],
        validation=[tokens[cut:]],
        dtype=np.dtype(np.uint8 if data.vocab_size <= 256 else np.uint16),
        vocab_size=data.vocab_size,
        context_entropies=entropies(source, stationary_C),
    )


def make_source(vocab_size: int, order: int, seed: int) -> Source:
    """Draws the transition table from the seed. About 8 % of the mass is spread evenly: without it small sources have traps."""
    num_contexts = vocab_size**order
    raw = np.random.PCG64(np.random.SeedSequence([seed, 0])).random_raw(num_contexts * vocab_size)
    uniform_CV = (raw >> np.uint64(48)).reshape(num_contexts, vocab_size)  # 16 bits
    weights_CV = (uniform_CV**4 >> np.uint64(40)) + np.uint64(1 << 18)
    sums_CV = np.cumsum(weights_CV, axis=1).astype(np.float64)  # below 2**53: exact
    cumulative_CV = np.floor(sums_CV / sums_CV[:, -1:] * _UNIT).astype(np.uint64)
    return Source(vocab_size, order, cumulative_CV)


def stationary(source: Source) -> np.ndarray:
    """Stationary probability of each context, float64 [C]: the joint law of (context, next token) pushed on to a fixed point."""
    p_CV = source.probabilities_CV
    num_contexts, vocab = p_CV.shape
    pi_C = np.full(num_contexts, 1.0 / num_contexts)
    for _ in range(_MAX_SWEEPS):
        # (oldest, ..., newest) -> (second oldest, ..., newest, next): sum over the oldest token of the joint law.
        next_C = (pi_C[:, None] * p_CV).reshape(vocab, num_contexts).sum(axis=0)
        change = np.abs(next_C - pi_C).sum()
        pi_C = next_C / next_C.sum()
        if change < 1e-13:  # rounding alone makes about 1e-15
            return pi_C
    raise ValueError(f"the source's stationary law did not settle in {_MAX_SWEEPS} sweeps; take another data.seed")


def entropies(source: Source, stationary_C: np.ndarray) -> tuple[float, ...]:
    """Entropy (nats) of the next token given the last 1, ..., k tokens: H(last j, next) - H(last j). The last is the rate."""
    vocab = source.vocab_size
    joint_CV = stationary_C[:, None] * source.probabilities_CV
    found = []
    for known in range(1, source.order + 1):
        joint = joint_CV.reshape(-1, vocab**known, vocab).sum(axis=0)
        context = joint.sum(axis=1, keepdims=True)
        # log of the conditional probability, so that nothing cancels; 0 log 0 is 0.
        ratio = np.divide(joint, context, out=np.ones_like(joint), where=joint > 0)
        found.append(float(-(joint * np.log(ratio)).sum()))
    return tuple(found)


def sample(source: Source, stationary_C: np.ndarray, seed: int, num_tokens: int) -> np.ndarray:
    """`num_tokens` consecutive tokens of one stationary chain (uint8 or uint16), exactly as a loop over tokens would draw them.

    The sequence is cut into lanes that advance together. A lane's first context is the last one of the lane before, which is
    not known yet: all lanes start from a guess, and those whose guess proves wrong run again with the same random numbers.
    Chains that share random numbers soon meet, so the second or third round usually changes no lane's end; lane i is right after i + 1 rounds at the latest.
    """
    lane_length = max(64, int(num_tokens**0.5))
    num_lanes = -(-num_tokens // lane_length)
    raw = np.random.PCG64(np.random.SeedSequence([seed, 1])).random_raw(num_lanes * lane_length + 1)
    uniform_LN = (raw[1:] >> np.uint64(32)).reshape(num_lanes, lane_length).T.copy()
    first = int(np.searchsorted(np.cumsum(stationary_C), float(raw[0] >> np.uint64(11)) * 2.0**-53))
    first = min(first, stationary_C.size - 1)
    dtype = np.uint8 if source.vocab_size <= 256 else np.uint16
    tokens_NL = np.empty((num_lanes, lane_length), dtype)
    starts_N = np.full(num_lanes, first, np.int64)
    ends_N = np.empty(num_lanes, np.int64)
    stale_N = np.ones(num_lanes, bool)
    while stale_N.any():
        tokens_NL[stale_N], ends_N[stale_N] = _advance(source, starts_N[stale_N], uniform_LN[:, stale_N])
        known_N = np.concatenate([[first], ends_N[:-1]])
        stale_N = known_N != starts_N
        starts_N = known_N
    return tokens_NL.reshape(-1)[:num_tokens]


def _advance(source: Source, starts_N: np.ndarray, uniform_LN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Runs every lane from its start; returns tokens [N, L] and the last contexts [N]."""
    num_contexts, vocab = source.cumulative_CV.shape
    # One sorted array for all contexts: context in the high word, cumulative share in the low one. A token is the number
    # of its context's upper ends that do not exceed the uniform number. Upper end 2**32 of a row is the next row's 0.
    rows_C = np.arange(num_contexts, dtype=np.uint64) << np.uint64(32)
    ends_flat = (rows_C[:, None] + source.cumulative_CV).reshape(-1)
    tokens_LN = np.empty(uniform_LN.shape, np.uint16)
    context_N = starts_N
    for step, uniform_N in enumerate(uniform_LN):
        place_N = np.searchsorted(ends_flat, (context_N.astype(np.uint64) << np.uint64(32)) + uniform_N, side="right")
        token_N = place_N - context_N * vocab
        tokens_LN[step] = token_N
        context_N = (context_N * vocab + token_N) % num_contexts
    return tokens_LN.T, context_N
