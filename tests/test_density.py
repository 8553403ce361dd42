"""Laws of redistribution, and its agreement with a float64 oracle written from the paper."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from jax.test_util import check_grads
from laws import (
    FLOATS,
    assert_close,
    assert_equal,
    assert_finite,
    batch_mesh,
    floats,
    index_tuples,
    integers,
    largest_array,
    masks,
    operations,
    program,
    random_tuples,
)

import hyperlayer_jax as hl
from hyperlayer_jax.kernels.redistribution import blocks

# Leading axes, tuples, points, rank: few shapes, so that compiled programs are shared; the last
# has more points than are compared pair by pair. The space is small, so that copies are common.
CASES = (((), 1, 1, 1), ((2,), 3, 9, 2), ((2, 1), 2, 40, 3))
redistribute = jax.jit(hl.redistribute)


@jax.jit
def gradients(indices, tuples, where):
    out, vjp = jax.vjp(lambda t: hl.redistribute(indices, t, where=where), tuples)
    return vjp(
        jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape).astype(out.dtype)
    )


@st.composite
def chunks(draw, cases=CASES, dtypes=FLOATS, sigmas=(0.25, 8.0)):
    """(points, tuples, allowed) in a space of axes of 10."""
    batch, k, m, r = draw(st.sampled_from(cases))
    dtype = draw(st.sampled_from(dtypes))
    tuples = draw(index_tuples(batch, k, r, dtype=dtype, sigmas=sigmas))
    return draw(integers(0, 9, (*batch, m, r))), tuples, draw(masks((*batch, m)))


def expected(indices, tuples, where):
    """The oracle on every chunk."""
    indices, where = np.asarray(indices), np.asarray(where)
    out = np.zeros(where.shape)
    for chunk in np.ndindex(where.shape[:-1]):
        means, sigmas, values = (a[chunk] for a in (tuples.means, tuples.sigmas, tuples.values))
        out[chunk] = oracle.redistribute(indices[chunk], means, sigmas, values, where[chunk])
    return out


def distinct_points(m, r, size=50, seed=0):
    rng = np.random.default_rng(seed)
    flat = rng.choice(size**r, m, replace=False)
    return jnp.asarray(np.stack(np.unravel_index(flat, (size,) * r), -1), jnp.int32)


@given(case=chunks())
def test_agrees_with_the_oracle(case):
    out = redistribute(case[0], case[1], where=case[2])
    assert out.shape == case[2].shape and out.dtype == case[1].values.dtype
    tolerance = 2e-5 if out.dtype == jnp.float32 else 2e-2
    assert_close(out, expected(*case), tolerance, tolerance)


@given(case=chunks())
def test_value_is_conserved(case):
    """The points of a chunk sum to its tuples where any point is allowed, and to 0 elsewhere."""
    indices, tuples, where = case
    total = np.asarray(redistribute(indices, tuples, where=where), np.float64).sum(-1)
    want = np.asarray(tuples.values, np.float64).sum(-1) * np.asarray(where & first(indices)).any(
        -1
    )
    tolerance = 1e-5 if tuples.values.dtype == jnp.float32 else 0.1
    np.testing.assert_allclose(total, want, tolerance, tolerance)


def first(indices):
    return ~hl.duplicate_mask(indices)


@given(case=chunks())
def test_copies_and_forbidden_points_get_exactly_nothing(case):
    indices, tuples, where = case
    out = np.asarray(redistribute(indices, tuples, where=where), np.float64)
    for chunk in np.ndindex(out.shape[:-1]):
        closed = ~oracle.first_occurrences(indices[chunk]) | ~np.asarray(where[chunk])
        assert (out[chunk][closed] == 0).all()


def test_a_copy_is_counted_once_even_when_its_first_is_forbidden():
    """`where` is a function of coordinates, so forbidding one copy forbids the point."""
    indices = jnp.array([[3], [3], [5]], jnp.int32)
    tuples = random_tuples((), 1, 1)
    out = redistribute(indices, tuples, where=jnp.array([False, False, True]))
    assert_close(out, np.array([0, 0, tuples.values[0]]))


EXTREMES = st.one_of(
    st.sampled_from([0.0, 9.0, 4.5, 1e-30, 1e38, -1e38, 2.0**31, -(2.0**31), 2.0**33]),
    st.integers(-20, 20).map(float),
)
EXTREME_SIGMAS = st.sampled_from([0.0, 1e-38, 1e-20, 1e-5, 0.3, 1e10, 1e30, 3e38])
EXTREME_VALUES = st.sampled_from([0.0, 1.0, -1e6, 1e6, 1e-30])


@pytest.mark.parametrize("dtype", FLOATS)
@given(data=st.data())
def test_is_finite_for_any_finite_mean_and_any_sigma(dtype, data):
    batch, k, m, r = data.draw(st.sampled_from(CASES))

    def draw(elements, *shape):
        size = int(np.prod(shape))
        numbers = data.draw(st.lists(elements, min_size=size, max_size=size))
        return jnp.asarray(np.array(numbers, np.float32).reshape(shape), dtype)

    means = draw(EXTREMES, *batch, k, r)
    tuples = hl.IndexTuples(
        means, draw(EXTREME_SIGMAS, *batch, k, r), draw(EXTREME_VALUES, *batch, k)
    )
    indices = data.draw(integers(0, data.draw(st.sampled_from([9, 2**31 - 1])), (*batch, m, r)))
    where = data.draw(masks((*batch, m)))
    assert_finite(redistribute(indices, tuples, where=where))
    assert_finite(gradients(indices, tuples, where))


@pytest.mark.parametrize("m", [1, 9, 40])
def test_a_chunk_without_allowed_points_adds_nothing(m):
    tuples = random_tuples((2,), 3, 2)
    indices, where = jnp.zeros((2, m, 2), jnp.int32), jnp.zeros((2, m), bool)
    assert_equal(redistribute(indices, tuples, where=where), jnp.zeros((2, m)))
    assert_equal(gradients(indices, tuples, where), (jax.tree.map(jnp.zeros_like, tuples),))


@pytest.mark.parametrize("m", [1, 9, 40])
def test_the_only_allowed_point_gets_everything(m):
    """However far it is from the means; and no mean or sigma can change that."""
    tuples = random_tuples((2,), 3, 2)
    indices = jnp.stack([distinct_points(m, 2), distinct_points(m, 2, seed=1)]) + 10**6
    where = jnp.arange(m) == m - 1
    where = jnp.stack([where, where])
    out = redistribute(indices, tuples, where=where)
    assert_close(out, np.asarray(where) * np.asarray(tuples.values.sum(-1, keepdims=True)))
    (gradient,) = gradients(indices, tuples, where)
    assert_close((gradient.means, gradient.sigmas), (jnp.zeros((2, 3, 2)),) * 2)


@pytest.mark.parametrize("level", [0, 3])
@pytest.mark.parametrize("r", [1, 2, 3])
def test_a_sigma_of_zero_is_the_nearest_point(r, level):
    """However the compiler rounds: distances are huge here, and their rounding errors too."""
    tuples = random_tuples((), 1, r)
    tuples = hl.IndexTuples(tuples.means, jnp.zeros((1, r)), jnp.ones(1))
    points = distinct_points(30, r)
    distances = ((np.asarray(points) - np.asarray(tuples.means)) ** 2).sum(-1)
    options = {"xla_backend_optimization_level": level}
    out = jax.jit(hl.redistribute, compiler_options=options)(points, tuples)
    assert_close(out, np.eye(30)[distances.argmin()], 0, 0)


@pytest.mark.parametrize("m", [9, 40])
def test_a_mean_on_a_point_with_a_sigma_of_zero_stays_there(m):
    points = distinct_points(m, 2)
    tuples = hl.IndexTuples(points[3:5].astype(jnp.float32), jnp.zeros((2, 2)), jnp.arange(2.0) + 1)
    assert_close(redistribute(points, tuples), np.eye(m)[3] + 2 * np.eye(m)[4], 0, 0)


def test_an_endless_sigma_is_uniform():
    tuples = hl.IndexTuples(jnp.full((1, 2), 3.0), jnp.full((1, 2), 1e30), jnp.ones(1))
    assert_close(redistribute(distinct_points(8, 2), tuples), np.full(8, 1 / 8))


def test_points_beyond_float32_pairing_stay_apart():
    """Squares and products of these coordinates agree in float32; their integers do not."""
    indices = jnp.array([[50000, 50000], [49999, 50001], [50001, 49999], [50000, 50000]], jnp.int32)
    tuples = hl.IndexTuples(jnp.full((1, 2), 5e4), jnp.ones((1, 2)), jnp.ones(1))
    share = np.exp(-1)
    want = np.array([1, share, share, 0]) / (1 + 2 * share)
    assert_close(redistribute(indices, tuples), want)


def test_long_axes_are_ordinary():
    indices = jnp.array([[999_999], [999_998], [0], [500_000]], jnp.int32)
    tuples = hl.IndexTuples(jnp.full((1, 1), 999_998.75), jnp.full((1, 1), 0.5), jnp.ones(1))
    want = oracle.redistribute(indices, tuples.means, tuples.sigmas, tuples.values)
    assert_close(redistribute(indices, tuples), want)


@pytest.mark.parametrize(("m", "r"), [(9, 1), (9, 2), (40, 3)])
def test_the_order_of_points_and_of_tuples_does_not_matter(m, r):
    indices, tuples = distinct_points(m, r), random_tuples((), 4, r, high=49)
    out = redistribute(indices, tuples)
    assert_close(redistribute(indices[::-1], tuples), out[::-1])
    assert_close(redistribute(indices, jax.tree.map(lambda a: a[::-1], tuples)), out)


@pytest.mark.parametrize(("m", "r"), [(9, 1), (9, 2), (40, 3)])
def test_points_and_means_move_together(m, r):
    indices, tuples = distinct_points(m, r), random_tuples((), 4, r, high=49)
    moved = hl.IndexTuples(tuples.means + 1024.0, tuples.sigmas, tuples.values)
    assert_close(redistribute(indices + 1024, moved), redistribute(indices, tuples), 1e-3, 1e-4)


@given(case=chunks(dtypes=(jnp.float32,)), data=st.data())
def test_is_linear_in_values(case, data):
    indices, tuples, where = case
    other = data.draw(floats(-4, 4, tuples.values.shape))

    def spread(values):
        changed = hl.IndexTuples(tuples.means, tuples.sigmas, values)
        return redistribute(indices, changed, where=where)

    sum_of_both = 2 * spread(tuples.values) + spread(other)
    assert_close(spread(2 * tuples.values + other), sum_of_both, 1e-4, 1e-4)


@pytest.mark.parametrize("m", [9, 40])
def test_chunks_do_not_see_each_other(m):
    """A leading axis of chunks, vmap over chunks, and one chunk at a time are the same."""
    rng = np.random.default_rng(0)
    tuples = random_tuples((2, 3), 4, 2)
    indices = jnp.asarray(rng.integers(0, 9, (2, 3, m, 2)), jnp.int32)
    where = jnp.asarray(rng.random((2, 3, m)) < 0.8)
    weights = jnp.asarray(rng.normal(size=m), jnp.float32)

    def loss(indices, tuples, where):
        out = hl.redistribute(indices, tuples, where=where)
        return (out * jnp.broadcast_to(weights, out.shape)).sum(-1)

    def summed(loss):
        return jax.jit(jax.value_and_grad(lambda t: loss(indices, t, where).sum()))(tuples)

    assert_close(summed(jax.vmap(jax.vmap(loss))), summed(loss))
    each = jax.jit(jax.vmap(jax.vmap(jax.value_and_grad(loss, 1))))(indices, tuples, where)
    assert_close(each[1], summed(loss)[1])
    one = jax.jit(jax.value_and_grad(loss, 1))
    alone = one(indices[1, 2], jax.tree.map(lambda a: a[1, 2], tuples), where[1, 2])
    assert_close(alone, jax.tree.map(lambda a: a[1, 2], each))


@pytest.mark.parametrize("max_block", [blocks.MAX_BLOCK, 50])
@pytest.mark.parametrize(("batch", "m", "r"), [((), 7, 1), ((2,), 12, 2), ((1, 2), 34, 3)])
def test_gradients_match_finite_differences(batch, m, r, max_block, monkeypatch):
    """In means, sigmas and values, with copies and forbidden points, in one pass and in blocks."""
    monkeypatch.setattr(blocks, "MAX_BLOCK", max_block)
    rng = np.random.default_rng(r)
    with jax.enable_x64(True):
        tuples = random_tuples(batch, 3, r, high=4, dtype=jnp.float64)
        indices = jnp.asarray(rng.integers(0, 5, (*batch, m, r)), jnp.int32)
        where = jnp.asarray(rng.random((*batch, m)) < 0.7)
        assert not np.asarray(first(indices)).all() and not where.all()
        spread = jax.jit(lambda t: hl.redistribute(indices, t, where=where))
        assert_close(spread(tuples), expected(indices, tuples, where), 1e-10, 1e-12)
        check_grads(spread, (tuples,), 1, ["fwd", "rev"], 1e-6, 1e-6)


@pytest.mark.parametrize("max_block", [1, 50])
@pytest.mark.parametrize("k", [1, 5])
def test_blocks_change_nothing(k, max_block, monkeypatch):
    tuples = random_tuples((2,), k, 2)
    indices = jnp.stack([distinct_points(9, 2), distinct_points(9, 2, seed=1)]) // 4
    where = jnp.ones((2, 9), bool).at[:, 2].set(False)
    whole = redistribute(indices, tuples, where=where), gradients(indices, tuples, where)
    monkeypatch.setattr(blocks, "MAX_BLOCK", max_block)
    # A new function, since programs are kept by function and not by block size.
    again = functools.partial(gradients.__wrapped__)
    walked = (
        jax.jit(lambda *a: hl.redistribute(*a[:2], where=a[2]))(indices, tuples, where),
        jax.jit(again)(indices, tuples, where),
    )
    used = operations(again, indices, tuples, where)
    assert ("scan" in used) == (k > 1)
    assert_close(walked, whole)


def specs(batch, k, m, r):
    """Shapes alone, for programs that are read and never run."""
    array = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    tuples = hl.IndexTuples(array((*batch, k, r)), array((*batch, k, r)), array((*batch, k)))
    where = jax.ShapeDtypeStruct((*batch, m), jnp.bool_)
    return jax.ShapeDtypeStruct((*batch, m, r), jnp.int32), tuples, where


@pytest.mark.parametrize("batch", [(), (4,)])
def test_large_chunks_hold_no_array_of_tuples_times_points(batch):
    """Forward and backward of 4096 tuples over 49152 points."""
    k, m = 4096, 4096 * 12
    assert largest_array(gradients, *specs(batch, k, m, 2)) <= 2 * blocks.MAX_BLOCK < k * m / 10


@pytest.mark.parametrize(("fewer", "more"), [((3, 40), (20, 250)), ((30, 400), (300, 4000))])
def test_the_program_does_not_grow_with_tuples_or_points(fewer, more):
    # Copies among up to 256 points are found point by point, among more by hashing.
    small, large = specs((2,), *fewer, 2), specs((2,), *more, 2)
    assert len(program(gradients, *small)) == len(program(gradients, *large))


@pytest.mark.parametrize("batch", [(0,), (2, 0)])
@pytest.mark.parametrize("m", [5, 40])
def test_empty_batches_are_ordinary(batch, m):
    indices, tuples = jnp.zeros((*batch, m, 2), jnp.int32), random_tuples(batch, 3, 2)
    assert redistribute(indices, tuples).shape == (*batch, m)
    (gradient,) = gradients(indices, tuples, jnp.ones((*batch, m), bool))
    assert gradient.means.shape == (*batch, 3, 2)


def test_no_tuples_add_nothing():
    assert_close(redistribute(jnp.zeros((4, 1), jnp.int32), random_tuples((), 0, 1)), np.zeros(4))


@pytest.mark.parametrize("max_block", [blocks.MAX_BLOCK, 50])
def test_sharding_the_batch_changes_nothing(max_block, monkeypatch):
    """Under jit with sharded operands and under shard_map, forward and gradient, in blocks too."""
    monkeypatch.setattr(blocks, "MAX_BLOCK", max_block)
    mesh, spec = batch_mesh(), PartitionSpec("data")
    rng = np.random.default_rng(0)
    tuples = random_tuples((8,), 3, 2)
    indices = jnp.asarray(rng.integers(0, 6, (8, 40, 2)), jnp.int32)

    def value_and_grad(spread):
        loss = lambda t: (spread(indices, t) ** 2).sum()  # noqa: E731
        return jax.jit(jax.value_and_grad(loss))

    want = value_and_grad(hl.redistribute)(tuples)
    sharded = jax.device_put(tuples, NamedSharding(mesh, spec))
    assert_close(value_and_grad(hl.redistribute)(sharded), want)
    mapped = jax.shard_map(hl.redistribute, mesh=mesh, in_specs=spec, out_specs=spec)
    assert_close(value_and_grad(mapped)(sharded), want)


def test_tuples_may_be_replicated_over_shards():
    """Their gradient is then the sum over shards."""
    mesh, spec = batch_mesh(), PartitionSpec("data")
    tuples = random_tuples((1,), 3, 2)
    indices = jnp.asarray(np.random.default_rng(0).integers(0, 6, (8, 40, 2)), jnp.int32)
    each = lambda i, t: (hl.redistribute(i, t) ** 2).sum(-1)  # noqa: E731
    mapped = jax.shard_map(each, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec)
    broadcast = jax.vmap(lambda i, t: each(i[None], t)[0], (0, None))
    got = jax.jit(jax.grad(lambda t: mapped(indices, t).sum()))(tuples)
    assert_close(got, jax.jit(jax.grad(lambda t: broadcast(indices, t).sum()))(tuples))


POINTS, TUPLES = jnp.zeros((2, 5, 2), jnp.int32), random_tuples((2,), 3, 2)


def with_(**changed):
    fields = {"means": TUPLES.means, "sigmas": TUPLES.sigmas, "values": TUPLES.values}
    return hl.IndexTuples(**(fields | changed))


ERRORS = {
    "indices: got float32, want int32": lambda: hl.redistribute(POINTS.astype(jnp.float32), TUPLES),
    r"indices: got shape \(2,\), want \[\*B, m, r\]": lambda: hl.redistribute(
        POINTS[:, 0, 0], TUPLES
    ),
    r"indices: got shape \(5, 2\), want \[\*B, m, r\] with the \*B and r of tuples.means": (
        lambda: hl.redistribute(POINTS[0], TUPLES)
    ),
    r"indices: got shape \(2, 5, 1\)": lambda: hl.redistribute(POINTS[..., :1], TUPLES),
    "tuples.means: got int32": lambda: hl.redistribute(
        POINTS, with_(means=TUPLES.means.astype(jnp.int32))
    ),
    r"tuples.means: got shape \(2, 3, 0\), want r >= 1": lambda: hl.redistribute(
        POINTS, with_(means=TUPLES.means[..., :0])
    ),
    r"tuples.sigmas: got shape \(2, 3, 1\), want that of the means": lambda: hl.redistribute(
        POINTS, with_(sigmas=TUPLES.sigmas[..., :1])
    ),
    r"tuples.values: got shape \(2, 2\), want one for each tuple": lambda: hl.redistribute(
        POINTS, with_(values=TUPLES.values[:, :2])
    ),
    r"where: got bool\[5\], want bool\[2, 5\]": lambda: hl.redistribute(
        POINTS, TUPLES, where=jnp.ones(5, bool)
    ),
    r"where: got float32\[2, 5\], want bool": lambda: hl.redistribute(
        POINTS, TUPLES, where=jnp.ones((2, 5))
    ),
}


@pytest.mark.parametrize("message", ERRORS)
def test_wrong_input_names_the_argument(message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(ERRORS[message])
