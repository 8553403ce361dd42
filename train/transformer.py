"""Trains a language model whose layers attend to few bytes, at positions that some of them learn.

The default run reads the sources of Python's standard library, which are on every machine; it takes
a few minutes on two CPU cores. It reports bits per byte of held-out text beside those of models
that count, continues a text, and draws where each layer looks.

The other task has one right answer: which token stood `--offset` places ago? A single layer has to
find a position of which it is told nothing.

  python -m train.transformer
  python -m train.transformer --layers=dddd
  python -m train.transformer --corpus=FILE_OR_FOLDER --length=512
  python -m train.transformer --task=offset --offset=100
"""

import dataclasses
import functools
import math
import pathlib
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from hyperlayer_jax.nn import Sampler, SparseSelfAttention, TransformerLM, generate, shorten_steps
from hyperlayer_jax.nn.patterns import PATTERNS
from train import devices, figures, launcher, loop, runs, text
from train.patterns import draw_patterns

_DEFAULTS = {
    "text": {
        "layers": "wwwl", "positions": "rotary", "length": 256, "features": 128, "num_heads": 4,
        "num_tuples": 4, "num_global": 2, "steps": 1000, "learning_rate": 3e-3,
    },
    "offset": {
        "layers": "s", "positions": "none", "features": 32, "num_heads": 1, "num_tuples": 2,
        "num_global": 32, "steps": 4000, "learning_rate": 1e-2,
    },
}  # fmt: skip
_VALIDATION_WINDOWS, _TEST_WINDOWS, _TOKENS_AT_ONCE = 128, 1024, 2**13
_NUM_EVALUATIONS = 5
_SAMPLES, _PROMPT = 3, 64
# Pictures show the first of the tokens.
_TOKENS_DRAWN = 2048
_NUM_TOKENS = 64
# On the offset task parameters are averaged over about as many steps as there are between looks.
_SOLVED, _OFFSET_INTERVAL, _OFFSET_AVERAGE = 0.001, 50, 0.98


def _by_task(name: str, help: str) -> str:
    values = [f"{defaults[name]} for {task}" for task, defaults in _DEFAULTS.items()]
    return f"{help} By default {', '.join(values)}."


@dataclasses.dataclass(frozen=True)
class Config(launcher.Config):
    """What to predict, and with what."""

    task: Literal["text", "offset"] = launcher.flag("text", "What to predict.")
    corpus: str = launcher.flag(
        "stdlib",
        "stdlib (the sources of Python's standard library), a text file, a folder of them, or the "
        "name of a set of tensorflow-datasets with a feature called text.",
        only={"task": ["text"]},
    )
    data_dir: str | None = launcher.flag(
        None, "Where tensorflow-datasets keeps its sets.", only={"task": ["text"]}, fixed=False
    )
    offset: int = launcher.flag(
        100, "How far back the offset task asks.", minimum=1, below=2**24, only={"task": ["offset"]}
    )
    layers: str | None = launcher.flag(
        None,
        _by_task(
            "layers",
            "A letter for each layer: l learned, s static, 2 learned2d, t strided, w window, "
            "b block, d dense.",
        ),
    )
    positions: Literal["rotary", "learned", "none"] | None = launcher.flag(
        None, _by_task("positions", "How layers know the place of a token.")
    )
    length: int | None = launcher.flag(
        None,
        "Tokens in an example. By default 256 for text, and for the offset task a quarter more "
        "than the offset, in multiples of 64.",
        minimum=2,
        below=2**24,
    )
    features: int | None = launcher.flag(
        None, _by_task("features", "Width of the model."), minimum=1, below=2**16
    )
    num_heads: int | None = launcher.flag(
        None, _by_task("num_heads", "Heads of attention."), minimum=1, below=2**12
    )
    num_tuples: int | None = launcher.flag(
        None,
        _by_task("num_tuples", "Learned positions per token and head."),
        minimum=1,
        below=2**12,
    )
    num_global: int | None = launcher.flag(
        None, _by_task("num_global", "Points per position drawn from all."), minimum=0, below=2**16
    )
    num_local: int = launcher.flag(2, "Points per position drawn near it.", minimum=0, below=2**16)
    region: int = launcher.flag(8, "Positions that count as near.", minimum=1)
    window: int = launcher.flag(8, "Tokens that a window sees.", minimum=1)
    stride: int = launcher.flag(8, "One token in so many looks back in a strided layer.", minimum=1)
    block: int = launcher.flag(32, "Tokens in a block.", minimum=1)
    dropout: float = launcher.flag(
        0.0, "Share of outputs dropped in training.", minimum=0.0, below=1
    )
    bfloat16: bool = launcher.flag(False, "Computes in bfloat16.")
    steps: int | None = launcher.flag(None, _by_task("steps", "Number of updates."), minimum=1)
    batch_size: int = launcher.flag(8, "Examples in an update.", minimum=1, below=2**20)
    learning_rate: float | None = launcher.flag(
        None, _by_task("learning_rate", "Highest step size."), above=0
    )
    warmup: int = launcher.flag(
        100, "Updates until the step size is highest; half of --steps at most.", minimum=0
    )
    clip: float = launcher.flag(1.0, "Largest norm of a gradient.", above=0)
    temperature: float = launcher.flag(
        0.7, "Of the continuations that are drawn.", minimum=0.0, only={"task": ["text"]}
    )

    def __post_init__(self):
        quarter_more = 64 * math.ceil(1.25 * self.offset / 64)
        defaults = {"length": quarter_more, **_DEFAULTS[self.task]}
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        super().__post_init__()
        if self.num_tuples > self.length:
            raise ValueError(
                f"--num_tuples must be at most --length={self.length}, got {self.num_tuples}"
            )
        if self.task == "offset" and self.offset >= self.length:
            raise ValueError(f"--offset must be below --length={self.length}, got {self.offset}")
        try:
            nnx.eval_shape(lambda: make_model(self))
        except ValueError as error:
            raise ValueError(f"--{error}") from error


