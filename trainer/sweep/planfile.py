"""plan.json in a sweep's folder: every run that was ever planned there, and which runs share a program, in which places.

The composition of a cohort is settled once, by the first launcher that wants its runs, and kept: a sweep that is resumed, or that two
launchers work on, trains each run beside the same others, on the same device, and ends in the same bits.
"""
from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

from trainer import lease
from trainer.cohort import Layout

WAIT_S = 120.0


@dataclasses.dataclass(frozen=True)
class Composition:
    """A cohort's layout, and which run is in which slot; None in those that only fill up the last device."""

    layout: Layout
    slots: tuple[str | None, ...]

    @staticmethod
    def deal(ids_and_steps: list[tuple[str, int]], layout: Layout) -> Composition:
        """Longest runs first, dealt to the layout's member devices in turn so that loads are even. A device's slots are contiguous."""
        devices = layout.member_devices
        order = sorted(ids_and_steps, key=lambda pair: (-pair[1], pair[0]))
        per_device = -(-len(order) // devices)
        slots: list[str | None] = [None] * (per_device * devices)
        for position, (run_id, _) in enumerate(order):
            slots[position % devices * per_device + position // devices] = run_id
        return Composition(layout, tuple(slots))


def path(root: Path) -> Path:
    return root / "plan.json"


def read(root: Path) -> tuple[list[str], list[Composition]]:
    """(ids of all planned runs, compositions in the order in which they were settled); empty without a file. ValueError in one line for a
    file that is no plan."""
    try:
        content = json.loads(path(root).read_text())
        compositions = [Composition(Layout(**c["layout"]), tuple(c["slots"])) for c in content.get("cohorts", ())]
        return [str(run_id) for run_id in content["run_ids"]], compositions
    except FileNotFoundError:
        return [], []
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path(root)} is not a plan: a JSON object with a list 'run_ids' ({error})") from error


def write(root: Path, run_ids: list[str], compositions: list[Composition]) -> None:
    """Atomically. Within `settling`."""
    content = {"sweep": root.name, "run_ids": run_ids, "cohorts": [{"layout": dataclasses.asdict(c.layout), "slots": c.slots} for c in compositions]}
    temporary = root / f".plan-{os.getpid()}.tmp"
    temporary.write_text(json.dumps(content))
    temporary.replace(path(root))


@contextlib.contextmanager
def settling(root: Path) -> Iterator[None]:
    """The right to change the plan, of one launcher at a time. ValueError where the folder cannot be written."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + WAIT_S
        while isinstance(taken := lease.take(root / "plan.lease"), lease.Holder):
            if time.monotonic() > deadline:
                raise ValueError(f"{root / 'plan.lease'} is held by process {taken.pid} on {taken.host} for {WAIT_S:.0f} s; remove it if that process is gone")
            time.sleep(0.05)
    except OSError as error:
        raise ValueError(f"runs_dir={root.parent} cannot be written ({error.strerror}); accepted: a folder that can") from error
    try:
        yield
    finally:
        taken.release()
