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
import numpy as np
from jax import lax

import formats
from formats import noise
from trainer import scales, telemetry
from trainer.keys import fold_in
from trainer.precision import Operand, PrecisionPolicy, Quantizer, Source
from trainer.propagation import ScaledArray, floor_log2, pow2, scale_rule, shift, unscaled
from trainer.scales import Meter, Site


@dataclass(frozen=True)
class RowShards:
    """The rows of activations are split over the device axis `axis_name` in contiguous shards."""

    axis_name: str


@dataclass(frozen=True)
class _Use:
    """An operand of one of the products: its role, the dim that is contracted, and what salts its random bits."""

    role: str
    contract: int
    salt: int

    def shards(self, rows: RowShards | None) -> RowShards | None:
        """How its rows are split: weights are whole on every device."""
        return None if self.role == "weights" else rows


X_FORWARD, W_FORWARD = _Use("activations", 1, 0), _Use("weights", 0, 1)
X_WGRAD, W_DGRAD = _Use("activations", 0, 2), _Use("weights", 1, 3)
G_DGRAD, G_WGRAD = _Use("output_gradients", 1, 4), _Use("output_gradients", 0, 5)


def _narrow(x, quantizer: Quantizer | None, use: _Use, key, rows: RowShards | None, amax, policy: PrecisionPolicy):
    """x [A, B] -> (narrow values, scale broadcasting against x or None). amax: of the whole tensor, None for the current one."""
    if quantizer is None:
        return x, None
    if policy.data_dtype is None:
        return _split(x, quantizer, key, amax, use=use, rows=rows)
    return _split_data(x, quantizer, key, amax, use=use, rows=rows)


def _split(x, quantizer: Quantizer, key, amax, *, use: _Use, rows: RowShards | None):
    fmt, rows = quantizer.format, use.shards(rows)
    if isinstance(fmt, formats.Scaled):
        fmt = replace(fmt, axis=use.contract)
    bits = None
    if quantizer.stochastic:
        start = 0
        if rows is not None:
            start = lax.axis_index(rows.axis_name) * x.shape[0]
        bits = partial(noise.random_bits, fold_in(key, use.salt), x.shape, offset=start * x.shape[1])
    reduce_max = None
    if amax is not None and fmt.two_level:  # the blocks' own scales stay current under that of the tensor
        reduce_max, amax = partial(lambda given, current: given, amax), None
    elif amax is None and rows is not None and _crosses_rows(fmt, use.contract):
        reduce_max = partial(lax.pmax, axis_name=rows.axis_name)
    values, scale = formats.split(x, fmt, rounding=quantizer.rounding, random_bits=bits, reduce_max=reduce_max, amax=amax)
    return values, scale if isinstance(fmt, formats.Scaled) else None


_split_data = scale_rule(_split)


@_split_data.defrule
def _(x: ScaledArray, quantizer, key, amax, *, use: _Use, rows: RowShards | None):
    """Under scale propagation the data is quantized and keeps its exponent: its scale is 1 if it was propagated, and relative to the
    exponent otherwise."""
    quantizer = unscaled(quantizer)
    data, exponent = x.data.astype(jnp.float32), jnp.asarray(x.exponent, jnp.int32)
    rows = use.shards(rows)
    if rows is not None and quantizer.source != Source.PROPAGATED.value:
        top = lax.pmax(exponent, rows.axis_name)  # the scales below are of the whole tensor
        data, exponent = data * pow2(exponent - top), top
    if quantizer.source == Source.PROPAGATED.value:
        if amax is not None:
            amax = unscaled(amax)
        values, scale = _split(data, quantizer, key, amax, use=use, rows=rows)
        return ScaledArray(values, x.exponent), scale
    if amax is not None:
        amax = unscaled(ScaledArray(amax.data, amax.exponent - exponent))
    # Whatever the scale says, the elements are held at the size of the tensor's own data: there float16 holds them, and their products.
    if not isinstance(quantizer.format, formats.Scaled):  # source="none": the element's own range, for the values themselves
        values, _ = _split(shift(data, exponent), quantizer, key, amax, use=use, rows=rows)
        return ScaledArray(shift(values, -exponent), exponent), None
    values, scale = _split(data, quantizer, key, amax, use=use, rows=rows)
    size = floor_log2(jnp.max(scale))
    return ScaledArray(values * pow2(size), exponent), scale * pow2(-size)


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


def _seen_amax(x, operand: Operand, use: _Use, rows: RowShards | None):
    """amax of the whole tensor, float32, if a quantizer of the role is delayed; else None."""
    if not operand.takes(Source.DELAYED):
        return None
    amax, rows = jnp.max(jnp.abs(x), initial=0.0), use.shards(rows)
    return amax if rows is None else lax.pmax(amax, rows.axis_name)


