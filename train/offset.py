"""The offset task: which token stood so many places ago?

It has one right answer, and nothing but the loss says which place it is.
"""

import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from hyperlayer_jax.nn import shorten_steps
from train import devices, evaluation, loop, runs, updates
from train.patterns import save_patterns
from train.transformer_config import NUM_TOKENS, Config, make_model

# Parameters are averaged over about as many steps as there are between looks.
_SOLVED, _INTERVAL, _AVERAGE = 0.001, 50, 0.98


def train_and_evaluate(config: Config, workdir: pathlib.Path) -> dict[str, Any]:
    """Trains a model to tell what stood `--offset` tokens ago; says when it could, and ever since.

    The loss is that on new examples, every few steps, of a moving average of the parameters, since
    steps that stay long keep these in motion. `solved_at` is the step at which it was first below
    0.001 with points sampled as in training, None if it never was, and `steady` the share of later
    losses that were below, too. `loss` is the last one, in evaluation.
    """

    def mean_loss(model, key):
        shape = (config.batch_size, config.length)
        tokens = jax.random.randint(key, shape, 0, NUM_TOKENS["offset"], jnp.int32)
        tokens = devices.shard_sequences(tokens)
        logits, target = model(tokens)[:, config.offset :], tokens[:, : -config.offset]
        return optax.softmax_cross_entropy_with_integer_labels(logits, target).mean()

    @evaluation.compiled
    def losses(model, key):
        return mean_loss(model, key), mean_loss(evaluation.deterministic(model), key)

    def evaluate(model, step):
        key = jax.random.fold_in(jax.random.key(config.seed + 1), step)
        sampled, exact = losses(model, key)
        return {"sampled_loss": sampled, "evaluation_loss": exact}

    model = loop.build(make_model, config)
    trained = loop.train(
        model,
        make_optimizer(config, model),
        lambda model, key, data: (mean_loss(model, key), {}),
        (),
        config=config,
        key=jax.random.key(config.seed),
        steps=config.steps,
        workdir=workdir,
        batch_size=config.batch_size,
        evaluate=evaluate,
        evaluate_every=_INTERVAL,
        average=_AVERAGE,
    )
    history = trained.history
    solved_at, steady = when_solved({step: float(x["sampled_loss"]) for step, x in history.items()})
    loss = float(history[max(history)]["evaluation_loss"])
    print(f"offset {config.offset}: solved at step {solved_at}, steady {steady}, loss {loss:.2g}")
    tokens = np.zeros(config.length, np.int32)
    count = config.batch_size * (config.length - config.offset)
    result = {"solved_at": solved_at, "steady": steady, **trained.figures, "loss": loss}
    return runs.report(
        workdir,
        {**result, "test_examples": count},
        lambda: save_patterns(trained.model, tokens, workdir / "attention.png"),
    )


def make_optimizer(config: Config, model: nnx.Module) -> optax.GradientTransformation:
    """Adam after clipping, with steps of positions that are kept short.

    The step size warms up, and stays.
    """
    rate = config.learning_rate
    schedule = updates.warmup_cosine(rate, config.steps, warmup=config.warmup, last=rate)
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adam(schedule),
        optax.stateless(shorten_steps(model)),
    )


def when_solved(losses: dict[int, float]) -> tuple[int | None, float | None]:
    """The first step with a loss below 0.001, and the share of later losses that were, too.

    Args:
      losses: by the step at which they were looked at.

    Returns:
      None and None if there was no such step; a share of None if it was the last.
    """
    low = [step for step, loss in losses.items() if loss < _SOLVED]
    solved_at = min(low, default=math.inf)
    later = [step for step in losses if step > solved_at]
    steady = len(set(later) & set(low)) / len(later) if later else None
    return (solved_at if low else None), steady
