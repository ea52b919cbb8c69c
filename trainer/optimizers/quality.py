"""Effective descent quality: how much of an intended update the stored parameters really underwent."""
from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_EXPONENT_MASK = np.int32(0x7F800000)  # of a float32 pattern: alone, it is the power of two at or below the number


class DescentQuality(NamedTuple):
    """Of one update, over all elements of all leaves; float32 scalars. dtheta is the update that was intended, dtheta_hat the one that
    storage underwent.

    edq: <dtheta / |dtheta|, dtheta_hat> / |dtheta|, 1 for a lossless storage, 0 where nothing moves (Collage, Yu et al. 2024, arXiv
    2405.03637, "effective descent quality", over |dtheta|); NaN for an update of zero. lost: the share of all elements with
    dtheta != 0 and dtheta_hat == 0 ("lost arithmetic"). updates_per_ulp: the geometric mean of |dtheta| / ulp(theta), with theta the
    parameter before the update and ulp its unit in the last place, over the elements where neither is zero; NaN if there are none.
    Below 1/2 nearest rounding loses most updates. The mean is geometric because ratios spread over many powers of two: an arithmetic
    mean would say what the few parameters next to zero do.
    """

    edq: jax.Array
    lost: jax.Array
    updates_per_ulp: jax.Array


def descent_quality(intended, before, after, *, second_before=None, second_after=None, man_bits=7) -> DescentQuality:
    """The `DescentQuality` of one update.

    intended: the update, tree of floating-point arrays; before, after: parameters, trees alike. second_before, second_after: the second
    words of parameters that are expansions (the `delta` of `CollageState`): then dtheta_hat is the change of first + second, from the
    two exact differences, not from sums rounded to one word. man_bits: stored mantissa bits of the (first) word, for ulp (7 is bfloat16,
    23 float32; may be traced); None for formats that are not floats: updates_per_ulp is NaN then.

    Two passes, both plain reductions in float32: the largest |dtheta| and |dtheta_hat|, then sums of what is divided by them, so that no
    square over- or underflows, whatever the size of the updates (from 2**-126 to 2**127).
    """
    if (second_before is None) != (second_after is None):
        raise ValueError("second_before and second_after must be given together: the second words before and after the update")
    intended, first, after = (_leaves(tree) for tree in (intended, before, after))
    changed = [new - old for new, old in zip(after, first, strict=True)]
    if second_before is not None:
        seconds = zip(changed, _leaves(second_after), _leaves(second_before), strict=True)
        changed = [change + (new - old) for change, new, old in seconds]
    top, top_hat = _largest(intended), _largest(changed)

    def over(leaf_sum):
        return sum((leaf_sum(*leaves) for leaves in zip(intended, changed, first, strict=True)), jnp.float32(0.0))

    squares = over(lambda d, hat, theta: _total((d / top) ** 2))
    products = over(lambda d, hat, theta: _total((d / top) * (hat / top_hat)))
    lost = over(lambda d, hat, theta: _total(((d != 0) & (hat == 0)).astype(jnp.float32)))
    # top and top_hat are positive, so this is NaN only where nothing was intended
    edq = products / squares * (top_hat / top)
    num_elements = max(sum(leaf.size for leaf in intended), 1)
    bits = man_bits if isinstance(man_bits, list) else [man_bits] * len(intended)
    return DescentQuality(edq, lost / num_elements, _updates_per_ulp(intended, first, bits))


def _updates_per_ulp(intended, first, man_bits: list) -> jax.Array:
    logs, count = jnp.float32(0.0), jnp.float32(0.0)
    for d, theta, bits in zip(intended, first, man_bits, strict=True):
        if bits is not None:
            both = (d != 0) & (theta != 0)
            here = _total(both.astype(jnp.float32))
            logs += _total(jnp.where(both, _log2_ratio(d, theta), 0.0)) + here * jnp.asarray(bits).astype(jnp.float32)
            count += here
    return jnp.exp2(logs / count)


def _leaves(tree) -> list[jax.Array]:
    return [jnp.asarray(leaf).astype(jnp.float32) for leaf in jax.tree.leaves(tree)]


def _largest(leaves) -> jax.Array:
    """Largest magnitude of all leaves; 1 where all are zero, to divide by. NaN passes."""
    top = jnp.float32(0.0)
    for leaf in leaves:
        top = jnp.maximum(top, jnp.max(jnp.abs(leaf), initial=0.0))
    return jnp.where(top == 0, 1.0, top)


def _total(x):
    """Sum in two stages, rows first: the rounding error of one long float32 sum grows with its length."""
    return jnp.sum(jnp.sum(x, axis=-1)) if x.ndim else x


def _log2_ratio(d, theta):
    """log2(|d|) - floor(log2(|theta|)); the floor by the bits, since log2 just below a power of two is rounded up to it."""
    power = jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(theta, jnp.int32) & _EXPONENT_MASK, jnp.float32)
    return jnp.log2(jnp.abs(d)) - jnp.log2(power)
