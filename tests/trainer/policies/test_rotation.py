"""Block rotations: what they are, that they cancel in a product, and which of them move a quantizer's error.

Shapes: N tokens, K inputs, M outputs.
"""
from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import formats
import trainer
from tests.trainer.policies.numpy_policies import Words, rotated
from trainer.keys import fold_in
from trainer.methods.rotation import Kind, Rotation, rotate, rotate_back
from trainer.operands import ROTATION
from trainer.precision import Operand, PrecisionPolicy, Quantizer

N, K, M = 56, 40, 72
KEY = jnp.array([11, 12], jnp.uint32)


def _whole_numbers(seed=0):
    """x, w, g of small integers: of blocks of 16 and 64, where the factor is 1/4 and 1/8, all sums are exact."""
    rng = np.random.default_rng(seed)
    return [rng.integers(-8, 9, shape).astype(np.float32) for shape in ((N, K), (K, M), (N, M))]


@jax.jit
def _products(which, x, w, g):
    y, backward = jax.vjp(lambda x, w: trainer.linear(x, w, which, KEY), x, w)
    return (y, *backward(g))


def _turned_only(kind: Kind, block: int, chained: bool) -> PrecisionPolicy:
    """float32 as the format. chained: as Quartet has it, rotated for the forward and again, another way, for the backward; otherwise as
    NVFP4 training has it, in every product for itself."""
    turn, plain = Rotation(kind, block), Rotation(Kind.HADAMARD, 64 if block == 64 else 16)
    once, twice = (Quantizer(formats.identity(), source="none", transform=t) for t in (plain if chained else turn, turn))
    forward = Operand(once, twice, shared=False, chained=chained)
    return PrecisionPolicy(forward, forward, Operand(twice, twice, shared=False))


@pytest.mark.parametrize("chained", [True, False], ids=["chained", "fresh"])
@pytest.mark.parametrize(("kind", "block"), [(Kind.RANDOM_HADAMARD, 16), (Kind.HADAMARD_SIGNS, 64), (Kind.RANDOM_HADAMARD, 32),
                                             (Kind.RANDOM_ORTHOGONAL, 24)], ids=lambda value: str(getattr(value, "value", value)))  # fmt: skip
def test_cancels_where_nothing_is_rounded(kind, block, chained):
    """The three products are those without rotation, in dimensions that no block divides: to the bit where the factor is a power of two,
    else to the rounding of float32 sums."""
    x, w, g = _whole_numbers()
    for found, left, right in zip(_products(_turned_only(kind, block, chained), x, w, g), (x, g, x.T), (w, w.T, g)):
        if block in (16, 64):
            assert np.array_equal(found, left @ right)
        else:
            assert np.max(np.abs(found - left @ right)) <= 1e-6 * np.max(np.abs(left) @ np.abs(right))


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("kind", Kind, ids=lambda kind: kind.value)
def test_orthogonal_and_undone(kind, dim):
    """Lengths are kept, what was filled up goes again, and the matrix is one for all blocks: R R^T = 1 to float32."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((40, 40)).astype(np.float32)
    turn = Rotation(kind, 16)
    y = rotate(x, turn, dim, KEY)
    assert y.shape == ((48, 40) if dim == 0 else (40, 48))
    assert np.linalg.norm(y) == pytest.approx(np.linalg.norm(x), rel=1e-6)
    np.testing.assert_allclose(rotate_back(y, turn, dim, 40, KEY), x, atol=2e-6)
    matrix = np.asarray(rotate(np.eye(48, dtype=np.float32), turn, 1, KEY))
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(48), atol=1e-6)
    assert np.array_equal(matrix, np.kron(np.eye(3), matrix[:16, :16])) and np.count_nonzero(matrix[:16, :16]) == 256
    if kind is not Kind.RANDOM_ORTHOGONAL:
        whole = rng.integers(-9, 10, (40, 40)).astype(np.float32)
        assert np.array_equal(rotate_back(rotate(whole, turn, dim, KEY), turn, dim, 40, KEY), whole)


def test_matrices_are_numpys():
    """Signs before or after the Hadamard, as named, from the highest bits of the key's words; another key, other signs."""
    x = np.random.default_rng(2).standard_normal((8, 32)).astype(np.float32)
    signs = Words(KEY).signs(32)
    key = fold_in(KEY, ROTATION)
    for kind, before, after in ((Kind.HADAMARD, 1.0, 1.0), (Kind.RANDOM_HADAMARD, signs, 1.0), (Kind.HADAMARD_SIGNS, 1.0, signs)):
        np.testing.assert_allclose(rotate(x, Rotation(kind, 32), 1, key), rotated(x, 1, 32, before, after), atol=2e-6)
    assert 8 <= np.sum(signs > 0) <= 24 and 4 <= np.sum(signs != Words(fold_in(KEY, 0)).signs(32)) <= 28


