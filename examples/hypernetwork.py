"""A layer that computes its own sparse matrix from its input: it learns to cut out what is marked.

python examples/hypernetwork.py
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from hyperlayer_jax.nn import AdaptiveTuples, FreeTuples, HyperLayer, Sampler

SIZE, CUT = 32, 5


def example(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Smooth signals and, one-hot, places [64, 2, SIZE]; the samples from there on [64, CUT]."""
    noise = jax.random.normal(key, (64, SIZE + 8))
    signals = sum(noise[:, i : i + SIZE] for i in range(8)) / 8**0.5
    places = jax.random.randint(jax.random.fold_in(key, 0), (64,), 0, SIZE - CUT + 1)
    marked = jnp.take_along_axis(signals, places[:, None] + jnp.arange(CUT), 1)
    return jnp.stack([signals, jax.nn.one_hot(places, SIZE)], 1), marked


def train(model: nnx.Module, steps: int, penalty=lambda model, x: 0.0) -> float:
    """Trains with a penalty (on sigmas: evaluation rounds); returns the error on new signals."""
    optimizer = optax.adam(optax.cosine_decay_schedule(0.01, steps))
    optimizer = nnx.Optimizer(model, optimizer, wrt=nnx.Param)

    def loss(model, x, y):
        return ((model(x) - y) ** 2).mean() + penalty(model, x)

    @nnx.jit
    def step(model, optimizer, key):
        optimizer.update(model, nnx.grad(loss)(model, *example(key)))

    for key in jax.random.split(jax.random.key(1), steps):
        step(model, optimizer, key)
    model = nnx.view(model, deterministic=True, raise_if_not_found=False)
    x, y = jax.vmap(example)(jax.random.split(jax.random.key(3), 100))
    return round(float(((model(x) - y) ** 2).mean()), 4)


def main(steps: int = 1500) -> dict[str, float]:
    """Trains both, and returns their errors."""
    rngs = nnx.Rngs(0)
    axes = {"axis": (-2, -1), "rngs": rngs}
    features = nnx.Sequential(nnx.LinearGeneral((2, SIZE), 64, **axes), nnx.relu)
    start = FreeTuples((CUT,), 1, (SIZE,), values=1.0, sigma_scale=0.2, rngs=rngs)
    tuples = AdaptiveTuples(features, 64, start, rngs=rngs)
    template = jnp.zeros((CUT, 3), int).at[:, 0].set(jnp.arange(CUT))  # output, channel, place
    options = {"sampler": Sampler(num_global=4, evaluation="round", rngs=rngs), "rngs": rngs}
    layer = HyperLayer(tuples, (2, SIZE), CUT, template=template, columns=(2,), **options)
    error = train(layer, steps, lambda layer, x: layer.hypernetwork(x).sigmas.mean() * 0.1 / SIZE)
    dense = nnx.LinearGeneral((2, SIZE), 80, **axes), nnx.relu, nnx.Linear(80, CUT, rngs=rngs)
    return {"hypernetwork": error, "dense network": train(nnx.Sequential(*dense), steps)}


if __name__ == "__main__":
    print("errors on new signals:", main())
