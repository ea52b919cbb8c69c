"""Products, quotients, powers and sums, element by element."""
from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tests.trainer.propagation.harness import MODES, Case, check, check_moved, check_plain_dies, normal, positive, value
from trainer import ScaledArray, propagate_scales

ON_ONE = NamedSharding(Mesh(np.array(jax.devices()[:1]), ("device",)), PartitionSpec())
NEAR = ((0, 0), (60, 60), (-60, -60), (3, -5), (60, 58))

TABLE = {
    "mul": Case("mul", lambda a, b: a * b, np.multiply, "ABC ABC", dies=True),
    "mul scalar array": Case("mul", lambda a, b: a * b, np.multiply, "ABC -", dies=True),
    "mul two": Case("mul", lambda a: a * 2.0, lambda a: a * 2.0, dies=True),
    "mul minus quarter": Case("mul", lambda a: -0.25 * a, lambda a: a * -0.25, dies=True),
    "mul number": Case("mul", lambda a: a * 0.1, lambda a: a * 0.1, dies=True),
    "mul broadcast": Case("mul", lambda a, b: a * b[None, :, None], lambda a, b: a * b[None, :, None], "ABC B", dies=True, rows=None),
    "div": Case("div", lambda a, b: a / b, np.divide, "ABC ABC", (normal, positive), dies=True),
    "div by half": Case("div", lambda a: a / 0.5, lambda a: a / 0.5, dies=True),
    "div of number": Case("div", lambda a: 3.0 / a, lambda a: 3.0 / a, draw=positive, dies=True),
    "cube": Case("integer_pow", lambda a: lax.integer_pow(a, 3), lambda a: a**3, exponents=((0,), (60,), (-60,)), dies=True),
    "inverse square": Case("integer_pow", lambda a: lax.integer_pow(a, -2), lambda a: a**-2.0, draw=positive, dies=True),
    "square": Case("square", jnp.square, np.square, dies=True),
    "sqrt": Case("sqrt", jnp.sqrt, np.sqrt, draw=positive, exponents=((0,), (60,), (-60,), (59,), (-59,)), dies=True),
    "rsqrt": Case("rsqrt", lax.rsqrt, lambda a: 1 / np.sqrt(a), draw=positive, exponents=((0,), (60,), (-60,), (59,), (-59,)), dies=True),
    "add": Case("add", lambda a, b: a + b, np.add, "ABC ABC", dies=True),
    "add scalar array": Case("add", lambda a, b: a + b, np.add, "ABC -", dies=True),
    "add number": Case("add", lambda a: a + 0.3, lambda a: a + 0.3),
    "sub": Case("sub", lambda a, b: a - b, np.subtract, "ABC ABC", dies=True),
    "sub from number": Case("sub", lambda a: 1.0 - a, lambda a: 1.0 - a),
    "add_any": Case("add_any", lambda a: jax.vjp(lambda x: (x * 2.0, x * 3.0), a)[1]((a, a))[0], lambda a: 5 * a, dies=True),
    "neg": Case("neg", lambda a: -a, np.negative, dies=True),
    "abs": Case("abs", jnp.abs, np.abs, dies=True),
    "copy": Case("copy", lambda a: jnp.array(a, copy=True), lambda a: a, dies=True),
    "stop_gradient": Case("stop_gradient", lambda a: lax.stop_gradient(a), lambda a: a, dies=True),
    "device_put": Case("device_put", lambda a: jax.device_put(a), lambda a: a, dies=True),
    "name": Case("name", lambda a: checkpoint_name(a, "x"), lambda a: a, dies=True),
    "reduce_precision": Case("reduce_precision", lambda a: lax.reduce_precision(a, 8, 23), lambda a: a, dies=True),
    "sharding_constraint": Case("sharding_constraint", lambda a: lax.with_sharding_constraint(a, ON_ONE), lambda a: a, dies=True),
    "sign": Case("sign", jnp.sign, np.sign),
    "convert to float32": Case("convert_element_type", lambda a: (a.astype(jnp.float16) if a.dtype == jnp.float32 else a.astype(jnp.float32)), lambda a: a, dies=True),
    "convert to int": Case("convert_element_type", lambda a: a.astype(jnp.int32), np.trunc, exponents=((0,), (4,), (-60,)), rows=None),
    "optimization_barrier": Case("optimization_barrier", lambda a, b: lax.optimization_barrier((a, b)), lambda a, b: (a, b), "ABC BC", dies=True),
    "atan2": Case("atan2", jnp.arctan2, np.arctan2, "ABC ABC"),
    "rem": Case("rem", lax.rem, np.fmod, "ABC ABC", (normal, positive), NEAR, dies=True),
    "nextafter": Case("nextafter", jnp.nextafter, lambda a, b: a, "ABC ABC"),
}  # fmt: skip
if hasattr(lax, "one_minus_square"):  # jax 0.11
    TABLE["one_minus_square"] = Case("one_minus_square", lax.one_minus_square, lambda a: 1 - a * a)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", TABLE)
def test_values(name, mode):
    check(TABLE, name, mode)


@pytest.mark.parametrize("name", TABLE)
def test_a_power_of_two_moved_changes_no_bit(name):
    check_moved(TABLE, name)


@pytest.mark.parametrize("mode", ("float32", "held in float16"))
@pytest.mark.parametrize("name", TABLE)
def test_an_exponent_for_each_leading_index(name, mode):
    check(TABLE, name, mode, leading=True)


@pytest.mark.parametrize("name", [name for name, case in TABLE.items() if case.dies])
def test_plain_float16_dies(name):
    check_plain_dies(TABLE, name)


@pytest.mark.parametrize("exponent", [0, 40, -40])
def test_casts_to_fp8_stay_in_force_under_value_and_grad(exponent):
    """E4M3 on the way forward and E5M2 on the way back, against ml_dtypes."""
    e4m3, e5m2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
    backward = jax.custom_vjp(lambda x: x)
    backward.defvjp(lambda x: (x, None), lambda _, g: (g.astype(e5m2).astype(jnp.float32),))

    @jax.custom_vjp
    def forward(x):
        return x.astype(e4m3).astype(jnp.float32)

    forward.defvjp(lambda x: (forward(x), None), lambda _, g: (g,))
    data, weights = np.float32([1.06, 1.73, -3.3, 0.27]), np.float32([1.1, -0.7, 2.3, 1.9])
    run = propagate_scales(jax.value_and_grad(lambda x, w: jnp.sum(forward(backward(x)) ** 2 * w)))
    loss, gradient = run(ScaledArray(data, np.int32(exponent)), ScaledArray(weights, np.int32(0)))
    q = data.astype(e4m3).astype(np.float64)
    assert not np.array_equal(q, data)
    np.testing.assert_allclose(value(loss), np.ldexp(np.sum(q * q * weights), 2 * exponent), rtol=1e-6)
    want = np.float32(2 * q * weights).astype(e5m2).astype(np.float64)
    np.testing.assert_array_equal(value(gradient), np.ldexp(want, exponent))
