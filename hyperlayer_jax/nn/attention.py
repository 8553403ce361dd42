"""Self-attention over learned positions, or over another pattern."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from hyperlayer_jax import checks
from hyperlayer_jax.nn.linear import TokenLinear
from hyperlayer_jax.nn.pattern import Pattern, Tokens
from hyperlayer_jax.nn.patterns import PATTERNS
from hyperlayer_jax.nn.rotary import rotate
from hyperlayer_jax.nn.sampler import Sampler
from hyperlayer_jax.types import RowSparseTensor, SparseTensor


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionCache:
    """What `SparseSelfAttention.extend` remembers of the tokens before.

    Attributes:
      length: int32 [], how many tokens there were.
      keys: [B, max_length, K, H]; those from `length` on are not yet written.
      values: [B, max_length, K, H].
      state: a pytree, what the pattern itself remembers.
    """

    length: jax.Array
    keys: jax.Array
    values: jax.Array
    state: Any


class SparseSelfAttention(nnx.Module):
    """Self-attention in which every token attends to a few keys, at positions that are learned.

    The pattern says which: by name with its defaults, or as an instance of its class in
    `hyperlayer_jax.nn.patterns`, such as `patterns.Window(window=64)`.

    - "learned": a small network reads each token and says how far away to look, and how widely.
    - "static": distances that are parameters, the same for every token.
    - "learned2d": rows and columns of the attention matrix are both parameters.
    - "strided": "learned", for one token in every few; the others see only themselves.
    - "window": the last tokens, or those around where not causal.
    - "block": "learned" on a coarser grid, of blocks of tokens.
    - "content": the last tokens, and those that lie next to where a token looks on learned lines,
      wherever they are.
    - "dense": all tokens.

    The cost grows linearly with the length, for all patterns but "dense"; that of "content" as
    sorting does.
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        max_length: int,
        *,
        pattern: str | Pattern = "learned",
        causal: bool = True,
        num_kv_heads: int | None = None,
        rotary: bool = True,
        sampler: Sampler | Mapping[str, Any] | None = None,
        dtype: jnp.dtype | None = None,
        implementation: str | None = None,
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
          rotary: turns queries and keys by their position, so that logits can tell distances. They
            then find the right one among sampled points by themselves, and leave a learned position
            that is nearly right without a gradient (docs/offset.md).
          sampler: draws points around learned positions; or options of one that the layer makes, in
            place of 4 global and 2 local points within 8 positions. "window" and "dense" draw
            nothing, and take none.
          dtype: of the computation; where None, what the input and float32 parameters promote to.
            Positions are always float32.
          implementation: the kernel backend for what it serves, chosen by device where None.
          rngs: the stream `params`, and `sample` where no sampler is given.

        Raises:
          ValueError: a size is out of range or does not divide another, `pattern` is unknown, or a
            sampler is given to one that draws nothing.
        """
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        for name, size in (
            ("features", features), ("num_heads", num_heads), ("max_length", max_length),
            ("num_kv_heads", num_kv_heads),
        ):  # fmt: skip
            checks.check_positive(name, size)
        if isinstance(pattern, str):
            if pattern not in PATTERNS:
                names = ", ".join(map(repr, PATTERNS))
                raise ValueError(f"pattern: got {pattern!r}, want one of {names}")
            pattern = PATTERNS[pattern]
        if sampler is not None and not pattern.draws:
            raise ValueError(f"sampler: got one, want None for {pattern}, which draws nothing")
        if features % num_heads or num_heads % num_kv_heads:
            raise ValueError(
                f"num_heads: got {num_heads}, want a divisor of features, {features}, and a "
                f"multiple of num_kv_heads, {num_kv_heads}"
            )
        if rotary and (features // num_heads) % 2:
            raise ValueError(f"features: got {features}, want an even number per head for rotary")
        self.features, self.head_features = features, features // num_heads
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.max_length = max_length
        self.causal = causal
        self.rotary = rotary
        self.dtype = dtype
        self.implementation = implementation
        self.kind = pattern
        outputs = (num_heads + 2 * num_kv_heads) * self.head_features
        self.qkv_proj = TokenLinear(features, outputs, use_bias=False, dtype=dtype, rngs=rngs)
        self.out_proj = TokenLinear(features, features, use_bias=False, dtype=dtype, rngs=rngs)
        self.positions = nnx.data(pattern.make_positions(self, rngs))
        if not isinstance(sampler, Sampler | Mapping | None):
            raise ValueError(f"sampler: got {sampler!r}, want a Sampler, options of one, or None")
        if not isinstance(sampler, Sampler):
            own = {"num_global": 4, "num_local": 2, "region": 8} | dict(sampler or {})
            sampler = Sampler(**own, rngs=rngs)
        self.sampler = sampler

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
        out = self.kind.attend(self, self._tokens(x, mask))
        return _existing(self.out_proj(out.reshape(x.shape)), mask)

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
        return self.kind.pattern(self, self._tokens(x, mask))

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
        return AttentionCache(
            jnp.zeros((), jnp.int32), keys, values, self.kind.init_cache(self, keys)
        )

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
        tokens = self._tokens(x, None, cache.length)
        end = cache.length + x.shape[1]
        if not isinstance(end, jax.core.Tracer) and end > self.max_length:
            raise ValueError(
                f"x: got {x.shape[1]} tokens after {cache.length}, want {self.max_length} at most"
            )

        def write(old, new):
            return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), cache.length, 1)

        keys, values = write(cache.keys, tokens.key), write(cache.values, tokens.value)
        out, state = self.kind.extend(self, tokens, keys, values, cache.state)
        out = self.out_proj(out.reshape(x.shape))
        out = jnp.where(end <= self.max_length, out, jnp.nan)
        return out, AttentionCache(end, keys, values, state)

    def _tokens(self, x, mask, first=None):
        """Tokens x [B, T, E] as the pattern sees them, the first at int32 `first`, 0 where None."""
        checks.check_float("x", x, 3, "[B, T, E]")
        length, features = self.max_length, self.features
        if x.ndim != 3 or not 1 <= x.shape[1] <= length or x.shape[2] != features:
            raise ValueError(
                f"x: got shape {x.shape}, want [B, T, {features}] with T from 1 to {length}"
            )
        if mask is not None:
            checks.check_mask("mask", mask, x.shape[:2])
        x = _existing(x, mask)
        rows = jnp.arange(x.shape[1], dtype=jnp.int32)
        rows = rows if first is None else first + rows
        served, heads = self.num_heads + self.num_kv_heads, self.num_heads + 2 * self.num_kv_heads
        out = self.qkv_proj(x).reshape(*x.shape[:2], heads, self.head_features)
        query, key, value = jnp.split(out, [self.num_heads, served], axis=2)
        if self.rotary:
            query, key = rotate(query, rows), rotate(key, rows)
        return Tokens(x, query, key, value, rows, mask)


def _existing(x, mask):
    """Tokens [B, T, E], 0 where a mask [B, T] says that there are none, whatever stood there."""
    return x if mask is None else jnp.where(mask[..., None], x, 0)
