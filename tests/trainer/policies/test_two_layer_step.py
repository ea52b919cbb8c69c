"""Every policy against its paper: loss, gradients and one SGD step of a two-layer net, with jax.grad through `trainer.linear` and in numpy.

The criterion. Where no value is rounded to another side, float32 leaves what its own rounding leaves: a gradient passes through some ten
roundings of scales and sums, each 2^-24 = 6e-8 of the whole, so 6e-7; five times that is allowed for the norm of the error over the norm.
A value within float32's error of a threshold may be rounded to the other side and moves what follows by up to a percent. Of the 5e4 to
2e5 roundings of a run each has a chance of 1e-7 to 1e-6 of that, so one run in twenty to one in four has such a value, which one depends on
the order of sums. Hence two of five runs must agree to 3e-6 (by chance they do not once in 60 times at one in four, once in 30000 at one
in twenty) and every run to 3 percent.
"""
from __future__ import annotations

import functools

import numpy as np
import pytest

from tests.trainer.policies import networks
from tests.trainer.policies.networks import SEEDS, errors
from tests.trainer.policies.numpy_policies import POLICIES, fp8_tiles, nvfp4_recipe, quartet

TOLERANCE, EVERY_RUN = 3e-6, 3e-2
SHAPE, TILES, ODD = (128, 64, 64, 64), (128, 256, 256, 256), (72, 40, 40, 40)  # tokens, inputs, hidden, outputs; no block divides ODD


@functools.cache
def found(name: str, shape):
    return tuple(networks.in_jax(networks.policy(name), seed, shape) for seed in SEEDS)


@functools.cache
def expected(which, shape):
    return tuple(networks.in_numpy(which, seed, shape) for seed in SEEDS)


def _shape(name: str):
    return TILES if name == "fp8_tiles" else SHAPE


CASES = [(name, _shape(name)) for name in POLICIES] + [("quartet rround", ODD)]


@pytest.mark.parametrize(("name", "shape"), CASES, ids=[f"{name} {shape[0]}x{shape[1]}" for name, shape in CASES])
def test_a_step_equals_numpy(name, shape):
    one, other = found(name, shape), expected(POLICIES[name], shape)
    assert max(errors(one, other).values()) <= TOLERANCE, errors(one, other)
    for run in zip(one, other):
        assert max(errors(run[:1], run[1:]).values()) <= EVERY_RUN
    assert np.median([abs(e["next loss"] / e["loss"] - 1) for e in other]) > 1000 * TOLERANCE  # a wrong step would show


def test_most_runs_agree():
    """Over all policies five runs in six do, so that the two of five above are not what a rare mistake leaves over."""
    agree = [max(errors([one], [other]).values()) <= TOLERANCE for name, shape in CASES
             for one, other in zip(found(name, shape), expected(POLICIES[name], shape))]  # fmt: skip
    assert np.mean(agree) > 5 / 6, np.mean(agree)


def test_policies_are_told_apart():
    """No policy passes for another. (The two roundings of Quartet's backward share the first loss.)"""
    names = [name for name in POLICIES if _shape(name) == SHAPE]
    for name in names:
        for other in set(names) - {name}:
            assert max(errors(found(name, SHAPE), expected(POLICIES[other], SHAPE)).values()) > 1000 * TOLERANCE, (name, other)


# What is easily got wrong -> (the policy, the oracle with that mistake, the quantities that it changes).
MISTAKES = {
    "mask forgotten": ("quartet rround", quartet(mask="none"), ("dx", "dw1", "dw2")),
    "mask after rotating back": ("quartet rround", quartet(mask="unrotated"), ("dx", "dw1", "dw2")),
    "signs after the Hadamard": ("quartet rround", quartet(after=True), ("dx", "dw1", "dw2")),
    "backward reads unquantized operands": ("quartet rround", quartet(raw=True), ("dx", "dw1", "dw2")),
    "no 3/4 in the backward's scale": ("quartet rround", quartet(pre=1.0), ("dx", "dw1", "dw2")),
    "scales across the contraction": ("quartet rround", quartet(wrong_axis=True), ("dx", "dw1", "dw2")),
    "scale rounded down": ("quartet rround", quartet("rfloor"), ("loss", "dx", "dw1", "dw2")),
    "scale rounded up": ("quartet rround", quartet("rceil"), ("loss", "dx", "dw1", "dw2")),
    "weights in rows of 16": ("nvfp4_recipe", nvfp4_recipe(tile=None), ("loss", "dx", "dw1", "dw2")),
    "wgrad not rotated": ("nvfp4_recipe", nvfp4_recipe(rotate=False), ("dw1", "dw2")),
    "rotated without signs": ("nvfp4_recipe", nvfp4_recipe(signed=False), ("dw1", "dw2")),
    "gradients to nearest": ("nvfp4_recipe", nvfp4_recipe(random=False), ("dx", "dw1", "dw2")),
    "activations stochastic": ("nvfp4_recipe", nvfp4_recipe(random_activations=True), ("loss", "dx", "dw1", "dw2")),
    "tiles of 64": ("fp8_tiles", fp8_tiles((64, 64)), ("loss", "dx", "dw1", "dw2")),
    "weights in rows of 128": ("fp8_tiles", fp8_tiles((1, 128)), ("loss", "dx", "dw1", "dw2")),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_show(mistake):
    """Each fails the criterion by a factor of 100 or more in what it changes, and in the first step only there."""
    name, wrong, changed = MISTAKES[mistake]
    shape = _shape(name)
    off = errors(found(name, shape), expected(wrong, shape))
    assert min(off[what] for what in changed) > 100 * TOLERANCE, off
    assert all(off[what] <= TOLERANCE for what in {"loss", "dx", "dw1", "dw2"} - {*changed}), off
