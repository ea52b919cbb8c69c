"""What training reads: two token memmaps, who they are (a hash of their content), and what a token is worth."""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Tokens prepared for training. `train` and `validation` are read-only 1-D memmaps of uint8, uint16 or uint32.

    Attributes:
      name: the name that it was loaded by (`stdlib`, `file`, `synthetic`, a plugin's).
      train, validation: token ids, all below `vocab_size`.
      vocab_size: number of distinct ids that may occur.
      sha256: hex digest of content and split (dtype, vocabulary, both token streams): equal digests, equal data.
      bytes_per_token: bytes of text per validation token, which turns nats per token into bits per byte:
        `loss / ln 2 / bytes_per_token`. 1 where a token is a byte, and 1 for symbols that stand for no text.
      folder: where the prepared files lie.
      context_entropies: for a source of known law, entropy in nats of the next token given the last 1, 2, ..., k
        tokens (k: its order). Empty where it is unknown.
    """

    name: str
    train: np.ndarray
    validation: np.ndarray
    vocab_size: int
    sha256: str
    bytes_per_token: float
    folder: pathlib.Path
    context_entropies: tuple[float, ...] = ()

    @property
    def entropy_nats(self) -> float | None:
        """Entropy rate in nats per token, None where it is unknown. No model does better, with any context."""
        return self.context_entropies[-1] if self.context_entropies else None

    def irreducible_loss(self, seq_len: int) -> float | None:
        """The least mean loss (nats per token) over windows of `seq_len` predictions, None where it is unknown.

        It lies above the entropy rate when the order k exceeds 1, because prediction t of a window sees only t + 1
        tokens: (h_1 + ... + h_{k-1} + (seq_len - k + 1) h_k) / seq_len.
        """
        if not self.context_entropies:
            return None
        per_position = self.context_entropies[:seq_len]
        return (sum(per_position) + (seq_len - len(per_position)) * per_position[-1]) / seq_len
