"""Plain JAX: the meaning of each operation, and its fallback on every platform.

An index outside its axis never reads or writes: gathers clamp it and its product is masked,
scatters drop it. 16-bit floats accumulate in float32. No size is 0 here: `dispatch` answers for
those.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

# What is summed over entries or tuples is summed in blocks of so many, unrolled.
_UNROLL = 8
# Products over fewer features than this are summed lane by lane, and scattered in one go.
_LANES = 8
# Proportions are [*B,k,m]; larger ones are made and used up in blocks of tuples.
_MAX_BLOCK = 2**23
# Below so many points in a chunk, batch axes are the last of proportions (measured on CPU).
FEW_POINTS = 16

# In full float32, also where a device would rather multiply shorter numbers.
_einsum = functools.partial(jnp.einsum, precision="highest")


def accumulator(dtype):
    """The dtype that sums over `dtype` are made in: float32, or float64 for float64."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


@jax.custom_jvp
def stored(x: jax.Array) -> jax.Array:
    """The same array, kept in memory rather than computed anew wherever it is used.

    XLA on CPU fuses what computes tuples and points into all that is made of them, and then takes
    the exponential of one number at a time. It ignores `optimization_barrier`, but it fuses no
    reduction of several operands.
    """
    pairs = jnp.stack([x, jnp.zeros_like(x)])
    zero = np.zeros((), x.dtype)
    add = lambda a, b: (a[0] + b[0], a[1] + b[1])  # noqa: E731
    return jax.lax.reduce((pairs, pairs), (zero, zero), add, (0,))[0]


@stored.defjvp
def _(primals, tangents):
    return stored(*primals), tangents[0]


def _rows(dense, indices):
    rows = dense.at[indices].get(mode="clip", wrap_negative_indices=False)
    return rows.astype(accumulator(dense.dtype))


def _scatter_rows(indices, updates, out):
    return out.at[indices].add(updates, mode="drop", wrap_negative_indices=False)


def _dots(product, lhs, rhs):
    """Sums product(lhs, rhs) [...,d] over d: eight lanes at a time, which no [...,d] array feeds.

    `product` takes columns [...,8] of both operands. A sum over a short last axis is slow on CPU.
    """
    d = lhs.shape[-1]
    width = min(d, _LANES)
    lhs, rhs = (jnp.pad(x, [(0, 0), (0, -d % width)]) for x in (lhs, rhs))
    columns = [slice(c, c + width) for c in range(0, d, width)]
    lanes = functools.reduce(jnp.add, [product(lhs[:, c], rhs[:, c]) for c in columns])
    return _dot("...d,d->...", lanes, jnp.ones(width, lanes.dtype))


def _in_bounds(indices, size):
    return (indices >= 0) & (indices < size)


@functools.partial(jnp.vectorize, signature="(i,p),(i,p),(j,d)->(i,d)")
def ell_spmm(indices, values, dense):
    """out[i] = sum over q of values[i, q] dense[indices[i, q]].

    A loop over blocks of q, unrolled: XLA fuses gather, product and sum of a block, so that no
    [i, p, d] array exists, but it cannot fuse a loop into its readers, who would each repeat it.
    """
    allowed = _in_bounds(indices, dense.shape[0])
    values = values.astype(accumulator(dense.dtype))

    def term(q):
        product = values[:, q, None] * _rows(dense, indices[:, q])
        return jnp.where(allowed[:, q, None], product, 0)

    # A first block of what is over, so that all others are full and end in a loop.
    entries = indices.shape[1]
    first = (entries - 1) % _UNROLL + 1
    add = lambda q, total: total + term(q)  # noqa: E731
    total = jax.lax.fori_loop(1, first, add, term(0), unroll=_UNROLL)
    total = jax.lax.fori_loop(first, entries, add, total, unroll=_UNROLL)
    return total.astype(dense.dtype)


