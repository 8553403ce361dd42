"""The face of the kernels: validation and gradients; `dispatch` has the one choice of backend.

Sparse matrices come as entries, in one of two layouts, with any number of leading batch axes *B:

- COO: entry n sits at (rows[n], cols[n]). Rows may repeat, in any order.
- ELL: row i owns p entries, entry q of them at (i, indices[i, q]).

Copies of an entry add up. An entry outside the matrix is absent: it contributes 0, its gradient
is 0, and nothing is read or written out of bounds. Each layout has one form, trilinear in values,
left and right operand, and its operations are the partial derivatives of that form; so each is the
gradient of the others, to any order of reverse-mode differentiation. `redistribute` and the two
attentions are differentiable once.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from . import dispatch, xla

_POSITIONS = ("indices", "block_indices", "rows", "cols", "points")
_FLOATS = ("bfloat16", "float32", "float64")
# Below this sigma, in indices, a Gaussian is a point; and beyond this coordinate there is no index.
# Together they keep squared distances, and their products with 1 / sigma^2, inside float32.
_MIN_SIGMA = 1e-5
_MAX_COORDINATE = 2.0**32


def _check(implementation, **arguments):
    """Raise a ValueError unless shapes and dtypes agree; return the arguments as arrays.

    Each argument is (array, axes): a name for each trailing axis, equal names equal sizes.
    Positions are int32, `where` is bool; all other arguments share one float dtype.
    """
    dispatch.check(implementation)
    arrays = [jnp.asarray(array) for array, _ in arguments.values()]
    sizes, batch, dtype = {}, None, None
    for array, (name, (_, axes)) in zip(arrays, arguments.items(), strict=True):
        lead, trailing = array.shape[: -len(axes)], array.shape[-len(axes) :]
        batch = lead if batch is None else batch
        expected = tuple(
            sizes.setdefault(axis, size) for axis, size in zip(axes, trailing, strict=False)
        )
        if array.ndim < len(axes) or lead != batch or trailing != expected:
            known = "".join(f", {axis} = {sizes[axis]}" for axis in axes if axis in sizes)
            raise ValueError(
                f"{name}: got shape {array.shape}, want [*B,{','.join(axes)}] with "
                f"*B = {batch}{known}"
            )
        if name in _POSITIONS or name == "where":
            want = "bool" if name == "where" else "int32"
            if array.dtype != want:
                raise ValueError(f"{name}: got {array.dtype}, want {want}")
        elif array.dtype.name not in _FLOATS:
            raise ValueError(f"{name}: got {array.dtype}, want one of {', '.join(_FLOATS)}")
        elif array.dtype != (dtype := dtype or array.dtype):
            raise ValueError(f"{name}: got {array.dtype}, want {dtype} like the others")
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


def _check_size(name, size, minimum=0):
    if not isinstance(size, int | np.integer) or size < minimum:
        raise ValueError(f"{name}: got {size!r}, want a static integer of at least {minimum}")
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


def redistribute(points, means, sigmas, values, where, *, implementation=None):
    """Spreads the value of each tuple over the points, in proportion to its Gaussian density.

    out[i] = sum over j of values[j] softmax_i(-|(points[i] - means[j]) / sigmas[j]|^2 / 2), over
    the points that `where` allows. Densities are taken relative to the densest point, so nothing
    overflows; a tuple without an allowed point adds nothing. No array of size m x k is formed
    where m and k are large.

    Args:
      points: int32 [*B,m,r], r >= 1. Copies are points of their own.
      means: float [*B,k,r], taken to lie within 2^32 of 0.
      sigmas: float [*B,k,r], of the dtype of `means`; below 1e-5 they count as 1e-5.
      values: float [*B,k], of the dtype of `means`.
      where: bool [*B,m].
      implementation: backend by name, or None to choose.

    Returns:
      [*B,m], of the dtype of `values`; 0 where `where` is False.

    Raises:
      ValueError: on a shape, dtype or implementation other than these.
    """
    points, means, sigmas, values, where = _check(
        implementation,
        points=(points, "mr"),
        means=(means, "kr"),
        sigmas=(sigmas, "kr"),
        values=(values, "k"),
        where=(where, "m"),
    )
    _check_axis("points", points, "r")
    dtype = xla.accumulator(values.dtype)
    means = jnp.clip(means.astype(dtype), -_MAX_COORDINATE, _MAX_COORDINATE)
    # The gradient of `maximum`, which shares ties, takes longer.
    sigmas = jnp.where(sigmas < _MIN_SIGMA, _MIN_SIGMA, sigmas.astype(dtype))
    if values.shape[-1] == 1 and implementation in (None, "xla"):
        out = values.astype(dtype) * _shares(implementation, points, means, sigmas, where)
    else:
        out = _redistribute(implementation, points, means, sigmas, values.astype(dtype), where)
    return out.astype(values.dtype)


def gathered_attention(q, k, v, indices, log_weights, *, implementation=None):
    """Attention of each query over its own p keys, those at `indices`.

    out[i] = sum over a of softmax_a(q[i] . k[indices[i, a]] + log_weights[i, a]) v[indices[i, a]].
    Entries at the same key are entries of their own: their weights add up. A log weight of -inf
    or an index outside [0, s) makes an entry absent; a query without entries gets 0. Gradients are
    finite in every case.

    Args:
      q: float [*B,t,d], d >= 1, already scaled.
      k: float [*B,s,d], of the dtype of `q`.
      v: float [*B,s,dv], of the dtype of `q`.
      indices: int32 [*B,t,p].
      log_weights: float [*B,t,p], of the dtype of `q`.
      implementation: backend by name, or None to choose.

    Returns:
      [*B,t,dv], of the dtype of `q`. The softmax is made in float32 at least.

    Raises:
      ValueError: on a shape, dtype or implementation other than these.
    """
    arrays = _check(
        implementation,
        q=(q, "td"),
        k=(k, "sd"),
        v=(v, ("s", "dv")),
        indices=(indices, "tp"),
        log_weights=(log_weights, "tp"),
    )
    _check_axis("q", arrays[0], "d")
    return _attention("gathered_attention", implementation, (), *arrays)


def block_attention(q, k, v, block_indices, log_weights, *, block, causal, implementation=None):
    """Attention of each block of queries over its own p blocks of keys, those at `block_indices`.

    Query block i consists of the queries [i * block, (i + 1) * block), key block j likewise. All
    queries of block i see all keys of block j = block_indices[i, a], with log_weights[i, a] added
    to their logits; if `causal`, only the keys at or before the position of the query: those of
    earlier blocks and, in the block where j = i, the lower triangle. Entries at the same block are
    entries of their own: their weights add up. A log weight of -inf or an index outside
    [0, s / block) makes an entry absent; a query without keys gets 0. Gradients are finite in
    every case.

    Args:
      q: float [*B,t,d], d >= 1, already scaled; t a multiple of `block`.
      k: float [*B,s,d], of the dtype of `q`; s a multiple of `block`.
      v: float [*B,s,dv], of the dtype of `q`.
      block_indices: int32 [*B,t/block,p].
      log_weights: float [*B,t/block,p], of the dtype of `q`.
      block: queries and keys in a block, a static integer of at least 1.
      causal: whether a query sees no key of a later position.
      implementation: backend by name, or None to choose.

    Returns:
      [*B,t,dv], of the dtype of `q`. The softmax is made in float32 at least.

    Raises:
      ValueError: on a shape, dtype, size or implementation other than these.
    """
    arrays = _check(
        implementation,
        q=(q, "td"),
        k=(k, "sd"),
        v=(v, ("s", "dv")),
        block_indices=(block_indices, ("t/block", "p")),
        log_weights=(log_weights, ("t/block", "p")),
    )
    _check_axis("q", arrays[0], "d")
    block = _check_size("block", block, minimum=1)
    t, s, rows = (x.shape[-2] for x in (arrays[0], arrays[1], arrays[3]))
    if t != rows * block or s % block:
        raise ValueError(
            f"block: got {block} for {t} queries in {rows} blocks and {s} keys, "
            f"want t = blocks * block and s a multiple of block"
        )
    sizes = (("block", block), ("causal", bool(causal)))
    return _attention("block_attention", implementation, sizes, *arrays)


def _check_axis(name, array, axis):
    """The last axis of `array`, called `axis`, must not be empty."""
    if array.shape[-1] == 0:
        raise ValueError(f"{name}: got shape {array.shape}, want {axis} >= 1")


def _result(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ell_spmm(implementation, indices, values, dense):
    *batch, i, _ = indices.shape
    result = _result(dense.dtype, *batch, i, dense.shape[-1])
    return dispatch.run(implementation, "ell_spmm", len(batch), result, indices, values, dense)


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
    *batch, _, d = dense.shape
    return dispatch.run(
        implementation,
        "ell_spmm_transposed",
        len(batch),
        _result(dense.dtype, *batch, num_cols, d),
        indices,
        values,
        dense,
        num_cols=num_cols,
    )


def _ell_spmm_transposed_bwd(implementation, _, residuals, grad):
    indices, values, dense = residuals
    return (
        None,
        _ell_sddmm(implementation, indices, dense, grad),
        _ell_spmm(implementation, indices, values, grad),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ell_sddmm(implementation, indices, lhs, rhs):
    result = _result(lhs.dtype, *indices.shape)
    return dispatch.run(implementation, "ell_sddmm", indices.ndim - 2, result, indices, lhs, rhs)


def _ell_sddmm_bwd(implementation, residuals, grad):
    indices, lhs, rhs = residuals
    num_cols = rhs.shape[-2]
    return (
        None,
        _ell_spmm(implementation, indices, grad, rhs),
        _ell_spmm_transposed(implementation, num_cols, indices, grad, lhs),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _spmm(implementation, num_rows, rows, cols, values, dense):
    *batch, _ = rows.shape
    return dispatch.run(
        implementation,
        "spmm",
        len(batch),
        _result(dense.dtype, *batch, num_rows, dense.shape[-1]),
        rows,
        cols,
        values,
        dense,
        num_rows=num_rows,
    )


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
    result = _result(lhs.dtype, *rows.shape)
    return dispatch.run(implementation, "sddmm", rows.ndim - 1, result, rows, cols, lhs, rhs)


def _sddmm_bwd(implementation, residuals, grad):
    rows, cols, lhs, rhs = residuals
    return (
        None,
        None,
        _spmm(implementation, lhs.shape[-2], rows, cols, grad, rhs),
        _spmm(implementation, rhs.shape[-2], cols, rows, grad, lhs),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _redistribute(implementation, points, means, sigmas, values, where):
    operands = (points, means, sigmas, values, where)
    result = _result(values.dtype, *where.shape)
    return dispatch.run(implementation, "redistribute", where.ndim - 1, result, *operands)


def _redistribute_bwd(implementation, residuals, grad):
    _, means, sigmas, values, _ = residuals
    results = (means, sigmas, values)
    leading = grad.ndim - 1
    grads = dispatch.run(implementation, "redistribute_grad", leading, results, *residuals, grad)
    return None, *grads, None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _shares(implementation, points, means, sigmas, where):
    """What a chunk's only tuple gives to the points, for a value of 1."""
    return _redistribute(implementation, points, means, sigmas, jnp.ones_like(means[..., 0]), where)


