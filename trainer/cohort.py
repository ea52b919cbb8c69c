"""Many runs in one program: a `member` axis over devices, the batch of a single run over a `data` axis (DESIGN 3.8).

The same program serves one run and fifty: states and hyper-parameters are stacked on a leading axis M, sharded over the mesh axis
`member`; each device runs its members one after another (`map`) or side by side (`vmap`); with one member the batch is split over
the mesh axis `data` instead. A member that has nothing to do is skipped, not computed and masked, so members of different
length share a program at no cost under `map`.

Shapes: M members, S steps per dispatch, B batch, T time, W validation windows.
"""
from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from trainer import distributed
from trainer import model as decoder
from trainer import step as steps
from trainer.config.frozen import Options
from trainer.keys import fold_in
from trainer.sharding import DATA, Sharding

MEMBER = "member"
INNER = "inner"  # the axis of the members of one device under vmap
EVAL_SALT = 0x45564C  # evaluation's random bits are apart from every step's


def use_host_devices(count: int | None = None) -> None:
    """On a CPU, one XLA device per core; call before the first JAX computation, later calls change nothing."""
    if count is None:
        count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # JAX is already running: its devices stay as they are
        return


def device_memory() -> int | None:
    """Bytes that a program may take on one device: what an accelerator's allocator has, or a share of what this process has of the machine's
    memory and could still get. None where nobody tells."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    try:
        with open("/proc/meminfo") as file:
            free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
        with open("/proc/self/statm") as file:
            mine = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, StopIteration):
        return None
    return (free + mine) // jax.local_device_count()


def use_devices(options: Options) -> None:
    """Host devices, and the other processes of a run that spans several, as the options say; before the first JAX computation."""
    use_host_devices(options.host_devices)
    if options.sharding is not None:
        distributed.join(options.distributed)


@dataclass(frozen=True)
class Layout:
    """How members and batches lie on devices. Results are bitwise reproducible within one layout."""

    member_devices: int
    data_devices: int
    inner: str  # "map" or "vmap"; of one run over all devices, a `Sharding`

    @property
    def num_devices(self) -> int:
        return self.member_devices * self.data_devices

    @property
    def sharding(self) -> Sharding | None:
        """How one run lies on many devices as a whole; None where every device has a program of its own part."""
        return None if self.inner in ("map", "vmap") else Sharding(self.inner)

    @property
    def name(self) -> str:
        """The `layout` of a run record: kind, members' devices x data devices."""
        if self.sharding is not None:
            return f"{self.inner}/{self.data_devices}"
        if self.member_devices == 1 and self.inner == "map":
            return f"solo/{self.data_devices}"
        return f"{self.inner}/{self.member_devices}x{self.data_devices}"


def choose_layout(num_members: int, sequences: int, num_devices: int | None = None) -> Layout:
    """One run splits its batch over the devices; several runs are dealt out to them. `map` inside a CPU device, `vmap` elsewhere.
    `sequences`: what has to be split evenly (the common divisor of micro-batch and validation windows)."""
    devices = jax.devices()
    num_devices = num_devices or len(devices)
    inner = "map" if devices[0].platform == "cpu" else "vmap"
    if num_members > 1:
        return Layout(min(num_devices, num_members), 1, inner)
    data = max(n for n in range(1, num_devices + 1) if sequences % n == 0)
    return Layout(1, data, "map")


def global_layout(sharding: str) -> Layout:
    """One run over all devices, those of other processes included."""
    return Layout(1, jax.device_count(), Sharding(sharding).value)


def is_possible(layout: Layout) -> bool:
    """Whether this launch has the devices: at least as many, and with several processes exactly those, since each has a part to do."""
    if distributed.several():
        return layout.sharding is not None and layout.num_devices == jax.device_count()
    return layout.num_devices <= jax.device_count()


def _spread(array: np.ndarray, dim: int, groups: int, devices: int) -> np.ndarray:
    """Reorder `dim` so that, cut into `devices` contiguous shards of `groups` parts each, the g-th parts of all shards together are the
    g-th of `groups` contiguous parts of the original: which values share a scale then does not depend on the number of devices.
    Exchanging groups and devices undoes it."""
    if groups == 1 or devices == 1:
        return array
    shape = array.shape
    cut = array.reshape(*shape[:dim], groups, devices, -1, *shape[dim + 1:])
    return np.swapaxes(cut, dim, dim + 1).reshape(shape)


def _row(array, slot: int) -> np.ndarray:
    """array[slot] on the host, from the device that holds it."""
    for shard in array.addressable_shards:
        start, stop, _ = shard.index[0].indices(len(array))
        if start <= slot < stop:
            return np.asarray(shard.data)[slot - start]
    raise ValueError(f"slot {slot} of {len(array)} lies on another process")


