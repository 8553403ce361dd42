"""The products where XLA on CPU needs help: in blocks of entries, and of lanes.

An index outside its axis never reads or writes: gathers clamp it and its product is masked,
scatters drop it.
"""

import functools

import jax
import jax.numpy as jnp

from ..numerics import accumulator, in_bounds, scatter_rows, sum_list
from . import reference

# What is summed over entries is summed in blocks of so many, unrolled.
_UNROLL = 8
# Products over fewer features than this are scattered in one go; sums over more go lane by lane.
_LANES = 8
# Dot products of fewer features than this are best left to XLA (measured).
_FEW_FEATURES = 32


def _rows(dense, indices):
    """Rows of dense, clamped: a gather that fills would be followed by a pass over all."""
    rows = dense.at[indices].get(mode="clip", wrap_negative_indices=False)
    return rows.astype(accumulator(dense.dtype))


def _dots(product, lhs, rhs):
    """Sums product(lhs, rhs) [...,d] over d: eight lanes at a time, which no [...,d] array feeds.

    `product` takes columns [...,8] of both operands. A sum over a short last axis is slow on CPU.
    """
    d = lhs.shape[-1]
    width = min(d, _LANES)
    lhs, rhs = (jnp.pad(x, [(0, 0), (0, -d % width)]) for x in (lhs, rhs))
    columns = [slice(c, c + width) for c in range(0, d, width)]
    lanes = sum_list([product(lhs[:, c], rhs[:, c]) for c in columns])
    ones = jnp.ones(width, lanes.dtype)
    return jnp.einsum("...d,d->...", lanes, ones, precision="highest")


@functools.partial(jnp.vectorize, signature="(i,p),(i,p),(j,d)->(i,d)")
def ell_spmm(indices: jax.Array, values: jax.Array, dense: jax.Array) -> jax.Array:
    """A loop over blocks of q, unrolled.

    XLA fuses gather, product and sum of a block, so that no [i, p, d] array exists, but it cannot
    fuse a loop into its readers, who would each repeat it.
    """
    allowed = in_bounds(indices, dense.shape[0])
    values = values.astype(accumulator(dense.dtype))

    def term(q):
        product = values[:, q, None] * _rows(dense, indices[:, q])
        return jnp.where(allowed[:, q, None], product, 0)

    # A first block of what is over, so that all others are full and end in a loop.
    entries = indices.shape[1]
    first = (entries - 1) % _UNROLL + 1
    add = lambda q, total: total + term(q)  # noqa: E731
    total = jax.lax.fori_loop(1, first, add, term(0), unroll=_UNROLL)
    total = jax.lax.fori_loop(first, entries, add, total, unroll=_UNROLL)
    return total.astype(dense.dtype)


def ell_spmm_transposed(
    indices: jax.Array, values: jax.Array, dense: jax.Array, *, num_cols: int
) -> jax.Array:
    """One scatter for each q, so that no [i, p, d] array exists, unless d is small.

    The last batch axis (the heads of an attention) goes one by one, so that what is scattered into
    stays in caches. Other batch axes may be sharded, and are never taken apart.
    """
    if dense.shape[-1] < _LANES:
        return reference.ell_spmm_transposed(indices, values, dense, num_cols=num_cols)

    @functools.partial(jnp.vectorize, signature="(i,p),(i,p),(i,d)->(j,d)")
    def scatter(indices, values, dense):
        dtype = accumulator(dense.dtype)
        values, rows = values.astype(dtype), dense.astype(dtype)

        def add_entry(out, entry):
            index, value = entry
            return scatter_rows(index, value[:, None] * rows, out), None

        out = jnp.zeros_like(rows, shape=(num_cols, dense.shape[1]))
        out, _ = jax.lax.scan(add_entry, out, (indices.T, values.T))
        return out.astype(dense.dtype)

    if values.ndim < 4:
        return scatter(indices, values, dense)
    last = [jnp.moveaxis(x, -3, 0) for x in (indices, values, dense)]
    return jnp.moveaxis(jax.lax.map(lambda x: scatter(*x), last), 0, -3)


def ell_sddmm(indices: jax.Array, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """A few q at a time: all lanes would be [i, p, 8].

    The blocks of q are equal and all in one loop: before it, XLA might gather from what is still
    laid out otherwise, at up to four times the cost.
    """
    few = lhs.shape[-1] < _FEW_FEATURES
    return reference.ell_sddmm(indices, lhs, rhs) if few else _blocks_of_dots(indices, lhs, rhs)


@functools.partial(jnp.vectorize, signature="(i,p),(i,d),(j,d)->(i,p)")
def _blocks_of_dots(indices, lhs, rhs):
    left = lhs.astype(accumulator(lhs.dtype))
    i, entries = indices.shape
    num_blocks = -(-entries // _UNROLL)
    size = -(-entries // num_blocks)

    def block(indices):
        return _dots(lambda x, y: x[None] * _rows(y, indices), left, rhs)

    blocks = jnp.pad(indices.T, [(0, num_blocks * size - entries), (0, 0)])
    dots = jax.lax.map(block, blocks.reshape(num_blocks, size, i)).reshape(-1, i)[:entries].T
    return jnp.where(in_bounds(indices, rhs.shape[0]), dots, 0).astype(lhs.dtype)


def spmm(
    rows: jax.Array, cols: jax.Array, values: jax.Array, dense: jax.Array, *, num_rows: int
) -> jax.Array:
    """Absent columns drop their rows, so that nothing of size [n, d] is masked."""

    @functools.partial(jnp.vectorize, signature="(n),(n),(n),(j,d)->(i,d)")
    def scatter(rows, cols, values, dense):
        rows = jnp.where(in_bounds(cols, dense.shape[0]), rows, -1)
        updates = values.astype(accumulator(dense.dtype))[:, None] * _rows(dense, cols)
        out = jnp.zeros_like(updates, shape=(num_rows, dense.shape[1]))
        return scatter_rows(rows, updates, out).astype(dense.dtype)

    return scatter(rows, cols, values, dense)


@functools.partial(jnp.vectorize, signature="(n),(n),(i,d),(j,d)->(n)")
def sddmm(rows: jax.Array, cols: jax.Array, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """By lanes."""
    dots = _dots(lambda x, y: _rows(x, rows) * _rows(y, cols), lhs, rhs)
    present = in_bounds(rows, lhs.shape[0]) & in_bounds(cols, rhs.shape[0])
    return jnp.where(present, dots, 0).astype(lhs.dtype)
