"""Sums and maxima over devices, on which exponents differ."""
from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from tests.trainer.propagation.harness import primitives, value
from trainer import ScaledArray, propagate_scales

DEVICES = 4
MESH = Mesh(np.array(jax.devices()[:DEVICES]), ("device",), axis_types=(AxisType.Auto,))
CASES = {
    "psum": (lambda x: lax.psum(x, "device"), lambda x: x.sum(0)),
    "pmax": (lambda x: lax.pmax(x, "device"), lambda x: x.max(0)),
    "pmin": (lambda x: lax.pmin(x, "device"), lambda x: x.min(0)),
    "pmean": (lambda x: lax.pmean(x * 2.0, "device"), lambda x: 2 * x.mean(0)),
}


def _over_devices(body, check_vma: bool, wrap):
    """body on each device's row of x: data [device, n] and exponent [device]."""

    @jax.jit
    @functools.partial(jax.shard_map, mesh=MESH, in_specs=(P("device"), P("device")), out_specs=(P(), P()), check_vma=check_vma)
    def run(data, exponent):
        out = wrap(body)(ScaledArray(data[0], exponent[0]))
        return out.data, out.exponent

    return run


def covered() -> set[str]:
    """Primitives of the programs that are tested here."""
    found = set()
    for body, _ in CASES.values():
        for check_vma in (True, False):
            whole = jax.shard_map(lambda x, body=body: body(x[0]), mesh=MESH, in_specs=P("device"), out_specs=P(), check_vma=check_vma)
            found |= primitives(whole, jnp.ones((DEVICES, 3)))
    varied = jax.shard_map(lambda x: _varied(x), mesh=MESH, in_specs=P(), out_specs=P("device"))
    return (found | primitives(varied, jnp.ones((DEVICES, 3)))) & {"psum", "psum_invariant", "pmax", "pmin", "pvary"}


def _varied(x):
    return lax.pcast(x, "device", to="varying")


@pytest.mark.parametrize("check_vma", (True, False))
@pytest.mark.parametrize("dtype", (np.float32, np.float16))
@pytest.mark.parametrize("name", CASES)
def test_exponents_that_differ_between_devices(name, dtype, check_vma):
    body, oracle = CASES[name]
    data = np.random.default_rng(0).standard_normal((DEVICES, 5)).astype(dtype)
    exponent = np.array([60, 58, 3, -60], np.int32)
    out = ScaledArray(*_over_devices(body, check_vma, propagate_scales)(data, exponent))
    want = oracle(np.ldexp(data.astype(np.float64), exponent[:, None]))
    np.testing.assert_allclose(value(out), want, atol=(1e-6 if dtype == np.float32 else 4 * 2.0**-11) * np.abs(want).max(), rtol=0)


def test_a_value_made_to_vary_keeps_its_exponent():
    @jax.jit
    @functools.partial(jax.shard_map, mesh=MESH, in_specs=(P(), P()), out_specs=P("device"))
    def run(data, exponent):
        out = propagate_scales(lambda x: _varied(x) * 2.0)(ScaledArray(data, exponent))
        return ScaledArray(out.data[None], out.exponent[None])

    out = run(np.float32([1, 2, 3]), np.int32(200))
    np.testing.assert_array_equal(value(out), np.ldexp(np.broadcast_to([1.0, 2.0, 3.0], (DEVICES, 3)), 201))


@pytest.mark.parametrize("weights", [np.float32([1, 2]), np.float32(2)])
def test_parameters_that_are_the_same_on_all_devices(weights):
    """They are made to vary without the program saying so, and their gradient is summed."""
    x = np.float32([[1, 2], [3, 4], [5, 6], [7, 8]])

    def loss(w, x):
        return lax.psum((x * w).sum(), "device")

    @jax.jit
    @functools.partial(jax.shard_map, mesh=MESH, in_specs=(P(), P("device")), out_specs=P())
    def run(w, x):
        return propagate_scales(jax.value_and_grad(loss))(ScaledArray(w, jnp.int32(5)), ScaledArray(x[0], jnp.int32(-3)))

    total, gradient = run(weights, x)
    np.testing.assert_array_equal(value(total), (x * weights).sum() * 4)
    np.testing.assert_array_equal(value(gradient), (x.sum(0) if weights.ndim else x.sum()) / 8)


def test_shard_map_inside_falls_back():
    inner = jax.shard_map(lambda y: lax.psum(y * y, "device"), mesh=MESH, in_specs=P("device"), out_specs=P())
    run = propagate_scales(lambda x: inner(x) * 2.0)
    x = ScaledArray(np.float32([1, 2, 3, 4]), np.int32(3))
    np.testing.assert_array_equal(value(run(x)), [2 * 64 * 30])
    assert [name for name, _ in run.report(x).fallbacks] == ["shard_map"]


def test_sums_over_a_mapped_axis_inside():
    x = ScaledArray(np.float32([[1, 2], [3, 4], [5, 6]]), np.int32([4, 60, -60]))
    got = propagate_scales(lambda x: jax.vmap(lambda row: lax.psum(row, "row"), axis_name="row")(x))(x)
    np.testing.assert_allclose(value(got), np.broadcast_to(value(x).sum(0), (3, 2)), rtol=1e-6)
