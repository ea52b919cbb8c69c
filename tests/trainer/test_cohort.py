"""Cohorts: many runs in one program, each bit for bit what it is alone in the same layout.

Here on the compiled program itself, without folders; test_sweep.py has the same through run folders, with branches.
Shapes: M members, S steps, B batch, T time, W validation windows.
"""
from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest

import trainer
from trainer import model as decoder
from trainer import step
from trainer.cohort import Layout, Program, choose_layout
from trainer.optimizers import OptimizerNumbers
from trainer.schedules import ScheduleNumbers

MODEL = decoder.ModelConfig(num_layers=1, d_model=8, num_heads=2, d_ff=12, vocab_size=11)
STRUCTURE = step.StepStructure(MODEL, "adamw", "wsd", batch_size=4, seq_len=8)
STEPS = 6
program = functools.cache(Program)
ONE, THREE, WIDE, SPLIT = Layout(1, 1, "map"), Layout(3, 1, "map"), Layout(1, 1, "vmap"), Layout(1, 4, "map")


@dataclasses.dataclass(frozen=True)
class Run:
    """What members of a cohort may differ in."""

    seed: int = 0
    bits: int = 4
    lr: float = 0.02
    steps: int = STEPS

    def hyper(self) -> step.Hyper:
        numbers = OptimizerNumbers(*(np.float32(x) for x in (self.lr, 0.9, 0.95, 1e-8, 0.1, 1.0)))
        schedule = ScheduleNumbers(np.int32(self.steps), np.int32(2), np.int32(2), np.float32(0.0))
        policy = trainer.policy("int", f"precision.bits={self.bits}", "precision.weights.rounding=stochastic")
        return step.Hyper(numbers, schedule, policy, np.array([0, self.seed], np.uint32), np.float32(2.0))

    def tokens(self) -> np.ndarray:
        rng = np.random.default_rng(self.seed)  # the next token follows from the last, most of the time
        walk = (np.arange(9) + rng.integers(0, 11, (STEPS, 4, 1)) + (rng.random((STEPS, 4, 9)) < 0.1)) % 11
        return walk.astype(np.uint8)


RUNS = [Run(seed=1, bits=4), Run(seed=2, bits=2, steps=4), Run(seed=3, bits=32, lr=0.005)]
hyper_of = functools.cache(Run.hyper)
WINDOWS = np.random.default_rng(9).integers(0, 11, (8, 9)).astype(np.int32)


def _train(layout: Layout, runs: list[Run]):
    """(states, metrics, losses on the validation windows) of runs as members of one cohort, one tuple a run, on the host."""
    prog = program(STRUCTURE, layout)
    hyper = prog.put(jax.tree.map(lambda *xs: np.stack(xs), *(hyper_of(run) for run in runs)))
    stops = np.array([run.steps for run in runs], np.int32)
    states, metrics, _ = prog.run(prog.init(hyper), hyper, np.stack([run.tokens() for run in runs]), stops)
    losses = prog.evaluate(states, hyper, WINDOWS, np.ones(len(runs), bool))
    host = jax.device_get((states, metrics, losses))
    return [jax.tree.map(lambda x: x[m], host) for m in range(len(runs))]


trained = functools.cache(lambda layout, *runs: _train(layout, list(runs)))


def _assert_same_bits(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("layout", [pytest.param(ONE, marks=pytest.mark.slow), WIDE], ids=lambda layout: layout.name)
def test_members_are_what_they_are_alone(layout):
    """State, metrics and evaluation of a member do not depend, by a bit, on who else is in the cohort."""
    together = trained(layout, *RUNS)
    for run, member in zip(RUNS, together):
        others = [Run(seed=7, bits=3, lr=0.3), run, Run(seed=8, bits=8)]
        _assert_same_bits(_train(layout, others)[1], member)
    assert len({float(metrics.loss[0]) for _, metrics, _ in together}) == len(RUNS)


@pytest.mark.slow
def test_one_run_is_a_cohort_of_one():
    """Under `map` a member among others is the same, to the bit, as a cohort of one on the same device."""
    for run, member in zip(RUNS, trained(ONE, *RUNS)):
        (alone,) = trained(ONE, run)
        _assert_same_bits(alone, member)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [THREE, WIDE, SPLIT], ids=lambda layout: layout.name)
