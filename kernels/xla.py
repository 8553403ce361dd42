"""Plain JAX: the meaning of each operation, and its fallback on every platform.

An index outside its axis never reads or writes: gathers clamp it and its product is masked,
scatters drop it. 16-bit floats accumulate in float32. No size is 0 here; `api` answers for those.
"""

import functools

import jax
import jax.numpy as jnp

_UNROLL = 16


def _accumulator(dtype):
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def _rows(dense, indices):
    rows = dense.at[indices].get(mode="clip", wrap_negative_indices=False)
    return rows.astype(_accumulator(dense.dtype))


def _scatter_rows(indices, updates, size, dtype):
    out = jnp.zeros((size, updates.shape[-1]), updates.dtype)
    out = out.at[indices].add(updates, mode="drop", wrap_negative_indices=False)
    return out.astype(dtype)


def _in_bounds(indices, size):
    return (indices >= 0) & (indices < size)


@functools.partial(jnp.vectorize, signature="(i,p),(i,p),(j,d)->(i,d)")
def ell_spmm(indices, values, dense):
    """out[i] = sum over q of values[i, q] dense[indices[i, q]].

    Unrolled over q, so that XLA fuses gather, product and sum, and no [i, p, d] array exists.
    """
    allowed = _in_bounds(indices, dense.shape[0])
    values = values.astype(_accumulator(dense.dtype))

    def term(q):
        product = values[:, q, None] * _rows(dense, indices[:, q])
        return jnp.where(allowed[:, q, None], product, 0)

    entries = indices.shape[1]
    total = jax.lax.fori_loop(1, entries, lambda q, total: total + term(q), term(0), unroll=_UNROLL)
    return total.astype(dense.dtype)


def ell_spmm_transposed(indices, values, dense, *, num_cols):
    """out[j] = sum of values[i, q] dense[i] over the entries with indices[i, q] = j."""

    @functools.partial(jnp.vectorize, signature="(i,p),(i,p),(i,d)->(j,d)")
    def scatter(indices, values, dense):
        accumulator = _accumulator(dense.dtype)
        updates = values.astype(accumulator)[:, :, None] * dense.astype(accumulator)[:, None]
        return _scatter_rows(indices, updates, num_cols, dense.dtype)

    return scatter(indices, values, dense)


@functools.partial(jnp.vectorize, signature="(i,p),(i,d),(j,d)->(i,p)")
def ell_sddmm(indices, lhs, rhs):
    """out[i, q] = lhs[i] . rhs[indices[i, q]]."""
    lhs = lhs.astype(_accumulator(rhs.dtype))
    dots = jnp.einsum("id,ipd->ip", lhs, _rows(rhs, indices), precision="highest")
    return jnp.where(_in_bounds(indices, rhs.shape[0]), dots, 0).astype(rhs.dtype)


def spmm(rows, cols, values, dense, *, num_rows):
    """out[r] = sum of values[n] dense[cols[n]] over the entries with rows[n] = r."""

    @functools.partial(jnp.vectorize, signature="(n),(n),(n),(j,d)->(i,d)")
    def scatter(rows, cols, values, dense):
        rows = jnp.where(_in_bounds(cols, dense.shape[0]), rows, -1)
        updates = values.astype(_accumulator(dense.dtype))[:, None] * _rows(dense, cols)
        return _scatter_rows(rows, updates, num_rows, dense.dtype)

    return scatter(rows, cols, values, dense)


@functools.partial(jnp.vectorize, signature="(n),(n),(i,d),(j,d)->(n)")
def sddmm(rows, cols, lhs, rhs):
    """out[n] = lhs[rows[n]] . rhs[cols[n]]."""
    dots = jnp.einsum("nd,nd->n", _rows(lhs, rows), _rows(rhs, cols), precision="highest")
    allowed = _in_bounds(rows, lhs.shape[0]) & _in_bounds(cols, rhs.shape[0])
    return jnp.where(allowed, dots, 0).astype(lhs.dtype)
