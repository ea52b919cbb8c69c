"""Formats are data: widths, bias, rules and modes are arguments of one program."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import formats
from formats.modes import DETERMINISTIC
from tests.formats.oracle import bits_equal, random_patterns

X = jnp.asarray(random_patterns(4096, seed=5).reshape(64, 64))


def test_thirty_formats_and_all_modes_are_one_program():
    """e, m, bias and integer widths, under every deterministic mode, through one compiled function."""
    members = [formats.minifloat(e, m, variant) for e in (2, 3, 4, 5, 8) for m in (1, 3) for variant in ("ieee", "fn")]
    members += [formats.minifloat(4, 3, "fn", bias) for bias in (1, 11)] + [formats.integer(bits) for bits in range(2, 9)]
    members += [formats.identity(), formats.get("float8_e8m0fnu"), formats.integer(8, signed=False)]
    assert len(members) >= 30
    program = jax.jit(lambda x, element, mode: formats.quantize(x, element, rounding=mode))
    for number, element in enumerate(members):
        mode = DETERMINISTIC[number % len(DETERMINISTIC)]
        got = program(X, jax.tree.map(jnp.asarray, element), formats.mode_number(mode))
        assert bits_equal(got, formats.quantize(X, element, rounding=mode)).all(), (number, mode)
    assert program._cache_size() == 1


def test_widths_made_inside_the_program():
    program = jax.jit(lambda x, e, m, bias: formats.quantize(x, formats.minifloat(e, m, "fn", bias)))
    for e, m, bias in ((4, 3, 7), (5, 2, 15), (2, 1, 1), (3, 2, 5)):
        got = program(X, jnp.int32(e), jnp.int32(m), jnp.int32(bias))
        assert bits_equal(got, formats.quantize(X, formats.minifloat(e, m, "fn", bias))).all()
    assert program._cache_size() == 1


def test_rules_by_number_are_one_program_and_vmap():
    rules = ("floor", "ceil", "rceil", "even")
    program = jax.jit(lambda x, rule, fmt: formats.quantize(x, formats.block(fmt, 32, rule=rule)))
    for rule in rules:
        for name in ("float4_e2m1fn", "float8_e4m3fn", "int8"):
            got = program(X, formats.rule_number(rule), formats.get(name))
            assert bits_equal(got, formats.quantize(X, formats.block(formats.get(name), 32, rule=rule))).all()
    assert program._cache_size() == 1
    numbers = jnp.asarray([formats.rule_number(rule) for rule in rules])
    batched = jax.vmap(lambda rule: formats.quantize(X, formats.block("float6_e2m3fn", 32, rule=rule)))(numbers)
    for rule, got in zip(rules, batched, strict=True):
        assert bits_equal(got, formats.quantize(X, formats.block("float6_e2m3fn", 32, rule=rule))).all()


def test_modes_vmap_and_reach_blocks_codebooks_and_logarithms():
    numbers = jnp.asarray([formats.mode_number(mode) for mode in DETERMINISTIC])
    for fmt in ("mxfp4", "nf4", "lns8"):
        batched = jax.vmap(lambda mode, fmt=fmt: formats.quantize(X, fmt, rounding=mode))(numbers)
        for mode, got in zip(DETERMINISTIC, batched, strict=True):
            assert bits_equal(got, formats.quantize(X, fmt, rounding=mode)).all(), (fmt, mode)


def test_levels_and_logarithmic_widths_may_be_traced():
    tables = jnp.asarray([[-2.0, -0.5, 0.0, 1.0], [-1.0, 0.25, 0.5, 4.0]])
    batched = jax.jit(jax.vmap(lambda levels: formats.quantize(X, formats.codebook(levels))))(tables)
    for table, got in zip(tables, batched, strict=True):
        assert bits_equal(got, formats.quantize(X, formats.codebook(np.asarray(table)))).all()
    widths = jax.jit(jax.vmap(lambda bits: formats.quantize(X, formats.lns(bits, 8))))(jnp.array([4, 6, 8]))
    for bits, got in zip((4, 6, 8), widths, strict=True):
        assert bits_equal(got, formats.quantize(X, formats.lns(bits, 8))).all()


@pytest.mark.parametrize("fmt", [*(n for n in formats.names() if n != "float32"), "tiles", "columns"])
def test_peak_memory_is_input_and_output(fmt):
    """XLA's own count of temporary bytes, as a share of input and output, nearest and stochastic."""
    made = {"tiles": formats.scaled("float8_e4m3fn", "block", block=(16, 16), axis=(-2, -1)), "columns": formats.block("int4", 32, axis=0)}
    x, fmt = jax.ShapeDtypeStruct((640, 1600), jnp.float32), made.get(fmt) or formats.get(fmt)
    for rounding in ("nearest_even", "stochastic"):
        key = jnp.array([1, 2], jnp.uint32) if rounding == "stochastic" else None
        used = jax.jit(lambda x, f: formats.quantize(x, f, rounding=rounding, key=key)).lower(x, fmt).compile().memory_analysis()  # noqa: B023
        assert used.temp_size_in_bytes <= 0.1 * (used.argument_size_in_bytes + used.output_size_in_bytes)
