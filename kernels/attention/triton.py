"""Pallas-Triton: gathered attention on NVIDIA GPUs, one pointer for each element.

Triton is the one Pallas route on a GPU with loads from a vector of row numbers, and upstream has
deprecated it: this file stays until plain JAX or Mosaic GPU is as fast
(benchmarks/results/h200.json).

A kernel serves one matrix; the batch becomes an axis of its grid. Absent entries and the ragged
ends of tiles are masked, never padded; sums are made in float32. The number of an entry is an
int32. Gradients of keys and values are added by atomics, in any order.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from ..numerics import finite, in_bounds, scaled

_MAX_ENTRIES = 2**31 - 1
_MAX_HEAD = 256
# Elements of keys or values that a program holds at once, and the most entries of a row, or
# features of an entry, among them: four vector loads of float32 for each of 128 threads.
_TILE, _ENTRIES, _FEATURES = 2048, 16, 128


def lacks(_, q, k, v, indices, *others, **sizes):
    """Why these operands cannot be served; empty where they can."""
    del k, others, sizes
    if q.dtype == jnp.float64:
        return "it computes in float32, got float64"
    if math.prod(indices.shape[1:]) > _MAX_ENTRIES:
        return f"it numbers at most {_MAX_ENTRIES} entries"
    if (head := max(q.shape[-1], v.shape[-1])) > _MAX_HEAD:
        return f"it holds at most {_MAX_HEAD} features of a head, got {head}"
    return ""


def gathered_attention(q, k, v, indices, log_weights, *, scale, interpret):
    """Of one batch axis: an online softmax over tiles of entries."""

    def one(q, k, v, indices, log_weights):
        indices, t = _present(indices, log_weights), q.shape[0]
        block = _attention_tile(indices, q, v)
        return _call(
            functools.partial(_attention_kernel, block=block),
            (pl.cdiv(t, block[0]),),
            [((t, v.shape[1]), q.dtype), ((t,), jnp.float32)],
            indices,
            log_weights,
            q,
            k,
            v,
            interpret=interpret,
        )

    return jax.vmap(one)(scaled(q, scale), k, v, indices, log_weights)


def gathered_attention_grad(
    q, k, v, indices, log_weights, out, log_sum_exp, grad, *, scale, interpret
):
    """Of one batch axis: keys and values are gathered once.

    The kernel leaves softmax weights and logit gradients, [t,p] each, for the scatters to k and v.
    """

    def one(q, k, v, indices, log_weights, out, log_sum_exp, grad):
        indices = _present(indices, log_weights)
        block = _attention_tile(indices, q, v)
        dq, dlogits, weights = _call(
            functools.partial(_attention_grad_kernel, block=block),
            (pl.cdiv(q.shape[0], block[0]),),
            [(q.shape, q.dtype), (indices.shape, jnp.float32), (indices.shape, jnp.float32)],
            indices,
            log_weights,
            q,
            k,
            v,
            out,
            log_sum_exp,
            grad,
            interpret=interpret,
        )
        scatter = functools.partial(_scatter, num_rows=k.shape[0], interpret=interpret)
        dk, dv = scatter(indices, dlogits, q), scatter(indices, weights, grad)
        return scaled(dq, scale), dk.astype(k.dtype), dv.astype(v.dtype), dlogits

    return jax.vmap(one)(scaled(q, scale), k, v, indices, log_weights, out, log_sum_exp, grad)


def _call(kernel, grid, outputs, *operands, interpret, aliases=None):
    """`kernel` over `grid`, on whole arrays; `outputs` are pairs of a shape and a dtype."""
    varying = jax.typeof(operands[0]).manual_axis_type
    return pl.pallas_call(
        kernel,
        grid=grid,
        out_shape=tuple(jax.ShapeDtypeStruct(*out, manual_axis_type=varying) for out in outputs),
        input_output_aliases=aliases or {},
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name=kernel.func.__name__.strip("_"),
    )(*operands)


def _block(*axes):
    """Powers of 2, at most _TILE in product: for each (size, limit), the last axes first."""
    block, left = [], _TILE
    for size, limit in reversed(axes):
        block.append(min(pl.next_power_of_2(size), limit, left))
        left //= block[-1]
    return tuple(reversed(block))


def _range(axis, size):
    """The numbers of the rows or columns of this program's block along an axis of the grid."""
    return pl.program_id(axis) * size + jnp.arange(size, dtype=jnp.int32)


