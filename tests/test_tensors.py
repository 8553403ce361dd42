"""Laws of sparse tensors: their products, dense forms, transposes and row-wise softmax."""

import dataclasses

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
    integers,
    largest_array,
    operations,
    program,
)

import hyperlayer_jax as hl

KINDS = ("coo", "ell")
# *B, out_shape, in_shape, *D: any rank of each.
CASES = (((), (4,), (5,), ()), ((2,), (2, 3), (4,), (3,)), ((2, 1), (3,), (2, 3, 2), (2, 2)))
contract, todense, softmax = map(jax.jit, (hl.contract, hl.todense, hl.sparse_softmax))


def build(kind, indices, values, out_shape, in_shape):
    """A tensor from entries [*B, rows, p, R], which COO takes in any order."""
    rank = len(out_shape)
    if kind == "ell":
        return hl.RowSparseTensor(indices[..., rank:], values, out_shape, in_shape)
    batch = values.shape[:-2]
    n = values.shape[-2] * values.shape[-1]
    indices = indices.reshape(*batch, n, rank + len(in_shape))[..., ::-1, :]
    return hl.SparseTensor(indices, values.reshape(*batch, n)[..., ::-1], out_shape, in_shape)


def entries(tensor):
    """All columns [*B, n, R] and values [*B, n], as NumPy."""
    values = np.asarray(tensor.values, np.float64)
    if isinstance(tensor, hl.SparseTensor):
        return np.asarray(tensor.indices), values
    batch = values.shape[:-2]
    rows = np.stack(np.unravel_index(np.arange(values.shape[-2]), tensor.out_shape), -1)
    rows = np.broadcast_to(rows[:, None], (*values.shape, rows.shape[-1]))
    n = values.shape[-2] * values.shape[-1]
    columns = np.concatenate([rows, np.asarray(tensor.indices)], -1)
    return columns.reshape(*batch, n, -1), values.reshape(*batch, n)


def dense_of(tensor):
    """The oracle on every batch entry."""
    shape = (*tensor.out_shape, *tensor.in_shape)
    indices, values = entries(tensor)
    out = np.zeros((*values.shape[:-1], *shape))
    for b in np.ndindex(values.shape[:-1]):
        out[b] = oracle.dense(indices[b], values[b], shape)
    return out


def product_of(tensor, x):
    """The oracle's contraction on every batch entry."""
    indices, values = entries(tensor)
    batch = values.shape[:-1]
    flat = [
        oracle.contract(indices[b], values[b], x[b], tensor.out_shape, tensor.in_shape)
        for b in np.ndindex(batch)
    ]
    return np.stack(flat).reshape(*batch, *flat[0].shape)


def random_tensor(kind, case=CASES[1], *, p=3, dtype=jnp.float32, seed=0):
    batch, out_shape, in_shape, features = case
    rng = np.random.default_rng(seed)
    rows = int(np.prod(out_shape))
    own = np.stack(np.unravel_index(np.arange(rows), out_shape), -1)[:, None]
    own = np.broadcast_to(own, (*batch, rows, p, len(out_shape)))
    inputs = rng.integers(0, in_shape, (*batch, rows, p, len(in_shape)))
    indices = jnp.asarray(np.concatenate([own, inputs], -1), jnp.int32)
    values = jnp.asarray(rng.normal(size=(*batch, rows, p)), dtype)
    x = jnp.asarray(rng.normal(size=(*batch, *in_shape, *features)), dtype)
    return build(kind, indices, values, out_shape, in_shape), x


def with_values(tensor, values):
    return dataclasses.replace(tensor, values=values)


