"""Laws of the way from index tuples to a sparse tensor: sampled, rounded and templated."""

import functools

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
    assert_close,
    assert_equal,
    assert_finite,
    batch_mesh,
    index_tuples,
    largest_array,
    operations,
    program,
    random_tuples,
)

import hyperlayer_jax as hl

KEY = jax.random.key(0)
OPTIONS = {"num_global": 2, "num_local": 2, "region": 3}
CASES = (((), 1, (12,)), ((2,), 3, (10, 10)), ((2, 1), 2, (10, 11, 10)))


def is_even(indices):
    return indices.sum(-1) % 2 == 0


discretize = jax.jit(
    functools.partial(hl.discretize, **OPTIONS), static_argnames=("shape", "where")
)
rounded = jax.jit(hl.round_tuples, static_argnames=("shape", "where"))


@st.composite
def tuples_in(draw, dtypes=FLOATS):
    batch, k, shape = draw(st.sampled_from(CASES))
    return draw(index_tuples(batch, k, len(shape), dtype=draw(st.sampled_from(dtypes)))), shape


@pytest.mark.parametrize("where", [None, is_even])
@given(case=tuples_in(dtypes=(jnp.float32,)), seed=st.integers(0, 2**32 - 1))
def test_discretizing_conserves_what_has_an_allowed_point(where, case, seed):
    tuples, shape = case
    indices, values = discretize(jax.random.key(seed), tuples, shape, where=where)
    allowed = np.ones(values.shape, bool) if where is None else np.asarray(where(indices))
    want = np.asarray(tuples.values, np.float64).sum(-1) * allowed.any(-1)
    np.testing.assert_allclose(np.asarray(values, np.float64).sum(-1), want, 1e-5, 1e-5)
    assert (np.asarray(values)[~allowed] == 0).all()


@pytest.mark.parametrize("where", [None, is_even])
def test_discretizing_is_redistribution_over_a_sample(where):
    tuples, shape = random_tuples((2,), 3, 2), (10, 10)
    indices, values = discretize(KEY, tuples, shape, where=where)
    sample = jax.jit(functools.partial(hl.sample_indices, shape=shape, **OPTIONS))
    assert_equal(indices, sample(KEY, tuples.means))
    for b in range(2):
        allowed = None if where is None else np.asarray(where(indices[b]))
        means, sigmas, weights = tuples.means[b], tuples.sigmas[b], tuples.values[b]
        want = oracle.redistribute(indices[b], means, sigmas, weights, allowed)
        assert_close(values[b], want)


@pytest.mark.parametrize("where", [None, is_even])
@given(case=tuples_in())
def test_rounding_takes_the_nearest_point(where, case):
    tuples, shape = case
    indices, values = rounded(tuples, shape, where=where)
    assert indices.dtype == jnp.int32 and values.dtype == tuples.values.dtype
    assert_equal(indices, np.round(np.asarray(tuples.means, np.float64)).astype(np.int32))
    allowed = np.ones(values.shape, bool) if where is None else np.asarray(where(indices))
    assert_equal(values, np.where(allowed, np.asarray(tuples.values), 0))


@pytest.mark.parametrize("mean", [-3e38, -7.0, -0.4, 2.5, 8.6, 9.0, 3e38])
@pytest.mark.parametrize("dtype", FLOATS)
def test_rounded_means_stay_in_bounds(mean, dtype):
    tuples = hl.IndexTuples(jnp.full((1, 2), mean, dtype), jnp.ones((1, 2), dtype), jnp.ones(1))
    indices, _ = rounded(tuples, (9, 1))
    assert_equal(indices, np.array([[np.clip(np.round(mean), 0, 8), 0]], np.int32))


