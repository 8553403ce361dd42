"""Laws of attention over a sparse pattern, in its three forms."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from laws import FLOATS, assert_close, assert_equal

import hyperlayer_jax as hl

B, T, S, N, K, H, D = 2, 6, 8, 4, 2, 3, 5
BLOCK = 2
FORMS = ("rows", "entries", "blocks")
attend = jax.jit(hl.sparse_attention, static_argnames="causal")
# Leading axes of a pattern: shared by all, by all heads, by none.
LEADING = {"all": (), "heads": (B,), "own": (B, N)}


def operands(dtype=jnp.float32, length=T, key_length=S):
    rng = np.random.default_rng(0)
    shapes = (B, length, N, H), (B, key_length, K, H), (B, key_length, K, D)
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


def draw_pattern(form, leading, *, outside=False, shape=(T, S)):
    """A pattern with repeated entries, weights of 0 and, where asked, entries outside."""
    rng = np.random.default_rng(1)
    low, high = (-2, 3) if outside else (0, 0)
    rows, columns = (s // BLOCK if form == "blocks" else s for s in shape)
    kind = hl.SparseTensor if form == "entries" else hl.RowSparseTensor
    size = (*leading, 20) if form == "entries" else (*leading, rows, 5)
    axes = [rows, columns] if form == "entries" else [columns]
    indices = np.stack([rng.integers(low, s + high, size) for s in axes], -1)
    weights = rng.uniform(0.1, 2, size) * (rng.random(size) < 0.8)
    return kind(
        jnp.asarray(indices, jnp.int32), jnp.asarray(weights, jnp.float32), (rows,), (columns,)
    )


def entries_of(pattern, b, n, block, causal):
    """Every (row, column, weight) of one example and head, blocks written out."""
    leading = pattern.values.shape[: -1 if isinstance(pattern, hl.SparseTensor) else -2]
    at = (b, n)[: len(leading)]
    indices, weights = np.asarray(pattern.indices)[at], np.asarray(pattern.values)[at]
    if isinstance(pattern, hl.SparseTensor):
        coarse = [(i, j, w) for (i, j), w in zip(indices, weights, strict=True)]
    else:
        coarse = [
            (i, j, w)
            for i, row in enumerate(zip(indices[..., 0], weights, strict=True))
            for j, w in zip(*row, strict=True)
        ]
    fine = [
        (i * block + di, j * block + dj, w)
        for i, j, w in coarse
        for di in range(block)
        for dj in range(block)
    ]
    return [(i, j, w) for i, j, w in fine if not causal or j <= i]


@pytest.mark.parametrize(("masked", "causal"), [(False, False), (True, True)])
@pytest.mark.parametrize("leading", LEADING)
@pytest.mark.parametrize("form", FORMS)
def test_agrees_with_the_oracle(form, leading, masked, causal):
    query, key, value = operands()
    pattern = draw_pattern(form, LEADING[leading], outside=True)
    mask = None
    if masked:
        mask = jnp.asarray(np.random.default_rng(2).random((B, S)) < 0.5).at[0].set(False)
    out = attend(query, key, value, pattern, causal=causal, mask=mask)
    block = BLOCK if form == "blocks" else 1
    for b in range(B):
        for n in range(N):
            at = np.s_[b, :, n // (N // K)]
            seen = None if mask is None else np.asarray(mask)[b]
            entries = entries_of(pattern, b, n, block, causal)
            want = oracle.attention(query[b, :, n], key[at], value[at], entries, seen)
            assert_close(out[b, :, n], want)


@pytest.mark.parametrize("form", FORMS)
def test_over_all_positions_with_equal_weights_it_is_dense_attention(form):
    query, key, value = operands(key_length=T)
    value = value[..., :H]
    size = T // BLOCK if form == "blocks" else T
    columns = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), (size, size))
    pattern = hl.RowSparseTensor(columns[..., None], jnp.full((size, size), 3.0), (size,), (size,))
    if form == "entries":
        indices = jnp.stack([columns.T, columns], -1).reshape(-1, 2)
        pattern = hl.SparseTensor(indices, pattern.values.reshape(-1), (size,), (size,))
    out = attend(query, key, value, pattern, causal=True)
    assert_close(out, jax.nn.dot_product_attention(query, key, value, is_causal=True))


@pytest.mark.parametrize("causal", [False, True])
def test_blocks_are_their_entries_written_out(causal):
    query, key, value = operands(length=S)
    pattern = draw_pattern("blocks", LEADING["own"], shape=(S, S))
    within = jnp.arange(BLOCK, dtype=jnp.int32)
    columns = (pattern.indices * BLOCK + within[None, None, None, None]).reshape(
        B, N, S // BLOCK, -1
    )
    columns, weights = (
        jnp.repeat(x, BLOCK, axis=2) for x in (columns, jnp.repeat(pattern.values, BLOCK, axis=3))
    )
    rows = hl.RowSparseTensor(columns[..., None], weights, (S,), (S,))
    got, want = (attend(query, key, value, p, causal=causal) for p in (pattern, rows))
    assert_close(got, want)


def test_split_weights_add_up_and_a_weight_of_zero_is_absent():
    query, key, value = operands()
    pattern = draw_pattern("rows", ())
    halves = hl.RowSparseTensor(
        jnp.concatenate([pattern.indices, pattern.indices, pattern.indices * 0], 1),
        jnp.concatenate([0.25 * pattern.values, 0.75 * pattern.values, 0 * pattern.values], 1),
        pattern.out_shape,
        pattern.in_shape,
    )
    assert_close(attend(query, key, value, halves), attend(query, key, value, pattern))


@pytest.mark.parametrize("form", FORMS)
def test_gradients_agree_with_finite_differences_in_float64(form):
    with jax.enable_x64(True):
        query, key, value = operands(jnp.float64)
        pattern = draw_pattern(form, LEADING["heads"])
        mask = jnp.ones((B, S), bool).at[1, 2].set(False)
        rng = np.random.default_rng(3)
        kind = type(pattern)

        def total(query, key, value, weights):
            tensor = kind(pattern.indices, weights, pattern.out_shape, pattern.in_shape)
            out = hl.sparse_attention(query, key, value, tensor, causal=True, mask=mask)
            return (out * jnp.asarray(np.cos(np.arange(out.size)).reshape(out.shape))).sum()

        point = (query, key, value, pattern.values.astype(jnp.float64))
        gradients = jax.jit(jax.grad(total, (0, 1, 2, 3)))(*point)
        total = jax.jit(total)
        # Where a weight is 0 its entry is absent: the function jumps there, and has no gradient.
        along = [jnp.asarray(rng.normal(size=x.shape) * (np.asarray(x) != 0)) for x in point]
        ahead, behind = (
            total(*(x + step * d for x, d in zip(point, along, strict=True)))
            for step in (1e-6, -1e-6)
        )
        slope = sum((g * d).sum() for g, d in zip(gradients, along, strict=True))
        assert_close(slope, (ahead - behind) / 2e-6, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_not_finite_reaches_those_that_see_it_alone(form):
    """Forward and backward, in a query's own block too. What the mask hides reaches none."""
    query, key, value = operands(length=S)
    pattern = draw_pattern(form, LEADING["own"], shape=(S, S))
    block = BLOCK if form == "blocks" else 1
    at, head = 4, 1
    sees = np.zeros((N, S), bool)
    for n in range(N // K, N):
        entries = entries_of(pattern, 0, n, block, causal=True)
        sees[n, [i for i, j, w in entries if j == at and w > 0]] = True

    @jax.jit
    def run(query, key, value):
        out, vjp = jax.vjp(
            lambda *x: hl.sparse_attention(*x, pattern, causal=True), query, key, value
        )
        return out, vjp(jnp.where(jnp.asarray(sees.T)[None, ..., None], 0, out))

    out, _ = run(query, key, value)
    for changed in (
        (query, key.at[0, at, head, 0].set(jnp.nan), value),
        (query, key, value.at[0, at, head, 0].set(jnp.inf)),
    ):
        got, gradients = run(*changed)
        assert_close(
            jnp.where(sees.T[..., None], 0, got[0]), jnp.where(sees.T[..., None], 0, out[0])
        )
        assert not np.isfinite(got[0].transpose(1, 0, 2)[sees]).all(-1).any()
        assert_close(got[1], out[1])
        assert np.isfinite(gradients[0][0].transpose(1, 0, 2)[~sees]).all()

    mask = jnp.ones((B, S), bool).at[0, at].set(False)
    hidden = attend(*changed, pattern, causal=True, mask=mask)
    assert_equal(hidden, attend(query, key, value, pattern, causal=True, mask=mask))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_finite_with_everything_masked_and_with_tiny_weights(form, dtype):
    query, key, value = operands(dtype)
    pattern = draw_pattern(form, LEADING["all"])
    scale = jnp.asarray(10.0 ** np.linspace(-45, 0, pattern.values.size), jnp.float32)

    def total(query, key, value, weights, mask):
        tensor = type(pattern)(pattern.indices, weights, pattern.out_shape, pattern.in_shape)
        return hl.sparse_attention(query, key, value, tensor, mask=mask).sum().astype(jnp.float32)

    gradient = jax.jit(jax.value_and_grad(total, (0, 1, 2, 3)))
    for weights in (pattern.values, pattern.values * scale.reshape(pattern.values.shape)):
        for mask in (jnp.zeros((B, S), bool), jnp.ones((B, S), bool)):
            out, gradients = gradient(query, key, value, weights, mask)
            assert np.isfinite(out)
            assert out == 0 or mask.all()
            for x in gradients:
                assert np.isfinite(np.asarray(x, np.float32)).all()


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_is_close_to_float32(form):
    pattern = draw_pattern(form, LEADING["own"])
    out = attend(*operands(jnp.bfloat16), pattern)
    assert out.dtype == jnp.bfloat16
    exact = attend(*(x.astype(jnp.float32) for x in operands(jnp.bfloat16)), pattern)
    assert_close(out.astype(jnp.float32), exact, rtol=0.02, atol=0.03)


@pytest.mark.parametrize("form", ["rows", "blocks"])
def test_no_array_of_every_query_by_every_key_is_formed(form):
    length = 2**14
    query = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)
    size = length // 64 if form == "blocks" else length
    pattern = hl.RowSparseTensor(
        jax.ShapeDtypeStruct((size, 2, 1), jnp.int32),
        jax.ShapeDtypeStruct((size, 2), jnp.float32),
        (size,),
        (size,),
    )
    total = lambda q, k, v, pattern: hl.sparse_attention(q, k, v, pattern).sum()  # noqa: E731
    compiled = jax.jit(jax.grad(total, (0, 1, 2))).lower(query, query, query, pattern).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < length**2 / 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": jnp.zeros((B, S, K, H + 1))}, "key"),
        ({"key": jnp.zeros((B, S, 3, H)), "value": jnp.zeros((B, S, 3, D))}, "key"),
        ({"value": jnp.zeros((B, S + 1, K, D))}, "value"),
        ({"value": jnp.zeros((B, S, K, D), jnp.bfloat16)}, "value"),
        ({"query": jnp.zeros((B, T, N))}, "query"),
        ({"query": jnp.zeros((B, T, N, H), jnp.int32)}, "query"),
        ({"mask": jnp.ones((B, T), bool)}, "mask"),
        ({"pattern": draw_pattern("rows", (3,))}, "pattern"),
        ({"pattern": draw_pattern("rows", (), shape=(T, T))}, "pattern"),
        ({"pattern": draw_pattern("entries", (), shape=(T // 2, S // 2))}, "pattern"),
        ({"pattern": 3}, "tensor"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    query, key, value = operands()
    arguments = {"query": query, "key": key, "value": value, "pattern": draw_pattern("rows", ())}
    with pytest.raises(ValueError, match=message):
        hl.sparse_attention(**(arguments | change))
