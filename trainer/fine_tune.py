"""Starting from the parameters of another run."""
from __future__ import annotations

from pathlib import Path

import numpy as np

from trainer import checkpoint
from trainer import model as decoder

PREFIX = "params/"
DTYPES = ("float32", "float16", "bfloat16")


def given_params(model: decoder.ModelConfig, run_folder: str) -> dict[str, np.ndarray]:
    """Path -> float32 parameter, from a run's newest checkpoint; for `step.init`, which takes the rest fresh.

    ValueError, one line, for one that the model lacks or has in another shape, or that is not held as a float of 16 or 32 bits.
    """
    stored = checkpoint.leaves(Path(run_folder) / "checkpoints", PREFIX)
    if not stored:
        raise ValueError(f"init_from={run_folder} has no whole checkpoint; accepted: a run folder that has one")
    here = decoder.by_path(decoder.blueprint(model)[1])
    for name, leaf in stored.items():
        mine = here.get(name)
        if mine is None or mine.shape != leaf.shape or leaf.dtype.name not in DTYPES:
            found = "nothing" if mine is None else f"{mine.dtype}{list(mine.shape)}"
            raise ValueError(f"init_from={run_folder} has {name} {leaf.dtype}{list(leaf.shape)} where this run has {found}; accepted: a run of the same model "
                             f"and vocabulary, with weights held as {', '.join(DTYPES)}")
    return {name: leaf.astype(np.float32) for name, leaf in stored.items()}
