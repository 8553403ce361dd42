"""Plain JAX: the meaning of each operation, and its fallback on every platform.

An index outside its axis never reads or writes: gathers clamp it and its product is masked,
scatters drop it. 16-bit floats accumulate in float32. No size is 0 here; `api` answers for those.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

_UNROLL = 16
# Products over fewer features than this are summed lane by lane, and scattered in one go.
_LANES = 8
# Proportions are [*B,k,m]; larger ones are made and used up in blocks of tuples.
_MAX_BLOCK = 2**23


def accumulator(dtype):
    """The dtype in which sums over `dtype` are made."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


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

    Unrolled over q, so that XLA fuses gather, product and sum, and no [i, p, d] array exists.
    """
    allowed = _in_bounds(indices, dense.shape[0])
    values = values.astype(accumulator(dense.dtype))

    def term(q):
        product = values[:, q, None] * _rows(dense, indices[:, q])
        return jnp.where(allowed[:, q, None], product, 0)

    entries = indices.shape[1]
    total = jax.lax.fori_loop(1, entries, lambda q, total: total + term(q), term(0), unroll=_UNROLL)
    return total.astype(dense.dtype)


def ell_spmm_transposed(indices, values, dense, *, num_cols):
    """out[j] = sum of values[i, q] dense[i] over the entries with indices[i, q] = j.

    One scatter for each q, so that no [i, p, d] array exists, unless d is small.
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

    return scatter(indices, values, dense)


@functools.partial(jnp.vectorize, signature="(i,p),(i,d),(j,d)->(i,p)")
def ell_sddmm(indices, lhs, rhs):
    """out[i, q] = lhs[i] . rhs[indices[i, q]]."""
    left = lhs.astype(accumulator(lhs.dtype))
    dots = _dots(lambda x, y: x[:, None] * _rows(y, indices), left, rhs)
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
    batch = where.shape[:-1]
    points, means, sigmas, values, where = _chunks(points, means, sigmas, values, where)

    def add_block(total, block):
        means, sigmas, values = block
        density, normaliser = _densities(_distances(points, means, sigmas), where)
        return total + jnp.einsum("bk,bkm->bm", values * normaliser, density), None

    total = jnp.zeros_like(where, values.dtype)
    total, _ = _scan_tuples(add_block, total, (means, sigmas, values), where.shape)
    return total.reshape(*batch, -1)


def redistribute_grad(points, means, sigmas, values, where, grad):
    """Gradients of means, sigmas and values; the shares are made anew."""
    shapes = (means.shape, sigmas.shape, values.shape)
    points, means, sigmas, values, where = _chunks(points, means, sigmas, values, where)
    grad = grad.reshape(where.shape)

    def block_gradients(_, block):
        means, sigmas, values = block
        distances = _distances(points, means, sigmas)
        density, normaliser = _densities(distances, where)
        # A tuple's value gets the mean of the gradient under its shares; what its shares get is
        # the deviation from that mean. Products with distances are summed in a single pass.
        mean_grad = jnp.einsum("bkm,bm->bk", density, grad) * normaliser
        deviation = density * (grad[:, None, :] - mean_grad[..., None])
        moments = _sums([deviation * d for d in distances] + [deviation * d * d for d in distances])
        first, second = jnp.split(jnp.stack(moments, axis=-1), 2, axis=-1)
        weight = (values * normaliser)[..., None] / sigmas
        return None, (first * weight, second * weight, mean_grad)

    _, grads = _scan_tuples(block_gradients, None, (means, sigmas, values), where.shape)
    return tuple(x.reshape(shape) for x, shape in zip(grads, shapes, strict=True))


def _chunks(points, means, sigmas, values, where):
    """The batch axes as one, b: points [r,b,m] in the dtype of the others, means [b,k,r], ..."""
    *batch, m, r = points.shape
    b, k = math.prod(batch), values.shape[-1]
    points = jnp.moveaxis(points.reshape(b, m, r), -1, 0).astype(means.dtype)
    tuples = means.reshape(b, k, r), sigmas.reshape(b, k, r), values.reshape(b, k)
    return points, *tuples, where.reshape(b, m)


def _distances(points, means, sigmas):
    """The r arrays [b,k,m] of (point - mean) / sigma: axes apart, which CPUs fuse far better."""
    inverse = 1 / sigmas
    return [
        (p[:, None, :] - means[..., a, None]) * inverse[..., a, None] for a, p in enumerate(points)
    ]


