"""Attention on raw arrays: what it takes, and which primitive it is."""

import jax

from ..arguments import check, check_axis, check_size
from ..numerics import accumulator
from ..primitives import function


def gathered_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    indices: jax.Array,
    log_weights: jax.Array,
    *,
    scale: float = 1.0,
    implementation: str | None = None,
) -> jax.Array:
    """Attention of each query over its own p keys, those at `indices`.

    out[i] = sum over a of softmax_a(scale q[i] . k[indices[i, a]] + log_weights[i, a]) v[...].
    Entries at the same key are entries of their own: their weights add up. A log weight of -inf
    or an index outside [0, s) makes an entry absent; a query without entries gets 0. Gradients are
    finite in every case.

    Args:
      q: float [*B,t,d], d >= 1.
      k: float [*B,s,d], of the dtype of `q`.
      v: float [*B,s,dv], of the dtype of `q`.
      indices: int32 [*B,t,p].
      log_weights: float [*B,t,p], of any floating dtype.
      scale: what logits are multiplied by, a static number.
      implementation: backend by name, or None to choose.

    Returns:
      [*B,t,dv], of the dtype of `q`. Logits and softmax are made in float32 at least.

    Raises:
      ValueError: on a shape, dtype or implementation other than these.
    """
    q, k, v, indices, log_weights = check(
        implementation,
        q=(q, "td"),
        k=(k, "sd"),
        v=(v, ("s", "dv")),
        indices=(indices, "tp"),
        log_weights=(log_weights, "tp"),
    )
    check_axis("q", q, "d")
    return _attention(
        "gathered_attention",
        q,
        k,
        v,
        indices,
        log_weights,
        scale=scale,
        implementation=implementation,
    )


def block_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    block_indices: jax.Array,
    log_weights: jax.Array,
    *,
    block: int,
    causal: bool,
    scale: float = 1.0,
    mask: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Attention of each block of queries over its own p blocks of keys, those at `block_indices`.

    Query block i consists of the queries [i * block, (i + 1) * block), key block j likewise. All
    queries of block i see all keys of block j = block_indices[i, a], with log_weights[i, a] added
    to their logits; if `causal`, only the keys at or before the position of the query: those of
    earlier blocks and, in the block where j = i, the lower triangle. Entries at the same block are
    entries of their own: their weights add up. A log weight of -inf or an index outside
    [0, s / block) makes an entry absent; a query without keys gets 0. Gradients are finite in
    every case.

    Args:
      q: float [*B,t,d], d >= 1; t a multiple of `block`.
      k: float [*B,s,d], of the dtype of `q`; s a multiple of `block`.
      v: float [*B,s,dv], of the dtype of `q`.
      block_indices: int32 [*B,t/block,p].
      log_weights: float [*B,t/block,p], of any floating dtype.
      block: queries and keys in a block, a static integer of at least 1.
      causal: whether a query sees no key of a later position.
      scale: what logits are multiplied by, a static number.
      mask: bool [*B,s], the keys that exist; all where None.
      implementation: backend by name, or None to choose.

    Returns:
      [*B,t,dv], of the dtype of `q`. Logits and softmax are made in float32 at least.

    Raises:
      ValueError: on a shape, dtype, size or implementation other than these.
    """
    masks = {} if mask is None else {"mask": (mask, "s")}
    arrays = check(
        implementation,
        q=(q, "td"),
        k=(k, "sd"),
        v=(v, ("s", "dv")),
        block_indices=(block_indices, ("t/block", "p")),
        log_weights=(log_weights, ("t/block", "p")),
        **masks,
    )
    check_axis("q", arrays[0], "d")
    block = check_size("block", block, minimum=1)
    t, s, rows = (x.shape[-2] for x in (arrays[0], arrays[1], arrays[3]))
    if t != rows * block or s % block:
        raise ValueError(
            f"block: got {block} for {t} queries in {rows} blocks and {s} keys, "
            f"want t = blocks * block and s a multiple of block"
        )
    return _attention(
        "masked_block_attention" if masks else "block_attention",
        *arrays,
        block=block,
        causal=bool(causal),
        scale=scale,
        implementation=implementation,
    )


def _attention(operation, q, k, v, indices, log_weights, *masks, scale, implementation, **sizes):
    dtype, t = accumulator(q.dtype), q.shape[-2]
    return function(
        operation,
        q,
        k,
        v,
        indices,
        log_weights.astype(dtype),
        *masks,
        leading=q.ndim - 2,
        results=[((t, v.shape[-1]), q.dtype), ((t,), dtype)],
        implementation=implementation,
        scale=float(scale),
        **sizes,
    )
