"""The low-precision linear layer: three matrix products under one custom_vjp (DESIGN 3.6).

Operands are split into narrow values (held in float32) and scales. A scale that is constant along the contraction is applied to
the result, so the product itself multiplies narrow values exactly and adds in float32, as hardware does; any other scale (blocks)
is multiplied in first. Weights straight-through: the gradient of the quantized operand is the gradient of the operand.

Shapes: N tokens (rows), K inputs, M outputs.
"""
from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from trainer.keys import streams
from trainer.methods import lsq
from trainer.operands import STREAMS, Narrow, RowShards, Use, given_range, learned_step, narrow, seen_range, statistics, to_tensor, widened
from trainer.precision import Operand, PrecisionPolicy, Source
from trainer.scales import Meter, Site

X_FORWARD, W_FORWARD = Use("activations", 1, 0), Use("weights", 0, 1)
X_WGRAD, W_DGRAD = Use("activations", 0, 2), Use("weights", 1, 3)
G_DGRAD, G_WGRAD = Use("output_gradients", 1, 4), Use("output_gradients", 0, 5)


def _constant_along(scale, dim: int) -> bool:
    return scale.ndim == 0 or scale.shape[dim] == 1


def _product(a: Narrow, b: Narrow, contract_a: int, contract_b: int, dot_dtype):
    """The product of two operands, scales applied after where they are constant along the contraction. Operands in a native dtype are
    multiplied in it: integers add up in int32, floats in float32."""
    (a_values, a_scale, _), (b_values, b_scale, _) = a, b
    if a_scale is not None and not _constant_along(a_scale, contract_a):
        a_values, a_scale = a_values.astype(jnp.float32) * a_scale, None
    if b_scale is not None and not _constant_along(b_scale, contract_b):
        b_values, b_scale = b_values.astype(jnp.float32) * b_scale, None
    native = jnp.float32 not in (a_values.dtype, b_values.dtype)
    if not native:
        a_values, b_values = a_values.astype(dot_dtype), b_values.astype(dot_dtype)
    total = jnp.int32 if native and jnp.issubdtype(a_values.dtype, jnp.integer) else jnp.float32
    contracted = ((contract_a,), (contract_b,))
    if total is jnp.int32 and contract_a == contract_b == 0 and a_values.shape[0] % 2 == 0:
        # XLA:CPU takes four times as long over columns of int8 that lie in one dimension (2048 x 128 by 704: 10.8 ms against 2.6).
        a_values, b_values = (v.reshape(2, -1, v.shape[1]) for v in (a_values, b_values))
        contracted = ((0, 1), (0, 1))
    out = lax.dot_general(a_values, b_values, (contracted, ((), ())), precision=lax.Precision.HIGHEST, preferred_element_type=total).astype(jnp.float32)
    if a_scale is not None and b_scale is not None:
        return out * (a_scale.reshape(-1, 1) * b_scale.reshape(1, -1))
    if a_scale is not None:
        return out * a_scale.reshape(-1, 1)
    return out if b_scale is None else out * b_scale.reshape(1, -1)


def _forward(rows, x_NK, w_KM, policy, streams, site):
    """y, and of x and w each: the narrow operand, and the range of the tensor if it is wanted."""
    operands, seen = [], []
    for tensor, operand, use in ((x_NK, policy.activations, X_FORWARD), (w_KM, policy.weights, W_FORWARD)):
        seen.append(seen_range(tensor, operand, use, rows))
        operands.append(narrow(tensor, operand.first, use, streams, rows, given_range(operand.first, use.role, site, seen[-1]), policy, site.blend))
    return _product(*operands, 1, 0, policy.dot_dtype), operands, seen


def _moved(operand: Narrow, role: Operand) -> tuple[Narrow, jax.Array | None]:
    """The numbers without their scale, and that, for the output gradient to take: [N, 1] of tokens, [1, M] of channels, [] of a tensor."""
    if not role.moved:
        return operand, None
    return Narrow(operand.values, None, operand.inside), operand.scale


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _linear(rows, num_inputs, x_NK, w_KM, policy, streams, learned, site, meter):
    del num_inputs, meter  # the backward needs them: K, and what the layer saw is the meter's cotangent
    return _forward(rows, x_NK, w_KM, policy, streams, replace(site, learned=learned))[0]


def _linear_fwd(rows, num_inputs, x_NK, w_KM, policy, streams, learned, site, meter):
    del num_inputs
    site = replace(site, learned=learned)
    y_NM, (x, w), seen = _forward(rows, x_NK, w_KM, policy, streams, site)
    measured = {}
    if meter.statistics:
        measured = {use.role: statistics(tensor, found, getattr(policy, use.role).first, use, streams, policy)
                    for tensor, found, use in ((x_NK, x, X_FORWARD), (w_KM, w, W_FORWARD))}
    # A role that the backward reads as the forward did saves its narrow values; otherwise the backward starts from the tensor itself.
    saved_x = x if policy.activations.kept else Narrow(x_NK, None, x.inside)
    saved_w = w if policy.weights.kept else Narrow(w_KM, None, w.inside)
    tensors = (x_NK, w_KM) if site.learned else None
    return y_NM, (saved_x, saved_w, tensors, seen, measured, policy, streams, site, meter)


