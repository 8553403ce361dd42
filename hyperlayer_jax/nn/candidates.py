"""Places for weights that jump, drawn where the gradient is likely to be large."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

# Random sums by which the norms of a gradient are measured.
SUMS = 8
# What is added to the chance of a place, as a part of the mean one.
_FLOOR = 1e-3


def unravel(flat: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Coordinates int32 [..., r] of numbers int32 [...] in row-major order."""
    coordinates = []
    for size in reversed(shape):
        coordinates.append(flat % size)
        flat = flat // size
    return jnp.stack(coordinates[::-1], -1)


def chances(key: jax.Array, *shapes: Sequence[int]) -> list[jax.Array]:
    """Arrays of those shapes of numbers in [0, 1), drawn at once: every draw has to be compiled."""
    sizes = [math.prod(shape) for shape in shapes]
    parts = jnp.split(jax.random.uniform(key, (sum(sizes),)), np.cumsum(sizes)[:-1])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def random_sums(chance: jax.Array, x: jax.Array) -> jax.Array:
    """Sums float32 [q, n] of the rows of x [i, n], with signs by chance [q, i] in [0, 1)."""
    return jnp.where(chance < 0.5, -1.0, 1.0) @ x.astype(jnp.float32)


def norms(sums: jax.Array, x: jax.Array) -> jax.Array:
    """Estimates the norms [i] of the columns of dy x, which is not formed.

    Args:
      sums: `random_sums` of dy [o, n], float32 [q, n].
      x: float [n, i].
    """
    return jnp.sqrt(((sums @ x.astype(jnp.float32)) ** 2).mean(0))


def draw(chance: jax.Array, weights: jax.Array) -> jax.Array:
    """Draws indices int32 [...] in proportion to weights [n] >= 0, and a little uniformly.

    Args:
      chance: float32 [...] in [0, 1).
      weights: float32 [n].
    """
    floor = _FLOOR * weights.mean() + jnp.finfo(jnp.float32).tiny
    edges = jnp.cumsum(weights + floor)
    found = jnp.searchsorted(edges, chance * edges[-1], side="right")
    return jnp.minimum(found, weights.shape[0] - 1).astype(jnp.int32)


def num_candidates(num_tuples: int) -> int:
    """How many places are tried for the tuples of a chunk."""
    return 4 * num_tuples + 16