@st.composite
def tensors(draw, kind, elements=(-4, 4)):
    """(tensor, x), entries anywhere, several at the same place."""
    batch, out_shape, in_shape, features = draw(st.sampled_from(CASES))
    dtype = draw(st.sampled_from(FLOATS))
    rows, p = int(np.prod(out_shape)), 3
    x = draw(floats(-4, 4, (*batch, *in_shape, *features), dtype))
    values = draw(floats(*elements, (*batch, rows * p), dtype))
    axes = in_shape if kind == "ell" else out_shape + in_shape
    columns = [draw(integers(0, size - 1, (*batch, rows * p))) for size in axes]
    indices = jnp.stack(columns, -1)
    if kind == "coo":
        return hl.SparseTensor(indices, values, out_shape, in_shape), x
    indices = indices.reshape(*batch, rows, p, len(in_shape))
    values = values.reshape(*batch, rows, p)
    return hl.RowSparseTensor(indices, values, out_shape, in_shape), x


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_contracting_is_the_dense_product(kind, data):
    tensor, x = data.draw(tensors(kind))
    y = contract(tensor, x)
    assert y.dtype == x.dtype
    tolerance = 1e-4 if x.dtype == jnp.float32 else 2e-2
    assert_close(y, product_of(tensor, np.asarray(x, np.float64)), tolerance, 10 * tolerance)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_the_dense_form_adds_entries_up(kind, data):
    tensor, x = data.draw(tensors(kind))
    dense = todense(tensor)
    assert dense.dtype == x.dtype
    tolerance = 1e-5 if x.dtype == jnp.float32 else 5e-2
    assert_close(dense, dense_of(tensor), tolerance, 4 * tolerance)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_transposing_exchanges_output_and_input(kind, case):
    tensor, x = random_tensor(kind, case)
    transposed = hl.transpose(tensor)
    num_batch, num_out = len(case[0]), len(case[1])
    axes = list(range(num_batch, num_batch + num_out + len(case[2])))
    axes = [*range(num_batch), *axes[num_out:], *axes[:num_out]]
    assert_equal(todense(transposed), todense(tensor).transpose(axes))
    assert_equal(todense(hl.transpose(transposed)), todense(tensor))
    y = jnp.cos(contract(tensor, x))
    inner = np.vdot(contract(transposed, y), x)
    np.testing.assert_allclose(inner, np.vdot(y, contract(tensor, x)), 1e-4)


@pytest.mark.parametrize("case", CASES)
def test_both_layouts_are_the_same_tensor(case):
    (coo, x), (ell, _) = random_tensor("coo", case), random_tensor("ell", case)
    assert_close(contract(coo, x), contract(ell, x))
    assert_close(todense(coo), todense(ell))
    assert_close(todense(softmax(coo)), todense(softmax(ell)))


