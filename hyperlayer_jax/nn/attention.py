"""Self-attention over learned positions, with the patterns that it is compared to."""

import dataclasses
import typing
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hyperlayer_jax import checks
from hyperlayer_jax.attention import at_keys, sparse_attention
from hyperlayer_jax.hyperlayer import discretize
from hyperlayer_jax.kernels import serving
from hyperlayer_jax.lift import reshape
from hyperlayer_jax.nn.linear import TokenLinear
from hyperlayer_jax.nn.positions import HIDDEN, FreeEntries, FreePositions, LearnedPositions
from hyperlayer_jax.types import RowSparseTensor, SparseTensor

Pattern = Literal["learned", "static", "learned2d", "strided", "window", "block", "dense"]

_ROTARY_BASE = 10_000.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionCache:
    """What `SparseSelfAttention.extend` remembers of the tokens before.

    Attributes:
      length: int32 [], how many tokens there were.
      keys: [B, max_length, K, H]; those from `length` on are not yet written.
      values: [B, max_length, K, H].
      others: float32 [B, HIDDEN], the sum of what the position network reads of them; None for a
        pattern without one.
      raw: float32 [B, heads, blocks, k, 2], what the network said for each block when it began;
        None but for the pattern "block".
    """

    length: jax.Array
    keys: jax.Array
    values: jax.Array
    others: jax.Array | None
    raw: jax.Array | None


