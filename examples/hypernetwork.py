"""A layer that computes its own sparse matrix from its input: it learns to cut out what is marked.

The input is a smooth signal and, one-hot, a place; wanted are the five samples from there on.

  python examples/hypernetwork.py
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from hyperlayer_jax.nn import HyperLayer, MLPTuples, Sampler

SIZE, CUT = 32, 5


def example(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Signals and places [64, 2, SIZE], and what is marked [64, CUT]."""
    noise, places = jax.random.split(key)
    noise = jax.random.normal(noise, (64, SIZE + 8))
    signals = sum(noise[:, i : i + SIZE] for i in range(8)) / 8**0.5
    places = jax.random.randint(places, (64,), 0, SIZE - CUT + 1)
    cut = jax.vmap(lambda x, place: jax.lax.dynamic_slice(x, (place,), (CUT,)))
    return jnp.stack([signals, jax.nn.one_hot(places, SIZE)], 1), cut(signals, places)


def train(model: nnx.Module, steps: int, sigmas=lambda model, x: 0.0) -> float:
    """Trains a model; returns its error on new signals. Narrow Gaussians are rounded best."""
    schedule = optax.cosine_decay_schedule(0.01, steps)
    optimizer = nnx.Optimizer(model, optax.adam(schedule), wrt=nnx.Param)

    def loss(model, x, y, penalty=0.1 / SIZE):
        return ((model(x) - y) ** 2).mean() + penalty * sigmas(model, x)

    @nnx.jit
    def step(model, optimizer, key):
        optimizer.update(model, nnx.grad(loss)(model, *example(key)))

    for key in jax.random.split(jax.random.key(1), steps):
        step(model, optimizer, key)
    model = nnx.view(model, deterministic=True, raise_if_not_found=False)
    return round(float(loss(model, *example(jax.random.key(2)), 0)), 4)


def main(steps: int = 1500) -> dict[str, float]:
    """Trains both, and returns their errors."""
    rngs = nnx.Rngs(0)
    tuples = MLPTuples((2, SIZE), (CUT,), 1, (SIZE,), values=1.0, sigma_scale=0.2, rngs=rngs)
    template = jnp.zeros((CUT, 3), int).at[:, 0].set(jnp.arange(CUT))  # output, channel, place
    options = {"sampler": Sampler(num_global=4, evaluation="round", rngs=rngs), "rngs": rngs}
    layer = HyperLayer(tuples, (2, SIZE), CUT, template=template, columns=(2,), **options)
    error = train(layer, steps, lambda layer, x: layer.hypernetwork(x).sigmas.mean())
    dense = [nnx.Linear(2 * SIZE, 80, rngs=rngs), nnx.relu, nnx.Linear(80, CUT, rngs=rngs)]
    baseline = train(nnx.Sequential(lambda x: x.reshape(64, -1), *dense), steps)
    return {"hypernetwork": error, "dense network": baseline}


if __name__ == "__main__":
    print("errors on new signals:", main())
