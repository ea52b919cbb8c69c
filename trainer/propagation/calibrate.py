"""Where data drifts from unit scale, and the fewest rescales that keep it near: what rescale="auto" does."""
from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from trainer.propagation.array import pow2, times, trailing, wide
from trainer.propagation.exponents import of_array
from trainer.propagation.interpret import where
from trainer.propagation.rescale import Statistic, drift, measure, parse
from trainer.propagation.rules import RULES
from trainer.propagation.values import SENTINEL, Scaled

MAX_PLACES = 64
CANDIDATES = 12


@dataclass(frozen=True)
class Place:
    """A value of the program: the result of an equation. path: where the equation is, through the loops that it is in."""

    path: tuple
    primitive: str
    line: str
    shape: tuple[int, ...]
    loops: int  # how many bodies of structures it lies in

    def __str__(self):
        return f"{self.primitive} {list(self.shape)} at {self.line}" + (f", in {self.loops} nested bodies" if self.loops else "")


@dataclass(frozen=True)
class Plan:
    """Rescales by `by`, and what was found: drift (log2 of the statistic) before any rescale, as (lowest, highest)."""

    places: tuple[Place, ...] = ()
    by: str = "rms"
    threshold: int = 8
    drift: tuple[int, int] = (0, 0)
    remaining: tuple[int, int] = (0, 0)

    @functools.cached_property
    def _paths(self):
        return frozenset(place.path for place in self.places)

    def move(self, path, _, value: Scaled) -> Scaled:
        """The value, rescaled if this is one of the places."""
        return _moved(value, drift(_size(value, Statistic(self.by)))) if path in self._paths else value

    def __str__(self):
        head = f"{len(self.places)} rescales by {self.by}; log2 of it was in {list(self.drift)}, is in {list(self.remaining)}, limits +-{self.threshold}"
        return "\n".join([head, *(f"  {place}" for place in self.places)])


def _size(value: Scaled, statistic: Statistic):
    """The statistic of the data, for each index that has an exponent of its own. What stands for minus infinity (mask values, and what they
    become) is taken as zero."""
    data = wide(value.data)
    return measure(jnp.where(jnp.abs(data) < min(SENTINEL, 65504.0), data, 0), statistic, value.exponent.ndim)


def _moved(value: Scaled, n) -> Scaled:
    data = times(wide(value.data), trailing(pow2(-n), value.ndim)) if n.ndim else times(wide(value.data), pow2(-n))
    return Scaled(data.astype(value.data.dtype), value.exponent + of_array(n), value.dtype)


def _passes_on(eqn) -> bool:
    """True for primitives whose result is as near to unit scale as their argument."""
    rule = RULES.get(eqn.primitive.name)
    return rule is not None and (rule.data, rule.exponent) == ("f(a)", "ea")


class _Probe:
    """The transformed program with a switch at every value: compiled once, and run with any choice of rescales."""

    def __init__(self, watched: Callable, args, kwargs, statistic: Statistic, static):
        self.places: dict[tuple, Place] = {}
        self._statistic, self._numbers, self._switches = statistic, {}, None
        static = {name: value for name, value in kwargs.items() if name in static}
        self._arguments = args, {name: value for name, value in kwargs.items() if name not in static}
        run = lambda switches, a, k: self._run(watched, switches, *a, **k, **static)  # noqa: E731
        jax.eval_shape(functools.partial(run, None), *self._arguments)
        self._compiled = jax.jit(run)

    def _run(self, watched, switches, *args, **kwargs):
        self._switches = switches
        return watched(self, None)(*args, **kwargs)

    def move(self, path, eqn, value: Scaled) -> Scaled:
        """The value, rescaled if its switch is on, and its drift told to whoever looks."""
        if not value.ndim or not value.data.size or _passes_on(eqn):
            return value
        self.places.setdefault(path, Place(path, eqn.primitive.name, where(eqn), tuple(value.shape), len(path) // 2))
        number = self._numbers.setdefault(path, len(self._numbers))
        if self._switches is None:  # the first pass counts them
            return value
        size = _size(value, self._statistic)
        jax.debug.callback(functools.partial(self._take, path), size, self._switches[number])
        return _moved(value, jnp.where(self._switches[number], drift(size), 0))

    def _take(self, path, size, moved) -> None:
        size = np.asarray(size)[(size > 0) & np.isfinite(size)]  # zeros are at home at any scale
        if size.size:
            n = np.zeros(1, int) if moved else np.frexp(size)[1] - 1
            low, high = self._seen.get(path, (n[0], n[0]))
            self._seen[path] = min(int(n.min()), low), max(int(n.max()), high)

    def look(self, places) -> dict[tuple, tuple[int, int]]:
        """path -> (lowest, highest) drift over all occurrences, in the order of the program, with rescales at these paths."""
        self._seen: dict = {}
        switches = np.zeros(len(self._numbers), bool)
        switches[[self._numbers[path] for path in places]] = True
        jax.block_until_ready(self._compiled(switches, *self._arguments))
        jax.effects_barrier()
        return dict(sorted(self._seen.items()))


def _outside(seen: dict, threshold: int) -> list:
    return [path for path, (low, high) in seen.items() if low < -threshold or high > threshold]


def _candidates(seen: dict, first, count: int) -> list:
    """Where a rescale may keep `first` inside: there, or at one of the values before it that have drifted farthest; of neighbours that have
    drifted alike, one."""
    before, last = [], None
    for path, (low, high) in seen.items():
        if path == first:
            break
        if (low, high) != last and (low < -1 or high > 1):
            before.append((max(-low, high), path))
        last = low, high
    return [first, *(path for _, path in sorted(before, reverse=True)[: count - 1])]


def make_plan(watched: Callable, args, kwargs, threshold: int = 8, by: str = "rms", static=()) -> Plan:
    """See `trainer.propagation.calibrate`. watched(plan, watch): the transformed function with plan.move and watch at its values.

    A greedy search: for the first value outside the limits, the place that leaves the fewest outside; then every place is tried without.
    """
    statistic = parse(Statistic, "by", by)
    if not isinstance(threshold, (int, np.integer)) or threshold < 1:
        raise ValueError(f"calibrate: threshold={threshold!r}; accepted: an integer of at least 1 (powers of two)")
    with Console(stderr=True).status("calibrating: compiling the program with a switch at every value") as status:
        probe = _Probe(watched, args, kwargs, statistic, static)
        chosen: tuple = ()
        found = seen = probe.look(chosen)
        while (outside := _outside(seen, threshold)) and len(chosen) < MAX_PLACES:
            status.update(f"calibrating: {len(outside)} values outside with {len(chosen)} rescales")
            tried = {path: probe.look((*chosen, path)) for path in _candidates(seen, outside[0], CANDIDATES)}
            best = min(tried, key=lambda path: len(_outside(tried[path], threshold)))
            chosen, seen = (*chosen, best), tried[best]
        for path in chosen:
            fewer = tuple(p for p in chosen if p != path)
            if not _outside(without := probe.look(fewer), threshold):
                chosen, seen = fewer, without
    return Plan(tuple(probe.places[path] for path in sorted(chosen)), by, threshold, _range(found), _range(seen))


def _range(seen: dict) -> tuple[int, int]:
    return min((low for low, _ in seen.values()), default=0), max((high for _, high in seen.values()), default=0)
