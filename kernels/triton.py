"""Pallas-Triton: gathers and scatters on NVIDIA GPUs, one pointer for each element.

Triton is the one Pallas route on a GPU with loads from a vector of row numbers and with features
of any size, and upstream has deprecated it. When it goes: Mosaic GPU row loads where the feature
size is a multiple of 128, and `xla` for the rest.

A kernel serves one matrix; the batch becomes an axis of its grid. Sparse operands are lists of
entries, and each row of an ELL matrix owns p of them. Absent entries and the ragged ends of tiles
are masked, never padded; sums are made in float32. Pallas computes offsets in 64 bits where an
array needs it; the number of an entry is an int32.

Scatters use atomics, which add in any order. With `deterministic` the entries are sorted by their
target and each row is summed in order instead: the same bits every time.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from . import tuning

_MAX_ENTRIES = 2**31 - 1
_MAX_HEAD = 256


def lacks(operation, *operands, **_):
    """Why `operation` cannot be served on these operands; empty where it can."""
    if any(x.dtype == jnp.float64 for x in operands):
        return "it computes in float32, got float64"
    if any(x[0].size > _MAX_ENTRIES for x in operands if x.dtype == jnp.int32):
        return f"it numbers at most {_MAX_ENTRIES} entries"
    if operation.startswith("gathered_attention"):
        q, _, v, *_ = operands
        if (head := max(q.shape[-1], v.shape[-1])) > _MAX_HEAD:
            return f"it holds at most {_MAX_HEAD} features of a head, got {head}"
    return ""


def ell_spmm(indices, values, dense, *, interpret):
    """`xla.ell_spmm`, one batch axis."""

    def one(indices, values, dense):
        entries = indices.reshape(-1), values.reshape(-1)
        return _sum_rows(None, *entries, dense, indices.shape, interpret=interpret)

    return jax.vmap(one)(indices, values, dense).astype(dense.dtype)


def ell_spmm_transposed(indices, values, dense, *, num_cols, interpret, deterministic=False):
    """`xla.ell_spmm_transposed`, one batch axis."""
    scatter = functools.partial(
        _scatter, num_rows=num_cols, deterministic=deterministic, interpret=interpret
    )
    return jax.vmap(scatter)(indices, None, values, dense).astype(dense.dtype)


def ell_sddmm(indices, lhs, rhs, *, interpret):
    """`xla.ell_sddmm`, one batch axis."""
    return jax.vmap(functools.partial(_dots, interpret=interpret))(None, indices, lhs, rhs)


def spmm(rows, cols, values, dense, *, num_rows, interpret, deterministic=False):
    """`xla.spmm`, one batch axis."""
    scatter = functools.partial(
        _scatter, num_rows=num_rows, deterministic=deterministic, interpret=interpret
    )
    return jax.vmap(scatter)(rows, cols, values, dense).astype(dense.dtype)


def sddmm(rows, cols, lhs, rhs, *, interpret):
    """`xla.sddmm`, one batch axis."""
    return jax.vmap(functools.partial(_dots, interpret=interpret))(rows, cols, lhs, rhs)


def redistribute(points, means, sigmas, values, where, *, interpret):
    """`xla.redistribute`, one batch axis: first the normaliser of each tuple, then each point."""

    def one(points, means, sigmas, values, where):
        m, k = where.size, values.size
        config = tuning.choose("redistribute", m, k)
        block = _block(config, (k, config.entries), (m, config.tile))
        call = functools.partial(_call, config=config, interpret=interpret)
        nearest, normaliser = call(
            functools.partial(_normalise_kernel, block=block),
            (pl.cdiv(k, block[0]),),
            [((k,), jnp.int32), ((k,), means.dtype)],
            points,
            means,
            sigmas,
            where,
        )
        (out,) = call(
            functools.partial(_share_kernel, block=block),
            (pl.cdiv(m, block[1]),),
            [((m,), values.dtype)],
            points,
            means,
            sigmas,
            where,
            nearest,
            normaliser * values,
        )
        return out

    return jax.vmap(one)(points, means, sigmas, values, where)


def redistribute_grad(points, means, sigmas, values, where, grad, *, interpret):
    """`xla.redistribute_grad`, one batch axis: one pass over the tuples, no [m,k] array."""

    def one(points, means, sigmas, values, where, grad):
        m, k = where.size, values.size
        config = tuning.choose("redistribute", m, k)
        block = _block(config, (k, config.entries), (m, config.tile))
        return _call(
            functools.partial(_redistribute_grad_kernel, block=block),
            (pl.cdiv(k, block[0]),),
            [(x.shape, x.dtype) for x in (means, sigmas, values)],
            points,
            means,
            sigmas,
            where,
            values,
            grad,
            config=config,
            interpret=interpret,
        )

    return jax.vmap(one)(points, means, sigmas, values, where, grad)


def gathered_attention(q, k, v, indices, log_weights, *, interpret):
    """`xla.gathered_attention`, one batch axis: an online softmax over tiles of entries."""

    def one(q, k, v, indices, log_weights):
        indices, t = _present(indices, log_weights), q.shape[0]
        config, block = _attention_tile(indices, q, v)
        return _call(
            functools.partial(_attention_kernel, block=block),
            (pl.cdiv(t, block[0]),),
            [((t, v.shape[1]), q.dtype), ((t,), jnp.float32)],
            indices,
            log_weights,
            q,
            k,
            v,
            config=config,
            interpret=interpret,
        )

    return jax.vmap(one)(q, k, v, indices, log_weights)


def gathered_attention_grad(
    q, k, v, indices, log_weights, out, log_sum_exp, grad, *, interpret, deterministic=False
):
    """`xla.gathered_attention_grad`, one batch axis: keys and values are gathered once.

    The kernel leaves softmax weights and logit gradients, [t,p] each, for the scatters to k and v.
    """

    def one(q, k, v, indices, log_weights, out, log_sum_exp, grad):
        indices = _present(indices, log_weights)
        config, block = _attention_tile(indices, q, v)
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
            config=config,
            interpret=interpret,
        )
        scatter = functools.partial(
            _scatter, num_rows=k.shape[0], deterministic=deterministic, interpret=interpret
        )
        dk, dv = scatter(indices, None, dlogits, q), scatter(indices, None, weights, grad)
        return dq, dk.astype(k.dtype), dv.astype(v.dtype), dlogits.astype(log_weights.dtype)

    return jax.vmap(one)(q, k, v, indices, log_weights, out, log_sum_exp, grad)


def _call(kernel, grid, outputs, *operands, config, interpret, aliases=None):
    """`kernel` over `grid`, on whole arrays; `outputs` are pairs of a shape and a dtype."""
    varying = jax.typeof(operands[0]).manual_axis_type
    return pl.pallas_call(
        kernel,
        grid=grid,
        out_shape=tuple(jax.ShapeDtypeStruct(*out, manual_axis_type=varying) for out in outputs),
        input_output_aliases=aliases or {},
        compiler_params=plt.CompilerParams(num_warps=config.warps, num_stages=config.stages),
        interpret=interpret,
        name=kernel.func.__name__.strip("_"),
    )(*operands)


def _block(config, *axes):
    """Powers of 2, at most config.tile in product: for each (size, limit), the last axes first."""
    block, left = [], config.tile
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


def _inside(index, size):
    return (index >= 0) & (index < size)


def _sum_rows(starts, sources, values, dense, shape, *, interpret):
    """out[i] = sum over the entries n of row i of values[n] dense[sources[n]], in order.

    Args:
      starts: int32 [i+1]: row i owns entries starts[i] to starts[i + 1]; None if i p to (i + 1) p.
      sources: int32 [n].
      values: float [n].
      dense: float [j,d].
      shape: (i, p), where p is the number of entries of a row, or about that.
      interpret: whether to run in interpret mode.

    Returns:
      float32 [i,d].
    """
    (num_rows, p), d = shape, dense.shape[1]
    config = tuning.choose("sum_rows", p, d)
    block = _block(config, (num_rows, config.tile), (p, config.entries), (d, config.features))
    (out,) = _call(
        functools.partial(_sum_rows_kernel, p=p, block=block),
        (pl.cdiv(num_rows, block[0]), pl.cdiv(d, block[2])),
        [((num_rows, d), jnp.float32)],
        *(() if starts is None else (starts,)),
        sources,
        values,
        dense,
        config=config,
        interpret=interpret,
    )
    return out


def _sum_rows_kernel(*refs, p, block):
    *starts_ref, sources_ref, values_ref, dense_ref, out_ref = refs
    (num_rows, d), num_sources = out_ref.shape, dense_ref.shape[0]
    rows, cols = _range(0, block[0]), _range(1, block[2])
    valid = rows < num_rows
    if starts_ref:
        start = _load(starts_ref[0], (rows,), valid)
        size = _load(starts_ref[0], (rows + 1,), valid) - start
        num_steps = lax.div(jnp.max(size) + (block[1] - 1), block[1])
    else:
        start, size = rows * p, jnp.where(valid, p, 0)
        num_steps = pl.cdiv(p, block[1])

    def step(n, total):
        q = n * block[1] + jnp.arange(block[1], dtype=jnp.int32)[None]
        entries = start[:, None] + q
        sources = _load(sources_ref, (entries,), q < size[:, None], -1)
        present = _inside(sources, num_sources)
        values = _load_floats(values_ref, (entries,), present)
        cells = present[:, :, None] & (cols < d)[None, None]
        dense = _load_floats(dense_ref, (sources[:, :, None], cols[None, None]), cells)
        return total + jnp.sum(values[:, :, None] * dense, axis=1)

    total = lax.fori_loop(0, num_steps, step, jnp.zeros((block[0], block[2]), jnp.float32))
    mask = valid[:, None] & (cols < d)[None]
    _store(out_ref, (rows[:, None], cols[None]), total, mask)


def _scatter(targets, sources, values, dense, *, num_rows, deterministic, interpret):
    """out[j] = sum over the entries n with targets[n] = j of values[n] dense[sources[n]].

    Args:
      targets: int32 [n], or [i,p] if row i of `dense` is the source of its entries.
      sources: int32 [n], or None in that case.
      values: float of the shape of `targets`.
      dense: float [i,d].
      num_rows: rows of the result.
      deterministic: whether each row is summed in the order of its entries.
      interpret: whether to run in interpret mode.

    Returns:
      float32 [num_rows,d].
    """
    p, d, n = targets.shape[-1], dense.shape[1], targets.size
    targets, values = targets.reshape(-1), values.reshape(-1)
    if deterministic:
        order = jnp.argsort(targets)
        rows = jnp.arange(num_rows + 1, dtype=jnp.int32)
        starts = jnp.searchsorted(targets[order], rows).astype(jnp.int32)
        sources = order.astype(jnp.int32) // p if sources is None else sources[order]
        shape = num_rows, -(-n // num_rows)
        return _sum_rows(starts, sources, values[order], dense, shape, interpret=interpret)
    config = tuning.choose("scatter", 1, d)
    block = _block(config, (n, config.tile), (d, config.features))
    operands = (targets, values, dense, *(() if sources is None else (sources,)))
    zeros = jnp.zeros_like(dense, jnp.float32, shape=(num_rows, d))
    (out,) = _call(
        functools.partial(_scatter_kernel, p=p, block=block),
        (pl.cdiv(n, block[0]), pl.cdiv(d, block[1])),
        [(zeros.shape, zeros.dtype)],
        *operands,
        zeros,
        aliases={len(operands): 0},
        config=config,
        interpret=interpret,
    )
    return out


def _scatter_kernel(targets_ref, values_ref, dense_ref, *refs, p, block):
    *sources_ref, _, out_ref = refs
    (num_rows, d), num_sources, n = out_ref.shape, dense_ref.shape[0], targets_ref.shape[0]
    entries, cols = _range(0, block[0]), _range(1, block[1])
    targets = _load(targets_ref, (entries,), entries < n, -1)
    present = _inside(targets, num_rows)
    sources = _load(sources_ref[0], (entries,), present, -1) if sources_ref else entries // p
    present &= _inside(sources, num_sources)
    values = _load_floats(values_ref, (entries,), present)
    cells = present[:, None] & (cols < d)[None]
    dense = _load_floats(dense_ref, (sources[:, None], cols[None]), cells)
    # This addition has no mask: what is absent adds 0, somewhere inside and not all in one place.
    targets = jnp.where(present, targets, lax.rem(entries, num_rows))
    index = (targets[:, None], lax.rem(cols, d)[None])
    index = tuple(jnp.broadcast_to(i, cells.shape) for i in index)
    jax.ref.addupdate(out_ref, index, values[:, None] * dense)


def _dots(rows, cols, lhs, rhs, *, interpret):
    """out[n] = lhs[rows[n]] . rhs[cols[n]]; where `rows` is None, row i of cols [i,p] is i."""
    n, d = cols.size, lhs.shape[1]
    config = tuning.choose("dots", 1, d)
    block = _block(config, (n, config.tile), (d, config.features))
    (out,) = _call(
        functools.partial(_dots_kernel, p=cols.shape[-1], block=block),
        (pl.cdiv(n, block[0]),),
        [((n,), lhs.dtype)],
        *(() if rows is None else (rows,)),
        cols.reshape(-1),
        lhs,
        rhs,
        config=config,
        interpret=interpret,
    )
    return out.reshape(cols.shape)


def _dots_kernel(*refs, p, block):
    *rows_ref, cols_ref, lhs_ref, rhs_ref, out_ref = refs
    n, d = cols_ref.shape[0], lhs_ref.shape[1]
    entries = _range(0, block[0])
    valid = entries < n
    rows = _load(rows_ref[0], (entries,), valid, -1) if rows_ref else entries // p
    cols = _load(cols_ref, (entries,), valid, -1)
    present = _inside(rows, lhs_ref.shape[0]) & _inside(cols, rhs_ref.shape[0])

    def step(f, total):
        features = (f * block[1] + jnp.arange(block[1], dtype=jnp.int32))[None]
        cells = present[:, None] & (features < d)
        lhs = _load_floats(lhs_ref, (rows[:, None], features), cells)
        rhs = _load_floats(rhs_ref, (cols[:, None], features), cells)
        return total + jnp.sum(lhs * rhs, axis=1)

    total = lax.fori_loop(0, pl.cdiv(d, block[1]), step, jnp.zeros(block[:1], jnp.float32))
    _store(out_ref, (entries,), total, valid)


def _load_axes(ref, rows):
    """The columns of [n,r] at `rows`, as r vectors of floats; 1 past the end."""
    n, r = ref.shape
    return [_load(ref, (rows, jnp.int32(a)), rows < n, 1).astype(jnp.float32) for a in range(r)]


def _distances(points, means, sigmas):
    """(point - mean) / sigma, as r tiles [k,m]."""
    return [
        (point[None] - mean[:, None]) / sigma[:, None]
        for point, mean, sigma in zip(points, means, sigmas, strict=True)
    ]


def _densities(points, means, sigmas, nearest, allowed):
    """Densities [k,m] relative to that of the nearest point, in factored form.

    Kernels that round differently agree: no two large distances are subtracted.
    """
    excess = sum(
        ((point - near[:, None]) / sigma[:, None])
        * ((point - mean[:, None] + (near - mean)[:, None]) / sigma[:, None])
        for point, mean, sigma, near in zip(
            (x[None] for x in points), means, sigmas, nearest, strict=True
        )
    )
    return jnp.where(allowed[None], jnp.exp(-jnp.maximum(excess, 0) / 2), 0)


def _nearest(tile, num_steps, means, sigmas):
    """The number of the nearest allowed point of each tuple: int32 [k]."""

    def step(n, state):
        _, points, allowed = tile(n)
        squares = sum(x * x for x in _distances(points, means, sigmas))
        squares = jnp.where(allowed[None], squares, jnp.inf)
        best = jnp.min(squares, axis=1)
        found = n * allowed.size + lax.argmin(squares, 1, jnp.int32)
        nearer = best < state[0]
        return jnp.where(nearer, best, state[0]), jnp.where(nearer, found, state[1])

    tuples = means[0].shape
    start = jnp.full(tuples, jnp.inf, jnp.float32), jnp.zeros(tuples, jnp.int32)
    return lax.fori_loop(0, num_steps, step, start)[1]


def _point_tiles(points_ref, where_ref, size):
    """A function of n to the n-th tile of points: their numbers, coordinates, and which count."""

    def tile(n):
        rows = n * size + jnp.arange(size, dtype=jnp.int32)
        allowed = _load(where_ref, (rows,), rows < points_ref.shape[0], False)
        return rows, _load_axes(points_ref, rows), allowed

    return tile


def _normalise_kernel(points_ref, means_ref, sigmas_ref, where_ref, nearest_ref, out_ref, *, block):
    tuples = _range(0, block[0])
    valid = tuples < means_ref.shape[0]
    means, sigmas = _load_axes(means_ref, tuples), _load_axes(sigmas_ref, tuples)
    tile = _point_tiles(points_ref, where_ref, block[1])
    num_steps = pl.cdiv(points_ref.shape[0], block[1])
    index = _nearest(tile, num_steps, means, sigmas)
    nearest = _load_axes(points_ref, index)

    def step(n, total):
        _, points, allowed = tile(n)
        return total + jnp.sum(_densities(points, means, sigmas, nearest, allowed), axis=1)

    total = lax.fori_loop(0, num_steps, step, jnp.zeros(block[:1], jnp.float32))
    _store(nearest_ref, (tuples,), index, valid)
    _store(out_ref, (tuples,), _inverse(total), valid)


def _inverse(total):
    """1 / total, where the nearest point adds 1; 0 where there is none."""
    return jnp.where(total > 0, 1 / jnp.maximum(total, 1), 0)


def _share_kernel(
    points_ref, means_ref, sigmas_ref, where_ref, nearest_ref, values_ref, out_ref, *, block
):
    rows, points, allowed = _point_tiles(points_ref, where_ref, block[1])(pl.program_id(0))

    def step(n, total):
        tuples = n * block[0] + jnp.arange(block[0], dtype=jnp.int32)
        valid = tuples < values_ref.shape[0]
        means, sigmas = _load_axes(means_ref, tuples), _load_axes(sigmas_ref, tuples)
        nearest = _load_axes(points_ref, _load(nearest_ref, (tuples,), valid))
        values = _load(values_ref, (tuples,), valid)
        densities = _densities(points, means, sigmas, nearest, allowed)
        return total + jnp.sum(values[:, None] * densities, axis=0)

    num_steps = pl.cdiv(values_ref.shape[0], block[0])
    total = lax.fori_loop(0, num_steps, step, jnp.zeros(block[1:], jnp.float32))
    _store(out_ref, (rows,), total, rows < out_ref.shape[0])


def _redistribute_grad_kernel(
    points_ref,
    means_ref,
    sigmas_ref,
    where_ref,
    values_ref,
    grad_ref,
    dmeans_ref,
    dsigmas_ref,
    dvalues_ref,
    *,
    block,
):
    tuples = _range(0, block[0])
    valid = tuples < values_ref.shape[0]
    means, sigmas = _load_axes(means_ref, tuples), _load_axes(sigmas_ref, tuples)
    tile = _point_tiles(points_ref, where_ref, block[1])
    num_steps = pl.cdiv(points_ref.shape[0], block[1])
    nearest = _load_axes(points_ref, _nearest(tile, num_steps, means, sigmas))
    zeros = jnp.zeros(block[:1], jnp.float32)

    def add_grad(n, state):
        total, total_grad = state
        rows, points, allowed = tile(n)
        densities = _densities(points, means, sigmas, nearest, allowed)
        grad = _load(grad_ref, (rows,), allowed)
        return total + jnp.sum(densities, axis=1), total_grad + jnp.sum(
            densities * grad[None], axis=1
        )

    total, mean_grad = lax.fori_loop(0, num_steps, add_grad, (zeros, zeros))
    normaliser = _inverse(total)
    mean_grad *= normaliser

    def add_moments(n, moments):
        rows, points, allowed = tile(n)
        densities = _densities(points, means, sigmas, nearest, allowed)
        grad = _load(grad_ref, (rows,), allowed)
        deviation = densities * (grad[None] - mean_grad[:, None])
        distances = _distances(points, means, sigmas)
        return [
            (first + jnp.sum(deviation * x, axis=1), second + jnp.sum(deviation * x * x, axis=1))
            for (first, second), x in zip(moments, distances, strict=True)
        ]

    moments = lax.fori_loop(0, num_steps, add_moments, [(zeros, zeros) for _ in means])
    weight = normaliser * _load(values_ref, (tuples,), valid)
    for axis, ((first, second), sigma) in enumerate(zip(moments, sigmas, strict=True)):
        _store(dmeans_ref, (tuples, jnp.int32(axis)), first * weight / sigma, valid)
        _store(dsigmas_ref, (tuples, jnp.int32(axis)), second * weight / sigma, valid)
    _store(dvalues_ref, (tuples,), mean_grad, valid)


def _present(indices, log_weights):
    """The indices, -1 where an entry has no weight."""
    return jnp.where(log_weights > -jnp.inf, indices, -1)


def _attention_tile(indices, q, v):
    (t, p), d = indices.shape, max(q.shape[1], v.shape[1])
    config = tuning.choose("gathered_attention", p, d)
    return config, _block(config, (t, config.tile), (p, config.entries), (d, _MAX_HEAD))[:2]


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
    present = _inside(sources, k_ref.shape[0])
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
        weights = jnp.exp(logits - _finite(higher)[:, None])
        decay = jnp.exp(top - _finite(higher))
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
    _store(log_sum_exp_ref, (rows,), _finite(top) + jnp.log(total), valid)


def _finite(top):
    """The largest logit of a row, or 0 where all are -inf."""
    return jnp.where(top > -jnp.inf, top, 0)


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
