"""Sparse tensors: their product with an input, their dense form, and their row-wise softmax."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from hyperlayer_jax import checks, kernels
from hyperlayer_jax.lift import lift, reshape
from hyperlayer_jax.types import RowSparseTensor, SparseTensor


def contract(
    tensor: SparseTensor | RowSparseTensor, x: jax.Array, *, implementation: str | None = None
) -> jax.Array:
    """Multiplies a sparse tensor by an input, summing over the axes of the input.

    y[*B, o, *D] = sum over the stored entries (o, i) of value * x[*B, i, *D] (equation 1 of
    docs/method.md). A `RowSparseTensor` is a gather and a reduction; a `SparseTensor` adds its
    entries up in unordered rows. Nothing of the dense size is formed. Gradients reach values and x.

    Args:
      tensor: the sparse tensor, with leading axes *B. An entry with a coordinate outside its axis
        is absent.
      x: float [*B, *in_shape, *D], *D any trailing feature axes, of the dtype of the values.
      implementation: the kernel backend, chosen by device where None.

    Returns:
      [*B, *out_shape, *D], of the dtype of x. Sums are made in float32 at least.

    Raises:
      ValueError: an argument has the wrong shape or dtype, or `implementation` is unknown.
      NotImplementedError: the backend named cannot do this.
    """
    tensor, x = checks.as_arrays((tensor, x))
    leading, out_shape, in_shape = checks.check_tensor(tensor)
    checks.check_float("x", x, len(leading) + len(in_shape), "[*B, *in_shape, *D]")
    want = (*leading, *in_shape)
    if x.shape[: len(want)] != want:
        raise ValueError(
            f"x: got shape {x.shape}, want [*B, *in_shape, *D] with *B = {leading} and "
            f"in_shape = {in_shape} of the tensor"
        )
    if x.dtype != tensor.values.dtype:
        raise ValueError(f"x: got {x.dtype}, want that of tensor.values, {tensor.values.dtype}")
    features = x.shape[len(want) :]
    dense = x.reshape(*leading, math.prod(in_shape), math.prod(features))
    if isinstance(tensor, RowSparseTensor):
        y = kernels.ell_spmm(
            ravel(tensor.indices, in_shape), tensor.values, dense, implementation=implementation
        )
    else:
        rows, columns = _rows_and_columns(tensor)
        y = kernels.spmm(
            rows,
            columns,
            tensor.values,
            dense,
            num_rows=math.prod(out_shape),
            implementation=implementation,
        )
    return reshape(y, (*leading, *out_shape, *features), leading=len(leading))


def todense(tensor: SparseTensor | RowSparseTensor) -> jax.Array:
    """Writes a sparse tensor out in full: for tests, pictures and small cases.

    Args:
      tensor: the sparse tensor, with leading axes *B.

    Returns:
      [*B, *out_shape, *in_shape], of the dtype of the values; entries at the same place add up.

    Raises:
      ValueError: the tensor's arrays do not fit its shapes, or the result is too large to index.
    """
    tensor = checks.as_arrays(tensor)
    leading, out_shape, in_shape = checks.check_tensor(tensor)
    size = checks.check_size("tensor", (*out_shape, *in_shape))
    rows, columns = _rows_and_columns(tensor)
    present = kernels.in_bounds(rows, math.prod(out_shape))
    present &= kernels.in_bounds(columns, math.prod(in_shape))
    place = jnp.where(present, rows * math.prod(in_shape) + columns, -1)
    one = jnp.ones((*leading, 1, 1), tensor.values.dtype)
    flat = kernels.spmm(
        place, jnp.zeros_like(place), tensor.values.reshape(rows.shape), one, num_rows=size
    )
    return reshape(flat, (*leading, *out_shape, *in_shape), leading=len(leading))


def transpose(tensor: SparseTensor | RowSparseTensor) -> SparseTensor:
    """Swaps output and input: contracts what the output was, into what the input was.

    Args:
      tensor: the sparse tensor, with leading axes *B.

    Returns:
      A `SparseTensor` of the same entries [*B, n], with out_shape and in_shape exchanged.

    Raises:
      ValueError: the tensor's arrays do not fit its shapes.
    """
    tensor = checks.as_arrays(tensor)
    checks.check_tensor(tensor)
    indices, values = tensor.indices, tensor.values
    num_out = len(tensor.out_shape)
    if isinstance(tensor, RowSparseTensor):
        *leading, rows, p, r = indices.shape
        row = np.stack(np.unravel_index(np.arange(rows), tensor.out_shape), -1).astype(np.int32)

        @lift("(i,p,r)->(n,R)")
        def entries(columns):
            every = jnp.broadcast_to(jnp.asarray(row)[:, None], (rows, p, num_out))
            return jnp.concatenate([every, columns], -1).reshape(rows * p, num_out + r)

        indices = entries(indices)
        values = values.reshape(*leading, rows * p)
    indices = jnp.concatenate([indices[..., num_out:], indices[..., :num_out]], -1)
    return SparseTensor(indices, values, tensor.in_shape, tensor.out_shape)


def sparse_softmax(
    tensor: SparseTensor | RowSparseTensor,
) -> SparseTensor | RowSparseTensor:
    """Softmax over the stored entries of every output row (equation 9 of docs/method.md).

    Args:
      tensor: its values are logits; -inf masks an entry. Entries outside its shapes are absent.

    Returns:
      The same tensor with values in [0, 1]: the rows sum to 1, masked entries are 0, and so are
      rows in which every entry is masked. Gradients are finite everywhere.

    Raises:
      ValueError: the tensor's arrays do not fit its shapes.
    """
    tensor = checks.as_arrays(tensor)
    _, out_shape, in_shape = checks.check_tensor(tensor)
    logits = tensor.values.astype(kernels.accumulator(tensor.values.dtype))
    if isinstance(tensor, RowSparseTensor):
        columns = ravel(tensor.indices, in_shape)
        logits = jnp.where(kernels.in_bounds(columns, math.prod(in_shape)), logits, -jnp.inf)
        weights = _softmax(logits)
    else:
        rows, columns = _rows_and_columns(tensor)
        weights = segment_softmax(rows, columns, logits, math.prod(out_shape), math.prod(in_shape))
    weights = weights.astype(tensor.values.dtype)
    return type(tensor)(tensor.indices, weights, tensor.out_shape, tensor.in_shape)


def _softmax(logits):
    """Over the last axis; 0 where all are -inf."""
    top = jax.lax.stop_gradient(logits.max(-1, keepdims=True, initial=-jnp.inf))
    weights = jnp.exp(logits - jnp.where(jnp.isfinite(top), top, 0))
    total = weights.sum(-1, keepdims=True)
    return weights / jnp.where(total > 0, total, 1)


def segment_softmax(
    rows: jax.Array,
    columns: jax.Array,
    logits: jax.Array,
    num_rows: int,
    num_columns: int,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """Softmax of logits [*B, n] among those of equal `rows` int32 [*B, n].

    Entries outside [0, num_rows) or, by `columns`, outside [0, num_columns) get 0.
    """
    present = kernels.in_bounds(rows, num_rows) & kernels.in_bounds(columns, num_columns)
    rows, zeros = jnp.where(present, rows, -1), jnp.zeros_like(rows)
    one = jnp.ones((*rows.shape[:-1], 1, 1), logits.dtype)

    def at_entries(of_rows):
        return kernels.sddmm(rows, zeros, of_rows[..., None], one, implementation=implementation)

    logits = jnp.where(present, logits, -jnp.inf)
    top = kernels.row_max(rows, logits, num_rows=num_rows)
    weights = jnp.exp(logits - at_entries(jnp.where(jnp.isfinite(top), top, 0)))
    total = kernels.spmm(
        rows, zeros, weights, one, num_rows=num_rows, implementation=implementation
    )
    total = at_entries(total[..., 0])
    return weights / jnp.where(total > 0, total, 1)


def ravel(indices: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Numbers coordinates int32 [..., r] in row-major order: int32 [...], outside if one is."""
    if len(shape) == 1:
        return indices[..., 0]
    flat, present = jnp.zeros_like(indices[..., 0]), jnp.ones_like(indices[..., 0], bool)
    for axis, size in enumerate(shape):
        flat = flat * size + indices[..., axis]
        present &= kernels.in_bounds(indices[..., axis], size)
    return jnp.where(present, flat, -1)


def _rows_and_columns(tensor):
    """The entries [*B, n] of a tensor by flattened output and input index."""
    if isinstance(tensor, RowSparseTensor):
        tensor = transpose(transpose(tensor))
    num_out = len(tensor.out_shape)
    rows = ravel(tensor.indices[..., :num_out], tensor.out_shape)
    return rows, ravel(tensor.indices[..., num_out:], tensor.in_shape)
