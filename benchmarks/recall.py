"""Recall by pattern of attention: pairs of key and value, and a needle far away.

Every model has a layer that sees a window and one of the pattern, trained alike and tested also on
sequences that are longer. "topk" is a baseline of ours after NSA (arXiv 2502.11089): blocks of
keys chosen by the score of their mean, and all means, and a window, weighted by gates.

  python -m benchmarks.recall --patterns=content,dense,topk --steps=1000
  python -m benchmarks.recall --task=needle --patterns=content --length=256 --longest=16384
"""

import functools
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx

from benchmarks import command, seeds
from hyperlayer_jax import RowSparseTensor, sparse_attention
from hyperlayer_jax.nn import SparseSelfAttention, TransformerLM
from hyperlayer_jax.nn.linear import TokenLinear
from hyperlayer_jax.nn.patterns import PATTERNS, Content, Dense, Window
from hyperlayer_jax.nn.rotary import rotate
from hyperlayer_jax.nn.window import window_attention
from train import recall
from train.transformer_config import NUM_TOKENS, quieted

_WINDOW, _BLOCK, _CHOSEN = 16, 8, 2
_AT_ONCE = 50
_PATTERNS = ("content", "dense", "window", "learned", "block", "topk")

# Zoology's: the number of examples of a length with so many pairs, and what is tested.
_VOCABULARY, _POWER = 8192, 0.01
_TRAINED = ((64, 4, 100), (128, 8, 20), (256, 16, 20), (256, 32, 20), (256, 64, 20))
_TESTED = ((64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256))


