"""Sparse tensors: their product with an input, their dense form, and their row-wise softmax."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from hyperlayer_jax import checks, kernels
from hyperlayer_jax.kernels import accumulator
from hyperlayer_jax.types import RowSparseTensor, SparseTensor


def contract(
    tensor: SparseTensor | RowSparseTensor, x: jax.Array, *, implementation: str | None = None
) -> jax.Array:
    """Multiplies a sparse tensor by an input, summing over the axes of the input.

    y[*B, o, *D] = sum over the stored entries (o, i) of value * x[*B, i, *D] (equation 1 of
    docs/method.md). A `RowSparseTensor` is a gather and a reduction; a `SparseTensor` adds its
    entries up in unordered rows. Nothing of the dense size is formed. Gradients reach values and x.

    Args:
      tensor: the sparse tensor, with leading axes *B. Its indices lie inside its shapes.
      x: float [*B, *in_shape, *D], *D any trailing feature axes, of the dtype of the values.
      implementation: the kernel backend, chosen by platform, dtype and shape where None.

    Returns:
      [*B, *out_shape, *D], of the dtype of x. Sums are made in float32 at least.

    Raises:
      ValueError: an argument has the wrong shape or dtype, or `implementation` is unknown.
      NotImplementedError: the backend named cannot do this.
    """
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
            _ravel(tensor.indices, in_shape), tensor.values, dense, implementation=implementation
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
    return y.reshape(*leading, *out_shape, *features)


def todense(tensor: SparseTensor | RowSparseTensor) -> jax.Array:
    """Writes a sparse tensor out in full: for tests, pictures and small cases.

    Args:
      tensor: the sparse tensor, with leading axes *B.

    Returns:
      [*B, *out_shape, *in_shape], of the dtype of the values; entries at the same place add up.

    Raises:
      ValueError: the tensor's arrays do not fit its shapes, or the result is too large to index.
    """
    leading, out_shape, in_shape = checks.check_tensor(tensor)
    size = checks.check_size("tensor", (*out_shape, *in_shape))
    rows, columns = _rows_and_columns(tensor)
    place = (rows * math.prod(in_shape) + columns).reshape(math.prod(leading), rows.shape[-1])
    values = tensor.values.reshape(place.shape)
    add = jax.vmap(lambda place, values: jnp.zeros(size, values.dtype).at[place].add(values))
    return add(place, values).reshape(*leading, *out_shape, *in_shape)


def transpose(tensor: SparseTensor | RowSparseTensor) -> SparseTensor:
    """Swaps output and input: contracts what the output was, into what the input was.

    Args:
      tensor: the sparse tensor, with leading axes *B.

    Returns:
      A `SparseTensor` of the same entries [*B, n], with out_shape and in_shape exchanged.

    Raises:
      ValueError: the tensor's arrays do not fit its shapes.
    """
    checks.check_tensor(tensor)
    indices, values = tensor.indices, tensor.values
    num_out = len(tensor.out_shape)
    if isinstance(tensor, RowSparseTensor):
        *leading, rows, p, r = indices.shape
        row = np.stack(np.unravel_index(np.arange(rows), tensor.out_shape), -1).astype(np.int32)
        row = row.reshape((1,) * len(leading) + (rows, 1, num_out))
        row = jnp.broadcast_to(row, (*leading, rows, p, num_out))
        indices = jnp.concatenate([row, indices], -1).reshape(*leading, rows * p, num_out + r)
        values = values.reshape(*leading, rows * p)
    indices = jnp.concatenate([indices[..., num_out:], indices[..., :num_out]], -1)
    return SparseTensor(indices, values, tensor.in_shape, tensor.out_shape)


def sparse_softmax(
    tensor: SparseTensor | RowSparseTensor,
) -> SparseTensor | RowSparseTensor:
    """Softmax over the stored entries of every output row (equation 9 of docs/method.md).

    Args:
      tensor: its values are logits; -inf masks an entry.

    Returns:
      The same tensor with values in [0, 1]: the rows sum to 1, masked entries are 0, and so are
      rows in which every entry is masked. Gradients are finite everywhere.

    Raises:
      ValueError: the tensor's arrays do not fit its shapes.
    """
    leading, out_shape, _ = checks.check_tensor(tensor)
    dtype = tensor.values.dtype
    logits = tensor.values.astype(accumulator(dtype))
    if isinstance(tensor, RowSparseTensor):
        top = jax.lax.stop_gradient(logits.max(-1, keepdims=True, initial=-jnp.inf))
        weights = jnp.exp(logits - jnp.where(jnp.isfinite(top), top, 0))
        total = weights.sum(-1, keepdims=True)
        weights = weights / jnp.where(total > 0, total, 1)
    else:
        rows, _ = _rows_and_columns(tensor)
        flat = (math.prod(leading), rows.shape[-1])
        softmax = jax.vmap(lambda r, x: _segment_softmax(r, x, math.prod(out_shape)))
        weights = softmax(rows.reshape(flat), logits.reshape(flat)).reshape(logits.shape)
    return type(tensor)(tensor.indices, weights.astype(dtype), tensor.out_shape, tensor.in_shape)


def _segment_softmax(rows, logits, num_rows):
    """Softmax of `logits` [n] among those of equal `rows` [n]."""
    top = jnp.full(num_rows, -jnp.inf, logits.dtype).at[rows].max(jax.lax.stop_gradient(logits))
    weights = jnp.exp(logits - jnp.where(jnp.isfinite(top), top, 0)[rows])
    total = jnp.zeros(num_rows, logits.dtype).at[rows].add(weights)
    return weights / jnp.where(total > 0, total, 1)[rows]


def _ravel(indices: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Numbers coordinates int32 [..., r] in row-major order: int32 [...]."""
    flat = indices[..., 0]
    for axis, size in enumerate(shape[1:], start=1):
        flat = flat * size + indices[..., axis]
    return flat


def _rows_and_columns(tensor):
    """The entries [*B, n] of a tensor by flattened output and input index."""
    if isinstance(tensor, SparseTensor):
        num_out = len(tensor.out_shape)
        rows = _ravel(tensor.indices[..., :num_out], tensor.out_shape)
        return rows, _ravel(tensor.indices[..., num_out:], tensor.in_shape)
    columns = _ravel(tensor.indices, tensor.in_shape)
    rows = np.arange(columns.shape[-2], dtype=np.int32)[:, None]
    rows = jnp.broadcast_to(rows.reshape((1,) * (columns.ndim - 2) + rows.shape), columns.shape)
    flat = (*columns.shape[:-2], columns.shape[-2] * columns.shape[-1])
    return rows.reshape(flat), columns.reshape(flat)
