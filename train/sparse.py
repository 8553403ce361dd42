"""Learns to classify digits with few weights, and which ones.

A fully connected network whose layers have `--density` of a dense one's weights, and its rivals:

  python -m train.sparse
  python -m train.sparse --density=0.05 --seeds=5
  python -m train.sparse --method=rigl
  python -m train.sparse --dataset=mnist --data_dir=mnist --hidden=300,100 --learning_rate=0.001
"""

import dataclasses
import itertools
import pathlib
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure

from hyperlayer_jax import todense
from hyperlayer_jax.nn import SparseLinear, jumps
from train import data, figures, launcher, loop, masks

_NUM_CLASSES = 10
_NUM_EVALUATIONS = 10

Method = Literal["learned", "random", "set", "rigl", "magnitude", "dense"]


@dataclasses.dataclass(frozen=True)
class Config(launcher.Config):
    """How few weights, and how to find them."""

    dataset: Literal["digits", "mnist", "fashion_mnist", "kmnist"] = launcher.flag(
        "digits", "Images to classify; the digits need no download."
    )
    data_dir: str | None = launcher.flag(None, "Folder with the IDX files of the data set.")
    hidden: str = launcher.flag("300", "Widths of the hidden layers, with commas between.")
    density: float = launcher.flag(
        0.01, "Part of a layer's weights that exist: each output has at least one.", above=0
    )
    method: Method = launcher.flag(
        "learned", "Who decides which: jumps of this library, chance, or a rival (train/masks.py)."
    )
    seeds: int = launcher.flag(1, "Runs, each with a seed of its own from --seed on.", minimum=1)
    steps: int = launcher.flag(2000, "Number of updates of a run.", minimum=1)
    batch_size: int = launcher.flag(64, "Images per update.", minimum=1)
    learning_rate: float = launcher.flag(0.01, "Highest step size; decays to 0.", above=0)
    every: int = launcher.flag(50, "Steps between changes of what exists.", minimum=1)
    fraction: float = launcher.flag(0.3, "Part of the weights that moves at first.", above=0)
    until: float = launcher.flag(0.75, "Part of the steps after which nothing moves.", above=0)

    def __post_init__(self):
        super().__post_init__()
        for name in ("density", "fraction", "until"):
            if getattr(self, name) > 1:
                raise ValueError(f"--{name} must be at most 1, got {getattr(self, name)}")
        if not all(width.isdecimal() and int(width) for width in self.hidden.split(",")):
            raise ValueError(f"--hidden must be widths like 300,100, got {self.hidden!r}")


