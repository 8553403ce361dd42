"""Laws of sampling: where the points lie, how they are spread, and which of them are copies."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from laws import (
    FLOATS,
    assert_equal,
    batch_mesh,
    floats,
    integers,
    largest_array,
    program,
)
from scipy import stats

import hyperlayer_jax as hl
from hyperlayer_jax import sampling
from hyperlayer_jax.kernels.redistribution import cpu

KEY = jax.random.key(0)
OFFSET = 5**0.5 / 4
HUGE = float(np.finfo(np.float32).max)
# Index space and region: short axes, a region of a single index, one larger than the axis.
SPACES = (
    ((1,), (1,)),
    ((7,), (20,)),
    ((5, 1), (2, 3)),
    ((2**31 - 1, 10**6, 3), (2**31 - 1, 11, 1)),
)
sample = jax.jit(hl.sample_indices, static_argnames=("shape", "num_global", "num_local", "region"))
fixed = jax.jit(
    sampling.fixed_indices, static_argnames=("shape", "num_global", "num_local", "region")
)
duplicates = jax.jit(hl.duplicate_mask)


@st.composite
def means_in(draw, low, high, *, spaces=SPACES, dtypes=FLOATS):
    """(means [2, 3, r], shape, region); low and high in units of the axes."""
    shape, region = draw(st.sampled_from(spaces))
    unit = draw(floats(low, high, (2, 3, len(shape))))
    scale = jnp.asarray(np.array(shape).reshape(1, 1, -1), jnp.float32)
    return (unit * scale).astype(draw(st.sampled_from(dtypes))), shape, region


@given(
    case=st.one_of(means_in(-2, 2), means_in(-HUGE / 2**32, HUGE / 2**32)),
    seed=st.integers(0, 2**32 - 1),
)
def test_points_lie_in_the_index_space(case, seed):
    means, shape, region = case
    points = sample(jax.random.key(seed), means, shape, num_global=2, num_local=2, region=region)
    assert points.shape == (2, 3 * (2 ** len(shape) + 4), len(shape)) and points.dtype == jnp.int32
    assert (np.asarray(points) >= 0).all() and (np.asarray(points, np.int64) < shape).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("mean", [HUGE, -HUGE, 2.0**31, -(2.0**31), 2.0**31 - 128])
def test_means_beyond_an_edge_are_clipped_to_it(mean, dtype):
    mean = float(np.clip(mean, -3e38, 3e38))
    points = sample(KEY, jnp.full((1, 2), mean, dtype), (9, 1), num_local=3, region=1)
    assert_equal(points, np.tile([8 if mean > 0 else 0, 0], (7, 1)))


SMALL = (((7,), (3,)), ((9, 4), (3, 2)), ((6, 5, 8), (1, 9, 4)))


@given(case=means_in(0, 0.75, spaces=SMALL))
def test_the_neighbours_come_first_and_surround_the_mean(case):
    means, shape, region = case
    r = len(shape)
    points = sample(KEY, means, shape, num_global=2, num_local=2, region=region)
    near = np.asarray(points).reshape(2, 3, 2**r + 4, r)[:, :, : 2**r]
    for b, j in itertools.product(range(2), range(3)):
        mean = np.asarray(means[b, j], np.float64)
        assert sorted(map(tuple, near[b, j].tolist())) == sorted(oracle.neighbours(mean))


@given(case=means_in(-0.25, 1.25, spaces=SMALL, dtypes=(jnp.float32,)))
def test_local_points_lie_in_the_region_of_the_mean(case):
    """A box centred on the rounded mean, and moved, never cut, where it would cross a border."""
    means, shape, region = case
    points = sample(KEY, means, shape, num_local=64, region=region)
    local = np.asarray(points).reshape(2, 3, -1, len(shape))[:, :, 2 ** len(shape) :]
    for axis, (size, width) in enumerate(zip(shape, np.minimum(region, shape), strict=True)):
        centre = np.clip(np.round(np.asarray(means[..., axis])), 0, size - 1)
        start = np.clip(centre - width // 2, 0, size - width)
        low, high = local[..., axis].min(-1), local[..., axis].max(-1)
        assert (low >= start).all() and (high < start + width).all()
        # 64 draws miss a border index of at most 9 less than once in 1000 boxes.
        assert (low == start).mean() > 0.8 and (high == start + width - 1).mean() > 0.8


@pytest.mark.parametrize(("mean", "first", "last"), [(0, 0, 4), (1, 0, 4), (5, 3, 7), (8, 4, 8)])
def test_the_region_is_shifted_back_inside_at_borders(mean, first, last):
    points = sample(KEY, jnp.full((1, 1), float(mean)), (9,), num_local=200, region=5)
    assert set(np.asarray(points[2:, 0]).tolist()) == set(range(first, last + 1))


def test_a_region_larger_than_an_axis_is_the_axis():
    whole = sample(KEY, jnp.full((1, 2), 3.0), (9, 4), num_local=50, region=(9, 4))
    larger = sample(KEY, jnp.full((1, 2), 3.0), (9, 4), num_local=50, region=2**31 - 1)
    assert_equal(larger, whole)


@given(case=st.one_of(means_in(-2, 2), means_in(-HUGE / 2**32, HUGE / 2**32)))
def test_fixed_points_lie_as_drawn_ones_do(case):
    """In the space, tuple by tuple: neighbours, then global points, then those of the region."""
    means, shape, region = case
    counts = {"num_global": 3, "num_local": 4, "region": region}
    points = fixed(means, jnp.ones_like(means), shape, **counts)
    drawn = sample(KEY, means, shape, **counts)
    assert points.shape == drawn.shape and points.dtype == jnp.int32
    assert (np.asarray(points) >= 0).all() and (np.asarray(points, np.int64) < shape).all()
    near = 2 ** len(shape)
    points, drawn = (
        np.asarray(x).reshape(2, 3, near + 7, len(shape)).astype(np.int64) for x in (points, drawn)
    )
    assert_equal(points[:, :, :near], drawn[:, :, :near])
    width = np.minimum(region, shape)
    assert (np.ptp(points[:, :, near + 3 :], axis=2) < width).all()


@given(mean=st.floats(-150, 250, width=32), sigma=st.floats(0.25, 90, width=32))
def test_fixed_points_are_quantiles_and_divide_the_region(mean, sigma):
    points = fixed(jnp.full((1, 1), mean), jnp.full((1, 1), sigma), (100,), num_global=5)
    borders = (-0.5 - mean) / sigma, (99.5 - mean) / sigma
    if max(borders[0], -borders[1]) < 12:
        want = stats.truncnorm(*borders, mean, sigma).ppf((np.arange(5) + OFFSET) / 5)
        got = np.sort(np.asarray(points)[2:, 0])
        assert np.abs(got - want).max() <= 0.5 + 1e-3
    else:
        assert (np.asarray(points) == (0 if mean < 0 else 99)).all()
    for count in (1, 2, 3, 8):
        counts = {"num_local": count, "region": 8}
        points = np.asarray(fixed(jnp.full((1, 1), mean), jnp.ones((1, 1)), (100,), **counts))
        start = np.clip(np.round(mean) - 4, 0, 92)
        assert_equal(points[2:, 0] - start, np.floor((np.arange(count) + OFFSET) * 8 / count))


@pytest.mark.parametrize("r", [1, 2, 3])
def test_fixed_global_points_have_the_moments_of_the_gaussian(r):
    mean, sigma = np.float32([500, 400, 450][:r]), np.float32([100, 20, 50][:r])
    points = fixed(mean[None], sigma[None], (1000,) * r, num_global=256)[2**r :]
    np.testing.assert_allclose(np.mean(points, 0), mean, atol=0.1 * sigma.min())
    np.testing.assert_allclose(np.std(points, 0), sigma, rtol=0.03)
    assert np.abs(np.corrcoef(points, rowvar=False) - np.eye(r)).max() < 0.1


def p_uniform(points, shape):
    """The chi-square p value of points [n, r] being uniform over a box of `shape`."""
    flat = np.ravel_multi_index(np.asarray(points).T, shape)
    return stats.chisquare(np.bincount(flat, minlength=np.prod(shape))).pvalue


@pytest.mark.parametrize("shape", [(7,), (5, 6), (2, 3, 4)])
@pytest.mark.parametrize("mean", [0.0, 1.7])
def test_global_points_are_uniform_wherever_the_mean_is(shape, mean):
    r = len(shape)
    points = sample(KEY, jnp.full((2, r), mean), shape, num_global=3000).reshape(2, -1, r)
    for chunk in points:
        assert p_uniform(chunk[2**r :], shape) > 1e-3
    assert (points[0, 2**r :] != points[1, 2**r :]).any(-1).mean() > 0.5


def test_draws_are_the_upper_words_of_products_with_random_bits():
    sizes = np.array([1, 5, 2**16 - 1, 2**16, 2**16 + 1, 2**31 - 1], np.int32)
    draws = sampling._draw(KEY, (1000, 6), sizes)
    bits = np.asarray(jax.random.bits(KEY, (6000,), jnp.uint32), np.uint64).reshape(1000, 6)
    assert_equal(draws, (bits * sizes.astype(np.uint64)[None] >> 32).astype(np.int32))


@pytest.mark.parametrize(("mean", "start"), [(0.0, 0), (6.4, 4), (19.0, 15)])
def test_local_points_are_uniform_in_their_region(mean, start):
    points = sample(KEY, jnp.full((1, 2), mean), (20, 20), num_local=3000, region=5)
    assert p_uniform(points[4:] - start, (5, 5)) > 1e-3


@pytest.mark.parametrize("batch", [(0,), (2, 0)])
def test_empty_batches_are_ordinary(batch):
    means = jnp.zeros((*batch, 3, 2))
    points = sample(KEY, means, (4, 4), num_global=9, num_local=9, region=2)
    assert points.shape == (*batch, 66, 2) and duplicates(points).shape == (*batch, 66)


@pytest.mark.parametrize("key", [KEY, jax.random.PRNGKey(0)], ids=["typed", "raw"])
def test_the_key_decides(key):
    draw = lambda key: sample(key, jnp.zeros((2, 1)), (10**6,), num_global=4)  # noqa: E731
    assert_equal(draw(key), draw(key))
    first, second = (np.asarray(draw(k)).reshape(2, 6) for k in jax.random.split(key))
    assert (first[:, :2] == second[:, :2]).all() and (first[:, 2:] != second[:, 2:]).any()


@pytest.mark.parametrize("axes", [("data", None, None), (None, "data", None)])
def test_the_same_key_the_same_points_whatever_is_sharded(axes):
    means = jnp.asarray(np.random.default_rng(0).uniform(0, 50, (16, 8, 2)), jnp.float32)
    options = {"shape": (50, 50), "num_global": 3, "num_local": 5, "region": (7, 3)}
    sharding = NamedSharding(batch_mesh(), PartitionSpec(*axes))
    want = sample(KEY, means, **options)
    assert_equal(sample(KEY, jax.device_put(means, sharding), **options), want)
    eager = hl.sample_indices(KEY, means, **options)
    assert_equal(eager, want)


def test_works_inside_shard_map():
    mesh, spec = batch_mesh(), PartitionSpec("data")
    keys = jax.random.split(KEY, 8)
    means = jnp.asarray(np.random.default_rng(0).uniform(0, 50, (8, 9, 2)), jnp.float32)
    options = {"shape": (50, 50), "num_global": 3, "num_local": 5, "region": (7, 3)}

    def draw(keys, means):
        points = hl.sample_indices(keys[0], means, **options)
        return points, hl.duplicate_mask(points)

    got = jax.jit(jax.shard_map(draw, mesh=mesh, in_specs=spec, out_specs=spec))(keys, means)
    for k in range(8):
        want = sample(keys[k], means[k : k + 1], **options)[0]
        assert_equal((got[0][k], got[1][k]), (want, duplicates(want)))


def test_vmap_over_keys_is_one_draw_for_each():
    keys, means = jax.random.split(KEY, 3), jnp.full((4, 2), 7.3)
    options = {"shape": (50, 50), "num_global": 3, "num_local": 5, "region": (7, 3)}
    got = jax.jit(jax.vmap(lambda key: hl.sample_indices(key, means, **options)))(keys)
    assert_equal(got, jnp.stack([sample(key, means, **options) for key in keys]))


def test_the_program_does_not_grow_with_tuples():
    def size(k):
        draw = functools.partial(
            hl.sample_indices, shape=(9, 9), num_global=2, num_local=2, region=3
        )
        return len(program(draw, KEY, jax.ShapeDtypeStruct((k, 2), jnp.float32)))

    assert size(3) == size(3000)


def first_occurrences(points):
    """The oracle on every chunk."""
    points = np.asarray(points)
    out = np.zeros(points.shape[:-1], bool)
    for chunk in np.ndindex(points.shape[:-2]):
        out[chunk] = oracle.first_occurrences(points[chunk])
    return out


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (32, 3), (33, 1), (2, 33, 2), (2, 1, 40, 3)])
@given(data=st.data())
def test_copies_are_the_points_that_an_earlier_one_equals(shape, data):
    high = data.draw(st.sampled_from([0, 1, 9, 2**31 - 1]))
    low = data.draw(st.sampled_from([0, -high, -high - 1]))
    points = data.draw(integers(low, high, shape))
    assert_equal(~duplicates(points), first_occurrences(points))


@pytest.mark.parametrize("m", [1, 2, 32, 33, 1000, 20000])
@pytest.mark.parametrize("kind", ["equal", "different", "full range", "few", "twice", "extreme"])
def test_copies_are_exact_at_any_coordinate(kind, m):
    rng = np.random.default_rng(m)
    info = np.iinfo(np.int32)
    points = {
        "equal": lambda: np.full((2, m, 2), 2**31 - 1),
        "different": lambda: np.arange(4 * m).reshape(2, m, 2) * 104729,
        "full range": lambda: rng.integers(info.min, info.max, (2, m, 2), endpoint=True),
        "few": lambda: rng.integers(0, 5, (2, m, 2)) * 2**28,
        "twice": lambda: np.tile(rng.integers(info.min, info.max, (2, m, 2)), (1, 2, 1))[
            :, m // 2 :
        ][:, :m],
        "extreme": lambda: rng.choice([info.min, -1, 0, 1, info.max], (2, m, 2)),
    }[kind]()
    points = points.astype(np.int32)
    assert_equal(~duplicates(jnp.asarray(points)), first_occurrences(points))


def test_pairing_functions_would_collide_here():
    """Cantor's pairing in float32 and row-major ids in int32 take these for copies."""
    pairs = [[50000, 50000], [49999, 50001], [50001, 49999], [0, 0], [1, 0], [0, 65536], [65536, 0]]
    ids = [[0, 2**31 - 1], [2**31 - 1, 0], [1, 2**30], [2, 2**30], [1, 0], [3, 2**30]]
    points = np.array(pairs + ids, np.int32)
    many = np.concatenate([points, points + 7, points, points[::-1]])
    for case in (points, many):
        assert_equal(~duplicates(jnp.asarray(case)), oracle.first_occurrences(case))


