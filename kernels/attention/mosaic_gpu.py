"""Mosaic GPU: block attention on Hopper (sm_90), by TMA copies and warpgroup matrix products.

All work is in tiles of 64 queries by 64 keys; a larger block is a square of tiles. One warpgroup
owns a row of tiles: it keeps its own operands and walks a list of the tiles that it meets, whose
copies run ahead of the products. Forward and for dq it owns queries; for dk and dv, keys, with the
entries sorted by key first. So nothing is scattered, and results do not vary from run to run.
Absent entries are in no list and never fetched. The lists are made by plain JAX, a few launches in
all: how many, tests/test_aot_gpu.py counts.

Products take bfloat16 operands and accumulate in float32. The softmax is float32, in base 2.

On a CPU these kernels run under `force_gpu_interpret_mode` of Pallas, as jax 0.12 has. `interpret`
cannot choose that mode: its effects would follow the kernel to the GPU.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..numerics import gather_rows, in_bounds, scaled, sum_all

_TILE = 64
_HEADS = (64, 128)
_MAX_BATCH = 65535
_CAPABILITY = "9.0"
_STAGES = 2
# Up to so many entries of a row are compared in pairs, which takes no launch of its own.
_MAX_PAIRS = 64
_MAX_WORD = 2**32
_LOG2E = math.log2(math.e)
# How matrix products want their operands laid out in shared memory.
_SWIZZLED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
_ROWS = plgpu.Layout.WGMMA.reduce(1)
_COLS = plgpu.Layout.WGMMA.reduce(0)


def lacks(_, q, k, v, *operands, block, causal, scale):
    """Why these operands cannot be served; empty where they can."""
    del k, operands, causal
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
    return "" if scale > 0 else f"it takes a scale above 0, got {scale}"


def block_attention(q, k, v, block_indices, log_weights, *, interpret, **sizes):
    """Of one batch axis."""
    del interpret
    return _attention(q, k, v, [], block_indices, log_weights, **sizes)


def masked_block_attention(q, k, v, block_indices, log_weights, mask, *, interpret, **sizes):
    """The same over the keys that `mask` bool [b,s] allows."""
    del interpret
    return _attention(q, *_hide(k, v, mask), block_indices, log_weights, **sizes)


def block_attention_grad(q, k, v, block_indices, log_weights, *others, interpret, **sizes):
    """Of one batch axis."""
    del interpret
    return _gradients(q, k, v, [], block_indices, log_weights, *others, **sizes)


def masked_block_attention_grad(
    q, k, v, block_indices, log_weights, mask, *others, interpret, **sizes
):
    """Of one batch axis."""
    del interpret
    return _gradients(q, *_hide(k, v, mask), block_indices, log_weights, *others, **sizes)


def _hide(k, v, mask):
    """Keys and values, zeros where hidden, and [what is added to logits: 0 or -inf, [b,s]]."""
    k, v = (jnp.where(mask[..., None], x, 0) for x in (k, v))
    return k, v, [jnp.where(mask, jnp.float32(0), -jnp.inf)]


def _attention(q, k, v, hidden, block_indices, log_weights, *, block, causal, scale):
    """The result, and the log-sum-exp of the logits of each query; `hidden` is of `_hide`."""
    entries = _entries(block_indices, log_weights, k.shape[1], block, causal)
    (b, t, _), e = q.shape, v.shape[2]
    return _call(
        functools.partial(_forward_kernel, causal=causal),
        [((b, t, e), q.dtype), ((b, t), jnp.float32)],
        _by_query(*entries),
        own=[scaled(q, scale)],
        streamed=[k, v, *hidden],
        scratch=[_matrix(_TILE, q.dtype), _vector()],
    )


def _gradients(
    q, k, v, hidden, block_indices, log_weights, out, log_sum_exp, grad, *, block, causal, scale
):
    """Of q, k, v and log_weights."""
    q = scaled(q, scale)
    entries = _entries(block_indices, log_weights, k.shape[1], block, causal)
    mean_grad, log_sum_exp, scaling = _vectors(out, grad, log_sum_exp, scale)
    dq, sums = _call(
        functools.partial(_dq_kernel, causal=causal),
        [(q.shape, q.dtype), ((len(q), entries[0][0].size, _TILE), jnp.float32)],
        _by_query(*entries),
        own=[q, grad, scaling, mean_grad],
        streamed=[k, v, *hidden],
        scratch=[_matrix(_TILE, q.dtype), _vector()],
    )
    dk, dv = _call(
        functools.partial(_dkv_kernel, causal=causal),
        [(k.shape, k.dtype), (v.shape, v.dtype)],
        _by_key(*entries, k.shape[1] // _TILE),
        own=[k, v, *hidden],
        streamed=[q, grad, log_sum_exp, mean_grad],
        scratch=[_matrix(_TILE, q.dtype), _matrix(_TILE, q.dtype)],
    )
    return dq, dk, dv, _sum_entries(sums / scale, entries[2], block_indices.shape[2])


def _vectors(out, grad, log_sum_exp, scale):
    """Three float32 [b,t] in one pass: grad . out, and in base 2 two log-sum-exps.

    The softmax with the second of them is `scale` times that with the first, as the gradient of q
    wants it.
    """
    products = out.astype(jnp.float32) * grad.astype(jnp.float32)
    log_sum_exp = log_sum_exp * _LOG2E
    alone = [(0, 0), (0, 0), (0, out.shape[2] - 1)]
    others = (jnp.pad(x[..., None], alone) for x in (log_sum_exp, log_sum_exp - math.log2(scale)))
    return [x[..., 0] for x in sum_all([products, *others], 2)]


def _entries(block_indices, log_weights, num_keys, block, causal):
    """The entries of each row of tiles, [b,t/64,n] each: key tile, log2 weight, and if present."""
    side = block // _TILE
    log_weights = log_weights.astype(jnp.float32)
    present = in_bounds(block_indices, num_keys // block) & (log_weights != -jnp.inf)
    b, rows, p = block_indices.shape
    square = (b, rows, side, p, side)
    tiles = (block_indices * side)[..., None]
    tiles += lax.broadcasted_iota(jnp.int32, (1, 1, 1, side), 3)
    tiles, weights, present = (
        jnp.broadcast_to(x, square).reshape(b, rows * side, p * side)
        for x in (tiles[:, :, None], log_weights[:, :, None, :, None], present[:, :, None, :, None])
    )
    if causal:
        present &= tiles <= _rows(tiles)
    return tiles, weights * _LOG2E, present


def _rows(entries):
    """The row of tiles of each entry."""
    return lax.broadcasted_iota(jnp.int32, entries.shape, 1)


def _positions(present):
    """Where each entry is in the list of its row: present ones last, in order; -1 for others."""
    at_or_after = lax.cumsum(present.astype(jnp.int32), 2, reverse=True)
    return jnp.where(present, present.shape[2] - at_or_after, -1)


def _by_query(tiles, weights, present):
    """The list of each row of tiles.

    Lists are (tiles [b,n], weights [b,n], start of each row [b,t/64], length of each [b,t/64]).
    """
    positions, n = _positions(present), present.shape[2]
    if n <= _MAX_PAIRS:
        here = positions[..., None] == lax.broadcasted_iota(jnp.int32, (1, 1, 1, n), 3)
        listed = [jnp.where(here, x[..., None], 0).sum(2, dtype=x.dtype) for x in (tiles, weights)]
    else:
        listed = lax.sort((positions, tiles, weights), num_keys=1, is_stable=False)[1:]
    tiles, weights = (x.reshape(len(x), -1) for x in listed)
    # Before row i there are n entries of each of i rows: i for each of its own n.
    starts = (_rows(present) + (~present).astype(jnp.int32)).sum(2, dtype=jnp.int32)
    return tiles, weights, starts, present.sum(2, dtype=jnp.int32)


def _sum_entries(sums, present, p):
    """Sums [b,rows n,64] over the tiles of the entries of `_by_query`, for each of p entries."""
    b, rows, n = present.shape
    index = jnp.where(present, _positions(present) + n * _rows(present), -1)
    sums = jax.vmap(gather_rows)(sums, index)
    side = n // p
    return sums.reshape(b, rows // side, side, p, side, _TILE).sum((2, 4, 5))


def _by_key(tiles, weights, present, num_tiles):
    """The list of each key tile: the rows of tiles that meet it, in order.

    Tile and number of an entry are sorted as one word, where it holds both: so they fit into shared
    memory, and take one launch or three.
    """
    (b, rows, n), weights = tiles.shape, weights.reshape(len(weights), -1)
    tiles = jnp.where(present, tiles, num_tiles).reshape(b, -1)
    entries = lax.broadcasted_iota(jnp.int32, tiles.shape, 1)
    size = rows * n
    if (num_tiles + 1) * size <= _MAX_WORD:
        words = tiles.astype(jnp.uint32) * size + entries.astype(jnp.uint32)
        words = lax.sort(words, is_stable=False)
        tiles, entries = (x.astype(jnp.int32) for x in (words // size, words % size))
    else:
        tiles, entries = lax.sort((tiles, entries), num_keys=2, is_stable=False)
    rows, weights = entries // n, jax.vmap(gather_rows)(weights, entries)
    edges = lax.broadcasted_iota(jnp.int32, (1, num_tiles, 1), 1)
    first, last = _below(tiles, edges), _below(tiles, edges + 1)
    starts, counts = (x.sum(2, dtype=jnp.int32) for x in (first, last - first))
    return rows, weights, starts, counts


def _below(tiles, edges):
    """int32 [b,j,~sqrt(n)], whose sum over the last axis is how many of sorted `tiles` [b,n] are
    below each of `edges` [1,j,1].

    Every sqrt(n)-th of the tiles tells where to look, and there all are compared: two launches,
    where a binary search has one for each bit.
    """
    b, n = tiles.shape
    size = math.isqrt(n) + 1
    tiles = jnp.pad(tiles, [(0, 0), (0, size**2 - n)], constant_values=2**31 - 1)
    blocks = tiles.reshape(b, size, size)
    before = (blocks[:, None, :, -1] < edges).sum(2, dtype=jnp.int32)
    below = jax.vmap(gather_rows)(blocks, before) < edges
    return before[..., None] + below.astype(jnp.int32)


def _matrix(width, dtype, *lead):
    return plgpu.SMEM((*lead, _TILE, width), dtype, transforms=_SWIZZLED)


def _vector(*lead):
    return plgpu.SMEM((*lead, _TILE), jnp.float32)


def _call(kernel, outputs, lists, *, own, streamed, scratch):
    """kernel(outputs, own, stream, scratch) for each row of tiles of each of the batch.

    The rows are those of the first of `outputs`, pairs of a shape and a dtype, and have `lists`.
    `own` and `streamed` are arrays, matrices [b,t,width] or vectors [b,t]. The kernel gets buffers
    of a tile of each of `own`, which is there; `stream` is what `_walk` takes of the others, with
    _STAGES tiles of each.
    """
    operands = [*lists, *own, *streamed]
    lengths = [len(group) for group in (lists, own, streamed, outputs)]

    def buffer(array, *lead):
        return _vector(*lead) if array.ndim == 2 else _matrix(array.shape[2], array.dtype, *lead)

    def run(*refs):
        refs = iter(refs)
        groups = [list(itertools.islice(refs, length)) for length in lengths]
        list_refs, own_refs, streamed_refs, output_refs = groups
        own_smem, own_barrier, streamed_smem, barriers, scratch = refs
        for ref, smem in zip(own_refs, own_smem, strict=True):
            plgpu.copy_gmem_to_smem(ref.at[_own()], smem, own_barrier)
        plgpu.barrier_wait(own_barrier)
        stream = list_refs, streamed_refs, streamed_smem, barriers
        kernel(output_refs, own_smem, stream, scratch)

    run.__name__ = kernel.func.__name__.strip("_")
    varying = jax.typeof(operands[0]).manual_axis_type
    (b, length, *_), _ = outputs[0]
    return plgpu.kernel(
        run,
        out_type=tuple(jax.ShapeDtypeStruct(*out, manual_axis_type=varying) for out in outputs),
        scratch_types=[
            [buffer(array) for array in own],
            plgpu.Barrier(num_arrivals=len(own)),
            [buffer(array, _STAGES) for array in streamed],
            [plgpu.Barrier(num_barriers=_STAGES) for _ in streamed],
            scratch,
        ],
        grid=(length // _TILE, b),
        grid_names=("row", "batch"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*operands)


def _own():
    return lax.axis_index("batch"), pl.ds(lax.axis_index("row") * _TILE, _TILE)


def _fetch_first(lists, refs, buffers, barriers):
    """Starts the copies of the first _STAGES entries of the list of this program.

    Returns where it starts, its length, and what starts those of its entry n: fetch(n).
    """
    tiles_ref, _, starts_ref, counts_ref = lists
    batch, row = lax.axis_index("batch"), lax.axis_index("row")
    start, count = starts_ref[batch, row], counts_ref[batch, row]

    def fetch(n):
        slot = lax.rem(n, jnp.int32(_STAGES))
        rows = pl.ds(tiles_ref[batch, start + n] * _TILE, _TILE)
        for ref, buffer, barrier in zip(refs, buffers, barriers, strict=True):
            plgpu.copy_gmem_to_smem(ref.at[batch, rows], buffer.at[slot], barrier.at[slot])

    for n in range(_STAGES):
        pl.when(n < count)(functools.partial(fetch, jnp.int32(n)))
    return start, count, fetch


def _walk(lists, refs, buffers, barriers, step, carry):
    """Folds `step` over the list of this program.

    step(carry, n, tile, weight, waits): entry n of all. waits[i]() is the i-th of `refs` at its
    tile, in shared memory, as soon as it has arrived.
    """
    start, count, fetch = _fetch_first(lists, refs, buffers, barriers)
    (tiles_ref, weights_ref, _, _), batch = lists, lax.axis_index("batch")

    def wait(buffer, barrier, slot):
        plgpu.barrier_wait(barrier.at[slot])
        return buffer.at[slot]

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


def _masked(logits, hidden, layout, axis):
    """`logits`, -inf for hidden keys along an axis: `hidden` is a list of one vector, or none."""
    for vector in hidden:
        added = plgpu.layout_cast(vector[...], layout)
        logits = logits + lax.broadcast_in_dim(added, logits.shape, [axis])
    return logits


def _causal(logits, query_tile, key_tile, query_axis):
    """`logits`, -inf where the key comes after the query: never, but in a tile on the diagonal."""

    def lower_triangle(logits):
        iota = functools.partial(
            plgpu.broadcasted_iota, jnp.int32, logits.shape, layout=plgpu.Layout.WGMMA
        )
        return jnp.where(iota(query_axis) >= iota(1 - query_axis), logits, -jnp.inf)

    return lax.cond(query_tile == key_tile, lower_triangle, lambda logits: logits, logits)


def _full(shape, value, layout):
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def _store(ref, buffer, value, index):
    """Writes to rows of a ref in global memory, by way of a buffer."""
    buffer[...] = value.astype(buffer.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(buffer, ref.at[index])


def _forward_kernel(outputs, own, stream, scratch, *, causal):
    (out_ref, _), (q,), (weights_smem, _) = outputs, own, scratch
    row = lax.axis_index("row")

    def step(state, _, tile, weight, waits):
        keys, values, *hidden = waits
        logits = _product(q, _transposed(keys())) * _LOG2E + weight
        logits = _masked(logits, [wait() for wait in hidden], _COLS, 1)
        if causal:
            logits = _causal(logits, row, tile, 0)
        return _add_tile(state, logits, weights_smem, values, masked=bool(hidden))

    state = _walk(*stream, step, _first_state(out_ref))
    _store_forward(outputs, stream, scratch, state)


def _first_state(out_ref):
    """Top and sum of the weights of each query, and of the values, before any key."""
    return (
        _full((_TILE,), -jnp.inf, _ROWS),
        _full((_TILE,), 0, _ROWS),
        _full((_TILE, out_ref.shape[2]), 0, plgpu.Layout.WGMMA),
    )


def _add_tile(state, logits, weights_smem, wait_for_values, *, masked=False):
    """The state with the keys of one more tile."""
    top, total, out = state
    higher = jnp.maximum(top, logits.max(axis=1))
    # Of what is not masked, each query sees at least one key of every tile that it meets.
    shift = jnp.where(higher > -jnp.inf, higher, 0.0) if masked else higher
    decay = jnp.exp2(top - shift)
    weights = jnp.exp2(logits - lax.broadcast_in_dim(shift, logits.shape, [0]))
    total = total * decay + weights.sum(axis=1)
    weights_smem[...] = weights.astype(weights_smem.dtype)
    plgpu.commit_smem()
    out = out * lax.broadcast_in_dim(decay, out.shape, [0])
    return higher, total, out + _product(weights_smem, wait_for_values())


def _store_forward(outputs, stream, scratch, state):
    (out_ref, log_sum_exp_ref), (_, vector_smem) = outputs, scratch
    top, total, out = state
    total = jnp.maximum(total, 1.0)
    out = out / lax.broadcast_in_dim(total, out.shape, [0])
    log_sum_exp = jnp.where(top > -jnp.inf, top, 0.0) / _LOG2E + jnp.log(total)
    _store(out_ref, stream[2][1].at[0], out, _own())
    _store(log_sum_exp_ref, vector_smem, log_sum_exp, _own())
    plgpu.wait_smem_to_gmem(0)


def _dq_kernel(outputs, own, stream, scratch, *, causal):
    (dq_ref, sums_ref), (q, grad, *vectors), (dlogits_smem, sums_smem) = outputs, own, scratch
    log_sum_exp, mean_grad = (plgpu.layout_cast(x[...], _ROWS) for x in vectors)
    batch, row = lax.axis_index("batch"), lax.axis_index("row")

    def run(dq):
        def step(carry, entry, tile, weight, waits):
            keys, values, *hidden = (wait() for wait in waits)
            logits = _product(q, _transposed(keys)) * _LOG2E + weight
            logits = _masked(logits, hidden, _COLS, 1)
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

        _walk(*stream, step, jnp.int32(0))
        return dq[...]

    dq = pl.run_scoped(run, plgpu.ACC((_TILE, dq_ref.shape[2]), jnp.float32))
    _store(dq_ref, q, dq, _own())
    plgpu.wait_smem_to_gmem(0)


def _dkv_kernel(outputs, own, stream, scratch, *, causal):
    (k, v, *hidden), (weights_smem, dlogits_smem) = own, scratch
    row = lax.axis_index("row")

    def run(dk, dv):
        def step(carry, _, tile, weight, waits):
            queries, grad, *vectors = (wait() for wait in waits)
            log_sum_exp, mean_grad = (plgpu.layout_cast(x[...], _COLS) for x in vectors)
            logits = _product(k, _transposed(queries)) * _LOG2E + weight
            logits = _masked(logits, hidden, _ROWS, 0)
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

        _walk(*stream, step, jnp.int32(0))
        return dk[...], dv[...]

    grads = pl.run_scoped(run, *(plgpu.ACC((_TILE, ref.shape[2]), jnp.float32) for ref in outputs))
    for ref, buffer, grad in zip(outputs, (k, v), grads, strict=True):
        _store(ref, buffer, grad, _own())
    plgpu.wait_smem_to_gmem(0)
