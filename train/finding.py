"""Classifiers that find: a map of scores over the overview, and patches that are read by it."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from hyperlayer_jax.nn import Glimpses, average, mixture
from train.layers import Convolutions, Mlp


def overview(images: jax.Array, coarseness: int) -> jax.Array:
    """Means over squares of pixels: [B, H, W, C] -> [B, H / f, W / f, C], f divides H and W."""
    b, h, w, c = images.shape
    f = coarseness
    return images.reshape(b, h // f, f, w // f, f, c).mean((2, 4))


def whole_squares(images: jax.Array, coarseness: int) -> jax.Array:
    """Images [B, H, W, C] with rows and columns of 0 below and behind, so that f divides both."""
    missing = [-size % coarseness for size in images.shape[1:3]]
    return jnp.pad(images, [(0, 0), *((0, n) for n in missing), (0, 0)]) if any(missing) else images


class ScoreMap(nnx.Module):
    """Four numbers for each cell of an overview, from the cells around it; all places are alike."""

    def __init__(self, channels: int, hidden: int, reach: int, rngs: nnx.Rngs):
        self.reach = reach
        self.first = nnx.Linear((2 * reach + 1) ** 2 * channels, hidden, rngs=rngs)
        self.second = nnx.Linear(hidden, hidden, rngs=rngs)
        small = nnx.initializers.variance_scaling(1e-2, "fan_in", "normal")
        self.last = nnx.Linear(hidden, 4, kernel_init=small, rngs=rngs)
        self.gain = nnx.Param(jnp.float32(1.0))

    def __call__(self, cells: jax.Array) -> jax.Array:
        """Maps overviews [B, h, w, C] to [B, h, w, 4]."""
        around = jnp.concatenate(_around(cells, self.reach, "constant"), -1)
        x = nnx.relu(self.first(4 * around))
        maps = self.last(nnx.relu(self.second(x)))
        return maps.at[..., 0].add(self.gain[...] * busy(cells))


def busy(cells: jax.Array) -> jax.Array:
    """The logarithm of the contrast around each cell: [B, h, w, C] -> [B, h, w]."""
    around = jnp.concatenate(_around(cells.mean(-1, keepdims=True), 1, "edge"), -1)
    return jnp.log(around.var(-1) + 1e-4) / 2


def _around(cells: jax.Array, reach: int, beyond: str) -> list[jax.Array]:
    """The cells [B, h, w, C] so far from each, and what `jnp.pad` puts beyond the border."""
    _, h, w, _ = cells.shape
    padded = jnp.pad(cells, [(0, 0), (reach, reach), (reach, reach), (0, 0)], beyond)
    sides = range(2 * reach + 1)
    return [padded[:, i : i + h, j : j + w] for i in sides for j in sides]


class Finder(nnx.Module):
    """Scores the overview, reads patches at full resolution, and classifies what it read.

    Patches are classified one by one and their answers weighed ("mixture"), or averaged, be it as
    pixels ("average") or as features ("features"), and then classified.
    """

    def __init__(self, config, channels: int, search: nnx.Module, use: str, rngs: nnx.Rngs):
        self.coarseness = config.coarseness
        self.score = ScoreMap(channels, config.score_hidden, config.reach, rngs)
        self.search = search
        self.use = use
        widths = [channels, 16, 32] if config.head == "conv" else [channels]
        size = math.ceil(config.window / 2 ** (len(widths) - 1))
        self.convolutions = Convolutions(widths, rngs)
        self.dense = Mlp([size**2 * widths[-1], 2 * config.hidden, config.hidden], rngs)
        self.last = nnx.Linear(config.hidden, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> tuple[jax.Array, Glimpses]:
        """Maps images [B, H, W, C] to logits [B, 10] and the glimpses they come from."""
        images = whole_squares(images, self.coarseness)
        return self.look(images, overview(images, self.coarseness))

    def look(self, images: jax.Array, cells: jax.Array) -> tuple[jax.Array, Glimpses]:
        """The same, given the overview [B, h, w, C]: of images, only what is read is touched."""
        glimpses = self.search(images, self.score(cells))
        patches = glimpses.patches
        b, k, h, w, c = patches.shape
        if self.use == "average":
            mean = average(glimpses, patches.reshape(b, k, -1))
            return self.last(self.features(mean.reshape(b, h, w, c))), glimpses
        features = self.features(patches.reshape(b * k, h, w, c)).reshape(b, k, -1)
        if self.use == "features":
            return self.last(average(glimpses, features)), glimpses
        return mixture(glimpses, self.last(features)), glimpses

    def features(self, patches: jax.Array) -> jax.Array:
        """What is seen in patches [n, h, w, C], [n, hidden]."""
        return nnx.relu(self.dense(self.convolutions(patches)))

    def entropy(self, images: jax.Array) -> jax.Array:
        """The mean entropy of the scores of images [B, H, W, C]."""
        scores = self.score(overview(images, self.coarseness))[..., 0]
        log_prob = jax.nn.log_softmax(scores.reshape(len(scores), -1))
        return -(jnp.exp(log_prob) * log_prob).sum(-1).mean()
