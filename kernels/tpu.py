"""Pallas-Mosaic for TPU v5e and v6e: what entries point into stays in VMEM, rows or blocks of it.

A TPU has no gather from a vector of positions. It has a load of any row of VMEM, whose number the
scalar core reads from SMEM. So the operand that entries point into, or the result they add to, is
kept in VMEM whole, once for each matrix of the batch, and the scalar core walks the entries, which
pass through SMEM in blocks. Bundles that libtpu schedules for v5e, float32 and 64 features, for an
entry of a row of 10, and for one that is alone in its row:

    ell_spmm                5.5 and 5.4
    ell_spmm_transposed     5.0 and 6.4
    ell_sddmm               3.2 and 2.6

whatever the number of columns, and HBM moves every operand once. The alternative, a one-hot tile of
the sparse matrix times the dense operand on the MXU, does the work of a dense product: by a count
of operations 1.2 cycles an entry for each 1000 columns, so less below some 4000 columns and without
bound above. Rows cost what the entries cost, and 96 MiB of VMEM keep 196608 of them. None of this
is measured: no kernel here has run on a TPU.

COO products are ELL products with one entry in a row, there and back, and gathered attention is
made of ELL products. Block attention is the same walk with blocks of keys in place of rows, and the
MXU for the work. `redistribute` makes the shares of 8 tuples in all points of a chunk, in VMEM: a
chunk costs 8 tuples and 128 points at least, so small chunks are better served by `xla`.

Sums are float32 and run in the order of the entries: the same operands give the same bits. Absent
entries are masked; blocks of SMEM are padded with absent entries, ragged blocks of VMEM are not
padded but ignored.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from . import xla

_SUBLANES, _LANES = 8, 128
# Of 128 MiB of VMEM: what a kernel may use, and how much of that for operands kept whole.
_VMEM = 112 * 2**20
_KEPT = 96 * 2**20
# Entries and numbers in a block of rows. SMEM has 1 MiB, for two buffers of positions and values.
_BLOCK_ENTRIES = 4096
_BLOCK_NUMBERS = 2**17
# Points, or keys, that the vector core works on at a time.
_POINTS = 512
_KEYS = 512
_LARGEST = float(jnp.finfo(jnp.float32).max)


def lacks(operation, *operands, **sizes):
    """Why `operation` cannot be served on these operands, in words; "" where it can."""
    if any(x.dtype == jnp.float64 for x in operands):
        return "a TPU has no float64"
    block = sizes.get("block", _SUBLANES)
    if block % _SUBLANES or block > _LANES:
        return f"block = {block} is no multiple of {_SUBLANES} up to {_LANES}"
    entries = _entries_in_a_row(operation, operands)
    if entries > _BLOCK_ENTRIES:
        return f"p = {entries} is above {_BLOCK_ENTRIES}, what SMEM holds of a row"
    kept = _kept(operation, operands, sizes)
    if kept > _KEPT:
        return f"VMEM keeps {_KEPT >> 20} MiB of operands, not the {kept / 2**20:.0f} MiB of these"
    return ""


def _entries_in_a_row(operation, operands):
    if operation.startswith("ell"):
        return operands[0].shape[-1]
    return operands[3].shape[-1] if "attention" in operation else 1


def _kept(operation, operands, sizes):
    """Bytes of the operands and results that a kernel of `operation` keeps in VMEM."""
    block = sizes.get("block")
    match operation:
        case "ell_spmm" | "ell_sddmm":
            kept = _bytes(operands[2])
        case "ell_spmm_transposed":
            kept = _bytes(operands[2], rows=sizes["num_cols"])
        case "spmm":
            kept = max(_bytes(operands[3]), _bytes(operands[3], rows=sizes["num_rows"]))
        case "sddmm":
            kept = max(_bytes(x) for x in operands[2:4])
        case "gathered_attention" | "gathered_attention_grad":
            kept = max(_bytes(x) for x in operands[1:3])
        case "block_attention":
            kept = sum(_bytes(x, _tiled(x.dtype, block).itemsize) for x in operands[1:3])
        case "block_attention_grad":
            kept = sum(_bytes(x, _tiled(x.dtype, block).itemsize + 4) for x in operands[1:3])
        case "redistribute" | "redistribute_grad":
            _, m, r = operands[0].shape
            # Points and results have two buffers, densities one.
            rows = 2 * _round_up(r + 2, _SUBLANES) + 3 * _SUBLANES
            kept = 4 * rows * _round_up(m, _POINTS)
    return kept


def _bytes(array, itemsize=4, rows=None):
    """What VMEM takes for one matrix [rows,d] of a batch of them."""
    rows, features = rows or array.shape[-2], array.shape[-1]
    return _round_up(rows, 2 * _SUBLANES) * _round_up(features, _LANES) * itemsize


def _tiled(dtype, block):
    """The dtype of arrays that are cut in blocks: tiles of bfloat16 have 16 rows, of float32 8."""
    return jnp.dtype(jnp.float32 if block % 16 else dtype)


def _round_up(size, multiple):
    return -(-size // multiple) * multiple


def _call(kernel, grid, operands, results, *, interpret, scratch=()):
    """`kernel` on pairs (array, spec), into pairs (shape, spec) of float32; returns a list."""
    arrays, in_specs = zip(*operands, strict=True)
    shapes, out_specs = zip(*results, strict=True)
    varying = jax.typeof(arrays[-1]).manual_axis_type
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=[
            jax.ShapeDtypeStruct(shape, jnp.float32, manual_axis_type=varying) for shape in shapes
        ],
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=_VMEM),
        interpret=interpret,
        name=kernel.func.__name__.strip("_"),
    )(*arrays)


def _whole(shape, kept):
    """One matrix of [b,rows,d] in VMEM, of `kept` bytes in all; two buffers if they fit."""
    buffers = pl.Buffered(1 if 2 * kept > _KEPT else 2)
    return pl.BlockSpec((None, *shape[1:]), lambda b, i: (b, 0, 0), pipeline_mode=buffers)


def _rows(rows, features):
    """Block i of rows of [b,i,d] in VMEM."""
    return pl.BlockSpec((None, rows, features), lambda b, i: (b, i, 0))


def _row_blocks(*shape):
    """Block i of [b,i,...] in VMEM."""
    return pl.BlockSpec((None, None, *shape), lambda b, i: (b, i, 0, 0))


def _scalars(blocks):
    """Blocks [b,i,1,n] of scalars, with the spec that has block i in SMEM."""
    spec = pl.BlockSpec(
        (None, None, *blocks.shape[2:]), lambda b, i: (b, i, 0, 0), memory_space=pltpu.SMEM
    )
    return blocks, spec


def _entries(array, rows, absent):
    """[b,i,p] in blocks of `rows` rows, scalar after scalar; `absent` fills the last one."""
    b, i, p = array.shape
    array = jnp.pad(array, ((0, 0), (0, -i % rows), (0, 0)), constant_values=absent)
    return _scalars(array.reshape(b, -1, 1, rows * p))


def _present(indices, size):
    return jnp.where((indices >= 0) & (indices < size), indices, -1)


def _block_rows(i, p, features):
    """Rows of a block: a multiple of 8, few enough entries for SMEM and numbers for VMEM."""
    rows = min(_BLOCK_ENTRIES // p, _BLOCK_NUMBERS // _round_up(features, _LANES))
    return min(max(_SUBLANES, rows // _SUBLANES * _SUBLANES), _round_up(i, _SUBLANES))


def _clear(ref):
    """Zeros, a tile at a time: an assignment of the whole would be unrolled."""
    size = ref.shape[0]
    tile = min(size, 256)

    def clear(t, _):
        at = pl.ds(pl.multiple_of(t * tile, tile), tile)
        ref[at] = jnp.zeros((tile, ref.shape[1]), ref.dtype)

    lax.fori_loop(0, size // tile, clear, None)
    if rest := size % tile:
        ref[pl.ds(size - rest, rest)] = jnp.zeros((rest, ref.shape[1]), ref.dtype)


def _unroll(interpret):
    """Entries of a row written out one by one, half as many across rows; few to interpret."""
    return 2 if interpret else 16


def _for(count, step, init, unroll):
    return lax.fori_loop(0, count, step, init, unroll=max(1, min(count, unroll)))


def _ell_spmm_kernel(indices, values, dense, out, *, entries, unroll):
    def reduce_row(i, _):
        def add(q, total):
            n = i * entries + q
            row = dense[pl.ds(jnp.maximum(indices[0, n], 0), 1)]
            return total + jnp.where(indices[0, n] >= 0, values[0, n] * row, 0)

        zeros = jnp.zeros((1, out.shape[1]), out.dtype)
        out[pl.ds(i, 1)] = _for(entries, add, zeros, unroll)

    _for(out.shape[0], reduce_row, None, unroll // 2 // entries)


def ell_spmm(indices, values, dense, *, interpret):
    """out[i] = sum over q of values[i, q] dense[indices[i, q]]."""
    b, i, p = indices.shape
    features = dense.shape[-1]
    rows = _block_rows(i, p, features)
    (out,) = _call(
        functools.partial(_ell_spmm_kernel, entries=p, unroll=_unroll(interpret)),
        (b, pl.cdiv(i, rows)),
        [
            _entries(_present(indices, dense.shape[1]), rows, -1),
            _entries(values.astype(jnp.float32), rows, 0),
            (dense.astype(jnp.float32), _whole(dense.shape, _bytes(dense))),
        ],
        [((b, i, features), _rows(rows, features))],
        interpret=interpret,
    )
    return out.astype(dense.dtype)


def _ell_spmm_transposed_kernel(indices, values, dense, out, *, entries, unroll):
    pl.when(pl.program_id(1) == 0)(lambda: _clear(out))

    def spread_row(i, _):
        row = dense[pl.ds(i, 1)]

        def add(q, _):
            n = i * entries + q
            at = pl.ds(jnp.maximum(indices[0, n], 0), 1)
            out[at] += jnp.where(indices[0, n] >= 0, values[0, n] * row, 0)

        _for(entries, add, None, unroll)

    _for(dense.shape[0], spread_row, None, unroll // 2 // entries)


def ell_spmm_transposed(indices, values, dense, *, num_cols, interpret):
    """out[j] = sum of values[i, q] dense[i] over the entries with indices[i, q] = j."""
    b, i, p = indices.shape
    features = dense.shape[-1]
    rows = _block_rows(i, p, features)
    shape = (b, num_cols, features)
    (out,) = _call(
        functools.partial(_ell_spmm_transposed_kernel, entries=p, unroll=_unroll(interpret)),
        (b, pl.cdiv(i, rows)),
        [
            _entries(_present(indices, num_cols), rows, -1),
            _entries(values.astype(jnp.float32), rows, 0),
            (dense.astype(jnp.float32), _rows(rows, features)),
        ],
        [(shape, _whole(shape, _bytes(dense, rows=num_cols)))],
        interpret=interpret,
    )
    return out.astype(dense.dtype)


def _ell_sddmm_kernel(indices, lhs, rhs, out, gathered, *, entries, unroll):
    rows = lhs.shape[0]
    column = lax.broadcasted_iota(jnp.int32, out.shape, 1)

    def fill_column(q, _):
        def gather(i, _):
            gathered[pl.ds(i, 1)] = rhs[pl.ds(indices[0, i * entries + q], 1)]

        _for(rows, gather, None, unroll // 2)
        dots = jnp.sum(lhs[...] * gathered[...], axis=1, keepdims=True)
        out[...] = jnp.where(column == q, dots, out[...])

    lax.fori_loop(0, entries, fill_column, None)


def ell_sddmm(indices, lhs, rhs, *, interpret):
    """out[i, q] = lhs[i] . rhs[indices[i, q]]."""
    b, i, p = indices.shape
    features = lhs.shape[-1]
    rows = _block_rows(i, p, features)
    present = _present(indices, rhs.shape[1])
    (out,) = _call(
        functools.partial(_ell_sddmm_kernel, entries=p, unroll=_unroll(interpret)),
        (b, pl.cdiv(i, rows)),
        [
            _entries(jnp.maximum(present, 0), rows, 0),
            (lhs.astype(jnp.float32), _rows(rows, features)),
            (rhs.astype(jnp.float32), _whole(rhs.shape, _bytes(rhs))),
        ],
        [((b, i, p), _rows(rows, p))],
        scratch=[pltpu.VMEM((rows, features), jnp.float32)],
        interpret=interpret,
    )
    return jnp.where(present >= 0, out, 0).astype(rhs.dtype)


def spmm(rows, cols, values, dense, *, num_rows, interpret):
    """out[r] = sum of values[n] dense[cols[n]] over the entries with rows[n] = r."""
    dtype, dense = dense.dtype, dense.astype(jnp.float32)
    gathered = ell_spmm(cols[..., None], values[..., None], dense, interpret=interpret)
    ones = jnp.ones((*rows.shape, 1), jnp.float32)
    out = ell_spmm_transposed(
        rows[..., None], ones, gathered, num_cols=num_rows, interpret=interpret
    )
    return out.astype(dtype)


def sddmm(rows, cols, lhs, rhs, *, interpret):
    """out[n] = lhs[rows[n]] . rhs[cols[n]]."""
    dtype, lhs, rhs = lhs.dtype, lhs.astype(jnp.float32), rhs.astype(jnp.float32)
    rows = _present(rows, lhs.shape[1])
    cols = jnp.where(rows >= 0, cols, -1)
    ones = jnp.ones((*rows.shape, 1), jnp.float32)
    gathered = ell_spmm(rows[..., None], ones, lhs, interpret=interpret)
    return ell_sddmm(cols[..., None], gathered, rhs, interpret=interpret)[..., 0].astype(dtype)


def gathered_attention(*operands, interpret):
    """The plain meaning, made of the products of this file; so is its gradient."""
    return xla.gathered_attention(*operands, **_products(interpret, "spmm", "sddmm"))


def gathered_attention_grad(*operands, interpret):
    products = _products(interpret, "spmm", "spmm_transposed", "sddmm")
    return xla.gathered_attention_grad(*operands, **products)


def _products(interpret, *names):
    return {n: functools.partial(globals()[f"ell_{n}"], interpret=interpret) for n in names}


def _key_blocks(block_indices, log_weights, num_keys, block, causal, interpret):
    """Positions, -1 where absent, and log weights, -inf there: [b,t/block,1,p], p in whole steps.

    Also the number of entries in a step, whose keys are multiplied at once.
    """
    indices = _present(block_indices, num_keys // block)
    log_weights = log_weights.astype(jnp.float32)
    present = (indices >= 0) & (log_weights != -jnp.inf)
    if causal:
        present &= indices <= lax.broadcasted_iota(jnp.int32, indices.shape, 1)
    p = indices.shape[-1]
    step = min(p, _KEYS // block, _unroll(interpret))

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
        jnp.full((rows, 1), -_LARGEST),
        jnp.zeros((rows, 1), jnp.float32),
        jnp.zeros((rows, v.shape[1]), jnp.float32),
    )
    top, total, sum_ = lax.fori_loop(0, indices.shape[1] // step, add_step, state)
    # Either the top entry adds 1, or there is no entry.
    total = jnp.maximum(total, 1)
    out[...] = sum_ / total
    log_sum_exp[...] = _turn(jnp.where(top > -_LARGEST, top, 0) + jnp.log(total))


def block_attention(q, k, v, block_indices, log_weights, *, block, causal, interpret):
    """`gathered_attention` of blocks of queries over blocks of keys, and the log-sum-exps [b,t].

    One query block in each step of the grid, keys and values kept in VMEM.
    """
    dtype = q.dtype
    q, k, v = (x.astype(_tiled(dtype, block)) for x in (q, k, v))
    b, t, d = q.shape
    indices, log_weights, step = _key_blocks(
        block_indices, log_weights, k.shape[1], block, causal, interpret
    )
    kept = _kept("block_attention", (q, k, v), {"block": block})
    out, log_sum_exp = _call(
        functools.partial(_block_attention_kernel, step=step, block=block, causal=causal),
        (b, t // block),
        [
            _scalars(indices),
            _scalars(log_weights),
            (q, _rows(block, d)),
            (k, _whole(k.shape, kept)),
            (v, _whole(v.shape, kept)),
        ],
        [
            ((b, t, v.shape[2]), _rows(block, v.shape[2])),
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
        _clear(dk)
        _clear(dv)

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
    q, k, v, block_indices, log_weights, out, log_sum_exp, grad, *, block, causal, interpret
):
    """Gradients of q, k, v and log_weights: one kernel, which keeps those of k and v in VMEM."""
    dtype = q.dtype
    mean_grad = (out.astype(jnp.float32) * grad.astype(jnp.float32)).sum(-1)
    q, k, v, grad = (x.astype(_tiled(dtype, block)) for x in (q, k, v, grad))
    b, rows, p = block_indices.shape
    d, dv = q.shape[2], v.shape[2]
    indices, log_weights, step = _key_blocks(
        block_indices, log_weights, k.shape[1], block, causal, interpret
    )
    steps = indices.shape[-1] // step
    kept = _kept("block_attention_grad", (q, k, v), {"block": block})
    keep_k, keep_v = _whole(k.shape, kept), _whole(v.shape, kept)
    dq, dk, dv, dlogs = _call(
        functools.partial(_block_attention_grad_kernel, step=step, block=block, causal=causal),
        (b, rows),
        [
            _scalars(indices),
            _scalars(log_weights),
            (q, _rows(block, d)),
            (k, keep_k),
            (v, keep_v),
            (grad, _rows(block, dv)),
            (log_sum_exp.reshape(b, rows, 1, block), _row_blocks(1, block)),
            (mean_grad.reshape(b, rows, 1, block), _row_blocks(1, block)),
        ],
        [
            (q.shape, _rows(block, d)),
            (k.shape, keep_k),
            (v.shape, keep_v),
            ((b, rows, steps, step * block), _row_blocks(steps, step * block)),
        ],
        scratch=[pltpu.VMEM((step * block, x.shape[2]), x.dtype) for x in (k, v)],
        interpret=interpret,
    )
    dlogs = dlogs.reshape(b, rows, steps * step, block)[:, :, :p].sum(-1)
    return tuple(x.astype(dtype) for x in (dq, dk, dv, dlogs))


def _for_points(points, step, init):
    """`step(at, state)` for each slice `at` of points."""
    tile = _tile(points)

    def body(t, state):
        return step(pl.ds(pl.multiple_of(t * tile, tile), tile), state)

    return lax.fori_loop(0, points.shape[1] // tile, body, init)


def _tile(points):
    return min(points.shape[1], _POINTS)


def _distances(points, tuples, at, rank):
    """The r arrays [8,n] of (point - mean) / sigma, and the sum of their squares, inf if absent."""
    distances = [
        (points[pl.ds(a, 1), at] - tuples[:, a : a + 1]) * tuples[:, rank + a : rank + a + 1]
        for a in range(rank)
    ]
    squares = functools.reduce(jnp.add, [d * d for d in distances])
    return distances, squares + points[pl.ds(rank, 1), at]


def _nearest(points, tuples, rank):
    """The smallest squared distance [8,1] of each tuple."""

    def lower(at, nearest):
        return jnp.minimum(nearest, _distances(points, tuples, at, rank)[1])

    nearest = _for_points(points, lower, jnp.full((_SUBLANES, _tile(points)), _LARGEST))
    return jnp.min(nearest, axis=1, keepdims=True)


def _normaliser(total):
    """1 / total: the nearest point adds 1 to it, or there is no point."""
    return jnp.where(total > 0, 1 / jnp.maximum(total, 1), 0)


def _redistribute_kernel(points, tuples, out, density, *, rank):
    nearest = _nearest(points, tuples, rank)
    first = pl.program_id(1) == 0

    def densities(at, total):
        _, squares = _distances(points, tuples, at, rank)
        density[:, at] = jnp.exp((nearest - squares) / 2)
        return total + density[:, at]

    total = _for_points(points, densities, jnp.zeros((_SUBLANES, _tile(points)), out.dtype))
    total = jnp.sum(total, axis=1, keepdims=True)
    weight = tuples[:, 2 * rank :] * _normaliser(total)

    def add(at, _):
        shares = jnp.sum(weight * density[:, at], axis=0, keepdims=True)
        out[:, at] = jnp.where(first, 0, out[:, at]) + shares

    _for_points(points, add, None)


def redistribute(points, means, sigmas, values, where, *, interpret):
    """out[i] = sum over j of values[j] softmax_i(-|(points[i] - means[j]) / sigmas[j]|^2 / 2)."""
    b, m, rank = points.shape
    points, tuples = _points(points, where), _tuples(means, sigmas, values)
    size = points[0].shape[-1]
    (out,) = _call(
        functools.partial(_redistribute_kernel, rank=rank),
        (b, tuples[0].shape[1] // _SUBLANES),
        [points, tuples],
        [((b, 1, size), pl.BlockSpec((None, 1, size), lambda b, i: (b, 0, 0)))],
        scratch=[pltpu.VMEM((_SUBLANES, size), jnp.float32)],
        interpret=interpret,
    )
    return out[:, 0, :m]


def _points(points, where, *more):
    """[b,r+1+...,m] in VMEM: coordinates, 0 where allowed and inf elsewhere, and what more."""
    m = where.shape[-1]
    padding = -m % (_LANES if m <= _POINTS else _POINTS)
    where = jnp.pad(where, ((0, 0), (0, padding)))
    absent = jnp.where(where, 0, jnp.inf).astype(jnp.float32)
    rows = [*jnp.moveaxis(points.astype(jnp.float32), -1, 0), *more]
    rows = [jnp.pad(x, ((0, 0), (0, padding))) for x in rows]
    rank = points.shape[-1]
    rows = jnp.stack([*rows[:rank], absent, *rows[rank:]], axis=1)
    return rows, pl.BlockSpec((None, *rows.shape[1:]), lambda b, i: (b, 0, 0))


def _tuples(means, sigmas, values):
    """[b,k,2r+1], 8 tuples in a block: means, 1 / sigmas, values."""
    k = values.shape[-1]
    tuples = jnp.concatenate([means, 1 / sigmas, values[..., None]], axis=-1)
    tuples = jnp.pad(tuples, ((0, 0), (0, -k % _SUBLANES), (0, 0)))
    return tuples, _rows(_SUBLANES, tuples.shape[-1])


def _redistribute_grad_kernel(points, tuples, out, *, rank):
    nearest = _nearest(points, tuples, rank)
    zeros = jnp.zeros((_SUBLANES, _tile(points)), out.dtype)

    def densities(at):
        distances, squares = _distances(points, tuples, at, rank)
        return distances, jnp.exp((nearest - squares) / 2), points[pl.ds(rank + 1, 1), at]

    def add(at, state):
        total, weighted = state
        _, density, grad = densities(at)
        return total + density, weighted + density * grad

    total, weighted = (
        jnp.sum(x, axis=1, keepdims=True) for x in _for_points(points, add, (zeros, zeros))
    )
    mean_grad = weighted * _normaliser(total)

    def add_moments(at, moments):
        distances, density, grad = densities(at)
        deviation = density * (grad - mean_grad)
        terms = [deviation * d for d in distances] + [deviation * d * d for d in distances]
        return [x + term for x, term in zip(moments, terms, strict=True)]

    moments = _for_points(points, add_moments, [zeros] * (2 * rank))
    weight = tuples[:, 2 * rank :] * _normaliser(total)
    for a, moment in enumerate(moments):
        inverse = tuples[:, rank + a % rank : rank + a % rank + 1]
        out[:, a : a + 1] = jnp.sum(moment, axis=1, keepdims=True) * weight * inverse
    out[:, 2 * rank :] = mean_grad


def redistribute_grad(points, means, sigmas, values, where, grad, *, interpret):
    """Gradients of means, sigmas and values."""
    b, _, rank = points.shape
    k = values.shape[-1]
    points, tuples = _points(points, where, grad), _tuples(means, sigmas, values)
    (out,) = _call(
        functools.partial(_redistribute_grad_kernel, rank=rank),
        (b, tuples[0].shape[1] // _SUBLANES),
        [points, tuples],
        [(tuples[0].shape, tuples[1])],
        interpret=interpret,
    )
    return out[:, :k, :rank], out[:, :k, rank : 2 * rank], out[:, :k, 2 * rank]
