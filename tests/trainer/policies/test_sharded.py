"""Rows over eight devices: rotations, masks, random bits and blocks are those of the whole tensor where blocks do not cross devices."""
from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

import trainer
from tests.trainer.policies.networks import policy
from trainer.operands import RowShards

N, K, M, DEVICES = 256, 64, 32, 8  # 32 rows a device
KEY = jnp.array([21, 22], jnp.uint32)


def _products(x, w, g, which, rows=None):
    y, backward = jax.vjp(lambda x, w: trainer.linear(x, w, which, KEY, rows), x, w)
    return (y, *backward(g))


# Blocks scaled by their own RMS under a scale of the whole tensor: only the latter is anybody else's.
TWO_LEVELS = [f"precision.activations.{key}" for key in ("format=float4_e2m1fn", "granularity=block", "block=16", "two_level=true", "amax=rms")]


@pytest.mark.parametrize("name", [["quartet"], ["nvfp4_recipe"], ["luq"], ["float32", *TWO_LEVELS]], ids=lambda name: name[0])
def test_rows_over_devices(name):
    """y, dx, dw of one device, to the order of float32 sums: no value is rounded to another side, since what is rounded is made of whole
    rows, or of whole blocks of rows. The largest values lie on one device."""
    rng = np.random.default_rng(23)
    x, w, g = (rng.standard_normal(shape).astype(np.float32) for shape in ((N, K), (K, M), (N, M)))
    x[40:50] *= 7.0
    g[200:210] *= 7.0
    which = policy(*name)
    mesh = Mesh(np.array(jax.devices()[:DEVICES]), ("data",), axis_types=(AxisType.Auto,))

    def local(x, w, g):
        y, dx, dw = _products(x, w, g, which, RowShards("data"))
        return y, dx, lax.psum(dw, "data")

    rows = P("data")
    sharded = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(rows, P(), rows), out_specs=(rows, rows, P()), check_vma=False))
    for found, expected in zip(sharded(x, w, g), jax.jit(_products)(x, w, g, which)):
        assert np.linalg.norm(found - expected) <= 1e-6 * np.linalg.norm(expected)
