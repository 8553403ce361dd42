"""Laws of finding keys next to a mean, of all or of the first few."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from laws import assert_close, assert_equal, assert_finite, largest_array

import hyperlayer_jax as hl
from hyperlayer_jax.content import InOrder
from hyperlayer_jax.nn import SparseSelfAttention
from hyperlayer_jax.nn.content import Content, Lines

find = jax.jit(hl.nearest_keys, static_argnums=2)


def nearest(coordinates, mean, count):
    """By sorting them: places in `coordinates` [n], of which there may be fewer than `count`."""
    order = np.argsort(coordinates, kind="stable")
    first = min((coordinates < mean).sum() - count // 2, len(order) - count)
    return order[max(first, 0) :][:count]


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("size", [1, 2, 7, 16])
def test_keys_are_those_of_sorting_anew_for_every_query(size, count):
    rng = np.random.default_rng(size)
    # Many are equal, and some means equal coordinates.
    coordinates = rng.integers(-2, 3, (3, size)).astype(np.float32)
    means = rng.integers(-6, 7, (3, 20)).astype(np.float32) / 2
    mask = rng.random((3, size)) < np.array([[1.0], [0.5], [0.0]])
    first = rng.integers(0, size + 1, 20).astype(np.int32)
    for limits, existing in ((first, None), (first, mask), (None, None), (None, mask)):
        found = np.asarray(find(coordinates, means, count, limits=limits, mask=existing))
        for b, i in np.ndindex(3, 20):
            exists = mask[b] if existing is not None else np.ones(size, bool)
            exists = exists & (np.arange(size) < (size if limits is None else limits[i]))
            there = np.flatnonzero(exists)
            wanted = there[nearest(coordinates[b, there], means[b, i], count)]
            assert_equal(found[b, i], np.pad(wanted, (0, count - len(wanted)), constant_values=-1))


def test_keys_beyond_a_limit_change_nothing():
    """Whatever they are, for every length of what is before."""
    size = 19
    coordinates, means = np.random.default_rng(0).normal(size=(2, size)).astype(np.float32)
    place = np.arange(size, dtype=np.int32)
    others = np.stack([-coordinates, np.full(size, np.nan), np.full(size, -np.inf)])
    changed = np.where(place < place[:, None, None], coordinates, others).astype(np.float32)
    found = find(changed, np.broadcast_to(means, changed.shape), 4, limits=place)
    want = find(coordinates, means, 4, limits=place)
    for length in range(size):
        for kind in range(len(others)):
            assert_equal(found[length, kind, : length + 1], want[: length + 1])


def test_a_weight_is_the_product_of_densities_and_a_key_has_one():
    rng = np.random.default_rng(0)
    coordinates, means = (rng.normal(size=(2, n, 3)).astype(np.float32) for n in (9, 5))
    sigmas = rng.random((2, 3)).astype(np.float32) + 0.1
    indices, weights = jax.jit(hl.content_points, static_argnames="num_nearest")(
        coordinates, means, sigmas, num_nearest=4
    )
    for b, i in np.ndindex(2, 5):
        by_line = [nearest(coordinates[b, :, a], means[b, i, a], 4) for a in range(3)]
        keys = np.unique(by_line)
        z = (coordinates[b, keys] - means[b, i]) / sigmas[b]
        total = np.zeros(9)
        np.add.at(total, np.asarray(indices[b, i, :, 0]), np.asarray(weights[b, i]))
        assert_close(total[keys], np.prod(1 / (1 + z**2), -1))
        assert np.isin(np.flatnonzero(total), keys).all()
        assert (weights[b, i] > 0).sum() == len(keys)


def test_keys_that_a_mask_hides_reach_nothing():
    """Nor do they come before keys that are infinite, or not a number."""
    coordinates, means, mask = jnp.ones((1, 3, 2)), jnp.zeros((1, 2, 2)), jnp.ones((1, 3), bool)
    mask = mask.at[:, 0].set(False)

    @jax.jit
    def run(coordinates):
        def total(*floats):
            return hl.content_points(*floats, num_nearest=4, mask=mask)[1].sum()

        return jax.value_and_grad(total, (0, 1, 2))(coordinates, means, jnp.ones((1, 2)))

    assert_equal(run(coordinates.at[:, 0].set(jnp.nan)), run(coordinates))
    keys, limits = jnp.asarray([0, 1, jnp.nan, jnp.inf]), jnp.full(1, 4, jnp.int32)
    mask = jnp.asarray([False, True, True, True])
    for options in ({}, {"limits": limits}):
        assert_equal(find(keys, jnp.zeros(1), 4, mask=mask, **options), [[1, 2, 3, -1]])


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e35])
def test_weights_and_gradients_are_finite(scale):
    """Where sigmas are 0, all coordinates alike or far apart, and no key exists."""
    coordinates = scale * jnp.arange(10.0).reshape(1, 5, 2)
    means, mask = -coordinates[:, :3], jnp.ones((1, 5), bool)

    @jax.jit
    def total(coordinates, means, sigmas, mask):
        limits = jnp.array([0, 2, 5], jnp.int32)
        points = hl.content_points(
            coordinates, means, sigmas, num_nearest=4, limits=limits, mask=mask
        )
        return points[1].sum()

    for sigma in (0.0, 1.0):
        for exists in (mask, ~mask):
            arguments = coordinates, means, jnp.full((1, 2), sigma), exists
            assert_finite(jax.value_and_grad(total, (0, 1, 2))(*arguments))
    assert total(coordinates, means, jnp.ones((1, 2)), ~mask) == 0


def test_nothing_grows_with_the_square_of_the_length():
    def largest(length):
        layer = SparseSelfAttention(8, 2, length, pattern="content", rngs=nnx.Rngs(0))
        loss = nnx.grad(lambda layer, x: layer(x).sum(), argnums=(0, 1))
        return largest_array(loss, layer, jnp.ones((1, length, 8)))

    assert largest(1024) <= 2.1 * largest(512)


def test_the_same_tokens_are_alike_however_they_are_cut():
    """A product with one token rounds differently from one with all."""
    table = np.random.default_rng(0).normal(size=(12, 64)).astype(np.float32)
    x = jnp.asarray(table[np.random.default_rng(1).integers(0, 12, (1, 64))])
    lines = Lines(64, 4, 4, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(lines)
    of = jax.jit(lambda x: nnx.merge(graphdef, state).means(x))
    alone = [of(x[:, i : i + 1]) for i in range(x.shape[1])]
    assert_equal(jnp.concatenate(alone, 2), of(x))


def test_keys_are_in_order_that_come_one_by_one():
    """As if those that there are were sorted anew, with some alike and some that are no numbers."""
    coordinates = np.round(np.random.default_rng(0).normal(size=(3, 9)), 1).astype(np.float32)
    coordinates[1, 3:6], coordinates[2, 4:7] = coordinates[1, 0], (np.nan, np.inf, -np.inf)
    means = jnp.asarray(coordinates[:, [0, 2, 3, 5, 6, 8]])

    @jax.jit
    def both(in_order, i):
        in_order = in_order.add(coordinates[:, i])
        limits = jnp.full(means.shape[1], i + 1, jnp.int32)
        wanted = hl.nearest_keys(coordinates, means, 4, limits=limits)
        return in_order, in_order.nearest(means, 4), wanted

    coordinates = jnp.asarray(coordinates)
    in_order = InOrder.of(coordinates, jnp.int32(0))
    for i in range(coordinates.shape[1]):
        in_order, keys, wanted = both(in_order, jnp.int32(i))
        assert in_order.number == i + 1
        assert_equal(keys, wanted)
        assert_equal(InOrder.of(coordinates, jnp.int32(i + 1)).nearest(means, 4), wanted)


def test_what_came_next_is_found_before_the_window_and_in_it():
    """At first: its weight is 1, beside that of the window."""
    table = np.random.default_rng(0).normal(size=(6, 16)).astype(np.float32)
    x = jnp.asarray(table[[[0, 1, 2, 3, 4, 5, 3, 0]]])
    content = Content(num_lines=2, num_nearest=2, window=4)
    layer = SparseSelfAttention(16, 1, 8, pattern=content, rngs=nnx.Rngs(0))
    weights = hl.todense(layer.pattern(x))[0]
    assert_close(weights[7, 1], 1.0, atol=1e-3)
    assert_close(weights[6, 4], 1.25, atol=1e-3)


def test_no_two_parameters_are_one_array():
    """They could not be donated."""
    params = jax.tree.leaves(nnx.state(Lines(8, 2, 2, rngs=nnx.Rngs(0)), nnx.Param))
    assert len({x.unsafe_buffer_pointer() for x in params}) == len(params)


def test_without_keys_there_are_no_points():
    keys, means = jnp.zeros((2, 0, 3)), jnp.zeros((2, 5, 3))
    indices, weights = hl.content_points(keys, means, jnp.ones((2, 3)), num_nearest=2)
    assert indices.shape == (2, 5, 6, 1) and not weights.any()


def test_wrong_inputs_are_named():
    x = jnp.zeros((2, 5, 3))
    with pytest.raises(ValueError, match=r"means: got shape \(2, 5, 2\), want \(2, 't', 3\)"):
        hl.content_points(x, x[..., :2], x[:, 0], num_nearest=2)
    with pytest.raises(ValueError, match=r"sigmas: got shape \(3,\), want \(2, 3\)"):
        hl.content_points(x, x, x[0, 0], num_nearest=2)
    with pytest.raises(ValueError, match=r"limits: got shape \(4,\), want \(5,\)"):
        hl.nearest_keys(x[..., 0], x[..., 0], 2, limits=jnp.zeros(4, jnp.int32))
    with pytest.raises(ValueError, match=r"coordinates: got 1073741825 keys, want at most 2\^30"):
        jax.eval_shape(
            lambda c: hl.nearest_keys(c, c[:2], 2), jax.ShapeDtypeStruct((2**30 + 1,), jnp.float32)
        )
    in_order = InOrder.of(jnp.zeros((2, 3, 4)), jnp.int32(4))
    with pytest.raises(ValueError, match=r"in_order: got shape \(2, 3, 4\), want \(2, 3, 5\)"):
        hl.content_points(x, x, x[:, 0], num_nearest=2, in_order=in_order)
    with pytest.raises(ValueError, match="in_order: got limits or a mask as well"):
        mask = jnp.ones((2, 5), bool)
        hl.content_points(x, x, x[:, 0], num_nearest=2, mask=mask, in_order=in_order)
    with pytest.raises(ValueError, match="num_nearest: got -1"):
        hl.content_points(x, x, x[:, 0], num_nearest=-1)
    with pytest.raises(ValueError, match=r"mask: got bool\[1, 5\], want bool\[2, 5\]"):
        hl.content_points(x, x, x[:, 0], num_nearest=2, mask=jnp.ones((1, 5), bool))
    with pytest.raises(ValueError, match="mask"):
        hl.nearest_keys(x[..., 0], x[..., 0], 2, mask=jnp.ones((2, 4), bool))
