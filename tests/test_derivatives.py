"""Every public function has every derivative: forward, reverse, each of the other, under `vmap`."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import random_tuples

import hyperlayer_jax as hl

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
SHAPE = (6, 7)
TUPLES = random_tuples((2,), 3, 2, high=5, dtype=jnp.float64)
POINTS = jnp.asarray(RNG.integers(0, 6, (2, 9, 2)), jnp.int32)
ROWS = hl.RowSparseTensor(
    jnp.asarray(RNG.integers(-1, 7, (2, 5, 3, 1)), jnp.int32), jnp.ones((2, 5, 3)), (5,), (6,)
)
ENTRIES = hl.SparseTensor(
    jnp.asarray(RNG.integers(-1, 6, (2, 9, 2)), jnp.int32), jnp.ones((2, 9)), (5,), (6,)
)
BLOCKS = hl.RowSparseTensor(
    jnp.asarray([[0], [1], [0]], jnp.int32)[..., None], jnp.ones((3, 1)), (3,), (2,)
)
# What has no derivative: integers, shapes, and types.
EXEMPT = {
    "InOrder", "IndexTuples", "RowSparseTensor", "SparseTensor", "SoftSort", "apply_template",
    "bucket_starts", "duplicate_mask", "nearest_keys", "sample_indices", "SoftPermutation", "TopK",
}  # fmt: skip


def drawn(*shape):
    return jnp.asarray(RNG.normal(size=shape))


def with_values(tensor, values):
    return type(tensor)(tensor.indices, values, tensor.out_shape, tensor.in_shape)


def attend(pattern, weights, query, key, value):
    return hl.sparse_attention(query, key, value, with_values(pattern, jnp.exp(weights)))


def attention_case(pattern, length):
    query, key = drawn(2, length, 2, 3), drawn(2, 6, 1, 3)
    floats = drawn(*pattern.values.shape), query, key, drawn(2, 6, 1, 2)
    return lambda *floats: attend(pattern, *floats), floats


CASES = {
    "transform_means": (lambda x: hl.transform_means(x, SHAPE), (drawn(2, 3, 2),)),
    "transform_sigmas": (lambda x: hl.transform_sigmas(x, SHAPE), (drawn(2, 3),)),
    "box_means": (lambda x: hl.box_means(x / 4, (3, 2), (9, 8)), (drawn(2, 4),)),
    "quad_means": (lambda x: hl.quad_means(x / 4, (3, 2), (9, 8)), (drawn(2, 2, 2, 2),)),
    "affine_means": (lambda x: hl.affine_means(x / 4, (3, 2), (9, 8)), (drawn(2, 2, 3),)),
    "bilinear": (lambda x: hl.bilinear(3.5 + x / 4, (9, 8))[1], (drawn(2, 5, 2),)),
    "redistribute": (lambda t: hl.redistribute(POINTS, t), (TUPLES,)),
    "redistribute of one tuple": (
        lambda t: hl.redistribute(POINTS, t),
        (jax.tree.map(lambda x: x[:, :1], TUPLES),),
    ),
    "discretize": (lambda t: hl.discretize(KEY, t, SHAPE, num_global=2)[1], (TUPLES,)),
    "round_tuples": (lambda t: hl.round_tuples(t, SHAPE)[1], (TUPLES,)),
    "contract rows": (
        lambda v, x: hl.contract(with_values(ROWS, v), x),
        (drawn(2, 5, 3), drawn(2, 6, 2)),
    ),
    "contract entries": (
        lambda v, x: hl.contract(with_values(ENTRIES, v), x),
        (drawn(2, 9), drawn(2, 6, 2)),
    ),
    "todense": (lambda v: hl.todense(with_values(ENTRIES, v)), (drawn(2, 9),)),
    "transpose": (lambda v: hl.transpose(with_values(ROWS, v)).values, (drawn(2, 5, 3),)),
    "sparse_softmax rows": (
        lambda v: hl.sparse_softmax(with_values(ROWS, v)).values,
        (drawn(2, 5, 3),),
    ),
    "sparse_softmax entries": (
        lambda v: hl.sparse_softmax(with_values(ENTRIES, v)).values,
        (drawn(2, 9),),
    ),
    "sparse_attention rows": attention_case(ROWS, 5),
    "sparse_attention entries": attention_case(ENTRIES, 5),
    "sparse_attention blocks": attention_case(BLOCKS, 9),
    "content_points": (
        lambda *floats: hl.content_points(*floats, num_nearest=2)[1],
        (drawn(2, 5, 2), drawn(2, 3, 2), jnp.ones((2, 2))),
    ),
    "soft_quicksort": (
        lambda x, s: hl.soft_quicksort(KEY, x, s, num_samples=1, certainty=2.0).items[-1],
        (drawn(2, 3, 2), drawn(2, 3)),
    ),
    "soft_sort": (functools.partial(hl.soft_sort, num_samples=1), (drawn(2, 3),)),
    "soft_rank": (functools.partial(hl.soft_rank, num_samples=1), (drawn(2, 3),)),
    "soft_argsort": (
        lambda s, x: hl.soft_argsort(s, num_samples=1).apply(x),
        (drawn(2, 3), drawn(2, 3)),
    ),
    "soft_top_k": (lambda s: hl.soft_top_k(s, 2, num_samples=1).values, (drawn(2, 3),)),
    "soft_quantile": (lambda s: hl.soft_quantile(s, 0.4, num_samples=1), (drawn(2, 3),)),
}


def test_every_public_function_is_here():
    tested = {name.split()[0] for name in CASES}
    assert tested | EXEMPT == set(hl.__all__)
    assert all(inspect.isfunction(getattr(hl, name)) for name in tested)


@pytest.mark.parametrize("name", CASES)
def test_all_derivatives_agree(name):
    """With finite differences, and with each other, along one direction."""
    with jax.enable_x64(True):
        function, floats = CASES[name]
        floats = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), floats)
        step = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size * 1.0)).reshape(x.shape), floats)

        def loss(floats):
            out = function(*floats)
            return (out**2 * jnp.cos(jnp.arange(out.size * 1.0)).reshape(out.shape)).sum()

        def slope(floats):
            return jax.jvp(loss, (floats,), (step,))[1]

        def along(gradient):
            dots = jax.tree.map(lambda g, s: (g * s).sum(), gradient, step)
            return sum(jax.tree.leaves(dots))

        @jax.jit
        def derivatives(floats):
            gradient = jax.grad(loss)
            twice = jax.tree.map(lambda x: jnp.broadcast_to(x, (2, 1, *x.shape)), floats)
            first = {
                "forward": slope(floats),
                "reverse": along(gradient(floats)),
                "mapped": jax.vmap(jax.vmap(slope))(twice)[1, 0],
            }
            second = {
                "forward of forward": jax.jvp(slope, (floats,), (step,))[1],
                "forward of reverse": along(jax.jvp(gradient, (floats,), (step,))[1]),
                "reverse of forward": along(jax.grad(slope)(floats)),
                "reverse of reverse": along(jax.vjp(gradient, floats)[1](step)[0]),
            }
            return first, second

        first, second = derivatives(floats)
        epsilon, value = 1e-4, jax.jit(loss)
        moved = [
            value(jax.tree.map(lambda x, s: x + n * epsilon * s, floats, step))  # noqa: B023
            for n in (-1, 0, 1)
        ]
        slopes = (moved[2] - moved[0]) / (2 * epsilon)
        bends = (moved[2] - 2 * moved[1] + moved[0]) / epsilon**2
        for kind, got in first.items():
            np.testing.assert_allclose(got, slopes, 1e-5, 1e-6, err_msg=kind)
        for kind, got in second.items():
            np.testing.assert_allclose(got, second["forward of forward"], 1e-9, 1e-9, err_msg=kind)
            np.testing.assert_allclose(got, bends, 1e-3, 1e-4, err_msg=kind)
