"""Learns to sort images of handwritten numbers, given only examples in the right order.

A network gives every image a score, and a differentiable quicksort sorts the images by it. The
loss compares pixels with those of the sorted images; labels are never seen. The default run takes
about two minutes on two CPU cores, on digits that come with scikit-learn:

  python -m train.sort
  python -m train.sort --size=16
  python -m train.sort --digits=2
  python -m train.sort --test_sizes=5,16,64,256
  python -m train.sort --dataset=mnist --data_dir=DIR_OF_THE_FOUR_IDX_FILES
"""

import dataclasses
import pathlib
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure

from hyperlayer_jax import SoftSort, bucket_starts, contract, kernels
from hyperlayer_jax.nn import SoftQuicksort
from train import augment, data, devices, evaluation, figures, launcher, loop, runs, updates

_ITEMS_PER_BATCH = 256
_TEST_SETS = 10_000
_VALIDATION_SETS = 2_000
_OTHER_SETS = 1_000
_MAX_DIGITS = 9
_IMAGES_AT_ONCE = 20_000


@dataclasses.dataclass(frozen=True)
class Config(launcher.Config):
    """What to sort and how to learn it."""

    kernels_only: ClassVar[dict[str, Any]] = {"loss": ("separate",)}

    size: int = launcher.flag(8, "Numbers in a set.", minimum=1, below=2**16)
    digits: int = launcher.flag(1, "Digits in a number, side by side.", minimum=1)
    dataset: data.Name = launcher.flag("digits", "Where the images of digits come from.")
    data_dir: str | None = launcher.flag(
        None, "Folder of the IDX files of --dataset=mnist.", only={"dataset": data.WITH_FOLDER},
        fixed=False,
    )  # fmt: skip
    loss: Literal["plain", "means", "separate"] = launcher.flag(
        "means",
        "plain compares the result with the sorted images; means, the mean image of every bucket "
        "at every level; separate carries the sorted images back to every level and trains each "
        "by itself.",
    )
    num_samples: int = launcher.flag(
        10,
        "Items on the other side of a split that an item may exchange with, rounded up to a power "
        "of two; with --proposal=uniform, random splits of a bucket.",
        minimum=1,
        below=2**12,
    )
    certainty: float = launcher.flag(
        10.0, "How soon a difference in score decides an exchange.", above=0
    )
    proposal: Literal["local", "uniform"] = launcher.flag(
        "local",
        "local: items change places one by one with others about as far from the split; uniform: "
        "random splits of whole buckets, as in the paper.",
    )
    steps: int = launcher.flag(12000, "Number of updates.", minimum=1)
    batch_size: int = launcher.flag(
        lambda config: max(1, _ITEMS_PER_BATCH // max(1, config.size)),
        f"Sets per update; by default those of {_ITEMS_PER_BATCH} numbers.",
        minimum=1,
        below=2**20,
    )
    learning_rate: float = launcher.flag(
        2e-3, "Highest step size; warms up, then decays to 0.", above=0
    )
    width: int = launcher.flag(
        256, "Units in each of the network's two hidden layers.", minimum=1, below=2**16
    )
    dropout: float = launcher.flag(
        0.2, "Share of hidden units dropped in training.", minimum=0.0, below=1
    )
    augment: bool = launcher.flag(True, "Scores slightly moved and turned images in training.")
    test_sizes: str | None = launcher.flag(
        None, "Other sizes of sets to test at, such as 5,16,64,256.", fixed=False
    )

    def __post_init__(self):
        super().__post_init__()
        if self.digits > _MAX_DIGITS:
            raise ValueError(f"--digits must be at most {_MAX_DIGITS}, got {self.digits}")
        sizes = self.test_sizes.split(",") if self.test_sizes is not None else []
        if not all(size.isascii() and size.isdigit() and 0 < int(size) < 2**16 for size in sizes):
            raise ValueError(f"--test_sizes must be like 5,16,64, got {self.test_sizes}")


class Scorer(nnx.Module):
    """Scores a number: each digit is softly one of a few classes, and each class has a score.

    A network straight to one score has to fold ten kinds of images onto a line at once; through
    the classes it first tells them apart and then only has to order them.
    """

    classes = 16

    def __init__(self, config: Config, pixels: int, *, rngs: nnx.Rngs):
        self.hidden = nnx.List(
            [nnx.Linear(inputs, config.width, rngs=rngs) for inputs in (pixels, config.width)]
        )
        self.logits = nnx.Linear(config.width, self.classes, rngs=rngs)
        self.scores = nnx.Param(jnp.tile(jnp.linspace(-0.5, 0.5, self.classes), (config.digits, 1)))
        self.dropout = nnx.Dropout(config.dropout, rngs=rngs)

    def __call__(self, digits: jax.Array) -> jax.Array:
        """Maps digits float [..., digits, pixels] to scores [...]."""
        for layer in self.hidden:
            digits = self.dropout(nnx.relu(layer(digits)))
        return jnp.einsum("...gc,gc->...", nnx.softmax(self.logits(digits)), self.scores[...])


class Sorter(nnx.Module):
    """Sorts sets of numbers by learned scores."""

    def __init__(self, config: Config, pixels: int, *, rngs: nnx.Rngs):
        self.scorer = Scorer(config, pixels, rngs=rngs)
        self.quicksort = SoftQuicksort(
            num_samples=config.num_samples,
            certainty=config.certainty,
            proposal=config.proposal,
            rngs=rngs,
        )

    def __call__(self, images: jax.Array, seen: jax.Array) -> SoftSort:
        """Sorts `images` [b, s, digits, h, w, c] by the scores of `seen`, distorted versions."""
        scores = self.scorer(seen.reshape(*seen.shape[:3], -1))
        return self.quicksort(images.reshape(*images.shape[:2], -1), scores)


def make_model(config: Config, pixels: int) -> Sorter:
    """Makes the sorter of a config for digits of so many pixels."""
    return Sorter(config, pixels, rngs=nnx.Rngs(config.seed))


def sort_loss(
    result: SoftSort, target: jax.Array, kind: str, *, implementation: str | None = None
) -> jax.Array:
    """The mean squared error of a sort, taken as `--loss` says; target [b, s, pixels], sorted."""
    levels = len(result.items) - 1
    if kind == "plain" or levels == 0:
        return jnp.mean((result.items[-1] - target) ** 2)
    size = target.shape[-2]
    losses = []
    if kind == "means":
        for items, starts in zip(result.items[1:], bucket_starts(size)[1:], strict=True):
            sizes = np.diff(np.append(starts, size))
            bucket = np.repeat(np.arange(len(starts)), sizes)
            mean = (np.arange(len(starts))[:, None] == bucket) / sizes[:, None]
            difference = jnp.einsum("ts,bsd->btd", mean.astype(np.float32), items - target)
            losses.append(jnp.mean(difference**2))
    else:
        targets = result.permutation.carry_back(target)
        serving = kernels.serving(implementation, "ell_spmm")
        for t, permutation in enumerate(result.permutations):
            fixed = jax.lax.stop_gradient(result.items[t])
            moved = contract(permutation, fixed, implementation=serving)
            losses.append(jnp.mean((moved - jax.lax.stop_gradient(targets[t + 1])) ** 2))
    return sum(losses) / levels


def draw_sets(key: jax.Array, split: data.Split, config: Config) -> tuple[jax.Array, jax.Array]:
    """Draws sets of numbers: images [b, s, digits, h, w, c] and the numbers int32 [b, s]."""
    chosen = jax.random.randint(
        key, (config.batch_size, config.size, config.digits), 0, len(split.labels)
    )
    return split.images[chosen], to_numbers(split.labels[chosen])


def to_numbers(labels):
    """Reads digits int32 [..., digits] as decimal numbers int32 [...]."""
    return labels @ 10 ** np.arange(labels.shape[-1], dtype=np.int32)[::-1]


def fixed_sets(split: data.Split, config: Config, count: int) -> np.ndarray:
    """Draws `count` sets of different images by a fixed seed: int [count, s, digits]."""
    wanted = config.size * config.digits
    if len(split.labels) < wanted:
        raise data.DataError(
            f"--size={config.size} and --digits={config.digits} need {wanted} images in a set, "
            f"but --dataset={config.dataset} has only {len(split.labels)} to draw from"
        )
    rng = np.random.RandomState(0)
    chosen = [rng.choice(len(split.labels), wanted, replace=False) for _ in range(count)]
    return np.reshape(chosen, (count, config.size, config.digits))


# A module's call, compiled as a whole.
_call = evaluation.compiled(lambda model, *arguments: model(*arguments))


def evaluate(model: Sorter, split: data.Split, chosen: np.ndarray) -> dict[str, float]:
    """How often sets `chosen` [n, s, digits] are sorted right; equal numbers in any order."""
    scorer = evaluation.deterministic(model.scorer)
    images = split.images.reshape(len(split.labels), -1)
    at_once = max(1, _IMAGES_AT_ONCE // chosen[0].size)
    scores = evaluation.in_parts(lambda part: _call(scorer, images[part]), chosen, at_once=at_once)
    exact, each = matches(scores, split.labels[chosen])
    return {"exact_match": exact, "element_wise": each}


def matches(scores: np.ndarray, digits: np.ndarray) -> tuple[float, float]:
    """The share of sets that scores [n, s] sort right by digits [n, s, digits], and of items."""
    numbers = to_numbers(digits)
    order = np.argsort(scores, axis=-1, kind="stable")
    right = np.take_along_axis(numbers, order, axis=-1) == np.sort(numbers, axis=-1)
    return float(right.all(-1).mean()), float(right.mean())


def draw_picture(model: Sorter, split: data.Split, chosen: np.ndarray) -> Figure:
    """Shows how sets `chosen` [n, s, digits] are sorted: four rows each, wrong items in red."""
    images, numbers = split.images[chosen], to_numbers(split.labels[chosen])
    soft = _call(model, images, images).items[-1]
    hard = _call(evaluation.deterministic(model), images, images)
    order = np.argsort(numbers, axis=-1, kind="stable")
    target = np.take_along_axis(images, order[..., None, None, None, None], axis=1)
    scores = hard.scores[0]
    guessed = np.take_along_axis(numbers, np.argsort(scores, -1, kind="stable"), -1)
    right = guessed == np.sort(numbers, -1)

    sets, size, digits = images.shape[:3]
    rows = [
        ("unsorted input", images, None),
        ("sorted by the model", hard.items[-1], right),
        ("soft, in training", soft, None),
        ("right order", target, None),
    ]
    figure = Figure(figsize=(2.2 + 0.75 * size * digits, 3.4 * sets), layout="constrained")
    for subfigure, s in zip(np.atleast_1d(figure.subfigures(sets, 1)), range(sets), strict=True):
        axes = subfigure.subplots(len(rows), size, squeeze=False)
        for row, (title, flat, marks) in enumerate(rows):
            items = np.reshape(flat, images.shape)
            axes[row, 0].set_ylabel(title, rotation=0, ha="right", va="center")
            for i, axis in enumerate(axes[row]):
                picture = np.concatenate(list(items[s, i]), axis=1)
                axis.imshow(picture.squeeze(), cmap="gray_r", vmin=0, vmax=1)
                axis.set(xticks=[], yticks=[])
                if marks is not None:
                    colour = "tab:green" if marks[s, i] else "tab:red"
                    for spine in axis.spines.values():
                        spine.set(color=colour, linewidth=3)
    return figure


def train(
    model: Sorter, dataset: data.Dataset, config: Config, workdir: pathlib.Path
) -> tuple[Sorter, dict[str, Any]]:
    """Trains a sorter; returns it, and the figures of the run and of its last validation."""
    validation_sets = fixed_sets(dataset.validation, config, _VALIDATION_SETS)

    def loss_fn(model, key, split):
        draw_key, augment_key = jax.random.split(key)
        images, numbers = devices.shard(draw_sets(draw_key, split, config))
        seen = images
        if config.augment:
            digits = images.reshape(-1, *images.shape[-3:])
            seen = augment.distort(augment_key, digits, shift=1.0, rotation=0.15, scale=0.1)
            seen = seen.reshape(images.shape)
        result = model(images, seen)
        order = jnp.argsort(numbers, axis=-1)
        target = jnp.take_along_axis(result.items[0], order[..., None], axis=-2)
        loss = sort_loss(result, target, config.loss, implementation=config.implementation)
        return loss, {}

    def evaluate_validation(model, step):
        del step
        result = evaluate(model, dataset.validation, validation_sets)
        return {f"validation_{name}": figure for name, figure in result.items()}

    schedule = updates.warmup_cosine(config.learning_rate, config.steps, warmup=200)
    trained = loop.train(
        model,
        optax.adamw(schedule),
        loss_fn,
        dataset.train,
        config=config,
        key=jax.random.key(config.seed),
        steps=config.steps,
        workdir=workdir,
        inputs=(dataset.train.images[0].size,),
        batch_size=config.batch_size,
        average=0.999,
        evaluate=evaluate_validation,
        evaluate_every=1000,
        best=lambda validation: validation["validation_exact_match"],
    )
    last = trained.history[max(trained.history)]
    return trained.model, {**trained.figures, **{name: float(x) for name, x in last.items()}}


def train_and_evaluate(config: Config, workdir: pathlib.Path) -> dict[str, Any]:
    """Trains a sorter, writes `sorted.png`, and returns its figures on test sets."""
    dataset = data.load(config.dataset, config.data_dir)
    test_sets = fixed_sets(dataset.test, config, _TEST_SETS)
    sizes = map(int, config.test_sizes.split(",") if config.test_sizes else [])
    other_sets = {
        size: fixed_sets(dataset.test, dataclasses.replace(config, size=size), _OTHER_SETS)
        for size in sizes
    }
    model = loop.build(make_model, config, dataset.train.images[0].size)
    model, run = train(model, dataset, config, workdir)
    result = evaluate(model, dataset.test, test_sets)
    picture = workdir / "sorted.png"
    print(f"{len(test_sets)} sets of {config.size} numbers, of test images:")
    print(f"  exact match   {result['exact_match']:.4f}")
    print(f"  element-wise  {result['element_wise']:.4f}")
    for size, sets in other_sets.items():
        figures_of = evaluate(model, dataset.test, sets)
        print(f"{len(sets)} sets of {size}: " + runs.to_json(figures_of))
        result |= {f"{name}_{size}": figure for name, figure in figures_of.items()}
    return runs.report(
        workdir,
        {**result, **run, "test_examples": len(test_sets)},
        lambda: figures.save_png(draw_picture(model, dataset.test, test_sets[:3]), picture),
    )


if __name__ == "__main__":
    launcher.launch(Config, train_and_evaluate)
