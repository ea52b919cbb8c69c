"""The decoder's operations other than matrix products, each with a hand-written backward where autodiff is slow.

Shapes: B batch, T time, N = B*T tokens, D model width, H heads, K head width, F feed-forward width, V vocabulary.
All functions take and return float32. XLA:CPU multiplies a [T, T] matrix from the left four times slower when it has to be
transposed first, so keys and values travel as [B, H, K, T]: then none of the six products of attention needs it.
"""
from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

HIGHEST = lax.Precision.HIGHEST


# --- embedding ------------------------------------------------------------------------------------------------------


def embed(table_VD: jax.Array, tokens_N: jax.Array) -> jax.Array:
    """Rows of the table, [N, D]. Autodiff's scatter-add is a fortieth of a product with a one-hot matrix on a CPU; on a GPU it adds
    in no fixed order unless XLA is told to (--xla_gpu_deterministic_ops)."""
    return table_VD[tokens_N]


# --- normalisation and activation -----------------------------------------------------------------------------------


def rms_norm(x_ND: jax.Array, gain_D: jax.Array, eps: float = 1e-6) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * gain (Zhang & Sennrich 2019, eq. 4)."""
    return x_ND * lax.rsqrt(jnp.mean(x_ND * x_ND, axis=-1, keepdims=True) + eps) * gain_D[None, :]


def halves(x):
    """The two halves of the last dimension."""
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


@jax.custom_vjp
def swiglu(gate_up_N2F: jax.Array) -> jax.Array:
    """silu(gate) * up, with gate and up side by side in one array (Shazeer 2020, eq. 6)."""
    gate, up = halves(gate_up_N2F)
    return gate * jax.nn.sigmoid(gate) * up


def _swiglu_fwd(gate_up_N2F):
    return swiglu(gate_up_N2F), gate_up_N2F


def swiglu_bwd(gate_up_N2F, g_NF):
    """The gradient of gate_up."""
    gate, up = halves(gate_up_N2F)
    sigmoid = jax.nn.sigmoid(gate)
    d_gate = g_NF * up * (sigmoid * (1.0 + gate * (1.0 - sigmoid)))
    return (jnp.concatenate([d_gate, g_NF * gate * sigmoid], axis=-1),)


swiglu.defvjp(_swiglu_fwd, swiglu_bwd)


# --- attention ------------------------------------------------------------------------------------------------------


def rope_tables(seq_len: int, head_dim: int, base: float = 10000.0) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of the rotary angles, each [T, K/2] (Su et al. 2021, section 3.2.2, half-split layout).

    Constants of numpy: XLA:CPU would compute traced ones anew for every element that they multiply.
    """
    frequency = base ** (-np.arange(head_dim // 2) / (head_dim // 2))
    angle = np.arange(seq_len)[:, None] * frequency[None, :]
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def _rotate(x, cos, sin, dim):
    """Rotate the two halves of `dim`; cos and sin broadcast against a half. The halves change places by a reversal: XLA:CPU fuses
    it, where it would make a concatenation element by element."""
    halves = x.reshape(*x.shape[:dim], 2, x.shape[dim] // 2, *x.shape[dim + 1:])
    turned = halves * np.stack([cos, cos], dim) + lax.rev(halves, (dim,)) * np.stack([-sin, sin], dim)
    return turned.reshape(x.shape)


def bdot(a, b, contract_a, contract_b):
    """A product over the last two dims with [B, H] as batch, added in float32."""
    return lax.dot_general(a, b, (((contract_a,), (contract_b,)), ((0, 1), (0, 1))), precision=HIGHEST, preferred_element_type=jnp.float32)


@jax.custom_vjp
def causal_attention(q_BHTK: jax.Array, k_BHKT: jax.Array, v_BHKT: jax.Array) -> jax.Array:
    """softmax(q k, causal) v -> [B, H, T, K]. Scale q by K**-0.5 before."""
    return attention_fwd(q_BHTK, k_BHKT, v_BHKT)[0]


def causal_softmax(scores_BHTT):
    """(weights that are not normalised, what normalises them): each at most 1, zero above the diagonal."""
    seq_len = scores_BHTT.shape[2]
    row = lax.broadcasted_iota(jnp.int32, (1, 1, seq_len, seq_len), 2)
    col = lax.broadcasted_iota(jnp.int32, (1, 1, seq_len, seq_len), 3)
    scores = jnp.where(col <= row, scores_BHTT, -1e30)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    return weights, 1.0 / jnp.sum(weights, axis=-1, keepdims=True)


def attention_fwd(q_BHTK, k_BHKT, v_BHKT):
    """(result, residuals)."""
    weights, inverse = causal_softmax(bdot(q_BHTK, k_BHKT, 3, 2))
    out = bdot(weights, v_BHKT, 3, 3) * inverse
    return out, (q_BHTK, k_BHKT, v_BHKT, weights, inverse, out)


def attention_bwd(residuals, g_BHTK, dtype=jnp.float32):
    """Gradients of q, k and v, float32; dtype: of what goes into products."""
    q, k, v, weights, inverse, out = residuals
    g = g_BHTK.astype(jnp.float32) * inverse.astype(jnp.float32)
    narrow_g = g.astype(dtype)
    dv = bdot(narrow_g, weights, 2, 2)
    delta = jnp.sum(g * out.astype(jnp.float32), axis=-1, keepdims=True)
    d_scores = (weights.astype(jnp.float32) * (bdot(narrow_g, v, 3, 2) - delta)).astype(dtype)
    return bdot(d_scores, k, 3, 3), bdot(q, d_scores, 2, 2), dv


causal_attention.defvjp(attention_fwd, attention_bwd)


def rotary_attention(qkv_NX: jax.Array, batch: int, num_heads: int, attention=causal_attention) -> jax.Array:
    """Causal self-attention with rotary positions from the fused projection [N, 3*D] to [N, D]; attention(q, k, v) as `causal_attention`."""
    num_tokens, width = qkv_NX.shape[0], qkv_NX.shape[1] // 3
    seq_len, head_dim = num_tokens // batch, width // num_heads
    cos, sin = rope_tables(seq_len, head_dim)
    # lax.split transposes to one concatenation; indexing would transpose to a padded sum of three.
    q, k, v = (part[:, :, 0] for part in lax.split(qkv_NX.reshape(batch, seq_len, 3, num_heads, head_dim), (1, 1, 1), axis=2))
    scale = np.float32(head_dim**-0.5)
    q_BHTK = _rotate(q.transpose(0, 2, 1, 3), cos[None, None] * scale, sin[None, None] * scale, 3)
    k_BHKT = _rotate(k.transpose(0, 2, 3, 1), cos.T[None, None], sin.T[None, None], 2)
    out_BHTK = attention(q_BHTK, k_BHKT, v.transpose(0, 2, 3, 1))
    return out_BHTK.transpose(0, 2, 1, 3).reshape(num_tokens, width)


# --- loss -----------------------------------------------------------------------------------------------------------


@jax.custom_vjp
def cross_entropy(logits_NV: jax.Array, targets_N: jax.Array) -> jax.Array:
    """-log softmax(logits)[target] in nats, [N]."""
    return _cross_entropy_fwd(logits_NV, targets_N)[0]


def _is_target(shape, targets_N):
    return lax.broadcasted_iota(targets_N.dtype, shape, 1) == targets_N[:, None]


def _cross_entropy_fwd(logits_NV, targets_N):
    shifted = logits_NV - jnp.max(logits_NV, axis=-1, keepdims=True)
    exp_NV = jnp.exp(shifted)
    total_N = jnp.sum(exp_NV, axis=-1)
    at_target_N = jnp.sum(jnp.where(_is_target(shifted.shape, targets_N), shifted, 0.0), axis=-1)
    return jnp.log(total_N) - at_target_N, (exp_NV, total_N, targets_N)


def _cross_entropy_bwd(residuals, g_N):
    exp_NV, total_N, targets_N = residuals
    onehot = _is_target(exp_NV.shape, targets_N).astype(exp_NV.dtype)
    return (exp_NV / total_N[:, None] - onehot) * g_N[:, None], None


cross_entropy.defvjp(_cross_entropy_fwd, _cross_entropy_bwd)
