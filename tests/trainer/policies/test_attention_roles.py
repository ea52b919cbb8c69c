"""Quantized keys, values, scores and probabilities of attention: against numpy, causal where that is promised, the same however it is cut up.

Shapes: B batch, H heads, T time, K head width; keys and values are [B, H, K, T] (`trainer.ops`).
"""
from __future__ import annotations

from functools import partial

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

import trainer
from tests.trainer.tiny import TINY, final_state, folders
from trainer import ops
from trainer.cli import sweep_configs
from trainer.methods.attention import attention
from trainer.sweep import execute, make_plan

CHEAP = {"xla_backend_optimization_level": 0}  # compiling is what these tests cost
B, H, T, K = 4, 2, 9, 6


def _tensors(seed=0):
    """q, k, v and the cotangent of the result; tokens and channels differ in size."""
    rng = np.random.default_rng(seed)
    q, g = (rng.standard_normal((B, H, T, K)).astype(np.float32) for _ in range(2))
    k, v = (rng.standard_normal((B, H, K, T)) * np.exp(rng.uniform(-1, 1, (B, H, 1, T)) + rng.uniform(-1, 1, (B, H, K, 1))) for _ in range(2))
    return q, k.astype(np.float32), v.astype(np.float32), g


# --- oracle ---------------------------------------------------------------------------------------------------------------------------------


def symmetric(bits, axes):
    """Integers with a scale for what does not differ in `axes`."""

    def quantize(x):
        scale = np.max(np.abs(x), axis=axes, keepdims=True) / (2.0 ** (bits - 1) - 1)
        scale = np.where(scale > 0, scale, 1.0)
        return np.rint(x / scale) * scale

    return quantize


def unsigned(x):
    """uint8, a scale for every row."""
    scale = np.max(x, axis=-1, keepdims=True) / 255
    return np.rint(x / scale) * scale


def same(x):
    return x


def attend(q, k, v, g, kv=same, scores=same, probabilities=same):
    """(result, dq, dk, dv): every quantizer straight-through, masked scores zero before they are quantized."""
    seen = np.tril(np.ones((T, T), bool))
    k, v = kv(k), kv(v)
    s = np.where(seen, scores(np.where(seen, q @ k, 0.0)), -np.inf)
    p = np.exp(s - s.max(-1, keepdims=True))
    p = p / p.sum(-1, keepdims=True)
    p_q = probabilities(p)
    dp = g @ v
    ds = np.where(seen, p * (dp - np.sum(dp * p, axis=-1, keepdims=True)), 0.0)
    return p_q @ v.swapaxes(2, 3), ds @ k.swapaxes(2, 3), q.swapaxes(2, 3) @ ds, g.swapaxes(2, 3) @ p_q


# --- forward and backward -------------------------------------------------------------------------------------------------------------------

KV4 = ("precision.kv.format=integer", "precision.kv.bits=4")
SCORES = ("precision.scores.format=integer", "precision.scores.bits=6", "precision.scores.granularity=token")
PROBABILITIES = ("precision.probabilities.format=uint8", "precision.probabilities.granularity=token")
CASES = {
    "nothing": ((), {}),
    "kv per token": ((*KV4, "precision.kv.granularity=token"), {"kv": symmetric(4, 2)}),
    "kv per channel": ((*KV4, "precision.kv.granularity=channel"), {"kv": symmetric(4, 3)}),
    "kv per tensor": ((*KV4, "precision.kv.granularity=tensor"), {"kv": symmetric(4, None)}),
    "scores": (SCORES, {"scores": symmetric(6, 3)}),
    "probabilities": (PROBABILITIES, {"probabilities": unsigned}),
    "everything": (("precision.kv.format=integer", "precision.kv.bits=8", "precision.kv.granularity=token", *SCORES, *PROBABILITIES),
                   {"kv": symmetric(8, 2), "scores": symmetric(6, 3), "probabilities": unsigned}),
}  # fmt: skip


