"""Attention whose scores, probabilities, keys and values are quantized: the cache that a served model keeps, and what its products read.

Where telemetry is due it reports what each of them loses (`trainer.telemetry`): the statistics, computed as the forward pass goes, leave the
backward pass as the cotangent of the meter's zeros (`trainer.scales`). Masked scores and probabilities do not count: they are zeros that
nobody reads, so shares and means are over the T (T + 1) / 2 of T^2 that a query may attend to, and scales of nothing but those are left out.

Straight-through: gradients are those of the quantized tensors. The scale of a token's keys or values lies along the head width, that of a
channel along time; scores and probabilities have a row for each query. A scale along time sees tokens to come: it stands for one that was
calibrated before (KVQuant, Hooper et al. 2024, section 3.1, takes keys per channel and values per token).

Shapes: B batch, H heads, T time (queries, then keys), K head width; keys and values travel as [B, H, K, T] (`trainer.ops`).
"""
from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import formats
from formats import Granularity, noise
from formats.gradients import pass_inside, pass_through
from trainer import ops, telemetry
from trainer.keys import fold_in
from trainer.operands import where_inside
from trainer.precision import ATTENTION_ROLES, ATTENTION_TENSORS

SALTS = {"keys": 0x10, "values": 0x11, "scores": 0x12, "probabilities": 0x13}  # of random bits; those of products count from 0
ROLE = {name: role for role, names in ATTENTION_TENSORS.items() for name in names}
NOT_QUANTIZED = np.array([np.nan] * len(telemetry.FIELDS) + [0.0], np.float32)  # the report on a tensor that is left as it is


def attention(policy, key=None, axis_name: str | None = None, meter: dict[str, jax.Array] | None = None):
    """`ops.causal_attention` with the policy's roles quantized. key: uint32[2], for stochastic rounding. axis_name: the device axis that
    the batch is split over. meter: name of a tensor (ATTENTION_TENSORS) -> float32 zeros [len(telemetry.RAW)], whose cotangents are then the
    statistics of that tensor: NaN if it is not quantized."""
    meter = meter or {}
    if all(getattr(policy, role) is None for role in ATTENTION_ROLES):
        return partial(_untouched, meter) if meter else ops.causal_attention

    def narrow(x, name, token: int, channel: int, counts=None):
        quantizer = getattr(policy, ROLE[name])
        if quantizer is None:
            return _reported(x, NOT_QUANTIZED, meter[name]) if name in meter else x
        y, found = _quantized(x, quantizer, SALTS[name], (token, channel), key, axis_name)
        return _reported(y, telemetry.raw(lax.stop_gradient(x), *found, quantizer.format, counts), meter[name]) if name in meter else y

    def run(q_BHTK, k_BHKT, v_BHKT):
        k = narrow(k_BHKT, "keys", 2, 3)
        v = narrow(v_BHKT, "values", 2, 3)
        allowed = jnp.tri(q_BHTK.shape[2], dtype=bool)[None, None]
        # What is masked is zero before it is quantized, so that no scale sees what is to come.
        scores = narrow(jnp.where(allowed, ops.bdot(q_BHTK, k, 3, 2), 0.0), "scores", 3, 2, allowed)
        probabilities = jax.nn.softmax(jnp.where(allowed, scores, -jnp.inf), axis=-1)
        return ops.bdot(narrow(probabilities, "probabilities", 3, 2, allowed), v, 3, 3)

    return run


def _untouched(meter, q_BHTK, k_BHKT, v_BHKT):
    """`ops.causal_attention`, which reports that nothing is quantized."""
    for slot in meter.values():
        q_BHTK = _reported(q_BHTK, NOT_QUANTIZED, slot)
    return ops.causal_attention(q_BHTK, k_BHKT, v_BHKT)


@jax.custom_vjp
def _reported(x, found, slot):
    """x itself; the cotangent of slot, zeros like found, is found."""
    del found, slot
    return x


def _reported_fwd(x, found, slot):
    del slot
    return x, found


def _reported_bwd(found, g):
    return g, jnp.zeros_like(found), found


_reported.defvjp(_reported_fwd, _reported_bwd)


def _quantized(x, quantizer, salt: int, axes: tuple[int, int], key, axis_name):
    """x [B, ...] quantized, straight-through, and the (values, scale) that it is the product of; axes: along which the scale of a token and
    of a channel is constant."""
    fmt = quantizer.format
    if isinstance(fmt, formats.Scaled):
        fmt = replace(fmt, axis=axes[1] if fmt.granularity is Granularity.CHANNEL else axes[0])
    bits, reduce_max, reduce_mean = None, None, None
    if quantizer.stochastic:
        start = 0 if axis_name is None else lax.axis_index(axis_name) * x.size
        bits = partial(noise.random_bits, fold_in(key, salt), x.shape, offset=start)
    whole = isinstance(fmt, formats.Scaled) and (fmt.granularity is Granularity.TENSOR or fmt.two_level)
    if axis_name is not None and whole:
        reduce_max, reduce_mean = (partial(over, axis_name=axis_name) for over in (lax.pmax, lax.pmean))
    values, scale = formats.split(x, fmt, rounding=quantizer.rounding, random_bits=bits, reduce_max=reduce_max, reduce_mean=reduce_mean)
    y = values * scale
    inside = where_inside(x, values, scale, quantizer)
    return (pass_through(x, y) if inside is None else pass_inside(x, y, inside)), (values, scale)