class Classifier(nnx.Module):
    """Sparse linear layers with ReLUs between them, or dense layers that start with their weights.

    Attributes:
      counts: how many weights each layer has.
    """

    def __init__(self, config: Config, num_pixels: int, *, rngs: nnx.Rngs):
        widths = [num_pixels, *map(int, config.hidden.split(",")), _NUM_CLASSES]
        self.layers, self.counts = nnx.List([]), []
        for inputs, outputs in itertools.pairwise(widths):
            dense = config.method in ("dense", "magnitude")
            each = inputs if dense else max(1, round(config.density * inputs))
            layer = SparseLinear(inputs, outputs, each * outputs, use_bias=True, rngs=rngs)
            self.counts.append(max(1, round(config.density * inputs)) * outputs)
            if config.method not in ("learned", "random"):
                kernel = weights(layer)
                layer = nnx.Linear(inputs, outputs, rngs=rngs)
                layer.kernel[...] = kernel
            self.layers.append(layer)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images [b, h, w, 1] to logits [b, 10]."""
        x = x.reshape(x.shape[0], -1)
        *hidden, last = self.layers
        for layer in hidden:
            x = nnx.relu(layer(x))
        return last(x)


def weights(layer: SparseLinear | nnx.Linear) -> jax.Array:
    """The matrix [inputs, outputs] of a layer."""
    if isinstance(layer, nnx.Linear):
        return layer.kernel[...]
    layer = nnx.view(layer.layer, deterministic=True)
    return todense(layer.tensor(layer.hypernetwork(), 0, jnp.float32)).T


def make_optimizer(config: Config, model: Classifier, seed: int) -> optax.GradientTransformation:
    """Adam, and who decides which weights exist."""
    optimizer = optax.adam(optax.cosine_decay_schedule(config.learning_rate, config.steps))
    options = {
        "every": config.every,
        "fraction": config.fraction,
        "until": max(1, int(config.until * config.steps)),
    }
    key = jax.random.key(seed)
    match config.method:
        case "learned":
            return jumps(key, model, optimizer, **options)
        case "random" | "dense":
            return optimizer
        case method:
            shapes = (layer.kernel.shape for layer in model.layers)
            counts = dict(zip(shapes, model.counts, strict=True))
            return masks.masked(key, optimizer, method, counts, **options)


@nnx.jit
def accuracy(model: Classifier, images: jax.Array, labels: jax.Array) -> jax.Array:
    """The part of the images that a model tells right."""
    return (model(images).argmax(-1) == labels).mean()


def train(
    config: Config, dataset: data.Dataset, seed: int, workdir: pathlib.Path
) -> tuple[Classifier, dict[str, Any]]:
    """Trains a classifier; returns it as it is evaluated, and its figures."""
    num_pixels = dataset.train.images[0].size
    model = Classifier(config, num_pixels, rngs=nnx.Rngs(seed))

    def loss_fn(model, key, step, split):
        del step
        batch = jax.random.randint(key, (config.batch_size,), 0, len(split.labels))
        logits = model(split.images[batch])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, split.labels[batch])
        return losses.mean(), {}

    def evaluate(model, step):
        del step
        model = nnx.view(model, deterministic=True, raise_if_not_found=False)
        return {"validation_accuracy": float(accuracy(model, *dataset.validation))}

    model, run = loop.train(
        model,
        make_optimizer(config, model, seed),
        loss_fn,
        dataset.train,
        key=jax.random.key(seed),
        steps=config.steps,
        workdir=workdir,
        evaluate=evaluate,
        evaluate_every=max(1, config.steps // _NUM_EVALUATIONS),
    )
    run |= evaluate(model, config.steps)
    return nnx.view(model, deterministic=True, raise_if_not_found=False), run


def draw_weights(model: Classifier, dataset: data.Dataset, path: pathlib.Path) -> None:
    """Draws how many weights of the first layer look at each pixel, beside the mean image."""
    shape = dataset.train.images.shape[1:3]
    counts = np.count_nonzero(weights(model.layers[0]), -1).reshape(shape)
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    pictures = {"mean image": dataset.train.images.mean(0)[..., 0], "weights at each pixel": counts}
    for axes, (title, picture) in zip(figure.subplots(1, 2), pictures.items(), strict=True):
        figure.colorbar(axes.imshow(picture), ax=axes)
        axes.set(title=title, xticks=[], yticks=[])
    figures.save_png(figure, path)


def train_and_evaluate(config: Config, workdir: pathlib.Path) -> dict[str, Any]:
    """Trains one classifier for each seed, writes `weights.png` of the first; returns figures."""
    dataset = data.load(config.dataset, config.data_dir)
    results = []
    for seed in range(config.seed, config.seed + config.seeds):
        folder = workdir / f"seed{seed}" if config.seeds > 1 else workdir
        model, run = train(config, dataset, seed, folder)
        if not results:
            draw_weights(model, dataset, workdir / "weights.png")
        matrices = [np.asarray(weights(layer)) for layer in model.layers]
        run["density"] = sum(map(np.count_nonzero, matrices)) / sum(m.size for m in matrices)
        run["accuracy"] = float(accuracy(model, *dataset.test))
        print(f"seed {seed}: accuracy {run['accuracy']:.4f} with density {run['density']:.4f}")
        results.append(run)
    print(f"picture: {workdir / 'weights.png'}")
    means = {name: float(np.mean([run[name] for run in results])) for name in results[0]}
    return {
        **means,
        "steps": config.steps,
        "accuracies": [run["accuracy"] for run in results],
        "test_examples": len(dataset.test.labels),
    }


if __name__ == "__main__":
    launcher.launch(Config, train_and_evaluate)
