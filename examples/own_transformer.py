"""A sparse layer in a transformer of one's own: which token back is the one that matters?

Sequences are records of 24 tokens, each like the record before but for a tenth of its tokens, so the best
guess of the next token is the one 24 places back, which nobody tells the model. The baseline is the same
model with a window of 8 tokens.

  python examples/own_transformer.py
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from hyperlayer_jax.nn import SparseSelfAttention, shorten_steps

TOKENS, RECORD, LENGTH, FEATURES = 16, 24, 72, 32


class Model(nnx.Module):
    def __init__(self, pattern: str, *, rngs: nnx.Rngs):
        self.embed = nnx.Embed(TOKENS, FEATURES, rngs=rngs)
        self.attention = SparseSelfAttention(
            FEATURES, 2, LENGTH, pattern=pattern, num_tuples=2, num_global=8, window=8, rotary=False, rngs=rngs
        )
        self.norm = nnx.LayerNorm(FEATURES, rngs=rngs)
        self.logits = nnx.Linear(FEATURES, TOKENS, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens)
        return self.logits(self.norm(x + self.attention(x)))


def draw(key: jax.Array, batch: int) -> jax.Array:
    """Sequences int32 [batch, LENGTH + 1]."""
    first, new, where = jax.random.split(key, 3)
    tokens = jax.random.randint(first, (batch, RECORD), 0, TOKENS)
    records = [tokens]
    for a, b in zip(jax.random.split(new, 3), jax.random.split(where, 3), strict=True):
        other = jax.random.randint(a, tokens.shape, 0, TOKENS)
        records.append(jnp.where(jax.random.uniform(b, tokens.shape) < 0.1, other, records[-1]))
    return jnp.concatenate(records, 1)[:, : LENGTH + 1]


@nnx.jit
def train_step(model: Model, optimizer: nnx.Optimizer, key: jax.Array) -> jax.Array:
    tokens = draw(key, 32)

    def loss_fn(model):
        logits = model(tokens[:, :-1])[:, RECORD:]
        targets = tokens[:, RECORD + 1 :]
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    loss, gradients = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, gradients)
    return loss


def main(steps: int = 600) -> dict[str, float]:
    """Trains both, and returns how many tokens of other sequences they tell right."""
    figures, tokens = {}, draw(jax.random.key(1), 64)
    for pattern in ("static", "window"):
        model = Model(pattern, rngs=nnx.Rngs(0))
        optimizer = optax.chain(optax.adam(0.01), optax.stateless(shorten_steps(model)))
        optimizer = nnx.Optimizer(model, optimizer, wrt=nnx.Param)
        for i,key in enumerate(jax.random.split(jax.random.key(2), steps)):
            l=train_step(model, optimizer, key)
            if i%100==0: print(i,l)
        guesses = nnx.view(model, deterministic=True)(tokens[:, :-1])[:, RECORD:].argmax(-1)
        figures[pattern] = float((guesses == tokens[:, RECORD + 1 :]).mean())
        print(f"{pattern}: accuracy {figures[pattern]:.3f}")
    return figures


if __name__ == "__main__":
    main()