def ell_spmm_transposed(indices, values, dense, *, num_cols):
    """out[j] = sum of values[i, q] dense[i] over the entries with indices[i, q] = j.

    One scatter for each q, so that no [i, p, d] array exists, unless d is small. CPUs then take the
    last batch axis (the heads of an attention) one by one, so that what is scattered into stays in
    their caches. Other batch axes may be sharded, and are never taken apart.
    """

    @functools.partial(jnp.vectorize, signature="(i,p),(i,p),(i,d)->(j,d)")
    def scatter(indices, values, dense):
        dtype, d = accumulator(dense.dtype), dense.shape[1]
        values, rows = values.astype(dtype), dense.astype(dtype)
        out = jnp.zeros_like(rows, shape=(num_cols, d))

        def add_entry(out, entry):
            index, value = entry
            return _scatter_rows(index, value[:, None] * rows, out), None

        if d < _LANES:
            out = _scatter_rows(indices, values[:, :, None] * rows[:, None], out)
        else:
            out, _ = jax.lax.scan(add_entry, out, (indices.T, values.T))
        return out.astype(dense.dtype)

    def one_by_one(*operands):
        last = [jnp.moveaxis(x, -3, 0) for x in operands]
        return jnp.moveaxis(jax.lax.map(lambda x: scatter(*x), last), 0, -3)

    if values.ndim < 4 or dense.shape[-1] < _LANES:
        return scatter(indices, values, dense)
    return jax.lax.platform_dependent(indices, values, dense, cpu=one_by_one, default=scatter)


