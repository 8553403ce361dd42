"""A layer that computes its own sparse matrix from its input: it learns to turn a list.

The input is a list of 8 random numbers and, one-hot, how far to turn it. A hypernetwork of two dense
layers says for each output which input to copy. The baseline, a dense network of more parameters,
sees the same lists; both are tested on lists that are new. With JAX's random numbers, on any CPU:

  python examples/hypernetwork.py
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from hyperlayer_jax.nn import HyperLayer, MLPTuples

SIZE, BATCH, STEPS = 8, 64, 3000


def example(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Inputs [BATCH, 2 SIZE], and the lists turned [BATCH, SIZE]."""
    of_lists, of_turns = jax.random.split(key)
    lists = jax.random.normal(of_lists, (BATCH, SIZE))
    turns = jax.random.randint(of_turns, (BATCH,), 0, SIZE)
    inputs = jnp.concatenate([lists, jax.nn.one_hot(turns, SIZE)], -1)
    return inputs, jax.vmap(jnp.roll)(lists, turns)


def train(model: nnx.Module) -> float:
    """Trains a model; returns the mean squared error of its evaluation on new lists."""
    optimizer = optax.adam(optax.cosine_decay_schedule(0.01, STEPS))
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def step(carry, key):
        params, rest, state = carry

        def loss(params):
            model, (x, y) = nnx.merge(graph, params, rest, copy=True), example(key)
            return ((model(x) - y) ** 2).mean(), nnx.split(model, nnx.Param, ...)[2]

        gradients, rest = jax.grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(gradients, state)
        return (optax.apply_updates(params, updates), rest, state), None

    keys = jax.random.split(jax.random.key(1), STEPS)
    carry, _ = jax.jit(lambda carry: jax.lax.scan(step, carry, keys))(
        (params, rest, optimizer.init(params))
    )
    model = nnx.view(nnx.merge(graph, *carry[:2]), deterministic=True, raise_if_not_found=False)
    x, y = example(jax.random.key(2))
    return float(((model(x) - y) ** 2).mean())


if __name__ == "__main__":
    rngs = nnx.Rngs(0)
    tuples = MLPTuples(2 * SIZE, (SIZE,), 1, (2 * SIZE,), values=1.0, rngs=rngs)
    layer = HyperLayer(tuples, 2 * SIZE, SIZE, by_output=True, rngs=rngs)
    dense = nnx.Sequential(nnx.Linear(16, 128, rngs=rngs), nnx.relu, nnx.Linear(128, 8, rngs=rngs))
    print(f"error of a list as it is: 1.75, of the dense network: {train(dense):.3f}")
    print(f"error of the hyperlayer: {train(layer):.3f}")
