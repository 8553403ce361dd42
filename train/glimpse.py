"""Learns to classify digits on cluttered canvases from a few small glimpses of them.

A small network sees the canvas averaged to a coarse image and decides where to look; a classifier
sees only the glimpses, read at full resolution.

python -m train.glimpse
python -m train.glimpse --model=conv
python -m train.glimpse --dataset=mnist --data_dir=FOLDER --digit_size=28 --canvas=60 --num_patches=4
"""

import dataclasses
import functools
import math
import pathlib
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse

from hyperlayer_jax.nn import (
    GlimpseAttention,
    Glimpses,
    ReinforceGlimpses,
    SpatialTransformer,
    reinforce_loss,
)
from train import data, figures, launcher, loop
from train.clutter import clutter

_NUM_CLASSES = 10
_EVALUATIONS = 20
# Every digit that is held out is placed several times, on at least so many canvases altogether.
_MIN_CANVASES = 5000
_MAX_CANVASES_AT_ONCE = 1000


@dataclasses.dataclass(frozen=True)
class Config(launcher.Config):
    """What to look at, with what, and for how long."""

    model: Literal["box", "quad", "affine", "stn", "reinforce", "conv"] = launcher.flag(
        "box", "Shape of the glimpses, or the rival to train instead."
    )
    head: Literal["mlp", "conv"] = launcher.flag("mlp", "Classifier of the glimpses.")
    glimpses: int = launcher.flag(2, "Number of glimpses.", minimum=1)
    glimpse_size: int = launcher.flag(12, "Rows and columns of a glimpse.", minimum=1)
    initial_size: float = launcher.flag(0.75, "Part of an axis that a glimpse first covers.")
    num_global: int = launcher.flag(0, "Points per pixel drawn from all of the canvas.", minimum=0)
    num_local: int = launcher.flag(8, "Points per pixel drawn from its region.", minimum=0)
    region: int = launcher.flag(5, "Rows and columns of the region.", minimum=1)
    sigma_scale: float = launcher.flag(0.07, "Sigma in canvases for a softplus of 1.", minimum=0.0)
    min_sigma: float = launcher.flag(0.0, "Smallest sigma, in pixels.", minimum=0.0)
    coarseness: int = launcher.flag(2, "Pixels averaged along an axis to decide.", minimum=1)
    dataset: data.Name = launcher.flag("digits", "Digits, or clothes and other things.")
    data_dir: str | None = launcher.flag(None, "Folder of a data set that does not come with it.")
    digit_size: int = launcher.flag(14, "Rows and columns that digits are resized to.", minimum=1)
    canvas: int = launcher.flag(32, "Rows and columns of a canvas.", minimum=1)
    num_patches: int = launcher.flag(3, "Pieces of other digits on a canvas.", minimum=0)
    patch_size: int = launcher.flag(6, "Rows and columns of a piece.", minimum=1)
    rotation: float = launcher.flag(0.0, "Digits are rotated by up to so many degrees.", minimum=0)
    scaling: float = launcher.flag(0.0, "Digits are scaled by up to this factor.", minimum=0.0)
    augment: float = launcher.flag(0.0, "Like 100 x scaling and rotation", minimum=0.0)
    hidden: int = launcher.flag(256, "", minimum=0)
    steps: int = launcher.flag(6000, "Number of updates.", minimum=1)
    batch_size: int = launcher.flag(64, "Canvases in an update.", minimum=1)
    learning_rate: float = launcher.flag(1e-3, "Largest size of a step.", minimum=0.0)
    average: float = launcher.flag(0.999, "Decay of the mean of parameters.", minimum=0.0)

    def __post_init__(self):
        super().__post_init__()
        if self.canvas % self.coarseness:
            raise ValueError(
                f"--coarseness must divide --canvas={self.canvas}, got {self.coarseness}"
            )


class _Mlp(nnx.Module):
    """Dense layers with a ReLU after each but the last, on everything behind the batch axis."""

    def __init__(self, sizes, rngs):
        self.layers = nnx.List([nnx.Linear(*pair, rngs=rngs) for pair in zip(sizes, sizes[1:])])

    def __call__(self, x):
        *hidden, last = self.layers
        x = x.reshape(len(x), -1)
        for layer in hidden:
            x = nnx.relu(layer(x))
        return last(x)


class _Conv(nnx.Module):
    """Blocks of a 3 x 3 convolution, a ReLU and a maximum over 2 x 2: images to features."""

    def __init__(self, channels, rngs):
        self.layers = nnx.List(
            [nnx.Conv(*pair, (3, 3), rngs=rngs) for pair in zip(channels, channels[1:])]
        )

    def __call__(self, x):
        for layer in self.layers:
            x = nnx.max_pool(nnx.relu(layer(x)), (2, 2), (2, 2), padding="SAME")
        return x


