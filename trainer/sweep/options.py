"""The options of a launch, among the overrides of `bitlaw sweep`: what to do now, not what a run is."""
from __future__ import annotations

import re
from dataclasses import dataclass, field

from trainer.sweep.plan import MAX_MEMBERS

_UNITS = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


@dataclass(frozen=True)
class LaunchOptions:
    """dry_run: print the plan only. max_wall: seconds after which to save everything and exit, None for no limit. max_members: runs of one
    cohort at most. retry_failed: try again what failed. launcher: the name of a file of configs/launcher/. settings: the overrides launcher.KEY=VALUE."""

    dry_run: bool = False
    launcher: str = "local"
    max_wall: float | None = None
    max_members: int = MAX_MEMBERS
    retry_failed: bool = False
    settings: tuple[str, ...] = field(default=())


def take_options(overrides: list[str]) -> tuple[LaunchOptions, list[str]]:
    """The options, and the overrides that are none. ValueError, one line, for a value that an option does not take."""
    found, settings, rest = {}, [], []
    for override in overrides:
        key, _, value = override.partition("=")
        if key in _PARSERS:
            found[key] = _PARSERS[key](key, value)
        elif key.startswith("launcher."):
            settings.append(override)
        else:
            rest.append(override)
    return LaunchOptions(**found, settings=tuple(settings)), rest


def _flag(key: str, value: str) -> bool:
    if value not in ("true", "false"):
        raise ValueError(f"{key}={value} is not possible; accepted: true, false")
    return value == "true"


def _members(key: str, value: str) -> int:
    if not value.isdecimal() or not 1 <= int(value) <= 4096:
        raise ValueError(f"{key}={value} is not possible; accepted: 1 to 4096")
    return int(value)


def seconds(key: str, value: str) -> float | None:
    """"540s", "9m", "1.5h", "540" in seconds; None for null."""
    if value == "null":
        return None
    match = re.fullmatch(r"(\d+(?:\.\d*)?)(s|m|min|h|d)?", value)
    if match is None or float(match[1]) <= 0:
        raise ValueError(f"{key}={value} is not a time; accepted: such as 540s, 9m, 1.5h")
    return float(match[1]) * _UNITS[match[2] or "s"]


_PARSERS = {"dry_run": _flag, "launcher": lambda key, value: value, "max_wall": seconds, "max_members": _members, "retry_failed": _flag}