@pytest.mark.parametrize(("batch", "k", "shape"), CASES)
def test_rounding_is_the_limit_of_small_sigmas(batch, k, shape):
    """With the paper's samples and sigmas of 0, training and evaluation see the same tensor."""
    tuples = random_tuples(batch, k, len(shape))
    tuples = hl.IndexTuples(tuples.means, jnp.zeros_like(tuples.sigmas), tuples.values)

    @jax.jit
    def dense(points):
        return hl.todense(hl.SparseTensor(*points, shape[:1], shape[1:] or (1,)))

    if len(shape) == 1:
        add = lambda p: (jnp.concatenate([p[0], jnp.zeros_like(p[0])], -1), p[1])  # noqa: E731
    else:
        add = lambda p: p  # noqa: E731
    points = discretize(KEY, tuples, shape), rounded(tuples, shape)
    assert_close(dense(add(points[0])), dense(add(points[1])))


@given(case=tuples_in(), seed=st.integers(0, 2**32 - 1))
def test_gradients_reach_all_that_is_learned(case, seed):
    tuples, shape = case
    got = discretized_gradient(jax.random.key(seed), tuples, shape)
    assert_finite(got)
    assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, tuples)


@functools.partial(jax.jit, static_argnames="shape")
def discretized_gradient(key, tuples, shape):
    def loss(tuples):
        indices, values = hl.discretize(key, tuples, shape, **OPTIONS)
        return (jnp.sin(indices.sum(-1).astype(values.dtype)) * values).sum()

    return jax.grad(loss)(tuples)


def test_no_gradient_is_zero_for_ordinary_tuples():
    gradient = discretized_gradient(KEY, random_tuples((2,), 3, 2, high=8.5), (10, 10))
    assert all((np.asarray(leaf) != 0).all() for leaf in jax.tree.leaves(gradient))


def test_the_same_key_the_same_tensor_whatever_is_sharded():
    tuples = random_tuples((16, 4), 3, 2)
    want = discretize(KEY, tuples, (10, 10))
    for size, axes in (8, ("data",)), (4, (None, "data")):
        mesh = batch_mesh(size)
        sharded = jax.device_put(tuples, NamedSharding(mesh, PartitionSpec(*axes)))
        indices, values = discretize(KEY, sharded, (10, 10))
        assert_equal(indices, want[0])
        assert_close(values, want[1])


def test_vmap_over_keys_is_one_draw_for_each():
    keys, tuples = jax.random.split(KEY, 3), random_tuples((), 3, 2)
    draw = lambda key: hl.discretize(key, tuples, (10, 10), **OPTIONS, where=is_even)  # noqa: E731
    got = jax.jit(jax.vmap(draw))(keys)
    want = [discretize(key, tuples, (10, 10), where=is_even) for key in keys]
    assert_close(got, jax.tree.map(lambda *a: jnp.stack(a), *want))


def layer(key, tuples, x):
    """A whole layer and its gradients: 10^6 outputs and 10^6 inputs."""

    def product(tuples, x):
        indices, values = hl.discretize(
            key, tuples, (10**6, 10**6), num_global=4, num_local=4, region=8
        )
        return hl.contract(hl.SparseTensor(indices, values, (10**6,), (10**6,)), x)

    y, vjp = jax.vjp(product, tuples, x)
    return y, vjp(y)


def layer_arguments(k):
    array = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    return KEY, hl.IndexTuples(array((k, 2)), array((k, 2)), array((k,))), array((10**6,))


def test_a_layer_never_forms_its_weights():
    k, m = 8192, 8192 * 12
    assert largest_array(layer, *layer_arguments(k)) <= 2**25 < k * m / 10 < 10**12 / 10


@pytest.mark.parametrize(("fewer", "more"), [(10, 20), (160, 640)])
def test_the_program_of_a_layer_does_not_grow_with_tuples(fewer, more):
    # Copies among up to 256 points are found point by point, among more by hashing; products of
    # more than 1024 entries go in blocks.
    few, many = (program(layer, *layer_arguments(k)) for k in (fewer, more))
    assert len(few) == len(many)


