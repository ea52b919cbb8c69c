"""One run over many devices: which dimension of each array of the state lies over them, by rules from path to tactic.

A rule is a regular expression that is searched for in a leaf's path ("params/layers/down", "opt_state/0/mu/layers/down/codes") and a
tactic: of the leaf's shape and the number of devices, the dimension that is divided among them, None for none. The first rule that
matches decides; a leaf that none matches is whole on every device. Moments, and the codes and scales of packed state, have their
parameter's path inside their own, so the same rules place them.

Values are not touched: the step is written for the whole batch and the whole tensor, and XLA divides it (GSPMD). An amax, a block's
scale, a norm or a random bit (by global index) is the one of the whole tensor by construction; only the order of float32 sums differs
from one device.
"""
from __future__ import annotations

import re
from collections.abc import Callable
from enum import Enum

import jax
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

DATA = "data"  # the mesh axis over which batches are divided, and with FSDP the state

Tactic = Callable[[tuple[int, ...], int], int | None]


class Sharding(Enum):
    """How one run lies on many devices."""

    DATA = "data"  # the batch is divided, the state is whole on each
    FSDP = "fsdp"  # parameters and moments are divided too (Rajbhandari et al. 2020, arXiv 1910.02054, stage 3)


def replicate(shape: tuple[int, ...], num_devices: int) -> int | None:
    """Whole on every device."""
    del shape, num_devices
    return None


def largest(shape: tuple[int, ...], num_devices: int, first: int = 0) -> int | None:
    """The largest dimension, from the `first` on, that the devices divide evenly."""
    fitting = [dim for dim in range(first, len(shape)) if shape[dim] % num_devices == 0]
    return max(fitting, key=lambda dim: shape[dim], default=None)


def inside_layers(shape: tuple[int, ...], num_devices: int) -> int | None:
    """The largest dimension of a leaf [1, L, ...] but that of members and that of layers, so that a layer is gathered when its turn comes;
    of one that packing has flattened, the only one there is."""
    return largest(shape, num_devices, min(2, len(shape) - 1))


RULES: dict[Sharding, tuple[tuple[str, Tactic], ...]] = {
    Sharding.DATA: (),
    Sharding.FSDP: (
        (r"norm(/|$)|/steps/", replicate),  # gains and learned scales: too small to be worth a collective
        (r"(^|/)(params|opt_state)/(.*/)?layers/", inside_layers),
        (r"(^|/)(params|opt_state)/(.*/)?(embedding|head)(/|$)", largest),
    ),
}


def spec(path: str, shape: tuple[int, ...], sharding: Sharding, num_devices: int) -> P:
    """Where the leaf at that path lies."""
    tactic = next((tactic for pattern, tactic in RULES[sharding] if re.search(pattern, path)), replicate)
    dim = tactic(shape, num_devices)
    return P() if dim is None else P(*(None,) * dim, DATA)


def placements(tree, sharding: Sharding, mesh: Mesh):
    """The NamedSharding of every leaf (array, or anything with a shape) of a state, or of a tree that holds one."""

    def place(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, spec(name, leaf.shape, sharding, mesh.shape[DATA]))

    return jax.tree_util.tree_map_with_path(place, tree)


def over_rows(x: jax.Array) -> jax.Array:
    """x itself. Where a mesh divides batches and is left to XLA, its first dimension (sequences, or their tokens) is asked to lie over the
    devices, if they divide it: activations stay where their sequences are, and weights come to them. Elsewhere nothing is asked."""
    mesh = jax.sharding.get_abstract_mesh()
    if DATA not in mesh.auto_axes or x.shape[0] % mesh.shape[DATA]:
        return x
    return lax.with_sharding_constraint(x, P(DATA, *(None,) * (x.ndim - 1)))
