"""The settings of a launch on a cluster: configs/launcher/NAME.yaml and the overrides launcher.KEY=VALUE."""
from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainer.config.checks import in_range
from trainer.config.compose import config_dir, parse

LOCAL = "local"
# What the launcher itself says to sbatch, and the key that stands for it.
OWN = {"array": "array_parallelism", "signal": "signal_delay_s", "time": "time", "partition": "partition", "account": "account", "nodes": "nodes",
       "gpus-per-node": "gpus_per_node", "cpus-per-task": "cpus_per_task", "mem": "mem", "output": None, "error": None, "open-mode": None,
       "requeue": None, "no-requeue": None, "ntasks": None, "ntasks-per-node": None}
_TIME = r"(?:(?P<number>\d+(?:\.\d*)?)(?P<unit>m|min|h|d)|(?:(?P<days>\d+)-)?(?P<hours>\d+):(?P<minutes>\d\d):(?P<seconds>\d\d))"
_MINUTES = {"m": 1.0, "min": 1.0, "h": 60.0, "d": 1440.0}


@dataclass
class SlurmSchema:
    partition: Optional[str] = None
    account: Optional[str] = None
    time: Optional[str] = None
    nodes: int = 1
    gpus_per_node: Optional[int] = None
    cpus_per_task: Optional[int] = None
    mem: Optional[str] = None
    array_parallelism: int = 256
    signal_delay_s: int = 120
    max_requeues: int = 100
    setup: List[str] = field(default_factory=list)
    python: Optional[str] = None
    sbatch: Dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SlurmSettings:
    """minutes: the time limit of a task, None for the partition's. sbatch: further options, as (name, value)."""

    partition: str | None
    account: str | None
    minutes: int | None
    nodes: int
    gpus_per_node: int | None
    cpus_per_task: int | None
    mem: str | None
    array_parallelism: int
    signal_delay_s: int
    max_requeues: int
    setup: tuple[str, ...]
    python: str | None
    sbatch: tuple[tuple[str, str | int | float | bool], ...]


def launcher(name: str, overrides: tuple[str, ...] = (), extra_dir: str | None = None) -> SlurmSettings | None:
    """The settings of the launcher of that name, None for this machine. ValueError in one line for an unknown name, key or value."""
    folders = [config_dir(), *([Path(extra_dir)] if extra_dir else [])]
    paths = {path.stem: path for folder in folders for path in sorted((folder / "launcher").glob("*.yaml"))}
    if name not in paths:
        raise ValueError(f"launcher={name} is not known; accepted: {', '.join(paths)}")
    if name == LOCAL:
        if overrides:
            raise ValueError(f"{overrides[0]}: launcher=local has no settings; accepted with another launcher: {', '.join(n for n in paths if n != LOCAL)}")
        return None
    config = OmegaConf.structured(SlurmSchema)
    content = OmegaConf.to_container(OmegaConf.load(paths[name])) or {}
    if not isinstance(content, dict):
        raise ValueError(f"{paths[name]} must hold keys and values as configs/launcher/slurm.yaml does")
    values = [(str(key), value, f"{paths[name]}: {key}") for key, value in content.items()]
    values += [_override(line) for line in overrides]
    for key, value, where in values:
        if key.partition(".")[0] not in SlurmSchema.__dataclass_fields__:
            raise ValueError(f"{where} is not a key; accepted keys: {', '.join(SlurmSchema.__dataclass_fields__)}")
        try:
            OmegaConf.update(config, key, value, merge=True)
        except (OmegaConfBaseException, ValueError, TypeError) as error:
            raise ValueError(f"{where}={value}: {str(error).splitlines()[0]}") from error
    return _freeze(OmegaConf.to_container(config))


def _override(line: str) -> tuple[str, Any, str]:
    """launcher.KEY=VALUE as key, value, and how to name it."""
    parsed = parse([line])[0]
    if parsed.is_sweep_override() or parsed.type.name != "CHANGE":
        raise ValueError(f"{line}: a launcher's settings take one value each; accepted: launcher.KEY=VALUE")
    return parsed.key_or_group.partition(".")[2], parsed.value(), parsed.key_or_group


def _freeze(c: dict) -> SlurmSettings:
    for key in ("nodes", "array_parallelism", "signal_delay_s", "gpus_per_node", "cpus_per_task"):
        if c[key] is not None:
            in_range(f"launcher.{key}", c[key], 1)
    in_range("launcher.max_requeues", c["max_requeues"], 0)
    extra = {str(key).replace("_", "-"): value for key, value in c["sbatch"].items()}
    for key, value in extra.items():
        if key in OWN:
            instead = f"launcher.{OWN[key]}=" if OWN[key] else "other options of sbatch, since this one is the launcher's own"
            raise ValueError(f"launcher.sbatch.{key}={value} is not possible; accepted: {instead}")
        if not isinstance(value, (str, int, float)):
            raise ValueError(f"launcher.sbatch.{key}={value} is not possible; accepted: a string, a number, or true for an option without a value")
    minutes = _minutes(c.pop("time"))
    if minutes is not None and c["signal_delay_s"] >= 60 * minutes:
        raise ValueError(f"launcher.signal_delay_s={c['signal_delay_s']} is not possible; accepted: less than the {minutes} min of launcher.time")
    return SlurmSettings(**{**c, "minutes": minutes, "setup": tuple(c["setup"]), "sbatch": tuple(extra.items())})


def _minutes(text: str | None) -> int | None:
    """A time in minutes, rounded up. A bare number is refused: it is minutes for Slurm and seconds for max_wall."""
    if text is None:
        return None
    match = re.fullmatch(_TIME, text)
    if match is None:
        raise ValueError(f"launcher.time={text} is not a time; accepted: such as 90m, 12h, 2d, or Slurm's 12:00:00 and 1-12:00:00")
    if match["number"]:
        minutes = float(match["number"]) * _MINUTES[match["unit"]]
    else:
        minutes = 1440 * int(match["days"] or 0) + 60 * int(match["hours"]) + int(match["minutes"]) + int(match["seconds"]) / 60
    if minutes <= 0:
        raise ValueError(f"launcher.time={text} is not possible; accepted: a time above 0")
    return -int(-minutes // 1)
