"""Functions whose values have a scale of their own."""
from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from scipy import special

from tests.trainer.propagation.harness import MODES, Case, check, check_moved, normal, positive, within

SMALL = ((0,), (-60,), (-12,), (3,))  # where the values are float32 numbers
TINY = ((0,), (-60,), (-24,), (-12,))
ANY = ((0,), (60,), (-60,))
INSIDE = within(-0.9, 0.9)
# XLA's float32 itself is as far from float64, measured on a CPU with jax 0.10 and 0.12.
XLA = 4e-6


def _case(name, fun, oracle, draw=normal, exponents=SMALL, tolerance=1e-6):
    return Case(name, fun, oracle, draw=draw, exponents=exponents, rows=None, tolerance=tolerance)


TABLE = {
    "tanh": _case("tanh", jnp.tanh, np.tanh, exponents=ANY),
    "sin": _case("sin", jnp.sin, np.sin),
    "tan": _case("tan", jnp.tan, np.tan, INSIDE, TINY, XLA),
    "asin": _case("asin", jnp.arcsin, np.arcsin, INSIDE, TINY),
    "atan": _case("atan", jnp.arctan, np.arctan, exponents=ANY),
    "sinh": _case("sinh", jnp.sinh, np.sinh),
    "asinh": _case("asinh", jnp.arcsinh, np.arcsinh, exponents=ANY),
    "atanh": _case("atanh", jnp.arctanh, np.arctanh, INSIDE, TINY),
    "expm1": _case("expm1", jnp.expm1, np.expm1),
    "log1p": _case("log1p", jnp.log1p, np.log1p, positive, ANY),
    "log1p near zero": _case("log1p", jnp.log1p, np.log1p, INSIDE, TINY),
    "erf": _case("erf", jax.scipy.special.erf, special.erf, exponents=ANY),
    "erf_inv": _case("erf_inv", jax.scipy.special.erfinv, special.erfinv, INSIDE, TINY, XLA),
    "exp": _case("exp", jnp.exp, np.exp),
    "exp large": _case("exp", jnp.exp, np.exp, within(-1, 1), ((6,), (5,)), 1e-5),  # float32 exp of 64: the argument's last digit is 4e-6
    "exp2": _case("exp2", lax.exp2, np.exp2),
    "cosh": _case("cosh", jnp.cosh, np.cosh),
    "logistic": _case("logistic", jax.nn.sigmoid, special.expit, exponents=ANY),
    "cos": _case("cos", jnp.cos, np.cos),
    "erfc": _case("erfc", jax.scipy.special.erfc, special.erfc, exponents=ANY),
    "acos": _case("acos", jnp.arccos, np.arccos, INSIDE, TINY),
    "floor": _case("floor", jnp.floor, np.floor, exponents=(*ANY, (4,))),
    "ceil": _case("ceil", jnp.ceil, np.ceil, exponents=(*ANY, (4,))),
    "round": _case("round", lambda a: lax.round(a, lax.RoundingMethod.TO_NEAREST_EVEN), np.round, exponents=(*ANY, (4,))),
    "cbrt": _case("cbrt", jnp.cbrt, np.cbrt, exponents=ANY),
    "acosh": _case("acosh", lax.acosh, np.arccosh, within(1.5, 4.0), ((0,), (60,), (3,))),
    "lgamma": _case("lgamma", lax.lgamma, special.gammaln, positive, ((0,), (-60,), (3,)), XLA),
    "digamma": _case("digamma", lax.digamma, special.digamma, positive, ((0,), (-60,), (3,)), XLA),
    "bessel_i0e": _case("bessel_i0e", jax.scipy.special.i0e, special.i0e, exponents=ANY),
    "bessel_i1e": _case("bessel_i1e", jax.scipy.special.i1e, special.i1e, exponents=SMALL),
    "log": _case("log", jnp.log, np.log, positive, (*ANY, (200,), (-200,))),
    "pow": _case("pow", lambda a: a**1.75, lambda a: a**1.75, positive, ANY, 1e-5),  # log2 of 2^102 in float32
    "pow half": _case("pow", lambda a: lax.pow(a, jnp.full_like(a, 0.5)), np.sqrt, positive, (*ANY, (59,))),
    "pow minus half": _case("pow", lambda a: lax.pow(a, jnp.full_like(a, -0.5)), lambda a: a**-0.5, positive, (*ANY, (59,))),
    "pow three": _case("pow", lambda a: lax.pow(a, jnp.full_like(a, 3.0)), lambda a: a**3.0, normal, ANY),
    "pow of integer": _case("pow", lambda a: lax.pow(a, np.int32(3)), lambda a: a**3.0, normal, SMALL),
    "pow of number": _case("pow", lambda a: 2.5**a, lambda a: 2.5**a),
}  # fmt: skip
if hasattr(lax, "log2_p"):  # jax 0.12
    TABLE["log2"] = _case("log2", jnp.log2, np.log2, positive, (*ANY, (200,), (-200,)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", TABLE)
def test_values(name, mode):
    check(TABLE, name, mode)


@pytest.mark.parametrize("name", TABLE)
def test_a_power_of_two_moved_changes_no_bit(name):
    check_moved(TABLE, name)
