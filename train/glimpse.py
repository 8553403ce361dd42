"""Learns to classify digits on cluttered canvases from a few small glimpses of them.

A small network sees the canvas averaged to a coarse image and decides where to look; a classifier
sees only the glimpses, read at full resolution. What is learned on small canvases finds on large
ones.

python -m train.glimpse --workdir=found
python -m train.glimpse --workdir=found --mode=eval --eval_canvas=256 --eval_patches=12
python -m train.glimpse --model=stn
python -m train.glimpse --task=megapixel --dataset=mnist --data_dir=mnist
"""

import dataclasses
import functools
import math
import pathlib
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from hyperlayer_jax.nn import FindingGlimpses, reinforce_loss
from train import (
    canvases,
    checkpoints,
    data,
    devices,
    glimpse_figures,
    launcher,
    loop,
    megapixel,
    runs,
    updates,
)
from train.config import FlagError
from train.finding import Finder, overview, survey, whole_squares
from train.glimpse_models import ConvClassifier, GlimpseClassifier, PoolClassifier
from train.searches import AttentionSampling, SoftArgmax, TopK

_NUM_EVALUATIONS = 12
NUM_VALIDATION = 2000
_NUM_SHOWN = 5
# Models that aim at glimpses, those of them that sample points, and those that score the overview.
_AIMING = ("box", "quad", "affine", "stn", "reinforce")
_SAMPLED = ("box", "quad", "affine")
CANDIDATES = ("find", "attention", "topk")
_SCORING = (*CANDIDATES, "argmax")
# Of what a score sees, the weight of the entropy of attention sampling.
_ENTROPY = 0.01


