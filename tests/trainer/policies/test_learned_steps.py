"""Scales that are trained or remembered: LSQ against numpy and finite differences, affine ranges against numpy and a plain moving average."""
from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import trainer
from formats import range_average
from tests.trainer import textbook
from tests.trainer.policies import networks
from tests.trainer.policies.networks import SEEDS
from tests.trainer.policies.numpy_integers import Lsq, affine, first_step, largest_code, rows
from trainer import model as decoder
from trainer import scales, step
from trainer.linear import linear
from trainer.optimizers import OptimizerNumbers
from trainer.scales import Site
from trainer.schedules import ScheduleNumbers

TOLERANCE, EVERY_RUN = 3e-6, 3e-2
SHAPE = (48, 32, 32, 32)  # tokens, inputs, hidden, outputs
CHEAP = {"xla_backend_optimization_level": 0}  # compiling is what these tests cost

# --- learned steps --------------------------------------------------------------------------------------------------------------------------

EXPECTED = ({"weights": np.float32(0.2), "activations": np.float32(1.1)}, {"weights": np.float32(0.1), "activations": np.float32(0.7)})
LEARNED = tuple({role: value for role, value in zip(("weights", "activations"), pair)} for pair in ((1.3, 0.8), (0.6, 1.9)))


def _float32(learned):
    return jax.tree.map(np.float32, learned)


@partial(jax.jit, compiler_options=CHEAP)
def _lsq_in_jax(tensors, learned, which):
    x, w1, w2, targets = tensors

    def loss(x, w1, w2, learned):
        one, two = (Site(expected=e, learned=own) for e, own in zip(EXPECTED, learned))
        h = jnp.square(jax.nn.relu(linear(x, w1, which, site=one)))
        return jnp.mean(jnp.square(linear(h, w2, which, site=two) - targets))

    return jax.value_and_grad(loss, (0, 1, 2, 3))(x, w1, w2, learned)


def _lsq_in_numpy(tensors, learned, bits):
    """(loss, gradients of x, w1, w2, of the learned steps over their start; the loss as a function of those)."""
    x, w1, w2, targets = (a.astype(np.float64) for a in tensors)

    def steps(learned):
        return [{role: own[role] * first_step(e[role], bits) for role in own} for e, own in zip(EXPECTED, learned)]

    one, two = steps(learned)
    x_1, w_1 = Lsq(x, one["activations"], bits), Lsq(w1, one["weights"], bits)
    a = x_1.value @ w_1.value
    h = np.maximum(a, 0) ** 2
    x_2, w_2 = Lsq(h, two["activations"], bits), Lsq(w2, two["weights"], bits)
    y = x_2.value @ w_2.value
    g = 2 * (y - targets) / targets.size

    def backward(g, x_q, w_q, step):
        dx, dw = g @ w_q.value.T, x_q.value.T @ g
        size = {"activations": x_q.value.shape[1], "weights": w_q.value.size}
        d_steps = {role: np.sum(d * q.slope) * step[role] for role, d, q in (("activations", dx, x_q), ("weights", dw, w_q))}
        return dx * x_q.inside, dw * w_q.inside, d_steps, {role: (n * largest_code(bits)) ** -0.5 for role, n in size.items()}

    dh, dw2, d_two, factor_two = backward(g, x_2, w_2, two)
    dx, dw1, d_one, factor_one = backward(dh * 2 * np.maximum(a, 0), x_1, w_1, one)

    def pretended(learned):
        one, two = steps(learned)
        a = x_1.pretended(x, one["activations"]) @ w_1.pretended(w1, one["weights"])
        y = x_2.pretended(np.maximum(a, 0) ** 2, two["activations"]) @ w_2.pretended(w2, two["weights"])
        return np.mean((y - targets) ** 2)

    d_learned = [{role: d[role] / own[role] for role in d} for d, own in zip((d_one, d_two), learned)]
    return np.mean((y - targets) ** 2), (dx, dw1, dw2), d_learned, (factor_one, factor_two), pretended


@pytest.mark.parametrize("bits", [4, 2])
def test_learned_steps_equal_numpy_and_finite_differences(bits):
    """Loss and gradients of tensors and steps; those of steps are the finite differences of the pretended loss times 1 / sqrt(N Q_P)."""
    which, agreed = networks.policy("lsq", f"precision.bits={bits}"), 0
    for seed in SEEDS:
        tensors = networks.data(seed, SHAPE)
        loss, (*grads, d_steps) = _lsq_in_jax(tensors, _float32(LEARNED), which)
        expected, expected_grads, d_learned, factors, pretended = _lsq_in_numpy(tensors, LEARNED, bits)
        off = [np.linalg.norm(np.float64(a) - b) / np.linalg.norm(b) for a, b in zip((loss, *grads), (expected, *expected_grads))]
        for index, role in ((i, role) for i in range(2) for role in ("weights", "activations")):
            def moved(by, index=index, role=role):
                return pretended([own | {role: own[role] + by} if i == index else own for i, own in enumerate(LEARNED)])

            slope = (moved(1e-6) - moved(-1e-6)) / 2e-6
            assert d_learned[index][role] == pytest.approx(slope, rel=1e-5)
            off.append(abs(float(d_steps[index][role]) / (slope * factors[index][role]) - 1) / 10)  # a sum of both signs
        assert max(off) <= EVERY_RUN * 2
        agreed += max(off) <= TOLERANCE
    assert agreed >= 2


