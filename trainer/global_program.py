"""The program of one run over all devices: the same functions as a cohort's, written for whole tensors and divided by XLA (`sharding`).

With several processes each holds the shards of its own devices; what comes to the host comes to all of them.
"""
from __future__ import annotations

import jax
from jax.experimental import multihost_utils

from trainer import distributed
from trainer.cohort import Call, Program
from trainer.sharding import placements


class GlobalProgram(Program):
    """A `Program` for layouts with a `sharding`; one member."""

    def put(self, tree):
        """Host arrays onto the mesh, each as the rules place it. Every process gives the same values, and keeps its part."""
        return jax.tree.map(self._placed, tree, placements(tree, self.layout.sharding, self.mesh))

    @staticmethod
    def _placed(x, sharding):
        return x if isinstance(x, jax.Array) else jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    def fetch(self, tree):
        """Arrays of the program, whole, as NumPy arrays in every process."""
        return multihost_utils.process_allgather(tree, tiled=True) if distributed.several() else jax.device_get(tree)

    def _sharded(self, name, function, in_specs, out_specs, args, donate=()) -> Call:
        del in_specs, out_specs  # of a cohort's devices
        return Call(name, function, self.put(args), donate)

    def _do(self, call: Call, out_shardings=None):
        del out_shardings
        with jax.set_mesh(self.mesh):  # what `over_rows` goes by
            return super()._do(call, placements(jax.eval_shape(call.function, *call.args), self.layout.sharding, self.mesh))

    def _single(self, name, function, args) -> Call:
        return Call(name, function, self.put(args))

    def prepare(self, *what) -> None:
        """Nothing: programs of several processes are compiled in the same order in each."""

    def _alone(self, stacked, slot: int):
        return jax.tree.map(lambda x: x[slot], stacked)
