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
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from flax import nnx

from benchmarks import command
from hyperlayer_jax import RowSparseTensor, sparse_attention
from hyperlayer_jax.nn import SparseSelfAttention, TransformerLM
from hyperlayer_jax.nn.linear import TokenLinear
from hyperlayer_jax.nn.patterns import PATTERNS, Content, Dense, Window
from hyperlayer_jax.nn.rotary import rotate
from hyperlayer_jax.nn.window import window_attention
from train import recall, updates
from train.transformer_config import NUM_TOKENS

_WINDOW, _BLOCK, _CHOSEN = 16, 8, 2
_AT_ONCE = 50
_VALUES = NUM_TOKENS["recall"] // 2
_PATTERNS = ("content", "dense", "window", "learned", "block", "topk")

# Tokens [n, T] and the answers [n, a] to the last a of them.
Draw = Callable[[jax.Array, int, int], tuple[jax.Array, jax.Array]]


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


def make_model(name: str, features: int, heads: int, length: int, *, seed: int) -> TransformerLM:
    """A layer of "window", then one of the pattern of this name, or "topk"."""

    def attention(*sizes, pattern, rngs, **options):
        if pattern is chosen:
            return BlockTopK(*sizes[:2], rngs=rngs)
        return SparseSelfAttention(*sizes, pattern=pattern, rngs=rngs, **options)

    near, chosen = Window(window=_WINDOW), Dense()
    layer = {"topk": chosen, "content": Content(window=_WINDOW)}.get(name) or PATTERNS[name]
    model = TransformerLM(
        NUM_TOKENS["recall"],
        features,
        heads,
        length,
        layers=[near, layer],
        attention=attention,
        rngs=nnx.Rngs(seed),
    )
    return recall.quieted(model)


def needle(key: jax.Array, count: int, length: int) -> tuple[jax.Array, jax.Array]:
    """Tokens int32 [count, length] of which one stands before a value, and is the last one, too."""
    place_key, value_key, key = jax.random.split(key, 3)
    tokens = jax.random.randint(key, (count, length), 1, _VALUES)
    place = jax.random.randint(place_key, (count,), 0, length - 2)
    value = jax.random.randint(value_key, (count,), _VALUES, 2 * _VALUES)
    at = jnp.arange(count)
    return tokens.at[at, place].set(0).at[at, place + 1].set(value).at[:, -1].set(0), value[:, None]


def _pairs(share: float, key: jax.Array, count: int, length: int) -> tuple[jax.Array, jax.Array]:
    """Examples of the recall task, of so many pairs a token."""
    return recall.examples(key, count, length=length, pairs=round(share * length))


def fit(model: TransformerLM, draw: Draw, *, seed: int) -> Any:
    """Trains a model, as the flags say; returns its state."""
    given = flags.FLAGS
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    rate = updates.warmup_cosine(given.learning_rate, given.steps, warmup=100)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))

    def loss_fn(params, rest, key):
        tokens, answers = draw(key, given.batch_size, given.length)
        model = nnx.merge(graphdef, params, rest, copy=True)
        logits = model(tokens)[:, -answers.shape[1] :]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, answers)
        return losses.mean(), nnx.state(model, nnx.Not(nnx.Param))

    @jax.jit
    def steps(carry, keys):
        def step(carry, key):
            params, rest, moments = carry
            (loss, rest), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, rest, key)
            updates, moments = optimizer.update(grads, moments)
            return (optax.apply_updates(params, updates), rest, moments), loss

        return jax.lax.scan(step, carry, keys)

    carry = params, rest, optimizer.init(params)
    for first in range(0, given.steps, _AT_ONCE):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), first), _AT_ONCE)
        carry, losses = steps(carry, keys[: given.steps - first])
        print(f"  step {first + len(losses)}: loss {losses.mean():.4f}", flush=True)
    return nnx.merge_state(*carry[:2])


def accuracy(model: TransformerLM, state: Any, draw: Draw, length: int) -> dict[str, float]:
    """The share of right answers, and what a token costs, in evaluation."""
    graphdef = nnx.split(nnx.view(model, deterministic=True))[0]
    count = max(1, 2**13 // length)

    @jax.jit
    def run(state, tokens):
        return nnx.merge(graphdef, state, copy=True)(tokens).argmax(-1)

    right, seconds = [], []
    for i in range(max(4, 64 // count)):
        tokens, answers = draw(jax.random.fold_in(jax.random.key(123), i), count, length)
        begin = time.perf_counter()
        said = np.asarray(run(state, tokens))[:, -answers.shape[1] :]
        seconds.append(time.perf_counter() - begin)
        right.append(said == np.asarray(answers))
    cost = 1e6 * float(np.median(seconds[1:])) / count / length
    return {"accuracy": float(np.mean(right)), "us_per_token": cost}


def main(argv):
    """Trains and tests models of all patterns and seeds."""
    del argv
    given, cases = flags.FLAGS, []
    lengths = [given.length * 4**i for i in range(8) if given.length * 4**i <= given.longest]
    if not lengths:
        raise app.UsageError(f"--longest: want at least --length={given.length}")
    share = given.pairs / given.length
    if given.task == "recall" and not (share < 0.5 and share * lengths[-1] <= _VALUES):
        raise app.UsageError(
            f"--pairs: got {given.pairs}, want less than half of --length={given.length}, and no "
            f"more than {_VALUES} in {lengths[-1]} tokens"
        )
    draw = needle if given.task == "needle" else functools.partial(_pairs, share)
    for pattern in given.patterns:
        for seed in range(given.seed, given.seed + given.seeds):
            make = functools.partial(make_model, pattern, given.features, given.heads, seed=seed)
            state = fit(make(given.length), draw, seed=seed)
            for length in lengths:
                found = accuracy(make(length), state, draw, length)
                cases.append({"name": f"{pattern}, seed {seed}, {length} tokens", **found})
                print(
                    "{name}: accuracy {accuracy:.4f}, {us_per_token:.3g} us a token".format(
                        **cases[-1]
                    ),
                    flush=True,
                )
    print(json.dumps({"task": given.task, "steps": given.steps, "cases": cases}))


if __name__ == "__main__":
    flags.DEFINE_enum("task", "recall", ["recall", "needle"], "What is asked for.")
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
