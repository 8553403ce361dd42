"""Learns to classify digits with few weights, and which ones.

A fully connected network whose layers have `--density` of a dense one's weights, and baselines:

  python -m train.sparse
  python -m train.sparse --density=0.05 --seeds=5
  python -m train.sparse --method=rigl
  python -m train.sparse --dataset=mnist --data_dir=mnist --hidden=300,100 --learning_rate=0.001
"""

import dataclasses
import functools
import itertools
import math
import pathlib
from typing import Any, ClassVar, Literal

import jax
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure

from hyperlayer_jax import todense
from hyperlayer_jax.nn import SparseLinear, jumps
from hyperlayer_jax.nn.jumping import is_look
from train import data, devices, evaluation, figures, launcher, loop, masks, runs

_NUM_CLASSES = 10
_NUM_EVALUATIONS = 10

Distribution = Literal["uniform", "erdos_renyi"]
Method = Literal["learned", "random", "set", "rigl", "magnitude", "dense"]
_SPARSE = ("learned", "random", "set", "rigl", "magnitude")
_CHANGING = ("learned", "set", "rigl", "magnitude")
_MOVING = ("learned", "set", "rigl")


@dataclasses.dataclass(frozen=True)
class Config(launcher.Config):
    """How few weights, and how to find them."""

    kernels_only: ClassVar[dict[str, Any]] = {"method": ("learned", "random")}

    dataset: data.Name = launcher.flag("digits", "Images to classify; the digits need no download.")
    data_dir: str | None = launcher.flag(
        None, "Folder of a data set that is not bundled.", only={"dataset": data.WITH_FOLDER},
        fixed=False,
    )  # fmt: skip
    hidden: str = launcher.flag("300", "Widths of the hidden layers, with commas between.")
    density: float = launcher.flag(
        0.01,
        "Part of a layer's weights that exist: each output has at least one.",
        above=0,
        only={"method": _SPARSE},
    )
    distribution: Distribution = launcher.flag(
        "uniform",
        "The same density for every layer, or more for one of few inputs and outputs "
        "(Mocanu et al., arXiv 1707.04780).",
        only={"method": _SPARSE},
    )
    method: Method = launcher.flag(
        "learned",
        "Who decides which: jumps of this library, chance, or a baseline (train/masks.py).",
    )
    seeds: int = launcher.flag(
        1,
        "Runs, with seeds from --seed on; all but the first are in folders WORKDIR/seedN.",
        minimum=1,
        fixed=False,
    )
    steps: int = launcher.flag(2000, "Number of updates of a run.", minimum=1)
    batch_size: int = launcher.flag(64, "Images per update.", minimum=1, below=2**20)
    learning_rate: float = launcher.flag(0.01, "Highest step size; decays to 0.", above=0)
    every: int = launcher.flag(
        50, "Steps between changes of what exists.", minimum=1, only={"method": _CHANGING}
    )
    fraction: float = launcher.flag(
        0.3, "Part of the weights that moves at first.", above=0, only={"method": _MOVING}
    )
    until: float = launcher.flag(
        0.75, "Part of the steps after which nothing moves.", above=0, only={"method": _CHANGING}
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("density", "fraction", "until"):
            if getattr(self, name) > 1:
                raise ValueError(f"--{name} must be at most 1, got {getattr(self, name)}")
        if self.method == "learned" and self.every == 1:
            raise ValueError("--every must be at least 2 with --method=learned, got 1")
        if not all(width.isdecimal() and int(width) for width in self.hidden.split(",")):
            raise ValueError(f"--hidden must be widths like 300,100, got {self.hidden!r}")
        if self.seed + self.seeds > 2**32:
            raise ValueError(
                f"--seeds must end below {2**32}, got {self.seeds} from {self.seed} on"
            )

    def widths(self, num_pixels: int) -> list[int]:
        """How many numbers come into each layer, and out of the last."""
        return [num_pixels, *map(int, self.hidden.split(",")), _NUM_CLASSES]

    def num_weights(self, num_pixels: int) -> list[int]:
        """How many weights each output of a layer has in the end, one at least."""
        inputs, outputs = np.array(list(itertools.pairwise(self.widths(num_pixels)))).T
        sizes = inputs * outputs
        densities = np.full(len(sizes), self.density)
        if self.distribution == "erdos_renyi":
            # In proportion to this, as far as layers are not full.
            shares = (inputs + outputs) / sizes
            full = np.zeros(len(sizes), bool)
            while not full.all():
                left = self.density * sizes.sum() - sizes[full].sum()
                densities = np.where(full, 1, left / (shares * sizes)[~full].sum() * shares)
                if (densities <= 1).all():
                    break
                full |= densities > 1
        return [max(1, round(x)) for x in densities * inputs]


class Classifier(nnx.Module):
    """Sparse linear layers with ReLUs between them, or dense layers that start with their weights.

    Attributes:
      counts: how many weights each layer has.
    """

    def __init__(self, config: Config, num_pixels: int, *, rngs: nnx.Rngs):
        self.layers, self.counts = nnx.List([]), ()
        pairs, num_weights = (
            itertools.pairwise(config.widths(num_pixels)),
            config.num_weights(num_pixels),
        )
        for (inputs, outputs), each in zip(pairs, num_weights, strict=True):
            layer = SparseLinear(
                inputs,
                outputs,
                inputs if config.method in ("dense", "magnitude") else each,
                use_bias=True,
                implementation=config.implementation,
                rngs=rngs,
            )
            self.counts += (each * outputs,)
            if config.method not in ("learned", "random"):
                kernel = weights(layer)
                layer = nnx.Linear(inputs, outputs, rngs=rngs)
                layer.kernel[...] = kernel
            self.layers.append(layer)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images [b, h, w, c] to logits [b, 10]."""
        x = x.reshape(x.shape[0], -1)
        *hidden, last = self.layers
        for layer in hidden:
            x = nnx.relu(layer(x))
        return last(x)


def make_model(config: Config, num_pixels: int) -> Classifier:
    """Makes the classifier that a config describes, of images of so many numbers."""
    return Classifier(config, num_pixels, rngs=nnx.Rngs(config.seed))


def weights(layer: SparseLinear | nnx.Linear) -> jax.Array:
    """The matrix [inputs, outputs] of a layer."""
    if isinstance(layer, nnx.Linear):
        return layer.kernel[...]
    return todense(layer.weight()).T


def make_optimizer(config: Config, model: Classifier) -> optax.GradientTransformation:
    """Adam, and who decides which weights exist."""
    optimizer = optax.adam(optax.cosine_decay_schedule(config.learning_rate, config.steps))
    options = {"every": config.every, "fraction": config.fraction, "until": last_change(config)}
    key = jax.random.key(config.seed)
    match config.method:
        case "learned":
            return jumps(key, model, optimizer, **options)
        case "random" | "dense":
            return optimizer
        case method:
            shapes = (layer.kernel.shape for layer in model.layers)
            counts = dict(zip(shapes, model.counts, strict=True))
            return masks.masked(key, optimizer, method, counts, **options)


def last_change(config: Config) -> int:
    """The step after which no weights come or go."""
    return max(1, int(config.until * config.steps))


def is_settled(config: Config, step: int) -> bool:
    """Whether all weights that exist have their values after a step: not in a look of `jumps`."""
    looks = is_look(step, until=last_change(config), every=config.every)
    return config.method != "learned" or not looks


@evaluation.compiled
def accuracy(model: Classifier, images: jax.Array, labels: jax.Array) -> jax.Array:
    """The part of the images that a model tells right."""
    return (model(images).argmax(-1) == labels).mean()


def train(
    config: Config, dataset: data.Dataset, workdir: pathlib.Path
) -> tuple[Classifier, dict[str, Any]]:
    """Trains the classifier of one seed; returns it as it is evaluated, and its figures."""
    num_pixels = dataset.train.images[0].size
    model = loop.build(make_model, config, num_pixels)

    def loss_fn(model, key, split):
        batch = jax.random.randint(key, (config.batch_size,), 0, len(split.labels))
        images, labels = devices.shard((split.images[batch], split.labels[batch]))
        logits = model(images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), {}

    def evaluate(model, step):
        del step
        model = evaluation.deterministic(model)
        return {"validation_accuracy": float(accuracy(model, *dataset.validation))}

    trained = loop.train(
        model,
        make_optimizer(config, model),
        loss_fn,
        dataset.train,
        config=config,
        key=jax.random.key(config.seed),
        steps=config.steps,
        workdir=workdir,
        inputs=(num_pixels,),
        batch_size=config.batch_size,
        evaluate=evaluate,
        evaluate_every=max(1, config.steps // _NUM_EVALUATIONS),
        best=lambda validation: validation["validation_accuracy"],
        settled=functools.partial(is_settled, config),
    )
    model = evaluation.deterministic(trained.model)
    matrices = [np.asarray(weights(layer)) for layer in model.layers]
    density = sum(map(np.count_nonzero, matrices)) / sum(matrix.size for matrix in matrices)
    result = {"accuracy": float(accuracy(model, *dataset.test)), "density": float(density)}
    result |= trained.figures | evaluate(model, config.steps)
    print(f"seed {config.seed}: accuracy {result['accuracy']:.4f} with density {density:.4f}")
    return model, result | {"test_examples": len(dataset.test.labels)}


def draw_weights(model: Classifier, dataset: data.Dataset, workdir: pathlib.Path) -> None:
    """Draws how many weights of the first layer look at each pixel, beside the mean image."""
    images = dataset.train.images
    counts = np.count_nonzero(weights(model.layers[0]), -1).reshape(images.shape[1:]).sum(-1)
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    pictures = {"mean image": images.mean((0, 3)), "weights at each pixel": counts}
    for axes, (title, picture) in zip(figure.subplots(1, 2), pictures.items(), strict=True):
        figure.colorbar(axes.imshow(picture), ax=axes)
        axes.set(title=title, xticks=[], yticks=[])
    figures.save_png(figure, workdir / "weights.png")


def train_and_evaluate(config: Config, workdir: pathlib.Path) -> dict[str, Any]:
    """Trains a classifier for each seed, writes `weights.png` of each; returns mean figures."""
    dataset = data.load(config.dataset, config.data_dir)
    widths = config.widths(dataset.train.images[0].size)
    most = max(len(dataset.validation.labels), len(dataset.test.labels))
    devices.check_fits("the test examples", 4 * most * sum(widths))
    # All are made, and measured in the end, as matrices.
    devices.check_fits("the layers", 16 * sum(map(math.prod, itertools.pairwise(widths))))
    model, result = train(config, dataset, workdir)
    results = [result]
    for seed in range(config.seed + 1, config.seed + config.seeds):
        folder = workdir / f"seed{seed}"
        own, result = train(dataclasses.replace(config, seed=seed, seeds=1), dataset, folder)
        result["accuracies"] = [result["accuracy"]]
        runs.report(folder, result, functools.partial(draw_weights, own, dataset, folder))
        results.append(result)
    # What is not known before the first step has no mean.
    means = {
        name: float(np.mean([result[name] for result in results]))
        for name in results[0]
        if all(isinstance(result[name], float) for result in results)
    }
    accuracies = [result["accuracy"] for result in results]
    return runs.report(
        workdir,
        results[0] | means | {"accuracies": accuracies},
        lambda: draw_weights(model, dataset, workdir),
    )


if __name__ == "__main__":
    launcher.launch(Config, train_and_evaluate)