def _given_amax(quantizer: Quantizer | None, role: str, site: Site, current):
    """The amax of the whole tensor by the quantizer's source, None where that is the tensor at hand."""
    if quantizer is not None and quantizer.source == Source.DELAYED.value:
        return scales.delayed_amax(site.remembered[role], current)
    if quantizer is not None and quantizer.source == Source.STATIC.value:
        return scales.static_amax(quantizer, site.expected.get(role))
    if quantizer is not None and quantizer.source == Source.PROPAGATED.value and (quantizer.format.block is None or quantizer.format.two_level):
        return scales.static_amax(quantizer, np.float32(1.0))  # of the data
    return None


def _statistics(tensor, narrow, quantizer: Quantizer | None, policy: PrecisionPolicy):
    """Telemetry's statistics of a tensor and its narrow pair, float32 [fields]."""
    measure = telemetry.raw if policy.data_dtype is None else telemetry.carried
    if quantizer is None:
        return measure(tensor)
    return measure(tensor, *narrow, quantizer.format.element if isinstance(quantizer.format, formats.Scaled) else quantizer.format)


def _forward(rows, x_NK, w_KM, policy, key, site):
    """y, and of x and w each: the narrow pair, and the amax of the tensor if it is wanted."""
    pairs, amax = [], []
    for tensor, operand, use in ((x_NK, policy.activations, X_FORWARD), (w_KM, policy.weights, W_FORWARD)):
        amax.append(_seen_amax(tensor, operand, use, rows))
        pairs.append(_narrow(tensor, operand.first, use, key, rows, _given_amax(operand.first, use.role, site, amax[-1]), policy))
    return _product(*pairs, 1, 0, policy.dot_dtype), pairs, amax


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(rows, x_NK, w_KM, policy, key, site, meter):
    del meter  # its cotangent is what the layer saw
    return _forward(rows, x_NK, w_KM, policy, key, site)[0]


def _linear_fwd(rows, x_NK, w_KM, policy, key, site, meter):
    y_NM, (x, w), amax = _forward(rows, x_NK, w_KM, policy, key, site)
    measured = {}
    if meter.statistics:
        measured = {"activations": _statistics(x_NK, x, policy.activations.first, policy),
                    "weights": _statistics(w_KM, w, policy.weights.first, policy)}
    # A role that is quantized once saves its narrow values; otherwise the backward starts from the tensor itself.
    saved_x = x if policy.activations.shared else x_NK
    saved_w = w if policy.weights.shared else w_KM
    return y_NM, (saved_x, saved_w, amax, measured, policy, key, site, meter)


def _linear_bwd(rows, residuals, g_NM):
    saved_x, saved_w, (x_amax, w_amax), measured, policy, key, site, meter = residuals

    def second(saved, operand: Operand, use: _Use, amax):
        given = _given_amax(operand.second, use.role, site, amax)
        return saved if operand.shared else _narrow(saved, operand.second, use, key, rows, given, policy)

    x = second(saved_x, policy.activations, X_WGRAD, x_amax)
    w = second(saved_w, policy.weights, W_DGRAD, w_amax)
    out = policy.output_gradients
    g_amax = _seen_amax(g_NM, out, G_DGRAD, rows)
    g_dgrad = _narrow(g_NM, out.first, G_DGRAD, key, rows, _given_amax(out.first, G_DGRAD.role, site, g_amax), policy)
    g_wgrad = g_dgrad if out.shared else second(g_NM, out, G_WGRAD, g_amax)
    dx_NK = _product(g_dgrad, w, 1, 1, policy.dot_dtype)
    # The barrier keeps XLA from turning the product round where dw is transposed later (a tied head): half the speed on a CPU.
    dw_KM = lax.optimization_barrier(_product(x, g_wgrad, 0, 0, policy.dot_dtype))
    amax = {"activations": x_amax, "weights": w_amax, "output_gradients": g_amax}
    if meter.statistics:
        measured = measured | {"output_gradients": _statistics(g_NM, g_dgrad, out.first, policy)}
    return dx_NK, dw_KM, None, None, None, Meter({role: amax[role] for role in meter.amax}, measured)


_linear.defvjp(_linear_fwd, _linear_bwd)


def linear(x_NK: jax.Array, w_KM: jax.Array, policy: PrecisionPolicy, key=None, rows: RowShards | None = None,
           site: Site | None = None) -> jax.Array:
    """x w in the policy's precision, float32 [N, M]; its backward runs dgrad and wgrad in theirs.

    `key`: uint32[2], needed when the policy rounds stochastically. `rows`: set inside shard_map when N is split over devices, so
    that scales and random bits are those of the whole tensor. `site`: needed when scales are delayed; of static ones it tells the
    size that tensors are expected to have.
    """
    if key is None:
        if policy.stochastic:
            raise ValueError("precision: stochastic rounding needs key=; pass a uint32[2] key or choose rounding='nearest_even'")
        key = jnp.zeros((2,), jnp.uint32)
    site = site or Site()
    for role in policy.roles(Source.DELAYED):
        if role not in site.remembered:
            raise ValueError(f"precision: source='delayed' of {role} goes by earlier steps, which nothing remembers here; accepted: current, static, none")
    return _linear(rows, x_NK, w_KM, policy, key, replace(site, meter=Meter()), site.meter)


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