def _load(ref, index, mask, other=0):
    """Elements of `ref` at a tuple of index arrays, broadcast; `other` where `mask` is False."""
    index = tuple(jnp.broadcast_to(i, mask.shape) for i in index)
    return plt.load(ref.at[index], mask=mask, other=other)


def _load_floats(ref, index, mask):
    return _load(ref, index, mask).astype(jnp.float32)


def _store(ref, index, value, mask):
    index = tuple(jnp.broadcast_to(i, mask.shape) for i in index)
    plt.store(ref.at[index], value.astype(ref.dtype), mask=mask)


def _scatter(targets, values, dense, *, num_rows, interpret):
    """out[j] = sum over the entries with targets[i, q] = j of values[i, q] dense[i].

    Args:
      targets: int32 [i,p].
      values: float [i,p].
      dense: float [i,d].
      num_rows: rows of the result.
      interpret: whether to run in interpret mode.

    Returns:
      float32 [num_rows,d].
    """
    p, d, n = targets.shape[1], dense.shape[1], targets.size
    block = _block((n, _TILE), (d, _FEATURES))
    zeros = jnp.zeros_like(dense, jnp.float32, shape=(num_rows, d))
    (out,) = _call(
        functools.partial(_scatter_kernel, p=p, block=block),
        (pl.cdiv(n, block[0]), pl.cdiv(d, block[1])),
        [(zeros.shape, zeros.dtype)],
        targets.reshape(-1),
        values.reshape(-1),
        dense,
        zeros,
        aliases={3: 0},
        interpret=interpret,
    )
    return out


def _scatter_kernel(targets_ref, values_ref, dense_ref, _, out_ref, *, p, block):
    (num_rows, d), n = out_ref.shape, targets_ref.shape[0]
    entries, cols = _range(0, block[0]), _range(1, block[1])
    targets = _load(targets_ref, (entries,), entries < n, -1)
    present = in_bounds(targets, num_rows)
    sources = entries // p
    values = _load_floats(values_ref, (entries,), present)
    cells = present[:, None] & (cols < d)[None]
    dense = _load_floats(dense_ref, (sources[:, None], cols[None]), cells)
    # This addition has no mask: what is absent adds 0, somewhere inside and not all in one place.
    targets = jnp.where(present, targets, lax.rem(entries, num_rows))
    index = (targets[:, None], lax.rem(cols, d)[None])
    index = tuple(jnp.broadcast_to(i, cells.shape) for i in index)
    jax.ref.addupdate(out_ref, index, values[:, None] * dense)


def _present(indices, log_weights):
    """The indices, -1 where an entry has no weight."""
    return jnp.where(log_weights > -jnp.inf, indices, -1)


def _attention_tile(indices, q, v):
    (t, p), d = indices.shape, max(q.shape[1], v.shape[1])
    return _block((t, _TILE), (p, _ENTRIES), (d, _MAX_HEAD))[:2]


def _row_tile(ref, rows, mask):
    """Rows of [n,d] with all their features, to the next power of 2, as floats."""
    d = ref.shape[1]
    features = jnp.arange(pl.next_power_of_2(d), dtype=jnp.int32)
    features = features.reshape(*(1,) * rows.ndim, -1)
    return _load_floats(ref, (rows[..., None], features), mask[..., None] & (features < d))