class BlockTopK(nnx.Module):
    """Attention over blocks of keys that are chosen by their means, over all means, and a window.

    Each of the three has keys and values of its own; gates add them up (NSA, equation 5). Blocks
    are those that are past; a mean is of what a block projects to, linearly.
    """

    def __init__(self, features: int, num_heads: int, *, rngs: nnx.Rngs):
        """Makes the projections."""
        self.num_heads = num_heads
        linear = functools.partial(TokenLinear, features, use_bias=False, rngs=rngs)
        self.qkv_proj = linear(7 * features)
        self.gate_proj = TokenLinear(features, 3 * num_heads, rngs=rngs)
        self.out_proj = linear(features)

    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        """Maps tokens [B, T, E] to tokens; T in whole blocks."""
        del mask
        batch, length, features = x.shape
        heads = (batch, length, 7, self.num_heads, features // self.num_heads)
        query, *keys_values = jnp.moveaxis(self.qkv_proj(x).reshape(heads), 2, 0)
        rows, blocks = jnp.arange(length), jnp.arange(length // _BLOCK)
        query, *keys_values[::2] = (rotate(y, rows) for y in (query, *keys_values[::2]))
        means = [y.reshape(batch, -1, _BLOCK, *y.shape[2:]).mean(2) for y in keys_values[:2]]
        past = (blocks[None] + 1) * _BLOCK <= rows[:, None] + 1
        scores = jnp.einsum("btnh,bsnh->bnts", query, means[0]) * heads[-1] ** -0.5
        scores = jnp.where(past[None, None], scores, -1e9)
        shares = jnp.where(past[None, None], jax.nn.softmax(scores), 0)
        compressed = jnp.einsum("bnts,bsnh->btnh", shares, means[1])
        best, chosen = jax.lax.top_k(jax.lax.stop_gradient(shares), min(_CHOSEN, blocks.size))
        columns = (chosen[..., None] * _BLOCK + jnp.arange(_BLOCK)).reshape(*best.shape[:3], -1)
        weights = jnp.repeat((best > 0).astype(jnp.float32), _BLOCK, axis=-1)
        pattern = RowSparseTensor(columns[..., None], weights, (length,), (length,))
        selected = sparse_attention(query, *keys_values[2:4], pattern)
        near = window_attention(query, *keys_values[4:], window=_WINDOW, causal=True)
        gates = jax.nn.sigmoid(self.gate_proj(x)).reshape(batch, length, 3, self.num_heads, 1)
        out = sum(gates[:, :, i] * y for i, y in enumerate((compressed, selected, near)))
        return self.out_proj(out.reshape(x.shape))


def make_model(
    name: str, num_tokens: int, features: int, heads: int, length: int, *, seed: int
) -> TransformerLM:
    """A layer of "window", then one of the pattern of this name, or "topk"."""

    def attention(*sizes, pattern, rngs, **options):
        if pattern is chosen:
            return BlockTopK(*sizes[:2], rngs=rngs)
        return SparseSelfAttention(*sizes, pattern=pattern, rngs=rngs, **options)

    near, chosen = Window(window=_WINDOW), Dense()
    layer = {"topk": chosen, "content": Content(window=_WINDOW)}.get(name) or PATTERNS[name]
    model = TransformerLM(
        num_tokens,
        features,
        heads,
        length,
        layers=[near, layer],
        attention=attention,
        rngs=nnx.Rngs(seed),
    )
    return quieted(model)


def needle(key: jax.Array, count: int, *, length: int) -> tuple[jax.Array, jax.Array]:
    """A token that stands before a value somewhere, and is the last one, too: see `recall.Draw`."""
    half = NUM_TOKENS["recall"] // 2
    place_key, value_key, key = jax.random.split(key, 3)
    tokens = jax.random.randint(key, (count, length), 1, half)
    place = jax.random.randint(place_key, (count,), 0, length - 2)
    value = jax.random.randint(value_key, (count,), half, 2 * half)
    at = jnp.arange(count)
    tokens = tokens.at[at, place].set(0).at[at, place + 1].set(value).at[:, -1].set(0)
    return tokens, jnp.full_like(tokens, -1).at[:, -1].set(value)


def zoology(
    key: jax.Array, count: int, *, length: int, pairs: int, total: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """Multi-query associative recall as zoology draws it (arXiv 2312.04927): see `recall.Draw`.

    After the pairs, every key is asked for once, most of them soon, among tokens that are drawn
    from all.

    Args:
      key: a PRNG key.
      count: examples.
      length: of an example.
      pairs: of key and value; a quarter of the length at most.
      total: with so many tokens, the last ones 0; `length` where None.
    """
    half = _VOCABULARY // 2
    keys_key, values_key, gaps_key, key = jax.random.split(key, 4)

    def choose(key, scores):
        return jax.lax.top_k(scores[None] + jax.random.gumbel(key, (count, scores.size)), pairs)[1]

    keys = 1 + choose(keys_key, jnp.zeros(half - 1))
    values = half + choose(values_key, jnp.zeros(half))
    space = (length - 2 * pairs) // 2
    likely = (_POWER - 1) * jnp.log1p(jnp.arange(space, dtype=jnp.float32))
    places = 2 * pairs + 2 * choose(gaps_key, likely)
    rows = jnp.arange(count)[:, None]
    tokens = jax.random.randint(key, (count, length), 0, _VOCABULARY)
    told = jnp.stack([keys, values], -1).reshape(count, 2 * pairs)
    tokens = tokens.at[:, : 2 * pairs].set(told).at[rows, places].set(keys)
    answers = jnp.full_like(tokens, -1).at[rows, places].set(values)
    rest = [(0, 0), (0, (length if total is None else total) - length)]
    return jnp.pad(tokens, rest), jnp.pad(answers, rest, constant_values=-1)


def zoology_mixture(key: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """A batch of one of the lengths that are trained on, of those that it has examples of."""
    which_key, key = jax.random.split(key)
    longest = max(length for length, _, _ in _TRAINED)
    draws = [
        functools.partial(zoology, count=count, length=length, pairs=pairs, total=longest)
        for length, pairs, _ in _TRAINED
    ]
    shares = jnp.array([number for *_, number in _TRAINED], jnp.float32)
    which = jax.random.categorical(which_key, jnp.log(shares))
    return jax.lax.switch(which, draws, key)


def fit(models: list[TransformerLM], draw: recall.Draw, *, seed: int) -> list[nnx.State]:
    """Trains models of one kind side by side, as the flags say; returns their states."""
    given = flags.FLAGS
    optimizer = recall.make_optimizer(given.learning_rate, given.steps)
    loss_fn = recall.make_loss(draw, given.batch_size)
    options = {"seed": seed, "steps": given.steps, "every": _AT_ONCE}
    for done in seeds.train(models, optimizer, loss_fn, (), **options):
        for i, row in enumerate(done.scalars):
            line = "  seed {}, step {}: loss {loss:.4f}, accuracy {accuracy:.4f}"
            print(line.format(seed + i, done.step, **row), flush=True)
    return done.states


def test(model: TransformerLM, draw: recall.Draw, length: int) -> dict[str, float]:
    """The share of right answers, and what a token costs, in evaluation."""
    count = max(1, 2**13 // length)
    right, seconds = [], []
    for i in range(max(4, 64 // count)):
        tokens, answers = draw(jax.random.fold_in(jax.random.key(123), i), count)
        begin = time.perf_counter()
        said = np.asarray(recall.said(model, tokens))
        seconds.append(time.perf_counter() - begin)
        right.append((said == answers)[answers >= 0])
    cost = 1e6 * float(np.median(seconds[1:])) / count / length
    return {"accuracy": float(np.concatenate(right).mean()), "us_per_token": cost}


def main(argv):
    """Trains and tests models of all patterns and seeds."""
    del argv
    given, cases = flags.FLAGS, []
    draw, tested = _task(given)
    num_tokens = _VOCABULARY if given.task == "zoology" else NUM_TOKENS["recall"]
    all_seeds = range(given.seed, given.seed + given.seeds)
    for pattern in given.patterns:
        make = functools.partial(make_model, pattern, num_tokens, given.features, given.heads)
        try:
            models = [make(given.length, seed=seed) for seed in all_seeds]
        except ValueError as error:
            raise app.UsageError(f"{pattern}: {error}") from error
        states = fit(models, draw, seed=given.seed)
        for name, length, draw_test in tested:
            for seed, state in zip(all_seeds, states, strict=True):
                model = make(length, seed=seed)
                nnx.update(model, state)
                figures = test(model, draw_test, length)
                cases.append({"name": f"{pattern}, seed {seed}, {name}", **figures})
                line = "{name}: accuracy {accuracy:.4f}, {us_per_token:.3g} us a token"
                print(line.format(**cases[-1]), flush=True)
    print(json.dumps({"task": given.task, "steps": given.steps, "cases": cases}))


def _task(given: flags.FlagValues) -> tuple[recall.Draw, list[tuple[str, int, recall.Draw]]]:
    """What to train on, and what to test on: a name, a length, and examples of it."""
    if given.task == "zoology":
        return zoology_mixture, [
            (
                f"{pairs} pairs in {length} tokens",
                length,
                functools.partial(zoology, length=length, pairs=pairs),
            )
            for length, pairs in _TESTED
        ]
    lengths = [given.length * 4**i for i in range(8) if given.length * 4**i <= given.longest]
    share = given.pairs / given.length
    if not lengths:
        raise app.UsageError(f"--longest: want at least --length={given.length}")
    if given.task == "recall" and not (
        share < 0.5 and share * lengths[-1] <= NUM_TOKENS["recall"] // 2
    ):
        raise app.UsageError(
            f"--pairs: got {given.pairs}, want less than half of --length={given.length}, and no "
            f"more than {NUM_TOKENS['recall'] // 2} in {lengths[-1]} tokens"
        )

    def draw(length):
        if given.task == "needle":
            return functools.partial(needle, length=length)
        return functools.partial(recall.examples, length=length, pairs=round(share * length))

    return draw(given.length), [(f"{length} tokens", length, draw(length)) for length in lengths]


if __name__ == "__main__":
    flags.DEFINE_enum("task", "recall", ["recall", "needle", "zoology"], "What is asked for.")
    command.define_choices("patterns", _PATTERNS, "Of the second layer.")
    flags.DEFINE_integer("seed", 0, "The first seed.", lower_bound=0)
    flags.DEFINE_integer("seeds", 1, "Runs of each pattern.", lower_bound=1)
    flags.DEFINE_integer("length", 256, "Tokens of an example to learn from.", lower_bound=4)
    flags.DEFINE_integer("longest", 1024, "Also tested on up to so many, times 4.", lower_bound=1)
    flags.DEFINE_integer("pairs", 64, "Of key and value, in --length tokens.", lower_bound=1)
    flags.DEFINE_integer("steps", 300, "Updates.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 8, "Examples in an update.", lower_bound=1)
    flags.DEFINE_integer("features", 64, "Width of the model.", lower_bound=1)
    flags.DEFINE_integer("heads", 4, "Of attention.", lower_bound=1)
    flags.DEFINE_float("learning_rate", 3e-3, "Of Adam, at its highest.", lower_bound=0.0)
    command.run(main)
