"""Hypernetworks of attention: where to look, and how widely.

Each is made for an index space of `size` positions (tokens, or blocks of them), and emits
`num_tuples` tuples for each of `num_heads` heads and each position: how far away from it to look,
or in `FreeEntries` which row and column of the attention matrix.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.scipy.special import logit

from hyperlayer_jax.kernels import materialize
from hyperlayer_jax.lift import reshape
from hyperlayer_jax.nn.linear import TokenLinear
from hyperlayer_jax.transforms import per_axis, transform_means, transform_sigmas
from hyperlayer_jax.types import IndexTuples

_HIDDEN = 64
# The widest of the first sigmas, as a part of the index space, and what a softplus of 1 stands for.
_FIRST_SIGMA, _SIGMA_SCALE = 0.25, 0.1
_MEAN_GAIN, _SIGMA_GAIN, _NETWORK_GAIN = 4.0, 8.0, 0.02
# Where steps are kept short: how many sigmas a distance, and its sigma, move at most in one of size
# 1, and the part that is left of those of a network.
_LONGEST_STEP, _NETWORK_STEP = 3.0, 0.1


class PositionParam(nnx.Param):
    """A parameter of a network of positions; `nn.shorten_steps` keeps its steps short."""

    def step_factors(self, values: jax.Array) -> jax.Array | float:
        """What updates are multiplied by where the parameter has these values."""
        del values
        return _NETWORK_STEP


class DistanceParam(PositionParam):
    """Distances and their sigmas, [num_heads, k, 2], with the `line` that they are on."""

    def step_factors(self, values: jax.Array) -> jax.Array:
        """No distance and no sigma moves by more than three sigmas per unit of step size."""

        def positions(values):
            return jnp.concatenate(self.line.distances(_with_gains(values)), -1)

        places, slopes = jax.jvp(positions, [values], [jnp.ones_like(values)])
        longest = _LONGEST_STEP * places[..., 1:]
        return longest / jnp.maximum(slopes, longest)


@dataclasses.dataclass(frozen=True)
class Line:
    """The index space of distances.

    Attributes:
      size: its length.
      causal: looks back alone, otherwise either way.
      min_sigma: the smallest sigma, in positions.
    """

    size: int
    causal: bool
    min_sigma: float

    def distances(self, raw: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Distances and sigmas [*B, k, 1] of raw positions [*B, k, 2]."""
        distances = transform_means(raw[..., :1], (self.size,))
        if not self.causal:
            distances = 2 * distances - (self.size - 1)
        return distances, _sigmas(raw[..., 1], (self.size,), self.min_sigma)


class FreePositions(nnx.Module):
    """Distances that are parameters, the same for every token.

    At first they are spread over all of the space, more densely next to the token, each as wide as
    the space up to the next one, or as a quarter of all: together they feel any position.
    Parameters are kept small, so that a step of Adam that suits other weights is a longer one of
    positions, and one yet longer of sigmas.
    """

    def __init__(
        self, num_heads: int, num_tuples: int, size: int, *, causal: bool, min_sigma: float
    ):
        """Makes the parameters.

        Args:
          num_heads: heads with positions of their own.
          num_tuples: k, the tuples of each head.
          size: the length of the index space.
          causal: looks back alone, otherwise either way.
          min_sigma: the smallest sigma, in positions.
        """
        self.line = Line(size, causal, min_sigma)
        count = num_tuples * num_heads
        place = (np.arange(count) + 0.5).reshape(num_tuples, num_heads).T
        share, space = (place / count) ** 2, 2 * place / count**2
        if not causal:
            share = (1 + share * np.where(np.arange(num_tuples) % 2, 1, -1)) / 2
        means = logit(jnp.asarray(share, jnp.float32)) / _MEAN_GAIN
        sigmas = _raw_sigmas(np.minimum(space, _FIRST_SIGMA))
        self.parameters = DistanceParam(jnp.stack([means, sigmas], -1), line=self.line)

    def raw(self) -> jax.Array:
        """Means and sigmas before they are brought into range: float32 [1, num_heads, 1, k, 2]."""
        return _with_gains(self.parameters[...])[None, :, None]

    def tuples(self, raw: jax.Array, rows: jax.Array) -> IndexTuples:
        """Index tuples for tokens at given positions (equation 13 of docs/method.md).

        Args:
          raw: float32 [B, num_heads, R, k, 2], like `raw()`, or with something added.
          rows: int32 [R], the positions of the tokens.

        Returns:
          Means and sigmas [B, num_heads, R, k, 1], values of 1. A mean may lie outside of the
          index space, on the side on which a point at the border is near.
        """
        distances, sigmas = self.line.distances(raw)
        rows = rows.astype(raw.dtype)[None, None, :, None, None]
        return IndexTuples(rows - distances, sigmas, jnp.ones_like(raw[..., 1]))


