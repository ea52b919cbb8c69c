"""The three matrix products of the low-precision linear layer against plain numpy, shared and split, sharded and stochastic.

Shapes: N tokens (rows), K inputs, M outputs.
"""
from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

import formats
import trainer
from tests.trainer import numpy_quantizers as nq
from trainer.keys import fold_in
from trainer.linear import RowShards, linear
from trainer.precision import Operand, PrecisionPolicy, Quantizer

N, K, M = 48, 40, 56  # the last block of 32 is short along each


def _arrays(seed: int = 0, rows: int = N):
    """x, w, dy with rows and columns of very different size, so that scales along the wrong dimension show."""
    rng = np.random.default_rng(seed)

    def matrix(height, width):
        sizes = np.exp(rng.uniform(-4, 4, (height, 1)) + rng.uniform(-2, 2, (1, width)))
        return (rng.standard_normal((height, width)) * sizes).astype(np.float32)

    return matrix(rows, K), matrix(K, M), matrix(rows, M)


@jax.jit
def _three_products(x, w, dy, policy, key=None):
    """y, dx and dw; the policy's widths are arguments of the compiled program."""
    y, backward = jax.vjp(lambda x, w: linear(x, w, policy, key), jnp.asarray(x), jnp.asarray(w))
    return (y, *backward(jnp.asarray(dy)))


