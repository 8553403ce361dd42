"""Classifiers that find: a map of scores over the overview, and patches that are read by it."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hyperlayer_jax.nn import Glimpses, TiledImages, average, mixture
from train import canvases
from train.layers import Convolutions, Mlp

# What a vote is worth at first, in logits, and the power of its chance by which it counts: what is
# looked at first need not count most.
_CONFIDENCE = 10.0
_SHARPNESS = 0.2


class Survey(NamedTuple):
    """What is known of canvases before any of it is read closely; made once, where they are made.

    Attributes:
      overview: [B, h, w, C], means over squares of pixels.
      contrast: [B, h, w], how busy it is around each cell: the logarithm of a standard deviation;
        [B, n] where cells are chosen.
      chosen: int32 [B, n, 2], the only cells to score, the busiest; all where None.
    """

    overview: jax.Array | TiledImages
    contrast: jax.Array
    chosen: jax.Array | None


def survey(images: jax.Array, coarseness: int, num_scored: int = 0) -> Survey:
    """Surveys images [B, H, W, C], all cells or so many, in squares that divide H and W."""
    return survey_cells(overview(images, coarseness), num_scored)


def survey_cells(cells: jax.Array, num_scored: int = 0) -> Survey:
    """The same, given the overviews [B, h, w, C]."""
    around = jnp.concatenate(_around(cells.mean(-1, keepdims=True), 1, "edge"), -1)
    contrast = jnp.log(around.var(-1) + 1e-4) / 2
    b, h, w = contrast.shape
    if not 0 < num_scored < h * w:
        return Survey(cells, contrast, None)
    contrast, best = jax.lax.top_k(contrast.reshape(b, h * w), num_scored)
    return Survey(cells, contrast, jnp.stack([best // w, best % w], -1))


def overview(images: jax.Array, coarseness: int) -> jax.Array:
    """Means over squares of pixels: [B, H, W, C] -> [B, H / f, W / f, C], f divides H and W."""
    b, h, w, c = images.shape
    f = coarseness
    return images.reshape(b, h // f, f, w // f, f, c).mean((2, 4))


def whole_squares(images: jax.Array, coarseness: int) -> jax.Array:
    """Images [B, H, W, C] with rows and columns of 0 below and behind, so that f divides both."""
    missing = [-size % coarseness for size in images.shape[1:3]]
    return jnp.pad(images, [(0, 0), *((0, n) for n in missing), (0, 0)]) if any(missing) else images


def _around(cells: jax.Array, reach: int, beyond: str) -> list[jax.Array]:
    """The cells [B, h, w, C] so far from each, and what `jnp.pad` puts beyond the border."""
    _, h, w, _ = cells.shape
    padded = jnp.pad(cells, [(0, 0), (reach, reach), (reach, reach), (0, 0)], beyond)
    sides = range(2 * reach + 1)
    return [padded[:, i : i + h, j : j + w] for i in sides for j in sides]


def _read_cells(cells: jax.Array | TiledImages, places: jax.Array) -> jax.Array:
    """Cells [B, h, w, C] at places [B, n, m, 2], 0 beyond the border: [B, n, m, C]."""
    if isinstance(cells, TiledImages):
        return cells.read(places).astype(jnp.float32)
    b, h, w, c = cells.shape
    _, n, m, _ = places.shape
    row, column = places[..., 0], places[..., 1]
    inside = (row >= 0) & (row < h) & (column >= 0) & (column < w)
    index = jnp.where(inside, row * w + column, h * w).reshape(b, n * m, 1)
    flat = cells.reshape(b, h * w, c)
    return jnp.take_along_axis(flat, index, 1, mode="fill", fill_value=0).reshape(b, n, m, c)


class ScoreMap(nnx.Module):
    """Four numbers for each cell of an overview, from the cells around it; all places are alike."""

    def __init__(self, channels: int, hidden: int, reach: int, rngs: nnx.Rngs):
        self.reach = reach
        self.first = nnx.Linear((2 * reach + 1) ** 2 * channels, hidden, rngs=rngs)
        self.second = nnx.Linear(hidden, hidden, rngs=rngs)
        small = nnx.initializers.variance_scaling(1e-2, "fan_in", "normal")
        self.last = nnx.Linear(hidden, 4, kernel_init=small, rngs=rngs)
        self.gain = nnx.Param(jnp.float32(1.0))

    def __call__(self, survey: Survey) -> jax.Array:
        """The maps of a survey: [B, h, w, 4], or [B, n, 4] of the cells that it names."""
        if survey.chosen is None:
            around = jnp.concatenate(_around(survey.overview, self.reach, "constant"), -1)
            return self._of(around, survey.contrast)
        sides = np.stack(np.indices((2 * self.reach + 1,) * 2, np.int32), -1) - self.reach
        places = survey.chosen[:, :, None] + sides.reshape(1, 1, -1, 2)
        around = _read_cells(survey.overview, places).reshape(*survey.chosen.shape[:2], -1)
        return self._of(around, survey.contrast)

    def _of(self, around, contrast):
        x = nnx.relu(self.first(4 * around))
        maps = self.last(nnx.relu(self.second(x)))
        return maps.at[..., 0].add(self.gain[...] * contrast)


class Finder(nnx.Module):
    """Scores the overview, reads patches at full resolution, and classifies what it read.

    Patches are classified one by one and their answers weighed ("mixture") or counted ("votes"), or
    averaged, be it as pixels ("average") or as features ("features"), and then classified.
    """

    def __init__(self, config, channels: int, search: nnx.Module, use: str, rngs: nnx.Rngs):
        self.coarseness = config.coarseness
        self.num_scored = config.scored
        self.score = ScoreMap(channels, config.score_hidden, config.reach, rngs)
        self.search = search
        self.use = use
        widths = [channels, 16, 32] if config.head == "conv" else [channels]
        size = math.ceil(config.window / 2 ** (len(widths) - 1))
        self.convolutions = Convolutions(widths, rngs)
        self.dense = Mlp([size**2 * widths[-1], 2 * config.hidden, config.hidden], rngs)
        self.last = nnx.Linear(config.hidden, canvases.NUM_CLASSES, rngs=rngs)
        if use == "votes":
            self.confidence = nnx.Param(jnp.float32(_CONFIDENCE))
            self.sharpness = nnx.Param(jnp.float32(_SHARPNESS))

    def __call__(self, images: jax.Array) -> tuple[jax.Array, Glimpses]:
        """Maps images [B, H, W, C] to logits [B, 10] and the glimpses they come from."""
        images = whole_squares(images, self.coarseness)
        return self.look(images, survey(images, self.coarseness, self.num_scored))

    def look(self, images: jax.Array | TiledImages, known: Survey) -> tuple[jax.Array, Glimpses]:
        """The same, given a survey: of images, only what is read is touched."""
        maps = self.score(known)
        if known.chosen is None:
            glimpses = self.search(images, maps)
        else:
            shape = known.overview.shape[1:3]
            glimpses = self.search(images, maps, cells=known.chosen, grid_shape=shape)
        patches = glimpses.patches
        b, k, h, w, c = patches.shape
        if self.use == "average":
            mean = average(glimpses, patches.reshape(b, k, -1))
            return self.last(self.features(mean.reshape(b, h, w, c))), glimpses
        features = self.features(patches.reshape(b * k, h, w, c)).reshape(b, k, -1)
        if self.use == "features":
            return self.last(average(glimpses, features)), glimpses
        if self.use == "votes":
            log_weights = jax.nn.log_softmax(self.sharpness[...] * glimpses.log_chances)
            voters = dataclasses.replace(glimpses, log_chances=log_weights)
            votes = average(voters, jax.nn.softmax(self.last(features)))
            return self.confidence[...] * votes, glimpses
        return mixture(glimpses, self.last(features)), glimpses

    def features(self, patches: jax.Array) -> jax.Array:
        """What is seen in patches [n, h, w, C], [n, hidden]."""
        return nnx.relu(self.dense(self.convolutions(patches)))

    def scores(self, images: jax.Array) -> jax.Array:
        """The scores [B, h, w] of all cells of images [B, H, W, C]."""
        return self.score(survey(images, self.coarseness))[..., 0]

    def entropy(self, known: Survey) -> jax.Array:
        """The mean entropy of the scores of what was surveyed."""
        scores = self.score(known)[..., 0]
        log_prob = jax.nn.log_softmax(scores.reshape(len(scores), -1))
        return -(jnp.exp(log_prob) * log_prob).sum(-1).mean()
