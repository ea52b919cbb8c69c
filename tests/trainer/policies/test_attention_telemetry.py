"""What attention reports of its keys, values, scores and probabilities: counted in numpy, the same however the step is cut, nothing where
nothing is quantized.

Shapes: B batch, H heads, T time, K head width; L layers, F the fields of telemetry.
"""
from __future__ import annotations

import dataclasses
import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import trainer
from tests.trainer.tiny import folders, launch
from trainer import model as decoder
from trainer import scales, step, telemetry
from trainer.cohort import Layout, Program
from trainer.global_program import GlobalProgram
from trainer.methods.attention import attention
from trainer.optimizers import OptimizerNumbers
from trainer.precision import ATTENTION_TENSORS, ROLES
from trainer.schedules import ScheduleNumbers

CHEAP = {"xla_backend_optimization_level": 0}
B, H, T, K = 4, 2, 12, 8
SEEN = np.tril(np.ones((T, T), bool))


def _tensors():
    rng = np.random.default_rng(0)
    q, g = (rng.standard_normal((B, H, T, K)).astype(np.float32) for _ in range(2))
    k, v = (rng.standard_normal((B, H, K, T)) * np.exp(rng.uniform(-2, 2, (B, H, 1, T)) + rng.uniform(-1, 1, (B, H, K, 1))) for _ in range(2))
    return q, k.astype(np.float32), (v * 0.5).astype(np.float32), g


# --- against a count ----------------------------------------------------------------------------------------------------------------------------


def _steps(largest, axes):
    """x -> scale [broadcasting against x], of evenly spaced values up to largest."""
    return lambda x: np.max(np.abs(x), axis=axes, keepdims=True) / largest


def _in_blocks(x):
    """int5, a scale for every 4 keys of a query; that of keys which are all masked does not matter."""
    amax = np.max(np.abs(x.reshape(*x.shape[:-1], -1, 4)), axis=-1)
    return np.repeat(np.where(amax > 0, amax, 1.0) / 15, 4, axis=-1)


def _one(x):
    return np.ones((1,) * x.ndim)


def _int(role, bits, granularity):
    return f"precision.{role}.format=integer", f"precision.{role}.bits={bits}", f"precision.{role}.granularity={granularity}"


def _none(role, fmt):
    return f"precision.{role}.format={fmt}", f"precision.{role}.source=none"


# overrides, role, scale of a tensor, smallest and largest number of steps
CASES = {
    "kv per token": (_int("kv", 4, "token"), "kv", _steps(7, 2), (-7, 7)),
    "kv per channel": (_int("kv", 4, "channel"), "kv", _steps(7, 3), (-7, 7)),
    "kv per tensor": (_int("kv", 4, "tensor"), "kv", _steps(7, None), (-7, 7)),
    "kv without a scale": (_none("kv", "int3"), "kv", _one, (-3, 3)),
    "scores per query": (_int("scores", 5, "token"), "scores", _steps(15, 3), (-15, 15)),
    "scores per key": (_int("scores", 5, "channel"), "scores", _steps(15, 2), (-15, 15)),
    "scores without a scale": (_none("scores", "int4"), "scores", _one, (-7, 7)),
    "scores in blocks": ((*_int("scores", 5, "block"), "precision.scores.block=4"), "scores", _in_blocks, (-15, 15)),
    "probabilities": (("precision.probabilities.format=uint8", "precision.probabilities.granularity=token"), "probabilities", _steps(255, 3), (0, 255)),
}  # fmt: skip


def _count(x, scale, limits, seen):
    """The statistics [F] by their definition, over what is seen; scale broadcasts against x."""
    seen = np.broadcast_to(seen, x.shape)
    x_seen, steps = x[seen], (x / scale)[seen]
    exponents = np.log2(scale)[seen] if scale.shape == x.shape else np.log2(scale)  # every scale of more than a block is of something that is seen
    beyond = (steps < limits[0] * (1 + 1e-6)) | (steps > limits[1] * (1 + 1e-6))
    return [np.sqrt(np.mean(x_seen**2)), np.max(np.abs(x_seen)), np.mean((x_seen != 0) & (np.rint(steps) == 0)), np.mean(beyond), np.mean(exponents)]


