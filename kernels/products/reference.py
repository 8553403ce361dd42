"""The meaning of the products: one gather, one sum of products, one scatter."""

import functools

import jax
import jax.numpy as jnp

from ..numerics import accumulator, dot, in_bounds, nearest_rows, scatter_rows


@functools.partial(jnp.vectorize, signature="(i,p),(i,p),(j,d)->(i,d)")
def ell_spmm(indices: jax.Array, values: jax.Array, dense: jax.Array) -> jax.Array:
    """out[i] = sum over q of values[i, q] dense[indices[i, q]]."""
    dtype = accumulator(dense.dtype)
    present = in_bounds(indices, dense.shape[0])[:, :, None]
    products = values.astype(dtype)[:, :, None] * nearest_rows(dense, indices).astype(dtype)
    return jnp.where(present, products, 0).sum(1).astype(dense.dtype)


def ell_spmm_transposed(
    indices: jax.Array, values: jax.Array, dense: jax.Array, *, num_cols: int
) -> jax.Array:
    """out[j] = sum of values[i, q] dense[i] over the entries with indices[i, q] = j."""

    @functools.partial(jnp.vectorize, signature="(i,p),(i,p),(i,d)->(j,d)")
    def scatter(indices, values, dense):
        dtype = accumulator(dense.dtype)
        updates = values.astype(dtype)[:, :, None] * dense.astype(dtype)[:, None]
        out = jnp.zeros_like(updates, shape=(num_cols, dense.shape[1]))
        return scatter_rows(indices, updates, out).astype(dense.dtype)

    return scatter(indices, values, dense)


@functools.partial(jnp.vectorize, signature="(i,p),(i,d),(j,d)->(i,p)")
def ell_sddmm(indices: jax.Array, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """out[i, q] = lhs[i] . rhs[indices[i, q]]."""
    dots = dot("id,ipd->ip", lhs, nearest_rows(rhs, indices))
    return jnp.where(in_bounds(indices, rhs.shape[0]), dots, 0).astype(lhs.dtype)


def spmm(
    rows: jax.Array, cols: jax.Array, values: jax.Array, dense: jax.Array, *, num_rows: int
) -> jax.Array:
    """out[r] = sum of values[n] dense[cols[n]] over the entries with rows[n] = r."""

    @functools.partial(jnp.vectorize, signature="(n),(n),(n),(j,d)->(i,d)")
    def scatter(rows, cols, values, dense):
        dtype = accumulator(dense.dtype)
        present = in_bounds(cols, dense.shape[0])[:, None]
        updates = values.astype(dtype)[:, None] * nearest_rows(dense, cols).astype(dtype)
        updates = jnp.where(present, updates, 0)
        out = jnp.zeros_like(updates, shape=(num_rows, dense.shape[1]))
        return scatter_rows(rows, updates, out).astype(dense.dtype)

    return scatter(rows, cols, values, dense)


@functools.partial(jnp.vectorize, signature="(n),(n),(i,d),(j,d)->(n)")
def sddmm(rows: jax.Array, cols: jax.Array, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """out[n] = lhs[rows[n]] . rhs[cols[n]]."""
    dots = dot("nd,nd->n", nearest_rows(lhs, rows), nearest_rows(rhs, cols))
    present = in_bounds(rows, lhs.shape[0]) & in_bounds(cols, rhs.shape[0])
    return jnp.where(present, dots, 0).astype(lhs.dtype)


def row_max(rows: jax.Array, values: jax.Array, *, num_rows: int) -> tuple[jax.Array]:
    """out[r] = the largest of values[n] with rows[n] = r; -inf where there is none."""

    @functools.partial(jnp.vectorize, signature="(n),(n)->(i)")
    def scatter(rows, values):
        out = jnp.full_like(values, -jnp.inf, shape=num_rows)
        return out.at[rows].max(values, mode="drop", wrap_negative_indices=False)

    return (scatter(rows, values),)
