"""Megapixel digits: five on a large canvas, three of them of the class, among scribbles.

The task of Katharopoulos and Fleuret, "Processing megapixel images with deep attention-sampling
models", arXiv 1905.03711, as their `make_mnist.py` has it. Canvases are kept as tiles and never
whole; what is known of their overviews is surveyed once.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hyperlayer_jax.nn import TiledImages
from train import canvases, data, evaluation
from train.finding import Survey, survey_cells

_NUM_ALIKE, _NUM_OTHERS = 3, 2
_NUM_SCRIBBLES = 50
NUM_HELD_OUT = 1000
_AT_ONCE = 50


class Scenes(NamedTuple):
    """Canvases of one split.

    Attributes:
      images: [N, H, W, C], in tiles.
      overviews: [N, h, w, C], in tiles of the same table.
      contrast: [N, n], of the busiest cells, see `Survey`.
      chosen: int32 [N, n, 2], those cells.
      labels: int32 [N], the class of the three digits that are alike.
    """

    images: TiledImages
    overviews: TiledImages
    contrast: jax.Array
    chosen: jax.Array
    labels: jax.Array

    def pick(self, numbers: jax.Array) -> tuple[TiledImages, Survey]:
        """Some of the canvases, int32 [B], and what is known of them."""
        images, overviews = (
            TiledImages(x.table[numbers], x.tiles) for x in (self.images, self.overviews)
        )
        return images, Survey(overviews, self.contrast[numbers], self.chosen[numbers])


def check(config) -> None:
    """Raises a ValueError where digits may find no place, or all cells would be scored."""
    least = (_NUM_ALIKE + _NUM_OTHERS) * config.digit_size
    if config.canvas < least:
        raise ValueError(
            f"--canvas must be at least {least} for digits of --digit_size={config.digit_size}, "
            f"got {config.canvas}"
        )
    cells = (config.canvas // config.coarseness) ** 2
    if config.scored >= cells:
        raise ValueError(f"--scored must be below the {cells} cells, got {config.scored}")


def load(config) -> data.Dataset:
    """Training canvases as many as the config says, 1000 for validation and for testing.

    Raises:
      DataError: the digits cannot be read.
      FlagError: they are too large for the memory.
    """
    digits = canvases.load(config)
    splits = (digits.train, digits.validation, digits.test)
    counts = (config.train_canvases, NUM_HELD_OUT, NUM_HELD_OUT)
    return data.Dataset(
        *(
            make_scenes(i, split, count, config)
            for i, (split, count) in enumerate(zip(splits, counts, strict=True))
        )
    )


def make_scenes(seed: int, digits: data.Split, count: int, config) -> Scenes:
    """Places digits and scribbles; the same seed, the same canvases.

    Digits do not overlap each other. Scribbles, one of 50 each, lie over what is below them.
    """
    rng = np.random.default_rng(seed)
    size, canvas, f = config.digit_size, config.canvas, config.coarseness
    images = np.round(255 * digits.images).astype(np.uint8)
    channels = images.shape[-1]
    patterns = np.round(255 * scribbles(rng, size))[..., None].astype(np.uint8)
    labels = rng.integers(0, canvases.NUM_CLASSES, count).astype(np.int32)
    by_class = [np.flatnonzero(digits.labels == c) for c in range(canvases.NUM_CLASSES)]
    others = [np.flatnonzero(digits.labels != c) for c in range(canvases.NUM_CLASSES)]
    t = f * _cells_per_tile(canvas // f, size / f)
    pixels = np.zeros((canvas, canvas, channels), np.uint8)
    tiled = pixels.reshape(canvas // t, t, canvas // t, t, channels).swapaxes(1, 2)
    table = np.full((count, canvas // t, canvas // t), -1, np.int32)
    tiles, stored = [], 0
    for scene, label in enumerate(labels):
        chosen = [*rng.choice(by_class[label], _NUM_ALIKE), *rng.choice(others[label], _NUM_OTHERS)]
        pieces = [*images[chosen], *patterns[rng.integers(0, _NUM_SCRIBBLES, config.num_patches)]]
        corners = [
            *_disjoint(rng, len(chosen), canvas, size),
            *rng.integers(0, canvas - size + 1, (config.num_patches, 2)),
        ]
        for piece, (row, column) in zip(pieces, corners, strict=True):
            pixels[row : row + size, column : column + size] = piece
        ends = np.add.outer(np.array(corners), [0, size - 1]) // t
        touched = np.zeros(table.shape[1:], bool)
        for (top, bottom), (left, right) in ends:
            touched[top : bottom + 1, left : right + 1] = True
        tiles.append(tiled[touched])
        table[scene][touched] = stored + np.arange(len(tiles[-1]), dtype=np.int32)
        stored += len(tiles[-1])
        tiled[touched] = 0
    pool = np.concatenate(tiles)
    cells = pool.reshape(len(pool), t // f, f, t // f, f, channels).mean((2, 4), np.float32) / 255
    overviews = TiledImages(table, cells.astype(np.float16))
    surveys = [
        _survey(TiledImages(part, overviews.tiles), config.scored)
        for part in np.array_split(table, max(1, count // _AT_ONCE))
    ]
    contrast, chosen = (np.concatenate(parts) for parts in zip(*surveys, strict=True))
    return Scenes(TiledImages(table, pool), overviews, contrast, chosen, labels)


def error_rate(model: nnx.Module, scenes: Scenes) -> tuple[float, int]:
    """The part of canvases that a model classifies wrongly, and how many there are."""
    numbers = np.arange(len(scenes.labels), dtype=np.int32)
    scenes = jax.device_put(scenes)
    parts = np.array_split(numbers, max(1, len(numbers) // _AT_ONCE))
    errors = sum(int(_count_errors(model, scenes, part)) for part in parts)
    return errors / len(numbers), len(numbers)


@evaluation.compiled
def _count_errors(model, scenes, numbers):
    logits, _ = evaluation.deterministic(model).look(*scenes.pick(numbers))
    return (logits.argmax(-1) != scenes.labels[numbers]).sum()


def scribbles(rng: np.random.Generator, size: int) -> np.ndarray:
    """Patterns of two straight lines each, float [50, size, size] in [0, 1]."""
    last = size - 0.51
    slopes = np.tan(rng.random(_NUM_SCRIBBLES) * np.pi / 2.5)
    lines = np.zeros((_NUM_SCRIBBLES, size, size), bool)
    for line, slope in zip(lines, slopes, strict=True):
        x = np.linspace(0, min(last, last / slope), 2 * size)
        line[np.round(x).astype(int), np.round(slope * x).astype(int)] = True
    second = lines[rng.permutation(_NUM_SCRIBBLES)]
    for axis in (1, 2):
        flipped = rng.random(_NUM_SCRIBBLES) < 0.33
        second[flipped] = np.flip(second[flipped], axis)
    return (lines | second) * rng.uniform(0.8, 1, lines.shape)


def _disjoint(rng, count: int, canvas: int, size: int) -> list[np.ndarray]:
    """Corners of squares on a canvas that do not overlap."""
    corners: list[np.ndarray] = []
    while len(corners) < count:
        corner = rng.integers(0, canvas - size + 1, 2)
        if all(np.abs(corner - other).max() >= size for other in corners):
            corners.append(corner)
    return corners


def _cells_per_tile(cells: int, wanted: float) -> int:
    """What divides the cells of an axis and is nearest to what is wanted."""
    divisors = [n for n in range(1, cells + 1) if cells % n == 0]
    return min(divisors, key=lambda n: abs(n - wanted))


@functools.partial(jax.jit, static_argnums=1)
def _survey(overviews: TiledImages, num_scored: int):
    known = survey_cells(overviews.whole().astype(jnp.float32), num_scored)
    return known.contrast, known.chosen
