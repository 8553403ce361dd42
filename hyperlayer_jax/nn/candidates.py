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


def norms(chance: jax.Array, x: jax.Array, dy: jax.Array) -> jax.Array:
    """Estimates the norms of the rows of x dy^T, which is not formed, from a few random sums of dy.

    Args:
      chance: float32 [q, o] in [0, 1): the signs of q sums.
      x: float [i, n].
      dy: float [o, n].

    Returns:
      float32 [i].
    """
    signs = jnp.where(chance < 0.5, -1.0, 1.0)
    sums = x.astype(jnp.float32) @ (signs @ dy.astype(jnp.float32)).T
    return jnp.sqrt((sums**2).mean(-1))


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
