"""Mosaic GPU: block attention on Hopper (sm_90), by TMA copies and warpgroup matrix products.

All work is in tiles of 64 queries by 64 keys; a larger block is a square of tiles. One warpgroup
owns a row of tiles: it keeps its own operands and walks a list of the tiles that it meets, whose
copies run ahead of the products. Forward and for dq it owns queries; for dk and dv, keys, with the
entries sorted by key first. So nothing is scattered, and results do not vary from run to run.
Absent entries are in no list and never fetched.

Products take bfloat16 operands and accumulate in float32. The softmax is float32, in base 2.

On a CPU these kernels run under `force_gpu_interpret_mode` of Pallas, as jax 0.12 has. `interpret`
cannot choose that mode: its effects would follow the kernel to the GPU.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..numerics import scaled

_TILE = 64
_HEADS = (64, 128)
_MAX_BATCH = 65535
_CAPABILITY = "9.0"
_STAGES = 2
_LOG2E = math.log2(math.e)
# How matrix products want their operands laid out in shared memory.
_SWIZZLED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
_ROWS = plgpu.Layout.WGMMA.reduce(1)
_COLS = plgpu.Layout.WGMMA.reduce(0)


def lacks(_, q, k, v, *operands, block, causal, scale):
    """Why these operands cannot be served; empty where they can."""
    del k, operands, causal, scale
    device = jax.devices()[0]
    if device.platform == "gpu" and device.compute_capability != _CAPABILITY:
        return f"it needs compute capability {_CAPABILITY}, got {device.compute_capability}"
    if q.dtype != jnp.bfloat16:
        return f"it multiplies bfloat16, got {q.dtype}"
    if block % _TILE:
        return f"it works in tiles of {_TILE}, got blocks of {block}"
    for head in (q.shape[-1], v.shape[-1]):
        if head not in _HEADS:
            return f"it serves heads of {_HEADS[0]} or {_HEADS[1]} features, got {head}"
    if isinstance(q.shape[0], int) and q.shape[0] > _MAX_BATCH:
        return f"its grid holds a batch of at most {_MAX_BATCH}, got {q.shape[0]}"
    return ""


def block_attention(q, k, v, block_indices, log_weights, *, block, causal, scale, interpret):
    """Of one batch axis."""
    del interpret
    q = scaled(q, scale)
    entries = _entries(block_indices, log_weights, k.shape[1], block, causal)
    (b, t, d), e = q.shape, v.shape[2]
    return _call(
        functools.partial(_forward_kernel, causal=causal),
        t // _TILE,
        [((b, t, e), q.dtype), ((b, t), jnp.float32)],
        (*_by_query(*entries)[0], q, k, v),
        own=[(d, q.dtype)],
        streamed=[(d, k.dtype), (e, v.dtype)],
        scratch=[_matrix(_TILE, q.dtype), _vector()],
    )


def block_attention_grad(
    q, k, v, block_indices, log_weights, out, log_sum_exp, grad, *, block, causal, scale, interpret
):
    """Of one batch axis."""
    del interpret
    q = scaled(q, scale)
    tiles, weights, present = _entries(block_indices, log_weights, k.shape[1], block, causal)
    (b, t, d), (_, s, e) = q.shape, v.shape
    log_sum_exp = log_sum_exp * _LOG2E
    mean_grad = (out.astype(jnp.float32) * grad.astype(jnp.float32)).sum(-1)
    operands = q, k, v, grad, log_sum_exp, mean_grad

    by_query, order = _by_query(tiles, weights, present)
    dq, sums = _call(
        functools.partial(_dq_kernel, causal=causal),
        t // _TILE,
        [(q.shape, q.dtype), ((b, tiles[0].size, _TILE), jnp.float32)],
        (*by_query, *operands),
        own=[(d, q.dtype), (e, grad.dtype), None, None],
        streamed=[(d, k.dtype), (e, v.dtype)],
        scratch=[_matrix(_TILE, q.dtype), _vector()],
    )
    dk, dv = _call(
        functools.partial(_dkv_kernel, causal=causal),
        s // _TILE,
        [(k.shape, k.dtype), (v.shape, v.dtype)],
        (*_by_key(tiles, weights, present, s // _TILE), *operands),
        own=[(d, k.dtype), (e, v.dtype)],
        streamed=[(d, q.dtype), (e, grad.dtype), None, None],
        scratch=[_matrix(_TILE, q.dtype), _matrix(_TILE, q.dtype)],
    )

    _, sums = lax.sort((order, sums.sum(-1).reshape(tiles.shape)), num_keys=1)
    sums = jnp.where(present, sums, 0)
    side = block // _TILE
    _, rows, p = block_indices.shape
    return scaled(dq, scale), dk, dv, sums.reshape(b, rows, side, p, side).sum((2, 4))


def _entries(block_indices, log_weights, num_keys, block, causal):
    """The entries of each row of tiles, [b,t/64,n] each: key tile, log2 weight, and if present."""
    side = block // _TILE
    log_weights = log_weights.astype(jnp.float32)
    present = (block_indices >= 0) & (block_indices < num_keys // block)
    present &= log_weights > -jnp.inf
    first = jnp.where(present, block_indices, 0) * side
    b, rows, p = block_indices.shape
    square = (b, rows, side, p, side)
    tiles = first[:, :, None, :, None] + jnp.arange(side, dtype=jnp.int32).reshape(1, 1, 1, 1, -1)
    tiles, weights, present = (
        jnp.broadcast_to(x, square).reshape(b, rows * side, p * side)
        for x in (tiles, log_weights[:, :, None, :, None], present[:, :, None, :, None])
    )
    if causal:
        present &= tiles <= jnp.arange(rows * side, dtype=jnp.int32)[None, :, None]
    return tiles, weights * _LOG2E, present


def _by_query(tiles, weights, present):
    """The list of each row of tiles, present entries first, and where in the row each was.

    A list is (tiles [b,n], weights [b,n], start of each row [b,t/64], length of each [b,t/64]).
    """
    b, rows, n = tiles.shape
    order = lax.broadcasted_iota(jnp.int32, tiles.shape, 2)
    _, tiles, weights, order = lax.sort(
        ((~present).astype(jnp.int32), tiles, weights, order), num_keys=1
    )
    starts = jnp.broadcast_to(jnp.arange(rows, dtype=jnp.int32) * n, (b, rows))
    counts = present.sum(-1, dtype=jnp.int32)
    return (tiles.reshape(b, -1), weights.reshape(b, -1), starts, counts), order


def _by_key(tiles, weights, present, num_tiles):
    """The list of each key tile: the rows of tiles that meet it, in order."""
    b = tiles.shape[0]
    rows = lax.broadcasted_iota(jnp.int32, tiles.shape, 1)
    tiles = jnp.where(present, tiles, num_tiles)
    tiles, rows, weights = lax.sort([x.reshape(b, -1) for x in (tiles, rows, weights)], num_keys=1)
    edges = jnp.arange(num_tiles + 1, dtype=jnp.int32)
    starts = jax.vmap(lambda x: jnp.searchsorted(x, edges))(tiles).astype(jnp.int32)
    return rows, weights, starts[:, :-1], starts[:, 1:] - starts[:, :-1]


def _matrix(width, dtype, *lead):
    return plgpu.SMEM((*lead, _TILE, width), dtype, transforms=_SWIZZLED)


def _vector(*lead):
    return plgpu.SMEM((*lead, _TILE), jnp.float32)


def _call(kernel, rows, outputs, operands, *, own, streamed, scratch):
    """`kernel` for each row of tiles of each member of the batch.

    `own` and `streamed` are buffers: (width, dtype) of a matrix, or None for a vector. The kernel
    gets refs of operands and outputs, then those of the buffers and their barriers, and scratch.
    """

    def buffer(kind, *lead):
        return _vector(*lead) if kind is None else _matrix(*kind, *lead)

    varying = jax.typeof(operands[0]).manual_axis_type
    return plgpu.kernel(
        kernel,
        out_type=tuple(jax.ShapeDtypeStruct(*out, manual_axis_type=varying) for out in outputs),
        scratch_types=[
            [buffer(kind) for kind in own],
            plgpu.Barrier(num_arrivals=len(own)),
            [buffer(kind, _STAGES) for kind in streamed],
            [plgpu.Barrier(num_barriers=_STAGES) for _ in streamed],
            scratch,
        ],
        grid=(rows, operands[0].shape[0]),
        grid_names=("row", "batch"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*operands)


def _load_own(refs, buffers, barrier):
    """Copies the rows of this program from arrays [b,t,...] into its own buffers."""
    for ref, buffer in zip(refs, buffers, strict=True):
        plgpu.copy_gmem_to_smem(ref.at[_own()], buffer, barrier)
    plgpu.barrier_wait(barrier)


def _own():
    return lax.axis_index("batch"), pl.ds(lax.axis_index("row") * _TILE, _TILE)


def _walk(entries, refs, buffers, barriers, step, carry):
    """Folds `step` over the list of this program.

    step(carry, n, tile, weight, waits): entry n of all. waits[i]() is the i-th of `refs` at its
    tile, in shared memory, as soon as it has arrived.
    """
    tiles_ref, weights_ref, starts_ref, counts_ref = entries
    batch, row = lax.axis_index("batch"), lax.axis_index("row")
    start, count = starts_ref[batch, row], counts_ref[batch, row]

    def fetch(n):
        slot = lax.rem(n, jnp.int32(_STAGES))
        rows = pl.ds(tiles_ref[batch, start + n] * _TILE, _TILE)
        for ref, buffer, barrier in zip(refs, buffers, barriers, strict=True):
            plgpu.copy_gmem_to_smem(ref.at[batch, rows], buffer.at[slot], barrier.at[slot])

    def wait(buffer, barrier, slot):
        plgpu.barrier_wait(barrier.at[slot])
        return buffer.at[slot]

    for n in range(_STAGES):
        pl.when(n < count)(functools.partial(fetch, jnp.int32(n)))

    def body(n, carry):
        slot = lax.rem(n, jnp.int32(_STAGES))
        waits = [
            functools.partial(wait, buffer, barrier, slot)
            for buffer, barrier in zip(buffers, barriers, strict=True)
        ]
        entry = start + n
        carry = step(carry, entry, tiles_ref[batch, entry], weights_ref[batch, entry], waits)
        pl.when(n + _STAGES < count)(functools.partial(fetch, n + _STAGES))
        return carry

    return lax.fori_loop(0, count, body, carry)


def _product(lhs, rhs):
    """The matrix product of two refs in shared memory."""

    def multiply(acc):
        plgpu.wgmma(acc, lhs, rhs)
        return acc[...]

    return pl.run_scoped(multiply, plgpu.ACC((lhs.shape[0], rhs.shape[1]), jnp.float32))


def _transposed(ref):
    return ref.transpose((1, 0))


def _causal(logits, query_tile, key_tile, query_axis):
    """`logits`, -inf where the key comes after the query."""
    iota = functools.partial(
        plgpu.broadcasted_iota, jnp.int32, logits.shape, layout=plgpu.Layout.WGMMA
    )
    query, key = iota(query_axis), iota(1 - query_axis)
    return jnp.where(query + (query_tile - key_tile) * _TILE >= key, logits, -jnp.inf)


def _full(shape, value, layout):
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def _store(ref, buffer, value, index):
    """Writes to rows of a ref in global memory, by way of a buffer."""
    buffer[...] = value.astype(buffer.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(buffer, ref.at[index])


def _forward_kernel(*refs, causal):
    *entries, q_ref, k_ref, v_ref, out_ref, log_sum_exp_ref = refs[:9]
    own, own_barrier, streamed, barriers, (weights_smem, vector_smem) = refs[9:]
    _load_own([q_ref], own, own_barrier)
    (q,), row = own, lax.axis_index("row")

    def step(carry, _, tile, weight, waits):
        top, total, out = carry
        keys, values = waits
        logits = _product(q, _transposed(keys())) * _LOG2E + weight
        if causal:
            logits = _causal(logits, row, tile, 0)
        higher = jnp.maximum(top, logits.max(axis=1))
        decay = jnp.exp2(top - higher)
        weights = jnp.exp2(logits - lax.broadcast_in_dim(higher, logits.shape, [0]))
        total = total * decay + weights.sum(axis=1)
        weights_smem[...] = weights.astype(weights_smem.dtype)
        plgpu.commit_smem()
        out = out * lax.broadcast_in_dim(decay, out.shape, [0]) + _product(weights_smem, values())
        return higher, total, out

    carry = (
        _full((_TILE,), -jnp.inf, _ROWS),
        _full((_TILE,), 0, _ROWS),
        _full((_TILE, v_ref.shape[2]), 0, plgpu.Layout.WGMMA),
    )
    top, total, out = _walk(entries, [k_ref, v_ref], streamed, barriers, step, carry)
    total = jnp.maximum(total, 1.0)
    out = out / lax.broadcast_in_dim(total, out.shape, [0])
    log_sum_exp = jnp.where(top > -jnp.inf, top, 0.0) / _LOG2E + jnp.log(total)
    _store(out_ref, streamed[1].at[0], out, _own())
    _store(log_sum_exp_ref, vector_smem, log_sum_exp, _own())
    plgpu.wait_smem_to_gmem(0)


def _dq_kernel(*refs, causal):
    *entries, q_ref, k_ref, v_ref, grad_ref, log_sum_exp_ref, mean_grad_ref = refs[:10]
    dq_ref, sums_ref, own, own_barrier, streamed, barriers, (dlogits_smem, sums_smem) = refs[10:]
    _load_own([q_ref, grad_ref, log_sum_exp_ref, mean_grad_ref], own, own_barrier)
    q, grad, *vectors = own
    log_sum_exp, mean_grad = (plgpu.layout_cast(x[...], _ROWS) for x in vectors)
    batch, row = lax.axis_index("batch"), lax.axis_index("row")

    def run(dq):
        def step(carry, entry, tile, weight, waits):
            keys, values = (wait() for wait in waits)
            logits = _product(q, _transposed(keys)) * _LOG2E + weight
            if causal:
                logits = _causal(logits, row, tile, 0)
            weights = jnp.exp2(logits - lax.broadcast_in_dim(log_sum_exp, logits.shape, [0]))
            dweights = _product(grad, _transposed(values))
            dlogits = weights * (dweights - lax.broadcast_in_dim(mean_grad, logits.shape, [0]))
            dlogits_smem[...] = dlogits.astype(dlogits_smem.dtype)
            plgpu.wait_smem_to_gmem(0)
            _store(sums_ref, sums_smem, dlogits.sum(axis=1), (batch, entry))
            plgpu.wgmma(dq, dlogits_smem, keys)
            plgpu.wgmma_wait(0)
            return carry

        _walk(entries, [k_ref, v_ref], streamed, barriers, step, jnp.int32(0))
        return dq[...]

    dq = pl.run_scoped(run, plgpu.ACC((_TILE, q_ref.shape[2]), jnp.float32))
    _store(dq_ref, q, dq, _own())
    plgpu.wait_smem_to_gmem(0)


def _dkv_kernel(*refs, causal):
    *entries, q_ref, k_ref, v_ref, grad_ref, log_sum_exp_ref, mean_grad_ref = refs[:10]
    dk_ref, dv_ref, own, own_barrier, streamed, barriers, scratch = refs[10:]
    weights_smem, dlogits_smem = scratch
    _load_own([k_ref, v_ref], own, own_barrier)
    (k, v), row = own, lax.axis_index("row")

    def run(dk, dv):
        def step(carry, _, tile, weight, waits):
            queries, grad, *vectors = (wait() for wait in waits)
            log_sum_exp, mean_grad = (plgpu.layout_cast(x[...], _COLS) for x in vectors)
            logits = _product(k, _transposed(queries)) * _LOG2E + weight
            if causal:
                logits = _causal(logits, tile, row, 1)
            weights = jnp.exp2(logits - lax.broadcast_in_dim(log_sum_exp, logits.shape, [1]))
            dweights = _product(v, _transposed(grad))
            dlogits = weights * (dweights - lax.broadcast_in_dim(mean_grad, logits.shape, [1]))
            weights_smem[...] = weights.astype(weights_smem.dtype)
            dlogits_smem[...] = dlogits.astype(dlogits_smem.dtype)
            plgpu.commit_smem()
            plgpu.wgmma(dv, weights_smem, grad)
            plgpu.wgmma(dk, dlogits_smem, queries)
            plgpu.wgmma_wait(0)
            return carry

        refs = [q_ref, grad_ref, log_sum_exp_ref, mean_grad_ref]
        _walk(entries, refs, streamed, barriers, step, jnp.int32(0))
        return dk[...], dv[...]

    dk, dv = pl.run_scoped(
        run, *(plgpu.ACC((_TILE, ref.shape[2]), jnp.float32) for ref in (k_ref, v_ref))
    )
    _store(dk_ref, k, dk, _own())
    _store(dv_ref, v, dv, _own())
    plgpu.wait_smem_to_gmem(0)
