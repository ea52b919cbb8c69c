"""The two checks that most refusals come down to."""
from __future__ import annotations

import math
from collections.abc import Iterable


def one_of(key: str, value, accepted: Iterable):
    """value, if it is among the accepted names (strings, or members of an Enum)."""
    names = [getattr(name, "value", name) for name in accepted]
    if value not in names:
        raise ValueError(f"{key}={value} is not known; accepted: {', '.join(names)}")
    return value


def in_range(key: str, value, low, high=math.inf, accepted: str | None = None):
    """value, if it is a number from low to high."""
    if not isinstance(value, (int, float)) or not low <= value <= high:
        accepted = accepted or (f"{low} or more" if high == math.inf else f"{low} to {high}")
        raise ValueError(f"{key}={value} is not possible; accepted: {accepted}")
    return value
