"""Hypernetworks of attention: where to look, and how widely.

Each is made for an index space of `size` positions (tokens, or blocks of them), and emits
`num_tuples` tuples for each of `num_heads` heads and each position: how far away from it to look,
or in `FreeEntries` which row and column of the attention matrix.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.scipy.special import logit

from hyperlayer_jax.kernels import materialize
from hyperlayer_jax.nn.linear import TokenLinear
from hyperlayer_jax.transforms import per_axis, transform_means, transform_sigmas
from hyperlayer_jax.types import IndexTuples

HIDDEN = 64
# The widest of the first sigmas, as a part of the index space.
_FIRST_SIGMA = 0.25
_MEAN_GAIN, _SIGMA_GAIN, _NETWORK_GAIN = 4.0, 8.0, 0.02
# Where steps are kept short: how many sigmas a distance, and its sigma, move at most in one of size
# 1, and the part that is left of those of a network.
_LONGEST_STEP, _NETWORK_STEP = 3.0, 0.1


def shorten_steps(model: nnx.Module) -> Callable[[Any, Any], Any]:
    """Keeps found positions of a model's attention where they are, also with long steps.

    To stand behind an optimizer like Adam, as `optax.stateless(shorten_steps(model))`. Steps of
    Adam are equally long, in parts of the space, all along: they throw a mean whose sigma has
    become small off its place, and the farther the longer the space is. So a distance moves by no
    more than three of its sigmas per unit of step size. Nor does a sigma: one that shrinks faster
    than its distance can follow leaves it behind, out of reach of where it was going. Networks of
    positions take steps a tenth as long: what they say of single tokens is noise while the distance
    that tokens share is not found (docs/offset.md). `learned2d`, which has no distances, is left as
    it is.

    Args:
      model: the module that is optimized, or one like it.

    Returns:
      A function of the updates and the values of all parameters of the model, trees of [*B], that
      returns the updates with those of distances and networks made shorter.
    """
    modules = [(tuple(map(str, path)), module) for path, module in nnx.iter_modules(model)]
    free = {(*path, "parameters"): m for path, m in modules if isinstance(m, FreePositions)}
    networks = [path for path, module in modules if isinstance(module, LearnedPositions)]

    def shorten(path, update, param):
        names = tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
        names = names[:-1] if names[-1] == "value" else names
        if names in free:
            return update * free[names].step_factors(param)
        in_network = any(names[: len(network)] == network for network in networks)
        return update * _NETWORK_STEP if in_network else update

    return lambda updates, params: jax.tree_util.tree_map_with_path(shorten, updates, params)


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
        self.size, self.causal, self.min_sigma = size, causal, min_sigma
        count = num_tuples * num_heads
        place = (np.arange(count) + 0.5).reshape(num_tuples, num_heads).T
        share, space = (place / count) ** 2, 2 * place / count**2
        if not causal:
            share = (1 + share * np.where(np.arange(num_tuples) % 2, 1, -1)) / 2
        means = logit(jnp.asarray(share, jnp.float32)) / _MEAN_GAIN
        sigmas = _raw_sigmas(np.minimum(space, _FIRST_SIGMA))
        self.parameters = nnx.Param(jnp.stack([means, sigmas], -1))

    def raw(self) -> jax.Array:
        """Means and sigmas before they are brought into range: float32 [num_heads, 1, k, 2]."""
        return _with_gains(self.parameters[...])[:, None]

    def step_factors(self, parameters: jax.Array) -> jax.Array:
        """What `shorten_steps` multiplies updates of `parameters` [num_heads, k, 2] by."""

        def positions(parameters):
            return jnp.concatenate(self._distances(_with_gains(parameters)), -1)

        values, slopes = jax.jvp(positions, [parameters], [jnp.ones_like(parameters)])
        longest = _LONGEST_STEP * values[..., 1:]
        return longest / jnp.maximum(slopes, longest)

    def tuples(self, raw: jax.Array, rows: jax.Array) -> IndexTuples:
        """Index tuples for tokens at given positions (equation 13 of docs/method.md).

        Args:
          raw: float32 [*B, num_heads, R, k, 2], like `raw()`, or with something added.
          rows: int32 [R], the positions of the tokens.

        Returns:
          Means and sigmas [*B, num_heads, R, k, 1], values of 1. A mean may lie outside of the
          index space, on the side on which a point at the border is near.
        """
        distances, sigmas = self._distances(raw)
        rows = rows.astype(raw.dtype).reshape((1,) * (raw.ndim - 3) + (-1, 1, 1))
        return IndexTuples(rows - distances, sigmas, jnp.ones_like(raw[..., 1]))

    def _distances(self, raw):
        """Distances and sigmas [*B, k, 1] of raw positions [*B, k, 2]."""
        distances = transform_means(raw[..., :1], (self.size,))
        if not self.causal:
            distances = 2 * distances - (self.size - 1)
        return distances, transform_sigmas(raw[..., 1], (self.size,), minimum=self.min_sigma)


class LearnedPositions(nnx.Module):
    """A small network that reads a token, its place, and the mean of the tokens that it may see.

    It starts as `FreePositions`, to which what it says is added. Its steps are shorter than those
    of other weights, and no gradient goes through it into the tokens: the gradient of a position is
    mostly noise, which would drown what is common to all tokens, and what these are.
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        num_tuples: int,
        size: int,
        *,
        causal: bool,
        min_sigma: float,
        rngs: nnx.Rngs,
    ):
        """Makes the network.

        Args:
          features: E, of a token.
          num_heads: see `FreePositions`, as the following.
          num_tuples: k.
          size: the length of the index space.
          causal: looks back alone.
          min_sigma: the smallest sigma, in positions.
          rngs: the stream `params`.
        """
        self.free = FreePositions(num_heads, num_tuples, size, causal=causal, min_sigma=min_sigma)
        # Weights are kept large, and what they give is made smaller, so that steps are short.
        large = nnx.initializers.variance_scaling(1 / _NETWORK_GAIN**2, "fan_in", "normal")
        self.token = TokenLinear(features, HIDDEN, kernel_init=large, rngs=rngs)
        self.others = TokenLinear(features, HIDDEN, use_bias=False, kernel_init=large, rngs=rngs)
        self.place = nnx.Param(jax.random.normal(rngs.params(), (HIDDEN,)) / _NETWORK_GAIN)
        self.out = TokenLinear(
            HIDDEN,
            num_heads * num_tuples * 2,
            use_bias=False,
            kernel_init=nnx.initializers.zeros,
            rngs=rngs,
        )

    def read(self, x: jax.Array) -> jax.Array:
        """What the network sees of tokens [*B, E] that are not its own, to be averaged: float32."""
        return self.others(jax.lax.stop_gradient(x.astype(jnp.float32)))

    def raw(self, x: jax.Array, others: jax.Array, rows: jax.Array) -> jax.Array:
        """Raw positions of tokens x [B, R, E] at `rows` int32 [R]: float32 [B, num_heads, R, k, 2].

        Args:
          x: float [B, R, E].
          others: float32 [B, R, HIDDEN], means of what `read` returned.
          rows: int32 [R].
        """
        batch, length, _ = x.shape
        place = rows.astype(jnp.float32)[:, None] / self.free.size * self.place[...][None]
        token = self.token(jax.lax.stop_gradient(x.astype(jnp.float32)))
        hidden = _NETWORK_GAIN * (token + others + place[None])
        heads, tuples, _ = self.free.parameters.shape
        out = self.out(jax.nn.gelu(hidden)).reshape(batch, length, heads, tuples, 2)
        return _NETWORK_GAIN * jnp.moveaxis(out, 2, 1) + self.free.raw()[None]