def _meter(policy):
    return {name: jnp.zeros(len(telemetry.RAW)) for role in policy.attention_roles for name in ATTENTION_TENSORS[role]}


@partial(jax.jit, compiler_options=CHEAP)
def _found(policy, q, k, v, g, meter):
    """Name of a tensor -> its statistics [F], and the result with its gradients."""
    out, backward = jax.vjp(lambda q, k, v, meter: attention(policy, meter=meter)(q, k, v), q, k, v, meter)
    *gradients, seen = backward(g)
    return {name: telemetry.combine(raw[None]) for name, raw in seen.items()}, (out, *gradients)


@partial(jax.jit, compiler_options=CHEAP)
def _without(policy, q, k, v, g):
    out, backward = jax.vjp(attention(policy), q, k, v)
    return out, *backward(g)


def _captured():
    """Name -> (tensor, what of it counts), float64, of attention before anything is quantized."""
    q, k, v, _ = (a.astype(np.float64) for a in _tensors())
    scores = np.where(SEEN, q @ k, 0.0)
    weights = np.where(SEEN, np.exp(scores - np.max(np.where(SEEN, scores, -np.inf), axis=-1, keepdims=True)), 0.0)
    weights = np.where(weights < 2.0**-126, 0.0, weights)  # what float32 does not tell from zero was never anything else
    return {"keys": (k, True), "values": (v, True), "scores": (scores, SEEN), "probabilities": (weights / weights.sum(-1, keepdims=True), SEEN)}


@pytest.mark.parametrize("name", CASES)
def test_statistics_equal_a_count(name):
    """Of every tensor of the role; shares to one value in them, which may lie at a threshold. The result is what it is without being looked at."""
    overrides, role, scale_of, limits = CASES[name]
    policy = trainer.policy("float32", *overrides)
    found, results = _found(policy, *_tensors(), _meter(policy))
    assert set(found) == set(ATTENTION_TENSORS[role])
    for tensor in ATTENTION_TENSORS[role]:
        x, seen = _captured()[tensor]
        expected, one = _count(x, scale_of(x), limits, seen), 1.1 / np.sum(np.broadcast_to(seen, x.shape))
        np.testing.assert_allclose(np.delete(found[tensor], (2, 3)), np.delete(expected, (2, 3)), rtol=1e-5)
        np.testing.assert_allclose(found[tensor][2:4], expected[2:4], atol=one)
        assert expected[2] > 10 * one and (expected[3] > 10 * one) == ("without" in name)
    for one, other in zip(results, _without(policy, *_tensors()), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6 * np.max(np.abs(other)))


@pytest.mark.parametrize("granularity, axis", [("token", 2), ("channel", 3)])
def test_nothing_is_beyond_a_range_with_a_zero_point(granularity, axis):
    """Keys and values from their smallest to their largest (KIVI, Liu et al. 2024): what is below zero is not beyond the range, and what is
    next to it is lost."""
    policy = trainer.policy("float32", *_int("kv", 4, granularity), "precision.kv.zero_point=true")
    found, _ = _found(policy, *_tensors(), _meter(policy))
    for name in ("keys", "values"):
        x, _ = _captured()[name]
        scale = (np.maximum(np.max(x, axis=axis, keepdims=True), 0) - np.minimum(np.min(x, axis=axis, keepdims=True), 0)) / 15
        assert found[name][3] == 0 and found[name][2] == pytest.approx(np.mean((x != 0) & (np.abs(x) < scale / 2)), abs=1.1 / x.size)
        assert found[name][4] == pytest.approx(np.mean(np.log2(scale)), rel=1e-5)


def test_a_tensor_that_is_left_as_it_is_has_no_share():
    """NaN in every field, beside roles that are quantized and where none is: not the zeros of a meter that nobody read."""
    both, scores = (trainer.policy("float32", *(o for name in names for o in CASES[name][0])) for names in (("kv per token", "scores per query"), ("scores per query",)))
    for here in (scores, trainer.policy("float32")):
        seen = {name: np.asarray(values) for name, values in _found(here, *_tensors(), _meter(both))[0].items()}
        assert np.isnan(seen["keys"]).all() and np.isnan(seen["values"]).all()
        assert np.isnan(seen["scores"]).all() == (here is not scores)


