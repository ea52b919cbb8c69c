"""Where data drifts from unit scale, and the fewest rescales that keep it near: what rescale="auto" does."""
from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from trainer.propagation.array import ZERO_EXPONENT, floor_log2, wide
from trainer.propagation.exponents import of_array
from trainer.propagation.interpret import where
from trainer.propagation.rescale import Statistic, measure, parse, to_unit
from trainer.propagation.values import SENTINEL, Scaled, collapse

MAX_PLACES = 64


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

    def move(self, path, value: Scaled) -> Scaled:
        """The value, rescaled if this is one of the places."""
        if path not in self._paths:
            return value
        value = collapse(value)
        data, n = to_unit(value.data, Statistic(self.by))
        return Scaled(data, value.exponent + of_array(n), value.dtype)

    def __str__(self):
        head = f"{len(self.places)} rescales by {self.by}; log2 of it was in {list(self.drift)}, is in {list(self.remaining)}, limits +-{self.threshold}"
        return "\n".join([head, *(f"  {place}" for place in self.places)])


@dataclass
class _Seen:
    """The log2 of the statistic of every value, over all its occurrences."""

    places: dict = field(default_factory=dict)
    lowest: dict = field(default_factory=dict)
    highest: dict = field(default_factory=dict)
    order: list = field(default_factory=list)

    def take(self, path, drift) -> None:
        drift = int(drift)
        if drift == ZERO_EXPONENT:  # all zero: at home at any scale
            return
        if path not in self.lowest:
            self.order.append(path)
        self.lowest[path] = min(drift, self.lowest.get(path, drift))
        self.highest[path] = max(drift, self.highest.get(path, drift))

    def outside(self, threshold: int) -> list:
        """Paths that leave the limits, in the order of the program."""
        return sorted(p for p in self.lowest if self.lowest[p] < -threshold or self.highest[p] > threshold)

    def range(self) -> tuple[int, int]:
        return (min(self.lowest.values(), default=0), max(self.highest.values(), default=0))


def _without_masks(data):
    """The data with what stands for minus infinity (mask values, and what they become) taken as zero, unless it is all there is."""
    data = wide(data)
    limit = min(SENTINEL, 65504.0)
    kept = jnp.where(jnp.abs(data) < limit, data, 0)
    return jnp.where(jnp.any(kept != 0), kept, data)


def _look(watched: Callable, plan: Plan, args, kwargs) -> _Seen:
    """Run the program once with the plan's rescales."""
    seen = _Seen()
    statistic = Statistic(plan.by)

    def watch(path, eqn, value: Scaled) -> None:
        if not value.ndim or not value.data.size:
            return
        seen.places[path] = Place(path, eqn.primitive.name, where(eqn), tuple(value.shape), len(path) // 2)
        drift = floor_log2(measure(_without_masks(collapse(value).data), statistic).astype(jnp.float32))
        jax.debug.callback(functools.partial(seen.take, path), drift)

    arrays, static = {}, {}
    for name, value in kwargs.items():
        (static if isinstance(value, (str, bool)) else arrays)[name] = value
    run = jax.jit(lambda a, k: watched(plan, watch)(*a, **k, **static))
    jax.block_until_ready(run(args, arrays))
    jax.effects_barrier()
    return seen


def make_plan(watched: Callable, args, kwargs, threshold: int = 8, by: str = "rms") -> Plan:
    """See `trainer.propagation.calibrate`. watched(plan, watch): the transformed function that tells of its values."""
    parse(Statistic, "by", by)
    if not isinstance(threshold, (int, np.integer)) or threshold < 1:
        raise ValueError(f"calibrate: threshold={threshold!r}; accepted: an integer of at least 1 (powers of two)")
    first = _look(watched, Plan((), by, threshold), args, kwargs)
    plan = Plan((), by, threshold, first.range(), first.range())
    seen = first
    while seen.outside(threshold) and len(plan.places) < MAX_PLACES:
        path = seen.outside(threshold)[0]
        plan = _with(plan, (*plan.places, seen.places[path]))
        seen = _look(watched, plan, args, kwargs)
    for place in plan.places:
        fewer = _with(plan, tuple(p for p in plan.places if p is not place))
        tried = _look(watched, fewer, args, kwargs)
        if not tried.outside(threshold):
            plan, seen = fewer, tried
    return Plan(plan.places, by, threshold, first.range(), seen.range())


def _with(plan: Plan, places) -> Plan:
    return Plan(places, plan.by, plan.threshold, plan.drift, plan.remaining)
