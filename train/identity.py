"""Learns y = x with a sparse linear layer whose few weights first have to find the diagonal.

Each of `--size` index tuples has the value 1 and is free to go anywhere in the matrix of the layer.
The run ends when all of them sit on the diagonal, or after `--steps`:

  python -m train.identity
  python -m train.identity --size=128
"""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.axes import Axes
from matplotlib.collections import EllipseCollection
from matplotlib.figure import Figure

from hyperlayer_jax import IndexTuples
from hyperlayer_jax.nn import Sampler, SparseLinear
from train import devices, evaluation, figures, launcher, loop, runs

_BATCH = 64
_TEST_EXAMPLES = 1000
_FRAMES = 100


@dataclasses.dataclass(frozen=True)
class Config(launcher.Config):
    """How to learn the identity."""

    size: int = launcher.flag(
        32, "Length of x, and number of index tuples.", minimum=1, below=2**24
    )
    steps: int = launcher.flag(10_000, "Number of updates.", minimum=1)
    learning_rate: float = launcher.flag(
        0.005, "Highest step size, at size 128 and in proportion to 1 / size; decays to 0.", above=0
    )
    sigma_penalty: float = launcher.flag(
        0.01, "Weight in the loss of the mean sigma, in units of the matrix.", minimum=0.0
    )
    num_global: int = launcher.flag(
        8, "Points per tuple drawn from the whole matrix.", minimum=0, below=2**16
    )
    num_local: int = launcher.flag(
        4, "Points per tuple drawn near its mean.", minimum=0, below=2**16
    )
    region: int = launcher.flag(
        8, "Rows and columns that count as near.", minimum=1, only={"num_local": bool}
    )
    min_sigma: float = launcher.flag(0.05, "Smallest standard deviation, in cells.", minimum=0.0)


@evaluation.compiled
def test_error(model: SparseLinear, *, size: int) -> jax.Array:
    """The mean squared error of the rounded layer on random x [1000, size]."""
    x = jax.random.normal(jax.random.key(0), (_TEST_EXAMPLES, size))
    return jnp.mean((evaluation.deterministic(model)(x) - x) ** 2)


def draw_tuples(axes: Axes, tuples: IndexTuples, size: int, title: str) -> None:
    """Draws tuples over the matrix: a dot at each mean, an ellipse of one sigma around it."""
    axes.clear()
    rows, columns = np.asarray(tuples.means).T
    height, width = 2 * np.asarray(tuples.sigmas).T
    axes.plot([0, size - 1], [0, size - 1], color="lightgray", linewidth=4, zorder=0)
    ellipses = EllipseCollection(
        width, height, np.zeros(len(rows)), units="xy", offsets=np.stack([columns, rows], -1),
        offset_transform=axes.transData, facecolor="tab:blue", alpha=0.15,
    )  # fmt: skip
    axes.add_collection(ellipses)
    axes.plot(columns, rows, ".", color="tab:blue", markersize=4)
    axes.set(
        xlim=(-1, size),
        ylim=(size, -1),
        aspect="equal",
        title=title,
        xlabel="input",
        ylabel="output",
    )


def make_model(config: Config) -> SparseLinear:
    """Makes the layer that a config describes."""
    rngs = nnx.Rngs(config.seed)
    sampler = Sampler(
        num_global=config.num_global,
        num_local=config.num_local,
        region=config.region,
        evaluation="round",
        rngs=rngs,
    )
    return SparseLinear(
        config.size,
        config.size,
        1,
        values=1.0,
        min_sigma=config.min_sigma,
        sampler=sampler,
        implementation=config.implementation,
        rngs=rngs,
    )


def draw_history(history: dict[int, IndexTuples], size: int, workdir: pathlib.Path) -> None:
    """Draws tuples by step: three steps to `tuples.png`, and all to `tuples.gif`."""
    steps = sorted(history)
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    shown = [steps[0], steps[len(steps) // 10], steps[-1]]
    for axes, step in zip(figure.subplots(1, 3), shown, strict=True):
        draw_tuples(axes, history[step], size, f"step {step}")
    figures.save_png(figure, workdir / "tuples.png")
    figure = Figure(figsize=(4.5, 4.8), layout="constrained")
    axes = figure.subplots()

    def draw(step):
        draw_tuples(axes, history[step], size, f"step {step}")

    figures.save_gif(figure, draw, steps, workdir / "tuples.gif")


def train_and_evaluate(config: Config, workdir: pathlib.Path) -> dict[str, Any]:
    """Trains the layer, writes `tuples.png` and `tuples.gif`, and returns its figures."""
    size = config.size
    devices.check_fits("the test examples", 16 * _TEST_EXAMPLES * size)

    def loss_fn(model, key, data):
        del data
        x = devices.shard(jax.random.normal(key, (_BATCH, size)))
        sigma = jnp.mean(model.tuples().sigmas) / size
        return jnp.mean((model(x) - x) ** 2) + config.sigma_penalty * sigma, {}

    free_tuples = evaluation.compiled(lambda model: model.tuples())

    def evaluate(model, step):
        del step
        tuples = free_tuples(model)
        arrays = {name: getattr(tuples, name) for name in ("means", "sigmas", "values")}
        return {"mse": test_error(model, size=size), **arrays}

    # A step of the same length in cells, whatever the size.
    learning_rate = config.learning_rate * 128 / size
    trained = loop.train(
        loop.build(make_model, config),
        optax.adam(optax.cosine_decay_schedule(learning_rate, config.steps)),
        loss_fn,
        (),
        config=config,
        key=jax.random.key(config.seed),
        steps=config.steps,
        workdir=workdir,
        batch_size=_BATCH,
        evaluate=evaluate,
        evaluate_every=max(1, config.steps // _FRAMES),
    )
    mse = float(test_error(trained.model, size=size))
    print(f"mean squared error with rounded means: {mse:.4g}")
    history = {
        step: IndexTuples(results["means"], results["sigmas"], results["values"])
        for step, results in trained.history.items()
    }
    return runs.report(
        workdir,
        {"mse": mse, **trained.figures, "test_examples": _TEST_EXAMPLES},
        lambda: draw_history(history, size, workdir),
    )


if __name__ == "__main__":
    launcher.launch(Config, train_and_evaluate)
