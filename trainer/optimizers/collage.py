"""AdamW all in bfloat16: plain, Kahan-compensated, and Collage, whose parameters are sums of two bfloat16 numbers.

Collage: Yu et al. 2024, "Collage: Light-Weight Low-Precision Strategy for LLM Training", arXiv 2405.03637. Nothing here is wider than
bfloat16 between operations, and nothing but bfloat16 is stored: every operation is done in float32 and rounded at once
(`expansion`). The exceptions are the numbers that would be wrong otherwise: 1 - beta and the bias corrections 1 - beta**t are computed in
float32 and rounded to bfloat16 once.
"""
from __future__ import annotations

from enum import Enum
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from trainer.optimizers.expansion import MANTISSA_BITS, expand, fast_two_sum, grow, mul, store
from trainer.optimizers.expansion import round_bfloat16 as F
from trainer.optimizers.quality import DescentQuality, descent_quality
from trainer.optimizers.trees import spread


class Variant(str, Enum):
    """What stands behind the first word of a parameter, and bytes per parameter, those of its gradient aside: 2 more where that is bfloat16 (as
    the paper counts), 4 where it is float32 (as this trainer computes it)."""

    BFLOAT16 = "bfloat16"  # nothing: theta <- F(theta + dtheta) (option A of the paper); 6
    KAHAN = "kahan"  # what the last addition lost, added to the next update (Kahan 1965); 8
    LIGHT = "light"  # a second word of the parameter; 8
    PLUS = "plus"  # second words of the parameter, of the second moment and of beta2; 10


class CollageState(NamedTuple):
    """count: int32, updates done. mu, nu: first and second moment; delta: second words of the parameters (of variant "kahan" what was
    lost; None for "bfloat16"); nu_delta: second words of nu (None but for "plus"): bfloat16 trees like the parameters. A parameter is its
    array plus delta. quality: the `DescentQuality` of the last update if measured, else None."""

    count: jax.Array
    mu: Any
    nu: Any
    delta: Any = None
    nu_delta: Any = None
    quality: DescentQuality | None = None


class _Numbers(NamedTuple):
    """bfloat16 values in float32 scalars, of one step."""

    b1: jax.Array
    rest1: jax.Array  # 1 - b1
    correction1: jax.Array  # 1 - b1**t
    b2: jax.Array
    b2_delta: jax.Array
    rest2: jax.Array
    correction2: jax.Array
    eps: jax.Array


class _Leaf(NamedTuple):
    """One parameter and its state as float32 arrays of bfloat16 values; second words None where the variant has none."""

    theta: jax.Array
    mu: jax.Array
    nu: jax.Array
    delta: jax.Array | None
    nu_delta: jax.Array | None