@pytest.mark.parametrize("kind", KINDS)
def test_contracting_is_linear_in_x_and_in_values(kind):
    tensor, x = random_tensor(kind)
    other, z = random_tensor(kind, seed=1)
    assert_close(contract(tensor, 2 * x + z), 2 * contract(tensor, x) + contract(tensor, z), 1e-4)
    other = with_values(tensor, other.values)
    both = with_values(tensor, 2 * tensor.values + other.values)
    assert_close(contract(both, x), 2 * contract(tensor, x) + contract(other, x), 1e-4)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_match_finite_differences(kind, case):
    with jax.enable_x64(True):
        tensor, x = random_tensor(kind, case, dtype=jnp.float64)
        product = jax.jit(lambda values, x: hl.contract(with_values(tensor, values), x))
        assert_close(product(tensor.values, x), product_of(tensor, x), 1e-12, 1e-12)
        check_grads(product, (tensor.values, x), 1, ["rev"], 1e-6, 1e-6)
        weights = jax.jit(lambda values: hl.sparse_softmax(with_values(tensor, values)).values)
        check_grads(weights, (tensor.values,), 1, ["rev"], 1e-6, 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_vmap_and_sharding_change_nothing(kind):
    case = ((8, 2), (2, 3), (4,), (3,))
    tensor, x = random_tensor(kind, case)

    def product(tensor, x):
        return hl.contract(hl.sparse_softmax(tensor), x)

    def value_and_grad(product):
        loss = lambda values, x: (product(with_values(tensor, values), x) ** 2).sum()  # noqa: E731
        return jax.jit(jax.value_and_grad(loss, (0, 1)))

    want = value_and_grad(product)(tensor.values, x)
    assert_close(value_and_grad(jax.vmap(jax.vmap(product)))(tensor.values, x), want)
    mesh, spec = batch_mesh(), PartitionSpec("data")
    sharded = jax.device_put((tensor.values, x), NamedSharding(mesh, spec))
    assert_close(value_and_grad(product)(*sharded), want)
    mapped = jax.shard_map(product, mesh=mesh, in_specs=spec, out_specs=spec)
    assert_close(value_and_grad(mapped)(*sharded), want)
    dense = jax.shard_map(hl.todense, mesh=mesh, in_specs=spec, out_specs=spec)
    assert_close(jax.jit(dense)(tensor), todense(tensor))


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_softmax_weighs_the_entries_of_each_row(kind, data):
    """Rows sum to 1, in proportion to exp; masked entries and rows without entries give 0."""
    tensor, _ = data.draw(tensors(kind, elements=(-80, 80)))
    masked = data.draw(st.sampled_from([0.0, 0.5, 1.0]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    mask = jnp.asarray(rng.random(tensor.values.shape) < masked)
    tensor = with_values(tensor, jnp.where(mask, -jnp.inf, tensor.values))
    weights = softmax(tensor)
    assert weights.values.dtype == tensor.values.dtype
    assert_equal(weights.indices, tensor.indices)

    indices, logits = entries(tensor)
    rows = np.ravel_multi_index(
        np.moveaxis(indices[..., : len(tensor.out_shape)], -1, 0), tensor.out_shape
    )
    want = np.zeros(logits.shape)
    for *b, n in np.ndindex(logits.shape):
        same = rows[*b] == rows[*b, n]
        if np.isfinite(logits[*b, n]):
            want[*b, n] = 1 / np.exp(logits[*b][same] - logits[*b, n]).sum()
    tolerance = 1e-5 if tensor.values.dtype == jnp.float32 else 1e-2
    assert_close(weights.values.reshape(want.shape), want, tolerance, tolerance)


@jax.jit
def softmax_and_gradient(tensor):
    weights, vjp = jax.vjp(
        lambda v: hl.sparse_softmax(with_values(tensor, v)).values, tensor.values
    )
    seeds = jnp.arange(weights.size, dtype=jnp.float32).reshape(weights.shape)
    return weights, vjp(seeds.astype(weights.dtype))[0]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("top", [0.0, 1e4, -1e4, 1e38, -1e38, -np.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_softmax_is_finite_and_knows_no_offset(kind, top, dtype):
    tensor, _ = random_tensor(kind, dtype=dtype)
    masked = jnp.arange(tensor.values.size).reshape(tensor.values.shape) % 4 == 0
    values = jnp.where(masked, -jnp.inf, jnp.full_like(tensor.values, top))
    weights, gradient = softmax_and_gradient(with_values(tensor, values))
    assert_finite((weights, gradient))
    if np.isfinite(top):
        zero = with_values(tensor, jnp.where(masked, -jnp.inf, jnp.zeros_like(values)))
        assert_equal(weights, softmax(zero).values)
    else:
        assert_equal(weights, jnp.zeros_like(weights))
        assert_equal(gradient, jnp.zeros_like(gradient))
    assert (np.asarray(weights)[np.asarray(masked)] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", [((0,), (2,), (3,), (4,)), ((2, 0), (2,), (3,), ()), CASES[1]])
def test_empty_batches_and_tensors_without_entries_are_ordinary(kind, case):
    p = 3 if 0 in case[0] else 0
    tensor, x = random_tensor(kind, case, p=p)
    batch, out_shape, in_shape, features = case
    assert_equal(contract(tensor, x), jnp.zeros((*batch, *out_shape, *features)))
    assert_equal(todense(tensor), jnp.zeros((*batch, *out_shape, *in_shape)))
    assert softmax(tensor).values.shape == tensor.values.shape
    assert hl.transpose(tensor).values.shape == (*batch, int(np.prod(out_shape)) * p)


def large(kind, p=4):
    """A tensor of 10^6 x 10^6, in shapes alone, and an x for it."""
    rows = 10**6
    size = (rows, p) if kind == "ell" else (rows * p,)
    indices = jax.ShapeDtypeStruct((*size, 2 if kind == "ell" else 4), jnp.int32)
    values = jax.ShapeDtypeStruct(size, jnp.float32)
    new = hl.RowSparseTensor if kind == "ell" else hl.SparseTensor
    x = jax.ShapeDtypeStruct((1000, 1000), jnp.float32)
    return new(indices, values, (1000, 1000), (1000, 1000)), x


def product_and_gradients(tensor, x):
    product = lambda values, x: hl.contract(with_values(tensor, values), x)  # noqa: E731
    y, vjp = jax.vjp(product, tensor.values, x)
    return y, vjp(y)


@pytest.mark.parametrize("function", [product_and_gradients, softmax_and_gradient])
@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_that_of_the_entries(kind, function):
    arguments = large(kind)[: 2 if function is product_and_gradients else 1]
    assert largest_array(function, *arguments) <= 10**6 * 4 * 4


@pytest.mark.parametrize("function", [hl.contract, jax.jit(hl.contract)], ids=["plain", "jit"])
def test_fixed_rows_never_scatter(function):
    scatters = {"scatter", "scatter-add", "scatter_add", "segment_sum"}
    assert not operations(function, *large("ell")) & scatters
    assert not operations(lambda t, x: function(hl.sparse_softmax(t), x), *large("ell")) & scatters
    assert operations(function, *large("coo")) & scatters


@pytest.mark.parametrize("kind", KINDS)
def test_the_program_does_not_grow_with_entries(kind):
    sizes = [len(program(product_and_gradients, *large(kind, p))) for p in (40, 400)]
    assert sizes[0] == sizes[1]


def test_rows_number_more_than_a_float_holds():
    """Row-major numbers beyond 2^24, which float32 takes for one another."""
    shape = (2**12 + 1, 2**12)
    indices = jnp.array([[2**12, 1, 0], [2**12, 0, 0], [2**12, 1, 0]], jnp.int32)
    tensor = hl.SparseTensor(indices, jnp.zeros(3), shape, (1,))
    assert_close(softmax(tensor).values, np.array([0.5, 1, 0.5]))


COO, X = random_tensor("coo")
ELL, _ = random_tensor("ell")


def changed(tensor, **fields):
    return dataclasses.replace(tensor, **fields)


ERRORS = {
    "tensor: got .*list.*, want a SparseTensor": lambda: hl.contract([1.0], X),
    "tensor: got .*Array.*, want a SparseTensor": lambda: hl.todense(X),
    r"x: got int32, want a floating": lambda: hl.contract(COO, X.astype(jnp.int32)),
    r"x: got shape \(4, 3\), want \[\*B, \*in_shape, \*D\]": lambda: hl.contract(COO, X[0]),
    r"x: got shape \(2,\), want": lambda: hl.contract(COO, X[:, 0, 0]),
    r"x: got bfloat16, want that of tensor.values, float32": lambda: hl.contract(
        COO, X.astype(jnp.bfloat16)
    ),
    "implementation: got 'cusparse', want None or one of": lambda: hl.contract(
        ELL, X, implementation="cusparse"
    ),
    "tensor.out_shape: got .2.5,.*want a sequence of ints": lambda: hl.todense(
        changed(COO, out_shape=(2.5,))
    ),
    r"tensor.in_shape: got \(0,\)": lambda: hl.sparse_softmax(changed(COO, in_shape=(0,))),
    r"tensor.out_shape: got \(65536, 65536\) with 4294967296 entries": lambda: hl.contract(
        changed(COO, out_shape=(2**16, 2**16)), X
    ),
    r"tensor: got \(65536, 3, 65536\) with": lambda: hl.todense(
        changed(COO, out_shape=(2**16, 3), in_shape=(2**16,))
    ),
    "tensor.indices: got float32, want int32": lambda: hl.transpose(
        changed(COO, indices=COO.indices.astype(jnp.float32))
    ),
    r"tensor.indices: got shape \(3,\), want \[\*B, n, R\]": lambda: hl.transpose(
        changed(COO, indices=COO.indices[0, 0])
    ),
    "tensor.values: got int32, want a floating": lambda: hl.sparse_softmax(
        changed(ELL, values=ELL.values.astype(jnp.int32))
    ),
    r"tensor.values: got shape \(3,\), want \[\*B, rows, p\]": lambda: hl.sparse_softmax(
        changed(ELL, values=ELL.values[0, 0])
    ),
    r"tensor.values: got shape \(2, 17\), want one for each .* \(2, 18\)": lambda: hl.todense(
        changed(COO, values=COO.values[:, 1:])
    ),
    "tensor.indices: got 3 columns, want 4": lambda: hl.todense(changed(COO, in_shape=(2, 2))),
    "tensor.indices: got 6 rows, want 5": lambda: hl.todense(changed(ELL, out_shape=(5,))),
}


@pytest.mark.parametrize("message", ERRORS)
def test_wrong_input_names_the_argument(message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(ERRORS[message])