class LearnedPositions(nnx.Module):
    """A small network that reads a token, its place, and the mean of the tokens that it may see.

    It starts as `FreePositions`, to which what it says is added. Its steps are shorter than those
    of other weights, and no gradient goes through it into the tokens: the gradient of a position is
    mostly noise, which would drown what is common to all tokens, and what these are.
    """

    def __init__(self, features: int, free: FreePositions, *, rngs: nnx.Rngs):
        """Makes the network.

        Args:
          features: E, of a token.
          free: where it starts.
          rngs: the stream `params`.
        """
        self.free = free
        # Weights are kept large, and what they give is made smaller, so that steps are short.
        large = nnx.initializers.variance_scaling(1 / _NETWORK_GAIN**2, "fan_in", "normal")
        zeros = nnx.initializers.zeros
        heads, tuples, _ = free.parameters.shape
        self.token_proj = _Linear(features, _HIDDEN, kernel_init=large, rngs=rngs)
        self.context_proj = _Linear(features, _HIDDEN, use_bias=False, kernel_init=large, rngs=rngs)
        self.place = PositionParam(jax.random.normal(rngs.params(), (_HIDDEN,)) / _NETWORK_GAIN)
        self.out_proj = _Linear(
            _HIDDEN, heads * tuples * 2, use_bias=False, kernel_init=zeros, rngs=rngs
        )

    def tuples(
        self, x: jax.Array, rows: jax.Array, *, mask: jax.Array | None = None, at: slice
    ) -> IndexTuples:
        """Index tuples of some of the tokens of whole sequences.

        Args:
          x: float [B, T, E].
          rows: int32 [R], the positions of those that are meant.
          mask: bool [B, T], the tokens that exist; all where None.
          at: which R of the T tokens are meant.

        Returns:
          Means and sigmas [B, num_heads, R, k, 1], values of 1.
        """
        raw = self.raw(x[:, at], self._context_mean(x, mask, at), rows)
        return self.free.tuples(raw, rows)

    def init_cache(self, batch: int) -> jax.Array:
        """What `extend` needs of no tokens: the sum of what is read of them, [B, HIDDEN]."""
        return jnp.zeros((batch, _HIDDEN))

    def extend(
        self, x: jax.Array, rows: jax.Array, total: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """`context_mean` of tokens x [B, T, E] at `rows` int32 [T], and the sum with them in it."""
        sums = total[:, None] + jnp.cumsum(self._read(x), 1)
        return sums / (rows + 1).astype(sums.dtype)[None, :, None], sums[:, -1]

    def raw(self, x: jax.Array, context_mean: jax.Array, rows: jax.Array) -> jax.Array:
        """Raw positions of tokens x [B, R, E] at `rows` int32 [R]: float32 [B, num_heads, R, k, 2].

        Args:
          x: float [B, R, E].
          context_mean: float32 [B, R, HIDDEN], of what is read of the tokens that each may see.
          rows: int32 [R].
        """
        place = rows.astype(jnp.float32)[:, None] / self.free.line.size * self.place[...][None]
        token = self.token_proj(_float32(x))
        hidden = _NETWORK_GAIN * (token + context_mean + place[None])
        heads, tuples, _ = self.free.parameters.shape
        out = self.out_proj(jax.nn.gelu(hidden)).reshape(*x.shape[:2], heads, tuples, 2)
        return _NETWORK_GAIN * jnp.moveaxis(out, 2, 1) + self.free.raw()

    def _context_mean(self, x, mask, at):
        """What the network reads of the tokens x [B, T, E] that each `at` may see: [B, R, HIDDEN].

        The sum of what is read is read of the sum, which is shorter.
        """
        # A compiler would count up ones, for a minute.
        x, count = _float32(x), 1 + jnp.arange(x.shape[1], dtype=jnp.float32)[None]
        if mask is not None:
            exists = mask.astype(jnp.float32)
            x, count = x * exists[..., None], jnp.cumsum(exists, 1)
        if self.free.line.causal:
            total, count = jnp.cumsum(self._read(_sums_up_to(x, at)), 1), count[:, at]
        else:
            total, count = self._read(x.sum(1, keepdims=True)), count[:, -1:]
        mean = total / jnp.maximum(count, 1)[..., None]
        return jnp.broadcast_to(mean, (x.shape[0], len(range(x.shape[1])[at]), _HIDDEN))

    def _read(self, x):
        return self.context_proj(_float32(x))


class _Linear(TokenLinear):
    """A layer of a network of positions."""

    def __init__(self, *sizes: int, **options: Any):
        super().__init__(*sizes, **options)
        for name in ("kernel", "bias"):
            if (param := getattr(self, name)) is not None:
                setattr(self, name, PositionParam(param[...]))


class FreeEntries(nnx.Module):
    """Entries of the attention matrix, of which row and column are both parameters.

    Every row begins with as many entries as there are tuples of `FreePositions`, at its distances;
    all of them are free to leave it.
    """

    def __init__(self, free: FreePositions):
        """Makes the parameters.

        Args:
          free: where they start.
        """
        size = free.line.size
        rows = jnp.arange(size, dtype=jnp.int32)
        columns = jnp.clip(free.tuples(free.raw(), rows).means[0, ..., 0], 0, size - 1)
        rows = jnp.broadcast_to(rows.astype(jnp.float32)[None, :, None], columns.shape)
        # Half an index from either end, where the sigmoid is flat.
        share = (jnp.stack([rows, columns], -1) + 0.5) / size
        self.size, self.min_sigma = size, free.line.min_sigma
        self.means = nnx.Param(logit(share) / _MEAN_GAIN)
        self.sigmas = nnx.Param(_raw_sigmas(np.full(columns.shape, _FIRST_SIGMA)))

    def tuples(self) -> IndexTuples:
        """Means and sigmas [num_heads, size, k, 2], values of 1: a chunk for each row."""
        means = materialize(jax.nn.sigmoid(self.means[...] * _MEAN_GAIN)) * self.size - 0.5
        raw = self.sigmas[...] * _SIGMA_GAIN
        sigmas = _sigmas(raw, (self.size, self.size), self.min_sigma)
        return IndexTuples(means, sigmas, jnp.ones_like(raw))


def _with_gains(parameters: jax.Array) -> jax.Array:
    """From parameters [..., 2] to raw distances and sigmas."""
    return parameters * per_axis([_MEAN_GAIN, _SIGMA_GAIN], parameters).astype(np.float32)


def _sigmas(raw, shape, min_sigma):
    return transform_sigmas(raw, shape, scale=_SIGMA_SCALE, minimum=min_sigma)


def _raw_sigmas(share: np.ndarray) -> jax.Array:
    """Parameters whose sigmas are these parts of the index space: the inverse of `_sigmas`."""
    return jnp.asarray(np.log(np.expm1(share / _SIGMA_SCALE)) / _SIGMA_GAIN, jnp.float32)


def _sums_up_to(x: jax.Array, at: slice) -> jax.Array:
    """Sums of tokens [B, T, E], each of those after the one before, up to one of R `at`: [B, R, E].

    `at` starts before its step.
    """
    rows = range(x.shape[1])[at]
    if rows.step == 1:
        return x[:, at]
    x = jnp.pad(x[:, : rows[-1] + 1], [(0, 0), (rows.step - 1 - rows.start, 0), (0, 0)])
    return reshape(x, (x.shape[0], len(rows), rows.step, x.shape[2])).sum(2)


def _float32(x: jax.Array) -> jax.Array:
    """Tokens as the network reads them, which gives them no gradient."""
    return jax.lax.stop_gradient(x.astype(jnp.float32))