def _attention_logits(indices_ref, log_weights_ref, k_ref, queries, rows, valid, q):
    """Entries q of each row: their rows in k and v, which are present, their keys and logits."""
    cells = valid[:, None] & (q < indices_ref.shape[1])
    sources = _load(indices_ref, (rows[:, None], q), cells, -1)
    present = in_bounds(sources, k_ref.shape[0])
    log_weights = _load_floats(log_weights_ref, (rows[:, None], q), present)
    keys = _row_tile(k_ref, sources, present)
    logits = jnp.sum(queries[:, None] * keys, axis=2) + log_weights
    return sources, present, keys, jnp.where(present, logits, -jnp.inf)


def _attention_kernel(
    indices_ref, log_weights_ref, q_ref, k_ref, v_ref, out_ref, log_sum_exp_ref, *, block
):
    (num_rows, p), e = indices_ref.shape, v_ref.shape[1]
    rows = _range(0, block[0])
    valid = rows < num_rows
    queries = _row_tile(q_ref, rows, valid)

    def step(n, state):
        top, total, out = state
        q = n * block[1] + jnp.arange(block[1], dtype=jnp.int32)[None]
        sources, present, _, logits = _attention_logits(
            indices_ref, log_weights_ref, k_ref, queries, rows, valid, q
        )
        higher = jnp.maximum(top, jnp.max(logits, axis=1))
        weights = jnp.exp(logits - finite(higher)[:, None])
        decay = jnp.exp(top - finite(higher))
        values = _row_tile(v_ref, sources, present)
        out = out * decay[:, None] + jnp.sum(weights[:, :, None] * values, axis=1)
        return higher, total * decay + jnp.sum(weights, axis=1), out

    features = jnp.arange(pl.next_power_of_2(e), dtype=jnp.int32)
    state = (
        jnp.full(rows.shape, -jnp.inf, jnp.float32),
        jnp.zeros(rows.shape, jnp.float32),
        jnp.zeros((block[0], features.size), jnp.float32),
    )
    top, total, out = lax.fori_loop(0, pl.cdiv(p, block[1]), step, state)
    total = jnp.maximum(total, 1)
    cells = valid[:, None] & (features < e)[None]
    _store(out_ref, (rows[:, None], features[None]), out / total[:, None], cells)
    _store(log_sum_exp_ref, (rows,), finite(top) + jnp.log(total), valid)


def _attention_grad_kernel(
    indices_ref,
    log_weights_ref,
    q_ref,
    k_ref,
    v_ref,
    out_ref,
    log_sum_exp_ref,
    grad_ref,
    dq_ref,
    dlogits_ref,
    weights_ref,
    *,
    block,
):
    (num_rows, p), d = indices_ref.shape, q_ref.shape[1]
    rows = _range(0, block[0])
    valid = rows < num_rows
    queries, grad = _row_tile(q_ref, rows, valid), _row_tile(grad_ref, rows, valid)
    log_sum_exp = _load(log_sum_exp_ref, (rows,), valid)
    mean_grad = jnp.sum(grad * _row_tile(out_ref, rows, valid), axis=1)

    def step(n, dq):
        q = n * block[1] + jnp.arange(block[1], dtype=jnp.int32)[None]
        sources, present, keys, logits = _attention_logits(
            indices_ref, log_weights_ref, k_ref, queries, rows, valid, q
        )
        weights = jnp.exp(logits - log_sum_exp[:, None])
        values = _row_tile(v_ref, sources, present)
        dweights = jnp.sum(grad[:, None] * values, axis=2)
        dlogits = jnp.where(present, weights * (dweights - mean_grad[:, None]), 0)
        cells = valid[:, None] & (q < p)
        _store(weights_ref, (rows[:, None], q), weights, cells)
        _store(dlogits_ref, (rows[:, None], q), dlogits, cells)
        return dq + jnp.sum(dlogits[:, :, None] * keys, axis=1)

    dq = lax.fori_loop(0, pl.cdiv(p, block[1]), step, jnp.zeros(queries.shape, jnp.float32))
    features = jnp.arange(queries.shape[1], dtype=jnp.int32)
    cells = valid[:, None] & (features < d)[None]
    _store(dq_ref, (rows[:, None], features[None]), dq, cells)
