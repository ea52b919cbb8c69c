"""`bitlaw data NAME`: prepares a data set before anything trains on it, and says what and where it is."""

from __future__ import annotations

import argparse
import dataclasses
from typing import NoReturn

from trainer.data import registry


@dataclasses.dataclass(frozen=True)
class DataRequest:
    """What `registry.load` reads, with the defaults of configs/data: what is prepared is what training then opens."""

    name: str
    paths: tuple[str, ...] = ()
    tokenizer: str | None = None
    validation_fraction: float = 0.05
    vocab_size: int = 32
    order: int = 2
    tokens: int = 4_000_000
    seed: int = 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"bitlaw data: {message} (see 'bitlaw data --help')")


def prepare(argv: list[str]) -> int:
    """Runs the command on its arguments; returns 0. Bad input raises ValueError with one line."""
    default = DataRequest("")
    parser = _Parser(prog="bitlaw data", description="Prepares a data set as memory-mapped tokens.")
    parser.add_argument("name", metavar="NAME", help=f"one of: {', '.join(registry.names())}")
    parser.add_argument("--paths", nargs="+", default=(), metavar="PATH", help="files, folders or globs (file)")
    parser.add_argument("--tokenizer", metavar="FILE", help="a tokenizer.json; without it a token is a byte (file)")
    parser.add_argument("--validation-fraction", type=float, default=default.validation_fraction, metavar="X")
    parser.add_argument("--vocab-size", type=int, default=default.vocab_size, metavar="N", help="(synthetic)")
    parser.add_argument("--order", type=int, default=default.order, metavar="N", help="tokens of context (synthetic)")
    parser.add_argument("--tokens", type=int, default=default.tokens, metavar="N", help="(synthetic)")
    parser.add_argument("--seed", type=int, default=default.seed, metavar="N", help="(synthetic)")
    fields = vars(parser.parse_args(argv))
    data = registry.load(DataRequest(**(fields | {"paths": tuple(fields["paths"])})))
    print(f"name        {data.name}")
    print(f"train       {data.train.size:,} tokens ({data.train.dtype})")
    print(f"validation  {data.validation.size:,} tokens, {data.bytes_per_token:.4g} bytes per token")
    print(f"vocabulary  {data.vocab_size:,}")
    if data.entropy_nats is not None:
        print(f"entropy     {data.entropy_nats:.6f} nats per token")
    print(f"sha256      {data.sha256}")
    print(f"where       {data.folder}")
    return 0