@dataclasses.dataclass(frozen=True)
class Config(canvases.Config):
    """What to look at, with what, and for how long."""

    train_canvases: int = launcher.flag(
        5000, "Canvases to learn from.", minimum=1, below=2**16, only={"task": ("megapixel",)}
    )
    start: str | None = launcher.flag(
        None, "Folder of a run whose model to begin with, such as on small canvases.",
        only={"model": CANDIDATES}, fixed=False,
    )  # fmt: skip
    kernels_only: ClassVar[dict[str, Any]] = {"model": (*_SAMPLED, *CANDIDATES)}

    model: Literal[
        "find", "attention", "topk", "argmax", "box", "quad", "affine", "stn", "reinforce", "conv",
        "pool",
    ] = launcher.flag("find", "How to look, or the baseline to train instead.")  # fmt: skip
    candidates: int = launcher.flag(
        canvases.by_task(8, 10), "Patches read of a canvas: 8, megapixel 10.", minimum=1,
        below=2**10, only={"model": CANDIDATES},
    )  # fmt: skip
    anywhere: int = launcher.flag(
        2, "How many of them are drawn from everywhere.", minimum=0, only={"model": ("find",)}
    )
    apart: int = launcher.flag(
        canvases.by_task(1, 3), "Cells between those that scores lead to: 1, megapixel 3.",
        minimum=1, below=2**10, only={"model": ("find", "topk")},
    )  # fmt: skip
    window: int = launcher.flag(
        canvases.by_task(20, 36), "Rows and columns of a patch: 20, megapixel 36.", minimum=1,
        below=2**10, only={"model": _SCORING},
    )  # fmt: skip
    use: Literal["mixture", "average", "features", "votes"] = launcher.flag(
        canvases.by_task("mixture", "votes"),
        "Patches are classified one by one and their answers weighed (mixture) or counted (votes, "
        "for megapixel), or they, or their features, are averaged and classified.",
        only={"model": ("find", "topk")},
    )
    reach: int = launcher.flag(
        2, "Cells around one that its score depends on.", minimum=0, only={"model": _SCORING}
    )
    score_hidden: int = launcher.flag(
        32, "Width of the layers that score.", minimum=1, below=2**16, only={"model": _SCORING}
    )
    scored: int = launcher.flag(
        canvases.by_task(0, 384),
        "Cells of the overview that are scored, the busiest; all where 0. Megapixel 384.",
        minimum=0, below=2**20, only={"model": CANDIDATES}, fixed=False,
    )  # fmt: skip
    head: Literal["mlp", "conv"] = launcher.flag(
        "mlp", "Classifier of the glimpses.", only={"model": (*_AIMING, *_SCORING)}
    )
    hidden: int = launcher.flag(256, "Width of the dense layers.", minimum=1, below=2**16)
    glimpses: int = launcher.flag(
        2, "Number of glimpses.", minimum=1, below=2**10, only={"model": _AIMING}
    )
    glimpse_size: int = launcher.flag(
        12, "Rows and columns of a glimpse.", minimum=1, below=2**12, only={"model": _AIMING}
    )
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
        5,
        "Rows and columns of the region.",
        minimum=1,
        only={"model": _SAMPLED, "num_local": bool},
    )
    sigma_scale: float = launcher.flag(
        0.03, "First sigma, in canvases, over log 2.", above=0, only={"model": _SAMPLED}
    )
    min_sigma: float = launcher.flag(
        0.0, "Smallest sigma, in pixels.", minimum=0.0, only={"model": _SAMPLED}
    )
    coarseness: int = launcher.flag(
        canvases.by_task(6, 10),
        "Pixels averaged along each axis to decide: 6, megapixel 10.", minimum=1,
        only={"model": (*_AIMING, *_SCORING)},
    )  # fmt: skip
    eval_canvas: int = launcher.flag(
        0, "Rows and columns of the canvases to test on; as in training where 0.", minimum=0,
        below=2**13, only={"model": (*_SCORING, "pool"), "task": ("digit",)}, fixed=False,
    )  # fmt: skip
    eval_patches: int = launcher.flag(
        0, "Pieces on a canvas of --eval_canvas.", minimum=0, below=2**12,
        only={"eval_canvas": bool}, fixed=False,
    )  # fmt: skip
    steps: int = launcher.flag(6000, "Number of updates.", minimum=1)
    batch_size: int = launcher.flag(
        canvases.by_task(64, 32), "Canvases in an update: 64, megapixel 32.", minimum=1, below=2**20
    )
    learning_rate: float = launcher.flag(2e-3, "Largest size of a step.", above=0)
    average: float = launcher.flag(
        0.999, "Decay of the mean of the parameters.", minimum=0.0, below=1
    )

    def __post_init__(self):
        super().__post_init__()
        if self.task == "megapixel" and (self.model not in CANDIDATES or not self.scored):
            raise ValueError(
                f"--task=megapixel wants --scored and --model one of {', '.join(CANDIDATES)}, "
                f"got --scored={self.scored} and --model={self.model}"
            )
        if self.model in (*_AIMING, *_SCORING) and self.canvas % self.coarseness:
            raise ValueError(
                f"--coarseness must divide --canvas={self.canvas}, got {self.coarseness}"
            )
        if self.task == "megapixel":
            megapixel.check(self)
        for name in ("canvas", "eval_canvas"):
            size = getattr(self, name)
            if 0 < size < self.digit_size:
                raise ValueError(
                    f"--{name} must be at least --digit_size={self.digit_size}, got {size}"
                )
            cells = math.ceil(size / self.coarseness) ** 2
            if self.model in CANDIDATES and 0 < cells < self.candidates:
                raise ValueError(
                    f"--candidates must be at most the {cells} cells of --{name}={size}, "
                    f"got {self.candidates}"
                )
        if 0 < self.scored < self.candidates:
            raise ValueError(f"--scored must be at least --candidates, got {self.scored}")
        if self.anywhere > self.candidates and self.model == "find":
            raise ValueError(
                f"--anywhere must be at most --candidates={self.candidates}, got {self.anywhere}"
            )

    @property
    def eval_size(self) -> canvases.Size:
        """Of the canvases to test on."""
        if self.eval_canvas:
            return canvases.Size(self.eval_canvas, self.eval_patches)
        return self.size


def make_model(config: Config, channels: int) -> nnx.Module:
    """The model of the config for images of so many channels; it returns logits and `Glimpses`."""
    rngs = nnx.Rngs(config.seed)
    window = (config.window,) * 2
    read = {"implementation": config.implementation, "rngs": rngs}
    match config.model:
        case "conv":
            return ConvClassifier(config, channels, rngs)
        case "pool":
            return PoolClassifier(config, channels, rngs)
        case "find":
            search = FindingGlimpses(
                window, config.candidates, num_anywhere=config.anywhere, apart=config.apart, **read
            )
        case "attention":
            search = AttentionSampling(window, config.candidates, num_anywhere=0, **read)
        case "topk":
            search = TopK(window, config.candidates, num_anywhere=0, apart=config.apart, **read)
        case "argmax":
            search = SoftArgmax(config.window)
        case _:
            return GlimpseClassifier(config, channels, rngs)
    use = "features" if config.model == "attention" else config.use
    return Finder(config, channels, search, use, rngs)


