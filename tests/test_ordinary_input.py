"""Input that JAX and Flax take: empty, of symbolic sizes, NumPy's, masked, out of range."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export
from laws import assert_close, call

import hyperlayer_jax as hl
from hyperlayer_jax import nn
from hyperlayer_jax.nn import patterns

PATTERNS = {
    "learned": {"num_tuples": 2}, "static": {"num_tuples": 2}, "learned2d": {"num_tuples": 2},
    "strided": {"num_tuples": 2, "stride": 4}, "window": {"window": 4},
    "block": {"num_tuples": 2, "block": 4}, "dense": {},
    "content": {"num_lines": 2, "num_nearest": 2, "window": 3},
}  # fmt: skip
KEY = jax.random.key(0)
X = jax.random.normal(KEY, (2, 14, 8))


def layer(pattern, **options):
    options["pattern"] = dataclasses.replace(patterns.PATTERNS[pattern], **PATTERNS[pattern])
    return nn.SparseSelfAttention(8, 2, 16, **options, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_attention_of_any_batch(pattern):
    """Empty, NumPy's float64, and exported for a batch whose size is a symbol."""
    attention = nnx.view(layer(pattern), deterministic=True)
    assert call(attention, jnp.ones((0, 14, 8))).shape == (0, 14, 8)
    graph, state = nnx.split(attention)

    @jax.jit
    def run(x):
        return nnx.merge(graph, state)(x)

    (batch,) = export.symbolic_shape("batch")
    exported = export.export(run)(jax.ShapeDtypeStruct((batch, 14, 8), jnp.float32))
    want = run(X)
    assert_close(exported.call(X), want)
    assert call(attention, np.asarray(X, np.float64)).dtype == jnp.float32


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_what_a_mask_hides_reaches_nothing(pattern, causal):
    """Not even as NaN, forward or backward: results are the same bits."""
    graph, state = nnx.split(layer(pattern, causal=causal))
    mask = jnp.arange(14)[None] < jnp.array([9, 14])[:, None]

    @jax.jit
    def learn(state, x):
        loss = lambda s: (nnx.merge(graph, s, copy=True)(x, mask=mask) ** 2).sum()  # noqa: E731
        return jax.value_and_grad(loss, allow_int=True)(state)

    hidden = jnp.where(mask[..., None], X, jnp.nan)
    pairs = zip(*map(jax.tree.leaves, (learn(state, X), learn(state, hidden))), strict=True)
    for got, want in pairs:
        if want.dtype != jax.dtypes.float0:
            np.testing.assert_array_equal(got, want)


def test_entries_without_weight_and_hidden_ones_reach_nothing():
    """In a pattern of entries anywhere."""
    query = key = value = jax.random.normal(KEY, (1, 3, 1, 2))
    indices = jnp.array([[[0, 0], [1, 1], [1, 2], [2, 0], [2, 2]]], jnp.int32)
    weights, mask = jnp.array([[1.0, 1, 0, 1, 1]]), jnp.array([[True, True, False]])
    pattern = hl.SparseTensor(indices, weights, (3,), (3,))

    def loss(query, key, value):
        return (hl.sparse_attention(query, key, value, pattern, mask=mask) ** 2).sum()

    run = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
    spoil = lambda x: x.at[:, 2].set(jnp.nan)  # noqa: E731
    got, want = run(query, spoil(key), spoil(value)), run(query, key, value)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_a_cache_does_not_grow_past_the_longest_sequence():
    """An error where lengths are known, NaN where they are traced."""
    attention = nnx.view(layer("learned"), deterministic=True)
    _, cache = attention.extend(X, attention.init_cache(2))
    with pytest.raises(ValueError, match="x: got 14 tokens after 14, want 16 at most"):
        attention.extend(X, cache)
    graph, state = nnx.split(attention)
    extend = jax.jit(lambda x, cache: nnx.merge(graph, state).extend(x, cache)[0])
    assert np.isnan(extend(X, cache)).all() and np.isfinite(extend(X[:, :2], cache)).all()