class Call(NamedTuple):
    """A function of the devices, and what it is called with; donate: which of the arguments it may overwrite."""

    name: str
    function: Callable
    args: tuple
    donate: tuple[int, ...] = ()

    def abstract(self) -> Call:
        """The same with shapes, dtypes and devices in the place of arrays."""
        return self._replace(args=jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) if isinstance(x, jax.Array) else x, self.args))


class Program:
    """The compiled functions of one structure in one layout. `compiles` counts them, `compile_seconds` adds how long they were waited for."""

    def __init__(self, structure: steps.StepStructure, layout: Layout):
        devices = np.array(jax.devices()[: layout.num_devices])
        self.structure, self.layout = structure, layout
        self.mesh = Mesh(devices.reshape(layout.member_devices, layout.data_devices), (MEMBER, DATA), axis_types=(AxisType.Auto,) * 2)
        self.graphdef, _ = decoder.blueprint(structure.model)
        self.compile_seconds = 0.0
        self._cache: dict[tuple, Future] = {}  # what was compiled, by what it is called with
        self._lock = threading.Lock()  # of the cache: of several threads that want a function one compiles it
        self._used: dict = {}  # of each name what was called last
        self._shards = 1 if layout.sharding else layout.data_devices  # of a batch that the program itself tells apart
        self._data_axis = DATA if self._shards > 1 else None

    def put(self, tree):
        """Stacked host arrays onto the mesh, sharded over members."""
        return jax.device_put(tree, NamedSharding(self.mesh, P(MEMBER)))

    def fetch(self, tree):
        """Arrays of the program as NumPy arrays."""
        return jax.device_get(tree)

    def _each(self, function):
        """`function` over the members of one device."""
        return partial(lax.map, lambda args: function(*args)) if self.layout.inner == "map" else lambda args: jax.vmap(function, axis_name=INNER)(*args)

    @property
    def compiles(self) -> int:
        """How many functions were compiled."""
        return len(self._cache)

    def _sharded(self, name, function, in_specs, out_specs, args, donate=()) -> Call:
        """`function` of each device's part of the arguments."""
        return Call(name, jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False), args, donate)

    def _do(self, call: Call, out_shardings=None):
        began = time.perf_counter()
        executable = self._executable(call, out_shardings)
        self.compile_seconds += time.perf_counter() - began
        if self._used.get(call.name) is not executable:
            self._used[call.name] = executable
            if call.name == "run":
                self._check_memory(self.peak_bytes())
        return executable(*call.args)

    def _executable(self, call: Call, out_shardings=None):
        """The compiled function, once for all calls that differ in values alone."""
        signature = (call.name, jax.tree.structure(call.args), tuple((x.shape, x.dtype) for x in jax.tree.leaves(call.args)))
        with self._lock:
            known = self._cache.get(signature)
            compiled = self._cache.setdefault(signature, Future()) if known is None else known
        if known is None:
            try:
                compiled.set_result(jax.jit(call.function, donate_argnums=call.donate, out_shardings=out_shardings).lower(*call.args).compile())
            except BaseException as error:
                del self._cache[signature]  # whoever asks again tries again
                compiled.set_exception(error)
        return compiled.result()

    def prepare(self, states, hyper, windows_WT1, probed_BT1) -> None:
        """Begin, in threads of their own, to compile what is called after training: evaluation on those windows, and the probe where
        probed_BT1 is not None."""
        calls = [self._evaluation(states, hyper, windows_WT1, np.ones(len(hyper.key), bool))]
        if probed_BT1 is not None:
            calls.append(self._probing(states, hyper, probed_BT1, 0))
        for call in calls:
            threading.Thread(target=_quietly, args=(self._executable, call.abstract())).start()

    def _check_memory(self, wanted: int | None) -> None:
        """MemoryError if a device of this layout has less than `wanted` bytes."""
        limit = device_memory()
        if wanted is not None and limit is not None and wanted > limit:
            raise MemoryError(f"{wanted / 2**30:.2f} GiB are wanted on each of {self.layout.num_devices} devices, which have {limit / 2**30:.2f}")

    def peak_bytes(self) -> int | None:
        """What the training that was last dispatched takes at once on a device, as the compiler laid it out: arguments, results and
        intermediate values. None before the first dispatch, and where the backend does not tell."""
        stats = self._used["run"].memory_analysis() if "run" in self._used else None
        if stats is None:
            return None
        return stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes + stats.temp_size_in_bytes

    def init(self, hyper):
        """Fresh states [M, ...] from stacked hyper-parameters. MemoryError where they, or later a step, do not fit (as does a device that
        runs out)."""
        each = self._each(lambda h: steps.init(self.structure, h))
        self._check_memory(sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(lambda h: each((h,)), hyper))) // self.layout.member_devices)
        return self._do(self._sharded("init", lambda h: each((h,)), P(MEMBER), P(MEMBER), (hyper,)))

    def begin(self, hyper, slot: int, given: dict[str, np.ndarray]) -> steps.State:
        """The fresh state of the member in that slot with these parameters (`step.init`)."""
        return self._do(self._single("begin", partial(steps.init, self.structure), (self._alone(hyper, slot), given)))

    def run(self, states, hyper, tokens_MSBT1, stop_M):
        """Up to S steps of every member, none beyond its `stop`: (states, metrics [M, S], diverged_step [M]); a skipped step's
        metrics are NaN. The states passed in are donated."""
        member_axis = INNER if self.layout.inner == "vmap" else None
        one_step = partial(steps.step, self.structure, self.graphdef, data_axis=self._data_axis, member_axis=member_axis)

        def idle(state, tokens, hyper):
            del tokens
            return state, steps.no_metrics(self.structure, hyper.policy)

        def member(state, hyper, tokens_SBT1, stop):
            def body(state, tokens):
                active = (state.step < stop) & (state.diverged_step < 0)
                return lax.cond(active, one_step, idle, state, tokens.astype(jnp.int32), hyper)

            state, metrics = lax.scan(body, state, tokens_SBT1)
            return state, metrics, state.diverged_step

        each = self._each(member)
        tokens_MSBT1 = _spread(tokens_MSBT1, 2, self.structure.accumulate, self._shards)
        specs = (P(MEMBER), P(MEMBER), P(MEMBER, None, DATA), P(MEMBER))
        return self._do(self._sharded("run", lambda *args: each(args), specs, P(MEMBER), (states, hyper, tokens_MSBT1, stop_M), donate=(0,)))

    def probe(self, states, hyper, windows_BT1, slot: int) -> steps.Probe:
        """`step.probe` of the member in that slot. It runs once, so it is made to compile fast: on one device (dividing a program over
        several is half of its compilation) and with the layers scanned."""
        return self._do(self._probing(states, hyper, windows_BT1, slot))

    def _probing(self, states, hyper, windows_BT1, slot: int) -> Call:
        state, hyper = self._alone((states, hyper), slot)
        graphdef, _ = decoder.blueprint(dataclasses.replace(self.structure.model, scan_layers=True))
        measure = partial(steps.probe, self.structure, graphdef)
        return self._single("probe", measure, (state, windows_BT1.astype(np.int32), hyper))

    def _single(self, name, function, args) -> Call:
        """function(*args), of one member alone, on the first device."""
        return Call(name, function, jax.device_put(args, jax.devices()[0]))

    def _alone(self, stacked, slot: int):
        """One member's part of stacked arrays, on the first device."""
        return jax.device_put(jax.tree.map(lambda x: _row(x, slot), stacked), jax.devices()[0])

    def evaluate(self, states, hyper, windows_WT1, wanted_M):
        """Losses of the wanted (bool) members on every window, [M, W]; NaN for the others."""
        losses_MW = self._do(self._evaluation(states, hyper, windows_WT1, wanted_M))
        return _spread(np.asarray(losses_MW), 1, self._shards, steps.eval_groups(len(windows_WT1), self._shards))

    def _evaluation(self, states, hyper, windows_WT1, wanted_M) -> Call:
        def local(params, histories, hyper, windows, wanted):
            def measure(params, histories, hyper):
                key = fold_in(hyper.key, EVAL_SALT)
                return steps.evaluate(self.graphdef, params, histories, windows.astype(jnp.int32), hyper.policy, key, self._data_axis)

            def skip(params, histories, hyper):
                del params, histories, hyper
                return jnp.full((windows.shape[0],), jnp.nan, jnp.float32)

            def member(params, histories, hyper, wanted):
                return lax.cond(wanted, measure, skip, params, histories, hyper)

            return self._each(member)((params, histories, hyper, wanted))

        specs = (P(MEMBER), P(MEMBER), P(MEMBER), P(DATA), P(MEMBER))
        spread = _spread(windows_WT1, 0, steps.eval_groups(len(windows_WT1), self._shards), self._shards)
        return self._sharded("evaluate", local, specs, P(MEMBER, DATA), (states.params, states.histories, hyper, spread, wanted_M))


def _quietly(function, *args) -> None:
    """Without a word of what fails: whoever needs it will be told."""
    with contextlib.suppress(Exception):
        function(*args)
