"""Learns to classify digits on cluttered canvases from a few small glimpses of them.

A small network sees the canvas averaged to a coarse image and decides where to look; a classifier
sees only the glimpses, read at full resolution. What is learned on small canvases finds on large
ones.

python -m train.glimpse --workdir=found
python -m train.glimpse --workdir=found --mode=eval --eval_canvas=256 --eval_patches=12
python -m train.glimpse --model=stn
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
from train import canvases, data, devices, glimpse_figures, launcher, loop, runs, updates
from train.finding import Finder, overview, whole_squares
from train.glimpse_models import ConvClassifier, GlimpseClassifier, PoolClassifier
from train.searches import AttentionSampling, SoftArgmax, TopK

_NUM_EVALUATIONS = 12
_NUM_VALIDATION = 2000
_NUM_SHOWN = 5
# Models that aim at glimpses, those of them that sample points, and those that score the overview.
_AIMING = ("box", "quad", "affine", "stn", "reinforce")
_SAMPLED = ("box", "quad", "affine")
_CANDIDATES = ("find", "attention", "topk")
_SCORING = (*_CANDIDATES, "argmax")
# Of what a score sees, the weight of the entropy of attention sampling.
_ENTROPY = 0.01


@dataclasses.dataclass(frozen=True)
class Config(canvases.Config):
    """What to look at, with what, and for how long."""

    kernels_only: ClassVar[dict[str, Any]] = {"model": (*_SAMPLED, *_CANDIDATES)}

    model: Literal[
        "find", "attention", "topk", "argmax", "box", "quad", "affine", "stn", "reinforce", "conv",
        "pool",
    ] = launcher.flag("find", "How to look, or the baseline to train instead.")  # fmt: skip
    candidates: int = launcher.flag(
        8, "Patches read of a canvas.", minimum=1, below=2**10, only={"model": _CANDIDATES}
    )
    anywhere: int = launcher.flag(
        2, "How many of them are drawn from everywhere.", minimum=0, only={"model": ("find",)}
    )
    window: int = launcher.flag(
        20, "Rows and columns of a patch.", minimum=1, below=2**10, only={"model": _SCORING}
    )
    use: Literal["mixture", "average"] = launcher.flag(
        "mixture",
        "Patches are classified one by one and weighed, or averaged and classified.",
        only={"model": ("find", "topk")},
    )
    reach: int = launcher.flag(
        2, "Cells around one that its score depends on.", minimum=0, only={"model": _SCORING}
    )
    score_hidden: int = launcher.flag(
        32, "Width of the layers that score.", minimum=1, below=2**16, only={"model": _SCORING}
    )
    scored: int = launcher.flag(
        0, "Cells of the overview that are scored, the busiest; all where 0.", minimum=0,
        below=2**20, only={"model": _CANDIDATES}, fixed=False,
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
        6, "Pixels averaged along each axis to decide.", minimum=1,
        only={"model": (*_AIMING, *_SCORING)},
    )  # fmt: skip
    eval_canvas: int = launcher.flag(
        0, "Rows and columns of the canvases to test on; as in training where 0.", minimum=0,
        below=2**13, only={"model": (*_SCORING, "pool")}, fixed=False,
    )  # fmt: skip
    eval_patches: int = launcher.flag(
        0, "Pieces on a canvas of --eval_canvas.", minimum=0, below=2**12,
        only={"eval_canvas": bool}, fixed=False,
    )  # fmt: skip
    steps: int = launcher.flag(3000, "Number of updates.", minimum=1)
    batch_size: int = launcher.flag(64, "Canvases in an update.", minimum=1, below=2**20)
    learning_rate: float = launcher.flag(2e-3, "Largest size of a step.", above=0)
    average: float = launcher.flag(
        0.999, "Decay of the mean of the parameters.", minimum=0.0, below=1
    )

    def __post_init__(self):
        super().__post_init__()
        if self.model in (*_AIMING, *_SCORING) and self.canvas % self.coarseness:
            raise ValueError(
                f"--coarseness must divide --canvas={self.canvas}, got {self.coarseness}"
            )
        for name in ("canvas", "eval_canvas"):
            size = getattr(self, name)
            if 0 < size < self.digit_size:
                raise ValueError(
                    f"--{name} must be at least --digit_size={self.digit_size}, got {size}"
                )
            cells = math.ceil(size / self.coarseness) ** 2
            if self.model in _CANDIDATES and 0 < cells < self.candidates:
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
                window, config.candidates, num_anywhere=config.anywhere, **read
            )
        case "attention":
            search = AttentionSampling(window, config.candidates, num_anywhere=0, **read)
        case "topk":
            search = TopK(window, config.candidates, num_anywhere=0, **read)
        case "argmax":
            search = SoftArgmax(config.window)
        case _:
            return GlimpseClassifier(config, channels, rngs)
    use = "features" if config.model == "attention" else config.use
    return Finder(config, channels, search, use, rngs)


def loss_fn(config: Config, model: nnx.Module, key: jax.Array, split: data.Split):
    """Cross-entropy on fresh canvases, and what baselines need besides."""
    digit_key, canvas_key = jax.random.split(key)
    chosen = jax.random.randint(digit_key, (config.batch_size,), 0, len(split.labels))
    images = canvases.draw(config, canvas_key, split, chosen, augment=True)
    logits, glimpses = model(devices.shard(images))
    labels = split.labels[chosen]
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    right = (logits.argmax(-1) == labels).astype(jnp.float32)
    if config.model == "reinforce":
        loss += reinforce_loss(glimpses, right)
    if config.model == "attention":
        loss -= _ENTROPY * model.entropy(images)
    return loss, {"error": 1 - right.mean()}


def train_and_evaluate(config: Config, workdir: pathlib.Path) -> dict[str, Any]:
    """Trains on the training split and tests once, at the end; draws what the model looks at."""
    dataset = canvases.load(config)
    channels = dataset.train.images.shape[-1]
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
        error, _ = canvases.error_rate(
            config, model, validation_key, split, at_least=_NUM_VALIDATION
        )
        return {"validation_error": error, **glimpse_figures.look(model, shown())}

    schedule = updates.warmup_cosine(config.learning_rate, config.steps, warmup=500)
    trained = loop.train(
        loop.build(make_model, config, channels),
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
    error, count = canvases.error_rate(config, trained.model, test_key, dataset.test, size=size)
    print(
        f"error on {count} canvases of test images, {size.canvas} x {size.canvas} with "
        f"{size.num_patches} pieces: {error:.4f}"
    )

    def draw():
        if config.model in ("conv", "pool"):
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