@functools.partial(jnp.vectorize, signature="(i,p),(i,d),(j,d)->(i,p)")
def ell_sddmm(indices, lhs, rhs):
    """out[i, q] = lhs[i] . rhs[indices[i, q]], a few q at a time: all lanes would be [i, p, 8].

    The blocks of q are equal and all in one loop: before it, XLA might gather from what is still
    laid out otherwise, at up to four times the cost.
    """
    left = lhs.astype(accumulator(lhs.dtype))
    i, entries = indices.shape
    num_blocks = -(-entries // _UNROLL)
    size = -(-entries // num_blocks)

    def block(indices):
        return _dots(lambda x, y: x[None] * _rows(y, indices), left, rhs)

    blocks = jnp.pad(indices.T, [(0, num_blocks * size - entries), (0, 0)])
    dots = jax.lax.map(block, blocks.reshape(num_blocks, size, i)).reshape(-1, i)[:entries].T
    return jnp.where(_in_bounds(indices, rhs.shape[0]), dots, 0).astype(lhs.dtype)


def spmm(rows, cols, values, dense, *, num_rows):
    """out[r] = sum of values[n] dense[cols[n]] over the entries with rows[n] = r."""

    @functools.partial(jnp.vectorize, signature="(n),(n),(n),(j,d)->(i,d)")
    def scatter(rows, cols, values, dense):
        rows = jnp.where(_in_bounds(cols, dense.shape[0]), rows, -1)
        updates = values.astype(accumulator(dense.dtype))[:, None] * _rows(dense, cols)
        out = jnp.zeros_like(updates, shape=(num_rows, dense.shape[1]))
        return _scatter_rows(rows, updates, out).astype(dense.dtype)

    return scatter(rows, cols, values, dense)


@functools.partial(jnp.vectorize, signature="(n),(n),(i,d),(j,d)->(n)")
def sddmm(rows, cols, lhs, rhs):
    """out[n] = lhs[rows[n]] . rhs[cols[n]]."""
    dots = _dots(lambda x, y: _rows(x, rows) * _rows(y, cols), lhs, rhs)
    allowed = _in_bounds(rows, lhs.shape[0]) & _in_bounds(cols, rhs.shape[0])
    return jnp.where(allowed, dots, 0).astype(lhs.dtype)


def redistribute(points, means, sigmas, values, where):
    """out[i] = sum over j of values[j] softmax_i(-|(points[i] - means[j]) / sigmas[j]|^2 / 2)."""
    shape = where.shape
    axis, points, where, tuples = _chunks(points, where, means, sigmas, values)

    def add_block(total, block):
        means, inverse_sigmas, values = block
        density = _densities(_distances(points, means, inverse_sigmas), where, axis)
        weights = values * _inverse(density.sum(axis, keepdims=True))
        return total + _combine_tuples(weights, density, axis), None

    total, _ = _scan_tuples(add_block, jnp.zeros_like(where, values.dtype), tuples, where.size)
    return _arrange_back(total, axis, shape)


def redistribute_grad(points, means, sigmas, values, where, grad):
    """Gradients of means, sigmas and values; the shares are made anew."""
    shapes = (means.shape, sigmas.shape, values.shape)
    axis, points, where, tuples = _chunks(points, where, means, sigmas, values)
    grad = _arrange(grad[..., None, :], axis)

    def block_gradients(_, block):
        means, inverse_sigmas, values = block
        distances = _distances(points, means, inverse_sigmas)
        density = _densities(distances, where, axis)
        # A tuple's value gets the mean of the gradient under its shares; what its shares get is
        # the deviation from that mean. Products with distances are summed in a single pass.
        total, product = _total_and_product(density, grad, axis)
        normaliser = _inverse(total)
        mean_grad = product * normaliser
        deviation = density * (grad - mean_grad)
        scale = values * normaliser
        grads = _gradients_of_positions(deviation, distances, inverse_sigmas, scale, axis)
        return None, (*grads, mean_grad)

    _, grads = _scan_tuples(block_gradients, None, tuples, where.size)
    return tuple(_arrange_back(x, axis, shape) for x, shape in zip(grads, shapes, strict=True))


def single_tuple_grad(points, means, sigmas, shares, grad):
    """Gradients of means and sigmas where chunks have one tuple, of value 1, from its shares.

    As for any softmax, its result is all that is needed of the densities.
    """
    shapes = (means.shape, sigmas.shape)
    values = jnp.ones_like(means[..., 0])
    axis, points, shares, tuples = _chunks(points, shares, means, sigmas, values)
    means, inverse_sigmas, values = tuples
    grad = _arrange(grad[..., None, :], axis)
    total, product = _total_and_product(shares, grad, axis)
    deviation = shares * (grad - product / jnp.where(total > 0, total, 1))
    distances = _distances(points, means, inverse_sigmas)
    grads = _gradients_of_positions(deviation, distances, inverse_sigmas, values, axis)
    return tuple(_arrange_back(x, axis, shape) for x, shape in zip(grads, shapes, strict=True))


def _gradients_of_positions(deviation, distances, inverse_sigmas, scale, axis):
    """Gradients of means and sigmas, their r axes along `axis`."""
    terms = [deviation * d for d in distances] + [deviation * d * d for d in distances]
    weights = 2 * [scale * inverse_sigma for inverse_sigma in inverse_sigmas]
    grads = [x * weight for x, weight in zip(_sums(terms, axis), weights, strict=True)]
    r = len(distances)
    return jnp.concatenate(grads[:r], axis), jnp.concatenate(grads[r:], axis)


def _chunks(points, where, means, sigmas, values):
    """The axes of the index space apart, which CPUs fuse far better, and batches where they suit.

    Proportions are laid out as [b,k,m], with the batch axes as one, b; or where there are few
    points to a chunk as [m,k,*B], since CPUs compute several numbers at once along the last axis.

    Returns:
      The axis of the points, 2 or 0, and the arguments with axes of size 1 to broadcast with
      proportions: r arrays of points in the dtype of the others; where, or other marks of points;
      and the tuples (r arrays of means, r arrays of 1 / sigmas, values).
    """
    m, r = points.shape[-2:]
    axis = 0 if m < FEW_POINTS else 2
    points = points.astype(means.dtype)
    points, means, sigmas = ([x[..., a] for a in range(r)] for x in (points, means, sigmas))
    return (
        axis,
        [_arrange(x[..., None, :], axis) for x in points],
        _arrange(where[..., None, :], axis),
        (
            [_arrange(x[..., None], axis) for x in means],
            [_arrange(1 / x[..., None], axis) for x in sigmas],
            _arrange(values[..., None], axis),
        ),
    )


def _arrange(x, axis):
    """From [*B,k,m] to the layout whose points are along `axis`."""
    return x.reshape(-1, *x.shape[-2:]) if axis == 2 else jnp.moveaxis(x, (-1, -2), (0, 1))


def _arrange_back(x, axis, shape):
    """From that layout to `shape`: that of [*B,k,m], of which k or m may be 1 and left out."""
    return (x if axis == 2 else jnp.moveaxis(x, (0, 1), (-1, -2))).reshape(shape)


def _distances(points, means, inverse_sigmas):
    """(point - mean) / sigma: r arrays of the size of proportions."""
    tuples = zip(points, means, inverse_sigmas, strict=True)
    return [(point - mean) * inverse_sigma for point, mean, inverse_sigma in tuples]


def _densities(distances, where, axis):
    """Densities relative to the densest allowed point.

    Every operand of the size of proportions is an array: XLA on CPU hands minimum and exponential
    to a library, and makes whole arrays of the constants that it hands over.
    """
    halves = functools.reduce(jnp.add, [d * d for d in distances]) / 2
    halves = jnp.where(where, halves, jnp.inf)
    limits = jnp.finfo(halves.dtype)
    # Compilers may compute the squares twice and round them differently; where they are large, that
    # could lose the nearest point. Squares that agree to rounding are as near as the nearest.
    slack = 1 + 2 * len(distances) * limits.eps
    nearest = jnp.minimum(_least(halves, axis), limits.max / 4) * slack
    return jnp.exp(nearest - jnp.maximum(halves, nearest))


def _inverse(total):
    """1 / total of a tuple's densities: either the densest point adds 1, or there is no point."""
    return jnp.where(total > 0, 1 / jnp.maximum(total, 1), 0)


def _least(x, axis):
    """The minimum over `axis`, which is kept.

    Not as `min` over few points: XLA on CPU would hand that to a library of reductions, together
    with the exponential that follows, which takes the library several times as long as XLA.
    """
    if axis == 2:
        return x.min(axis, keepdims=True)
    least = lambda a, b: jnp.where(b < a, b, a)  # noqa: E731
    return jnp.expand_dims(jax.lax.reduce(x, np.array(np.inf, x.dtype), least, (axis,)), axis)


def _sums(terms, axis):
    """Sums several arrays over `axis`, which is kept, in one pass."""
    zeros = [np.zeros((), t.dtype) for t in terms]
    add = lambda a, b: tuple(x + y for x, y in zip(a, b, strict=True))  # noqa: E731
    sums = jax.lax.reduce(tuple(terms), tuple(zeros), add, (axis,))
    return [jnp.expand_dims(x, axis) for x in sums]


def _total_and_product(density, grad, axis):
    """The sums over the points of density and of density * grad."""
    if axis == 0:
        return _sums([density, density * grad], axis)
    return density.sum(axis, keepdims=True), _einsum("bkm,bxm->bkx", density, grad)


def _combine_tuples(weights, density, axis):
    """The sum over the tuples of weights * density."""
    if axis == 2:
        return _einsum("bkx,bkm->bxm", weights, density)

    def term(j):
        weight, row = (jax.lax.dynamic_slice_in_dim(x, j, 1, 1) for x in (weights, density))
        return weight * row

    k, first = weights.shape[1], term(0)
    add = lambda j, total: total + term(j)  # noqa: E731
    return first if k == 1 else jax.lax.fori_loop(1, k, add, first, unroll=_UNROLL)


def _scan_tuples(step, carry, tuples, num_points):
    """`lax.scan` over blocks of tuples, their axis 1; a single call where they fit at once."""
    k = tuples[-1].shape[1]
    num_blocks = min(k, -(-k * num_points // _MAX_BLOCK))
    if num_blocks <= 1:
        return step(carry, tuples)
    size = -(-k // num_blocks)
    num_blocks = -(-k // size)

    def split(x, fill):
        fillers = [(0, 0)] * x.ndim
        fillers[1] = (0, num_blocks * size - k)
        x = jnp.pad(x, fillers, constant_values=fill)
        return jnp.moveaxis(x.reshape(x.shape[0], num_blocks, size, *x.shape[2:]), 1, 0)

    def join(x):
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], num_blocks * size, *x.shape[3:])[:, :k]

    means, inverse_sigmas, values = tuples
    # Sigmas of 1 for the tuples that fill up the last block.
    blocks = [split(x, 0) for x in means], [split(x, 1) for x in inverse_sigmas], split(values, 0)
    carry, out = jax.lax.scan(step, carry, blocks)
    return carry, jax.tree.map(join, out)


def gathered_attention(q, k, v, indices, log_weights, *, spmm=ell_spmm, sddmm=ell_sddmm):
    """out[i] = sum over a of softmax_a(q[i] . k[indices[i, a]] + log_weights[i, a]) v[...].

    Returns out, and in the accumulator's dtype the log-sum-exp [*B,t] of the logits of each row, 0
    where a row has no entry.
    """
    dtype = q.dtype
    indices, logits, q, k, v = _gathered_logits(q, k, v, indices, log_weights, sddmm)
    top = _finite(logits.max(-1, keepdims=True))
    weights = jnp.exp(logits - top)
    # Either the top entry adds 1, or there is no entry.
    total = jnp.maximum(weights.sum(-1, keepdims=True), 1)
    return spmm(indices, weights / total, v).astype(dtype), (top + jnp.log(total))[..., 0]


def gathered_attention_grad(
    q, k, v, indices, log_weights, out, log_sum_exp, grad,
    *, spmm=ell_spmm, spmm_transposed=ell_spmm_transposed, sddmm=ell_sddmm,
):  # fmt: skip
    """Gradients of q, k, v and log_weights."""
    dtype, num_keys = q.dtype, k.shape[-2]
    indices, logits, q, k, v = _gathered_logits(q, k, v, indices, log_weights, sddmm)
    out, grad = out.astype(logits.dtype), grad.astype(logits.dtype)
    weights = jnp.exp(logits - log_sum_exp[..., None])
    mean_grad = (out * grad).sum(-1, keepdims=True)
    dlogits = jnp.where(indices < 0, 0, weights * (sddmm(indices, grad, v) - mean_grad))
    grads = (
        spmm(indices, dlogits, k),
        spmm_transposed(indices, dlogits, q, num_cols=num_keys),
        spmm_transposed(indices, weights, grad, num_cols=num_keys),
        dlogits,
    )
    return tuple(x.astype(dtype) for x in grads)


def _gathered_logits(q, k, v, indices, log_weights, sddmm):
    """Indices, -1 where absent; logits, -inf there; q, k and v; in the accumulator's dtype."""
    q, k, v, log_weights = (x.astype(accumulator(x.dtype)) for x in (q, k, v, log_weights))
    present = _in_bounds(indices, k.shape[-2]) & (log_weights != -jnp.inf)
    indices = jnp.where(present, indices, -1)
    logits = jnp.where(present, sddmm(indices, q, k) + log_weights, -jnp.inf)
    return indices, logits, q, k, v


def _finite(top):
    """The largest logit of a row, or 0 where all are -inf."""
    return jnp.where(top > -jnp.inf, top, 0)


def block_attention(q, k, v, block_indices, log_weights, *, block, causal):
    """`gathered_attention` of blocks of queries over blocks of keys, entry by entry.

    Returns out, and in the accumulator's dtype the log-sum-exp [*B,t] of the logits of each query,
    0 where it has no key.
    """

    @functools.partial(jnp.vectorize, signature="(t,d),(s,d),(s,e),(i,p),(i,p)->(t,e),(t)")
    def attend(q, k, v, indices, log_weights):
        q_blocks, k_blocks, v_blocks = (_blocks(x, block) for x in (q, k, v))

        def add_entry(state, entry):
            top, total, out = state
            logits, _, values = _block_logits(q_blocks, k_blocks, v_blocks, *entry, causal)
            higher = jnp.maximum(top, logits.max(-1, keepdims=True))
            weights = jnp.exp(logits - _finite(higher))
            decay = jnp.exp(top - _finite(higher))
            total = total * decay + weights.sum(-1, keepdims=True)
            return (higher, total, out * decay + _dot("iqk,ike->iqe", weights, values)), None

        one = q_blocks[..., :1]
        out = jnp.zeros_like(one, shape=(*one.shape[:2], v.shape[-1]))
        state = jnp.full_like(one, -jnp.inf), jnp.zeros_like(one), out
        entries = indices.T, log_weights.astype(q_blocks.dtype).T
        (top, total, out), _ = jax.lax.scan(add_entry, state, entries)
        total = jnp.maximum(total, 1)
        log_sum_exp = _finite(top) + jnp.log(total)
        return (out / total).reshape(-1, v.shape[-1]).astype(q.dtype), log_sum_exp.reshape(-1)

    return attend(q, k, v, block_indices, log_weights)


def block_attention_grad(
    q, k, v, block_indices, log_weights, out, log_sum_exp, grad, *, block, causal
):
    """Gradients of q, k, v and log_weights."""

    @functools.partial(
        jnp.vectorize,
        signature="(t,d),(s,d),(s,e),(i,p),(i,p),(t,e),(t),(t,e)->(t,d),(s,d),(s,e),(i,p)",
    )
    def gradients(q, k, v, indices, log_weights, out, log_sum_exp, grad):
        q_blocks, k_blocks, v_blocks, out, grad = (_blocks(x, block) for x in (q, k, v, out, grad))
        log_sum_exp = log_sum_exp.reshape(-1, block, 1)
        mean_grad = (out * grad).sum(-1, keepdims=True)

        def add_entry(state, entry):
            dq, dk, dv = state
            logits, keys, values = _block_logits(q_blocks, k_blocks, v_blocks, *entry, causal)
            weights = jnp.exp(logits - log_sum_exp)
            dlogits = weights * (_dot("iqe,ike->iqk", grad, values) - mean_grad)
            dlogits = jnp.where(logits > -jnp.inf, dlogits, 0)
            dq = dq + _dot("iqk,ikd->iqd", dlogits, keys)
            dk = _scatter_rows(entry[0], _dot("iqk,iqd->ikd", dlogits, q_blocks), dk)
            dv = _scatter_rows(entry[0], _dot("iqk,iqe->ike", weights, grad), dv)
            return (dq, dk, dv), dlogits.sum((-2, -1))

        state = jax.tree.map(jnp.zeros_like, (q_blocks, k_blocks, v_blocks))
        entries = indices.T, log_weights.astype(q_blocks.dtype).T
        (dq, dk, dv), dlog_weights = jax.lax.scan(add_entry, state, entries)
        grads = dq.reshape(q.shape), dk.reshape(k.shape), dv.reshape(v.shape), dlog_weights.T
        return tuple(x.astype(q.dtype) for x in grads)

    return gradients(q, k, v, block_indices, log_weights, out, log_sum_exp, grad)


def _blocks(x, block):
    """[t,d] as [t/block,block,d], in the accumulator's dtype."""
    return x.reshape(-1, block, x.shape[-1]).astype(accumulator(x.dtype))


def _dot(subscripts, lhs, rhs):
    return jnp.einsum(subscripts, lhs, rhs, precision="highest")


def _block_logits(q, k, v, index, log_weight, causal):
    """One key block for each query block: logits [i,block,block], keys and values [i,block,...].

    Logits are -inf, and keys and values 0, where there is no such block.
    """
    num_rows, block, _ = q.shape
    present = (_in_bounds(index, k.shape[0]) & (log_weight != -jnp.inf))[:, None, None]
    keys, values = (jnp.where(present, _rows(x, index), 0) for x in (k, v))
    allowed = present
    if causal:
        row = jnp.arange(num_rows, dtype=index.dtype)
        diagonal = np.tri(block, dtype=bool)[None] & (index == row)[:, None, None]
        allowed &= (index < row)[:, None, None] | diagonal
    logits = _dot("iqd,ikd->iqk", q, keys) + log_weight[:, None, None]
    return jnp.where(allowed, logits, -jnp.inf), keys, values
