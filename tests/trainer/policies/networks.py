"""Two linear layers, a squared ReLU between them, mean squared error and a step of SGD: through `trainer.linear` and in numpy float64."""
from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

import trainer
from tests.trainer.policies.numpy_policies import Words
from trainer.keys import fold_in

RATE = 0.1  # of SGD: weights change by a tenth, and the loss falls by half or so
SEEDS = range(5)
RULES = {rule: [f"precision.{role}.scale_rule={rule}" for role in ("weights", "activations")] for rule in ("rround", "rfloor", "rceil", "exact")}

linear = jax.jit(trainer.linear)  # compiled once for both layers where their shapes are the same


@functools.cache
def policy(name: str, *overrides: str) -> trainer.PrecisionPolicy:
    """A preset, or "quartet rfloor": with that scale rule."""
    preset, _, rule = name.partition(" ")
    return trainer.policy(preset, *RULES.get(rule, ()), *overrides)


def data(seed: int, shape):
    """x, w1, w2, targets: float32, with rows and columns of different size, so that scales along the wrong dimension show.
    shape: tokens, inputs, hidden, outputs."""
    tokens, inputs, hidden, outputs = shape
    rng = np.random.default_rng(seed)

    def matrix(rows, columns):
        sizes = np.exp(rng.uniform(-1, 1, (rows, 1)) + rng.uniform(-1, 1, (1, columns))) / 2
        return rng.standard_normal((rows, columns)) * sizes

    x, w1, w2 = matrix(tokens, inputs), matrix(inputs, hidden) * inputs**-0.5, matrix(hidden, outputs) * hidden**-0.5
    return tuple(a.astype(np.float32) for a in (x, w1, w2, matrix(tokens, outputs)))


def keys(seed: int, step: int):
    """Of the two layers in a step."""
    return [fold_in(fold_in(jnp.array([7, seed], jnp.uint32), step), index) for index in range(2)]


def in_jax(which, seed: int, shape) -> dict[str, np.ndarray]:
    """Loss, gradients, and the loss after one step of SGD."""
    x, w1, w2, targets = (jnp.asarray(a) for a in data(seed, shape))

    def loss(x, w1, w2, step):
        first, second = keys(seed, step)
        h = jnp.square(jax.nn.relu(linear(x, w1, which, first)))
        return jnp.mean(jnp.square(linear(h, w2, which, second) - targets))

    both = jax.value_and_grad(loss, (0, 1, 2))
    before, (dx, dw1, dw2) = both(x, w1, w2, 0)
    after, _ = both(x, w1 - np.float32(RATE) * dw1, w2 - np.float32(RATE) * dw2, 1)  # the loss alone would be compiled anew
    return {name: np.asarray(a, np.float64) for name, a in {"loss": before, "dx": dx, "dw1": dw1, "dw2": dw2, "next loss": after}.items()}


def in_numpy(which, seed: int, shape) -> dict[str, np.ndarray]:
    """The same with a policy of numpy_policies."""
    x, w1, w2, targets = (a.astype(np.float64) for a in data(seed, shape))

    def forward(w1, w2, step):
        first, second = keys(seed, step)
        a, backward_1 = which(x, w1, Words(first))
        y, backward_2 = which(np.maximum(a, 0) ** 2, w2, Words(second))
        return np.mean((y - targets) ** 2), a, y, backward_1, backward_2

    before, a, y, backward_1, backward_2 = forward(w1, w2, 0)
    dh, dw2 = backward_2(2 * (y - targets) / targets.size)
    dx, dw1 = backward_1(dh * 2 * np.maximum(a, 0))
    after = forward(w1 - RATE * dw1, w2 - RATE * dw2, 1)[0]
    return {"loss": before, "dx": dx, "dw1": dw1, "dw2": dw2, "next loss": after}


def errors(found, expected) -> dict[str, float]:
    """Norm of the difference over that of what is expected, for every quantity: the second smallest over the runs."""
    def relative(a, b):
        return np.linalg.norm(a - b) / np.linalg.norm(b)

    return {name: float(sorted(relative(f[name], e[name]) for f, e in zip(found, expected))[:2][-1]) for name in expected[0]}