@pytest.mark.parametrize("value", [2.0**-21, 0.0, -0.5])
def test_a_step_that_was_pushed_to_zero_has_a_finite_gradient_of_the_right_sign(value):
    """Below its floor a step has the value of the floor; its gradient must not grow without bound, nor point the other way below zero."""
    tensors, which = networks.data(0, SHAPE), networks.policy("lsq")

    def gradient(start):
        return float(_lsq_in_jax(tensors, _float32((LEARNED[0] | {"weights": start}, LEARNED[1])), which)[1][3][0]["weights"])

    at_floor, below = gradient(2.0**-20), gradient(value)
    assert np.isfinite(below) and abs(below) <= 1.001 * abs(at_floor) and below * at_floor >= 0


# --- averages of ranges ---------------------------------------------------------------------------------------------------------------------

MODEL = decoder.ModelConfig(num_layers=1, d_model=8, num_heads=2, d_ff=12, vocab_size=11)
STRUCTURE = step.StepStructure(MODEL, "adamw", "constant", batch_size=4, seq_len=6)
TOKENS = np.random.default_rng(0).integers(0, 11, (4, 4, 7)).astype(np.int32)  # steps, B, T + 1
@pytest.mark.parametrize("reach", [(1.5, 2.5), (0.0, 3.0), None], ids=["inside", "positive", "nothing seen"])
def test_fake_quantization_equals_numpy(reach):
    """The three products with a given range, some values beyond it; before anything was seen the range is that of the tensor."""
    rng = np.random.default_rng(5)
    x, w, g = (rng.standard_normal(shape).astype(np.float32) for shape in ((24, 20), (20, 12), (24, 12)))
    given = {"activations": jnp.zeros(2, jnp.float32) if reach is None else jnp.asarray(reach, jnp.float32)}

    @partial(jax.jit, compiler_options=CHEAP)
    def products(x, w, g):
        y, backward = jax.vjp(lambda x, w: linear(x, w, networks.policy("int8_fake_quant"), site=Site(given)), x, w)
        return y, *backward(g)

    x_q, inside = affine(x.astype(np.float64), (-x.min(), x.max()) if reach is None else reach)
    w_q = rows(8)(w.astype(np.float64), 0, None)
    assert reach is None or 0.001 < np.mean(~inside) < 0.7
    for one, other in zip(products(x, w, g), (x_q @ w_q, (g @ w_q.T) * inside, x_q.T @ g)):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)


def test_range_averages_equal_a_plain_loop():
    """After every step of a real training the state is 0.9 of the average and 0.1 of what the step saw, the first as it is: of all places
    what the layers report, of the first one also what numpy finds."""
    policy = trainer.policy("int8_fake_quant", "precision.ema_decay=0.9")
    numbers = OptimizerNumbers(*(np.float32(x) for x in (0.03, 0.9, 0.95, 1e-8, 0.1, 1.0)))
    schedule = ScheduleNumbers(np.int32(100), np.int32(0), np.int32(20), np.float32(0.0))
    hyper = step.Hyper(numbers, schedule, policy, np.zeros(2, np.uint32), np.float32(2.0))
    graphdef = decoder.blueprint(MODEL)[0]

    @partial(jax.jit, compiler_options=CHEAP)
    def both(state, tokens):
        sites = scales.Site(scales.remembered(policy, state.histories), meter=scales.range_meter(policy, (1, 4)))
        seen = step.differentiate(STRUCTURE, graphdef, state.params, tokens, policy, hyper.key, None, sites)[2].ranges
        return step.step(STRUCTURE, graphdef, state, tokens, hyper)[0], seen

    state, average = step.init(STRUCTURE, hyper), None
    assert set(state.histories) == {"activations"} and not np.any(state.histories["activations"].reach)
    for tokens in TOKENS:
        params = jax.tree.map(np.float64, state.params)
        normed = textbook.rms_norm(params["embedding"][tokens[:, :-1]] * 8**0.5, params["layers"]["attention_norm"][0])
        state, seen = both(state, tokens)
        seen = np.asarray(seen["activations"], np.float64)
        np.testing.assert_allclose(seen[0, 0], [-normed.min(), normed.max()], rtol=1e-5)
        average = seen if average is None else 0.9 * average + 0.1 * seen
        np.testing.assert_allclose(state.histories["activations"].reach, average, rtol=1e-6)
    assert np.all(average > 0) and int(state.step) == 4


def test_a_range_keeps_what_it_knows():
    """What is not finite is not remembered; a side that nothing reached stays at zero and moves when something does."""
    seen = [(0.0, 2.0), (np.nan, 4.0), (1.0, np.inf), (3.0, 1.0)]
    average, expected = range_average(), np.zeros(2)
    for index, reach in enumerate(seen):
        average = average.push(jnp.asarray(reach, jnp.float32), jnp.float32(0.75))
        known = np.where(np.isfinite(reach), reach, expected)
        expected = known if index == 0 else 0.75 * expected + 0.25 * known
        np.testing.assert_allclose(average.reach, expected, rtol=1e-6)
