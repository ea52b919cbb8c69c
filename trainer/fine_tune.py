"""Starting from the parameters of another run."""
from __future__ import annotations

from pathlib import Path

import jax
import numpy as np

from trainer import checkpoint

PREFIX = "params/"


def take_params(states, slot: int, run_folder: str) -> None:
    """Writes the float32 parameters of a run's newest checkpoint into the stacked states (NumPy, [M, ...]) at one slot.

    Parameters that the checkpoint lacks stay as they are. ValueError, one line, for one that the states lack or have in another shape or
    dtype.
    """
    stored = checkpoint.leaves(Path(run_folder) / "checkpoints", PREFIX)
    if not stored:
        raise ValueError(f"init_from={run_folder} has no whole checkpoint; accepted: a run folder that has one")
    here = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(states.params)}
    for name, leaf in stored.items():
        mine = here.get(name)
        if mine is None or mine.shape[1:] != leaf.shape or mine.dtype != leaf.dtype:
            found = "nothing" if mine is None else f"{mine.dtype}{list(mine.shape[1:])}"
            raise ValueError(f"init_from={run_folder} has {name} {leaf.dtype}{list(leaf.shape)} where this run has {found}; accepted: a run of the same model "
                             "and vocabulary, with weights held in the same format")
        mine[slot] = np.asarray(leaf)
