"""The random bits, and stochastic rounding by them: unbiased, independent, the same whatever the sharding."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.sharding import NamedSharding, PartitionSpec

import formats
from formats import noise
from tests.formats.oracle import decode

N = 1 << 19
KEYS = [jnp.array(words, jnp.uint32) for words in ([0, 0], [0, 1], [0, 2], [1, 0], [2**32 - 1, 7], [123456789, 987654321])]


@pytest.fixture(scope="module")
def streams():
    draw = jax.jit(lambda key: noise.random_bits(key, (N,)))
    return np.stack([np.asarray(draw(key)) for key in KEYS])


def test_every_bit_and_byte_is_uniform(streams):
    for stream in streams:
        ones = ((stream[:, None] >> np.arange(32, dtype=np.uint32)) & 1).sum(axis=0)
        assert np.abs(ones - N / 2).max() < 4.5 * np.sqrt(N) / 2
        for shift in (0, 8, 16, 24):
            counts = np.bincount((stream >> np.uint32(shift)) & 255, minlength=256)
            assert scipy.stats.chisquare(counts).pvalue > 1e-4


def test_neighbours_and_keys_are_independent(streams):
    """Correlations of the uniform numbers: lags inside a stream, all pairs of keys, and their low bits."""
    limit = 4.5 / np.sqrt(N)
    for low in (32, 20, 4):
        u = (streams & np.uint32(2**low - 1 if low < 32 else 2**32 - 1)).astype(np.float64)
        u = (u - u.mean(axis=1, keepdims=True)) / u.std(axis=1, keepdims=True)
        for lag in (1, 2, 3, 16, 32, 64, 100, 1024, 4096):
            assert np.abs((u[:, lag:] * u[:, :-lag]).mean(axis=1)).max() < limit
        between = u @ u.T / N
        assert np.abs(between - np.diag(np.diag(between))).max() < limit


def test_related_keys_do_not_give_related_bits(streams):
    """Neither shifted copies nor constant differences: the joint distribution of two streams' low bytes is uniform."""
    for a, b in ((0, 1), (1, 2), (0, 3), (4, 5)):
        for lag in (0, 1):
            joint = (streams[a][lag:] & 15) * np.uint32(16) + (streams[b][: N - lag] & 15)
            assert scipy.stats.chisquare(np.bincount(joint, minlength=256)).pvalue > 1e-4
        head = streams[:, : 2**16]  # 65536 differences of independent numbers hold about half a collision
        assert np.unique(head[a] - head[b]).size > 2**16 - 10
        assert np.unique(head[a] ^ head[b]).size > 2**16 - 10


def test_consecutive_seeds_give_independent_draws_at_one_index():
    """Seeds are the second axis of every sweep: the bits at one place over 65536 seeds are uniform and uncorrelated."""
    keys = jnp.stack([jnp.zeros(2**16, jnp.uint32), jnp.arange(2**16, dtype=jnp.uint32)], axis=1)
    bits = np.asarray(jax.vmap(lambda key: noise.random_bits(key, (4,)))(keys))
    for column in bits.T:
        assert scipy.stats.chisquare(np.bincount(column >> 24, minlength=256)).pvalue > 1e-4
        u = column.astype(np.float64) / 2**32 - 0.5
        assert abs((u[1:] * u[:-1]).mean() * 12) < 4.5 / np.sqrt(u.size)


def test_both_words_of_a_key_count():
    """2**18 random keys give as many streams; with 32 bits of state in all, about 8 pairs would be the same one."""
    keys = jnp.asarray(np.random.default_rng(0).integers(0, 2**32, (2**18, 2), dtype=np.uint32))
    first = np.asarray(jax.vmap(lambda key: noise.random_bits(key, (2,)))(keys)).astype(np.uint64)
    assert np.unique(first[:, 0] << np.uint64(32) | first[:, 1]).size == 2**18


