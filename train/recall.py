"""The recall task: what value stood next to this key?

Pairs of a key and a value, all keys different, and then keys alone, each to be answered with its
value: multi-query associative recall (arXiv 2312.04927), with a question at every later token. No
distance tells where an answer is, only what stands there.
"""

import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hyperlayer_jax.nn import TransformerLM
from train import devices, evaluation, loop, runs, transformer_config, updates
from train.patterns import save_patterns
from train.transformer_config import NUM_TOKENS, Config

_TEST_EXAMPLES, _AT_ONCE, _NUM_EVALUATIONS = 256, 32, 10


def train_and_evaluate(config: Config, workdir: pathlib.Path) -> dict[str, Any]:
    """Trains a model on new examples in every step; `accuracy` is the share of right answers."""
    key = jax.random.key(config.seed)
    sizes = {"length": config.length, "pairs": config.pairs}

    def loss_fn(model, key, data):
        del data
        tokens, answers = examples(key, config.batch_size, **sizes)
        logits = model(devices.shard_sequences(tokens))[:, 2 * config.pairs :]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, answers)
        right = (logits.argmax(-1) == answers).astype(jnp.float32)
        return losses.mean(), {"accuracy": right.mean()}

    def evaluate(model, step):
        del step
        return {"validation_accuracy": accuracy(model, jax.random.key(1), **sizes)}

    model = loop.build(make_model, config)
    rate = updates.warmup_cosine(config.learning_rate, config.steps, warmup=config.warmup)
    trained = loop.train(
        model,
        optax.chain(optax.clip_by_global_norm(config.clip), optax.adam(rate)),
        loss_fn,
        (),
        config=config,
        key=key,
        steps=config.steps,
        workdir=workdir,
        batch_size=config.batch_size,
        evaluate=evaluate,
        evaluate_every=math.ceil(config.steps / _NUM_EVALUATIONS),
    )
    share = accuracy(trained.model, jax.random.key(2), **sizes)
    print(f"{config.pairs} pairs in {config.length} tokens: {share:.4f} of answers are right")
    tokens = np.asarray(examples(jax.random.key(1), 1, **sizes)[0][0])
    result = {"accuracy": share, **trained.figures, "test_examples": _TEST_EXAMPLES}
    return runs.report(
        workdir,
        result,
        lambda: save_patterns(trained.model, tokens, workdir / "attention.png"),
    )


def make_model(config: Config) -> TransformerLM:
    """Makes the model that a config describes."""
    return quieted(transformer_config.make_model(config))


def quieted(model: TransformerLM) -> TransformerLM:
    """The model with layers that at first add nothing, so that tokens say what they are."""
    for block in model.blocks:
        for last in (block.attention.out_proj, block.down_proj):
            last.kernel[...] = jnp.zeros_like(last.kernel[...])
    return model


def examples(key: jax.Array, count: int, *, length: int, pairs: int) -> tuple[jax.Array, jax.Array]:
    """Draws examples: int32 tokens [count, length], and answers [count, length - 2 pairs].

    Keys are of the lower half of the vocabulary, values of the upper one. Answers are those to the
    last tokens.
    """
    half = NUM_TOKENS["recall"] // 2
    keys_key, values_key, asked_key = jax.random.split(key, 3)
    _, keys = jax.lax.top_k(jax.random.uniform(keys_key, (count, half)), pairs)
    values = jax.random.randint(values_key, (count, pairs), half, 2 * half)
    asked = jax.random.randint(asked_key, (count, length - 2 * pairs), 0, pairs)
    told = jnp.stack([keys, values], -1).reshape(count, 2 * pairs)
    questions, answers = (jnp.take_along_axis(x, asked, axis=1) for x in (keys, values))
    return jnp.concatenate([told, questions], axis=1), answers


@evaluation.compiled
def _answers(model, tokens):
    return evaluation.deterministic(model)(tokens).argmax(-1)


def accuracy(model: TransformerLM, key: jax.Array, *, length: int, pairs: int) -> float:
    """The share of right answers to new examples, in evaluation."""
    tokens, answers = examples(key, _TEST_EXAMPLES, length=length, pairs=pairs)
    said = evaluation.in_parts(
        lambda part: np.asarray(_answers(model, part)), np.asarray(tokens), at_once=_AT_ONCE
    )
    return float((said[:, 2 * pairs :] == np.asarray(answers)).mean())
