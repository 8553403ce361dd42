"""A ready hypernetwork: index tuples that are computed from the input."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from hyperlayer_jax.nn.tuples import FreeTuples
from hyperlayer_jax.types import IndexTuples


class AdaptiveTuples(nnx.Module):
    """Free tuples, to which a linear layer adds what features of the input say.

    The features are any network's, dense or convolutional:

        features = nnx.Sequential(nnx.Linear(64, 80, rngs=rngs), nnx.relu)
        tuples = AdaptiveTuples(features, 80, FreeTuples((10,), 4, (64,), rngs=rngs), rngs=rngs)
        layer = HyperLayer(tuples, 64, 10, by_output=True, rngs=rngs)
    """

    def __init__(
        self,
        features: Callable[[jax.Array], jax.Array],
        num_features: int,
        start: FreeTuples,
        *,
        rngs: nnx.Rngs,
    ):
        """Makes the hypernetwork.

        Args:
          features: maps x to [*B, num_features].
          num_features: see `features`.
          start: tuples to which the means, sigmas and, where learned, values are added, before
            they are transformed.
          rngs: the stream `params`.
        """
        self.features = features
        self.start = start
        each = len(start.shape) + 1 + isinstance(start.values, nnx.Param)
        self.head = nnx.Linear(num_features, start.sigmas.size * each, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> IndexTuples:
        """Returns means and sigmas [*B, *chunks, k, r] and values [*B, *chunks, k] for x."""
        start = self.start
        added, r = self.head(self.features(x)), len(start.shape)
        batch = added.shape[:-1]
        means, sigmas, values = (
            jnp.broadcast_to(first[...], (*batch, *first.shape))
            for first in (start.means, start.sigmas, start.values)
        )
        added = added.reshape(*batch, *start.sigmas.shape, -1)
        if isinstance(start.values, nnx.Param):
            values = values + added[..., r + 1]
        return start.emit(means + added[..., :r], sigmas + added[..., r], values)
