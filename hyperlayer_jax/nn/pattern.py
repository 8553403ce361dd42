"""What a pattern of attention is.

It is a few numbers. What it learns is in the `positions` of its layer, which it makes, and what it
draws comes from the layer's `sampler`.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
from flax import nnx

from hyperlayer_jax import checks
from hyperlayer_jax.attention import sparse_attention
from hyperlayer_jax.kernels import serving
from hyperlayer_jax.nn.sampler import Sampler
from hyperlayer_jax.types import RowSparseTensor, SparseTensor


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
    """

    letter: ClassVar[str]

    def __post_init__(self):
        """Raises a ValueError where an option is out of range."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and checks.check_count(field.name, value) == 0:
                raise ValueError(f"{field.name}: got 0, want an int >= 1")

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