def collage_adamw(learning_rate, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0, mask=None, variant: str = "light",
                  measure: bool = False) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019) in bfloat16 throughout; F is one rounding, t = count + 1:

        m <- F(F(b1 m) + F((1 - b1) g))             v <- F(F(b2 v) + F((1 - b2) F(g g)))
        dtheta = F(-lr F(F(F(m / c1) / F(F(sqrt(F(v / c2))) + eps)) + F(weight_decay theta)))     c = 1 - b**t
        bfloat16: theta <- F(theta + dtheta)        kahan: (theta, delta) <- Fast2Sum(theta, F(dtheta + delta))
        light: (theta, delta) <- Grow((theta, delta), dtheta)
        plus: also (v, nu_delta) <- Grow(Mul((v, nu_delta), expand(b2)), F((1 - b2) F(g g)))

    In one word 0.999 is 1: v then never forgets ("light" is for b2 up to 0.99 or so, "plus" for 0.999). Two words have 16 bits: updates
    below 2**-18 of their parameter are lost from the time when delta has grown to its full size. learning_rate: a number, a
    function of count, or a tree like the parameters (or a prefix) of numbers. b1, b2 (in [0, 1)), eps, weight_decay: numbers. All may
    be traced, and are read as float32. mask: tree (or prefix) of bool, or a function params -> such a tree: where weight decay
    applies; None: everywhere. variant: see `Variant`. measure: keep each update's `DescentQuality` in the state.

    Parameters: bfloat16 arrays, or float32 arrays of bfloat16 values (others are read rounded; what rounding takes away when the
    state is made goes to delta). Gradients of any float dtype are rounded to bfloat16. The updates are float32, new - old of the first
    words, and exact: bfloat16(params + update) is the new first word, which is what `optax.apply_updates` stores, and for float32
    parameters params + update already is. (A new word that no float32 update reaches, below 2**-16 of the old, stays in delta.) Put
    nothing that changes updates behind this. Under numpy_dtype_promotion="strict" optax.apply_updates adds no float32 to bfloat16.

    ValueError: unknown variant; learning_rate or mask that do not fit the parameters; update without params.
    """
    kind = _variant(variant)

    def init(params):
        def zeros():
            return jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.bfloat16), params)

        lost = jax.tree.map(lambda p: store(expand(p)[1]), params)
        return CollageState(jnp.int32(0), zeros(), zeros(), None if kind is Variant.BFLOAT16 else lost,
                            zeros() if kind is Variant.PLUS else None, DescentQuality(*(jnp.float32(jnp.nan),) * 3) if measure else None)

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("params=None in update of collage_adamw; accepted: the parameters, update(grads, state, params)")
        rates = learning_rate(state.count) if callable(learning_rate) else learning_rate
        rates = spread("learning_rate", rates, params)
        decays = spread("mask", True if mask is None else mask(params) if callable(mask) else mask, params)
        count = optax.safe_increment(state.count)
        numbers = _numbers(b1, b2, eps, count)
        treedef = jax.tree.structure(params)
        columns = [treedef.flatten_up_to(updates), treedef.flatten_up_to(params), rates, decays, *_leaves_of(state, treedef)]
        before, results = [], []
        for grad, param, rate, decayed, *words in zip(*columns, strict=True):
            old = _Leaf(*(None if x is None else x.astype(jnp.float32) for x in (F(_wide(param)), *words)))
            decay = jnp.where(decayed, F(_wide(weight_decay)), 0.0)
            before.append(old)
            results.append(_step(kind, old, _wide(param), F(_wide(grad)), F(_wide(rate)), decay, numbers))
        new, intended, changes = (list(column) for column in zip(*results, strict=True))
        words = [None if column[0] is None else treedef.unflatten([store(x) for x in column]) for column in list(zip(*new, strict=True))[1:]]
        quality = _quality(intended, before, new) if measure else None
        return treedef.unflatten(changes), CollageState(count, *words, quality)

    return optax.GradientTransformation(init, update)


def _step(kind: Variant, old: _Leaf, param, grad, rate, decay, n: _Numbers):
    """(new leaf, dtheta, float32 update) of one parameter."""
    mu = F(F(n.b1 * old.mu) + F(n.rest1 * grad))
    fresh, nu_delta = F(n.rest2 * F(grad * grad)), None
    if kind is Variant.PLUS:
        nu, nu_delta = grow(*mul(old.nu, old.nu_delta, n.b2, n.b2_delta), fresh)
    else:
        nu = F(F(n.b2 * old.nu) + fresh)
    denominator = F(F(jnp.sqrt(F(nu / n.correction2))) + n.eps)
    direction = F(F(F(mu / n.correction1) / denominator) + F(decay * old.theta))
    dtheta = F(-rate * direction)
    match kind:
        case Variant.BFLOAT16:
            theta, delta = F(old.theta + dtheta), None
        case Variant.KAHAN:
            theta, delta = fast_two_sum(old.theta, F(dtheta + old.delta))
        case _:
            theta, delta = grow(old.theta, old.delta, dtheta)
    update = theta - param
    landed = F(param + update)  # not theta where theta is so much smaller than param that their difference rounds
    delta = None if delta is None else F(delta + (theta - landed))
    return _Leaf(landed, mu, nu, delta, nu_delta), dtheta, update


def _numbers(b1, b2, eps, count) -> _Numbers:
    b1, b2 = _wide(b1), _wide(b2)
    t = count.astype(jnp.float32)

    def correction(b):  # 1 - b**t without cancellation; 1 - b is exact for b >= 0.5
        return F(-jnp.expm1(t * jnp.log1p(-(1 - b))))

    return _Numbers(F(b1), F(1 - b1), correction(b1), *expand(b2), F(1 - b2), correction(b2), F(_wide(eps)))


def _quality(intended, before: list[_Leaf], new: list[_Leaf]) -> DescentQuality:
    seconds = {}
    if new[0].delta is not None:
        seconds = {"second_before": [leaf.delta for leaf in before], "second_after": [leaf.delta for leaf in new]}
    thetas = ([leaf.theta for leaf in leaves] for leaves in (before, new))
    return descent_quality(intended, *thetas, man_bits=MANTISSA_BITS, **seconds)


def _leaves_of(state: CollageState, treedef) -> list[list]:
    """Leaves of mu, nu, delta and nu_delta; None for each parameter where there are none."""
    trees = (state.mu, state.nu, state.delta, state.nu_delta)
    return [[None] * treedef.num_leaves if tree is None else treedef.flatten_up_to(tree) for tree in trees]


def _variant(name: str) -> Variant:
    try:
        return Variant(name)
    except ValueError:
        raise ValueError(f"variant={name!r} of collage_adamw; accepted: {', '.join(v.value for v in Variant)}") from None


def _wide(x):
    return jnp.asarray(x).astype(jnp.float32)