class FreeEntries(nnx.Module):
    """Entries of the attention matrix, of which row and column are both parameters.

    Every row begins with `num_tuples` entries, at the distances of `FreePositions`; all of them are
    free to leave it.
    """

    def __init__(
        self, num_heads: int, num_tuples: int, size: int, *, causal: bool, min_sigma: float
    ):
        """Makes the parameters; see `FreePositions`."""
        free = FreePositions(num_heads, num_tuples, size, causal=causal, min_sigma=min_sigma)
        rows = jnp.arange(size, dtype=jnp.int32)
        columns = jnp.clip(free.tuples(free.raw(), rows).means[..., 0], 0, size - 1)
        rows = jnp.broadcast_to(rows.astype(jnp.float32)[None, :, None], columns.shape)
        # Half an index from either end, where the sigmoid is flat.
        share = (jnp.stack([rows, columns], -1) + 0.5) / size
        self.size, self.min_sigma = size, min_sigma
        self.means = nnx.Param(logit(share) / _MEAN_GAIN)
        self.sigmas = nnx.Param(_raw_sigmas(np.full(columns.shape, _FIRST_SIGMA)))

    def tuples(self) -> IndexTuples:
        """Means and sigmas [num_heads, size, k, 2], values of 1: a chunk for each row."""
        means = materialize(jax.nn.sigmoid(self.means[...] * _MEAN_GAIN)) * self.size - 0.5
        raw = self.sigmas[...] * _SIGMA_GAIN
        sigmas = transform_sigmas(raw, (self.size, self.size), minimum=self.min_sigma)
        return IndexTuples(means, sigmas, jnp.ones_like(raw))


def _with_gains(parameters: jax.Array) -> jax.Array:
    """From parameters [..., 2] to raw distances and sigmas."""
    return parameters * per_axis([_MEAN_GAIN, _SIGMA_GAIN], parameters).astype(np.float32)


def _raw_sigmas(share: np.ndarray) -> jax.Array:
    """Parameters whose sigmas are these parts of the index space (equation 3 of docs/method.md)."""
    return jnp.asarray(np.log(np.expm1(10 * share)) / _SIGMA_GAIN, jnp.float32)
