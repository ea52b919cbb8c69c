"""The decoder's operations with scale rules of their own, used where scales are carried: a rule that knows the whole operation needs no
alignment inside it. Values and gradients are those of `trainer.ops` to rounding.

Shapes: as in `trainer.ops`. Rules compute in float32; what goes into a matrix product is rounded to the dtype of the data first.
"""
from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from trainer import ops
from trainer.propagation import ScaledArray, pow2, scale_rule, shift

EPS = 1e-6


# --- normalisation --------------------------------------------------------------------------------------------------


@jax.custom_vjp
def rms_norm(x_ND: jax.Array, gain_D: jax.Array) -> jax.Array:
    """As `ops.rms_norm`. Its result has the scale of the gain, whatever that of x."""
    return _norm_forward(x_ND, gain_D)[0]


@scale_rule
def _norm_forward(x_ND, gain_D):
    """(result, 1 / rms [N, 1])."""
    return _normed(x_ND, gain_D, jnp.float32(EPS))


def _normed(x_ND, gain_D, eps):
    inverse_N1 = lax.rsqrt(jnp.mean(x_ND * x_ND, axis=-1, keepdims=True) + eps)
    return x_ND * inverse_N1 * gain_D[None, :], inverse_N1


@_norm_forward.defrule
def _(x: ScaledArray, gain: ScaledArray):
    down = pow2(-jnp.asarray(x.exponent, jnp.int32))  # eps at the scale of the data; at most 2**127 and at least 2**-126 of it
    y_ND, inverse_N1 = _normed(x.data.astype(jnp.float32), gain.data.astype(jnp.float32), EPS * down * down)
    return ScaledArray(y_ND, gain.exponent), ScaledArray(inverse_N1, -x.exponent)


@scale_rule
def _norm_backward(x_ND, gain_D, inverse_N1, g_ND):
    """Gradients of x and of the gain."""
    hat_ND, gained_ND = x_ND * inverse_N1, g_ND * gain_D[None, :]
    dx_ND = inverse_N1 * (gained_ND - hat_ND * jnp.mean(gained_ND * hat_ND, axis=-1, keepdims=True))
    return dx_ND, jnp.sum(g_ND * hat_ND, axis=0)


@_norm_backward.defrule
def _(x, gain, inverse, g):
    dx_ND, d_gain_D = _norm_backward.fun(*(a.data.astype(jnp.float32) for a in (x, gain, inverse, g)))
    growth = (g.data.shape[0].bit_length() - 1) // 2
    return (ScaledArray(dx_ND, inverse.exponent + g.exponent + gain.exponent),
            ScaledArray(d_gain_D * 2.0**-growth, g.exponent + growth))


def _rms_norm_fwd(x_ND, gain_D):
    y_ND, inverse_N1 = _norm_forward(x_ND, gain_D)
    return y_ND, (x_ND, gain_D, inverse_N1)


rms_norm.defvjp(_rms_norm_fwd, lambda residuals, g_ND: _norm_backward(*residuals, g_ND))


# --- activation -----------------------------------------------------------------------------------------------------


@jax.custom_vjp
def swiglu(gate_up_N2F: jax.Array) -> jax.Array:
    """As `ops.swiglu`."""
    return _swiglu_forward(gate_up_N2F)


_swiglu_forward = scale_rule(ops.swiglu)


@_swiglu_forward.defrule
def _(gate_up: ScaledArray):
    gate, up = ops.halves(gate_up.data.astype(jnp.float32))
    sigmoid = jax.nn.sigmoid(shift(gate, gate_up.exponent))
    return ScaledArray(gate * sigmoid * up, 2 * gate_up.exponent)


_swiglu_backward = scale_rule(lambda gate_up_N2F, g_NF: ops.swiglu_bwd(gate_up_N2F, g_NF)[0])


@_swiglu_backward.defrule
def _(gate_up, g):
    gate, up = ops.halves(gate_up.data.astype(jnp.float32))
    g_NF, value = g.data.astype(jnp.float32), shift(gate, gate_up.exponent)
    sigmoid = jax.nn.sigmoid(value)
    d_gate = g_NF * up * (sigmoid * (1.0 + value * (1.0 - sigmoid)))
    return ScaledArray(jnp.concatenate([d_gate, g_NF * gate * sigmoid], axis=-1), gate_up.exponent + g.exponent)


swiglu.defvjp(lambda x: (_swiglu_forward(x), x), lambda x, g: (_swiglu_backward(x, g),))


# --- attention ------------------------------------------------------------------------------------------------------


@jax.custom_vjp
def causal_attention(q_BHTK: jax.Array, k_BHKT: jax.Array, v_BHKT: jax.Array) -> jax.Array:
    """As `ops.causal_attention`."""
    return _attention_forward(q_BHTK, k_BHKT, v_BHKT)[0]


_attention_forward = scale_rule(ops.attention_fwd)


@_attention_forward.defrule
def _(q: ScaledArray, k: ScaledArray, v: ScaledArray):
    """The scores have to be unscaled; the result has the scale of v."""
    scores = ops.bdot(q.data, k.data, 3, 2)
    weights, inverse = ops.causal_softmax(shift(scores, q.exponent + k.exponent))
    out = ops.bdot(weights.astype(v.data.dtype), v.data, 3, 3) * inverse
    return ScaledArray(out, v.exponent), (q, k, v, ScaledArray(weights, 0), ScaledArray(inverse, 0), ScaledArray(out, v.exponent))


_attention_backward = scale_rule(ops.attention_bwd)


@_attention_backward.defrule
def _(residuals, g: ScaledArray):
    q, k, v, weights, inverse, out = residuals
    dtype = q.data.dtype
    dq, dk, dv = ops.attention_bwd(tuple(x.data for x in (q, k, v, weights, inverse, out)), g.data, dtype)
    scores = g.exponent + v.exponent  # of the gradient of the scores
    return ScaledArray(dq, scores + k.exponent), ScaledArray(dk, scores + q.exponent), ScaledArray(dv, g.exponent)


causal_attention.defvjp(_attention_forward, lambda residuals, g: _attention_backward(residuals, g))


def rotary_attention(qkv_NX: jax.Array, batch: int, num_heads: int) -> jax.Array:
    """As `ops.rotary_attention`."""
    return ops.rotary_attention(qkv_NX, batch, num_heads, causal_attention)
