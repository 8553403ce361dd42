"""A network of 330 weights that learns which of its 22 200 possible weights exist.

Handwritten digits (bundled with scikit-learn), 64 -> 300 -> 10, of which 1% exist. The baseline is
the same network with the same optimizer, whose weights stay where they began.

  python examples/sparse_digits.py
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from hyperlayer_jax.nn import SparseLinear, jumps


class Network(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.first = SparseLinear(64, 300, 1, use_bias=True, rngs=rngs)
        self.second = SparseLinear(300, 10, 3, use_bias=True, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.second(nnx.relu(self.first(x)))


def train(images, labels, steps: int, *, learn_places: bool) -> Network:
    network = Network(rngs=nnx.Rngs(0))
    optimizer = optax.adam(optax.cosine_decay_schedule(0.01, steps))
    if learn_places:
        optimizer = jumps(jax.random.key(1), network, optimizer, until=3 * steps // 4)
    graphdef, params, rest = nnx.split(network, nnx.Param, ...)

    def loss_fn(params, key):
        batch = jax.random.randint(key, (64,), 0, len(labels))
        logits = nnx.merge(graphdef, params, rest, copy=True)(images[batch])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[batch]).mean()

    def step(state, key):
        params, opt_state = state
        updates, opt_state = optimizer.update(jax.grad(loss_fn)(params, key), opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    state, keys = (params, optimizer.init(params)), jax.random.split(jax.random.key(2), steps)
    (params, _), _ = jax.lax.scan(step, state, keys)
    return nnx.view(nnx.merge(graphdef, params, rest), deterministic=True)


def main(steps: int = 2000) -> dict[str, float]:
    """Trains both, and returns their accuracies on images held out."""
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(jnp.float32(images / 16), jnp.int32(labels), random_state=0)
    train_images, test_images, train_labels, test_labels = split
    figures = {}
    for name in ("learned", "random"):
        network = train(train_images, train_labels, steps, learn_places=name == "learned")
        figures[name] = float((network(test_images).argmax(-1) == test_labels).mean())
        print(f"330 weights at {name} places: accuracy {figures[name]:.3f}")
    return figures


if __name__ == "__main__":
    main()
