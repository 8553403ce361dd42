"""Dense layers and convolutions, as classifiers of images have them."""

import itertools

import jax
import jax.numpy as jnp
from flax import nnx


class Mlp(nnx.Module):
    """Dense layers, a ReLU between them, on all that is behind the batch axis."""

    def __init__(self, sizes: list[int], rngs: nnx.Rngs):
        self.layers = nnx.List(nnx.Linear(*pair, rngs=rngs) for pair in itertools.pairwise(sizes))

    def __call__(self, x: jax.Array) -> jax.Array:
        *hidden, last = self.layers
        x = x.reshape(len(x), -1)
        for layer in hidden:
            x = nnx.relu(layer(x))
        return last(x)


class Convolutions(nnx.Module):
    """3 x 3 convolutions, after each a ReLU and the largest of 2 x 2.

    Convolutions are matrix products over neighbourhoods: in a loop, such as that over training
    steps, the gradient of XLA's own takes a hundred times as long on CPU (jax issue 12868).
    """

    def __init__(self, channels: list[int], rngs: nnx.Rngs):
        self.layers = nnx.List(
            nnx.Linear(9 * before, behind, rngs=rngs)
            for before, behind in itertools.pairwise(channels)
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = layer(_neighbourhoods(x))
            x = nnx.max_pool(nnx.relu(x), (2, 2), (2, 2), padding="SAME")
        return x


def _neighbourhoods(x: jax.Array) -> jax.Array:
    """The 3 x 3 pixels around each: [B, H, W, C] -> [B, H, W, 9 C], 0 beyond the border."""
    _, height, width, _ = x.shape
    x = jnp.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
    shifted = [x[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    return jnp.concatenate(shifted, axis=-1)
