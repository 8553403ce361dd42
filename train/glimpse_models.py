"""Classifiers without a map of scores: a dense network aims, or convolutions see everything."""

import math

import jax
from flax import nnx

from hyperlayer_jax.nn import (
    GlimpseAttention,
    Glimpses,
    ReinforceGlimpses,
    Sampler,
    SpatialTransformer,
)
from train import canvases
from train.finding import overview
from train.layers import Convolutions, Mlp


def _make_head(config, size: int, channels: list[int], count: int, rngs: nnx.Rngs):
    """Convolutions on `count` images of size x size, and dense layers on what comes out of all."""
    for _ in channels[1:]:
        size = math.ceil(size / 2)
    features = count * size**2 * channels[-1]
    dense = Mlp([features, 2 * config.hidden, config.hidden, canvases.NUM_CLASSES], rngs)
    return Convolutions(channels, rngs), dense


class GlimpseClassifier(nnx.Module):
    """Decides by a coarse image, reads at full resolution, and classifies what it read."""

    def __init__(self, config, channels: int, rngs: nnx.Rngs):
        self.coarseness = config.coarseness
        coarse = config.canvas // config.coarseness
        self.locator = Mlp([coarse**2 * channels, config.hidden, config.hidden], rngs)
        aim = (config.hidden, (config.glimpse_size,) * 2, config.glimpses)
        match config.model:
            case "stn":
                self.attention = SpatialTransformer(*aim, rngs=rngs)
            case "reinforce":
                self.attention = ReinforceGlimpses(*aim, rngs=rngs)
            case shape:
                self.attention = GlimpseAttention(
                    *aim,
                    shape=shape,
                    sigma_scale=config.sigma_scale,
                    min_sigma=config.min_sigma,
                    sampler=Sampler(
                        num_global=config.num_global,
                        num_local=config.num_local,
                        region=config.region,
                        rngs=rngs,
                    ),
                    implementation=config.implementation,
                    rngs=rngs,
                )
        widths = [channels, 32, 64] if config.head == "conv" else [channels]
        self.convolutions, self.dense = _make_head(
            config, config.glimpse_size, widths, config.glimpses, rngs
        )

    def __call__(self, images: jax.Array) -> tuple[jax.Array, Glimpses]:
        """Maps images [B, H, W, C] to logits [B, 10] and the glimpses they come from."""
        glimpses = self.attention(images, self.features(images))
        return self.classify(glimpses.patches), glimpses

    def features(self, images: jax.Array) -> jax.Array:
        """What decides where to look, [B, hidden], of images [B, H, W, C]."""
        return nnx.relu(self.locator(overview(images, self.coarseness)))

    def classify(self, patches: jax.Array) -> jax.Array:
        """Logits [B, 10] of patches [B, g, k, k, C]."""
        seen = self.convolutions(patches.reshape(-1, *patches.shape[2:]))
        return self.dense(seen.reshape(len(patches), -1))


class ConvClassifier(nnx.Module):
    """Convolutions over the whole canvas, at full resolution."""

    def __init__(self, config, channels: int, rngs: nnx.Rngs):
        widths = [channels, 16, 32, 64]
        self.convolutions, self.dense = _make_head(config, config.canvas, widths, 1, rngs)

    def __call__(self, images: jax.Array) -> tuple[jax.Array, None]:
        """Maps images [B, H, W, C] to logits [B, 10]."""
        return self.dense(self.convolutions(images)), None


class PoolClassifier(nnx.Module):
    """Convolutions over the whole canvas, at full resolution, and the largest of each feature."""

    def __init__(self, config, channels: int, rngs: nnx.Rngs):
        self.convolutions = Convolutions([channels, 16, 32, 64], rngs)
        self.dense = Mlp([64, config.hidden, canvases.NUM_CLASSES], rngs)

    def __call__(self, images: jax.Array) -> tuple[jax.Array, None]:
        """Maps images [B, H, W, C] to logits [B, 10]."""
        return self.dense(self.convolutions(images).max((1, 2))), None