@partial(jax.jit, compiler_options=CHEAP)
def _in_jax(which, q, k, v, g, key):
    out, backward = jax.vjp(attention(which, key), q, k, v)
    return out, *backward(g)


NO_KEY = np.zeros(2, np.uint32)


def _policy(*overrides):
    return trainer.policy("float32", *overrides)


@pytest.mark.parametrize("name", CASES)
def test_attention_equals_numpy(name):
    """Forward and all three gradients; few values are near enough to a threshold to be rounded to another side (at most one row in 20)."""
    overrides, quantizers = CASES[name]
    tensors = _tensors()
    found = _in_jax(_policy(*overrides), *tensors, NO_KEY)
    for one, other in zip(found, attend(*(a.astype(np.float64) for a in tensors), **quantizers), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5 * np.max(np.abs(other)))


def test_presets_are_these_quantizers():
    """kv: 4 bits per token; int8_attention: 8 bits of everything, probabilities without a sign."""
    tensors = _tensors(1)
    all_8 = {"kv": symmetric(8, 2), "scores": symmetric(8, 3), "probabilities": unsigned}
    for name, quantizers in (("kv", {"kv": symmetric(4, 2)}), ("int8_attention", all_8)):
        found = _in_jax(trainer.policy(name), *tensors, NO_KEY)
        expected = attend(*(a.astype(np.float64) for a in tensors), **quantizers)
        assert all(np.linalg.norm(one - other) <= 1e-3 * np.linalg.norm(other) for one, other in zip(found, expected))


def test_rounding_can_be_stochastic():
    """By the words of the key, without bias: of queries that are zero the result is the mean of the values so far."""
    q, k, v, _ = _tensors(2)
    which = _policy(*KV4, "precision.kv.granularity=token", "precision.kv.rounding=stochastic")
    assert which.stochastic
    keys = np.stack([np.zeros(100), np.arange(100)], 1).astype(np.uint32)
    every = jax.jit(jax.vmap(lambda key: attention(which, key)(q * 0, k, v)), compiler_options=CHEAP)
    found = np.asarray(every(np.concatenate([keys, keys[:1]])), np.float64)
    np.testing.assert_array_equal(found[0], found[100])
    assert not np.array_equal(found[0], found[1])
    exact = (np.cumsum(v, axis=3) / np.arange(1, T + 1)).swapaxes(2, 3)
    error, spread = np.mean(found[:100], axis=0) - exact, np.std(found[:100], axis=0) / 10 + 1e-5
    assert np.max(np.abs(error / spread)) < 5 and np.sqrt(np.mean((error / spread) ** 2)) < 1.3


def test_clipping_masks_nothing_that_was_not_clipped():
    """A scale of the current amax clips nothing, so `clipped` is straight-through, the largest value of every token included."""
    tensors, plain = _tensors(3), ("precision.kv.granularity=token", "precision.kv.format=integer")
    for bits in (3, 4, 6, 8):
        policies = (_policy(*plain, f"precision.kv.bits={bits}", *more) for more in ((), ("precision.kv.gradient=clipped",)))
        one, other = (_in_jax(which, *tensors, NO_KEY) for which in policies)
        for a, b in zip(one, other):
            np.testing.assert_array_equal(a, b)


# --- causality ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, causal", [("kv per token", True), ("scores", True), ("probabilities", True), ("everything", True),
                                          ("kv per channel", False), ("kv per tensor", False)])
def test_later_tokens_change_no_earlier_result(name, causal):
    """Bit for bit, whatever the later token is; a scale along time sees it."""
    which = _policy(*CASES[name][0])
    q, k, v, g = _tensors()
    before = np.asarray(_in_jax(which, q, k, v, g, NO_KEY)[0])
    for at in (1, 5, T - 1):
        q_2, k_2, v_2 = (a.copy() for a in (q, k, v))
        q_2[:, :, at], k_2[:, :, :, at], v_2[:, :, :, at] = q[:, :, at] * 30, k[:, :, :, at] * -50, v[:, :, :, at] * 40
        after = np.asarray(_in_jax(which, q_2, k_2, v_2, g, NO_KEY)[0])
        assert np.array_equal(after[:, :, :at], before[:, :, :at]) == causal
        assert not np.array_equal(after[:, :, at:], before[:, :, at:])


