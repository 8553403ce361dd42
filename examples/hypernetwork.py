"""A layer that computes its own sparse matrix from its input: it learns to cut out what is marked.

The input is a smooth random signal and, one-hot, a place in it; wanted are the five samples from
there on. A hypernetwork says for each output where to read; the baseline is a dense network.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from hyperlayer_jax.nn import AdaptiveTuples, FreeTuples, HyperLayer, Sampler

SIZE, CUT, BATCH, STEPS = 32, 5, 64, 1500


def example(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Signals and places [BATCH, 2, SIZE], and what is marked [BATCH, CUT]."""
    key, of_places = jax.random.split(key)
    noise = jax.random.normal(key, (BATCH, SIZE + 8))
    signals = sum(noise[:, i : i + SIZE] for i in range(8)) / 8**0.5
    places = jax.random.randint(of_places, (BATCH,), 0, SIZE - CUT + 1)
    cut = jax.vmap(lambda x, place: jax.lax.dynamic_slice(x, (place,), (CUT,)))
    return jnp.stack([signals, jax.nn.one_hot(places, SIZE)], 1), cut(signals, places)


def train(model: nnx.Module, sigmas=lambda model, x: 0.0) -> float:
    """Trains a model; returns the mean squared error of its evaluation on new signals."""
    optimizer = optax.adam(optax.cosine_decay_schedule(0.01, STEPS))
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, rest, x, y):
        model = nnx.merge(graph, params, rest, copy=True)
        # Gaussians have to become narrow: evaluation rounds.
        error = ((model(x) - y) ** 2).mean() + 0.1 * sigmas(model, x) / SIZE
        return error, nnx.state(model, nnx.Not(nnx.Param))

    def step(carry, key):
        params, rest, state = carry
        gradients, rest = jax.grad(loss, has_aux=True)(params, rest, *example(key))
        updates, state = optimizer.update(gradients, state)
        return (optax.apply_updates(params, updates), rest, state), None

    keys = jax.random.split(jax.random.key(1), STEPS)
    scan = jax.jit(lambda carry: jax.lax.scan(step, carry, keys)[0])
    model = nnx.merge(graph, *scan((params, rest, optimizer.init(params)))[:2])
    model = nnx.view(model, deterministic=True, raise_if_not_found=False)
    x, y = example(jax.random.key(2))
    return float(((model(x) - y) ** 2).mean())


rngs = nnx.Rngs(0)
flat = lambda x: x.reshape(*x.shape[:-2], 2 * SIZE)  # noqa: E731
features = nnx.Sequential(flat, nnx.Linear(2 * SIZE, 64, rngs=rngs), nnx.relu)
start = FreeTuples((CUT,), 1, (SIZE,), values=1.0, sigma_scale=0.2, rngs=rngs)
tuples = AdaptiveTuples(features, 64, start, rngs=rngs)
# Output o reads channel 0, the signal, at a place that is learned: the last column.
template = jnp.stack([jnp.arange(CUT), jnp.zeros(CUT, int), jnp.zeros(CUT, int)], -1)
options = {"sampler": Sampler(num_global=4, evaluation="round", rngs=rngs), "rngs": rngs}
layer = HyperLayer(tuples, (2, SIZE), CUT, template=template, columns=(2,), **options)
error = train(layer, lambda layer, x: layer.hypernetwork(x).sigmas.mean())
dense = [nnx.Linear(2 * SIZE, 80, rngs=rngs), nnx.relu, nnx.Linear(80, CUT, rngs=rngs)]
baseline = train(nnx.Sequential(flat, *dense))
print(f"error on new signals: {error:.4f}; of a dense network: {baseline:.4f}")
