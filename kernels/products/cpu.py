"""The products where XLA on CPU needs help: in blocks of entries, and of lanes.

The members of a batch may go one by one: a program to be divided over devices takes `reference`.

An index outside its axis never reads or writes: gathers clamp it and its product is masked,
scatters drop it.
"""

import functools

import jax
import jax.numpy as jnp

from ..numerics import accumulator, in_bounds, scatter_rows, sum_list
from . import reference

# What is summed over entries of a row is summed in blocks of so many, unrolled.
_UNROLL = 8
# Entries that are gathered or added up at a time, so that what they read and make stays in caches.
_BLOCK = 1024
# With fewer features than this, a pass over all is as good.
_FEW_FEATURES = 8
# Sums over features go by so many lanes.
_LANES = 8


def _rows(dense, indices):
    """Rows of dense, clamped: a gather that fills would be followed by a pass over all."""
    rows = dense.at[indices].get(mode="clip", wrap_negative_indices=False)
    return rows.astype(accumulator(dense.dtype))


def _dots(product, lhs, rhs):
    """Sums product(lhs, rhs) [...,d] over d: eight lanes at a time, which no [...,d] array feeds.

    `product` takes columns [...,8] of both operands. A sum over a short last axis is slow on CPU.
    """
    d = lhs.shape[-1]
    if not isinstance(d, int):  # A symbolic size of `jax.export`.
        return product(lhs, rhs).sum(-1)
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
    """The entries as those of COO, unless they or their features are few."""
    *batch, i, p = indices.shape
    if i * p <= _BLOCK or dense.shape[-1] < _FEW_FEATURES:
        return reference.ell_spmm_transposed(indices, values, dense, num_cols=num_cols)
    rows = jnp.broadcast_to(jnp.arange(i, dtype=jnp.int32)[:, None], indices.shape)
    rows, indices, values = (x.reshape(*batch, i * p) for x in (rows, indices, values))
    return spmm(indices, rows, values, dense, num_rows=num_cols)


def ell_sddmm(indices: jax.Array, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """Member by member, some rows at a time, unless their entries or features are few."""
    i, p = indices.shape[-2:]
    if i * p <= _BLOCK or lhs.shape[-1] < _FEW_FEATURES:
        return reference.ell_sddmm(indices, lhs, rhs)
    size = max(1, _BLOCK // p)

    def of_member(operands):
        indices, lhs, rhs = operands
        blocks = [_in_blocks(x, size) for x in (indices, lhs)]
        dots = jax.lax.map(lambda block: reference.ell_sddmm(*block, rhs), blocks)
        return dots.reshape(-1, p)[:i]

    out = jax.lax.map(of_member, [_one_batch_axis(x, 2) for x in (indices, lhs, rhs)])
    return out.reshape(indices.shape)


def spmm(
    rows: jax.Array, cols: jax.Array, values: jax.Array, dense: jax.Array, *, num_rows: int
) -> jax.Array:
    """Member by member, a block of entries at a time, added up in place.

    Absent columns drop their rows, so that nothing of size [n, d] is masked.
    """
    *batch, n = rows.shape
    d = dense.shape[-1]
    if n <= _BLOCK:
        return reference.spmm(rows, cols, values, dense, num_rows=num_rows)

    def add_member(out, operands):
        number, rows, cols, values, dense = operands
        present = in_bounds(rows, num_rows) & in_bounds(cols, dense.shape[0])
        rows = jnp.where(present, rows + number * num_rows, -1)

        def add_block(out, block):
            rows, cols, values = block
            return scatter_rows(rows, values[:, None] * _rows(dense, cols), out), None

        entries = rows, cols, values.astype(out.dtype)
        return jax.lax.scan(add_block, out, [_in_blocks(x, _BLOCK) for x in entries])

    members = [_one_batch_axis(x, 1) for x in (rows, cols, values)]
    members.append(_one_batch_axis(dense, 2))
    count = len(members[0])
    dtype = accumulator(dense.dtype)
    out = jnp.zeros_like(members[2], dtype, (count * num_rows, d))
    out, _ = jax.lax.scan(add_member, out, (jnp.arange(count, dtype=jnp.int32), *members))
    return out.astype(dense.dtype).reshape(*batch, num_rows, d)


def _one_batch_axis(x, trailing):
    return x.reshape(-1, *x.shape[x.ndim - trailing :])


def _in_blocks(x, size):
    """x [n,...] as [blocks,size,...], filled up with what is absent as an index."""
    fill = [(0, -x.shape[0] % size)] + [(0, 0)] * (x.ndim - 1)
    return jnp.pad(x, fill, constant_values=-1).reshape(-1, size, *x.shape[1:])


@functools.partial(jnp.vectorize, signature="(n),(n),(i,d),(j,d)->(n)")
def sddmm(rows: jax.Array, cols: jax.Array, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """By lanes."""
    dots = _dots(lambda x, y: _rows(x, rows) * _rows(y, cols), lhs, rhs)
    present = in_bounds(rows, lhs.shape[0]) & in_bounds(cols, rhs.shape[0])
    return jnp.where(present, dots, 0).astype(lhs.dtype)
