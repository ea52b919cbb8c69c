"""What training took on this kind of machine before: measured by every cohort, kept in the cache, read by the dry run.

A line of rates.jsonl is a cohort that trained: what it was (device, number of devices, model, precision, layout) and what it took: seconds
for a member's token, seconds to compile, bytes for a member at once.
"""
from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from trainer.cohort import Layout
from trainer.data.store import cache_folder
from trainer.step import StepStructure

# Where nothing was measured: an order of magnitude of a laptop's core, and of what XLA takes for a small model.
FLOPS_PER_S, COMPILE_S, BYTES_PER_PARAM = 1e10, 10.0, 200.0


@dataclass(frozen=True)
class Rate:
    """device: kind; flops_per_token: of the model; precision: name; seconds_per_token: of training, a token of one member, all members of the
    cohort at work; compile_seconds: of all its programs, None where they were there already; bytes_per_member: at once on a device, None
    where the backend does not tell."""

    device: str
    num_devices: int
    inner: str
    params: int
    flops_per_token: float
    precision: str
    seconds_per_token: float
    compile_seconds: float | None
    bytes_per_member: float | None


@dataclass(frozen=True)
class Estimate:
    """Of a cohort: seconds of training and of compiling, bytes on a device at once. measured: that the same model and precision were
    trained here before, not others from which it follows by FLOPs and parameters."""

    seconds: float
    compile_seconds: float
    bytes: float
    measured: bool


def path() -> Path:
    return cache_folder().parent / "rates.jsonl"


def note(rate: Rate) -> None:
    """Append it; a cache that cannot be written is no reason to fail."""
    with contextlib.suppress(OSError):
        path().parent.mkdir(parents=True, exist_ok=True)
        with path().open("a") as file:
            file.write(json.dumps(asdict(rate)) + "\n")


def known(limit: int = 2000) -> list[Rate]:
    """The newest ones, in order."""
    try:
        lines = path().read_text().splitlines()[-limit:]
    except OSError:
        return []
    found = []
    for line in lines:
        with contextlib.suppress(ValueError, TypeError):  # torn, or of another version
            found.append(Rate(**json.loads(line)))
    return found


def estimate(rates: Sequence[Rate], device: str, structure: StepStructure, layout: Layout, precision: str, tokens: float, members: int) -> Estimate:
    """Of a cohort of so many members that trains so many tokens in all."""
    model = structure.model
    flops, params = model.flops_per_token(structure.seq_len), model.num_params_total
    here = [r for r in rates if r.device == device and r.num_devices == layout.num_devices and r.inner == layout.inner]
    same = [r for r in here if r.params == params and r.flops_per_token == flops and r.precision == precision]
    # Nearest in size, on a scale of ratios; of as near ones the newest.
    near = same or sorted(reversed(here), key=lambda r: abs(math.log(r.flops_per_token / flops)))[:1]
    per_device = -(-members // layout.member_devices)
    if not near:
        return Estimate(tokens * flops / FLOPS_PER_S / layout.num_devices, COMPILE_S, per_device * params * BYTES_PER_PARAM, False)
    last = near[-1]
    compiled = next((r.compile_seconds for r in reversed(near) if r.compile_seconds), COMPILE_S)
    each = next((r.bytes_per_member * params / r.params for r in reversed(near) if r.bytes_per_member), params * BYTES_PER_PARAM)
    return Estimate(tokens * last.seconds_per_token * flops / last.flops_per_token, compiled, per_device * each, bool(same))
