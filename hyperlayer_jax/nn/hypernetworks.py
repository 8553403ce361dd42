"""Hypernetworks: index tuples that are parameters, and that networks compute from their input."""

import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from hyperlayer_jax import checks
from hyperlayer_jax.hyperlayer import round_tuples
from hyperlayer_jax.transforms import transform_means, transform_sigmas
from hyperlayer_jax.types import IndexTuples


class FixedTuples(nnx.Module):
    """Index tuples at integer places that nothing moves; their values are parameters."""

    def __init__(self, places: jax.Array, values: jax.Array, shape: Sequence[int]):
        """Puts values [*chunks, k] at places int32 [*chunks, k, r] of an index space `shape`."""
        self.shape = checks.check_shape("shape", shape)
        self.places = nnx.Variable(places)
        self.values: nnx.Variable = nnx.Param(values)

    def __call__(self, x: jax.Array | None = None) -> IndexTuples:
        """Returns means [*chunks, k, r], sigmas of 0 and values [*chunks, k], whatever x is."""
        places = self.indices().astype(jnp.float32)
        return IndexTuples(places, jnp.zeros_like(places), self.values[...])

    def indices(self) -> jax.Array:
        """The places as int32 [*chunks, k, r]."""
        return self.places[...]

    def freeze(self) -> "FixedTuples":
        """The same places, from now on fixed, and values to train."""
        return FixedTuples(self.indices(), self.values[...], self.shape)


class FreeTuples(nnx.Module):
    """Index tuples that are parameters: a hypernetwork that does not look at its input."""

    def __init__(
        self,
        chunks: Sequence[int],
        num_tuples: int,
        shape: Sequence[int],
        *,
        values: float | None = None,
        sigma_scale: float = 0.1,
        min_sigma: float = 0.0,
        rngs: nnx.Rngs,
    ):
        """Spreads the means at random over the index space.

        Args:
          chunks: the chunk axes of the tuples, () for a single chunk.
          num_tuples: k, the tuples in a chunk.
          shape: the r axes of the index space.
          values: the value of every tuple, fixed; learned, from a normal distribution, where None.
          sigma_scale: see `transform_sigmas`.
          min_sigma: the smallest sigma, in indices.
          rngs: the stream `params` draws the initial means and values.

        Raises:
          ValueError: a shape or number is out of range.
        """
        self.shape = checks.check_shape("shape", shape)
        size = (*chunks, check_positive("num_tuples", num_tuples))
        start = jax.random.uniform(
            rngs.params(), (*size, len(self.shape)), minval=0.02, maxval=0.98
        )
        self.means = nnx.Param(jnp.log(start) - jnp.log1p(-start))
        self.sigmas = nnx.Param(jnp.zeros(size))
        self.values: nnx.Variable
        if values is None:
            self.values = nnx.Param(jax.random.normal(rngs.params(), size) * num_tuples**-0.5)
        else:
            self.values = nnx.Variable(jnp.full(size, values, jnp.float32))
        self.sigma_scale = sigma_scale
        self.min_sigma = min_sigma

    def __call__(self, x: jax.Array | None = None) -> IndexTuples:
        """Returns means and sigmas [*chunks, k, r] and values [*chunks, k], whatever x is."""
        return self.emit(self.means[...], self.sigmas[...], self.values[...])

    def emit(self, means: jax.Array, sigmas: jax.Array, values: jax.Array) -> IndexTuples:
        """Tuples from raw means [*B, k, r] and sigmas [*B, k], and values [*B, k]."""
        sigmas = transform_sigmas(
            sigmas, self.shape, scale=self.sigma_scale, minimum=self.min_sigma
        )
        return IndexTuples(transform_means(means, self.shape), sigmas, values)

    def freeze(self) -> FixedTuples:
        """Where the means round to, from now on fixed, and values to train."""
        return FixedTuples(*round_tuples(FreeTuples.__call__(self), self.shape), self.shape)


class _AdaptiveTuples(FreeTuples):
    """Free tuples, to which a linear layer adds what features of the input say."""

    def __init__(self, num_features, chunks, num_tuples, shape, *, rngs, **options):
        super().__init__(chunks, num_tuples, shape, rngs=rngs, **options)
        # A mean and a sigma, and a value where that is learned.
        each = len(self.shape) + 1 + isinstance(self.values, nnx.Param)
        size = self.sigmas.size * each
        self.head = nnx.Linear(num_features, size, use_bias=False, rngs=rngs)

    def features(self, x: jax.Array) -> jax.Array:
        raise NotImplementedError

    def __call__(self, x: jax.Array | None = None) -> IndexTuples:
        """Returns means and sigmas [*B, *chunks, k, r] and values [*B, *chunks, k] for x."""
        if x is None:
            raise ValueError("x: got None, want the input")
        start = [self.means[...], self.sigmas[...][..., None]]
        if isinstance(self.values, nnx.Param):
            start.append(self.values[...][..., None])
        added, start = self.head(self.features(x)), jnp.concatenate(start, -1)
        shape = (*added.shape[:-1], *start.shape)
        raw = added.reshape(shape) + jnp.broadcast_to(start, shape)
        r = len(self.shape)
        values = (
            jnp.broadcast_to(self.values[...], shape[:-1])
            if raw.shape[-1] == r + 1
            else raw[..., r + 1]
        )
        return self.emit(raw[..., :r], raw[..., r], values)