def _shares_fwd(implementation, points, means, sigmas, where):
    shares = _shares(implementation, points, means, sigmas, where)
    return shares, (points, means, sigmas, shares)


def _shares_bwd(implementation, residuals, grad):
    _, means, sigmas, _ = residuals
    leading = grad.ndim - 1
    grads = dispatch.run(
        implementation, "single_tuple_grad", leading, (means, sigmas), *residuals, grad
    )
    return None, *grads, None


_shares.defvjp(_shares_fwd, _shares_bwd)


def _define_gradient(operation, backward):
    """The operands are the residuals."""
    skip = len(operation.nondiff_argnums)
    operation.defvjp(lambda *args: (operation(*args), args[skip:]), backward)


_define_gradient(_ell_spmm, _ell_spmm_bwd)
_define_gradient(_ell_spmm_transposed, _ell_spmm_transposed_bwd)
_define_gradient(_ell_sddmm, _ell_sddmm_bwd)
_define_gradient(_spmm, _spmm_bwd)
_define_gradient(_sddmm, _sddmm_bwd)
_define_gradient(_redistribute, _redistribute_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attention(operation, implementation, sizes, *operands):
    return _attention_fwd(operation, implementation, sizes, *operands)[0]


def _attention_fwd(operation, implementation, sizes, *operands):
    q, _, v, *_ = operands
    *batch, t, _ = q.shape
    results = (
        _result(q.dtype, *batch, t, v.shape[-1]),
        _result(xla.accumulator(q.dtype), *batch, t),
    )
    out, log_sum_exp = dispatch.run(
        implementation, operation, len(batch), results, *operands, **dict(sizes)
    )
    return out, (*operands, out, log_sum_exp)


def _attention_bwd(operation, implementation, sizes, residuals, grad):
    q, k, v, _, log_weights, *_ = residuals
    dq, dk, dv, dlog_weights = dispatch.run(
        implementation,
        f"{operation}_grad",
        q.ndim - 2,
        (q, k, v, log_weights),
        *residuals,
        grad,
        **dict(sizes),
    )
    return dq, dk, dv, None, dlog_weights


_attention.defvjp(_attention_fwd, _attention_bwd)
