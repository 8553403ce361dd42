"""Rotary embedding: queries and keys turned by their position."""

import jax
import jax.numpy as jnp
import numpy as np

_BASE = 10_000.0


def rotate(x: jax.Array, rows: jax.Array) -> jax.Array:
    """Turns pairs of features by angles in proportion to the position (arXiv 2104.09864).

    Args:
      x: float [B, T, N, H], H even.
      rows: int32 [T], the positions.

    Returns:
      [B, T, N, H], of the dtype of x.
    """
    half = x.shape[-1] // 2
    rates = jnp.asarray(_BASE ** (-np.arange(half) / half), jnp.float32)
    angles = (rows.astype(jnp.float32)[:, None] * rates[None])[None, :, None]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    # Signs with the sines and a roll, since halves put together anew would take CPUs six times as
    # long: they decide for every number from which half it is.
    cos, sin = jnp.concatenate([cos, cos], -1), jnp.concatenate([-sin, sin], -1)
    x32 = x.astype(jnp.float32)
    return (x32 * cos + jnp.roll(x32, half, axis=-1) * sin).astype(x.dtype)
