"""The meaning of attention over a sparse pattern (equation 12 of docs/method.md).

Every function returns its result and, in the accumulator's dtype, the log-sum-exp [*B,t] of the
logits of each query, 0 where it has no key: what its gradient makes the softmax of again.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ..numerics import accumulator, dot, finite, gather_rows, in_bounds, scatter_rows
from ..products import ell_sddmm, ell_spmm, ell_spmm_transposed


def gathered_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    indices: jax.Array,
    log_weights: jax.Array,
    *,
    scale: float,
    spmm=ell_spmm,
    sddmm=ell_sddmm,
) -> tuple[jax.Array, jax.Array]:
    """out[i] = sum_a softmax_a(scale q[i] . k[indices[i, a]] + log_weights[i, a]) v[...].

    Made of the products `spmm` and `sddmm`.
    """
    dtype = q.dtype
    indices, logits, q, k, v = _gathered_logits(q, k, v, indices, log_weights, scale, sddmm)
    top = jax.lax.stop_gradient(finite(logits.max(-1, keepdims=True)))
    weights = jnp.exp(logits - top)
    # Either the top entry adds 1, or there is no entry.
    total = weights.sum(-1, keepdims=True)
    total = jnp.where(total > 0, total, 1)
    return spmm(indices, weights / total, v).astype(dtype), (top + jnp.log(total))[..., 0]


def gathered_attention_grad(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    indices: jax.Array,
    log_weights: jax.Array,
    out: jax.Array,
    log_sum_exp: jax.Array,
    grad: jax.Array,
    *,
    scale: float,
    spmm=ell_spmm,
    spmm_transposed=ell_spmm_transposed,
    sddmm=ell_sddmm,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k, v and log_weights."""
    dtype, num_keys = q.dtype, k.shape[-2]
    indices, logits, q, k, v = _gathered_logits(q, k, v, indices, log_weights, scale, sddmm)
    out, grad = out.astype(logits.dtype), grad.astype(logits.dtype)
    weights = jnp.exp(logits - log_sum_exp[..., None])
    mean_grad = (out * grad).sum(-1, keepdims=True)
    dlogits = jnp.where(indices < 0, 0, weights * (sddmm(indices, grad, v) - mean_grad))
    grads = (
        spmm(indices, dlogits, k) * scale,
        spmm_transposed(indices, dlogits, q, num_cols=num_keys),
        spmm_transposed(indices, weights, grad, num_cols=num_keys),
    )
    return *(x.astype(dtype) for x in grads), dlogits


def _gathered_logits(q, k, v, indices, log_weights, scale, sddmm):
    """Indices, -1 where absent; logits, -inf there; scaled q, k, v; in the accumulator's dtype."""
    q, k, v = (x.astype(accumulator(x.dtype)) for x in (q, k, v))
    present = in_bounds(indices, k.shape[-2]) & (log_weights != -jnp.inf)
    indices, q = jnp.where(present, indices, -1), q * scale
    logits = jnp.where(present, sddmm(indices, q, k) + log_weights, -jnp.inf)
    return indices, logits, q, k, v


def block_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    block_indices: jax.Array,
    log_weights: jax.Array,
    *,
    block: int,
    causal: bool,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """`gathered_attention` of blocks of queries over blocks of keys, entry by entry."""
    mask = jnp.ones_like(k[..., 0], bool)
    return masked_block_attention(
        q, k, v, block_indices, log_weights, mask, block=block, causal=causal, scale=scale
    )


