"""A layer that computes its own sparse matrix from its input: it learns to cut out what is marked.

The input is a smooth random signal and, one-hot, a place in it; wanted are the five samples from
there on. A hypernetwork says where to read: error 0.0001, of a dense network as baseline 0.09.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from hyperlayer_jax.nn import AdaptiveTuples, FreeTuples, HyperLayer, Sampler

SIZE, CUT, BATCH, STEPS = 32, 5, 64, 1500


def example(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Signals and places [BATCH, 2, SIZE], and what is marked [BATCH, CUT]."""
    noise = jax.random.normal(key, (BATCH, SIZE + 8))
    signals = sum(noise[:, i : i + SIZE] for i in range(8)) / 8**0.5
    places = jax.random.randint(jax.random.fold_in(key, 0), (BATCH,), 0, SIZE - CUT + 1)
    cut = jax.vmap(lambda x, place: jax.lax.dynamic_slice(x, (place,), (CUT,)))
    return jnp.stack([signals, jax.nn.one_hot(places, SIZE)], 1), cut(signals, places)


def train(model: nnx.Module, penalty=lambda model, x: 0.0) -> float:
    """Trains with a penalty (on sigmas: evaluation rounds); returns the error on new signals."""
    optimizer = optax.adam(optax.cosine_decay_schedule(0.01, STEPS))
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, rest, x, y):
        model = nnx.merge(graph, params, rest, copy=True)
        return ((model(x) - y) ** 2).mean() + penalty(model, x), nnx.split(model, nnx.Param, ...)[2]

    def step(carry, key):
        params, rest, state = carry
        gradients, rest = jax.grad(loss, has_aux=True)(params, rest, *example(key))
        updates, state = optimizer.update(gradients, state)
        return (optax.apply_updates(params, updates), rest, state), None

    keys = jax.random.split(jax.random.key(1), STEPS)
    params, rest, _ = jax.lax.scan(step, (params, rest, optimizer.init(params)), keys)[0]
    model = nnx.view(nnx.merge(graph, params, rest), deterministic=True, raise_if_not_found=False)
    x, y = jax.vmap(example)(jax.random.split(jax.random.key(3), 100))
    return float(((model(x) - y) ** 2).mean())


rngs = nnx.Rngs(0)
axes = {"axis": (-2, -1), "rngs": rngs}
features = nnx.Sequential(nnx.LinearGeneral((2, SIZE), 64, **axes), nnx.relu)
start = FreeTuples((CUT,), 1, (SIZE,), values=1.0, sigma_scale=0.2, rngs=rngs)
tuples = AdaptiveTuples(features, 64, start, rngs=rngs)
# Each output reads channel 0, the signal, at a place that is learned: the last column.
template = jnp.array([[output, 0, 0] for output in range(CUT)])
options = {"sampler": Sampler(num_global=4, evaluation="round", rngs=rngs), "rngs": rngs}
layer = HyperLayer(tuples, (2, SIZE), CUT, template=template, columns=(2,), **options)
error = train(layer, lambda layer, x: layer.hypernetwork(x).sigmas.mean() * 0.1 / SIZE)
dense = nnx.LinearGeneral((2, SIZE), 80, **axes), nnx.relu, nnx.Linear(80, CUT, rngs=rngs)
baseline = train(nnx.Sequential(*dense))
print(f"error on new signals: {error:.4f}; of a dense network: {baseline:.4f}")