class GlimpseClassifier(nnx.Module):
    """Decides by a coarse image, reads at full resolution, and classifies what it read."""

    def __init__(self, config: Config, channels: int, rngs: nnx.Rngs):
        self.coarseness = config.coarseness
        coarse = config.canvas // config.coarseness
        self.locator = _Mlp([coarse**2 * channels, config.hidden, config.hidden], rngs)
        size = (config.glimpse_size,) * 2
        arguments = (config.hidden, size, config.glimpses)
        match config.model:
            case "stn":
                self.attention = SpatialTransformer(
                    *arguments, initial_size=config.initial_size, rngs=rngs
                )
            case "reinforce":
                self.attention = ReinforceGlimpses(*arguments, rngs=rngs)
            case shape:
                self.attention = GlimpseAttention(
                    *arguments,
                    shape=shape,
                    initial_size=config.initial_size,
                    sigma_scale=config.sigma_scale,
                    min_sigma=config.min_sigma,
                    num_global=config.num_global,
                    num_local=config.num_local,
                    region=config.region,
                    rngs=rngs,
                )
        features = config.glimpses * math.prod(size) * channels
        self.head = _Mlp([features, 2 * config.hidden, config.hidden, _NUM_CLASSES], rngs)

    def __call__(self, images: jax.Array) -> tuple[jax.Array, Glimpses]:
        f = self.coarseness
        b, h, w, c = images.shape
        coarse = images.reshape(b, h // f, f, w // f, f, c).mean((2, 4))
        glimpses = self.attention(images, nnx.relu(self.locator(coarse)))
        return self.head(glimpses.patches), glimpses


class ConvClassifier(nnx.Module):
    """Convolutions over the whole canvas at full resolution."""

    def __init__(self, config: Config, channels: int, rngs: nnx.Rngs):
        widths = [channels, 16, 32, 64]
        self.body = _Conv(widths, rngs)
        size = config.canvas
        for _ in widths[1:]:
            size = -(-size // 2)
        self.head = _Mlp([size**2 * 64, 256, _NUM_CLASSES], rngs)

    def __call__(self, images: jax.Array) -> tuple[jax.Array, None]:
        return self.head(self.body(images)), None


def loss_fn(config: Config, model, key: jax.Array, step: jax.Array, split: data.Split):
    del step
    digit_key, canvas_key = jax.random.split(key)
    chosen = jax.random.randint(digit_key, (config.batch_size,), 0, len(split.labels))
    images, labels = _canvases(config, canvas_key, split, chosen, config.augment)
    logits, glimpses = model(images)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    right = logits.argmax(-1) == labels
    if config.model == "reinforce":
        loss += reinforce_loss(glimpses, right.astype(jnp.float32))
    return loss, {"error": 1 - right.mean()}


def _canvases(config, key, split, chosen, augment=0.0):
    images = clutter(
        key,
        split.images,
        chosen,
        canvas=config.canvas,
        num_patches=config.num_patches,
        patch_size=config.patch_size,
        rotation=config.rotation + 100 * augment,
        scaling=config.scaling + augment,
    )
    return images, split.labels[chosen]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _num_errors(config, graphdef, state, key, split, chosen):
    images, labels = _canvases(config, key, split, chosen)
    logits, _ = nnx.view(nnx.merge(graphdef, state), deterministic=True)(images)
    return (logits.argmax(-1) != labels).sum()


def error_rate(config, model, key, split):
    n = len(split.labels)
    repeats = math.ceil(_MIN_CANVASES / n)
    chosen = np.tile(np.arange(n, dtype=np.int32), repeats)
    split = jax.device_put(split)
    errors = 0
    for i, part in enumerate(np.array_split(chosen, math.ceil(len(chosen) / _MAX_CANVASES_AT_ONCE))):
        errors += int(_num_errors(config, *nnx.split(model), jax.random.fold_in(key, i), split, part))
    return errors / len(chosen), len(chosen)


def train_and_evaluate(config: Config, workdir: pathlib.Path) -> dict[str, Any]:
    dataset = data.load(config.dataset, config.data_dir)
    dataset = data.Dataset(*(resize(getattr(dataset, n), config.digit_size) for n in ('train', 'validation', 'test')))
    channels = dataset.train.images.shape[-1]
    kind = ConvClassifier if config.model == "conv" else GlimpseClassifier
    model = kind(config, channels, nnx.Rngs(config.seed))
    key, validation_key, test_key = jax.random.split(jax.random.key(config.seed), 3)

    def evaluate(model, step):
        return {"validation_error": error_rate(config, model, validation_key, dataset.validation)[0]}

    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, min(500, config.steps // 10), config.steps
    )
    model, figs = loop.train(
        model, optax.adam(schedule), functools.partial(loss_fn, config), dataset.train,
        key=key, steps=config.steps, workdir=workdir, average=config.average,
        evaluate=evaluate, evaluate_every=max(1, config.steps // _EVALUATIONS), log_every=200,
    )
    error, n = error_rate(config, model, test_key, dataset.test)
    return {"error": error, **figs, "test_examples": n}


def resize(split, size):
    images = split.images
    if images.shape[1:3] != (size, size):
        shape = (len(images), size, size, images.shape[-1])
        images = np.clip(np.asarray(jax.image.resize(images, shape, "cubic")), 0, 1)
    return data.Split(images, split.labels)


if __name__ == "__main__":
    launcher.launch(Config, train_and_evaluate)
