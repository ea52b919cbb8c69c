"""The policies in somebody else's Flax model: `trainer.dot_general(policy)` in a small NNX network that knows nothing of bitlaw."""
from __future__ import annotations

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax

import trainer
from trainer.precision import PrecisionPolicy


class Foreign(nnx.Module):
    """Two layers and a product that mixes heads; nothing of it is bitlaw's but the argument."""

    def __init__(self, dot_general, rngs):
        einsum = partial(jnp.einsum, _dot_general=dot_general)
        self.inner = nnx.Linear(16, 32, dot_general=dot_general, rngs=rngs)
        self.mix = nnx.Einsum("btd,dhk->bthk", (32, 2, 8), einsum_op=einsum, rngs=rngs)
        self.outer = nnx.Linear(16, 4, dot_general=dot_general, rngs=rngs)

    def __call__(self, x):
        h = self.mix(nnx.gelu(self.inner(x)))
        return self.outer(h.reshape(*x.shape[:-1], -1))


def _losses(dot_general, steps: int = 60) -> np.ndarray:
    """Training losses of a regression on a fixed random teacher."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((8, 16, 16)).astype(np.float32)
    y = np.tanh(x @ rng.standard_normal((16, 4)).astype(np.float32) / 2)
    graphdef, params = nnx.split(Foreign(dot_general, nnx.Rngs(0)))
    optimizer = optax.adam(1e-2)

    def loss(params):
        return jnp.mean((nnx.merge(graphdef, params)(jnp.asarray(x)) - y) ** 2)

    def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(grads, state)
        return (optax.apply_updates(params, updates), state), value

    return np.asarray(jax.jit(lambda p: lax.scan(step, (p, optimizer.init(p)), length=steps)[1])(params))


@pytest.mark.parametrize("policy", [["fp8"], ["int4"]])
def test_foreign_model_trains(policy):
    """The loss falls by half, and is not that of float32: something was quantized."""
    losses, exact = _losses(trainer.dot_general(trainer.policy(*policy))), _losses(lax.dot_general)
    assert np.all(np.isfinite(losses)) and losses[-1] < 0.5 * losses[0]
    assert np.all(np.abs(losses[:5] / exact[:5] - 1) > 1e-5)


def test_foreign_model_at_float32_is_itself():
    """With no quantizer it trains as with lax.dot_general."""
    np.testing.assert_allclose(_losses(trainer.dot_general(PrecisionPolicy())), _losses(lax.dot_general), rtol=1e-4)


CONTRACTIONS = [
    ((3, 4, 5), (5, 6), (((2,), (0,)), ((), ()))),
    ((3, 4, 5), (4, 5, 2, 3), (((1, 2), (0, 1)), ((), ()))),  # several contracted dims
    ((3, 4, 5), (5, 2, 4), (((1, 2), (2, 0)), ((), ()))),  # in another order on each side
    ((5, 3), (5, 4), (((0,), (0,)), ((), ()))),
    ((2, 3, 4), (2, 4, 5), (((2,), (1,)), ((0,), (0,)))),  # a batch dim
    ((4, 2, 3, 6), (3, 5, 4, 2), (((1,), (3,)), ((2, 0), (0, 2)))),  # batch dims, transposed
    ((4,), (4,), (((0,), (0,)), ((), ()))),  # to a scalar
    ((3,), (4,), (((), ()), ((), ()))),  # an outer product
]


@pytest.mark.parametrize("left, right, dims", CONTRACTIONS)
def test_any_contraction_equals_lax(left, right, dims):
    """Value and both gradients of every shape that lax.dot_general takes."""
    rng = np.random.default_rng(0)
    a, b = (jnp.float32(rng.standard_normal(shape)) for shape in (left, right))
    ours = trainer.dot_general(PrecisionPolicy())
    exact = partial(lax.dot_general, precision=lax.Precision.HIGHEST)
    assert ours(a, b, dims).shape == exact(a, b, dims).shape
    cotangent = jnp.float32(rng.standard_normal(exact(a, b, dims).shape))
    for one, other in zip(_value_and_gradients(ours, a, b, dims, cotangent), _value_and_gradients(exact, a, b, dims, cotangent)):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def _value_and_gradients(dot, a, b, dims, cotangent):
    def both(a, b, cotangent):
        y, backward = jax.vjp(lambda a, b: dot(a, b, dims), a, b)
        return (y, *backward(cotangent))

    return jax.jit(both)(a, b, cotangent)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_result_has_the_inputs_dtype(dtype):
    """A model in half precision stays in it, and gradients come back in the dtype of what they belong to."""
    a, b = jnp.ones((3, 4), dtype), jnp.ones((4, 5), dtype)
    dims = (((1,), (0,)), ((), ()))
    y, da, db = _value_and_gradients(trainer.dot_general(trainer.policy("int8")), a, b, dims, jnp.ones((3, 5), dtype))
    assert y.dtype == da.dtype == db.dtype == dtype
    wide = jax.eval_shape(lambda a, b: trainer.dot_general(trainer.policy("int8"))(a, b, dims, preferred_element_type=jnp.float32), a, b)
    assert wide.dtype == jnp.float32


@pytest.mark.parametrize("name, words", [("quartet", "needs key="), ("bitnet", "precision.extra_norm"), ("bitnet_finetune", "precision.extra_norm")])
def test_what_a_product_cannot_be_is_refused_where_it_is_made(name, words):
    """At once, not when it is traced; the policy itself can be had, whatever the length of its ramp."""
    which = trainer.policy(name)
    with pytest.raises(ValueError, match=words) as found:
        trainer.dot_general(which)
    assert "\n" not in str(found.value) and re.search("accepted: |pass a ", str(found.value))
    if name == "bitnet_finetune":
        assert float(which.ramp.steps) == 1000
        with pytest.raises(ValueError, match="precision.ramp_steps"):
            trainer.dot_general(trainer.policy(name, "precision.extra_norm=null"))
    trainer.dot_general(trainer.policy("bitnet", "precision.extra_norm=null"))


def test_a_key_for_each_step_and_layer():
    """As docs/precisions.md has it: a model's products are given keys where the loss is computed; bits differ from step to step, and are
    those of the step."""
    which = trainer.policy("int4", "precision.weights.rounding=stochastic")
    graphdef, params = nnx.split(Foreign(lax.dot_general, nnx.Rngs(0)))
    x = jnp.float32(np.random.default_rng(0).standard_normal((2, 4, 16)))

    @jax.jit
    def loss(params, step):
        key = jax.random.fold_in(jax.random.key(0), step)
        model = nnx.merge(graphdef, params)
        for index, layer in enumerate((model.inner, model.outer)):
            layer.dot_general = trainer.dot_general(which, key=jax.random.key_data(jax.random.fold_in(key, index)))
        return jnp.mean(model(x) ** 2)

    found = [float(loss(params, step)) for step in (0, 1, 2, 0)]
    assert len(set(found)) == 3 and found[0] == found[3]


def test_roles_follow_the_arguments():
    """lhs gets the quantizer of activations and rhs that of weights; the other is left as it is."""
    a = jnp.float32(np.random.default_rng(0).standard_normal((5, 4)))
    eye, dims = jnp.eye(4, dtype=jnp.float32), (((1,), (0,)), ((), ()))
    only_weights = trainer.dot_general(trainer.policy("float32", "precision.weights.format=integer", "precision.weights.bits=2"))
    product = jax.jit(lambda a, b: only_weights(a, b, dims))
    np.testing.assert_array_equal(product(a, eye), a)
    assert len(np.unique(product(eye, a.T))) <= 3
