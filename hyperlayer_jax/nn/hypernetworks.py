"""Ready hypernetworks: networks that compute index tuples from their input."""

import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from hyperlayer_jax import checks
from hyperlayer_jax.nn.tuples import FreeTuples
from hyperlayer_jax.types import IndexTuples


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
        columns = [self.means[...], self.sigmas[...][..., None]]
        if isinstance(self.values, nnx.Param):
            columns.append(self.values[...][..., None])
        added, start = self.head(self.features(x)), jnp.concatenate(columns, -1)
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
