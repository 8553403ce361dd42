"""Tuples in blocks, so that no array of points times tuples gets large."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# Proportions are [...,k,m]; larger ones are made and used up in blocks of tuples.
MAX_BLOCK = 2**23


def scan_tuples(
    step: Callable[..., Any], carry: Any, tuples: Any, *, axis: int, num_points: int
) -> tuple[Any, Any]:
    """`lax.scan` over blocks of tuples; a single call where they fit at once.

    Args:
      step: of carry and a block of tuples, to carry and results, which have the tuples at `axis`.
      carry: what goes from block to block.
      tuples: means, 1 / sigmas and values, pytrees of arrays whose `axis` is that of the tuples.
      axis: see above.
      num_points: all points for which a tuple makes proportions.

    Returns:
      The last carry, and the results of all blocks side by side.
    """
    k = jax.tree.leaves(tuples)[0].shape[axis]
    # A batch whose size is a symbol is taken to be small.
    num_blocks = min(k, -(-k * num_points // MAX_BLOCK)) if isinstance(num_points, int) else 1
    if num_blocks <= 1:
        return step(carry, tuples)
    size = -(-k // num_blocks)
    num_blocks = -(-k // size)

    def split(x, fill):
        fillers = [(0, 0)] * x.ndim
        fillers[axis] = (0, num_blocks * size - k)
        x = jnp.pad(x, fillers, constant_values=fill)
        x = x.reshape(*x.shape[:axis], num_blocks, size, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    def join(x):
        x = jnp.moveaxis(x, 0, axis)
        x = x.reshape(*x.shape[:axis], num_blocks * size, *x.shape[axis + 2 :])
        return jax.lax.slice_in_dim(x, 0, k, axis=axis)

    means, inverse_sigmas, values = tuples
    # Sigmas of 1 for the tuples that fill up the last block.
    fills = zip((means, inverse_sigmas, values), (0, 1, 0), strict=True)
    blocks = tuple(jax.tree.map(lambda x, fill=fill: split(x, fill), x) for x, fill in fills)
    carry, out = jax.lax.scan(step, carry, blocks)
    return carry, jax.tree.map(join, out)