class SparseSelfAttention(nnx.Module):
    """Self-attention in which every token attends to a few positions that are learned.

    Around each position there are its two neighbours, `num_global` points of all and `num_local`
    near it, so that a token attends to at most (2 + `num_global` + `num_local`) `num_tuples` keys
    ("learned2d" and "block" count otherwise, see there).
    In training the points are drawn, and their weights carry gradients; where deterministic, they
    are fixed by the mean and sigma. Either way the cost grows linearly with the length, for all
    patterns but "dense":

    - "learned": a small network reads the token, its place and the mean of all tokens up to it (of
      all tokens where not causal), and says how far away to look, and how widely.
    - "static": distances that are parameters, the same for every token.
    - "learned2d": rows and columns of the attention matrix are both parameters: of `num_tuples`
      entries for each of its `max_length` rows, each with four neighbours and free to leave its
      row. Costs as much as `max_length` tokens however few there are, and so in each call of
      `extend`.
    - "strided": "learned", for one token in every `stride`; the others see only themselves.
    - "window": the last `window` tokens, or those around where not causal.
    - "block": "learned" on a coarser grid: every `block` consecutive tokens attend to their own
      block and to those around `num_tuples` learned places, at most 1 + (2 + `num_global` +
      `num_local`) `num_tuples` blocks. Keys are read by the block, as matrix units want them.
    - "dense": all tokens, by `jax.nn.dot_product_attention`.
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        max_length: int,
        *,
        pattern: Pattern = "learned",
        causal: bool = True,
        num_kv_heads: int | None = None,
        num_tuples: int = 4,
        num_global: int = 4,
        num_local: int = 2,
        region: int = 8,
        min_sigma: float = 0.3,
        window: int = 32,
        stride: int = 8,
        block: int = 64,
        shared: bool = False,
        rotary: bool = True,
        dtype: jnp.dtype | None = None,
        implementation: str | None = None,
        deterministic: bool = False,
        rngs: nnx.Rngs,
    ):
        """Makes the layer.

        Args:
          features: E, of the input and the output.
          num_heads: N, heads of the query, of E / N features each.
          max_length: the most tokens that there can be; learned distances range over it.
          pattern: see the class.
          causal: no token attends to a later one.
          num_kv_heads: K, heads of keys and values, each serving N / K of the query; N where None.
          num_tuples: k, the learned positions of each token and head ("learned2d": of each row of
            the attention matrix; "block": of each block).
          num_global: points per tuple drawn from all positions; deterministic, quantiles of its
            Gaussian.
          num_local: points per tuple drawn from its region; deterministic, spread evenly over it.
          region: positions around a mean that count as near.
          min_sigma: the smallest sigma >= 0, in positions.
          window: the tokens that "window" sees.
          stride: one token in so many looks back in "strided".
          block: tokens in a block of "block".
          shared: all heads share one pattern.
          rotary: turns queries and keys by their position, so that logits can tell distances. They
            then find the right one among sampled points by themselves, and leave a learned position
            that is nearly right without a gradient (docs/offset.md).
          dtype: of the computation; where None, what the input and float32 parameters promote to.
            Positions are always float32.
          implementation: the kernel backend for what it serves, chosen by device where None.
          deterministic: takes fixed points instead of drawing them; for evaluation,
            `nnx.view(model, deterministic=True)`.
          rngs: the streams `params` and `sample`.

        Raises:
          ValueError: a size is out of range or does not divide another, or `pattern` is unknown.
        """
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        for name, size in (
            ("features", features), ("num_heads", num_heads), ("max_length", max_length),
            ("num_tuples", num_tuples), ("region", region), ("window", window),
            ("stride", stride), ("block", block), ("num_kv_heads", num_kv_heads),
        ):  # fmt: skip
            if checks.check_count(name, size) == 0:
                raise ValueError(f"{name}: got 0, want an int >= 1")
        if not min_sigma >= 0:
            raise ValueError(f"min_sigma: got {min_sigma}, want >= 0")
        if pattern not in typing.get_args(Pattern):
            names = ", ".join(map(repr, typing.get_args(Pattern)))
            raise ValueError(f"pattern: got {pattern!r}, want one of {names}")
        if features % num_heads or num_heads % num_kv_heads:
            raise ValueError(
                f"num_heads: got {num_heads}, want a divisor of features, {features}, and a "
                f"multiple of num_kv_heads, {num_kv_heads}"
            )
        if rotary and (features // num_heads) % 2:
            raise ValueError(f"features: got {features}, want an even number per head for rotary")
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_features = features // num_heads
        self.max_length = max_length
        self.kind = pattern
        self.causal = causal
        self.num_global = checks.check_count("num_global", num_global)
        self.num_local = checks.check_count("num_local", num_local)
        self.region = region
        self.window, self.stride, self.block = window, stride, block
        self.back = window - 1 if causal else window // 2
        self.rotary = rotary
        self.deterministic = deterministic
        self.dtype = dtype
        self.implementation = implementation

        outputs = (num_heads + 2 * num_kv_heads) * self.head_features
        self.project = TokenLinear(features, outputs, use_bias=False, dtype=dtype, rngs=rngs)
        self.merge = TokenLinear(features, features, use_bias=False, dtype=dtype, rngs=rngs)
        # The index space: tokens, or blocks of them.
        self.size = -(-max_length // block) if pattern == "block" else max_length
        heads = 1 if shared else num_heads
        options: dict[str, Any] = {"causal": causal, "min_sigma": min_sigma}
        positions: Any = nnx.data(None)
        if pattern in ("learned", "strided", "block"):
            positions = LearnedPositions(
                features, heads, num_tuples, self.size, **options, rngs=rngs
            )
        elif pattern == "static":
            positions = FreePositions(heads, num_tuples, self.size, **options)
        elif pattern == "learned2d":
            positions = FreeEntries(heads, num_tuples, self.size, **options)
        self.positions = positions
        self.rngs = rngs["sample"].fork()

    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        """Maps tokens to tokens.

        Args:
          x: float [B, T, E], T at most max_length.
          mask: bool [B, T], the tokens that exist; all where None. The others are not attended
            to, and get 0.

        Returns:
          [B, T, E], of the dtype of the computation.

        Raises:
          ValueError: x or mask has the wrong shape or dtype.
        """
        self._check(x, mask)
        x, length = _existing(x, mask), x.shape[1]
        query, key, value = self._project(x, jnp.arange(length, dtype=jnp.int32))
        if self.kind == "dense":
            out = self._dense(query, key, value, mask)
        elif self.kind == "window":
            out = self._in_window(query, key, value, mask)
        elif self.kind == "strided":
            out = self._own_values(value)
            pattern = self._pattern(x, mask)
            if pattern is not None:
                rows = np.s_[:, self.stride - 1 :: self.stride]
                seen = self._attend(query[rows], key, value, pattern, mask=mask)
                out = out.at[rows].set(seen)
        elif self.kind == "block":
            padding = [(0, 0), (0, -length % self.block)]
            exists = mask
            if not self.causal and mask is None and padding[1][1]:
                exists = jnp.ones(x.shape[:2], bool)
            exists = None if exists is None else jnp.pad(exists, padding)
            query, key, value = (
                jnp.pad(y, [*padding, (0, 0), (0, 0)]) for y in (query, key, value)
            )
            pattern = self._pattern(x, mask)
            out = self._attend(query, key, value, pattern, causal=self.causal, mask=exists)[
                :, :length
            ]
        else:
            out = self._attend(query, key, value, self._pattern(x, mask), mask=mask)
        return _existing(self.merge(out.reshape(x.shape)), mask)

    def pattern(
        self, x: jax.Array, *, mask: jax.Array | None = None
    ) -> RowSparseTensor | SparseTensor | None:
        """The pattern over which tokens attend: what a picture of the layer shows.

        Args:
          x: float [B, T, E].
          mask: bool [B, T], the tokens that exist; all where None.

        Returns:
          As `sparse_attention` takes it: T by T, but that "strided" has only the rows that look
          back, T // stride of them, and "block" is a pattern of blocks. None for "dense", and for
          "strided" where no token looks back.

        Raises:
          ValueError: x or mask has the wrong shape or dtype.
        """
        self._check(x, mask)
        return self._pattern(_existing(x, mask), mask)

    def init_cache(self, batch: int) -> AttentionCache:
        """An empty cache for `extend`, of the dtype of the layer, float32 where that is None.

        Args:
          batch: B, how many sequences of up to max_length tokens.

        Returns:
          A cache of length 0.

        Raises:
          ValueError: the layer is not causal.
        """
        if not self.causal:
            raise ValueError("causal: got False, want a causal layer for a cache")
        shape = (batch, self.max_length, self.num_kv_heads, self.head_features)
        keys, values = (jnp.zeros(shape, self.dtype or jnp.float32) for _ in range(2))
        others = raw = None
        if isinstance(self.positions, LearnedPositions):
            others = jnp.zeros((batch, HIDDEN))
        if self.kind == "block":
            heads, tuples, _ = self.positions.free.parameters.shape
            raw = jnp.zeros((batch, heads, self.size, tuples, 2))
        return AttentionCache(jnp.zeros((), jnp.int32), keys, values, others, raw)

    def extend(self, x: jax.Array, cache: AttentionCache) -> tuple[jax.Array, AttentionCache]:
        """Maps the tokens that follow those in the cache, as `__call__` maps the whole sequence.

        Args:
          x: float [B, T, E]; with those before, at most max_length tokens.
          cache: from `init_cache`, or from the call for the tokens before.

        Returns:
          [B, T, E], and the cache with these tokens in it. NaN where more than max_length tokens
          are found only when the program runs.

        Raises:
          ValueError: x has the wrong shape or dtype, or there are more than max_length tokens.
        """
        self._check(x, None)
        length = x.shape[1]
        end = cache.length + length
        if not isinstance(end, jax.core.Tracer) and end > self.max_length:
            raise ValueError(
                f"x: got {length} tokens after {cache.length}, want {self.max_length} at most"
            )
        rows = cache.length + jnp.arange(length, dtype=jnp.int32)
        query, key, value = self._project(x, rows)

        def write(old, new):
            return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), cache.length, 1)

        keys, values = write(cache.keys, key), write(cache.values, value)
        others, total, raw = None, cache.others, cache.raw
        if total is not None:
            sums = total[:, None] + _running_sum(self.positions.read(x))
            total, others = sums[:, -1], sums / (rows + 1).astype(sums.dtype)[None, :, None]
        if self.kind == "dense":
            seen = jnp.arange(self.max_length, dtype=jnp.int32)[None] <= rows[:, None]
            out = jax.nn.dot_product_attention(query, keys, values, mask=seen[None, None])
        else:
            if self.kind == "learned2d":
                pattern = self._entries(rows, x.shape[0], self.max_length)
            elif self.kind == "block":
                raw, pattern = self._cached_blocks(x, others, rows, raw)
            else:
                pattern = self._rows(x, others, rows, self.max_length, None)
            out = self._attend(query, keys, values, pattern)
        if self.kind == "strided":
            looks_back = ((rows + 1) % self.stride == 0)[None, :, None, None]
            out = jnp.where(looks_back, out, self._own_values(value))
        out = self.merge(out.reshape(x.shape))
        cache = AttentionCache(end, keys, values, total, raw)
        return jnp.where(end <= self.max_length, out, jnp.nan), cache

    def set_view(self, *, deterministic: bool | None = None):
        """Called by `nnx.view`.

        Args:
          deterministic: takes fixed points instead of drawing them.
        """
        if deterministic is not None:
            self.deterministic = deterministic

    def _check(self, x, mask):
        checks.check_float("x", x, 3, "[B, T, E]")
        features = self.project.in_features
        if x.ndim != 3 or not 1 <= x.shape[1] <= self.max_length or x.shape[2] != features:
            raise ValueError(
                f"x: got shape {x.shape}, want [B, T, {features}] with T from 1 to "
                f"{self.max_length}"
            )
        if mask is not None:
            checks.check_mask("mask", mask, x.shape[:2])

    def _attend(self, query, key, value, pattern, *, causal=False, mask=None):
        if isinstance(pattern, SparseTensor):
            operation = "spmm"
        elif pattern.out_shape[0] == query.shape[1]:
            operation = "gathered_attention"
        else:
            operation = "block_attention" if mask is None else "masked_block_attention"
        implementation = serving(self.implementation, operation)
        return sparse_attention(
            query, key, value, pattern, causal=causal, mask=mask, implementation=implementation
        )

    def _pattern(self, x, mask):
        """`pattern` of what has been checked."""
        length = x.shape[1]
        rows = jnp.arange(length, dtype=jnp.int32)
        if self.kind == "dense" or (self.kind == "strided" and length < self.stride):
            return None
        if self.kind == "learned2d":
            return self._entries(rows, x.shape[0], length)
        others = self._others(x, mask)
        if self.kind == "block":
            first, exists = np.s_[:, :: self.block], None
            x, others = x[first], others[first]
            rows = rows[: x.shape[1]]
            if mask is not None:
                exists = jnp.pad(mask, [(0, 0), (0, -length % self.block)])
                exists = exists.reshape(x.shape[0], -1, self.block).any(-1)
            raw = self.positions.raw(x, others, rows)
            blocks, weights = self._blocks(raw, rows, rows.size, exists)
            return RowSparseTensor(blocks[..., None], weights, (rows.size,), (rows.size,))
        if self.kind == "strided":
            looks_back = np.s_[self.stride - 1 :: self.stride]
            x, others, rows = x[:, looks_back], others[:, looks_back], rows[looks_back]
        return self._rows(x, others, rows, length, mask)

    def _project(self, x, rows):
        """Queries [B, T, N, H], keys and values [B, T, K, H] of tokens x [B, T, E]."""
        heads = np.cumsum([self.num_heads, self.num_kv_heads, self.num_kv_heads])
        out = self.project(x).reshape(*x.shape[:2], heads[-1], self.head_features)
        query, key, value = jnp.split(out, heads[:2], axis=2)
        if self.rotary:
            query, key = rotate(query, rows), rotate(key, rows)
        return query, key, value

    def _dense(self, query, key, value, mask):
        seen = None if mask is None else mask[:, None, None]
        return jax.nn.dot_product_attention(query, key, value, mask=seen, is_causal=self.causal)

    def _in_window(self, query, key, value, mask):
        """Attention of "window": dense attention of short blocks to their neighbourhood."""
        batch, length = query.shape[:2]
        size = min(self.window, length)
        exists = jnp.ones((batch, length), bool) if mask is None else mask
        num_blocks = -(-length // size)
        before = size if num_blocks > 1 else 0
        behind = 0 if self.causal else before

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
        band = (place >= -self.back) & (place < self.window - self.back)
        out = jax.nn.dot_product_attention(
            blocks(query), key, value, mask=seen[:, None, None] & band[None, None]
        )
        return reshape(out, (batch, num_blocks * size, *out.shape[2:]))[:, :length]

    def _own_values(self, value):
        """What each head gets where a token sees only itself: [B, T, N, H]."""
        return jnp.repeat(value, self.num_heads // self.num_kv_heads, axis=2)

    def _others(self, x, mask):
        """What the position network reads of the tokens x that each may see: [B, T, HIDDEN]."""
        if not isinstance(self.positions, LearnedPositions):
            return None
        exists = jnp.ones(x.shape[:2]) if mask is None else mask.astype(jnp.float32)
        read = self.positions.read(x) * exists[..., None]
        if self.causal:
            total, count = _running_sum(read), _running_sum(exists)
        else:
            total, count = read.sum(1, keepdims=True), exists.sum(1, keepdims=True)
        return jnp.broadcast_to(total / jnp.maximum(count, 1)[..., None], read.shape)

    def _rows(self, x, others, rows, length, mask):
        """The pattern of tokens x [B, R, E] at int32 `rows` [R], over `length` keys."""
        if self.kind == "window":
            columns = rows[:, None] + jnp.arange(self.window, dtype=jnp.int32)[None] - self.back
            weights = ((columns >= 0) & (columns < length)).astype(jnp.float32)
            columns = jnp.clip(columns, 0, length - 1)
            return RowSparseTensor(columns[..., None], weights, (rows.size,), (length,))
        if self.kind == "static":
            free, raw = self.positions, self.positions.raw()[None]
            raw = jnp.broadcast_to(raw, (x.shape[0], raw.shape[1], rows.size, *raw.shape[3:]))
        else:
            free, raw = self.positions.free, self.positions.raw(x, others, rows)

        def visible(indices):
            columns = indices[..., 0]
            seen = columns >= 0 if mask is None else at_keys(mask, columns)
            return seen & (columns <= rows[None, None, :, None]) if self.causal else seen

        indices, weights = self._points(free.tuples(raw, rows), length, visible)
        return RowSparseTensor(indices, weights, (rows.size,), (length,))

    def _entries(self, rows, batch, length):
        """The pattern "learned2d" of tokens at consecutive int32 `rows` [R], over `length` keys.

        Points beyond the tokens that there are take their shares with them, to no effect: what a
        token sees is the same however many there are. So it is with padding.
        """
        tuples = self.positions.tuples()
        tuples = jax.tree.map(lambda x: jnp.broadcast_to(x[None], (batch, *x.shape)), tuples)

        def past(indices):
            return indices[..., 1] <= indices[..., 0]

        indices, weights = self._points(tuples, self.size, past if self.causal else None)
        indices = indices.at[..., 0].add(-rows[0])
        end = jnp.asarray([rows.size, length], jnp.int32).reshape((1,) * weights.ndim + (2,))
        weights = jnp.where(((indices >= 0) & (indices < end)).all(-1), weights, 0)
        indices = jnp.clip(indices, 0, end - 1)
        leading, n = weights.shape[:-2], weights.shape[-2] * weights.shape[-1]
        indices, weights = indices.reshape(*leading, n, 2), weights.reshape(*leading, n)
        return SparseTensor(indices, weights, (rows.size,), (length,))

    def _blocks(self, raw, rows, size, exists):
        """Of blocks at int32 `rows` [R]: their own block and learned ones, among `size`.

        Those of which no token exists are hidden by `exists` bool [B, R], if it is not None.
        """

        def visible(indices):
            own, columns = rows[None, None, :, None], indices[..., 0]
            seen = columns < own if self.causal else columns != own
            return seen if exists is None else seen & at_keys(exists, columns)

        indices, weights = self._points(self.positions.free.tuples(raw, rows), size, visible)
        own = jnp.zeros_like(indices[..., :1, 0]) + jnp.expand_dims(
            rows, (*range(indices.ndim - 3), -1)
        )
        columns = jnp.concatenate([own, indices[..., 0]], -1)
        return columns, jnp.concatenate([jnp.ones_like(weights[..., :1]), weights], -1)

    def _cached_blocks(self, x, others, rows, raw):
        """Raw positions with those of the blocks that begin here, and the pattern of the tokens."""
        own = rows // self.block
        begins = jnp.where(rows % self.block == 0, own, self.size)
        raw = raw.at[:, :, begins].set(self.positions.raw(x, others, own), mode="drop")
        blocks, weights = self._blocks(raw[:, :, own], own, self.size, None)
        within = jnp.arange(self.block, dtype=jnp.int32).reshape((1,) * blocks.ndim + (-1,))
        columns = (blocks[..., None] * self.block + within).reshape(*blocks.shape[:-1], -1)
        weights = jnp.repeat(weights, self.block, axis=-1)
        past = columns <= rows.reshape((1,) * (columns.ndim - 2) + (-1, 1))
        weights = jnp.where(past, weights, 0)
        return raw, RowSparseTensor(columns[..., None], weights, (rows.size,), (self.max_length,))

    def _points(self, tuples, size, where):
        """Points and weights of tuples [B, heads, R, k, r], without the heads axis if shared."""
        if self.causal and self.deterministic:
            # Fixed points must be the same however many tokens follow.
            size = self.size
        points = discretize(
            None if self.deterministic else self.rngs(),
            tuples,
            (size,) * tuples.means.shape[-1],
            num_global=self.num_global,
            num_local=self.num_local,
            region=self.region,
            where=where,
            implementation=serving(self.implementation, "redistribute"),
        )
        return tuple(x[:, 0] for x in points) if points[0].shape[1] == 1 else points


def _existing(x, mask):
    """Tokens [B, T, E], 0 where a mask [B, T] says that there are none, whatever stood there."""
    return x if mask is None else jnp.where(mask[..., None], x, 0)


def _running_sum(x):
    """The sum over axis 1 up to each place."""
    return jax.lax.associative_scan(jnp.add, x, axis=1)


def rotate(x: jax.Array, rows: jax.Array) -> jax.Array:
    """Turns pairs of features by angles in proportion to the position (arXiv 2104.09864).

    Args:
      x: float [B, T, N, H], H even.
      rows: int32 [T], the positions.

    Returns:
      [B, T, N, H], of the dtype of x.
    """
    half = x.shape[-1] // 2
    rates = jnp.asarray(_ROTARY_BASE ** (-np.arange(half) / half), jnp.float32)
    angles = (rows.astype(jnp.float32)[:, None] * rates[None])[None, :, None]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    # Signs with the sines and a roll, since halves put together anew would take CPUs six times as
    # long: they decide for every number from which half it is.
    cos, sin = jnp.concatenate([cos, cos], -1), jnp.concatenate([-sin, sin], -1)
    x32 = x.astype(jnp.float32)
    return (x32 * cos + jnp.roll(x32, half, axis=-1) * sin).astype(x.dtype)