# Policy (preset and overrides) -> quantizers of (weights forward, weights dgrad, activations forward, activations wgrad,
# output gradients dgrad, output gradients wgrad); None: quantized once for both products, along the first one's contraction.
CASES = {
    "float32": (["float32"], (nq.nothing,) * 6),
    "bfloat16": (["bfloat16"], (nq.bfloat16,) * 6),
    "int4": (["int", "precision.bits=4"], (nq.integer(4, "vector"), None, nq.integer(4, "vector"), None, nq.nothing, nq.nothing)),
    "int8": (["int8"], (nq.integer(8, "vector"), None, nq.integer(8, "vector"), None, nq.nothing, nq.nothing)),
    "fp8": (["fp8"], (nq.minifloat("e4m3fn"), None, nq.minifloat("e4m3fn"), None, nq.minifloat("e5m2"), None)),
    "mxfp4": (["mxfp4"], (nq.mx("e2m1"),) * 6),
    "nvfp4": (["nvfp4"], (nq.nvfp4(),) * 6),
    "mxfp6": (["mxfp6"], (nq.mx("e2m3"),) * 4 + (nq.mx("e3m2"),) * 2),
    "mxfp8": (["mxfp8"], (nq.mx("e4m3fn"),) * 4 + (nq.mx("e5m2"),) * 2),
    "dgrad of its own": (
        ["int4", "precision.weights.dgrad.bits=8", "precision.weights.dgrad.granularity=tensor"],
        (nq.integer(4, "vector"), nq.integer(8, "tensor"), nq.integer(4, "vector"), None, nq.nothing, nq.nothing),
    ),
    "wgrad high": (
        ["fp8", "precision.activations.wgrad.format=float32", "precision.output_gradients.wgrad.format=float32"],
        (nq.minifloat("e4m3fn"), None, nq.minifloat("e4m3fn"), nq.nothing, nq.minifloat("e5m2"), nq.nothing),
    ),
    "every product another": (
        ["float32", "precision.weights.forward.format=mxfp4", "precision.activations.wgrad.format=integer",
         "precision.activations.wgrad.bits=5", "precision.activations.wgrad.granularity=channel",
         "precision.output_gradients.dgrad.format=float8_e5m2", "precision.output_gradients.dgrad.source=none"],
        (nq.mx("e2m1"), nq.nothing, nq.nothing, nq.integer(5, "vector"), nq.unscaled("e5m2"), nq.nothing),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_three_products_equal_numpy(name):
    """Forward, dgrad and wgrad: the products of what numpy's quantizers return, to what float32 accumulation allows."""
    overrides, (w_fwd, w_dgrad, x_fwd, x_wgrad, g_dgrad, g_wgrad) = CASES[name]
    x, w, dy = _arrays()
    found = _three_products(x, w, dy, trainer.policy(*overrides))
    x_1, w_1, g_1 = x_fwd(x, 1), w_fwd(w, 0), g_dgrad(dy, 1)
    x_2 = x_1 if x_wgrad is None else x_wgrad(x, 0)
    w_2 = w_1 if w_dgrad is None else w_dgrad(w, 1)
    g_2 = g_1 if g_wgrad is None else g_wgrad(dy, 0)
    for what, got, (left, right) in zip(("y", "dx", "dw"), found, ((x_1, w_1), (g_1, w_2.T), (x_2.T, g_2))):
        assert got.dtype == jnp.float32
        error, size = np.abs(np.asarray(got, np.float64) - left @ right), np.abs(left) @ np.abs(right)
        assert np.all(error <= 2e-6 * size), what


def test_the_oracle_tells_the_cases_apart():
    """The cases above differ from each other by far more than their tolerance: none could pass for another."""
    x, _, _ = _arrays()
    quantized = [q(x, d) for q in (nq.nothing, nq.bfloat16, nq.integer(4, "vector"), nq.integer(4, "tensor"), nq.minifloat("e4m3fn"),
                                   nq.minifloat("e5m2"), nq.mx("e2m1"), nq.mx("e2m3")) for d in (0, 1)]  # fmt: skip
    for i, one in enumerate(quantized):
        for j, other in enumerate(quantized[:i]):
            along_both = {i, j} in ({0, 1}, {2, 3}, {6, 7}, {8, 9}, {10, 11})  # per element or per tensor: no direction
            assert along_both == bool(np.array_equal(one, other))


def test_widths_traced_or_constant():
    """The same bits whether a width is compiled in or an argument, and one program for all of them."""
    x, w, dy = _arrays()
    compiled = _three_products.lower(x, w, dy, trainer.policy("int")).compile()
    for bits in (2, 5, 32):
        policy = trainer.policy("int", f"precision.bits={bits}")
        constant = jax.jit(lambda x, w, dy: _three_products(x, w, dy, policy))
        for one, other in zip(compiled(x, w, dy, policy), constant(x, w, dy)):
            assert np.array_equal(one, other)


def test_32_bits_are_float32():
    """The width that means float32 in a program of traced widths changes no value: same dots on the same numbers."""
    x, w, dy = _arrays()
    for one, other in zip(_three_products(x, w, dy, trainer.policy("int", "precision.bits=32")), _three_products(x, w, dy, PrecisionPolicy())):
        np.testing.assert_array_equal(one, other)


def test_cotangent_is_not_narrowed():
    """Where output gradients are not quantized, dgrad sees them whole: dx of an int2 layer is linear in dy, to float32."""
    x, w, dy = _arrays()
    policy = trainer.policy("int", "precision.bits=2")
    one, other, both = (_three_products(x, w, g, policy)[1] for g in (dy, dy[::-1], dy + dy[::-1]))
    size = np.abs(dy) @ np.abs(w.T) + np.abs(dy[::-1]) @ np.abs(w.T)
    assert np.max(np.abs(one + other - both) / size) < 1e-6


# --- stochastic rounding ----------------------------------------------------------------------------------------------


def _stochastic(shared: bool) -> PrecisionPolicy:
    """int4 per tensor, stochastic, in all six operands."""
    quantizer = Quantizer(formats.scaled(formats.integer(4), "tensor"), "stochastic")
    return PrecisionPolicy(*(Operand(quantizer, None if shared else quantizer, shared) for _ in range(3)))


def test_stochastic_needs_a_key():
    x, w, _ = _arrays()
    with pytest.raises(ValueError, match="needs key="):
        linear(jnp.asarray(x), jnp.asarray(w), _stochastic(True))


def _whole_range(rng, shape):
    """Numbers in [-7, 7] that hold 7: their int4 scale is exactly 1, so that all products of narrow values are whole."""
    x = rng.uniform(-7, 7, shape).astype(np.float32)
    x[0, 0] = 7.0
    return x


@pytest.mark.parametrize("shared", [True, False])
def test_stochastic_is_unbiased(shared):
    """Averaged over keys the three products are those without rounding; operands must therefore have bits of their own."""
    rng = np.random.default_rng(1)
    x, w, dy = (_whole_range(rng, shape) for shape in ((8, 6), (6, 10), (8, 10)))
    keys = jnp.asarray(rng.integers(0, 2**32, (1000, 2), dtype=np.uint32))
    products = jax.jit(jax.vmap(lambda key: _three_products(x, w, dy, _stochastic(shared), key)))(keys)
    for found, expected in zip(products, (x @ w, dy @ w.T, x.T @ dy)):
        found = np.asarray(found, np.float64)
        z = (found.mean(0) - expected) / (found.std(0) / np.sqrt(len(keys)) + 1e-9)
        assert np.max(np.abs(z)) < 4.5 and 0.7 < np.std(z) < 1.3


def test_stochastic_bits_belong_to_key_and_operand():
    """Same key, same bits; another key or another layer's key, other bits; x's bits are not w's."""
    x = np.full((16, 16), 0.5, np.float32)
    x[0, 0] = 7.0
    eye = np.eye(16, dtype=np.float32) * 7

    product = jax.jit(linear)

    def narrow_x(key):
        return np.asarray(product(x, eye, _stochastic(True), key)) / 7

    def narrow_w(key):
        return np.asarray(product(eye, x, _stochastic(True), key)) / 7

    key = jnp.array([3, 4], jnp.uint32)
    np.testing.assert_array_equal(narrow_x(key), narrow_x(key))
    samples = [narrow_x(key), narrow_w(key), narrow_x(fold_in(key, 0)), narrow_x(fold_in(key, 1)), narrow_x(jnp.array([4, 3], jnp.uint32))]
    for i, one in enumerate(samples):
        assert set(np.unique(one)) == {0.0, 1.0, 7.0}
        for other in samples[:i]:
            assert 0.3 < np.mean(one != other) < 0.7  # independent halves differ in half of the places


# --- rows over devices ------------------------------------------------------------------------------------------------


def _sharded(policy, x, w, dy, key, num_devices=4):
    """The three products with rows split over devices, wgrad summed over them."""
    mesh = Mesh(np.array(jax.devices()[:num_devices]), ("data",), axis_types=(AxisType.Auto,))

    def local(x, w, dy):
        y, backward = jax.vjp(lambda x, w: linear(x, w, policy, key, RowShards("data")), x, w)
        dx, dw = backward(dy)
        return y, dx, lax.psum(dw, "data")

    rows = P("data")
    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(rows, P(), rows), out_specs=(rows, rows, P()), check_vma=False))(x, w, dy)


