"""Patterns that are not learned: the neighbourhood of every token, or all of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from hyperlayer_jax.lift import reshape
from hyperlayer_jax.nn.pattern import Pattern, attend
from hyperlayer_jax.types import RowSparseTensor


class Dense(Pattern):
    """All tokens, by `jax.nn.dot_product_attention`."""

    letter = "d"

    def pattern(self, layer, tokens):
        return None

    def attend(self, layer, tokens):
        query, key, value, mask = tokens.query, tokens.key, tokens.value, tokens.mask
        mask = None if mask is None else mask[:, None, None]
        return jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=layer.causal)

    def extend(self, layer, tokens, keys, values, state):
        seen = jnp.arange(keys.shape[1], dtype=jnp.int32)[None] <= tokens.rows[:, None]
        out = jax.nn.dot_product_attention(tokens.query, keys, values, mask=seen[None, None])
        return out, state


@dataclasses.dataclass(frozen=True, kw_only=True)
class Window(Pattern):
    """The last `window` tokens, or those around where not causal."""

    letter = "w"
    window: int = 32

    def pattern(self, layer, tokens):
        return self._pattern(layer, tokens.rows, tokens.x.shape[1])

    def attend(self, layer, tokens):
        query, key, value, mask = tokens.query, tokens.key, tokens.value, tokens.mask
        options = {"window": self.window, "causal": layer.causal, "mask": mask}
        return window_attention(query, key, value, **options)

    def extend(self, layer, tokens, keys, values, state):
        pattern = self._pattern(layer, tokens.rows, keys.shape[1])
        return attend(layer, tokens.query, keys, values, pattern), state

    def _pattern(self, layer, rows, length):
        columns, seen = window_columns(rows, length, window=self.window, causal=layer.causal)
        weights = seen.astype(jnp.float32)
        return RowSparseTensor(columns[..., None], weights, (rows.size,), (length,))


def window_columns(
    rows: jax.Array, length: int, *, window: int, causal: bool
) -> tuple[jax.Array, jax.Array]:
    """The keys that queries at int32 `rows` [R] see of `length`, and which of them there are.

    Returns:
      int32 and bool [R, window]; those that there are not lie at an end of the sequence.
    """
    first = rows[:, None] - _reach(window, causal)
    columns = first + jnp.arange(window, dtype=jnp.int32)[None]
    return jnp.clip(columns, 0, length - 1), (columns >= 0) & (columns < length)


def window_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    window: int,
    causal: bool,
    mask: jax.Array | None = None,
) -> jax.Array:
    """Attention of every query to the last `window` keys, or to those around where not causal.

    It is dense attention of short blocks of queries to the blocks around them.

    Args:
      query: float [B, T, N, H].
      key: [B, T, K, H], K a divisor of N.
      value: [B, T, K, D].
      window: the keys that a query sees.
      causal: all of them at or before the query.
      mask: bool [B, T], the keys that exist; all where None.

    Returns:
      [B, T, N, D].
    """
    batch, length = query.shape[:2]
    size, back = min(window, length), _reach(window, causal)
    exists = jnp.ones((batch, length), bool) if mask is None else mask
    num_blocks = -(-length // size)
    before = size if num_blocks > 1 else 0
    behind = 0 if causal else before

    def blocks(x, before=0, behind=0):
        pad = [(0, 0), (before, num_blocks * size - length + behind)]
        x = jnp.pad(x, pad + [(0, 0)] * (x.ndim - 2))
        shape = batch * num_blocks, size, *x.shape[2:]
        parts = [
            reshape(x[:, first : first + num_blocks * size], shape)
            for first in range(0, before + behind + 1, size)
        ]
        return jnp.concatenate(parts, axis=1)

    seen, key, value = (blocks(x, before, behind) for x in (exists, key, value))
    place = np.arange(seen.shape[1]) - before - np.arange(size)[:, None]
    band = (place >= -back) & (place < window - back)
    out = jax.nn.dot_product_attention(
        blocks(query), key, value, mask=seen[:, None, None] & band[None, None]
    )
    return reshape(out, (batch, num_blocks * size, *out.shape[2:]))[:, :length]


def _reach(window: int, causal: bool) -> int:
    """How many keys before its own a query sees."""
    return window - 1 if causal else window // 2