def test_bits_belong_to_the_global_index():
    """Shards by offset, by corner, and by explicit index equal the slices of the whole; so does a sharded jit."""
    key, shape = jax.random.key(3), (16, 24, 8)
    whole = np.asarray(noise.random_bits(key, shape))
    np.testing.assert_array_equal(noise.random_bits(key, (4, 24, 8), offset=jnp.int32(4 * 24 * 8)), whole[4:8])
    corner = noise.random_bits(key, (8, 6, 4), start=(8, jnp.int32(12), 4), global_shape=shape)
    np.testing.assert_array_equal(corner, whole[8:16, 12:18, 4:8])
    index = np.arange(16 * 24 * 8).reshape(shape)[:, ::-1]
    np.testing.assert_array_equal(noise.random_bits(key, shape, offset=index), whole[:, ::-1])
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, PartitionSpec("a", None, "b"))
    sharded = jax.jit(lambda key: noise.random_bits(key, shape), out_shardings=sharding)(key)
    np.testing.assert_array_equal(sharded, whole)


def test_rounding_is_the_same_sharded_and_mapped():
    key, x = jax.random.key(4), jax.random.normal(jax.random.key(5), (8, 64, 32))
    def q(x, bits=None, **given):
        return formats.quantize(x, "mxfp4", rounding="stochastic", random_bits=bits, **given)
    whole = np.asarray(q(x, key=key))
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    def shard(x):
        start = (jax.lax.axis_index("rows"), 0, 0)
        return q(x, noise.random_bits(key, x.shape, start=start, global_shape=(8, 64, 32)))
    rows = PartitionSpec("rows")
    np.testing.assert_array_equal(jax.jit(jax.shard_map(shard, mesh=mesh, in_specs=rows, out_specs=rows))(x), whole)
    mapped = jax.vmap(lambda x, i: q(x, noise.random_bits(key, x.shape, offset=i * 64 * 32)))(x, jnp.arange(8))
    np.testing.assert_array_equal(mapped, whole)
    keys = jax.random.split(key, 3)
    np.testing.assert_array_equal(jax.vmap(lambda k: q(x, key=k))(keys), np.stack([q(x, key=k) for k in keys]))


def test_typed_and_raw_keys_agree_and_wrong_ones_are_refused():
    raw = jnp.array([5, 6], jnp.uint32)
    typed = jax.random.wrap_key_data(raw, impl="threefry2x32")
    np.testing.assert_array_equal(noise.random_bits(raw, (9,)), noise.random_bits(typed, (9,)))
    assert noise.random_bits(jax.random.key(0, impl="rbg"), (9,)).shape == (9,)
    for key in (7, jnp.zeros((3, 2), jnp.uint32), jnp.zeros(2, jnp.int32)):
        with pytest.raises(ValueError, match="key must be one PRNG key or a uint32"):
            noise.random_bits(key, (9,))
    with pytest.raises(ValueError, match="start and global_shape must be given together"):
        noise.random_bits(raw, (9,), start=(0,))


ELEMENTS = [name for name in formats.names() if isinstance(formats.get(name), formats.Element) and name not in ("float32", "float8_e8m0fnu")]


@pytest.mark.parametrize("name", [*ELEMENTS, "int8_f6", "float5_e0m4fn", "float6_e5m0"])
def test_stochastic_rounding_is_unbiased_everywhere(name):
    """Mean over 65536 draws within 4 standard errors (times sqrt 2 for many points), below the quantum too, and only the
    two neighbours come out."""
    element = formats.get(name)
    man_bits, quantum = int(element.man_bits), 2.0 ** int(element.quantum_exp)
    rng = np.random.default_rng(0)
    binades = quantum * 2.0 ** np.arange(-3, man_bits + 3)
    points = np.concatenate([binades * rng.uniform(1, 2, binades.size), quantum * np.array([1e-3, 0.5, 0.9999, 1.25])])
    points = points[points < 0.9 * float(element.max_value)].astype(np.float32)
    points = np.concatenate([points, -points])
    draws = 2**16
    y = formats.quantize(jnp.broadcast_to(points, (draws, points.size)), element, rounding="stochastic", key=jax.random.key(1))
    y = np.asarray(y, np.float64)
    down = np.asarray(formats.quantize(points, element, rounding="toward_negative"), np.float64)
    up = np.asarray(formats.quantize(points, element, rounding="toward_positive"), np.float64)
    assert ((y == down) | (y == up)).all()
    chance = (points - down) / np.where(up > down, up - down, 1)
    error = np.sqrt(chance * (1 - chance) / draws) * (up - down)
    assert (np.abs(y.mean(axis=0) - points) <= 4 * np.sqrt(2) * error + 1e-12 * quantum).all()