class MLPTuples(_AdaptiveTuples):
    """A hypernetwork of dense layers: index tuples for each x [*B, *in_shape]."""

    def __init__(
        self,
        in_shape: int | Sequence[int],
        chunks: Sequence[int],
        num_tuples: int,
        shape: Sequence[int],
        *,
        hidden: Sequence[int] = (64,),
        values: float | None = None,
        sigma_scale: float = 0.1,
        min_sigma: float = 0.0,
        rngs: nnx.Rngs,
    ):
        """Makes the network; in a `HyperLayer` with `by_output`, chunks are (number of outputs,).

        Args:
          in_shape: the axes of an input.
          chunks: the chunk axes of the tuples, () for a single chunk.
          num_tuples: k, the tuples in a chunk.
          shape: the r axes of the index space.
          hidden: widths of the hidden layers.
          values: the value of every tuple, fixed; computed where None.
          sigma_scale: see `transform_sigmas`.
          min_sigma: the smallest sigma, in indices.
          rngs: the stream `params`.

        Raises:
          ValueError: a shape or number is out of range.
        """
        in_shape = (in_shape,) if isinstance(in_shape, int) else in_shape
        self.in_shape = checks.check_shape("in_shape", in_shape)
        widths = (math.prod(self.in_shape), *hidden)
        super().__init__(
            widths[-1], chunks, num_tuples, shape,
            values=values, sigma_scale=sigma_scale, min_sigma=min_sigma, rngs=rngs,
        )  # fmt: skip
        self.layers = nnx.List(nnx.Linear(*pair, rngs=rngs) for pair in itertools.pairwise(widths))

    def features(self, x: jax.Array) -> jax.Array:
        """Maps x [*B, *in_shape] to [*B, hidden[-1]]."""
        x = x.reshape(*x.shape[: x.ndim - len(self.in_shape)], math.prod(self.in_shape))
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return x


class ConvTuples(_AdaptiveTuples):
    """A hypernetwork of convolutions: index tuples for each image."""

    def __init__(
        self,
        in_shape: Sequence[int],
        chunks: Sequence[int],
        num_tuples: int,
        shape: Sequence[int],
        *,
        channels: Sequence[int] = (16, 32),
        values: float | None = None,
        sigma_scale: float = 0.1,
        min_sigma: float = 0.0,
        rngs: nnx.Rngs,
    ):
        """Makes 3 x 3 convolutions of stride 2, a ReLU after each, and a dense layer on all places.

        Args:
          in_shape: of an image, (height, width) or (height, width, channels).
          chunks: the chunk axes of the tuples, () for a single chunk.
          num_tuples: k, the tuples in a chunk.
          shape: the r axes of the index space.
          channels: of the convolutions.
          values: the value of every tuple, fixed; computed where None.
          sigma_scale: see `transform_sigmas`.
          min_sigma: the smallest sigma, in indices.
          rngs: the stream `params`.

        Raises:
          ValueError: a shape or number is out of range.
        """
        self.in_shape = checks.check_shape("in_shape", in_shape)
        if len(self.in_shape) not in (2, 3):
            raise ValueError(f"in_shape: got {self.in_shape}, want (height, width[, channels])")
        height, width, depth = (*self.in_shape, 1)[:3]
        smaller = [-(-size // 2 ** len(channels)) for size in (height, width)]
        super().__init__(
            math.prod(smaller) * (depth, *channels)[-1], chunks, num_tuples, shape,
            values=values, sigma_scale=sigma_scale, min_sigma=min_sigma, rngs=rngs,
        )  # fmt: skip
        self.layers = nnx.List(
            nnx.Conv(*pair, (3, 3), strides=2, rngs=rngs)
            for pair in itertools.pairwise((depth, *channels))
        )

    def features(self, x: jax.Array) -> jax.Array:
        """Maps images [*B, *in_shape] to [*B, f]."""
        batch = x.shape[: x.ndim - len(self.in_shape)]
        x = x.reshape(math.prod(batch), *(*self.in_shape, 1)[:3])
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return x.reshape(*batch, -1)


def check_positive(name: str, count: int) -> int:
    """Returns `count` as an int >= 1."""
    if checks.check_count(name, count) < 1:
        raise ValueError(f"{name}: got {count}, want at least 1")
    return count
