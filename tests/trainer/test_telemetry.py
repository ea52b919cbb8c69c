"""Telemetry: statistics against numpy, the same however a step is cut up, nothing changed by looking, files that survive a kill.

Shapes: N rows, K columns; L layers, S linear sites of a layer, F the fields.
"""
from __future__ import annotations

import dataclasses
import functools
import json
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import formats
import trainer
from tests.trainer.tiny import launch
from trainer import mirrors, step, telemetry
from trainer import model as decoder
from trainer.cohort import Layout, Program
from trainer.propagation import propagate_scales, unscaled
from trainer.linear import linear
from trainer.member import Member
from trainer.optimizers import OptimizerNumbers
from trainer.precision import ROLES
from trainer.records import RunFolder
from trainer.scales import Meter, Site
from trainer.schedules import ScheduleNumbers

E4M3 = ml_dtypes.float8_e4m3fn


def _x(size=1.0, seed=0):
    """Rows of very different size, some zeros."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((24, 64)) * np.exp(rng.uniform(-6, 6, (24, 1))) * size
    return np.where(rng.random(x.shape) < 0.1, 0.0, x).astype(np.float32)


@jax.jit
def _of_format(x, fmt):
    values, scale = formats.split(x, fmt)
    return telemetry.statistics(x, values, scale if isinstance(fmt, formats.Scaled) else None, fmt.element if isinstance(fmt, formats.Scaled) else fmt)


def _numpy(x, scale, largest, dtype):
    """The statistics by their definition: scale broadcasts against x."""
    y = x.astype(np.float64) / scale
    narrow = np.clip(y, -largest, largest).astype(np.float32).astype(dtype).astype(np.float64)
    return [np.sqrt(np.mean(np.float64(x) ** 2)), np.max(np.abs(x)), np.mean((x != 0) & (narrow == 0)), np.mean(np.abs(y) > largest * (1 + 1e-6)),
            np.mean(np.log2(np.broadcast_to(scale, x.shape)))]  # fmt: skip


def _mx_scale(x):
    """OCP MX, floor: 2**(floor(log2 amax) - 8) for each block of 32 e4m3 numbers along the rows."""
    amax = np.max(np.abs(x.reshape(24, 2, 32)), axis=2)
    return np.repeat(np.exp2(np.floor(np.log2(amax)) - 8), 32, axis=1)


ALL = {
    "tensor": (formats.scaled("float8_e4m3fn"), lambda x: np.max(np.abs(x)) / np.float32(448), 448, E4M3),
    "token": (formats.scaled("float8_e4m3fn", "token", axis=1), lambda x: np.max(np.abs(x), axis=1, keepdims=True) / np.float32(448), 448, E4M3),
    "mxfp8_e4m3": (formats.get("mxfp8_e4m3"), _mx_scale, 448, E4M3),
    "float8_e4m3fn": (formats.get("float8_e4m3fn"), lambda x: np.float32(1.0), 448, E4M3),
    "identity": (formats.scaled(formats.identity()), lambda x: np.float32(1.0), np.inf, np.float32),
}


@pytest.mark.parametrize("name", ALL)
def test_statistics_equal_their_definition(name):
    fmt, scale, largest, dtype = ALL[name]
    x = _x(30.0)
    expected = _numpy(x, scale(x), largest, dtype)
    np.testing.assert_allclose(_of_format(x, fmt), expected, rtol=2e-6, atol=1e-7)
    if name in ("mxfp8_e4m3", "float8_e4m3fn"):
        assert expected[2] + expected[3] > 0.01 and expected[3] > 0  # something is lost
    if name == "tensor":
        assert expected[2] > 0.01 and expected[3] == 0


@pytest.mark.parametrize("exponent", [-60, -20, 30, 60])
def test_no_size_is_lost_to_squares(exponent):
    """RMS and amax move with the data, exactly, where squares are beyond float32."""
    one, moved = (np.asarray(jax.jit(telemetry.statistics)(x)) for x in (_x(), np.ldexp(_x(), exponent)))
    np.testing.assert_array_equal(np.ldexp(one[:2], exponent), moved[:2])
    assert np.all(np.isnan(moved[2:]))


def test_zeros_and_what_is_not_finite():
    assert list(np.asarray(telemetry.statistics(jnp.zeros((3, 4))))[:2]) == [0.0, 0.0]
    assert np.all(np.isnan(np.asarray(telemetry.statistics(jnp.full((3, 4), jnp.nan)))[:2]))
    assert float(telemetry.statistics(jnp.array([1.0, jnp.inf]))[1]) == np.inf


def test_the_exponent_of_a_power_of_two_is_whole():
    for e in range(-126, 127):
        assert float(telemetry._log2(jnp.float32(2.0**e))) == e


def test_parts_make_the_whole():
    """Equal parts at the scale of the whole combine to its statistics; sizes whose squares overflow too."""
    x, element, scale = _x(1e20), formats.get("float4_e2m1fn"), jnp.float32(2.0**66)
    values = formats.split(x, formats.scaled(element), scale=scale)[0]
    whole = telemetry.statistics(jnp.asarray(x), values, scale, element)
    parts = jnp.stack([telemetry.raw(x[i::3], values[i::3], scale, element) for i in range(3)])
    np.testing.assert_allclose(telemetry.combine(parts), whole, rtol=1e-6)
    assert 0 < float(whole[2]) < 1 and 0 < float(whole[3]) < 1


def test_steps_that_are_due():
    assert [s + 1 for s in range(20) if telemetry.due(s, 5)] == [1, 5, 10, 15, 20]
    assert list(np.asarray(telemetry.due(jnp.arange(5), 1))) == [True] * 5


@pytest.mark.parametrize("source, exponents", [
    ("current", [np.log2(0.5 / 448), np.log2(8 / 448), np.log2(2.0**-12 / 57344)]), ("delayed", [np.log2(3 / 448)] * 2 + [np.log2(3 / 57344)]),
    ("static", [-1, 2, -13]), ("none", [0, 0, 0]),
])  # fmt: skip
def test_the_exponent_is_that_of_the_scale_in_use(source, exponents):
    """By every source, in all three roles of a linear layer; what is not quantized has none."""
    rms = {"weights": 0.4, "activations": 4.0, "output_gradients": 1.2e-4}
    policy = trainer.policy("fp8", f"precision.source={source}", *(f"precision.{role}.static_rms={r}" for role, r in rms.items() if source == "static"))
    x, w, dy = (np.full((8, 8), value, np.float32) for value in (8.0, 0.5, 2.0**-12))

    def measured(policy):
        delayed = policy.roles(trainer.precision.Source.DELAYED)
        meter = Meter({role: jnp.float32(0) for role in delayed}, {role: jnp.zeros(len(telemetry.RAW)) for role in ROLES})
        site = Site({role: jnp.float32(3.0) for role in delayed})
        _, backward = jax.vjp(lambda x, w, meter: linear(x, w, policy, site=dataclasses.replace(site, meter=meter)), x, w, meter)
        return backward(dy)[2].statistics

    found = jax.jit(measured)(policy)
    np.testing.assert_allclose([found[role][4] for role in ROLES], exponents, rtol=1e-6)
    np.testing.assert_array_equal([found[role][0] for role in ROLES], [0.5, 8.0, 2.0**-12])
    if source == "delayed":
        assert found["activations"][3] == 1.0 and found["weights"][3] == 0.0  # 8 is beyond a remembered 3
    plain = jax.jit(measured)(trainer.policy("float32"))
    assert all(np.array_equal(np.isnan(plain[role]), [False, False, True, True, True, False]) for role in ROLES)


@pytest.mark.parametrize("low, high", [(-1.0, 3.0), (0.0, 6.0), (-5.0, 0.5)])
def test_a_zero_point_moves_the_range(low, high):
    """Affine 4 bits between averages of the smallest and largest value (Krishnamoorthi 2018, eqs. 1 to 4): what lies outside of the codes 0
    to 15 by more than a step is beyond, and nothing that lies inside, whatever its sign."""
    which = trainer.policy("int8_fake_quant", "precision.bits=4")
    x, w = np.random.default_rng(3).normal(size=(64, 32)).astype(np.float32) * 3, np.ones((32, 4), np.float32)
    meter = Meter({"activations": jnp.zeros(2)}, {role: jnp.zeros(len(telemetry.RAW)) for role in ROLES})
    site = Site({"activations": jnp.float32([-low, high])})
    _, backward = jax.vjp(lambda meter: linear(x, w, which, site=dataclasses.replace(site, meter=meter)), meter)
    found = np.asarray(backward(np.ones((64, 4), np.float32))[0].statistics["activations"])
    scale = (high - low) / 15
    zero = np.rint(-low / scale)
    code = x / scale + zero
    expected = np.mean((x != 0) & (np.rint(np.clip(code, 0, 15)) == zero)), np.mean((code < -1) | (code > 16))
    assert expected[1] > 0.1 and np.mean((x < low) | (x > high)) > expected[1]
    np.testing.assert_allclose(found[2:4], expected, atol=1.1 / x.size)
    assert found[4] == pytest.approx(np.log2(scale), rel=1e-6)


# --- in a step --------------------------------------------------------------------------------------------------------

MODEL = decoder.ModelConfig(num_layers=2, d_model=8, num_heads=2, d_ff=12, vocab_size=11)
STRUCTURE = step.StepStructure(MODEL, "adamw", "constant", batch_size=4, seq_len=6, telemetry_every=2)
TOKENS = np.random.default_rng(0).integers(0, 11, (4, 4, 7)).astype(np.int32)  # steps, B, T + 1
program = functools.cache(Program)
ONE, WIDE = Layout(1, 1, "map"), Layout(1, 1, "vmap")


def _hyper(seed=5):
    policy = trainer.policy("float32", "precision.weights.format=int6", "precision.source=static")  # scales do not depend on the cut
    numbers = OptimizerNumbers(*(np.float32(x) for x in (0.01, 0.9, 0.95, 1e-8, 0.1, 1.0)))
    schedule = ScheduleNumbers(np.int32(100), np.int32(0), np.int32(20), np.float32(0.0))
    return step.Hyper(numbers, schedule, policy, np.array([0, seed], np.uint32), np.float32(2.0))


def _run(layout, structure=STRUCTURE, begun=0):
    """(states, metrics) of two members on the host; the second has taken `begun` steps before these."""
    prog = program(structure, layout)
    hypers = prog.put(jax.tree.map(lambda *xs: np.stack(xs), _hyper(5), _hyper(6)))
    states = prog.init(hypers)
    states = dataclasses.replace(states, step=states.step + np.array([0, begun], np.int32))
    states, metrics, _ = prog.run(states, hypers, np.stack([TOKENS, TOKENS]), np.full(2, 100, np.int32))
    return jax.device_get((states, metrics))


@pytest.mark.slow
def test_a_step_reports_every_place_when_it_is_due():
    """[M, steps, L, S, F]: numbers after updates 1, 2 and 4, NaN after 3; weights as they were initialised. (int6: 31 steps to amax.)"""
    _, metrics = _run(ONE)
    for role, values in metrics.sites.items():
        assert values.shape == (2, 4, 2, 4, 5)
        assert np.all(np.isfinite(values[:, [0, 1, 3], :, :, :2])) and np.all(np.isnan(values[:, 2]))
        assert np.all(np.isnan(values[..., 2:])) == (role != "weights")
    params = jax.jit(partial(step.init, STRUCTURE))(_hyper(6)).params["layers"]
    for site, (name, std) in enumerate(zip(decoder.SITES, MODEL.init_stds)):
        w = np.asarray(params[name], np.float64)
        found = metrics.sites["weights"][1, 0, :, site]
        np.testing.assert_allclose(found[:, 0], np.sqrt(np.mean(w**2, axis=(1, 2))), rtol=1e-6)
        scale = std * float(_hyper().policy.weights.first.static_clip) / 31
        np.testing.assert_allclose(found[:, 4], np.log2(scale), rtol=1e-6)
        np.testing.assert_allclose(found[:, 2], np.mean(np.abs(w) < scale / 2, axis=(1, 2)), atol=1e-7)
        np.testing.assert_allclose(found[:, 3], np.mean(np.abs(w) > 31 * scale, axis=(1, 2)), atol=1e-7)


@pytest.mark.slow
def test_looking_changes_nothing():
    """Losses, norms and parameters are those of a program without telemetry, which reports nothing."""
    (watched, seen), (plain, metrics) = _run(ONE), _run(ONE, dataclasses.replace(STRUCTURE, telemetry_every=0))
    assert metrics.sites == {}
    np.testing.assert_allclose(np.array(seen[:3]), np.array(metrics[:3]), rtol=1e-6)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), watched.params, plain.params)


@pytest.mark.parametrize("change", [pytest.param("vmap", marks=pytest.mark.slow), pytest.param("micro-batches and scan", marks=pytest.mark.slow), pytest.param("devices", marks=pytest.mark.slow)])
def test_statistics_are_the_same_however_the_step_is_cut(change):
    """To summation order, in every update that is due."""
    structure = STRUCTURE
    if change == "micro-batches and scan":
        structure = dataclasses.replace(STRUCTURE, accumulate=2, model=dataclasses.replace(MODEL, scan_layers=True))
    layout = {"vmap": WIDE, "devices": Layout(1, 2, "map")}.get(change, ONE)
    (_, expected), (_, found) = _run(ONE), _run(layout, structure)
    for role in ROLES:
        np.testing.assert_allclose(found.sites[role], expected.sites[role], rtol=2e-4, atol=1e-7)


@pytest.mark.slow
def test_members_at_different_steps_under_vmap():
    """Each is measured when it is due, whatever the others do; a member that is not due may be measured beside one that is."""
    _, metrics = _run(WIDE, begun=1)  # 1, 2, 3, 4 and 2, 3, 4, 5
    first, second = (~np.isnan(metrics.sites["weights"][m, :, 0, 0, 0]) for m in (0, 1))
    assert first[[0, 1, 3]].all() and second[[0, 2]].all()
    np.testing.assert_array_equal(_run(WIDE)[1].sites["weights"][0, [0, 1, 3]], metrics.sites["weights"][0, [0, 1, 3]])


# --- in the run folder ------------------------------------------------------------------------------------------------


def _folder(runs_dir, *overrides):
    plan, outcome = launch(runs_dir, "steps=12", "telemetry_every=4", "checkpoint.every_steps=6", *overrides)
    assert not outcome.failed
    return plan.runs[0].folder


def test_the_file_has_a_row_for_every_place_and_step(tmp_path, shared_programs):
    folder = _folder(tmp_path)
    rows = folder.telemetry()
    places = [(row["step"], row["role"], row["layer"], row["site"]) for row in rows]
    assert sorted(places) == sorted((s, role, 0, site) for s in (1, 4, 8, 12) for role in ROLES for site in decoder.SITES)
    for row in rows:
        quantized = {"underflow", "overflow", "exponent"} if row["role"] != "output_gradients" else set()
        assert row.keys() == {"step", "layer", "site", "role", "rms", "amax"} | quantized
        assert 0 < row["rms"] <= row["amax"] and row.get("overflow", 0) == 0 <= row.get("underflow", 0) < 0.1


def test_a_resumed_run_ends_in_the_same_file(tmp_path, shared_programs):
    """Killed after step 8 was logged, with a torn line, and resumed from step 6: the bytes of a run that was never stopped."""
    folder = _folder(tmp_path)
    whole = (folder.path / "telemetry.jsonl").read_bytes()
    (folder.path / "record.json").unlink()
    (folder.checkpoints / "12").rename(tmp_path / "gone")
    rows = [json.loads(line) for line in whole.splitlines()]
    kept = b"".join(line for line, row in zip(whole.splitlines(keepends=True), rows) if row["step"] <= 8)
    (folder.path / "telemetry.jsonl").write_bytes(kept + b'{"step": 12, "la')
    _folder(tmp_path)
    assert (folder.path / "telemetry.jsonl").read_bytes() == whole


def test_a_branch_takes_over_the_rows_of_its_trunk(tmp_path):
    config = trainer.config("model=2k", "data=synthetic", "steps=12", "telemetry_every=4")
    parent, child, late = (Member(config, name, "trunk", RunFolder(tmp_path / name), mirrors.make("none")) for name in ("parent", "child", "late"))
    parent.folder.append_telemetry([{"step": step, "layer": 0} for step in (1, 4, 8)])
    child.parent, child.fork_step = parent, 4
    child.branch_off()
    parent.diverged_step = 9
    late.diverge_with(parent)
    for member, steps in ((child, [1, 4]), (late, [1, 4, 8])):
        member.flush()
        assert [row["step"] for row in member.folder.telemetry()] == steps


def test_off_by_default_and_a_bad_number_is_refused(tmp_path):
    assert trainer.config("model=2k", "data=synthetic", "steps=1").options.telemetry_every == 0
    assert RunFolder(tmp_path / "run").telemetry() == []
    with pytest.raises(ValueError, match="telemetry_every=-1 is not possible; accepted: 0 to"):
        trainer.config("model=2k", "data=synthetic", "steps=1", "telemetry_every=-1")


@pytest.mark.parametrize("name", ["fp16_scaled", "fp8_scaled", "fp8_scaled source=current"])
def test_where_scales_are_carried_the_statistics_are_those_of_the_values(name):
    """float16 data at an exponent tells of the same tensors as float32 does, however small; its exponent is reported."""
    preset, *source = name.split()
    policy = trainer.policy(preset, *(f"precision.{s}" for s in source))
    x, w, dy = (np.random.default_rng(i).normal(size=(16, 16)).astype(np.float32) * size for i, size in enumerate((4.0, 0.1, 2.0**-30)))
    meter = Meter({}, {role: jnp.zeros(len(telemetry.RAW)) for role in ROLES})

    def measured(policy, dy):
        def backward(x, w, dy):
            return jax.vjp(lambda x, w, meter: linear(x, w, policy, site=Site(meter=meter)), x, w, meter)[1](dy)[2].statistics

        run = propagate_scales(backward, data_dtype="float16") if policy.data_dtype else backward
        found = unscaled(run(x, w, dy))
        return {role: telemetry.combine(found[role][None]) for role in ROLES}

    found, plain = measured(policy, dy), measured(trainer.policy("float32"), dy)
    for role in ROLES:
        np.testing.assert_allclose(found[role][:2], plain[role][:2], rtol=2e-3, err_msg=role)
    drift = np.array([np.log2(found[role][0]) - found[role][4] for role in ROLES])
    if name != "fp8_scaled source=current":
        assert np.all(np.abs(drift) < 1.01), "entry brings arguments to unit scale"
    assert np.isnan(found["weights"][2]) == (name == "fp16_scaled")
