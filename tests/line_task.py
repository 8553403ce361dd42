"""Fits a line: the smallest task that stands on the base of the launchers.

python -m line_task --steps=100
"""

import dataclasses
import pathlib
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from train import data, devices, launcher, loop, runs

_BATCH = 16


@dataclasses.dataclass(frozen=True)
class Config(launcher.Config):
    """How to fit."""

    steps: int = launcher.flag(200, "Number of updates.", minimum=1)
    learning_rate: float = launcher.flag(0.05, "Size of a step.", minimum=0.0)
    optimizer: Literal["adam", "sgd"] = launcher.flag("adam", "Rule of the updates.")
    noisy: bool = launcher.flag(False, "Adds noise to the targets.")
    clip: float | None = launcher.flag(None, "Largest norm of the gradient.")
    data_dir: str | None = launcher.flag(None, "Folder of MNIST, to read it first.", fixed=False)

    def __post_init__(self):
        super().__post_init__()
        if self.optimizer == "sgd" and self.clip is None:
            raise ValueError("--optimizer=sgd needs --clip")


def loss_fn(model, key, data):
    x, y = data
    batch = jax.random.randint(key, (_BATCH,), 0, len(x))
    x, y = devices.shard((x[batch], y[batch]))
    loss = jnp.mean((model(x) - y) ** 2)
    return loss, {"rmse": jnp.sqrt(loss)}


def make_model(config: Config) -> nnx.Module:
    return nnx.Linear(1, 1, rngs=nnx.Rngs(config.seed))


def train_and_evaluate(config: Config, workdir: pathlib.Path) -> dict[str, Any]:
    if config.data_dir is not None:
        data.load("mnist", config.data_dir)
    x = jnp.linspace(-1, 1, 64)[:, None]
    trained = loop.train(
        loop.build(make_model, config),
        optax.adam(config.learning_rate),
        loss_fn,
        (x, 2 * x + 1),
        config=config,
        key=jax.random.key(config.seed),
        steps=config.steps,
        workdir=workdir,
        batch_size=_BATCH,
        evaluate=lambda model, step: {"error": jnp.abs(model.kernel - 2).max()},
        evaluate_every=100,
        best=lambda figures: -figures["error"],
    )
    return runs.report(workdir, trained.figures, lambda: (workdir / "picture").write_text("line"))


if __name__ == "__main__":
    launcher.launch(Config, train_and_evaluate)
