"""The recall task: what value stood next to this key?

Pairs of a key and a value, all keys different, and then keys alone, each to be answered with its
value: multi-query associative recall (arXiv 2312.04927), with a question at every later token. No
distance tells where an answer is, only what stands there.
"""

import functools
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hyperlayer_jax.nn import TransformerLM
from train import devices, evaluation, loop, runs, updates
from train.patterns import save_patterns
from train.transformer_config import NUM_TOKENS, Config, make_model

_TEST_EXAMPLES, _AT_ONCE, _NUM_EVALUATIONS = 256, 32, 10

# From a key and a number of examples: tokens int32 [count, T], and of each the answer, -1 where
# nothing is asked.
Draw = Callable[[jax.Array, int], tuple[jax.Array, jax.Array]]


def train_and_evaluate(config: Config, workdir: pathlib.Path) -> dict[str, Any]:
    """Trains a model on new examples in every step; `accuracy` is the share of right answers."""
    draw = functools.partial(examples, length=config.length, pairs=config.pairs)

    def evaluate(model, step):
        del step
        return {"validation_accuracy": accuracy(model, *draw(jax.random.key(1), _TEST_EXAMPLES))}

    model = loop.build(make_model, config)
    trained = loop.train(
        model,
        make_optimizer(config.learning_rate, config.steps, warmup=config.warmup, clip=config.clip),
        make_loss(draw, config.batch_size),
        (),
        config=config,
        key=jax.random.key(config.seed),
        steps=config.steps,
        workdir=workdir,
        batch_size=config.batch_size,
        evaluate=evaluate,
        evaluate_every=math.ceil(config.steps / _NUM_EVALUATIONS),
    )
    share = accuracy(trained.model, *draw(jax.random.key(2), _TEST_EXAMPLES))
    print(f"{config.pairs} pairs in {config.length} tokens: {share:.4f} of answers are right")
    tokens = np.asarray(draw(jax.random.key(1), 1)[0][0])
    result = {"accuracy": share, **trained.figures, "test_examples": _TEST_EXAMPLES}
    return runs.report(
        workdir,
        result,
        lambda: save_patterns(trained.model, tokens, workdir / "attention.png"),
    )


def make_optimizer(
    learning_rate: float, steps: int, *, warmup: int = 100, clip: float = 1.0
) -> optax.GradientTransformation:
    """Adam after clipping; the step size warms up, then decays to 0."""
    rate = updates.warmup_cosine(learning_rate, steps, warmup=warmup)
    return optax.chain(optax.clip_by_global_norm(clip), optax.adam(rate))


def make_loss(draw: Draw, batch_size: int) -> updates.LossFn:
    """Makes the mean loss of the answers to new examples; `accuracy` is that in training."""

    def loss_fn(model, key, data):
        del data
        tokens, answers = draw(key, batch_size)
        asked = answers >= 0
        count = asked.sum(dtype=jnp.float32)
        logits = model(devices.shard_sequences(tokens))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(answers, 0))
        right = (logits.argmax(-1) == answers).astype(jnp.float32)
        loss, share = (jnp.where(asked, x, 0).sum() / count for x in (losses, right))
        return loss, {"accuracy": share}

    return loss_fn


def examples(key: jax.Array, count: int, *, length: int, pairs: int) -> tuple[jax.Array, jax.Array]:
    """Draws examples, see `Draw`: pairs of a key and a value, then keys.

    Keys are of the lower half of the vocabulary, values of the upper one.
    """
    half = NUM_TOKENS["recall"] // 2
    keys_key, values_key, asked_key = jax.random.split(key, 3)
    _, keys = jax.lax.top_k(jax.random.uniform(keys_key, (count, half)), pairs)
    values = jax.random.randint(values_key, (count, pairs), half, 2 * half)
    asked = jax.random.randint(asked_key, (count, length - 2 * pairs), 0, pairs)
    told = jnp.stack([keys, values], -1).reshape(count, 2 * pairs)
    questions, answers = (jnp.take_along_axis(x, asked, axis=1) for x in (keys, values))
    tokens, answers = ((told, questions), (jnp.full_like(told, -1), answers))
    return jnp.concatenate(tokens, axis=1), jnp.concatenate(answers, axis=1)


@evaluation.compiled
def said(model: TransformerLM, tokens: jax.Array) -> jax.Array:
    """The likeliest token after each of int32 [n, T], in evaluation."""
    return evaluation.deterministic(model)(tokens).argmax(-1)


def accuracy(model: TransformerLM, tokens: jax.Array, answers: jax.Array) -> float:
    """The share of right answers, see `Draw`, in evaluation."""
    tokens, answers = np.asarray(tokens), np.asarray(answers)
    told = evaluation.in_parts(lambda part: np.asarray(said(model, part)), tokens, at_once=_AT_ONCE)
    return float((told == answers)[answers >= 0].mean())