# --- widths, devices, cohorts ---------------------------------------------------------------------------------------------------------------


def test_the_error_falls_with_the_bits():
    """One compiled program for all widths; 32 is float32 bit for bit."""
    tensors = _tensors()
    exact = _in_jax(trainer.policy("kv", "precision.bits=32"), *tensors, NO_KEY)
    for one, other in zip(exact, _in_jax(trainer.policy("kv", "precision.bits=16"), *tensors, NO_KEY)):
        np.testing.assert_allclose(one, other, rtol=1e-2, atol=1e-3)
    found = [_in_jax(trainer.policy("kv", f"precision.bits={bits}"), *tensors, NO_KEY) for bits in (2, 3, 4, 6, 8, 12)]
    errors = [[np.linalg.norm(a - b) for a, b in zip(one, exact)] for one in found]
    assert np.all(np.diff(errors, axis=0) < 0)
    plain = jax.jit(lambda q, k, v: ops.causal_attention(q, k, v), compiler_options=CHEAP)(*tensors[:3])
    np.testing.assert_allclose(exact[0], plain, rtol=1e-5, atol=1e-6)


SPLIT = {
    **{f"{name}, {rounding}": (*CASES[name][0], f"precision.kv.rounding={rounding}") for name in ("kv per tensor", "everything") for rounding in ("nearest_even", "stochastic")},
    "rms": (*KV4, "precision.kv.granularity=tensor", "precision.kv.amax=rms"),
    "two levels": ("precision.kv.format=float4_e2m1fn", "precision.kv.granularity=block", "precision.kv.block=4", "precision.kv.two_level=true", "precision.kv.amax=rms"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPLIT)
def test_two_devices_give_what_one_does(name):
    """The batch split over devices: scales of the whole tensor, and its random words, to summation order. Blocks keep their own statistics."""
    which = _policy(*SPLIT[name])
    tensors, key = _tensors(), np.array([1, 2], np.uint32)
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",), axis_types=(AxisType.Auto,))

    def local(q, k, v, g):
        out, backward = jax.vjp(attention(which, key, "data"), q, k, v)
        return out, *backward(g)

    split = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False), compiler_options=CHEAP)(*tensors)
    for one, other in zip(split, _in_jax(which, *tensors, key)):
        assert np.linalg.norm(one - other) <= 1e-6 * np.linalg.norm(other)


@pytest.mark.slow
def test_widths_of_the_cache_share_a_program(tmp_path, one_device):
    """P_kv: three widths, float32 among them, are members of one cohort; each is, to the bit, the run by itself."""
    base = [override for override in TINY if not override.startswith(("precision", "probe"))]

    def run(where, bits):
        plan = make_plan(sweep_configs([*base, "precision=kv", f"precision.bits={bits}", "steps=4", "probe=false", f"runs_dir={where}"])[0])
        return plan, execute(plan, quiet=True)

    plan, outcome = run(tmp_path / "together", "2,8,32")
    assert len(plan.runs) == 3 and len(plan.cohorts) == 1 and not outcome.failed
    run(tmp_path / "alone", "2")
    together, alone = folders(tmp_path / "together"), folders(tmp_path / "alone")
    records = {folder.record()["kv_bits"]: folder.record() for folder in together.values()}
    assert set(records) == {2.0, 8.0, 32.0} and len({record["loss"] for record in records.values()}) == 3
    assert records[2.0]["kv_format"] == "int2" and records[2.0]["kv_granularity"] == "token"
    ((name, folder),) = alone.items()
    assert [row["loss"] for row in folder.metrics() if "loss" in row] == [row["loss"] for row in together[name].metrics() if "loss" in row]
    assert final_state(folder)[1] == final_state(together[name])[1]
