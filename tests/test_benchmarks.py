"""The benchmarks compare like with like: three decoders that are one function and one update, and timing that takes turns."""
from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import gpu, our_step, plain_decoder, policies, timing
from benchmarks.workers import Worker
from trainer import cohort, model, step
from trainer.precision import PrecisionPolicy

TINY = model.ModelConfig(num_layers=2, d_model=16, num_heads=2, d_ff=40, vocab_size=64)
TOKENS = np.random.default_rng(0).integers(0, 64, (4, 25)).astype(np.int32)
UPDATE_TOLERANCE = 2e-4
REPOSITORY = Path(__file__).parent.parent


def _params():
    return model.init_params(TINY, jax.random.key(1))


def _ours(params):
    graphdef, _ = model.blueprint(TINY)

    def loss(params):
        return jnp.mean(model.next_token_losses(graphdef, params, jnp.asarray(TOKENS), model.Call(PrecisionPolicy())))

    return jax.jit(jax.value_and_grad(loss))(params)


@contextlib.contextmanager
def _everyday_jax():
    """The promotion rules that users have; the plain decoder is written for those."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def _assert_same(theirs, ours, rtol):
    """Every leaf differs by at most rtol of its norm."""
    assert jax.tree.structure(theirs) == jax.tree.structure(ours)
    for (path, leaf), other in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        error = np.linalg.norm(np.asarray(other) - np.asarray(leaf)) / np.linalg.norm(np.asarray(leaf))
        assert error < rtol, (jax.tree_util.keystr(path), error)


@pytest.mark.parametrize("scan", [True, False])
def test_plain_decoder_is_our_decoder(scan):
    params = _params()
    loss, grads = _ours(params)
    with _everyday_jax():
        plain_loss, plain_grads = jax.jit(jax.value_and_grad(lambda p: plain_decoder.loss(p, TOKENS, TINY, scan)))(params)
    np.testing.assert_allclose(plain_loss, loss, rtol=1e-6)
    _assert_same(plain_grads, grads, 1e-5)


def test_torch_decoder_is_our_decoder():
    torch = pytest.importorskip("torch")
    from benchmarks import torch_decoder

    params = _params()
    loss, grads = _ours(params)
    leaves = torch_decoder.parameters(params, TINY.num_layers)
    torch_loss = torch_decoder.loss(leaves, torch.tensor(TOKENS, dtype=torch.int64), TINY)
    torch_loss.backward()
    np.testing.assert_allclose(torch_loss.item(), loss, rtol=1e-4)
    _assert_same(torch_decoder.gradients(leaves, TINY.num_layers), grads, 1e-4)


def _our_params_after(params, hyper, updates: int):
    structure = step.StepStructure(TINY, "adamw", "constant", TOKENS.shape[0], TOKENS.shape[1] - 1)
    program = cohort.Program(structure, cohort.Layout(1, 1, "map"))
    hypers = program.put(jax.tree.map(lambda x: np.asarray(x)[None], hyper))
    fresh = jax.device_get(program.init(hypers))
    state = program.put(dataclasses.replace(fresh, params=jax.tree.map(lambda x: x[None], params)))
    batch = np.broadcast_to(TOKENS, (1, updates, *TOKENS.shape)).astype(np.uint8)
    state, _, _ = program.run(state, hypers, batch, np.full(1, updates, np.int32))
    return jax.tree.map(lambda x: np.asarray(x)[0], state.params)


def test_three_updates_are_the_same():
    """Adam, decoupled decay on matrices alone, clipping at 1 (the gradient's norm is above it). Adam divides small gradients by
    their own size, rounding errors included; a decay that is left out, or that gains get too, moves a leaf by 3e-3."""
    torch = pytest.importorskip("torch")
    from benchmarks import torch_decoder

    params = jax.tree.map(lambda x: np.asarray(x) * np.float32(3.0), _params())
    hyper = our_step.hyper(our_step.FLOAT32, learning_rate=1e-2, warmup_steps=0)
    ours = _our_params_after(params, hyper, 3)
    moved = np.linalg.norm(ours["embedding"] - params["embedding"]) / np.linalg.norm(params["embedding"])
    assert moved > 1e-3

    with _everyday_jax():
        init, steps = plain_decoder.train_step(TINY, scan=False, learning_rate=1e-2)
        (plain, _), _ = steps(init(jax.tree.map(jnp.asarray, params)), jnp.asarray(np.broadcast_to(TOKENS, (3, *TOKENS.shape))))
    _assert_same(plain, ours, UPDATE_TOLERANCE)

    leaves, torch_step = torch_decoder.train_step(params, TINY, learning_rate=1e-2)
    for _ in range(3):
        torch_step(torch.tensor(TOKENS, dtype=torch.int64))
    for name, leaf in torch_decoder.parameters(ours, TINY.num_layers).items():
        error = torch.linalg.norm(leaves[name] - leaf) / torch.linalg.norm(leaf)
        assert error < UPDATE_TOLERANCE, (name, error)


def test_programs_take_turns_and_ratios_are_per_round():
    order = []
    seconds = {"a": iter([1.0, 10.0, 100.0]), "b": iter([2.0, 30.0, 200.0]), "c": iter([1.0, 1.0, 1.0])}

    def visit(name):
        order.append(name)
        return next(seconds[name])

    samples = timing.interleave({name: lambda name=name: visit(name) for name in "abc"}, rounds=3)
    assert "".join(order) == "abcbcacab"
    assert samples["b"].median == 30.0 and samples["b"].minimum == 2.0
    measured = timing.ratio(samples, "b", "a")
    assert measured == {"ratio": 2.0, "ratio_of_minima": 2.0}
    assert timing.judged(measured, at_most=1.9)["met"] is False and timing.judged(measured, at_least=1.9)["met"] is True


def test_a_visit_warms_up_and_counts_units():
    calls = []
    program = timing.Program(lambda: calls.append(1), units=4)
    whole = timing.visit(program, repeats=3)
    assert len(calls) == 4 and 0.0 <= whole < 0.1


def idle_programs(units: int) -> dict:
    """What a worker of the test below builds."""
    return {"idle": timing.Program(lambda: None, units)}


def test_workers_live_apart_and_show_their_errors():
    with Worker(f"{__name__}.idle_programs", units=2) as worker:
        (visit,) = worker.visits("mine/").values()
        assert worker.names == ["idle"] and 0.0 <= visit() < 0.1
    with pytest.raises(RuntimeError, match="no_such_factory"):
        Worker("benchmarks.timing.no_such_factory")


@pytest.mark.parametrize("name", policies.ARMS)
def test_policies_quantize_all_six_operands(name):
    assert policies.policy(name).weights.first is not None  # the benchmark's own check raises where an operand is left out


def test_a_policy_that_leaves_an_operand_is_refused(monkeypatch):
    monkeypatch.setitem(policies.ARMS, "int8", (("int8",), 1.25))  # that preset is about weights and activations
    with pytest.raises(ValueError, match="int8 leaves output_gradients in float32"):
        policies.policy("int8")


def test_policies_are_judged_against_float32(monkeypatch):
    monkeypatch.setattr(our_step, "program", lambda config, policy: timing.Program(lambda: time.sleep(0.05 if policy.weights.first else 0.01)))
    result = policies.over_float32(TINY, ["fp8", "fp8_tiles"], rounds=1, repeats=1)
    assert set(result["programs"]) == {"float32", "fp8", "fp8_tiles"}
    judged, free = (result["over float32"][name] for name in ("fp8", "fp8_tiles"))
    assert judged["ratio"] > 1.15 and judged["goal"] == {"at_most": 1.15} and judged["met"] is False and "goal" not in free


def test_policies_say_where_qwix_is_missing(monkeypatch):
    monkeypatch.setattr(policies.importlib.util, "find_spec", lambda name: None)
    assert "not installed" in policies.against_qwix(TINY, rounds=1, repeats=1)["skipped"]


@pytest.mark.slow
def test_qwix_multiplies_what_we_multiply():
    """Three narrow products a linear layer, and gradients near those in float32 (qwix moves the scales of tokens onto the output gradients before
    it rounds them, which costs it accuracy: 0.11 here, ours 0.024)."""
    pytest.importorskip("qwix")
    from benchmarks import qwix_products

    one_layer = dataclasses.replace(TINY, num_layers=1)
    with _everyday_jax():
        counts = qwix_products.dtypes_of_products(one_layer)
        products = 3 * len(model.SITES)
        assert counts["qwix int8"] == {"int8 x int8 -> int32": products} == counts["ours int8 native"]
        assert counts["qwix e4m3"] == {"float8_e4m3fn x float8_e4m3fn -> float32": products}
        weights, x = qwix_products.linears_data(one_layer)
        x = x[:2]
        made = qwix_products.products()
        grads = {name: jax.jit(jax.grad(lambda w, p=made[name]: qwix_products.linears_loss(w, x, p)))(weights)
                 for name in ("float32", "ours int8", "qwix int8")}
    for theirs, bound in (("ours int8", 0.03), ("qwix int8", 0.15)):
        _assert_same(grads[theirs], grads["float32"], bound)


@pytest.mark.slow
def test_gpu_layers_agree_and_are_counted(monkeypatch):
    monkeypatch.delitem(gpu.ARMS, "fp8_rowwise")
    result = gpu.measure(tokens=32, inputs=64, outputs=48, rounds=1, calls=1)
    assert set(result) == {"bfloat16", "fp8", "int8"}
    for name, entry in result.items():
        assert entry["tokens/s"] > 0 and ("native from emulated" in entry) == (name != "bfloat16")
        assert name == "bfloat16" or max(entry["native from emulated"][part] for part in ("y", "dx", "dw")) < 1e-5
    assert result["fp8"]["speed over bfloat16"]["goal"] == {"at_least": 1.4}


def test_gpu_reads_what_the_compiler_made():
    text = """%a = custom-call(x), custom_call_target="__cublas$lt$matmul$f8"
              %b = custom-call(x), custom_call_target="__cublas$lt$matmul$f8"
              %c = fusion(x), backend_config={"kind":"__triton_gemm"}"""
    assert gpu.kinds(text) == {"__cublas$lt$matmul$f8": 2, "__triton_gemm": 1}


def test_gpu_benchmark_says_that_there_is_none(capsys):
    gpu.main([])
    printed = capsys.readouterr().out
    assert printed.startswith("no GPU") and printed.count("\n") == 1


@pytest.mark.slow
def test_train_step_prints_ratios_with_goals():
    command = [sys.executable, "-m", "benchmarks.train_step", "--sizes", "32", "--rounds", "1", "--repeats", "1"]
    printed = json.loads(subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout)
    ratios = printed["d 32"]["ratios"]
    assert all(0.0 < r["ratio"] < 100.0 for r in ratios.values()) and sum("goal" in r for r in ratios.values()) >= 7


@pytest.mark.slow
def test_policies_prints_ratios_with_goals():
    command = [sys.executable, "-m", "benchmarks.policies", "--only", "fp8,luq,qwix", "--width", "32", "--rounds", "1"]
    printed = json.loads(subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout)
    assert {name: "goal" in found for name, found in printed["over float32"].items()} == {"fp8": True, "luq": False}
    assert set(printed["qwix"]) in ({"skipped"}, {"linears", "decoder", "products of the linear layers by dtype"})


@pytest.mark.slow
def test_demo_overhead_accounts_for_every_second():
    command = [sys.executable, "-m", "benchmarks.demo_overhead", "--fraction", "0.01"]
    printed = json.loads(subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout)
    assert printed["compiles"] == 4 * printed["programs"]  # init, run, evaluate, probe
    assert all(seconds >= 0.0 for seconds in printed["measured"]["seconds"].values())


@pytest.mark.slow
def test_records_measure_what_they_say():
    """Forty folders, in every state: the figures are there, and the commands did what they are timed for (or it would have raised)."""
    command = [sys.executable, "-m", "benchmarks.records", "--runs", "40", "--rows", "5", "--repeats", "1"]
    result = json.loads(subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout)
    assert result["all_met"] and all(result[name]["seconds"] > 0 and result[name]["peak_mib"] > 10 for name in ("status", "table to parquet", "table to csv", "curves"))
