"""Integers against their papers: loss, gradients and an SGD step of a two-layer net through `trainer.linear`, and in numpy float64.

The criterion is that of test_two_layer_step.py: two of five runs agree to float32's own error, every run to 3 percent.
"""
from __future__ import annotations

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.trainer.policies import networks
from tests.trainer.policies.networks import RATE, SEEDS, errors
from tests.trainer.policies.numpy_integers import MAX_1960, quest, rowwise, tensor8
from tests.trainer.policies.numpy_policies import layer
from trainer.linear import linear

TOLERANCE, EVERY_RUN = 3e-6, 3e-2
# tokens, inputs, hidden, outputs. No block divides ODD, and an odd number of signs never adds up to zero, whose sign would be chance.
SHAPE, ODD = (48, 32, 32, 32), (45, 33, 33, 33)

CHEAP = {"xla_backend_optimization_level": 0}  # compiling is what these tests cost


@partial(jax.jit, compiler_options=CHEAP)
def _loss_and_gradients(which, tensors, keys):
    x, w1, w2, targets = tensors

    def loss(x, w1, w2):
        h = jnp.square(jax.nn.relu(linear(x, w1, which, keys[0])))
        return jnp.mean(jnp.square(linear(h, w2, which, keys[1]) - targets))

    return jax.value_and_grad(loss, (0, 1, 2))(x, w1, w2)


def _in_jax(which, seed: int, shape) -> dict[str, np.ndarray]:
    """As `networks.in_jax`, compiled whole."""
    x, w1, w2, targets = networks.data(seed, shape)
    before, (dx, dw1, dw2) = _loss_and_gradients(which, (x, w1, w2, targets), networks.keys(seed, 0))
    after, _ = _loss_and_gradients(which, (x, w1 - np.float32(RATE) * dw1, w2 - np.float32(RATE) * dw2, targets), networks.keys(seed, 1))
    return {name: np.asarray(a, np.float64) for name, a in {"loss": before, "dx": dx, "dw1": dw1, "dw2": dw2, "next loss": after}.items()}


# --- the two-layer net ------------------------------------------------------------------------------------------------------------------------


SPARED = {"forward": ("weights", "activations"), "dgrad": ("output_gradients", "weights"), "wgrad": ("activations", "output_gradients")}


def _spare(gemm: str) -> tuple[str, ...]:
    return ("int_rowwise", *(f"precision.{role}.{gemm}.format=float32" for role in SPARED[gemm]))


def _multiple(bits: int) -> float:
    """What the preset takes for the Gaussian-optimal multiple; `test_quest_takes_the_gaussian_optimum` says that it is."""
    return float(networks.policy("quest", f"precision.bits={bits}").weights.first.format.amax_at)


CASES = {
    "int_rowwise 8": (("int_rowwise",), rowwise(8)), "int_rowwise 4": (("int_rowwise", "precision.bits=4"), rowwise(4)),
    "int_rowwise 1": (("int_rowwise", "precision.bits=1"), rowwise(1)),
    "int8_tensor": (("int8_tensor",), layer(tensor8(), tensor8(), None, None, tensor8(True), None)),
    **{f"{gemm} in float32": (_spare(gemm), rowwise(8, gemm)) for gemm in SPARED},
}  # fmt: skip


@functools.cache
def found(overrides: tuple[str, ...], shape=ODD):
    return tuple(_in_jax(networks.policy(*overrides), seed, shape) for seed in SEEDS)


def _assert_equal(one, other):
    assert max(errors(one, other).values()) <= TOLERANCE, errors(one, other)
    for run in zip(one, other):
        assert max(errors(run[:1], run[1:]).values()) <= EVERY_RUN
    assert max(abs(e["next loss"] / e["loss"] - 1) for e in other) > 100 * TOLERANCE  # a wrong step would show


@pytest.mark.parametrize("name", CASES)
def test_a_step_equals_numpy(name):
    overrides, oracle = CASES[name]
    _assert_equal(found(overrides), [networks.in_numpy(oracle, seed, ODD) for seed in SEEDS])


def test_each_product_is_switched_alone():
    """No switch passes for another, nor for none."""
    for name in SPARED:
        for other in {*SPARED, None} - {name}:
            wrong = [networks.in_numpy(rowwise(8, other), seed, ODD) for seed in SEEDS]
            assert max(errors(found(_spare(name)), wrong).values()) > 100 * TOLERANCE, (name, other)


@pytest.mark.parametrize("bits, shape", [(4, SHAPE), (2, SHAPE), (4, ODD)])
def test_quest_equals_numpy(bits, shape):
    one = found(("quest", f"precision.bits={bits}"), shape)
    _assert_equal(one, [networks.in_numpy(quest(bits, _multiple(bits)), seed, shape) for seed in SEEDS])
    for wrong in ("none", "unrotated"):
        off = errors(one, [networks.in_numpy(quest(bits, _multiple(bits), wrong), seed, shape) for seed in SEEDS])
        assert off["loss"] <= TOLERANCE < 100 * TOLERANCE < min(off["dx"], off["dw1"], off["dw2"])


@pytest.mark.parametrize("bits", MAX_1960)
def test_quest_takes_the_gaussian_optimum(bits):
    """To the 0.15 percent of the search."""
    assert _multiple(bits) == pytest.approx((2.0 ** (bits - 1) - 0.5) * MAX_1960[bits], rel=1.5e-3)
