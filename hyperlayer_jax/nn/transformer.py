"""A language model that mixes kinds of attention, layer by layer."""

import functools
import typing
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from hyperlayer_jax import checks
from hyperlayer_jax.kernels import in_bounds
from hyperlayer_jax.nn.attention import AttentionCache, SparseSelfAttention
from hyperlayer_jax.nn.linear import TokenLinear
from hyperlayer_jax.nn.pattern import Pattern
from hyperlayer_jax.nn.patterns import PATTERNS
from hyperlayer_jax.types import RowSparseTensor, SparseTensor

Positions = Literal["rotary", "learned", "none"]

# A lower temperature is none: logits over it would overflow.
_COLDEST = 1e-30


class TransformerLM(nnx.Module):
    """A decoder-only transformer whose layers attend each in their own way.

    A string names the layers: "wwwl" is three of "window" and one of "learned"; the letters are l
    (learned), s (static), 2 (learned2d), t (strided), w (window), b (block), c (content) and d
    (dense), the patterns of `SparseSelfAttention`. Layers normalise their input (pre-norm), and the
    embedding of tokens is also the matrix of the logits.
    """

    def __init__(
        self,
        num_tokens: int,
        features: int,
        num_heads: int,
        max_length: int,
        *,
        layers: str | Sequence[Pattern] = "wwwl",
        hidden: int | None = None,
        positions: Positions = "rotary",
        attention: Callable[..., SparseSelfAttention] = SparseSelfAttention,
        dropout: float = 0.0,
        dtype: jnp.dtype | None = None,
        rngs: nnx.Rngs,
    ):
        """Makes the model.

        Args:
          num_tokens: V, the size of the vocabulary.
          features: E, of a token.
          num_heads: heads of attention.
          max_length: the most tokens that there can be.
          layers: a letter for each layer, see the class, or patterns with options of their own:
            `[patterns.Window(window=64)] * 3 + [patterns.Learned(num_tuples=8)]`.
          hidden: units between the two matrices after each attention; 4 E where None.
          positions: how layers know the place of a token: "rotary" turns queries and keys,
            "learned" adds a vector to each token, "none" leaves it to the patterns.
          attention: makes a layer's attention, for options that are not among these:
            `functools.partial(SparseSelfAttention, num_kv_heads=2)`.
          dropout: the share of the outputs of each part that is dropped in training.
          dtype: of the computation, parameters stay float32; float32 where None.
          rngs: the streams `params`, `sample` and `dropout`.

        Raises:
          ValueError: a letter or `positions` is unknown, or a size is out of range.
        """
        by_letter = {pattern.letter: pattern for pattern in PATTERNS.values()}
        if (isinstance(layers, str) and not set(layers) <= set(by_letter)) or not layers:
            known = ", ".join(f"{pattern.letter} ({name})" for name, pattern in PATTERNS.items())
            raise ValueError(f"layers: got {layers!r}, want one letter for each layer of {known}")
        if positions not in typing.get_args(Positions):
            names = ", ".join(map(repr, typing.get_args(Positions)))
            raise ValueError(f"positions: got {positions!r}, want one of {names}")
        self.max_length = checks.check_count("max_length", max_length)
        self.embed = nnx.Embed(num_tokens, features, dtype=dtype, rngs=rngs)
        self.places = nnx.data(None)
        if positions == "learned":
            self.places = nnx.Embed(max_length, features, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List(
            [
                _Block(
                    attention(
                        features,
                        num_heads,
                        max_length,
                        pattern=by_letter[layer] if isinstance(layer, str) else layer,
                        causal=True,
                        rotary=positions == "rotary",
                        dtype=dtype,
                        rngs=rngs,
                    ),
                    features,
                    4 * features if hidden is None else hidden,
                    dropout,
                    dtype,
                    rngs,
                )
                for layer in layers
            ]
        )
        self.norm = nnx.RMSNorm(features, dtype=dtype, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, tokens: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        """Logits of the next token at every place.

        Args:
          tokens: int32 [B, T] in [0, V), T at most max_length.
          mask: bool [B, T], the tokens that exist; all where None.

        Returns:
          float32 [B, T, V]; NaN where tokens outside the vocabulary are found only when the
          program runs.

        Raises:
          ValueError: tokens or mask has the wrong shape or dtype, or tokens are out of range.
        """
        x = self._embed(tokens, jnp.arange(tokens.shape[-1], dtype=jnp.int32))
        for block in self.blocks:
            x = block(x, mask)
        return self._logits(x)

    def patterns(self, tokens: jax.Array) -> list[RowSparseTensor | SparseTensor | None]:
        """Where each layer looks, given tokens int32 [B, T]: see `SparseSelfAttention.pattern`."""
        x = self._embed(tokens, jnp.arange(tokens.shape[-1], dtype=jnp.int32))
        patterns = []
        for block in self.blocks:
            patterns.append(block.attention.pattern(block.norm(x)))
            x = block(x, None)
        return patterns

    def init_cache(self, batch: int) -> list[AttentionCache]:
        """An empty cache for `extend`, for sequences of up to max_length tokens."""
        return [block.attention.init_cache(batch) for block in self.blocks]

    def extend(
        self, tokens: jax.Array, cache: list[AttentionCache]
    ) -> tuple[jax.Array, list[AttentionCache]]:
        """Logits after each of the tokens that follow those in the cache.

        Args:
          tokens: int32 [B, T]; with those before, at most max_length.
          cache: from `init_cache`, or from the call for the tokens before.

        Returns:
          float32 [B, T, V], and the cache with these tokens in it.

        Raises:
          ValueError: tokens has the wrong shape or dtype.
        """
        places = cache[0].length + jnp.arange(tokens.shape[-1], dtype=jnp.int32)
        x, extended = self._embed(tokens, places), []
        for block, old in zip(self.blocks, cache, strict=True):
            x, new = block.extend(x, old)
            extended.append(new)
        return self._logits(x), extended

    def _embed(self, tokens, places):
        checks.check_indices("tokens", tokens, 2, "[B, T]")
        if tokens.ndim != 2 or tokens.shape[1] > self.max_length:
            raise ValueError(
                f"tokens: got shape {tokens.shape}, want [B, T] with T up to {self.max_length}"
            )
        known = in_bounds(tokens, self.embed.num_embeddings)
        if not isinstance(known, jax.core.Tracer) and not known.all():
            raise ValueError(
                f"tokens: got {tokens.min()} to {tokens.max()}, want 0 to "
                f"{self.embed.num_embeddings - 1}"
            )
        x = jnp.where(known[..., None], self.embed(tokens), jnp.nan)
        if self.places is not None:
            x = x + self.places(places)[None]
        return self.dropout(x)

    def _logits(self, x):
        return self.embed.attend(self.norm(x)).astype(jnp.float32)


class _Block(nnx.Module):
    """Attention, then a network for each token; both are added to what they read."""

    def __init__(self, attention, features, hidden, dropout, dtype, rngs):
        self.norm = nnx.RMSNorm(features, dtype=dtype, rngs=rngs)
        self.attention = attention
        self.second_norm = nnx.RMSNorm(features, dtype=dtype, rngs=rngs)
        self.up_proj = TokenLinear(features, hidden, dtype=dtype, rngs=rngs)
        self.down_proj = TokenLinear(hidden, features, dtype=dtype, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, x, mask):
        return self._finish(x, self.attention(self.norm(x), mask=mask))

    def extend(self, x, cache):
        attended, cache = self.attention.extend(self.norm(x), cache)
        return self._finish(x, attended), cache

    def _finish(self, x, attended):
        x = x + self.dropout(attended)
        return x + self.dropout(self.down_proj(nnx.gelu(self.up_proj(self.second_norm(x)))))


def generate(
    key: jax.Array,
    model: TransformerLM,
    prompt: jax.Array,
    *,
    num_tokens: int,
    temperature: float | jax.Array = 1.0,
) -> jax.Array:
    """Continues prompts, token by token, with a cache.

    Args:
      key: a PRNG key.
      model: taken as deterministic.
      prompt: int32 [B, T], T >= 1.
      num_tokens: how many tokens to add; with the prompt, at most max_length of the model.
      temperature: logits are divided by it; 0 takes the likeliest token.

    Returns:
      int32 [B, num_tokens].

    Raises:
      ValueError: a length or the temperature is out of range.
    """
    total = prompt.shape[-1] + checks.check_count("num_tokens", num_tokens)
    if prompt.shape[-1] == 0 or total > model.max_length:
        raise ValueError(
            f"prompt: got {prompt.shape[-1]} tokens and {num_tokens} to add, want at least 1 and "
            f"at most {model.max_length} altogether"
        )
    if not isinstance(temperature, jax.core.Tracer) and not temperature >= 0:
        raise ValueError(f"temperature: got {temperature}, want >= 0")
    graphdef, state = nnx.split(nnx.view(model, deterministic=True))
    temperature = jnp.asarray(temperature, jnp.float32)
    return _generate(graphdef, temperature, state, prompt, jax.random.split(key, num_tokens))


@functools.partial(jax.jit, static_argnums=0)
def _generate(graphdef, temperature, state, prompt, keys):
    def extend(tokens, cache):
        logits, cache = nnx.merge(graphdef, state, copy=True).extend(tokens, cache)
        return logits[:, -1], cache

    def step(carry, key):
        logits, cache = carry
        # Logits below the largest one, which cannot overflow.
        logits = logits - logits.max(-1, keepdims=True)
        drawn = jax.random.categorical(key, logits / jnp.maximum(temperature, _COLDEST))
        likeliest = logits.argmax(-1).astype(drawn.dtype)
        token = jnp.where(temperature > 0, drawn, likeliest).astype(jnp.int32)
        return extend(token[:, None], cache), token

    cache = nnx.merge(graphdef, state, copy=True).init_cache(len(prompt))
    _, tokens = jax.lax.scan(step, extend(prompt, cache), keys)
    return jnp.moveaxis(tokens, 0, 1)