@pytest.mark.parametrize("name", ["nf4", "dybit4", "binary", "lns8", "lns6", "float8_e4m3fn", "int4"])
@pytest.mark.parametrize(("sr_bits", "sr_rule"), [(None, "full"), (16, "B"), (16, "C")])
def test_stochastic_rounding_of_tables_and_of_few_bits_is_unbiased(name, sr_bits, sr_rule):
    """Codebooks and logarithmic numbers too are unbiased in x itself; 16 bits of rules B and C within their resolution of 2**-17."""
    fmt, draws = formats.get(name), 2**15
    low, high = (0.97 * float(limit) for limit in fmt.limits)
    x = np.random.default_rng(3).uniform(low, high, 64).astype(np.float32)
    x = np.where(np.abs(x) < 2.0**-10, np.float32(0.5), x) if name.startswith("lns") else x
    given = jnp.broadcast_to(x, (draws, x.size))
    y = np.asarray(formats.quantize(given, fmt, rounding="stochastic", key=jax.random.key(6), sr_bits=sr_bits, sr_rule=sr_rule), np.float64)
    neighbours = y.max(axis=0) - y.min(axis=0)
    assert (np.abs(y.mean(axis=0) - x) <= 4.5 * y.std(axis=0) / np.sqrt(draws) + neighbours * 2.0**-16 + 1e-7).all()
    assert all(np.unique(column).size <= 2 for column in y.T)


@pytest.mark.parametrize("exponent", [0, -126, -133])
def test_stochastic_rounding_in_blocks_is_unbiased_among_float32_subnormals_too(exponent):
    """ceil scales, so that nothing clips; mxfp4 at 2**-133 has its whole grid below the smallest normal float32."""
    x = np.ldexp(np.float32([1.0, 0.7, -0.3, 0.12, 0.05, -0.02, 0.0, 0.25]), exponent)
    fmt, draws = formats.block("float4_e2m1fn", 8, rule="ceil"), 2**15
    y = formats.quantize(jnp.broadcast_to(x, (draws, 8)), fmt, rounding="stochastic", key=jax.random.key(8))
    y = np.ldexp(np.asarray(y, np.float64), -exponent)
    error = y.std(axis=0) / np.sqrt(draws)
    assert (np.abs(y.mean(axis=0) - np.ldexp(x.astype(np.float64), -exponent)) <= 4.5 * error).all()
    assert (error[1:6] > 0).all()


def test_all_low_bit_patterns_give_exactly_the_dropped_fraction():
    """Truth table: over every pattern of the dropped bits, the number of roundings up is the fraction itself."""
    x = np.float32(1 + 5 / 32)  # e4m3 spacing at 1 is 1/8: 5/32 drops the fraction 1/4
    bits = jnp.arange(2**20, dtype=jnp.uint32)
    y = np.asarray(formats.round_to(jnp.full(2**20, x), formats.get("float8_e4m3fn"), rounding="stochastic", random_bits=bits))
    assert set(y.tolist()) == {1.125, 1.25}
    assert (y == 1.25).sum() == 2**20 // 4


def test_stochastic_rounding_keeps_representable_values_and_saturates():
    values = decode(4, 3, "fn").astype(np.float32)
    x = jnp.concatenate([values, -values, jnp.array([500.0, jnp.inf, -jnp.inf], jnp.float32)])
    y = formats.quantize(x, "float8_e4m3fn", rounding="stochastic", key=jax.random.key(2))
    np.testing.assert_array_equal(y, np.clip(x, -448, 448))
