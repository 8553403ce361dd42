"""The table of all patterns of attention, and those that are rarer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from hyperlayer_jax.attention import at_keys
from hyperlayer_jax.nn.content import Content
from hyperlayer_jax.nn.pattern import Learned, Pattern, Sampled, Static, attend, of_heads
from hyperlayer_jax.nn.positions import FreeEntries
from hyperlayer_jax.nn.window import Dense, Window
from hyperlayer_jax.types import RowSparseTensor, SparseTensor

__all__ = [
    "PATTERNS",
    "Block",
    "Content",
    "Dense",
    "Learned",
    "Learned2D",
    "Pattern",
    "Sampled",
    "Static",
    "Strided",
    "Window",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Strided(Learned):
    """`Learned` for one token in every `stride`; the others see only themselves."""

    letter = "t"
    stride: int = 8

    @property
    def spacing(self):
        return self.stride, 1

    def pattern(self, layer, tokens):
        if tokens.x.shape[1] < self.stride:
            return None
        return self._rows(layer, tokens, np.s_[self.stride - 1 :: self.stride])

    def attend(self, layer, tokens):
        query, key, value, mask = tokens.query, tokens.key, tokens.value, tokens.mask
        out, pattern = _own_values(tokens), self.pattern(layer, tokens)
        if pattern is None:
            return out
        at = np.s_[:, self.stride - 1 :: self.stride]
        return out.at[at].set(attend(layer, query[at], key, value, pattern, mask=mask))

    def extend(self, layer, tokens, keys, values, state):
        out, state = super().extend(layer, tokens, keys, values, state)
        looks_back = ((tokens.rows + 1) % self.stride == 0)[None, :, None, None]
        return jnp.where(looks_back, out, _own_values(tokens)), state


class Learned2D(Sampled):
    """Rows and columns of the attention matrix that are both parameters.

    There are `num_tuples` entries for each of its `max_length` rows, each with four neighbours and
    free to leave its row. Costs as much as `max_length` tokens however few there are, and so in
    each call of `extend`. Points beyond the tokens that there are take their shares with them, to
    no effect: what a token sees is the same however many there are. So it is with padding.
    """

    letter = "2"

    def make_positions(self, layer, rngs):
        return FreeEntries(self._free(layer))

    def pattern(self, layer, tokens):
        return self._entries(layer, tokens, tokens.x.shape[1])

    def extend(self, layer, tokens, keys, values, state):
        pattern = self._entries(layer, tokens, keys.shape[1])
        return attend(layer, tokens.query, keys, values, pattern), state

    def _entries(self, layer, tokens, length):
        rows, batch = tokens.rows, tokens.x.shape[0]

        def past(indices):
            return indices[..., 1] <= indices[..., 0]

        tuples = layer.positions.tuples()
        tuples = jax.tree.map(lambda x: jnp.broadcast_to(x[None], (batch, *x.shape)), tuples)
        points = self._points(layer, tuples, self.size(layer), past if layer.causal else None)
        indices, weights = of_heads(*points)
        out, into = indices[..., 0] - rows[0], indices[..., 1]
        weights = jnp.where((out >= 0) & (out < rows.size) & (into < length), weights, 0)
        indices = jnp.stack([jnp.clip(out, 0, rows.size - 1), jnp.clip(into, 0, length - 1)], -1)
        flat = *weights.shape[:-2], weights.shape[-2] * weights.shape[-1]
        shapes = (rows.size,), (length,)
        return SparseTensor(indices.reshape(*flat, 2), weights.reshape(flat), *shapes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block(Learned):
    """`Learned` on a coarser grid, read by the block as matrix units want it.

    Every `block` consecutive tokens attend to their own block and to those around `num_tuples`
    learned places, at most 1 + (2 + global and local points) `num_tuples` blocks.
    """

    letter = "b"
    block: int = 64

    @property
    def spacing(self):
        return self.block, self.block

    def size(self, layer):
        return -(-layer.max_length // self.block)

    def pattern(self, layer, tokens):
        rows, mask, exists = tokens.rows[: -(-tokens.rows.size // self.block)], tokens.mask, None
        if mask is not None:
            exists = self._padded(mask).reshape(len(mask), -1, self.block).any(-1)
        at = np.s_[:: self.block]
        tuples = layer.positions.tuples(tokens.x, rows, mask=mask, at=at)
        columns, weights = self._blocks(layer, tuples, rows, rows.size, exists)
        return RowSparseTensor(*of_heads(columns[..., None], weights), (rows.size,), (rows.size,))

    def attend(self, layer, tokens):
        length, mask, causal = tokens.x.shape[1], tokens.mask, layer.causal
        if not causal and mask is None and length % self.block:
            mask = jnp.ones(tokens.x.shape[:2], bool)
        mask = None if mask is None else self._padded(mask)
        qkv = map(self._padded, (tokens.query, tokens.key, tokens.value))
        pattern = self.pattern(layer, tokens)
        return attend(layer, *qkv, pattern, causal=causal, mask=mask)[:, :length]

    def init_cache(self, layer, keys):
        """What `Learned` keeps, and what the network said for each block when it began."""
        heads, tuples, _ = layer.positions.free.parameters.shape
        raw = jnp.zeros((keys.shape[0], heads, self.size(layer), tuples, 2))
        return super().init_cache(layer, keys), raw

    def extend(self, layer, tokens, keys, values, state):
        (total, raw), rows, size = state, tokens.rows, self.size(layer)
        context_mean, total = layer.positions.extend(tokens.x, rows, total)
        own = rows // self.block
        begins = jnp.where(rows % self.block == 0, own, size)
        new = layer.positions.raw(tokens.x, context_mean, own)
        raw = raw.at[:, :, begins].set(new, mode="drop")
        tuples = layer.positions.free.tuples(raw[:, :, own], own)
        blocks, weights = self._blocks(layer, tuples, own, size)
        within = jnp.arange(self.block, dtype=jnp.int32)
        columns = blocks[..., None] * self.block + within[None, None, None, None]
        columns = columns.reshape(*blocks.shape[:-1], -1)
        past = columns <= rows[None, None, :, None]
        weights = jnp.where(past, jnp.repeat(weights, self.block, axis=-1), 0)
        points = of_heads(columns[..., None], weights)
        pattern = RowSparseTensor(*points, (rows.size,), (keys.shape[1],))
        return attend(layer, tokens.query, keys, values, pattern), (total, raw)

    def _blocks(self, layer, tuples, rows, size, exists=None):
        """Of blocks at int32 `rows` [R]: their own block and learned ones, among `size`.

        Those of which no token exists are hidden by `exists` bool [B, R], if it is not None.
        """
        own = rows[None, None, :, None]

        def visible(indices):
            columns = indices[..., 0]
            seen = columns < own if layer.causal else columns != own
            return seen if exists is None else seen & at_keys(exists, columns)

        indices, weights = self._points(layer, tuples, size, visible)
        first = jnp.zeros_like(indices[..., :1, 0]) + own
        columns = jnp.concatenate([first, indices[..., 0]], -1)
        return columns, jnp.concatenate([jnp.ones_like(weights[..., :1]), weights], -1)

    def _padded(self, x):
        """Tokens [B, T, ...], padded to whole blocks."""
        return jnp.pad(x, [(0, 0), (0, -x.shape[1] % self.block)] + [(0, 0)] * (x.ndim - 2))


PATTERNS: dict[str, Pattern] = {
    "learned": Learned(),
    "static": Static(),
    "learned2d": Learned2D(),
    "strided": Strided(),
    "window": Window(),
    "block": Block(),
    "content": Content(),
    "dense": Dense(),
}


def _own_values(tokens):
    """What each head gets where a token sees only itself: [B, T, N, H]."""
    return jnp.repeat(tokens.value, tokens.query.shape[2] // tokens.value.shape[2], axis=2)