def test_nothing_is_measured_unless_asked():
    """No slot where nothing of attention is quantized, none without telemetry, and then no trace of it in the program."""
    kv = trainer.policy("kv")
    assert scales.range_meter(kv, (2, 4)).attention == {} == scales.watched(scales.Meter(), trainer.policy("int8"), (2, 4)).attention
    assert scales.watched(scales.Meter(), trainer.policy("float32", "precision.exemptions={head: kv}"), (2, 4)).attention == {}
    assert set(scales.watched(scales.Meter(), kv, (2, 4)).attention) == {"keys", "values"}
    plain, metered = (str(jax.make_jaxpr(attention(kv, meter=meter))(*_tensors()[:3])) for meter in ({}, _meter(kv)))
    assert plain == str(jax.make_jaxpr(attention(kv))(*_tensors()[:3])) != metered and "_reported" in metered and "_reported" not in plain


# --- in a step ----------------------------------------------------------------------------------------------------------------------------------

MODEL = decoder.ModelConfig(num_layers=2, d_model=8, num_heads=2, d_ff=12, vocab_size=11)
STRUCTURE = step.StepStructure(MODEL, "adamw", "constant", batch_size=4, seq_len=6, telemetry_every=2)
TOKENS = np.random.default_rng(0).integers(0, 11, (3, 4, 7)).astype(np.int32)  # steps, B, T + 1
COARSE = (*_int("kv", 3, "token"), *_int("scores", 3, "token"), *_none("probabilities", "int2"))  # no scale sees more than a sequence
LAYOUTS = {"one": Layout(1, 1, "map"), "vmap": Layout(1, 1, "vmap"), "devices": Layout(1, 2, "map"), "sharded": Layout(1, 2, "data")}


def _hyper(*overrides):
    numbers = OptimizerNumbers(*(np.float32(x) for x in (0.01, 0.9, 0.95, 1e-8, 0.1, 1.0)))
    schedule = ScheduleNumbers(np.int32(100), np.int32(0), np.int32(20), np.float32(0.0))
    return step.Hyper(numbers, schedule, trainer.policy("float32", *overrides), np.array([0, 5], np.uint32), np.float32(2.0))


@functools.cache
def _sites(layout="one", accumulate=1, scan=False, overrides=COARSE):
    """Role -> statistics [steps, L, sites, F] of three steps."""
    model = dataclasses.replace(MODEL, scan_layers=scan, remat=scan)
    program = (GlobalProgram if layout == "sharded" else Program)(dataclasses.replace(STRUCTURE, model=model, accumulate=accumulate), LAYOUTS[layout])
    hyper = program.put(jax.tree.map(lambda x: np.stack([x]), _hyper(*overrides)))
    _, metrics, _ = program.run(program.init(hyper), hyper, TOKENS[None], np.array([3], np.int32))
    return {role: np.asarray(values)[0] for role, values in program.fetch(metrics.sites).items()}


def test_a_step_reports_every_layer_when_it_is_due():
    """After updates 1 and 2, NaN after 3; of what a layer reads, so that layers differ."""
    sites = _sites()
    assert set(sites) == {*ROLES, "kv", "scores", "probabilities"}
    for role in ("kv", "scores", "probabilities"):
        assert sites[role].shape == (3, 2, 1, 5) and np.isfinite(sites[role][:2]).all() and np.isnan(sites[role][2]).all()
        assert (sites[role][0, 0, 0, [0, 2]] != sites[role][0, 1, 0, [0, 2]]).all() and (sites[role][:2, ..., 2] > 0.01).all()
    assert sites["weights"].shape == (3, 2, 4, 5)