@pytest.mark.parametrize("shared", [True, False])
def test_stochastic_bits_are_the_same_for_sharded_rows(shared):
    """Random bits and per-tensor scales are those of the whole tensor. All sums are of whole numbers: equality is exact."""
    rng = np.random.default_rng(2)
    x, w, dy = (_whole_range(rng, shape) for shape in ((16, 12), (12, 20), (16, 20)))
    key = jnp.array([1, 2], jnp.uint32)
    whole = _three_products(x, w, dy, _stochastic(shared), key)
    for one, other in zip(_sharded(_stochastic(shared), x, w, dy, key), whole):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", ["int4", "fp8", "mxfp4", "nvfp4", "every product another"])
def test_sharded_rows_have_the_scales_of_the_whole(name):
    """Every granularity, also where a scale runs down the rows: what the whole tensor's quantizer gives, to summation order.
    (Blocks along the rows do not cross devices; a device's 64 rows here are whole blocks.)"""
    policy = trainer.policy(*CASES[name][0])
    x, w, dy = _arrays(3, rows=256)
    x[:64] *= 5.0  # one device holds the largest values
    found, expected = _sharded(policy, x, w, dy, None), _three_products(x, w, dy, policy)
    for one, other in zip(found, expected):
        assert np.max(np.abs(one - other)) <= 1e-6 * np.max(np.abs(other))
