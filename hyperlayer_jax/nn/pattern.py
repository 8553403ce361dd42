"""What a pattern of attention is, and those that learn distances, token by token.

It is a few numbers. What it learns is in the `positions` of its layer, which it makes, and what it
draws comes from the layer's `sampler`.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hyperlayer_jax import checks
from hyperlayer_jax.attention import at_keys, sparse_attention
from hyperlayer_jax.kernels import serving
from hyperlayer_jax.nn.positions import FreePositions, LearnedPositions
from hyperlayer_jax.nn.sampler import Sampler
from hyperlayer_jax.types import IndexTuples, RowSparseTensor, SparseTensor


class Layer(Protocol):
    """What a pattern knows of its layer: see `SparseSelfAttention`."""

    features: int
    num_heads: int
    max_length: int
    causal: bool
    implementation: str | None
    positions: Any
    sampler: Sampler


class Tokens(NamedTuple):
    """Tokens, and what the layer projected them to.

    Attributes:
      x: float [B, T, E]; 0 where they do not exist.
      query: [B, T, N, H].
      key: [B, T, K, H].
      value: [B, T, K, H].
      rows: int32 [T], their consecutive places in the sequence.
      mask: bool [B, T], those that exist; all where None.
    """

    x: jax.Array
    query: jax.Array
    key: jax.Array
    value: jax.Array
    rows: jax.Array
    mask: jax.Array | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pattern:
    """The keys that every token attends to, and their weights.

    A new one says `pattern` and `extend`, and is a line of `PATTERNS`; `attend` where it does not
    attend over its pattern as it is, `make_positions` where it learns, `init_cache` where it
    remembers more than keys and values. Its fields are its options.

    Attributes:
      letter: its name among the layers of a `TransformerLM`.
      draws: takes points from the layer's `sampler`.
    """

    letter: ClassVar[str]
    draws: ClassVar[bool] = False

    def __post_init__(self):
        """Raises a ValueError where an option is out of range."""
        for field in dataclasses.fields(self):
            if field.type is int:
                checks.check_positive(field.name, getattr(self, field.name))

    @property
    def spacing(self) -> tuple[int, int]:
        """How many tokens there are for each row and each column of what `pattern` returns."""
        return 1, 1

    def make_positions(self, layer: Layer, rngs: nnx.Rngs) -> nnx.Module | None:
        """What is learned beside the projections; `layer` has no positions yet."""
        del layer, rngs
        return None

    def pattern(self, layer: Layer, tokens: Tokens) -> RowSparseTensor | SparseTensor | None:
        """The pattern of whole sequences: see `SparseSelfAttention.pattern`."""
        raise NotImplementedError

    def attend(self, layer: Layer, tokens: Tokens) -> jax.Array:
        """What the tokens of whole sequences get: [B, T, N, H]."""
        query, key, value, mask = tokens.query, tokens.key, tokens.value, tokens.mask
        pattern: Any = self.pattern(layer, tokens)
        return attend(layer, query, key, value, pattern, mask=mask)

    def init_cache(self, layer: Layer, keys: jax.Array) -> Any:
        """A pytree, what `extend` needs of the tokens before beside keys and values: of none.

        Args:
          layer: causal.
          keys: [B, max_length, K, H], of the empty cache.
        """
        del layer, keys

    def extend(
        self, layer: Layer, tokens: Tokens, keys: jax.Array, values: jax.Array, state: Any
    ) -> tuple[jax.Array, Any]:
        """What tokens get that follow others.

        Args:
          layer: causal.
          tokens: the new ones, without a mask.
          keys: [B, max_length, K, H], up to those of the new tokens; what follows is not written.
          values: the same of values.
          state: from `init_cache`, or the call before.

        Returns:
          [B, T, N, H], and the state with these tokens in it.
        """
        raise NotImplementedError


def attend(
    layer: Layer,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    pattern: RowSparseTensor | SparseTensor,
    *,
    causal: bool = False,
    mask: jax.Array | None = None,
) -> jax.Array:
    """`sparse_attention` by the backend of the layer where it serves what the pattern needs."""
    if isinstance(pattern, SparseTensor):
        operation = "spmm"
    elif pattern.out_shape[0] == query.shape[1]:
        operation = "gathered_attention"
    else:
        operation = "block_attention" if mask is None else "masked_block_attention"
    implementation = serving(layer.implementation, operation)
    return sparse_attention(
        query, key, value, pattern, causal=causal, mask=mask, implementation=implementation
    )


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

    draws = True
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
        # By name, since `nnx.tabulate` shows no dataclass among arguments by position.
        options = {"where": where, "implementation": layer.implementation}
        return layer.sampler(tuples=tuples, shape=shape, **options)

    def _keys(self, layer, tuples, rows, length, mask=None):
        """The pattern of tuples [B, N, R, k] of tokens at int32 `rows` [R], over `length` keys."""

        def visible(indices):
            columns = indices[..., 0]
            seen = columns >= 0 if mask is None else at_keys(mask, columns)
            return seen & (columns <= rows[None, None, :, None]) if layer.causal else seen

        points = self._points(layer, tuples, length, visible)
        return RowSparseTensor(*of_heads(*points), (rows.size,), (length,))


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
        shape = tokens.x.shape[0], raw.shape[1], tokens.rows.size, *raw.shape[3:]
        return layer.positions.tuples(jnp.broadcast_to(raw, shape), tokens.rows)


class Learned(Sampled):
    """Distances that a small network says, which reads the token, its place and what it may see.

    That is the mean of all tokens up to it, or of all where not causal.
    """

    letter = "l"

    def make_positions(self, layer, rngs):
        return LearnedPositions(layer.features, self._free(layer), rngs=rngs)

    def pattern(self, layer, tokens):
        return self._rows(layer, tokens, np.s_[:])

    def init_cache(self, layer, keys):
        return layer.positions.init_cache(keys.shape[0])

    def extend(self, layer, tokens, keys, values, state):
        context_mean, state = layer.positions.extend(tokens.x, tokens.rows, state)
        raw = layer.positions.raw(tokens.x, context_mean, tokens.rows)
        tuples = layer.positions.free.tuples(raw, tokens.rows)
        pattern = self._keys(layer, tuples, tokens.rows, keys.shape[1])
        return attend(layer, tokens.query, keys, values, pattern), state

    def _rows(self, layer, tokens, at):
        """The pattern of the tokens of a slice `at`."""
        rows, mask = tokens.rows[at], tokens.mask
        tuples = layer.positions.tuples(tokens.x, rows, mask=mask, at=at)
        return self._keys(layer, tuples, rows, tokens.x.shape[1], mask)


def of_heads(indices, weights):
    """Points and weights [B, heads, ...], without the heads axis if all heads share one."""
    return (indices[:, 0], weights[:, 0]) if weights.shape[1] == 1 else (indices, weights)
