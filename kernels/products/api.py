"""The products of a sparse matrix and dense ones: what they take, and which primitive they are.

Sparse matrices come as entries, in one of two layouts, with any number of leading batch axes *B:

- COO: entry n sits at (rows[n], cols[n]). Rows may repeat, in any order.
- ELL: row i owns p entries, entry q of them at (i, indices[i, q]).

Copies of an entry add up. An entry outside the matrix is absent: it contributes 0, its gradient
is 0, and nothing is read or written out of bounds. Differentiable to any order, in both modes.
"""

import jax
import jax.numpy as jnp

from ..arguments import check, check_size
from ..primitives import LEFT, RIGHT, VALUES, function, product


def ell_spmm(
    indices: jax.Array,
    values: jax.Array,
    dense: jax.Array,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """Sparse times dense, p entries in each row: out[i] = sum_q values[i, q] dense[indices[i, q]].

    Args:
      indices: int32 [*B,i,p], columns in [0, j).
      values: float [*B,i,p].
      dense: float [*B,j,d], of the dtype of `values`.
      implementation: backend by name, or None to choose.

    Returns:
      [*B,i,d], of the dtype of `dense`.

    Raises:
      ValueError: on a shape, dtype or implementation other than these.
    """
    arrays = check(
        implementation, indices=(indices, "ip"), values=(values, "ip"), dense=(dense, "jd")
    )
    return product("ell", LEFT, *arrays, rows=arrays[0].shape[-2], implementation=implementation)


def ell_spmm_transposed(
    indices: jax.Array,
    values: jax.Array,
    dense: jax.Array,
    *,
    num_cols: int,
    implementation: str | None = None,
) -> jax.Array:
    """The transpose of `ell_spmm`: out[j] = sum of values[i, q] dense[i] where indices[i, q] = j.

    Args:
      indices: int32 [*B,i,p], columns in [0, num_cols).
      values: float [*B,i,p].
      dense: float [*B,i,d], of the dtype of `values`.
      num_cols: rows of the result, a static integer.
      implementation: backend by name, or None to choose.

    Returns:
      [*B,num_cols,d], of the dtype of `dense`.

    Raises:
      ValueError: on a shape, dtype, size or implementation other than these.
    """
    arrays = check(
        implementation, indices=(indices, "ip"), values=(values, "ip"), dense=(dense, "id")
    )
    num_cols = check_size("num_cols", num_cols)
    return product("ell", RIGHT, *arrays, rows=num_cols, implementation=implementation)


def ell_sddmm(
    indices: jax.Array,
    lhs: jax.Array,
    rhs: jax.Array,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """Sampled dense-dense product, p entries in each row: out[i, q] = lhs[i] . rhs[indices[i, q]].

    Args:
      indices: int32 [*B,i,p], rows of `rhs` in [0, j).
      lhs: float [*B,i,d].
      rhs: float [*B,j,d], of the dtype of `lhs`.
      implementation: backend by name, or None to choose.

    Returns:
      [*B,i,p], of the dtype of `lhs`.

    Raises:
      ValueError: on a shape, dtype or implementation other than these.
    """
    arrays = check(implementation, indices=(indices, "ip"), lhs=(lhs, "id"), rhs=(rhs, "jd"))
    return product("ell", VALUES, *arrays, implementation=implementation)


def spmm(
    rows: jax.Array,
    cols: jax.Array,
    values: jax.Array,
    dense: jax.Array,
    *,
    num_rows: int,
    implementation: str | None = None,
) -> jax.Array:
    """Sparse times dense, entries anywhere: out[r] = sum of values[n] dense[cols[n]], rows[n] = r.

    Exchange `rows` and `cols` for the product with the transpose.

    Args:
      rows: int32 [*B,n] in [0, num_rows).
      cols: int32 [*B,n] in [0, j).
      values: float [*B,n].
      dense: float [*B,j,d], of the dtype of `values`.
      num_rows: rows of the result, a static integer.
      implementation: backend by name, or None to choose.

    Returns:
      [*B,num_rows,d], of the dtype of `dense`.

    Raises:
      ValueError: on a shape, dtype, size or implementation other than these.
    """
    arrays = check(
        implementation,
        rows=(rows, "n"),
        cols=(cols, "n"),
        values=(values, "n"),
        dense=(dense, "jd"),
    )
    num_rows = check_size("num_rows", num_rows)
    return product("coo", LEFT, *arrays, rows=num_rows, implementation=implementation)


def sddmm(
    rows: jax.Array,
    cols: jax.Array,
    lhs: jax.Array,
    rhs: jax.Array,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """Sampled dense-dense product, entries anywhere: out[n] = lhs[rows[n]] . rhs[cols[n]].

    Args:
      rows: int32 [*B,n] in [0, i).
      cols: int32 [*B,n] in [0, j).
      lhs: float [*B,i,d].
      rhs: float [*B,j,d], of the dtype of `lhs`.
      implementation: backend by name, or None to choose.

    Returns:
      [*B,n], of the dtype of `lhs`.

    Raises:
      ValueError: on a shape, dtype or implementation other than these.
    """
    arrays = check(
        implementation, rows=(rows, "n"), cols=(cols, "n"), lhs=(lhs, "id"), rhs=(rhs, "jd")
    )
    return product("coo", VALUES, *arrays, implementation=implementation)


def row_max(
    rows: jax.Array, values: jax.Array, *, num_rows: int, implementation: str | None = None
) -> jax.Array:
    """The largest value of each row: out[r] = max of values[n] over the entries with rows[n] = r.

    Args:
      rows: int32 [*B,n] in [0, num_rows).
      values: float [*B,n], taken as constants: no gradient reaches them.
      num_rows: rows of the result, a static integer.
      implementation: backend by name, or None to choose.

    Returns:
      [*B,num_rows], of the dtype of `values`; -inf for a row without entries.

    Raises:
      ValueError: on a shape, dtype, size or implementation other than these.
    """
    rows, values = check(implementation, rows=(rows, "n"), values=(values, "n"))
    num_rows = check_size("num_rows", num_rows)
    if rows.shape[-1] == 0:
        return jnp.full((*rows.shape[:-1], num_rows), -jnp.inf, values.dtype)
    return function(
        "row_max",
        rows,
        jax.lax.stop_gradient(values),
        leading=rows.ndim - 1,
        results=[((num_rows,), values.dtype)],
        implementation=implementation,
        num_rows=num_rows,
    )
