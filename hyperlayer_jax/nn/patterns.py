"""Patterns of attention that learn where to look, and the table of all."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from hyperlayer_jax.attention import at_keys
from hyperlayer_jax.nn.pattern import Layer, Pattern, attend
from hyperlayer_jax.nn.positions import FreeEntries, FreePositions, LearnedPositions
from hyperlayer_jax.nn.window import Dense, Window
from hyperlayer_jax.types import IndexTuples, RowSparseTensor, SparseTensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampled(Pattern):
    """Points around index tuples that are learned.

    Each tuple has its two neighbours and the points of the layer's sampler, so that a token attends
    to at most (2 + global + local points) `num_tuples` keys.

    Attributes:
      num_tuples: k, the tuples of each token and head.
      min_sigma: the smallest sigma >= 0, in positions.
      shared: all heads share one pattern.
    """

    num_tuples: int = 4
    min_sigma: float = 0.3
    shared: bool = False

    def __post_init__(self):
        super().__post_init__()
        if not self.min_sigma >= 0:
            raise ValueError(f"min_sigma: got {self.min_sigma}, want >= 0")

    def size(self, layer: Layer) -> int:
        """The length of the index space: tokens, or blocks of them."""
        return layer.max_length

    def _free(self, layer):
        return FreePositions(
            1 if self.shared else layer.num_heads,
            self.num_tuples,
            self.size(layer),
            causal=layer.causal,
            min_sigma=self.min_sigma,
        )

    def _points(self, layer: Layer, tuples: IndexTuples, size: int, where):
        """Points and weights of tuples [B, heads, R, k, r]."""
        if layer.causal and layer.sampler.deterministic:
            # Fixed points must be the same however many tokens follow.
            size = self.size(layer)
        shape = (size,) * tuples.means.shape[-1]
        # By name: `nnx.tabulate` takes no dataclass by position.
        return layer.sampler(
            tuples=tuples, shape=shape, where=where, implementation=layer.implementation
        )

    def _keys(self, layer, tuples, rows, length, mask=None):
        """The pattern of tuples [B, N, R, k] of tokens at int32 `rows` [R], over `length` keys."""

        def visible(indices):
            columns = indices[..., 0]
            seen = columns >= 0 if mask is None else at_keys(mask, columns)
            return seen & (columns <= rows[None, None, :, None]) if layer.causal else seen

        points = self._points(layer, tuples, length, visible)
        return RowSparseTensor(*_of_heads(*points), (rows.size,), (length,))


class Static(Sampled):
    """Distances that are parameters, the same for every token."""

    letter = "s"

    def make_positions(self, layer, rngs):
        return self._free(layer)

    def pattern(self, layer, tokens):
        tuples = self._tuples(layer, tokens)
        return self._keys(layer, tuples, tokens.rows, tokens.x.shape[1], tokens.mask)

    def extend(self, layer, tokens, keys, values, state):
        pattern = self._keys(layer, self._tuples(layer, tokens), tokens.rows, keys.shape[1])
        return attend(layer, tokens.query, keys, values, pattern), state

    def _tuples(self, layer, tokens):
        raw = layer.positions.raw()
        shape = len(tokens.x), raw.shape[1], tokens.rows.size, *raw.shape[3:]
        return layer.positions.tuples(jnp.broadcast_to(raw, shape), tokens.rows)


class Learned(Sampled):
    """Distances that a small network says, which reads the token, its place and what it may see.

    That is the mean of all tokens up to it, or of all where not causal.
    """

    letter = "l"

    def make_positions(self, layer, rngs):
        return LearnedPositions(layer.features, self._free(layer), rngs=rngs)

    def pattern(self, layer, tokens):
        context_mean = layer.positions.context_mean(tokens.x, tokens.mask)
        tuples = layer.positions.tuples(tokens.x, context_mean, tokens.rows)
        return self._keys(layer, tuples, tokens.rows, tokens.x.shape[1], tokens.mask)

    def init_cache(self, layer, keys):
        return layer.positions.init_cache(len(keys))

    def extend(self, layer, tokens, keys, values, state):
        context_mean, state = layer.positions.extend(tokens.x, tokens.rows, state)
        tuples = layer.positions.tuples(tokens.x, context_mean, tokens.rows)
        pattern = self._keys(layer, tuples, tokens.rows, keys.shape[1])
        return attend(layer, tokens.query, keys, values, pattern), state


@dataclasses.dataclass(frozen=True, kw_only=True)
class Strided(Learned):
    """`Learned` for one token in every `stride`; the others see only themselves."""

    letter = "t"
    stride: int = 8

    @property
    def spacing(self):
        return self.stride, 1

    def pattern(self, layer, tokens):
        length, mask, at = tokens.x.shape[1], tokens.mask, np.s_[self.stride - 1 :: self.stride]
        if length < self.stride:
            return None
        context_mean = layer.positions.context_mean(tokens.x, mask)[:, at]
        rows = tokens.rows[at]
        tuples = layer.positions.tuples(tokens.x[:, at], context_mean, rows)
        return self._keys(layer, tuples, rows, length, mask)

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
        rows, batch = tokens.rows, len(tokens.x)

        def past(indices):
            return indices[..., 1] <= indices[..., 0]

        tuples = layer.positions.tuples()
        tuples = jax.tree.map(lambda x: jnp.broadcast_to(x[None], (batch, *x.shape)), tuples)
        points = self._points(layer, tuples, self.size(layer), past if layer.causal else None)
        indices, weights = _of_heads(*points)
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
        first, exists = np.s_[:, :: self.block], None
        x = tokens.x[first]
        context_mean = layer.positions.context_mean(tokens.x, tokens.mask)[first]
        rows = tokens.rows[: x.shape[1]]
        if tokens.mask is not None:
            exists = self._padded(tokens.mask).reshape(len(x), -1, self.block).any(-1)
        tuples = layer.positions.tuples(x, context_mean, rows)
        columns, weights = self._blocks(layer, tuples, rows, rows.size, exists)
        return RowSparseTensor(*_of_heads(columns[..., None], weights), (rows.size,), (rows.size,))

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
        raw = jnp.zeros((len(keys), heads, self.size(layer), tuples, 2))
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
        points = _of_heads(columns[..., None], weights)
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
    "dense": Dense(),
}


def _of_heads(indices, weights):
    """Points and weights [B, heads, ...], without the heads axis if all heads share one."""
    return (indices[:, 0], weights[:, 0]) if weights.shape[1] == 1 else (indices, weights)


def _own_values(tokens):
    """What each head gets where a token sees only itself: [B, T, N, H]."""
    return jnp.repeat(tokens.value, tokens.query.shape[2] // tokens.value.shape[2], axis=2)
