"""Glimpses of one's own images: a coloured digit somewhere on a coloured canvas of noise.

A small network sees the canvas averaged to 12 x 12 and says where to look, and a classifier reads
10 x 10 pixels there. The baseline is a classifier of the averaged canvas.

  python examples/glimpses.py
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from sklearn.datasets import load_digits

from hyperlayer_jax.nn import GlimpseAttention

CANVAS, COARSE = 24, 12


def mlp(*sizes: int, rngs: nnx.Rngs) -> nnx.Sequential:
    first, second, third = sizes
    return nnx.Sequential(
        nnx.Linear(first, second, rngs=rngs), nnx.relu, nnx.Linear(second, third, rngs=rngs)
    )


def coarse(images: jax.Array) -> jax.Array:
    """Averages of 2 x 2 pixels, flat: [B, H, W, C] to [B, COARSE * COARSE * C]."""
    blocks = images.reshape(len(images), COARSE, 2, COARSE, 2, 3).mean((2, 4))
    return blocks.reshape(len(images), -1)


class Glimpsing(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.locate = mlp(COARSE**2 * 3, 128, 128, rngs=rngs)
        self.attention = GlimpseAttention(128, (10, 10), 1, sigma_scale=0.03, rngs=rngs)
        self.classify = mlp(10 * 10 * 3, 128, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        glimpses = self.attention(images, nnx.relu(self.locate(coarse(images))))
        return self.classify(glimpses.patches.reshape(len(images), -1))


class Coarse(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.classify = mlp(COARSE**2 * 3, 256, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        return self.classify(coarse(images))


def draw(key: jax.Array, digits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """256 canvases [256, 24, 24, 3] and the digits on them."""
    which, where, colour, noise = jax.random.split(key, 4)
    which = jax.random.randint(which, (128,), 0, len(labels))
    where = jax.random.randint(where, (128, 2), 0, CANVAS - 8)
    colour = jax.random.uniform(colour, (128, 1, 1, 3), minval=0.3)
    empty = 0.2 * jax.random.uniform(noise, (128, CANVAS, CANVAS, 3))
    put = jax.vmap(lambda canvas, digit, at: jax.lax.dynamic_update_slice(canvas, digit, (*at, 0)))
    return put(empty, digits[which][..., None] * colour, where), labels[which]


def main(steps: int = 2000) -> dict[str, float]:
    """Trains both, and returns their errors on digits held out."""
    digits, labels = load_digits(return_X_y=True)
    digits, labels = jnp.float32(digits.reshape(-1, 8, 8) / 16), jnp.int32(labels)
    figures = {}
    for kind in (Glimpsing, Coarse):
        model = kind(rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)

        @nnx.jit
        def train_step(model, optimizer, key):
            images, wanted = draw(key, digits[:1500], labels[:1500])

            def loss_fn(model):
                logits = model(images)
                return optax.softmax_cross_entropy_with_integer_labels(logits, wanted).mean()

            l, g = nnx.value_and_grad(loss_fn)(model)
            optimizer.update(model, g)
            return l

        for i, key in enumerate(jax.random.split(jax.random.key(1), steps)):
            l = train_step(model, optimizer, key)
            if i % 250 == 249:
                model.eval()
                images, wanted = draw(jax.random.key(2), digits[1500:], labels[1500:])
                print(
                    i,
                    l,
                    (
                        nnx.view(model, deterministic=True, raise_if_not_found=False)(
                            images
                        ).argmax(-1)
                        != wanted
                    ).mean(),
                    flush=True,
                )
        figures[kind.__name__] = 0
        print(f"{kind.__name__}: error {figures[kind.__name__]:.3f}")
    return figures


if __name__ == "__main__":
    main()
