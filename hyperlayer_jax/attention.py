"""Attention over the points of a sparse pattern."""

import math

import jax
import jax.numpy as jnp

from hyperlayer_jax import checks, kernels
from hyperlayer_jax.lift import lift, reshape
from hyperlayer_jax.tensors import segment_softmax
from hyperlayer_jax.types import RowSparseTensor, SparseTensor

# A smaller weight is none: its gradient, of the order of its inverse, must stay finite.
_MIN_WEIGHT = 1e-30


def sparse_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    pattern: RowSparseTensor | SparseTensor,
    *,
    causal: bool = False,
    mask: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Attention of every query over the keys that a sparse pattern gives it.

    out[i] = sum over the entries (i, j, w) of softmax(q[i] . k[j] / sqrt(H) + log w) v[j], the
    softmax over the entries of row i (equation 12 of docs/method.md). So an entry of weight 0 does
    not exist, and the weights of entries at the same place add up. Gradients reach the weights.

    The pattern is one of

    - `RowSparseTensor` [*P, T, p] of out_shape (T,) and in_shape (S,): every query owns p entries;
    - `SparseTensor` [*P, n] of the same shapes: entries anywhere in the T x S plane;
    - `RowSparseTensor` [*P, T / b, p] of out_shape (T / b,) and in_shape (S / b,), b > 1: every b
      consecutive queries see the same p blocks of b consecutive keys. Nothing is gathered key by
      key, which is what matrix units want.

    Its leading axes *P are (B, N) for a pattern per head, (B,) for one that all heads share, or ()
    for one that all examples share too. Entries outside the plane are absent.

    Args:
      query: float [B, T, N, H].
      key: float [B, S, K, H], of the dtype of the query. Each of the K heads serves N / K
        consecutive heads of the query.
      value: float [B, S, K, D], of the dtype of the query.
      pattern: see above; weights >= 0 of any floating dtype. Those below 1e-30 count as 0.
      causal: hides keys j > i from query i, in blocks too. For weights that are normalised over
        what is visible, forbid the points before that, with the `where` of `discretize`. In
        blocks, a query that sees a key or value that is not finite gets NaN.
      mask: bool [B, S], the keys that exist; all where None.
      implementation: the kernel backend, chosen by device where None.

    Returns:
      [B, T, N, D], of the dtype of the query; 0 for a query that sees no key. Computed in float32
      at least.

    Raises:
      ValueError: an argument has the wrong shape or dtype, or `implementation` is unknown.
      NotImplementedError: the backend named cannot do this.
    """
    query, key, value, pattern = checks.as_arrays((query, key, value, pattern))
    leading = _check(query, key, value, pattern, mask)
    batch, length, heads, width = query.shape
    key_heads = key.shape[2]
    block = length // max(1, pattern.out_shape[0])
    indices, weights = _per_head(pattern, leading, batch, heads)
    query, key, value = (jnp.moveaxis(x, 1, 2) for x in (query, key, value))
    options = {"scale": width**-0.5, "implementation": implementation}

    if block > 1:
        hidden = weights < _MIN_WEIGHT
        if causal:
            # Blocks are read whole, and 0 times what is not finite would reach queries before it.
            finite = jnp.isfinite(key).all(-1) & jnp.isfinite(value).all(-1)
            key, value = (jnp.where(finite[..., None], x, 0) for x in (key, value))
            broken = ~finite if mask is None else ~finite & mask[:, None]
            broken = jnp.repeat(broken, heads // key_heads, axis=1)
        key, value = (jnp.repeat(x, heads // key_heads, axis=1) for x in (key, value))
        out = kernels.block_attention(
            query,
            key,
            value,
            indices[..., 0],
            _log(weights, hidden),
            block=block,
            causal=causal,
            mask=None if mask is None else _for_heads(mask, heads),
            **options,
        )
        if causal:
            broken = reshape(broken, (batch, heads, broken.shape[-1] // block, block), leading=2)
            broken = _sees(broken, jnp.where(hidden, -1, indices[..., 0]))
            broken = reshape(broken, (batch, heads, length, 1), leading=2)
            out = out * jnp.where(broken, jnp.nan, 1).astype(out.dtype)
        return jnp.moveaxis(out, 1, 2)

    columns = indices[..., -1]
    by_row = isinstance(pattern, RowSparseTensor)
    rows = jax.lax.broadcasted_iota(jnp.int32, columns.shape, 2) if by_row else indices[..., 0]
    hidden = weights < _MIN_WEIGHT
    if causal:
        hidden |= columns > rows
    if mask is not None:
        hidden |= ~at_keys(mask, columns)
    log_weights = _log(weights, hidden)

    # The heads of a group see the same keys: their queries are the rows of one longer matrix.
    groups = heads // key_heads
    query = reshape(query, (batch, key_heads, groups * length, width))
    if by_row:
        grouped = (batch, key_heads, groups * length, columns.shape[-1])
        columns, log_weights = (reshape(x, grouped) for x in (columns, log_weights))
        out = kernels.gathered_attention(query, key, value, columns, log_weights, **options)
    else:
        group = jax.lax.broadcasted_iota(jnp.int32, rows.shape, 1) % groups
        rows = jnp.where(kernels.in_bounds(rows, length), rows + group * length, -1)
        # What is hidden is absent.
        columns = jnp.where(hidden, -1, columns)
        flat = (batch, key_heads, groups * rows.shape[-1])
        entries = (reshape(x, flat) for x in (rows, columns, log_weights))
        out = _over_entries(query, key, value, *entries, **options)
    return jnp.moveaxis(reshape(out, (batch, heads, length, value.shape[-1])), 1, 2)


def _per_head(pattern, leading, batch, heads):
    """The indices and weights of a pattern with the axes (batch, heads) for its `leading` ones."""

    def spread(x):
        x = x if len(leading) == 2 else jnp.expand_dims(x, range(len(leading), 2))
        return jnp.broadcast_to(x, (batch, heads, *x.shape[2:]))

    return spread(pattern.indices), spread(pattern.values)


def _for_heads(mask, heads):
    """A mask [B, S] for every head: [B, N, S]."""
    return jnp.broadcast_to(mask[:, None], (mask.shape[0], heads, mask.shape[1]))


def _log(weights, hidden):
    """log(weights) in float32 at least, -inf where hidden, with a finite gradient everywhere."""
    weights = weights.astype(kernels.accumulator(weights.dtype))
    return jnp.where(hidden, -jnp.inf, jnp.log(jnp.where(hidden, 1, weights)))


def at_keys(mask: jax.Array, columns: jax.Array) -> jax.Array:
    """A mask [B, S] at columns int32 [B, ...], False outside: bool [B, ...]."""

    flat = columns.reshape(columns.shape[0], math.prod(columns.shape[1:]))
    return lift("(s),(n)->(n)")(_at)(mask, flat).reshape(columns.shape)


def _at(mask, columns):
    """A mask [S, ...] at columns int32 [...] of its first axis, False outside."""
    return mask.at[columns].get(mode="fill", fill_value=False, wrap_negative_indices=False)


@lift("(c,b),(r,p)->(r,b)")
def _sees(keys, blocks):
    """Which queries see one of some keys, given the blocks that their own block reads.

    Args:
      keys: bool [c, b], by their blocks.
      blocks: int32 [r, p]; those out of range do not exist.

    Returns:
      bool [r, b], by their blocks.
    """
    own = jnp.arange(len(blocks), dtype=jnp.int32)
    before = _at(keys.any(-1), jnp.where(blocks < own[:, None], blocks, -1)).any(-1)
    within = (blocks == own[:, None]).any(-1)
    upto = jax.lax.cummax(keys.astype(jnp.int8), axis=1) > 0
    return before[:, None] | (within[:, None] & _at(upto, own))


def _over_entries(query, key, value, rows, columns, log_weights, *, scale, implementation):
    """`kernels.gathered_attention` of entries [*B, n] in any order."""
    dtype, sizes = query.dtype, (query.shape[-2], key.shape[-2])
    accumulator = kernels.accumulator(dtype)
    query, key, value = (x.astype(accumulator) for x in (query, key, value))
    logits = kernels.sddmm(rows, columns, query * scale, key, implementation=implementation)
    logits = logits + log_weights.astype(accumulator)
    weights = segment_softmax(rows, columns, logits, *sizes, implementation=implementation)
    out = kernels.spmm(
        rows, columns, weights, value, num_rows=sizes[0], implementation=implementation
    )
    return out.astype(dtype)


def _check(query, key, value, pattern, mask):
    """Raises for wrong arguments; returns the leading axes of the pattern."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        checks.check_float(name, x, 4, "[B, length, heads, features]")
        if x.ndim != 4 or x.shape[0] != query.shape[0]:
            raise ValueError(f"{name}: got shape {x.shape}, want [B, length, heads, features]")
        if x.dtype != query.dtype:
            raise ValueError(f"{name}: got {x.dtype}, want that of the query, {query.dtype}")
    batch, length, heads, width = query.shape
    _, key_length, key_heads, key_width = key.shape
    if key_width != width or key_heads == 0 or heads % key_heads:
        raise ValueError(
            f"key: got shape {key.shape}, want [B, S, K, {width}] with K a divisor of the query's "
            f"{heads} heads"
        )
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(f"value: got shape {value.shape}, want [*{key.shape[:3]}, D]")
    if mask is not None:
        checks.check_mask("mask", mask, (batch, key_length))

    leading, out_shape, in_shape = checks.check_tensor(pattern)
    if leading not in ((), (batch,), (batch, heads)):
        raise ValueError(
            f"pattern: got leading axes {leading}, want (), ({batch},) or ({batch}, {heads})"
        )
    shape = (length, key_length)
    if len(out_shape) != 1 or len(in_shape) != 1:
        raise ValueError(f"pattern: got {out_shape} by {in_shape}, want one axis each")
    if (*out_shape, *in_shape) == shape:
        return leading
    in_blocks = (
        isinstance(pattern, RowSparseTensor)
        and length % out_shape[0] == 0
        and key_length % in_shape[0] == 0
        and length // out_shape[0] == key_length // in_shape[0]
    )
    if not in_blocks:
        raise ValueError(
            f"pattern: got {out_shape} by {in_shape}, want {shape} of query and key, or a "
            "RowSparseTensor with both divided by the size of a block"
        )
    return leading