def _densities(distances, where):
    """Densities [b,k,m] relative to the densest allowed point, and 1 / their sums [b,k]."""
    squares = functools.reduce(jnp.add, [d * d for d in distances])
    squares = jnp.where(where[:, None, :], squares, jnp.inf)
    nearest = squares.min(-1, keepdims=True, initial=jnp.finfo(squares.dtype).max)
    density = jnp.exp((nearest - squares) / 2)
    total = density.sum(-1)
    return density, jnp.where(total > 0, 1 / jnp.maximum(total, 1), 0)


def _sums(terms):
    """Sums several arrays over their last axis in one pass."""
    zeros = [np.zeros((), t.dtype) for t in terms]
    add = lambda a, b: tuple(x + y for x, y in zip(a, b, strict=True))  # noqa: E731
    return jax.lax.reduce(tuple(terms), tuple(zeros), add, (terms[0].ndim - 1,))


def _scan_tuples(step, carry, tuples, points_shape):
    """`lax.scan` over blocks of tuples, their axis 1; a single call where they fit at once."""
    means, sigmas, values = tuples
    chunks, k = values.shape
    num_blocks = min(k, -(-chunks * k * points_shape[-1] // _MAX_BLOCK))
    if num_blocks <= 1:
        return step(carry, tuples)
    size = -(-k // num_blocks)
    num_blocks = -(-k // size)

    def split(x, fill):
        padding = [(0, 0), (0, num_blocks * size - k)] + [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x, padding, constant_values=fill)
        return jnp.moveaxis(x.reshape(chunks, num_blocks, size, *x.shape[2:]), 1, 0)

    def join(x):
        return jnp.moveaxis(x, 0, 1).reshape(chunks, num_blocks * size, *x.shape[3:])[:, :k]

    carry, out = jax.lax.scan(step, carry, (split(means, 0), split(sigmas, 1), split(values, 0)))
    return carry, jax.tree.map(join, out)


def gathered_attention(q, k, v, indices, log_weights):
    """out[i] = sum over a of softmax_a(q[i] . k[indices[i, a]] + log_weights[i, a]) v[...].

    Returns out, and in the accumulator's dtype the log-sum-exp [*B,t] of the logits of each row, 0
    where a row has no entry.
    """
    dtype = q.dtype
    indices, logits, q, k, v = _gathered_logits(q, k, v, indices, log_weights)
    top = _finite(logits.max(-1, keepdims=True))
    weights = jnp.exp(logits - top)
    # Either the top entry adds 1, or there is no entry.
    total = jnp.maximum(weights.sum(-1, keepdims=True), 1)
    return ell_spmm(indices, weights / total, v).astype(dtype), (top + jnp.log(total))[..., 0]


def gathered_attention_grad(q, k, v, indices, log_weights, out, log_sum_exp, grad):
    """Gradients of q, k, v and log_weights."""
    dtype, num_keys = q.dtype, k.shape[-2]
    indices, logits, q, k, v = _gathered_logits(q, k, v, indices, log_weights)
    out, grad = out.astype(logits.dtype), grad.astype(logits.dtype)
    weights = jnp.exp(logits - log_sum_exp[..., None])
    mean_grad = (out * grad).sum(-1, keepdims=True)
    dlogits = jnp.where(indices < 0, 0, weights * (ell_sddmm(indices, grad, v) - mean_grad))
    grads = (
        ell_spmm(indices, dlogits, k),
        ell_spmm_transposed(indices, dlogits, q, num_cols=num_keys),
        ell_spmm_transposed(indices, weights, grad, num_cols=num_keys),
        dlogits,
    )
    return tuple(x.astype(dtype) for x in grads)


def _gathered_logits(q, k, v, indices, log_weights):
    """Indices, -1 where absent; logits, -inf there; q, k and v; in the accumulator's dtype."""
    q, k, v, log_weights = (x.astype(accumulator(x.dtype)) for x in (q, k, v, log_weights))
    present = _in_bounds(indices, k.shape[-2]) & (log_weights != -jnp.inf)
    indices = jnp.where(present, indices, -1)
    logits = jnp.where(present, ell_sddmm(indices, q, k) + log_weights, -jnp.inf)
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