def test_tokens_outside_the_vocabulary():
    model = nn.TransformerLM(11, 8, 2, 16, layers="w", rngs=nnx.Rngs(0))
    for token in (-1, 11):
        tokens = jnp.array([[1, token]])
        with pytest.raises(ValueError, match=r"tokens: got .*, want 0 to 10"):
            model(tokens)
        assert np.isnan(call(model, tokens)).any()


def test_numpy_and_lists():
    """float64 of NumPy is what JAX makes of it; sizes may be lists, under `jit` too."""
    means = np.random.default_rng(0).uniform(0, 9, (3, 2, 1))
    tuples = hl.IndexTuples(means, np.ones((3, 2, 1), np.float32), np.ones((3, 2)))
    indices, values = hl.discretize(KEY, tuples, [10], num_global=2)
    assert indices.dtype == jnp.int32 and values.dtype == jnp.float32
    assert hl.round_tuples(tuples, [10])[1].dtype == jnp.float32
    tensor = hl.RowSparseTensor(np.zeros((3, 2, 1), np.int32), np.ones((3, 2)), [3], [10])
    assert_close(jax.jit(hl.contract)(tensor, np.ones(10)), np.full(3, 2.0))
    assert hl.todense(tensor).shape == (3, 10)
    with jax.enable_x64(True):
        mixed = hl.IndexTuples(
            jnp.asarray(means), jnp.ones((3, 2, 1)), jnp.ones((3, 2), jnp.float32)
        )
        assert hl.redistribute(indices, mixed).dtype == jnp.float32


def test_an_index_outside_any_axis_is_absent_everywhere():
    """Though by its number it might lie in another row, or count from the end."""
    nan = float("nan")
    indices = jnp.array([[-1, 0, 0], [0, 1, 1], [2, 0, 0], [1, 0, 3], [1, -1, 2], [1, 1, 2]])
    values = jnp.array([nan, 1, nan, nan, nan, 2], jnp.float32)
    tensor = hl.SparseTensor(indices.astype(jnp.int32), values, (2,), (2, 3))
    dense = np.zeros((2, 2, 3))
    dense[0, 1, 1], dense[1, 1, 2] = 1, 2
    assert_close(hl.todense(tensor), dense)
    assert_close(hl.todense(hl.transpose(tensor)), np.moveaxis(dense, 0, -1))
    assert_close(hl.contract(tensor, jnp.ones((2, 3))), dense.sum((1, 2)))
    assert_close(hl.sparse_softmax(tensor).values, [0, 1, 0, 0, 0, 1])
    rows = hl.RowSparseTensor(tensor.indices[None, :, 1:], values[None], (1,), (2, 3))
    shown = np.asarray(hl.sparse_softmax(rows).values)
    np.testing.assert_array_equal(shown[0, [3, 4]], 0)


def test_coordinates_that_float32_cannot_count_are_refused():
    tuples = hl.IndexTuples(jnp.zeros((1, 1)), jnp.ones((1, 1)), jnp.ones(1))
    hl.discretize(KEY, tuples, (2**24 + 1,))
    with pytest.raises(
        ValueError, match=r"shape: got \(16777218,\), want axes of at most 2\^24 \+ 1"
    ):
        hl.discretize(KEY, tuples, (2**24 + 2,))


@pytest.mark.parametrize("width", [16, 32, 48, 64, 128])
def test_attention_in_bfloat16_errs_no_more_than_that_of_jax(width):
    size, block = 64, 16
    wide = [jax.random.normal(key, (2, size, 2, width)) for key in jax.random.split(KEY, 3)]
    short = [x.astype(jnp.bfloat16) for x in wide]
    want = jax.nn.dot_product_attention(*(x.astype(jnp.float32) for x in short), is_causal=True)

    def error(out):
        return float(jnp.sqrt(((out.astype(jnp.float32) - want) ** 2).mean()))

    def everything(size):
        columns = jnp.broadcast_to(
            jnp.arange(size, dtype=jnp.int32)[None, :, None], (size, size, 1)
        )
        return hl.RowSparseTensor(columns, jnp.ones((size, size)), (size,), (size,))

    with jax.numpy_dtype_promotion("standard"):
        most = error(jax.nn.dot_product_attention(*short, is_causal=True))
    for pattern in (everything(size), everything(size // block)):
        assert error(hl.sparse_attention(*short, pattern, causal=True)) <= most