def test_random_orthogonal_is_uniform():
    """Over all orthogonal matrices: entries of mean 0 and mean square 1/n, a trace of mean 0 and variance 1 (an unfixed QR has a trace far
    from it), to 5 standard errors of 2000."""
    keys = np.random.default_rng(3).integers(0, 2**32, (2000, 2), dtype=np.uint32)
    matrices = np.asarray(jax.jit(jax.vmap(lambda key: rotate(jnp.eye(4), Rotation(Kind.RANDOM_ORTHOGONAL, 4), 1, key)))(keys), np.float64)
    assert np.max(np.abs(matrices.mean(0))) < 5 * (1 / 4 / 2000) ** 0.5
    assert np.max(np.abs((matrices**2).mean(0) - 1 / 4)) < 5 * (1 / 8 / 2000) ** 0.5  # the variance of a square: 3 / (n (n + 2)) - 1 / n^2 = 1/16
    traces = np.trace(matrices, axis1=1, axis2=2)
    assert abs(traces.mean()) < 5 / 2000**0.5 and abs(traces.var() - 1) < 5 * (2 / 2000) ** 0.5


def test_signs_after_the_hadamard_change_nothing():
    """The trap of Quartet's released code: with nearest rounding on a grid symmetric in sign, H S gives the dw of H, to the bit and for
    every key; S H gives others."""
    rng = np.random.default_rng(4)
    x, w, g = (rng.standard_normal(shape).astype(np.float32) for shape in ((64, 32), (32, 64), (64, 64)))

    @partial(jax.jit, static_argnums=0)
    def dw(kind, key):
        operand = Operand(None, Quantizer(formats.get("mxfp4"), transform=Rotation(kind, 32)), shared=False)
        return jax.vjp(lambda w: trainer.linear(x, w, PrecisionPolicy(activations=operand, output_gradients=operand), key), w)[1](g)[0]

    plain, keys = np.asarray(dw(Kind.HADAMARD, KEY)), [fold_in(KEY, i) for i in range(3)]
    assert 0.05 < np.linalg.norm(plain - x.T @ g) / np.linalg.norm(plain) < 0.3
    assert all(np.array_equal(dw(Kind.HADAMARD_SIGNS, key), plain) for key in keys)
    found = [plain, *(np.asarray(dw(Kind.RANDOM_HADAMARD, key)) for key in keys)]
    for i, one in enumerate(found):
        assert all(np.linalg.norm(one - other) > 0.01 * np.linalg.norm(plain) for other in found[:i])


def test_quantization_error_by_kind():
    """The same of single operands: the error of MXFP4 is that of no signs for H S, and differs for S H."""
    x = np.random.default_rng(5).standard_t(3, (64, 32)).astype(np.float32)

    def error(kind, key):
        y = rotate(x, Rotation(kind, 32), 1, key)
        return float(jnp.sum(jnp.square(formats.quantize(y, "mxfp4") - y)))

    plain = error(Kind.HADAMARD, None)
    keys = [fold_in(KEY, i) for i in range(3)]
    assert {error(Kind.HADAMARD_SIGNS, key) for key in keys} == {plain}
    assert len({error(Kind.RANDOM_HADAMARD, key) for key in keys} | {plain}) == 4
