"""The face of the kernels: validation, gradients, and the one choice of backend.

Sparse matrices come as entries, in one of two layouts, with any number of leading batch axes *B:

- COO: entry n sits at (rows[n], cols[n]). Rows may repeat, in any order.
- ELL: row i owns p entries, entry q of them at (i, indices[i, q]).

Copies of an entry add up. An entry outside the matrix is absent: it contributes 0, its gradient
is 0, and nothing is read or written out of bounds. Each layout has one form, trilinear in values,
left and right operand, and its operations are the partial derivatives of that form; so each is the
gradient of the others, to any order of reverse-mode differentiation.

`implementation=None` picks a backend at trace time; a name forces that backend.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from . import xla

_BACKENDS = {"xla": xla}
_POSITIONS = ("indices", "rows", "cols")
_FLOATS = ("bfloat16", "float32", "float64")


def _choose(implementation):
    """The module that serves `implementation`."""
    if implementation is None:
        return xla
    if implementation not in _BACKENDS:
        names = ", ".join(map(repr, _BACKENDS))
        raise ValueError(f"implementation must be None or one of {names}, got {implementation!r}")
    return _BACKENDS[implementation]


def _check(implementation, **arguments):
    """Raise a ValueError unless shapes and dtypes agree; return the arguments as arrays.

    Each argument is (array, axes): one letter for each trailing axis, equal letters equal sizes.
    Positions (`indices`, `rows`, `cols`) are int32; all other arguments share one float dtype.
    """
    _choose(implementation)
    arrays = [jnp.asarray(array) for array, _ in arguments.values()]
    sizes, batch, dtype = {}, None, None
    for array, (name, (_, axes)) in zip(arrays, arguments.items(), strict=True):
        lead, trailing = array.shape[: -len(axes)], array.shape[-len(axes) :]
        batch = lead if batch is None else batch
        expected = tuple(
            sizes.setdefault(axis, size) for axis, size in zip(axes, trailing, strict=False)
        )
        if array.ndim < len(axes) or lead != batch or trailing != expected:
            wanted = ", ".join(f"{axis}={sizes[axis]}" for axis in axes if axis in sizes)
            raise ValueError(
                f"{name} must have shape [*B,{','.join(axes)}] with *B={batch}, {wanted}; "
                f"got {array.shape}"
            )
        if name in _POSITIONS:
            if array.dtype != jnp.int32:
                raise ValueError(f"{name} must be int32, got {array.dtype}")
        elif array.dtype.name not in _FLOATS:
            raise ValueError(f"{name} must be one of {', '.join(_FLOATS)}; got {array.dtype}")
        elif array.dtype != (dtype := dtype or array.dtype):
            raise ValueError(f"{name} must be {dtype} like the others, got {array.dtype}")
    return _vary_alike(arrays)


def _vary_alike(arrays):
    """Inside shard_map: every array varies over the mesh axes that any of them varies over.

    A custom gradient must vary as its operand does; the transpose of this cast sums over shards.
    """
    varying = [jax.typeof(array).manual_axis_type.varying for array in arrays]
    axes = frozenset().union(*varying)
    return [
        jax.lax.pcast(array, tuple(axes - own), to="varying")
        for array, own in zip(arrays, varying, strict=True)
    ]


def _check_size(name, size):
    if not isinstance(size, int | np.integer) or size < 0:
        raise ValueError(f"{name} must be a static integer of at least 0, got {size!r}")
    return int(size)


def ell_spmm(indices, values, dense, *, implementation=None):
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
    arrays = _check(
        implementation, indices=(indices, "ip"), values=(values, "ip"), dense=(dense, "jd")
    )
    return _ell_spmm(implementation, *arrays)


def ell_spmm_transposed(indices, values, dense, *, num_cols, implementation=None):
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
    arrays = _check(
        implementation, indices=(indices, "ip"), values=(values, "ip"), dense=(dense, "id")
    )
    return _ell_spmm_transposed(implementation, _check_size("num_cols", num_cols), *arrays)


def ell_sddmm(indices, lhs, rhs, *, implementation=None):
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
    arrays = _check(implementation, indices=(indices, "ip"), lhs=(lhs, "id"), rhs=(rhs, "jd"))
    return _ell_sddmm(implementation, *arrays)


def spmm(rows, cols, values, dense, *, num_rows, implementation=None):
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
    arrays = _check(
        implementation,
        rows=(rows, "n"),
        cols=(cols, "n"),
        values=(values, "n"),
        dense=(dense, "jd"),
    )
    return _spmm(implementation, _check_size("num_rows", num_rows), *arrays)


def sddmm(rows, cols, lhs, rhs, *, implementation=None):
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
    arrays = _check(
        implementation, rows=(rows, "n"), cols=(cols, "n"), lhs=(lhs, "id"), rhs=(rhs, "jd")
    )
    return _sddmm(implementation, *arrays)


def _run(operation, like, shape, *operands, **sizes):
    """`operation` on operands of which none is empty, else the zeros of an empty sum."""
    if all(operand.size for operand in operands) and 0 not in shape:
        return operation(*operands, **sizes)
    return jnp.zeros(shape, like.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ell_spmm(implementation, indices, values, dense):
    shape = (*indices.shape[:-1], dense.shape[-1])
    return _run(_choose(implementation).ell_spmm, dense, shape, indices, values, dense)


def _ell_spmm_bwd(implementation, residuals, grad):
    indices, values, dense = residuals
    num_cols = dense.shape[-2]
    return (
        None,
        _ell_sddmm(implementation, indices, grad, dense),
        _ell_spmm_transposed(implementation, num_cols, indices, values, grad),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _ell_spmm_transposed(implementation, num_cols, indices, values, dense):
    shape = (*indices.shape[:-2], num_cols, dense.shape[-1])
    operation = _choose(implementation).ell_spmm_transposed
    return _run(operation, dense, shape, indices, values, dense, num_cols=num_cols)


def _ell_spmm_transposed_bwd(implementation, _, residuals, grad):
    indices, values, dense = residuals
    return (
        None,
        _ell_sddmm(implementation, indices, dense, grad),
        _ell_spmm(implementation, indices, values, grad),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ell_sddmm(implementation, indices, lhs, rhs):
    return _run(_choose(implementation).ell_sddmm, lhs, indices.shape, indices, lhs, rhs)


def _ell_sddmm_bwd(implementation, residuals, grad):
    indices, lhs, rhs = residuals
    num_cols = rhs.shape[-2]
    return (
        None,
        _ell_spmm(implementation, indices, grad, rhs),
        _ell_spmm_transposed(implementation, num_cols, indices, grad, lhs),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _spmm(implementation, num_rows, rows, cols, values, dense):  # noqa: PLR0917
    shape = (*rows.shape[:-1], num_rows, dense.shape[-1])
    operation = _choose(implementation).spmm
    return _run(operation, dense, shape, rows, cols, values, dense, num_rows=num_rows)


def _spmm_bwd(implementation, _, residuals, grad):
    rows, cols, values, dense = residuals
    return (
        None,
        None,
        _sddmm(implementation, rows, cols, grad, dense),
        _spmm(implementation, dense.shape[-2], cols, rows, values, grad),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sddmm(implementation, rows, cols, lhs, rhs):
    return _run(_choose(implementation).sddmm, lhs, rows.shape, rows, cols, lhs, rhs)


def _sddmm_bwd(implementation, residuals, grad):
    rows, cols, lhs, rhs = residuals
    return (
        None,
        None,
        _spmm(implementation, lhs.shape[-2], rows, cols, grad, rhs),
        _spmm(implementation, rhs.shape[-2], cols, rows, grad, lhs),
    )


def _define_gradient(operation, backward):
    """Operands are the residuals: each operation is linear in every operand it differentiates."""
    skip = len(operation.nondiff_argnums)
    operation.defvjp(lambda *args: (operation(*args), args[skip:]), backward)


_define_gradient(_ell_spmm, _ell_spmm_bwd)
_define_gradient(_ell_spmm_transposed, _ell_spmm_transposed_bwd)
_define_gradient(_ell_sddmm, _ell_sddmm_bwd)
_define_gradient(_spmm, _spmm_bwd)
_define_gradient(_sddmm, _sddmm_bwd)