@pytest.mark.parametrize("r", [1, 2])
def test_points_that_meet_in_one_slot_stay_apart(r):
    """Every point here is hashed to the same slot in the first round."""
    m, num_bits = 40, 8
    candidates = np.random.default_rng(0).integers(0, 2**31 - 1, (2**15, r)).astype(np.int32)
    slots = np.asarray(cpu._hash(jnp.asarray(candidates), jnp.uint32(1), num_bits))
    points = candidates[slots == slots[0]][:m]
    points[m // 2 :: 3] = points[: len(points[m // 2 :: 3])]
    assert len(points) == m and cpu._SLOTS_PER_POINT * m <= 2**num_bits
    assert_equal(~duplicates(jnp.asarray(points)), oracle.first_occurrences(points))


@pytest.mark.parametrize("m", [20, 40])
def test_copies_are_sought_within_a_chunk(m):
    points = jnp.asarray(np.random.default_rng(0).integers(0, 5, (2, 3, m, 2)), jnp.int32)
    want = duplicates(points)
    assert_equal(jax.jit(jax.vmap(jax.vmap(hl.duplicate_mask)))(points), want)
    assert_equal(duplicates(points[1, 2]), want[1, 2])


def test_memory_is_linear_in_points():
    m = 10**6
    size = largest_array(hl.duplicate_mask, jax.ShapeDtypeStruct((m, 2), jnp.int32))
    assert size <= 2 * cpu._SLOTS_PER_POINT * m


MEANS, POINTS = jnp.zeros((4, 2)), jnp.zeros((4, 2), jnp.int32)
draw = functools.partial(hl.sample_indices, KEY)
ERRORS = {
    "means: got int32, want a floating array": lambda: draw(POINTS, (3, 3)),
    r"means: got shape \(2,\), want \[\*B, k, r\]": lambda: draw(MEANS[0], (3, 3)),
    r"shape: got \(3,\), want 2 axes, one for each": lambda: draw(MEANS, (3,)),
    r"shape: got \(3, 0\)": lambda: draw(MEANS, (3, 0)),
    r"shape: got \(3, 2147483648\), .* 2\^31 - 1": lambda: draw(MEANS, (3, 2**31)),
    "num_global: got -1, want an int >= 0": lambda: draw(MEANS, (3, 3), num_global=-1),
    "num_local: got 1.5, want an int >= 0": lambda: draw(MEANS, (3, 3), num_local=1.5),
    "region: got None, want the axes": lambda: draw(MEANS, (3, 3), num_local=1),
    r"region: got \(2,\), want 2 axes": lambda: draw(MEANS, (3, 3), num_local=1, region=(2,)),
    r"region: got \(0, 0\)": lambda: draw(MEANS, (3, 3), num_local=1, region=0),
    r"region: got \(2.5, 2.5\), want a sequence of ints": lambda: draw(
        MEANS, (3, 3), num_local=1, region=2.5
    ),
    "indices: got float32, want int32": lambda: hl.duplicate_mask(MEANS),
    r"indices: got shape \(2,\), want \[\*B, m, r\]": lambda: hl.duplicate_mask(POINTS[0]),
    r"indices: got shape \(4, 0\), want": lambda: hl.duplicate_mask(POINTS[:, :0]),
}


@pytest.mark.parametrize("message", ERRORS)
def test_wrong_input_names_the_argument(message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(ERRORS[message])
