"""A language model of bytes: how it is trained, and what is reported of it."""

import functools
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hyperlayer_jax.nn import TransformerLM, generate
from train import devices, evaluation, loop, runs, text, updates
from train.patterns import save_patterns
from train.transformer_config import Config, make_model

_VALIDATION_WINDOWS, _TEST_WINDOWS, _TOKENS_AT_ONCE = 128, 1024, 2**13
_NUM_EVALUATIONS = 5
_SAMPLES, _PROMPT = 3, 64
_WEIGHT_DECAY = 0.01


def train_and_evaluate(config: Config, workdir: pathlib.Path) -> dict[str, Any]:
    """Trains a language model; writes where it looks, and texts that it continued."""
    corpus = text.load(config.corpus, config.data_dir)
    validation = text.windows(corpus.validation, config.length, _VALIDATION_WINDOWS)
    test = text.windows(corpus.test, config.length, _TEST_WINDOWS)
    text.windows(corpus.train, config.length, 1)
    size = sum(len(part) for part in corpus[:3])
    print(f"{config.corpus}: {size} bytes, sha256 {corpus.sha256}", flush=True)

    def loss_fn(model, key, fit):
        starts = jax.random.randint(key, (config.batch_size,), 0, len(fit) - config.length)
        within = jnp.arange(config.length + 1, dtype=jnp.int32)
        loss = token_losses(model, fit[starts[:, None] + within[None]]).mean()
        return loss, {"bits_per_byte": loss / math.log(2)}

    def draw_layers(model, step):
        tokens = validation[0, :-1].astype(np.int32)
        save_patterns(model, tokens, workdir / f"attention-{step}.png")

    def evaluate(model, step):
        if step == 0:
            draw_layers(model, step)
        return {"validation_bits_per_byte": bits_per_byte(model, validation)}

    trained = loop.train(
        loop.build(make_model, config),
        make_optimizer(config),
        loss_fn,
        corpus.train,
        config=config,
        key=jax.random.key(config.seed),
        steps=config.steps,
        workdir=workdir,
        batch_size=config.batch_size,
        evaluate=evaluate,
        evaluate_every=math.ceil(config.steps / _NUM_EVALUATIONS),
        best=lambda validation: -validation["validation_bits_per_byte"],
    )
    model = trained.model
    result = {"bits_per_byte": bits_per_byte(model, test), **text.count_bits(corpus.train, test)}
    prompts = test[:_SAMPLES, : min(_PROMPT, config.length // 2)]
    continued = _continue(model, jax.random.key(config.seed), prompts, config)
    print(continued)
    print(f"bits per byte of {test[:, 1:].size} bytes of held-out text:")
    for name, figure in (
        ("this model", "bits_per_byte"), ("bigrams", "bigram"), ("unigrams", "unigram"),
    ):  # fmt: skip
        print(f"  {name:12}  {result[figure]:.4f}")

    def draw():
        (workdir / "continued.txt").write_text(continued + "\n", encoding="utf-8")
        draw_layers(model, trained.figures["steps"])

    figures = {**result, **trained.figures, "test_examples": len(test), "sha256": corpus.sha256}
    return runs.report(workdir, figures, draw)


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """AdamW after clipping; the step size warms up, then decays to 0."""
    schedule = updates.warmup_cosine(config.learning_rate, config.steps, warmup=config.warmup)
    return optax.chain(
        optax.clip_by_global_norm(config.clip), optax.adamw(schedule, weight_decay=_WEIGHT_DECAY)
    )


def token_losses(model: TransformerLM, tokens: jax.Array) -> jax.Array:
    """Losses in nats, [B, T], of predicting each of the tokens [B, T + 1] from those before."""
    tokens = tokens.astype(jnp.int32)
    tokens, targets = devices.shard_sequences((tokens[:, :-1], tokens[:, 1:]))
    return optax.softmax_cross_entropy_with_integer_labels(model(tokens), targets)


@evaluation.compiled
def _mean_losses(model, windows):
    return token_losses(evaluation.deterministic(model), windows).mean(-1)


def bits_per_byte(model: TransformerLM, windows: np.ndarray) -> float:
    """Bits per byte on windows uint8 [n, length + 1], in evaluation."""
    at_once = max(1, _TOKENS_AT_ONCE // (windows.shape[1] - 1))
    losses = evaluation.in_parts(functools.partial(_mean_losses, model), windows, at_once=at_once)
    return float(losses.mean(dtype=np.float64)) / math.log(2)


def _continue(model: TransformerLM, key: jax.Array, prompts: np.ndarray, config: Config) -> str:
    """Continuations of prompts uint8 [n, length], as a text for people."""
    drawn = generate(
        key,
        model,
        jnp.asarray(prompts, jnp.int32),
        num_tokens=config.length - prompts.shape[1],
        temperature=config.temperature,
    )
    pairs = zip(prompts, np.asarray(drawn, np.uint8), strict=True)
    shown = [[part.tobytes().decode(errors="replace") for part in pair] for pair in pairs]
    return "\n".join(f"--- a text:\n{prompt}\n--- continued:\n{rest}" for prompt, rest in shown)
