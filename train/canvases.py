"""The task of glimpses: a digit somewhere on a cluttered canvas."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from flax import nnx

from train import data, devices, evaluation, launcher
from train.clutter import clutter

NUM_CLASSES = 10
# Every digit that is held out is placed several times, on at least so many canvases altogether.
MIN_CANVASES = 5000
_PIXELS_AT_ONCE = 2**23
_DIGIT = {"task": ("digit",)}


Task = Literal["digit", "megapixel"]


def by_task(digit: Any, megapixel: Any) -> Callable[[Any], Any]:
    """A default that depends on the task."""
    return lambda config: {"digit": digit, "megapixel": megapixel}[config.task]


class Size(NamedTuple):
    """What is large or small about a canvas."""

    canvas: int
    num_patches: int


@dataclasses.dataclass(frozen=True)
class Config(launcher.Config):
    """What is on a canvas."""

    task: Task = launcher.flag(
        "digit", "Find a digit, or say which of five is there three times (train.megapixel)."
    )
    dataset: data.Name = launcher.flag("digits", "Images to classify.")
    data_dir: str | None = launcher.flag(
        None, "Folder of a data set that is not bundled.", only={"dataset": data.WITH_FOLDER},
        fixed=False,
    )  # fmt: skip
    digit_size: int = launcher.flag(
        by_task(14, 28), "Rows and columns that digits are resized to: 14, megapixel 28.",
        minimum=1, below=2**12,
    )  # fmt: skip
    canvas: int = launcher.flag(
        by_task(96, 1500), "Rows and columns of a canvas: 96, megapixel 1500.", minimum=1,
        below=2**13,
    )  # fmt: skip
    num_patches: int = launcher.flag(
        by_task(6, 50), "Pieces of other digits on a canvas, 6, or scribbles, megapixel 50.",
        minimum=0, below=2**12,
    )  # fmt: skip
    patch_size: int = launcher.flag(6, "Rows and columns of a piece.", minimum=1, only=_DIGIT)
    rotation: float = launcher.flag(
        0.0, "Digits turn by up to so many degrees.", minimum=0.0, only=_DIGIT
    )
    scaling: float = launcher.flag(
        0.0, "Digits grow or shrink by up to this part.", minimum=0.0, only=_DIGIT
    )
    augment_rotation: float = launcher.flag(
        10.0, "In training, digits turn by up to so many degrees more.", minimum=0.0, only=_DIGIT
    )
    augment_scaling: float = launcher.flag(
        0.1, "In training, digits grow or shrink by up to this part more.", minimum=0.0, only=_DIGIT
    )

    def __post_init__(self):
        super().__post_init__()
        if self.task == "digit" and self.num_patches and self.digit_size < self.patch_size:
            raise ValueError(
                f"--patch_size must be at most --digit_size={self.digit_size}, "
                f"got {self.patch_size}"
            )
        if self.scaling + self.augment_scaling >= 1:
            raise ValueError("--scaling and --augment_scaling must stay below 1 together")

    @property
    def size(self) -> Size:
        """Of the canvases to learn on."""
        return Size(self.canvas, self.num_patches)


def load(config: Config) -> data.Dataset:
    """The digits of the config, of its size.

    Raises:
      DataError: they cannot be read.
      FlagError: they are too large for the memory.
    """
    dataset = data.load(config.dataset, config.data_dir)
    examples = sum(len(split.labels) for split in (dataset.train, dataset.validation, dataset.test))
    channels = dataset.train.images.shape[-1]
    devices.check_fits("the digits", 16 * examples * config.digit_size**2 * channels)
    largest = max(_PIXELS_AT_ONCE, config.canvas**2)
    devices.check_fits("the canvases", 16 * largest * channels)
    splits = (dataset.train, dataset.validation, dataset.test)
    return data.Dataset(*(_resize(split, config.digit_size) for split in splits))


def draw(
    config: Config,
    key: jax.Array,
    split: data.Split,
    chosen: jax.Array,
    *,
    size: Size | None = None,
    augment: bool = False,
) -> jax.Array:
    """Draws canvases [B, H, W, C] for the digits `chosen` int32 [B] of a split.

    Args:
      config: of the task.
      key: a PRNG key; the same key, the same canvases.
      split: of `load`.
      chosen: which digits.
      size: of the canvases; that of the config where None.
      augment: turns and scales digits more, as in training.
    """
    canvas, num_patches = size or config.size
    return clutter(
        key,
        split.images,
        chosen,
        canvas=canvas,
        num_patches=num_patches,
        patch_size=config.patch_size,
        rotation=config.rotation + augment * config.augment_rotation,
        scaling=config.scaling + augment * config.augment_scaling,
    )


@evaluation.compiled
def predict(model: nnx.Module, images: jax.Array):
    """What a model returns of images, in evaluation."""
    return evaluation.deterministic(model)(images)


@evaluation.compiled
def _count_errors(model, key, split, chosen, *, config, size):
    logits, _ = predict(model, draw(config, key, split, chosen, size=size))
    return (logits.argmax(-1) != split.labels[chosen]).sum()


def error_rate(
    config: Config,
    model: nnx.Module,
    key: jax.Array,
    split: data.Split,
    *,
    size: Size | None = None,
    at_least: int = MIN_CANVASES,
) -> tuple[float, int]:
    """The part of canvases that a model classifies wrongly, and how many there are.

    Args:
      config: of the task.
      model: returns logits first.
      key: a PRNG key.
      split: digits, each of which is placed equally often.
      size: of the canvases; that of the config where None.
      at_least: so many canvases are drawn.
    """
    size = size or config.size
    repeats = math.ceil(at_least / len(split.labels))
    chosen = np.tile(np.arange(len(split.labels), dtype=np.int32), repeats)
    at_once = min(1000, max(1, _PIXELS_AT_ONCE // size.canvas**2))
    parts = np.array_split(chosen, math.ceil(len(chosen) / at_once))
    split = jax.device_put(split)
    count = functools.partial(_count_errors, config=config, size=size)
    errors = sum(
        int(count(model, jax.random.fold_in(key, i), split, part)) for i, part in enumerate(parts)
    )
    return errors / len(chosen), len(chosen)


def _resize(split: data.Split, size: int) -> data.Split:
    shape = (len(split.labels), size, size, split.images.shape[-1])
    if split.images.shape != shape:
        images = jax.image.resize(split.images, shape, "cubic")
        split = split._replace(images=np.clip(np.asarray(images), 0, 1))
    return split
