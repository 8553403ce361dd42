"""Pallas-Mosaic for TPU v5e and v6e: attention over blocks of keys, which stay in VMEM.

The walk is that of the products, with blocks of keys in place of rows, and the MXU for the work.
Gathered attention is made of those products.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .. import tpu
from ..numerics import scaled
from ..products import tpu as products
from . import reference

# Keys that the vector core works on at a time.
_KEYS = 512


def lacks(operation, q, k, v, indices, *others, block=tpu.SUBLANES, **_):
    """Why `operation` cannot be served on these operands, in words; "" where it can."""
    if block % tpu.SUBLANES or block > tpu.LANES:
        return f"block = {block} is no multiple of {tpu.SUBLANES} up to {tpu.LANES}"
    if operation.startswith("gathered"):
        return products.lacks("ell_sddmm", indices, v, k) or products.lacks(
            "ell_spmm", indices, k, v
        )
    if indices.shape[-1] > products.BLOCK_ENTRIES:
        return (
            f"p = {indices.shape[-1]} is above {products.BLOCK_ENTRIES}, what SMEM holds of a row"
        )
    gradients = 4 * operation.endswith("_grad")
    return tpu.lacks_memory((q, *others), _kept(k, v, block, gradients))


def _kept(k, v, block, gradients=0):
    """Bytes of keys and values, each number with those of its gradient."""
    itemsize = _tiled(k.dtype, block).itemsize + gradients
    return sum(tpu.kept_bytes(x, itemsize) for x in (k, v))


def _own_products(interpret, *names):
    return {n: functools.partial(getattr(products, f"ell_{n}"), interpret=interpret) for n in names}


def _tiled(dtype, block):
    """The dtype of arrays that are cut in blocks: tiles of bfloat16 have 16 rows, of float32 8."""
    return jnp.dtype(jnp.float32 if block % 16 else dtype)


def _row_blocks(*shape):
    """Block i of [b,i,...] in VMEM."""
    return pl.BlockSpec((None, None, *shape), lambda b, i: (b, i, 0, 0))


def gathered_attention(*operands, scale, interpret):
    """The plain meaning, made of the products of this backend; so is its gradient."""
    of = _own_products(interpret, "spmm", "sddmm")
    return reference.gathered_attention(*operands, scale=scale, **of)


def gathered_attention_grad(*operands, scale, interpret):
    of = _own_products(interpret, "spmm", "spmm_transposed", "sddmm")
    return reference.gathered_attention_grad(*operands, scale=scale, **of)


def _key_blocks(block_indices, log_weights, num_keys, block, causal, interpret):
    """Positions, -1 where absent, and log weights, -inf there: [b,t/block,1,p], p in whole steps.

    Also the number of entries in a step, whose keys are multiplied at once.
    """
    indices = tpu.present(block_indices, num_keys // block)
    log_weights = log_weights.astype(jnp.float32)
    present = (indices >= 0) & (log_weights != -jnp.inf)
    if causal:
        present &= indices <= lax.broadcasted_iota(jnp.int32, indices.shape, 1)
    p = indices.shape[-1]
    step = min(p, _KEYS // block, tpu.unroll(interpret))

    def blocks(array, absent):
        array = jnp.where(present, array, absent)
        return jnp.pad(array, ((0, 0), (0, 0), (0, -p % step)), constant_values=absent)[:, :, None]

    return blocks(indices, -1), blocks(log_weights, -jnp.inf), step


def _block(index, block):
    return pl.ds(pl.multiple_of(jnp.maximum(index, 0) * block, block), block)


def _block_logits(query_block, indices, log_weights, q, sources, targets, first, *, block, causal):
    """Logits [block,n] of the queries and the n keys of a step, -inf where a key is not seen.

    Copies the blocks of the step from `sources` to `targets`: keys, then values; 0 where absent.
    """
    shape = (block, targets[0].shape[0])
    column = lax.broadcasted_iota(jnp.int32, (1, shape[1]), 1)
    bias = jnp.full((1, shape[1]), -jnp.inf)
    # The first query of the block that sees the key.
    limit = jnp.full((1, shape[1]), block)
    for entry in range(shape[1] // block):
        index = indices[0, first + entry]
        rows = _block(index, block)
        for source, target in zip(sources, targets, strict=True):
            target[pl.ds(entry * block, block)] = jnp.where(index >= 0, source[rows], 0)
        own = column // block == entry
        bias = jnp.where(own, log_weights[0, first + entry], bias)
        seen = jnp.where(index >= 0, 0, block)
        if causal:
            diagonal = index == query_block
            limit = jnp.where(own, jnp.where(diagonal, column % block, seen), limit)
        else:
            limit = jnp.where(own, seen, limit)
    row = lax.broadcasted_iota(jnp.int32, shape, 0)
    logits = _dot(q[...], targets[0][...], 1, 1) + bias
    return jnp.where(row >= limit, logits, -jnp.inf)


def _dot(lhs, rhs, lhs_axis, rhs_axis):
    """On the MXU: 16-bit operands as they are, float32 without loss."""
    return lax.dot_general(
        lhs,
        rhs,
        (((lhs_axis,), (rhs_axis,)), ((), ())),
        precision=lax.Precision.HIGHEST if lhs.dtype == jnp.float32 else lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )


def _turn(vector):
    """A column [n,1] as a row [1,n], or a row as a column."""
    n, axis = max(vector.shape), int(vector.shape[0] == 1)
    row, column = (lax.broadcasted_iota(jnp.int32, (n, n), axis) for axis in range(2))
    return jnp.sum(jnp.where(row == column, vector, 0), axis=axis, keepdims=True)


def _block_attention_kernel(
    indices, log_weights, q, k, v, out, log_sum_exp, keys, values, *, step, **sizes
):
    arguments = (pl.program_id(1), indices, log_weights, q, (k, v), (keys, values))

    def add_step(t, state):
        top, total, sum_ = state
        logits = _block_logits(*arguments, t * step, **sizes)
        higher = jnp.maximum(top, jnp.max(logits, axis=1, keepdims=True))
        decay, weights = jnp.exp(top - higher), jnp.exp(logits - higher)
        total = total * decay + jnp.sum(weights, axis=1, keepdims=True)
        return higher, total, sum_ * decay + _dot(weights.astype(v.dtype), values[...], 1, 0)

    rows = q.shape[0]
    state = (
        jnp.full((rows, 1), -tpu.LARGEST),
        jnp.zeros((rows, 1), jnp.float32),
        jnp.zeros((rows, v.shape[1]), jnp.float32),
    )
    top, total, sum_ = lax.fori_loop(0, indices.shape[1] // step, add_step, state)
    # Either the top entry adds 1, or there is no entry.
    total = jnp.maximum(total, 1)
    out[...] = sum_ / total
    log_sum_exp[...] = _turn(jnp.where(top > -tpu.LARGEST, top, 0) + jnp.log(total))


def block_attention(q, k, v, block_indices, log_weights, *, block, causal, scale, interpret):
    """`gathered_attention` of blocks of queries over blocks of keys, and the log-sum-exps [b,t].

    One query block in each step of the grid, keys and values kept in VMEM.
    """
    dtype = q.dtype
    q, k, v = (x.astype(_tiled(dtype, block)) for x in (scaled(q, scale), k, v))
    b, t, d = q.shape
    indices, log_weights, step = _key_blocks(
        block_indices, log_weights, k.shape[1], block, causal, interpret
    )
    kept = _kept(k, v, block)
    out, log_sum_exp = tpu.call(
        functools.partial(_block_attention_kernel, step=step, block=block, causal=causal),
        (b, t // block),
        [
            tpu.scalars(indices),
            tpu.scalars(log_weights),
            (q, tpu.row_block(block, d)),
            (k, tpu.whole(k.shape, kept)),
            (v, tpu.whole(v.shape, kept)),
        ],
        [
            ((b, t, v.shape[2]), tpu.row_block(block, v.shape[2])),
            ((b, t // block, 1, block), _row_blocks(1, block)),
        ],
        scratch=[pltpu.VMEM((step * block, x.shape[2]), x.dtype) for x in (k, v)],
        interpret=interpret,
    )
    return out.astype(dtype), log_sum_exp.reshape(b, t)


def _block_attention_grad_kernel(
    indices, log_weights, q, k, v, grad, log_sum_exp, mean_grad, dq, dk, dv, dlogs, keys, values,
    *, step, block, causal,
):  # fmt: skip
    @pl.when(pl.program_id(1) == 0)
    def _():
        tpu.clear(dk)
        tpu.clear(dv)

    arguments = (pl.program_id(1), indices, log_weights, q, (k, v), (keys, values))

    top, mean = _turn(log_sum_exp[...]), _turn(mean_grad[...])

    def add_step(t, total):
        logits = _block_logits(*arguments, t * step, block=block, causal=causal)
        weights = jnp.exp(logits - top)
        dlogits = weights * (_dot(grad[...], values[...], 1, 1) - mean)
        dlogits = jnp.where(logits > -jnp.inf, dlogits, 0)
        dlogs[pl.ds(t, 1)] = jnp.sum(dlogits, axis=0, keepdims=True)
        dlogits, weights = dlogits.astype(k.dtype), weights.astype(k.dtype)
        dkeys, dvalues = _dot(dlogits, q[...], 0, 0), _dot(weights, grad[...], 0, 0)
        for entry in range(step):
            index = indices[0, t * step + entry]
            rows = _block(index, block)
            own = slice(entry * block, (entry + 1) * block)
            dk[rows] += jnp.where(index >= 0, dkeys[own], 0)
            dv[rows] += jnp.where(index >= 0, dvalues[own], 0)
        return total + _dot(dlogits, keys[...], 1, 0)

    zeros = jnp.zeros(q.shape, jnp.float32)
    dq[...] = lax.fori_loop(0, indices.shape[1] // step, add_step, zeros)


def block_attention_grad(
    q, k, v, block_indices, log_weights, out, log_sum_exp, grad, *, block, causal, scale, interpret
):
    """Gradients of q, k, v and log_weights: one kernel, which keeps those of k and v in VMEM."""
    dtype = q.dtype
    mean_grad = (out.astype(jnp.float32) * grad.astype(jnp.float32)).sum(-1)
    q, k, v, grad = (x.astype(_tiled(dtype, block)) for x in (scaled(q, scale), k, v, grad))
    b, rows, p = block_indices.shape
    d, dv = q.shape[2], v.shape[2]
    indices, log_weights, step = _key_blocks(
        block_indices, log_weights, k.shape[1], block, causal, interpret
    )
    steps = indices.shape[-1] // step
    kept = _kept(k, v, block, 4)
    keep_k, keep_v = tpu.whole(k.shape, kept), tpu.whole(v.shape, kept)
    dq, dk, dv, dlogs = tpu.call(
        functools.partial(_block_attention_grad_kernel, step=step, block=block, causal=causal),
        (b, rows),
        [
            tpu.scalars(indices),
            tpu.scalars(log_weights),
            (q, tpu.row_block(block, d)),
            (k, keep_k),
            (v, keep_v),
            (grad, tpu.row_block(block, dv)),
            (log_sum_exp.reshape(b, rows, 1, block), _row_blocks(1, block)),
            (mean_grad.reshape(b, rows, 1, block), _row_blocks(1, block)),
        ],
        [
            (q.shape, tpu.row_block(block, d)),
            (k.shape, keep_k),
            (v.shape, keep_v),
            ((b, rows, steps, step * block), _row_blocks(steps, step * block)),
        ],
        scratch=[pltpu.VMEM((step * block, x.shape[2]), x.dtype) for x in (k, v)],
        interpret=interpret,
    )
    dlogs = dlogs.reshape(b, rows, steps * step, block)[:, :, :p].sum(-1)
    return *(x.astype(dtype) for x in (dq * scale, dk, dv)), dlogs
