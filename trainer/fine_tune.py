"""Starting from the parameters of another run: which run that is, and its numbers whatever they are held as."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from trainer import checkpoint
from trainer import model as decoder

PREFIX, SECOND_WORDS = "params/", "opt_state/delta/"
DATA, EXPONENT, CODES = "/data", "/exponent", "/codes"  # of a ScaledArray, and of a QArray
DTYPES = ("float32", "float16", "bfloat16")


def source_run(path: str) -> tuple[str, str]:
    """(folder, run_id) of a run to start from; what identifies it is its record, wherever the folder lies and whatever it is called.

    ValueError, one line, for one that was not trained to its end: a failed or diverged run's parameters are not a result.
    """
    folder = Path(path).resolve()
    accepted = "accepted: the folder of a run (runs_dir/sweep/run_id) that was trained to its end"
    for part in ("checkpoints", "record.json"):
        if not (folder / part).exists():
            raise ValueError(f"init_from={path} has no {part}; {accepted}")
    try:
        record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
        run_id, status = record["run_id"], record["status"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"init_from={path} has a record.json that is no record with run_id and status; {accepted}") from None
    if status != "done":
        raise ValueError(f"init_from={path} has status={status} in its record.json; {accepted} (status=done)")
    return str(folder), str(run_id)


def given_params(model: decoder.ModelConfig, run_folder: str) -> dict[str, np.ndarray]:
    """Path -> float32 parameter, from a run's newest checkpoint; for `step.init`, which takes the rest fresh. Of ScaledArrays the values
    data * 2**exponent; of parameters of two words (Collage, Kahan) their sum.

    ValueError, one line, for one that the model lacks or has in another shape, or that is held as codes.
    """
    held = checkpoint.leaves(Path(run_folder) / "checkpoints", "")
    stored = {name.removeprefix(PREFIX): leaf for name, leaf in held.items() if name.startswith(PREFIX)}
    if not stored:
        raise ValueError(f"init_from={run_folder} has no whole checkpoint; accepted: a run folder that has one")
    here, given = decoder.by_path(decoder.blueprint(model)[1]), {}
    for name, leaf in stored.items():
        if name.endswith(EXPONENT) and name not in here:
            continue  # taken with its data
        if name.endswith(CODES) and name not in here:
            raise ValueError(f"init_from={run_folder} holds {name.removesuffix(CODES)} as codes and scales (FP8 or stochastic float16 master weights), whose format a checkpoint "
                             f"does not tell; accepted: a run with weights held as {', '.join(DTYPES)}, also with a power of two beside them or a second word, or "
                             "precision.storage=emulated")
        if name.endswith(DATA) and name not in here:
            name, leaf = name.removesuffix(DATA), _values(leaf, stored[name.removesuffix(DATA) + EXPONENT])
        mine = here.get(name)
        if mine is None or mine.shape != leaf.shape or leaf.dtype.name not in DTYPES:
            found = "nothing" if mine is None else f"{mine.dtype}{list(mine.shape)}"
            raise ValueError(f"init_from={run_folder} has {name} {leaf.dtype}{list(leaf.shape)} where this run has {found}; accepted: a run of the same model "
                             f"and vocabulary, with weights held as {', '.join(DTYPES)}")
        given[name] = leaf.astype(np.float32)
        if SECOND_WORDS + name in held:
            given[name] = given[name] + held[SECOND_WORDS + name].astype(np.float32)
    return given


def _values(data: np.ndarray, exponent: np.ndarray) -> np.ndarray:
    """float32 values of a ScaledArray: one exponent for all of them, or for each leading index."""
    exponent = exponent.reshape(exponent.shape + (1,) * (data.ndim - exponent.ndim))
    return np.ldexp(data.astype(np.float64), exponent).astype(np.float32)