def masked_block_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    block_indices: jax.Array,
    log_weights: jax.Array,
    mask: jax.Array,
    *,
    block: int,
    causal: bool,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """The same over the keys that `mask` bool [*B,s] allows."""

    @functools.partial(jnp.vectorize, signature="(t,d),(s,d),(s,e),(i,p),(i,p),(s)->(t,e),(t)")
    def attend(q, k, v, indices, log_weights, mask):
        q_blocks, k_blocks, v_blocks, exists = _blocks(q, k, v, mask, block)

        def add_entry(state, entry):
            top, total, out = state
            logits, _, values = _block_logits(
                q_blocks, k_blocks, v_blocks, exists, *entry, causal, scale
            )
            higher = jnp.maximum(top, jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
            weights = jnp.exp(logits - finite(higher))
            decay = jnp.exp(top - finite(higher))
            total = total * decay + weights.sum(-1, keepdims=True)
            out = out * decay + dot("iqk,ike->iqe", weights, values.astype(weights.dtype))
            return (higher, total, out), None

        one = jnp.zeros_like(q_blocks[..., :1], log_weights.dtype)
        out = jnp.zeros_like(one, shape=(*one.shape[:2], v.shape[-1]))
        state = jnp.full_like(one, -jnp.inf), one, out
        (top, total, out), _ = jax.lax.scan(add_entry, state, (indices.T, log_weights.T))
        total = jnp.where(total > 0, total, 1)
        log_sum_exp = finite(top) + jnp.log(total)
        return (out / total).reshape(-1, v.shape[-1]).astype(q.dtype), log_sum_exp.reshape(-1)

    return attend(q, k, v, block_indices, log_weights, mask)


def block_attention_grad(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    block_indices: jax.Array,
    log_weights: jax.Array,
    *others: jax.Array,
    block: int,
    causal: bool,
    scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k, v and log_weights."""
    mask = jnp.ones_like(k[..., 0], bool)
    operands = q, k, v, block_indices, log_weights, mask, *others
    return masked_block_attention_grad(*operands, block=block, causal=causal, scale=scale)


def masked_block_attention_grad(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    block_indices: jax.Array,
    log_weights: jax.Array,
    mask: jax.Array,
    out: jax.Array,
    log_sum_exp: jax.Array,
    grad: jax.Array,
    *,
    block: int,
    causal: bool,
    scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k, v and log_weights."""

    @functools.partial(
        jnp.vectorize,
        signature="(t,d),(s,d),(s,e),(i,p),(i,p),(s),(t,e),(t),(t,e)->(t,d),(s,d),(s,e),(i,p)",
    )
    def gradients(q, k, v, indices, log_weights, mask, out, log_sum_exp, grad):
        dtype = log_weights.dtype
        q_blocks, k_blocks, v_blocks, exists = _blocks(q, k, v, mask, block)
        out, grad = (x.reshape(-1, block, x.shape[-1]).astype(dtype) for x in (out, grad))
        log_sum_exp = log_sum_exp.reshape(-1, block, 1)
        mean_grad = (out * grad).sum(-1, keepdims=True)

        def add_entry(state, entry):
            dq, dk, dv = state
            logits, keys, values = _block_logits(
                q_blocks, k_blocks, v_blocks, exists, *entry, causal, scale
            )
            weights = jnp.exp(logits - log_sum_exp)
            dweights = dot("iqe,ike->iqk", grad, values.astype(dtype))
            dlogits = jnp.where(logits > -jnp.inf, weights * (dweights - mean_grad), 0)
            dkeys = dot("iqk,iqd->ikd", dlogits, q_blocks.astype(dtype))
            dq = dq + dot("iqk,ikd->iqd", dlogits, keys.astype(dtype))
            dk = scatter_rows(entry[0], dkeys, dk)
            dv = scatter_rows(entry[0], dot("iqk,iqe->ike", weights, grad), dv)
            return (dq, dk, dv), dlogits.sum((-2, -1))

        state = tuple(jnp.zeros_like(x, dtype) for x in (q_blocks, k_blocks, v_blocks))
        (dq, dk, dv), dlog_weights = jax.lax.scan(add_entry, state, (indices.T, log_weights.T))
        grads = (dq * scale).reshape(q.shape), (dk * scale).reshape(k.shape), dv.reshape(v.shape)
        return *(x.astype(q.dtype) for x in grads), dlog_weights.T

    return gradients(q, k, v, block_indices, log_weights, mask, out, log_sum_exp, grad)


def _blocks(q, k, v, mask, block):
    """[t,d] as [t/block,block,d], and [s] as [s/block,block]; keys that do not exist are 0."""
    k, v = (jnp.where(mask[:, None], x, 0) for x in (k, v))
    blocks = (x.reshape(-1, block, x.shape[-1]) for x in (q, k, v))
    return *blocks, mask.reshape(-1, block)


def _block_logits(q, k, v, exists, index, log_weight, causal, scale):
    """One key block for each query block: logits [i,block,block], keys and values [i,block,...].

    Logits are -inf, and keys and values 0, where there is no such block; logits are also -inf where
    there is no such key.
    """
    num_rows, block, _ = q.shape
    present = in_bounds(index, k.shape[0]) & (log_weight != -jnp.inf)
    index = jnp.where(present, index, -1)
    keys, values = gather_rows(k, index), gather_rows(v, index)
    allowed = present[:, None, None] & gather_rows(exists, index)[:, None, :]
    if causal:
        row = jnp.arange(num_rows, dtype=index.dtype)
        diagonal = np.tri(block, dtype=bool)[None] & (index == row)[:, None, None]
        allowed &= (index < row)[:, None, None] | diagonal
    logits = dot("iqd,ikd->iqk", q, keys) * scale + log_weight[:, None, None]
    return jnp.where(allowed, logits, -jnp.inf), keys, values
