"""The low-precision linear layer: three matrix products under one custom_vjp (DESIGN 3.6).

Operands are split into narrow values (held in float32) and scales. A scale that is constant along the contraction is applied to
the result, so the product itself multiplies narrow values exactly and adds in float32, as hardware does; any other scale (blocks)
is multiplied in first. Weights straight-through: the gradient of the quantized operand is the gradient of the operand.

Shapes: N tokens (rows), K inputs, M outputs.
"""
from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

import formats
from formats import noise
from trainer.keys import fold_in
from trainer.precision import PrecisionPolicy, Quantizer


@dataclass(frozen=True)
class RowShards:
    """The rows of activations are split over the device axis `axis_name` in contiguous shards."""

    axis_name: str


@dataclass(frozen=True)
class _Site:
    """Which operand this is (salts the random bits) and whether its rows are sharded."""

    salt: int
    rows: RowShards | None = None


def _narrow(x, quantizer: Quantizer | None, contract: int, key, site: _Site):
    """x [A, B] -> (narrow values, scale broadcasting against x or None)."""
    if quantizer is None:
        return x, None
    fmt = quantizer.format
    if isinstance(fmt, formats.Scaled):
        fmt = replace(fmt, axis=contract)
    bits = None
    if quantizer.stochastic:
        start = 0
        if site.rows is not None:
            start = lax.axis_index(site.rows.axis_name) * x.shape[0]
        bits = partial(noise.random_bits, fold_in(key, site.salt), x.shape, offset=start * x.shape[1])
    reduce_max = None
    if site.rows is not None and _crosses_rows(fmt, contract):
        reduce_max = partial(lax.pmax, axis_name=site.rows.axis_name)
    values, scale = formats.split(x, fmt, rounding=quantizer.rounding, random_bits=bits, reduce_max=reduce_max)
    return values, scale if isinstance(fmt, formats.Scaled) else None


def _crosses_rows(fmt, contract: int) -> bool:
    """True if one scale covers rows of several shards (dim 0 of x is the sharded one)."""
    if not isinstance(fmt, formats.Scaled):
        return False
    if fmt.granularity is formats.Granularity.BLOCK:
        return fmt.two_level
    return fmt.granularity is formats.Granularity.TENSOR or contract == 0


def _constant_along(scale, dim: int) -> bool:
    return scale.ndim == 0 or scale.shape[dim] == 1


def _product(a, b, contract_a: int, contract_b: int, dot_dtype):
    """The product of two (values, scale) pairs, scales applied after where they are constant along the contraction."""
    (a_values, a_scale), (b_values, b_scale) = a, b
    if a_scale is not None and not _constant_along(a_scale, contract_a):
        a_values, a_scale = a_values * a_scale, None
    if b_scale is not None and not _constant_along(b_scale, contract_b):
        b_values, b_scale = b_values * b_scale, None
    out = lax.dot_general(
        a_values.astype(dot_dtype), b_values.astype(dot_dtype), (((contract_a,), (contract_b,)), ((), ())),
        precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32,
    )
    if a_scale is not None and b_scale is not None:
        return out * (a_scale.reshape(-1, 1) * b_scale.reshape(1, -1))
    if a_scale is not None:
        return out * a_scale.reshape(-1, 1)
    return out if b_scale is None else out * b_scale.reshape(1, -1)


def _forward(rows, x_NK, w_KM, policy, key):
    x = _narrow(x_NK, policy.activations.first, 1, key, _Site(0, rows))
    w = _narrow(w_KM, policy.weights.first, 0, key, _Site(1))
    return _product(x, w, 1, 0, policy.dot_dtype), x, w


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(rows, x_NK, w_KM, policy, key):
    return _forward(rows, x_NK, w_KM, policy, key)[0]


def _linear_fwd(rows, x_NK, w_KM, policy, key):
    y_NM, x, w = _forward(rows, x_NK, w_KM, policy, key)
    # A role that is quantized once saves its narrow values; otherwise the backward starts from the tensor itself.
    saved_x = x if policy.activations.shared else x_NK
    saved_w = w if policy.weights.shared else w_KM
    return y_NM, (saved_x, saved_w, policy, key)


def _linear_bwd(rows, residuals, g_NM):
    saved_x, saved_w, policy, key = residuals
    x = saved_x if policy.activations.shared else _narrow(saved_x, policy.activations.second, 0, key, _Site(2, rows))
    w = saved_w if policy.weights.shared else _narrow(saved_w, policy.weights.second, 1, key, _Site(3))
    out = policy.output_gradients
    g_dgrad = _narrow(g_NM, out.first, 1, key, _Site(4, rows))
    g_wgrad = g_dgrad if out.shared else _narrow(g_NM, out.second, 0, key, _Site(5, rows))
    dx_NK = _product(g_dgrad, w, 1, 1, policy.dot_dtype)
    # The barrier keeps XLA from turning the product round where dw is transposed later (a tied head): half the speed on a CPU.
    dw_KM = lax.optimization_barrier(_product(x, g_wgrad, 0, 0, policy.dot_dtype))
    return dx_NK, dw_KM, None, None


_linear.defvjp(_linear_fwd, _linear_bwd)


def linear(x_NK: jax.Array, w_KM: jax.Array, policy: PrecisionPolicy, key=None, rows: RowShards | None = None) -> jax.Array:
    """x w in the policy's precision, float32 [N, M]; its backward runs dgrad and wgrad in theirs.

    `key`: uint32[2], needed when the policy rounds stochastically. `rows`: set inside shard_map when N is split over devices, so
    that scales and random bits are those of the whole tensor.
    """
    if key is None:
        if policy.stochastic:
            raise ValueError("precision: stochastic rounding needs key=; pass a uint32[2] key or choose rounding='nearest_even'")
        key = jnp.zeros((2,), jnp.uint32)
    return _linear(rows, x_NK, w_KM, policy, key)


def dot_general(policy: PrecisionPolicy, key=None):
    """A drop-in for `lax.dot_general` in `nnx.Linear(dot_general=...)`: contracts any dims of lhs (activations) with rhs (weights).

    The result has lhs's dtype. Batch dimensions are mapped over. Constant widths only: the policy is closed over.
    """

    def apply(lhs, rhs, dimension_numbers, precision=None, preferred_element_type=None, **_):
        (contract_l, contract_r), (batch_l, batch_r) = dimension_numbers
        dtype = preferred_element_type or lhs.dtype
        keep_l = [d for d in range(lhs.ndim) if d not in contract_l and d not in batch_l]
        keep_r = [d for d in range(rhs.ndim) if d not in contract_r and d not in batch_r]
        lhs = lhs.transpose(*batch_l, *keep_l, *contract_l)
        rhs = rhs.transpose(*batch_r, *contract_r, *keep_r)
        batch, num_l, num_r = lhs.shape[: len(batch_l)], lhs.shape[len(batch_l):][: len(keep_l)], rhs.shape[rhs.ndim - len(keep_r):]
        size_k = 1
        for d in lhs.shape[lhs.ndim - len(contract_l):]:
            size_k *= d
        one = partial(linear, policy=policy, key=key)
        x = lhs.reshape(-1, lhs.size // (size_k * max(1, _size(batch))), size_k).astype(jnp.float32)
        w = rhs.reshape(-1, size_k, _size(num_r)).astype(jnp.float32)
        out = jax.vmap(one)(x, w) if batch else one(x[0], w[0])
        return out.reshape(*batch, *num_l, *num_r).astype(dtype)

    return apply


def _size(shape) -> int:
    total = 1
    for d in shape:
        total *= d
    return total