def test_layouts_agree(layout):
    """Across layouts: the float32 member to 1e-6 in loss after 6 steps; quantized members, where an ulp may tip a rounding, to 1e-3."""
    for run, here, there in zip(RUNS, trained(layout, *RUNS), trained(ONE, *RUNS)):
        tolerance = 1e-6 if run.bits == 32 else 1e-3
        np.testing.assert_allclose(here[2], there[2], rtol=tolerance)
        np.testing.assert_allclose(here[1].loss, there[1].loss, rtol=tolerance)
        assert int(here[0].step) == int(there[0].step) == run.steps


@pytest.mark.slow
def test_budgets_differ():
    """A member stops at its own length and then stays as it is; metrics of steps that it does not take are NaN."""
    (state, metrics, _) = trained(ONE, *RUNS)[1]
    assert int(state.step) == 4 and np.array_equal(np.isnan(metrics.loss), [False] * 4 + [True] * 2)
    prog = program(STRUCTURE, ONE)
    hyper = prog.put(jax.tree.map(lambda x: x[None], RUNS[1].hyper()))
    states, _, _ = prog.run(prog.init(hyper), hyper, RUNS[1].tokens()[None], np.array([4], np.int32))
    again, _, _ = prog.run(states, hyper, RUNS[0].tokens()[None], np.array([4], np.int32))
    _assert_same_bits(jax.tree.map(lambda x: np.asarray(x)[0], again), state)


@pytest.mark.parametrize("layout", [ONE, WIDE], ids=lambda layout: layout.name)
def test_a_diverged_member_is_frozen_and_leaves_the_others_alone(layout):
    """A learning rate of 1e30 blows up within three steps: the member keeps the state before that, and the others are untouched."""
    wild = Run(seed=2, lr=1e30)
    first, (state, metrics, _), last = _train(layout, [RUNS[0], wild, RUNS[2]])
    diverged = int(state.diverged_step)
    assert 0 < diverged <= 3 and int(state.step) == diverged
    loss, norm = metrics.loss[diverged], metrics.grad_norm[diverged]
    assert not (np.isfinite(loss) and np.isfinite(norm)) or loss > metrics.loss[0] + 2.0
    assert np.all(np.isnan(metrics.loss[diverged + 1 :]))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state.params))
    expected = trained(layout, *RUNS)
    _assert_same_bits((first, last), (expected[0], expected[2]))


def test_one_compile_for_all_numbers():
    """Seeds, widths, learning rates and budgets are arguments: three functions, compiled once each for a size of cohort."""
    prog = Program(STRUCTURE, ONE)
    hyper = prog.put(jax.tree.map(lambda x: x[None], hyper_of(RUNS[0])))
    for _ in range(2):
        prog.init(hyper)
    assert prog.compiles == 1 and prog.compile_seconds > 0
    shared = program(STRUCTURE, ONE)
    trained(ONE, *RUNS), trained(ONE, RUNS[0])
    before = shared.compiles
    _train(ONE, [Run(seed=50 + i, bits=b, lr=0.01 * b, steps=b) for i, b in enumerate((2, 3, 6))])
    _train(ONE, [Run(seed=60, bits=8)])
    assert shared.compiles == before


def test_traced_widths_equal_constant_ones():
    """A run with its widths as arguments of the program is, to the bit, the run with them compiled in."""
    graphdef = decoder.blueprint(MODEL)[0]
    run = RUNS[0]
    policy, numbers = hyper_of(run).policy, dataclasses.replace(hyper_of(run), policy=None)

    @jax.jit
    def constant(state, tokens, numbers):
        return step.step(STRUCTURE, graphdef, state, tokens, dataclasses.replace(numbers, policy=policy))

    traced = jax.jit(lambda state, tokens, hyper: step.step(STRUCTURE, graphdef, state, tokens, hyper))
    one = other = jax.jit(lambda h: step.init(STRUCTURE, h))(hyper_of(run))
    for tokens in run.tokens()[:3].astype(np.int32):
        one, other = constant(one, tokens, numbers), traced(other, tokens, hyper_of(run))
        _assert_same_bits(one, other)
        one, other = one[0], other[0]


@pytest.mark.parametrize("members, sequences, expected", [
    (1, 16, Layout(1, 8, "map")), (1, 4, Layout(1, 4, "map")), (1, 12, Layout(1, 6, "map")), (1, 7, Layout(1, 7, "map")), (1, 11, ONE),
    (2, 16, Layout(2, 1, "map")), (8, 16, Layout(8, 1, "map")), (50, 16, Layout(8, 1, "map")),
])  # fmt: skip
def test_layout_of_eight_devices(members, sequences, expected):
    """A run's batch is split evenly over as many devices as divide it; runs are dealt out to all devices."""
    assert choose_layout(members, sequences) == expected
