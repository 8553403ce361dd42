"""Learns to classify digits on cluttered canvases from a few small glimpses of them.

A small network sees the canvas averaged to a coarse image and decides where to look; a classifier
sees only the glimpses, read at full resolution.

python -m train.glimpse
python -m train.glimpse --model=conv
python -m train.glimpse --dataset=mnist --data_dir=mnist --digit_size=28 --canvas=60 --num_patches=4
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
from train import data, devices, figures, launcher, loop, runs
from train.clutter import clutter
from train.layers import Convolutions, Mlp

_NUM_CLASSES = 10
_NUM_EVALUATIONS = 20
# Every digit that is held out is placed several times, on at least so many canvases altogether.
_MIN_CANVASES = 5000
_CANVASES_AT_ONCE = 1000
_NUM_SHOWN = 5
# Models with glimpses at all, and those that sample points.
_GLIMPSING = ("box", "quad", "affine", "stn", "reinforce")
_SAMPLED = ("box", "quad", "affine")
_DRAWN = ("patches", "means", "sigmas")


@dataclasses.dataclass(frozen=True)
class Config(launcher.Config):
    """What to look at, with what, and for how long."""

    model: Literal["box", "quad", "affine", "stn", "reinforce", "conv"] = launcher.flag(
        "box", "Shape of the glimpses, or the rival to train instead."
    )
    head: Literal["mlp", "conv"] = launcher.flag(
        "mlp", "Classifier of the glimpses.", only={"model": _GLIMPSING}
    )
    hidden: int = launcher.flag(256, "Width of the dense layers.", minimum=1, below=2**16)
    glimpses: int = launcher.flag(
        2, "Number of glimpses.", minimum=1, below=2**10, only={"model": _GLIMPSING}
    )
    glimpse_size: int = launcher.flag(12, "Rows and columns of a glimpse.", minimum=1, below=2**12)
    num_global: int = launcher.flag(
        0,
        "Points per pixel drawn from all of the canvas.",
        minimum=0,
        below=2**16,
        only={"model": _SAMPLED},
    )
    num_local: int = launcher.flag(
        0,
        "Points per pixel drawn from its region.",
        minimum=0,
        below=2**16,
        only={"model": _SAMPLED},
    )
    region: int = launcher.flag(
        5, "Rows and columns of the region.", minimum=1, only={"model": _SAMPLED}
    )
    sigma_scale: float = launcher.flag(
        0.03, "First sigma, in canvases, over log 2.", above=0, only={"model": _SAMPLED}
    )
    min_sigma: float = launcher.flag(
        0.0, "Smallest sigma, in pixels.", minimum=0.0, only={"model": _SAMPLED}
    )
    coarseness: int = launcher.flag(2, "Pixels averaged along each axis to decide.", minimum=1)
    dataset: data.Name = launcher.flag("digits", "Images to classify.")
    data_dir: str | None = launcher.flag(
        None, "Folder of a data set that is not bundled.", only={"dataset": data.WITH_FOLDER},
        fixed=False,
    )  # fmt: skip
    digit_size: int = launcher.flag(
        14, "Rows and columns that digits are resized to.", minimum=1, below=2**12
    )
    canvas: int = launcher.flag(32, "Rows and columns of a canvas.", minimum=1, below=2**13)
    num_patches: int = launcher.flag(
        3, "Pieces of other digits on a canvas.", minimum=0, below=2**12
    )
    patch_size: int = launcher.flag(6, "Rows and columns of a piece.", minimum=1)
    rotation: float = launcher.flag(0.0, "Digits turn by up to so many degrees.", minimum=0.0)
    scaling: float = launcher.flag(0.0, "Digits grow or shrink by up to this part.", minimum=0.0)
    augment: float = launcher.flag(
        0.1, "More scaling, and a hundred times it more rotation, of training digits.", minimum=0.0
    )
    steps: int = launcher.flag(18000, "Number of updates.", minimum=1)
    batch_size: int = launcher.flag(64, "Canvases in an update.", minimum=1, below=2**20)
    learning_rate: float = launcher.flag(1e-3, "Largest size of a step.", above=0)
    average: float = launcher.flag(
        0.999, "Decay of the mean of the parameters.", minimum=0.0, below=1
    )

    def __post_init__(self):
        super().__post_init__()
        if self.canvas % self.coarseness:
            raise ValueError(
                f"--coarseness must divide --canvas={self.canvas}, got {self.coarseness}"
            )
        if self.canvas < self.digit_size:
            raise ValueError(
                f"--canvas must be at least --digit_size={self.digit_size}, got {self.canvas}"
            )
        if self.num_patches and self.digit_size < self.patch_size:
            raise ValueError(
                f"--patch_size must be at most --digit_size={self.digit_size}, "
                f"got {self.patch_size}"
            )
        if self.scaling + self.augment >= 1:
            raise ValueError("--scaling and --augment must stay below 1 together")


def _make_head(config: Config, size: int, channels: list[int], count: int, rngs: nnx.Rngs):
    """Convolutions on `count` images of size x size, and dense layers on what comes out of all."""
    for _ in channels[1:]:
        size = math.ceil(size / 2)
    features = count * size**2 * channels[-1]
    dense = Mlp([features, 2 * config.hidden, config.hidden, _NUM_CLASSES], rngs)
    return Convolutions(channels, rngs), dense


class GlimpseClassifier(nnx.Module):
    """Decides by a coarse image, reads at full resolution, and classifies what it read."""

    def __init__(self, config: Config, channels: int, rngs: nnx.Rngs):
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
                    num_global=config.num_global,
                    num_local=config.num_local,
                    region=config.region,
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
        b, h, w, c = images.shape
        f = self.coarseness
        return nnx.relu(self.locator(images.reshape(b, h // f, f, w // f, f, c).mean((2, 4))))

    def classify(self, patches: jax.Array) -> jax.Array:
        """Logits [B, 10] of patches [B, g, k, k, C]."""
        seen = self.convolutions(patches.reshape(-1, *patches.shape[2:]))
        return self.dense(seen.reshape(len(patches), -1))


class ConvClassifier(nnx.Module):
    """Convolutions over the whole canvas, at full resolution."""

    def __init__(self, config: Config, channels: int, rngs: nnx.Rngs):
        widths = [channels, 16, 32, 64]
        self.convolutions, self.dense = _make_head(config, config.canvas, widths, 1, rngs)

    def __call__(self, images: jax.Array) -> tuple[jax.Array, None]:
        """Maps images [B, H, W, C] to logits [B, 10]."""
        return self.dense(self.convolutions(images)), None


def make_model(config: Config, channels: int) -> nnx.Module:
    """The model of the config for images of so many channels; it returns logits and `Glimpses`."""
    kind = ConvClassifier if config.model == "conv" else GlimpseClassifier
    return kind(config, channels, nnx.Rngs(config.seed))


def draw_canvases(
    config: Config, key: jax.Array, split: data.Split, chosen: jax.Array, augment: float = 0.0
) -> jax.Array:
    """Draws the task's canvases [B, H, W, C] for the digits `chosen` int32 [B] of a split."""
    return clutter(
        key,
        split.images,
        chosen,
        canvas=config.canvas,
        num_patches=config.num_patches,
        patch_size=config.patch_size,
        rotation=config.rotation + 100 * augment,
        scaling=config.scaling + augment,
    )