def make_model(config: Config) -> TransformerLM:
    """Makes the model that a config describes."""
    return TransformerLM(
        text.NUM_BYTES if config.task == "text" else _NUM_TOKENS,
        config.features,
        config.num_heads,
        config.length,
        layers=config.layers,
        positions=config.positions,
        attention=functools.partial(_attention, config),
        dropout=config.dropout,
        dtype=jnp.bfloat16 if config.bfloat16 else None,
        rngs=nnx.Rngs(config.seed),
    )


def _attention(
    config: Config, *sizes: int, pattern: str, rngs: nnx.Rngs, **options: Any
) -> SparseSelfAttention:
    """The attention of one layer, with the flags that its pattern has."""
    kind = PATTERNS[pattern]
    names = [field.name for field in dataclasses.fields(kind) if hasattr(config, field.name)]
    sampler = Sampler(
        num_global=config.num_global,
        num_local=config.num_local,
        region=config.region,
        rngs=rngs,
    )
    own = {name: getattr(config, name) for name in names}
    return SparseSelfAttention(
        *sizes,
        pattern=dataclasses.replace(kind, **own),
        sampler=sampler,
        implementation=config.implementation,
        rngs=rngs,
        **options,
    )


def make_optimizer(config: Config, model: TransformerLM) -> optax.GradientTransformation:
    """AdamW after clipping. The step size warms up; on text, it then decays to 0.

    On the offset task it stays, and those of positions are kept short.
    """
    warmup = min(config.warmup, config.steps // 2)
    text = config.task == "text"
    last, decay = (0.0, 0.01) if text else (config.learning_rate, 0.0)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, warmup, config.steps, last
    )
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(schedule, weight_decay=decay),
        optax.identity() if text else optax.stateless(shorten_steps(model)),
    )