def test_keys_and_values_are_one_role():
    """The statistics of both side by side: RMS of all, the larger amax, the mean of shares and exponents."""
    raw = np.random.default_rng(1).uniform(0.1, 1, (2, 3, 2, 6)).astype(np.float32)  # tensors, parts, L, RAW
    raw[..., 5] = 0
    found = scales.combine(scales.Meter(attention={"keys": raw[0], "values": raw[1]}), None)
    both = raw.reshape(6, 2, 6)
    expected = np.stack([np.sqrt(np.mean(both[..., 0] ** 2, axis=0)), np.max(both[..., 1], axis=0), *np.mean(both[..., 2:5], axis=0).T], axis=-1)
    assert found.attention == {} and set(found.statistics) == {"kv"}
    np.testing.assert_allclose(found.statistics["kv"], expected[:, None], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("change", [
    {"layout": "devices", "scan": True, "accumulate": 2}, {"scan": True}, {"accumulate": 2}, {"layout": "devices"}, {"layout": "vmap"}, {"layout": "sharded"},
], ids=lambda change: "-".join(map(str, change.values())))
def test_statistics_are_the_same_however_the_step_is_cut(change):
    """Layers under scan and remat, micro-batches, devices: to summation order, in every update that is due."""
    for role, values in _sites(**change).items():
        np.testing.assert_allclose(values, _sites()[role], rtol=2e-4, atol=1e-7, err_msg=role)


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_layers_that_quantize_nothing_are_left_out_of_the_mean(scan):
    """The probe's shares of a model whose last layer is exempt are those of the first layer, which is the same in either."""
    model = dataclasses.replace(MODEL, scan_layers=scan)
    structure, graphdef = dataclasses.replace(STRUCTURE, model=model), decoder.blueprint(model)[0]

    def probed(*overrides):
        hyper = _hyper(*overrides, "model.num_layers=2")
        return jax.jit(partial(step.probe, structure, graphdef), compiler_options=CHEAP)(step.init(structure, hyper), TOKENS[0], hyper)

    kept, first = (probed(*COARSE, f"precision.exemptions={{{places}}}") for places in ("last1: high", "layer1.attention: kv, down: high"))
    assert set(kept.underflow) == {*ROLES, "kv", "scores", "probabilities"}
    for role in ("scores", "probabilities"):  # of the other model, layer 1 quantizes kv alone
        assert float(kept.underflow[role]) == pytest.approx(float(first.underflow[role]), rel=1e-6) and kept.underflow[role] > 0
    assert kept.underflow["kv"] != first.underflow["kv"] > 0


# --- in the run folder --------------------------------------------------------------------------------------------------------------------------


def _run(runs_dir, *overrides):
    _, outcome = launch(runs_dir, "precision.weights.rounding=null", "steps=4", "telemetry_every=4", "probe=true", *overrides)
    assert not outcome.failed
    return folders(runs_dir)


def test_records_and_rows(tmp_path, one_device):
    """The caches of one cohort: columns and rows of kv where it is quantized, null where its width is 32, and nothing of other roles."""
    runs = {folder.record()["kv_bits"]: folder for folder in _run(tmp_path, "precision=kv", "precision.bits=2,32").values()}
    for bits, folder in runs.items():
        record, rows = folder.record(), [row for row in folder.telemetry() if row["role"] == "kv"]
        assert (record["kv_underflow"] is None and record["kv_overflow"] is None) if bits == 32 else record["kv_underflow"] > 0.1 and record["kv_overflow"] == 0
        assert all(record[f"{role}_{what}"] is None for role in (*ROLES, "scores", "probabilities") for what in telemetry.LOSSES)
        assert [(row["step"], row["layer"], row["site"]) for row in rows] == [(1, 0, "attention"), (4, 0, "attention")]
        for row in rows:
            assert row.keys() == {"step", "layer", "site", "role", "rms", "amax"} | ({"underflow", "overflow", "exponent"} if bits == 2 else set())
        assert {row["role"] for row in folder.telemetry()} == {*ROLES, "kv"}


@pytest.mark.slow
def test_rows_are_of_the_layers_that_quantize(tmp_path, shared_programs):
    """float32 with a quantized cache in one of two layers, and int8 with attention and the last block high: shares where there are any."""
    ((_, cache),) = _run(tmp_path / "a", "model.num_layers=2", "precision=float32", "precision.exemptions={layer1.attention: kv}").items()
    assert [(row["layer"], row["role"]) for row in cache.telemetry() if row["site"] == "attention"] == [(1, "kv")] * 2
    assert cache.record()["kv_underflow"] > 0 and cache.record()["kv_format"] == "float32"
    ((_, high),) = _run(tmp_path / "b", "model.num_layers=2", "precision=int8", "precision.exemptions={last1: high}").items()
    assert {(row["layer"], "underflow" in row) for row in high.telemetry() if row["role"] == "weights"} == {(0, True), (1, False)}
    assert not any("nonfinite" in row for row in high.telemetry())