def test_a_layer_of_fixed_rows_never_scatters_in_its_product():
    def product(key, tuples, x):
        points = hl.discretize(key, tuples, (9,), num_global=1, num_local=1, region=2)
        return hl.contract(hl.RowSparseTensor(*points, (5,), (9,)), x)

    used = operations(product, KEY, random_tuples((5,), 3, 1), jnp.ones((9, 2)))
    assert not {name for name in used if "scatter" in name}


@pytest.mark.parametrize("columns", [(0,), (2,), (1, 2), (2, 0), (2, 1, 0)])
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_a_template_keeps_its_fixed_columns(batch, columns):
    rng = np.random.default_rng(0)
    template = rng.integers(0, 9, (*batch, 3)).astype(np.int32)
    indices = rng.integers(10, 19, (*batch, 4, len(columns))).astype(np.int32)
    stitch = jax.jit(functools.partial(hl.apply_template, columns=columns))
    rows = np.asarray(stitch(jnp.asarray(template), jnp.asarray(indices)))
    assert rows.shape == (*batch, 4, 3) and rows.dtype == np.int32
    for column in range(3):
        if column in columns:
            assert_equal(rows[..., column], indices[..., columns.index(column)])
        else:
            assert_equal(rows[..., column], np.repeat(template[..., None, column], 4, -1))


TUPLES, TEMPLATE = random_tuples((2,), 3, 2), jnp.zeros((2, 3), jnp.int32)
POINTS = jnp.zeros((2, 4, 2), jnp.int32)
bad = hl.IndexTuples(TUPLES.means, TUPLES.sigmas, TUPLES.values[..., :1])
stitch = hl.apply_template
ERRORS = {
    r"tuples.values: got shape \(2, 1\)": lambda: hl.discretize(KEY, bad, (9, 9)),
    r"shape: got \(9,\), want 2 axes": lambda: hl.discretize(KEY, TUPLES, (9,)),
    "region: got None": lambda: hl.discretize(KEY, TUPLES, (9, 9), num_local=1),
    "num_global: got -2": lambda: hl.discretize(KEY, TUPLES, (9, 9), num_global=-2),
    r"where: got bool\[2, 12, 2\], want bool\[2, 12\]": lambda: hl.discretize(
        KEY, TUPLES, (9, 9), where=lambda indices: indices > 0
    ),
    r"tuples.values: got shape \(2, 1\), ": lambda: hl.round_tuples(bad, (9, 9)),
    r"shape: got \(9,\), want 2 axes, ": lambda: hl.round_tuples(TUPLES, (9,)),
    r"where: got int32\[2, 3\], want bool\[2, 3\]": lambda: hl.round_tuples(
        TUPLES, (9, 9), where=lambda indices: indices[..., 0]
    ),
    "template: got float32, want int32": lambda: stitch(
        TEMPLATE.astype(jnp.float32), POINTS, columns=(0, 1)
    ),
    r"template: got shape \(3,\), want \[\*B, R\]": lambda: stitch(
        TEMPLATE[0], POINTS, columns=(0, 1)
    ),
    "indices: got float32, want int32": lambda: stitch(
        TEMPLATE, POINTS.astype(jnp.float32), columns=(0, 1)
    ),
    r"template: got shape \(2, 3\), want": lambda: stitch(TEMPLATE, POINTS[0], columns=(0, 1)),
    r"columns: got \(0,\), want 2 different": lambda: stitch(TEMPLATE, POINTS, columns=(0,)),
    r"columns: got \(1, 1\), want different": lambda: stitch(TEMPLATE, POINTS, columns=(1, 1)),
    r"columns: got \(0, 3\), .* a template of 3": lambda: stitch(TEMPLATE, POINTS, columns=(0, 3)),
    r"columns: got \(0, 1.5\), want": lambda: stitch(TEMPLATE, POINTS, columns=(0, 1.5)),
    r"columns: got 0, want": lambda: stitch(TEMPLATE, POINTS, columns=0),
}


@pytest.mark.parametrize("message", ERRORS)
def test_wrong_input_names_the_argument(message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(ERRORS[message])