def token_loss(model: TransformerLM, tokens: jax.Array) -> jax.Array:
    """The mean loss, in nats, of predicting each of the tokens [B, T + 1] from those before."""
    tokens = tokens.astype(jnp.int32)
    logits = model(tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


@functools.partial(jax.jit, static_argnums=0)
def _evaluation_loss(graphdef, state, tokens):
    return token_loss(nnx.merge(graphdef, state), tokens)


def bits_per_byte(model: TransformerLM, windows: np.ndarray) -> float:
    """Bits per byte on windows uint8 [n, length + 1], in evaluation."""
    graphdef, state = nnx.split(nnx.view(model, deterministic=True))
    at_once = max(1, _TOKENS_AT_ONCE // (windows.shape[1] - 1))
    parts = np.array_split(windows, math.ceil(len(windows) / at_once))
    total = sum(len(part) * float(_evaluation_loss(graphdef, state, part)) for part in parts)
    return total / len(windows) / math.log(2)


def _save_patterns(model: TransformerLM, tokens: np.ndarray, path: pathlib.Path) -> None:
    """Writes the picture of tokens int32 [T], if there is one."""
    picture = draw_patterns(model, tokens[:_TOKENS_DRAWN])
    if picture is not None:
        figures.save_png(picture, path)
        print(f"picture: {path}")


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


def train_on_text(config: Config, workdir: pathlib.Path) -> dict[str, Any]:
    """Trains a language model; writes where it looks, and texts that it continued."""
    corpus = text.load(config.corpus, config.data_dir)
    validation = text.windows(corpus.validation, config.length, _VALIDATION_WINDOWS)
    test = text.windows(corpus.test, config.length, _TEST_WINDOWS)
    text.windows(corpus.train, config.length, 1)
    size = sum(len(part) for part in corpus[:3])
    print(f"{config.corpus}: {size} bytes, sha256 {corpus.sha256}", flush=True)

    def loss_fn(model, key, step, fit):
        del step
        starts = jax.random.randint(key, (config.batch_size,), 0, len(fit) - config.length)
        within = jnp.arange(config.length + 1, dtype=jnp.int32)
        loss = token_loss(model, devices.shard(fit[starts[:, None] + within[None]]))
        return loss, {"bits_per_byte": loss / math.log(2)}

    def evaluate(model, step):
        if step == 0:
            save_patterns(model, step)
        return {"validation_bits_per_byte": bits_per_byte(model, validation)}

    def save_patterns(model, step):
        tokens = validation[0, :-1].astype(np.int32)
        _save_patterns(model, tokens, workdir / f"attention-{step}.png")

    model = loop.build(make_model, config)
    trained = loop.train(
        model,
        make_optimizer(config, model),
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
    for name, figure in (("this model", "bits_per_byte"), ("bigrams", "bigram")):
        print(f"  {name:12}  {result[figure]:.4f}")
    print(f"  {'unigrams':12}  {result['unigram']:.4f}")

    def draw():
        (workdir / "continued.txt").write_text(continued + "\n", encoding="utf-8")
        save_patterns(model, trained.figures["steps"])

    figures = {**result, **trained.figures, "test_examples": len(test), "sha256": corpus.sha256}
    return runs.report(workdir, figures, draw)


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


def train_on_offset(config: Config, workdir: pathlib.Path) -> dict[str, Any]:
    """Trains a model to tell what stood `--offset` tokens ago; says when it could, and ever since.

    The loss is that on new examples, every few steps, of a moving average of the parameters, since
    steps that stay long keep these in motion. `solved_at` is the step at which it was first below
    0.001 with points sampled as in training, None if it never was, and `steady` the share of later
    losses that were below, too. `loss` is the last one, in evaluation.
    """

    def mean_loss(model, key):
        shape = (config.batch_size, config.length)
        tokens = devices.shard(jax.random.randint(key, shape, 0, _NUM_TOKENS, jnp.int32))
        logits, target = model(tokens)[:, config.offset :], tokens[:, : -config.offset]
        return optax.softmax_cross_entropy_with_integer_labels(logits, target).mean()

    def loss_fn(model, key, step, data):
        del step, data
        return mean_loss(model, key), {}

    model = loop.build(make_model, config)
    graphdef = nnx.split(model)[0]

    @jax.jit
    def losses(state, key):
        sampled = nnx.merge(graphdef, state, copy=True)
        return mean_loss(sampled, key), mean_loss(nnx.view(sampled, deterministic=True), key)

    def evaluate(model, step):
        key = jax.random.fold_in(jax.random.key(config.seed + 1), step)
        sampled, exact = losses(nnx.split(model)[1], key)
        return {"sampled_loss": sampled, "evaluation_loss": exact}

    trained = loop.train(
        model,
        make_optimizer(config, model),
        loss_fn,
        (),
        config=config,
        key=jax.random.key(config.seed),
        steps=config.steps,
        workdir=workdir,
        batch_size=config.batch_size,
        evaluate=evaluate,
        evaluate_every=_OFFSET_INTERVAL,
        average=_OFFSET_AVERAGE,
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
        lambda: _save_patterns(trained.model, tokens, workdir / "attention.png"),
    )


def train_and_evaluate(config: Config, workdir: pathlib.Path) -> dict[str, Any]:
    """Runs the task that the config names, and returns its figures."""
    tasks = {"text": train_on_text, "offset": train_on_offset}
    return tasks[config.task](config, workdir)


if __name__ == "__main__":
    launcher.launch(Config, train_and_evaluate)
