"""A network of 330 weights that learns which of its 22 200 possible weights exist.

Handwritten digits, 64 -> 300 -> 10. In the baseline, weights stay where they began.

  python examples/sparse_digits.py
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.utils import shuffle

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
    optimizer = nnx.Optimizer(network, optimizer, wrt=nnx.Param)

    def loss_fn(network, key):
        batch = jax.random.randint(key, (64,), 0, len(labels))
        errors = optax.softmax_cross_entropy_with_integer_labels
        return errors(network(images[batch]), labels[batch]).mean()

    @nnx.jit
    def step(network, optimizer, key):
        optimizer.update(network, nnx.grad(loss_fn)(network, key))

    for key in jax.random.split(jax.random.key(2), steps):
        step(network, optimizer, key)
    return nnx.view(network, deterministic=True, raise_if_not_found=False)


def main(steps: int = 2000) -> dict[str, float]:
    """Trains both, and returns their accuracies on images held out."""
    images, labels = map(jnp.asarray, shuffle(*load_digits(return_X_y=True), random_state=0))
    figures = {}
    for name in ("learned", "random"):
        network = train(images[:1400] / 16, labels[:1400], steps, learn_places=name == "learned")
        figures[name] = float((network(images[1400:] / 16).argmax(-1) == labels[1400:]).mean())
        print(f"330 weights at {name} places: accuracy {figures[name]:.3f}")
    return figures


if __name__ == "__main__":
    main()