def load(config: Config) -> data.Dataset:
    """The digits of the task, or canvases of a megapixel."""
    return (megapixel if config.task == "megapixel" else canvases).load(config)


def begin(model: nnx.Module, config: Config) -> nnx.Module:
    """The model, as that of the run in `--start` ended, if any: it scores and classifies alike.

    Raises:
      FlagError: there is no such run, or its model is another.
    """
    if config.start is None:
        return model
    try:
        found, _ = runs.load_run(config.start)
        for name in ("score", "convolutions", "dense", "last"):
            state = nnx.state(getattr(found, name))
            if jax.tree.map(jnp.shape, state) != jax.tree.map(
                jnp.shape, nnx.state(getattr(model, name))
            ):
                raise ValueError(f"{name} of {config.start} has another shape")
            nnx.update(getattr(model, name), state)
    except (ValueError, AttributeError, checkpoints.CheckpointError) as error:
        raise FlagError(f"--start: {error}") from error
    return model


def loss_fn(config: Config, model: nnx.Module, key: jax.Array, split: Any):
    """Cross-entropy on fresh canvases, or on some of a megapixel, and what baselines need."""
    chosen_key, canvas_key = jax.random.split(key)
    chosen = jax.random.randint(chosen_key, (config.batch_size,), 0, len(split.labels))
    labels = split.labels[chosen]
    if config.task == "megapixel":
        seen = devices.shard(split.pick(chosen))
        logits, glimpses = model.look(*seen)
    else:
        seen = devices.shard(canvases.draw(config, canvas_key, split, chosen, augment=True))
        logits, glimpses = model(seen)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    right = (logits.argmax(-1) == labels).astype(jnp.float32)
    if config.model == "reinforce":
        loss += reinforce_loss(glimpses, right)
    if config.model == "attention":
        known = seen[1] if config.task == "megapixel" else survey(seen, config.coarseness)
        loss -= _ENTROPY * model.entropy(known)
    return loss, {"error": 1 - right.mean()}


def train_and_evaluate(config: Config, workdir: pathlib.Path) -> dict[str, Any]:
    """Trains on the training split and tests once, at the end; draws what the model looks at."""
    is_megapixel = config.task == "megapixel"
    dataset = load(config)
    channels = dataset.train.images.shape[-1]
    if not is_megapixel:
        devices.check_fits("the canvases to test on", 16 * config.eval_size.canvas**2 * channels)
    key, validation_key, shown_key, test_key = jax.random.split(jax.random.key(config.seed), 4)
    evaluate_every = math.ceil(config.steps / _NUM_EVALUATIONS)

    @functools.cache
    def shown(size=config.size):
        chosen = np.arange(min(_NUM_SHOWN, len(dataset.validation.labels)), dtype=np.int32)
        return canvases.draw(config, shown_key, dataset.validation, chosen, size=size)

    def evaluate(model, step):
        del step
        split = dataset.validation
        if is_megapixel:
            return {"validation_error": megapixel.error_rate(model, split)[0]}
        error, _ = canvases.error_rate(
            config, model, validation_key, split, at_least=NUM_VALIDATION
        )
        return {"validation_error": error, **glimpse_figures.look(model, shown())}

    schedule = updates.warmup_cosine(config.learning_rate, config.steps, warmup=500)
    model = loop.build(make_model, config, channels)
    if not runs.is_run(workdir):
        model = begin(model, config)
    trained = loop.train(
        model,
        optax.adam(schedule),
        functools.partial(loss_fn, config),
        dataset.train,
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
    size = config.eval_size
    if is_megapixel:
        error, count = megapixel.error_rate(trained.model, dataset.test)
    else:
        error, count = canvases.error_rate(config, trained.model, test_key, dataset.test, size=size)
    print(
        f"error on {count} canvases of test images, {size.canvas} x {size.canvas} with "
        f"{size.num_patches} pieces: {error:.4f}"
    )

    def draw():
        if is_megapixel or config.model in ("conv", "pool"):
            return
        coarse = np.asarray(overview(shown(), config.coarseness))
        glimpse_figures.draw_history(trained.history, np.asarray(shown()), coarse, workdir)
        if config.eval_canvas:
            path = workdir / f"glimpses-of-{size.canvas}.png"
            seen = whole_squares(shown(size), config.coarseness)
            glimpse_figures.draw_look(trained.model, seen, path)

    return runs.report(workdir, {"error": error, **trained.figures, "test_examples": count}, draw)


if __name__ == "__main__":
    launcher.launch(Config, train_and_evaluate)