def loss_fn(config: Config, model: nnx.Module, key: jax.Array, step: jax.Array, split: data.Split):
    """Cross-entropy on fresh canvases, and what REINFORCE needs besides."""
    del step
    digit_key, canvas_key = jax.random.split(key)
    chosen = jax.random.randint(digit_key, (config.batch_size,), 0, len(split.labels))
    images = draw_canvases(config, canvas_key, split, chosen, config.augment)
    logits, glimpses = model(devices.shard(images))
    labels = split.labels[chosen]
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    right = (logits.argmax(-1) == labels).astype(jnp.float32)
    if config.model == "reinforce":
        loss += reinforce_loss(glimpses, right)
    return loss, {"error": 1 - right.mean()}


@functools.partial(jax.jit, static_argnums=0)
def _predict(graphdef, state, images):
    model = nnx.view(nnx.merge(graphdef, state), deterministic=True, raise_if_not_found=False)
    return model(images)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _count_errors(config, graphdef, state, key, split, chosen):
    logits, _ = _predict(graphdef, state, draw_canvases(config, key, split, chosen))
    return (logits.argmax(-1) != split.labels[chosen]).sum()


def error_rate(
    config: Config, model: nnx.Module, key: jax.Array, split: data.Split
) -> tuple[float, int]:
    """The part of canvases that are classified wrongly, and how many there are."""
    repeats = math.ceil(_MIN_CANVASES / len(split.labels))
    chosen = np.tile(np.arange(len(split.labels), dtype=np.int32), repeats)
    parts = np.array_split(chosen, math.ceil(len(chosen) / _CANVASES_AT_ONCE))
    graphdef, state = nnx.split(model)
    split = jax.device_put(split)
    errors = sum(
        int(_count_errors(config, graphdef, state, jax.random.fold_in(key, i), split, part))
        for i, part in enumerate(parts)
    )
    return errors / len(chosen), len(chosen)