def _linear_bwd(rows, num_inputs, residuals, g_NM):
    saved_x, saved_w, tensors, (x_seen, w_seen), measured, policy, streams, site, meter = residuals

    def second(saved: Narrow, operand: Operand, use: Use, seen):
        given = given_range(operand.second, use.role, site, seen)
        return saved if operand.shared else narrow(widened(saved), operand.second, use, streams, rows, given, policy, site.blend)

    x, x_scale = _moved(second(saved_x, policy.activations, X_WGRAD, x_seen), policy.activations)
    w, w_scale = _moved(second(saved_w, policy.weights, W_DGRAD, w_seen), policy.weights)
    out = policy.output_gradients
    g_seen = seen_range(g_NM, out, G_DGRAD, rows)
    into_dgrad, into_wgrad = (g_NM if scale is None else g_NM * scale for scale in (w_scale, x_scale))
    g_dgrad = narrow(into_dgrad, out.first, G_DGRAD, streams, rows, given_range(out.first, G_DGRAD.role, site, g_seen), policy, site.blend)
    g_wgrad = g_dgrad if out.shared else second(Narrow(into_wgrad), out, G_WGRAD, g_seen)
    dx_NK = _product(g_dgrad, w, 1, 1, policy.dot_dtype)
    # The barrier keeps XLA from turning the product round where dw is transposed later (a tied head): half the speed on a CPU.
    dw_KM = lax.optimization_barrier(_product(x, g_wgrad, 0, 0, policy.dot_dtype))
    d_learned = _learned_gradients(tensors, (saved_x, saved_w), (dx_NK, dw_KM), policy, site)
    dx_NK = to_tensor(dx_NK, policy.activations, saved_x.inside, X_FORWARD, num_inputs, policy.weights.rotated, streams)
    dw_KM = to_tensor(dw_KM, policy.weights, saved_w.inside, W_FORWARD, num_inputs, policy.activations.rotated, streams)
    seen = {"activations": x_seen, "weights": w_seen, "output_gradients": g_seen}
    if meter.statistics:
        measured = measured | {"output_gradients": statistics(into_dgrad, g_dgrad, out.first, G_DGRAD, streams, policy)}
    return dx_NK, dw_KM, None, None, d_learned, None, Meter({role: seen[role] for role in meter.ranges}, measured)


def _learned_gradients(tensors, saved, gradients, policy: PrecisionPolicy, site: Site) -> dict:
    """The gradients of learned scales, by role; config has seen to it that their numbers were saved."""
    found = {}
    for index, use in enumerate((X_FORWARD, W_FORWARD)):
        if use.role in site.learned:
            quantizer, x = getattr(policy, use.role).first, tensors[index]
            num_features = x.shape[1] if use.role == "activations" else x.size
            step, slope = learned_step(quantizer, use.role, site)
            found[use.role] = slope * lsq.step_gradient(gradients[index], x, saved[index].values.astype(jnp.float32), step, quantizer.element, num_features)
    return found


_linear.defvjp(_linear_fwd, _linear_bwd)


def linear(x_NK: jax.Array, w_KM: jax.Array, policy: PrecisionPolicy, key=None, rows: RowShards | None = None,
           site: Site | None = None) -> jax.Array:
    """x w in the policy's precision, float32 [N, M]; its backward runs dgrad and wgrad in theirs.

    `key`: uint32[2], needed when the policy rounds stochastically. `rows`: set inside shard_map when N is split over devices, so
    that scales and random bits are those of the whole tensor. `site`: needed when scales are delayed; of static ones it tells the
    size that tensors are expected to have.
    """
    _check_key(policy, key)
    site = site or Site()
    for source, known in ((Source.DELAYED, site.remembered), (Source.EMA, site.remembered), (Source.LEARNED, site.learned)):
        for role in policy.roles(source):
            if role not in known:
                where = "which no model has here" if source is Source.LEARNED else "which nothing remembers here"
                raise ValueError(f"precision: source='{source.value}' of {role} goes by {'a parameter' if source is Source.LEARNED else 'earlier steps'}, {where}; accepted: current, static, none")
    return _linear(rows, x_NK.shape[1], x_NK, w_KM, policy, streams(key, STREAMS) if policy.stochastic else None, site.learned, replace(site, learned={}, meter=Meter()), site.meter)


def _check_key(policy: PrecisionPolicy, key) -> None:
    if key is None and policy.stochastic:
        raise ValueError("precision: stochastic rounding or a random transform needs key=; pass a uint32[2] key, or choose rounding='nearest_even' and transform=hadamard")


def dot_general(policy: PrecisionPolicy, key=None):
    """A drop-in for `lax.dot_general` in `nnx.Linear(dot_general=...)`: contracts any dims of lhs (activations) with rhs (weights).

    The result has lhs's dtype. Batch dimensions are mapped over. Constant widths only: the policy is closed over, and so is the key: the same
    bits at every call, so make one for each step and layer where the loss is computed. ValueError for a random policy without a key, and for
    one that is more than a product: with norms of its own, or quantization that comes in gradually.
    """
    _check_key(policy, key)
    for what, has in (("extra_norm", policy.extra_norm), ("ramp_steps", policy.ramp is not None)):
        if has:
            raise ValueError(f"precision.{what} is of a whole model in training, and this is one product, which would leave it out; accepted: a policy without, such as "
                             "trainer.policy('bitnet', 'precision.extra_norm=null'), and the model's own norms")

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
