"""A pattern that goes by what tokens say: keys on lines, and queries that look next to a mean."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hyperlayer_jax.content import InOrder, content_points
from hyperlayer_jax.nn.linear import TokenLinear
from hyperlayer_jax.nn.pattern import Pattern, attend
from hyperlayer_jax.nn.window import window_columns
from hyperlayer_jax.types import RowSparseTensor

# Tokens at first lie about 1 apart.
_FIRST_SIGMA, _MIN_SIGMA = 0.4, 0.02
# Coordinates are multiples of this. So the same tokens are alike, though a matrix product of other
# tokens, as of one with a cache, rounds differently.
_GRID = 2.0**-12


class Lines(nnx.Module):
    """Coordinates of tokens on lines, as keys and as queries.

    Both are linear, the coordinates of a key in the token and in the one before it. They start as
    the question whether what a token says was said before, and what came next: a key is where its
    predecessor would look.
    """

    def __init__(self, features: int, num_heads: int, num_lines: int, *, rngs: nnx.Rngs):
        """Makes the projections.

        Args:
          features: E, of a token.
          num_heads: heads with lines of their own.
          num_lines: l, lines of each head.
          rngs: the stream `params`.
        """
        self.num_heads, self.num_lines = num_heads, num_lines
        sizes = features, num_heads * num_lines
        zeros = nnx.initializers.zeros
        self.mean_proj = TokenLinear(*sizes, use_bias=False, rngs=rngs)
        self.before_proj = TokenLinear(*sizes, use_bias=False, kernel_init=zeros, rngs=rngs)
        # A copy: one array for two parameters cannot be donated.
        self.before_proj.kernel[...] = jnp.array(self.mean_proj.kernel[...])
        self.own_proj = TokenLinear(*sizes, use_bias=False, kernel_init=zeros, rngs=rngs)
        raw = np.full((num_heads, num_lines), np.log(np.expm1(_FIRST_SIGMA)), np.float32)
        self.raw_sigmas = nnx.Param(jnp.asarray(raw))

    def coordinates(
        self, x: jax.Array, before: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Of tokens as keys.

        Args:
          x: float [B, T, E].
          before: float32 [B, heads, 1, l], what the token before them says of its successor;
            None where there is none.

        Returns:
          float32 [B, heads, T, l], and what the last token says of its successor.
        """
        said = self._by_head(self.before_proj, x)
        before = jnp.zeros_like(said[:, :, :1]) if before is None else before
        said = jnp.concatenate([before, said], 2)
        return self._by_head(self.own_proj, x) + said[:, :, :-1], said[:, :, -1:]

    def means(self, x: jax.Array) -> jax.Array:
        """Where tokens [B, T, E] look: float32 [B, heads, T, l]."""
        return self._by_head(self.mean_proj, x)

    def sigmas(self, batch: int) -> jax.Array:
        """How widely: float32 [B, heads, l], the same for all examples."""
        sigmas = jax.nn.softplus(self.raw_sigmas[...]) + _MIN_SIGMA
        return jnp.broadcast_to(sigmas[None], (batch, *sigmas.shape))

    def _by_head(self, proj, x):
        lines = proj(x.astype(jnp.float32))
        lines = lines + jax.lax.stop_gradient(jnp.round(lines / _GRID) * _GRID - lines)
        return jnp.moveaxis(lines.reshape(*x.shape[:2], self.num_heads, self.num_lines), 2, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Content(Pattern):
    """The tokens that say what a token asks for, wherever they are, and the last ones.

    On each of a few learned lines, a token sees those next to where it looks, of all up to itself
    where causal, and of all that there are where not. So it sees at most `num_lines` `num_nearest`
    + `window` keys, at the cost of sorting. See `content_points`. A found key at its place has as
    large a weight as all of the window; one of the window that is found has both weights.

    Attributes:
      num_lines: of each head.
      num_nearest: the keys that are found on each.
      window: the last tokens, or those around where not causal, which are always seen.
      shared: all heads share their lines.
    """

    letter = "c"
    num_lines: int = 4
    num_nearest: int = 4
    window: int = 16
    shared: bool = False

    def make_positions(self, layer, rngs):
        heads = 1 if self.shared else layer.num_heads
        return Lines(layer.features, heads, self.num_lines, rngs=rngs)

    def pattern(self, layer, tokens):
        coordinates, _ = layer.positions.coordinates(tokens.x)
        limits = tokens.rows + 1 if layer.causal else None
        return self._pattern(layer, tokens, coordinates, limits=limits)

    def init_cache(self, layer, keys):
        """Coordinates of all tokens, the same in order, and what the last says of its successor."""
        shape = keys.shape[0], layer.positions.num_heads, keys.shape[1], self.num_lines
        coordinates = jnp.zeros(shape, jnp.float32)
        in_order = InOrder.of(jnp.moveaxis(coordinates, -1, -2), jnp.int32(0))
        return coordinates, in_order, coordinates[:, :, :1]

    def extend(self, layer, tokens, keys, values, state):
        coordinates, in_order, before = state
        new, before = layer.positions.coordinates(tokens.x, before)
        coordinates = jax.lax.dynamic_update_slice_in_dim(coordinates, new, tokens.rows[0], 2)
        if tokens.rows.size == 1:
            in_order = in_order.add(new[:, :, 0])
            pattern = self._pattern(layer, tokens, coordinates, in_order=in_order)
        else:
            number = tokens.rows[-1] + 1
            in_order = InOrder.of(jnp.moveaxis(coordinates, -1, -2), number)
            pattern = self._pattern(layer, tokens, coordinates, limits=tokens.rows + 1)
        out = attend(layer, tokens.query, keys, values, pattern)
        return out, (coordinates, in_order, before)

    def _pattern(self, layer, tokens, coordinates, **options):
        """The pattern of tokens over keys at coordinates [B, heads, length, l]."""
        rows, (batch, heads, length, _) = tokens.rows, coordinates.shape
        near, seen = window_columns(rows, length, window=self.window, causal=layer.causal)
        mask = tokens.mask
        if mask is not None:
            mask = jnp.broadcast_to(mask[:, None], (batch, heads, length))
        found, weights = content_points(
            coordinates,
            layer.positions.means(tokens.x),
            layer.positions.sigmas(batch),
            num_nearest=self.num_nearest,
            mask=mask,
            **options,
        )
        zeros = jnp.zeros_like(weights[..., :1])
        seen = zeros + seen[None, None].astype(weights.dtype) / self.window
        near = zeros.astype(near.dtype) + near[None, None]
        columns = jnp.concatenate([near, found[..., 0]], -1)
        weights = jnp.concatenate([seen, weights], -1)
        columns, weights = (x[:, 0] if heads == 1 else x for x in (columns, weights))
        return RowSparseTensor(columns[..., None], weights, (rows.size,), (length,))