def draw_glimpses(figure: Figure, images: np.ndarray, glimpses: Glimpses, title: str) -> None:
    """Draws a row for each image: on it the points and sigmas, and beside it the patches.

    A glimpse has one colour. Its ellipse spans a sigma around the centre.
    """
    figure.clear()
    figure.suptitle(title)
    count = glimpses.patches.shape[1]
    axes = figure.subplots(len(images), 1 + count, squeeze=False)
    for row, image, patches, means, sigmas in zip(
        axes, images, glimpses.patches, glimpses.means, glimpses.sigmas, strict=True
    ):
        for ax, pixels in zip(row, [image, *patches], strict=True):
            ax.imshow(pixels, cmap="gray", vmin=0, vmax=1)
            ax.set(xticks=[], yticks=[])
        for g in range(count):
            points, colour = means[g].reshape(-1, 2), f"C{g}"
            row[0].scatter(points[:, 1], points[:, 0], s=1, color=colour)
            size = 2 * sigmas[g][::-1]
            row[0].add_patch(Ellipse(points.mean(0)[::-1], *size, fill=False, color=colour))
            row[1 + g].spines[:].set(color=colour, linewidth=2)


def train_and_evaluate(config: Config, workdir: pathlib.Path) -> dict[str, Any]:
    """Trains on the training split and tests once, at the end; draws what the model looks at."""
    dataset = data.load(config.dataset, config.data_dir)
    channels = dataset.train.images.shape[-1]
    examples = sum(len(split.labels) for split in (dataset.train, dataset.validation, dataset.test))
    devices.check_fits("the digits", 16 * examples * config.digit_size**2 * channels)
    devices.check_fits("the canvases", 16 * _CANVASES_AT_ONCE * config.canvas**2 * channels)
    train, validation, test = (
        _resize(split, config.digit_size)
        for split in (dataset.train, dataset.validation, dataset.test)
    )
    key, validation_key, shown_key, test_key = jax.random.split(jax.random.key(config.seed), 4)
    evaluate_every = math.ceil(config.steps / _NUM_EVALUATIONS)

    @functools.cache
    def shown():
        chosen = np.arange(min(_NUM_SHOWN, len(validation.labels)), dtype=np.int32)
        return draw_canvases(config, shown_key, validation, chosen)

    def evaluate(model, step):
        del step
        _, glimpses = _predict(*nnx.split(model), shown())
        arrays = {} if glimpses is None else {name: getattr(glimpses, name) for name in _DRAWN}
        error, _ = error_rate(config, model, validation_key, validation)
        return {"validation_error": error, **arrays}

    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, min(500, config.steps // 10), config.steps
    )
    trained = loop.train(
        loop.build(make_model, config, channels),
        optax.adam(schedule),
        functools.partial(loss_fn, config),
        train,
        config=config,
        key=key,
        steps=config.steps,
        workdir=workdir,
        inputs=(channels,),
        batch_size=config.batch_size,
        average=config.average,
        evaluate=evaluate,
        evaluate_every=evaluate_every,
        best=lambda validation: -validation["validation_error"],
    )
    error, count = error_rate(config, trained.model, test_key, test)
    print(f"error on {count} canvases of test images: {error:.4f}")

    def draw():
        if config.model != "conv":
            draw_history(config, trained.history, shown(), workdir)

    return runs.report(workdir, {"error": error, **trained.figures, "test_examples": count}, draw)


def draw_history(
    config: Config, history: dict[int, dict[str, Any]], shown: jax.Array, workdir: pathlib.Path
) -> None:
    """Draws glimpses of canvases `shown` by step: three steps as images, and all as `.gif`."""
    figure = Figure(
        figsize=(1.5 * (1 + config.glimpses), 1.5 * len(shown)), dpi=80, layout="constrained"
    )
    steps = sorted(history)

    def draw(step):
        glimpses = Glimpses(*(history[step][name] for name in _DRAWN))
        draw_glimpses(figure, shown, glimpses, f"step {step}")

    for step in {steps[0], steps[len(steps) // 2], steps[-1]}:
        draw(step)
        figures.save_png(figure, workdir / f"glimpses-{step}.png")
    figures.save_gif(figure, draw, steps, workdir / "glimpses.gif", frames_per_second=4)


def _resize(split: data.Split, size: int) -> data.Split:
    shape = (len(split.labels), size, size, split.images.shape[-1])
    if split.images.shape != shape:
        images = jax.image.resize(split.images, shape, "cubic")
        split = split._replace(images=np.clip(np.asarray(images), 0, 1))
    return split


if __name__ == "__main__":
    launcher.launch(Config, train_and_evaluate)
