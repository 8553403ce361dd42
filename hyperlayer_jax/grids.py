"""Grids of means over images, and reading between pixels.

Positions in an image are (row, column) in [-1, 1]: -1 is the centre of the first pixel of an axis,
1 that of its last, whatever the resolution.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from hyperlayer_jax import checks
from hyperlayer_jax.transforms import last_indices, transform_means

# The corners (top or bottom, left or right) of the whole image.
UNIT_CORNERS = np.stack(np.meshgrid([-1.0, 1.0], [-1.0, 1.0], indexing="ij"), -1)


def quad_means(
    corners: jax.Array, glimpse_shape: Sequence[int], image_shape: Sequence[int]
) -> jax.Array:
    """Spans an even grid over a quadrangle, out to all four corners.

    Args:
      corners: float [*B, 2, 2, 2], the position of the corner (top or bottom, left or right).
      glimpse_shape: rows and columns of the grid; an axis of 1 lies in the middle.
      image_shape: rows and columns of the image.

    Returns:
      Means [*B, *glimpse_shape, 2] in indices, clipped at the border of the image.

    Raises:
      ValueError: an argument has the wrong shape or dtype.
    """
    _check_last("corners", corners, (2, 2, 2))
    glimpse_shape = checks.check_shape("glimpse_shape", glimpse_shape, 2)
    image_shape = checks.check_shape("image_shape", image_shape, 2)
    dtype = corners.dtype
    rows, columns = (
        np.stack([1 - t, t], -1)
        for t in (np.linspace(0, 1, n) if n > 1 else np.full(1, 0.5) for n in glimpse_shape)
    )
    # One matrix product, whose result lies in memory as the means do: nothing is transposed.
    weights = np.einsum("iv,jh,cd->vhcijd", rows, columns, np.eye(2)).reshape(8, -1).astype(dtype)
    leading = corners.shape[:-3]
    grid = jnp.matmul(corners.reshape(*leading, 8), weights, precision="highest")
    grid = grid.reshape(*leading, *glimpse_shape, 2)
    last = last_indices(image_shape, dtype).reshape((1,) * (grid.ndim - 1) + (2,))
    return transform_means((grid + 1) * (last / 2), image_shape, method="clip")


def affine_means(
    matrices: jax.Array, glimpse_shape: Sequence[int], image_shape: Sequence[int]
) -> jax.Array:
    """Maps an even grid over [-1, 1]^2 by u -> A u + b; the identity covers the whole image.

    Args:
      matrices: float [*B, 2, 3], each [A, b].
      glimpse_shape: rows and columns of the grid.
      image_shape: rows and columns of the image.

    Returns:
      Means [*B, *glimpse_shape, 2] in indices, clipped at the border of the image.

    Raises:
      ValueError: an argument has the wrong shape or dtype.
    """
    _check_last("matrices", matrices, (2, 3))
    unit = np.concatenate([UNIT_CORNERS, np.ones((2, 2, 1))], -1).astype(matrices.dtype)
    corners = jnp.einsum("...ij,vhj->...vhi", matrices, unit, precision="highest")
    return quad_means(corners, glimpse_shape, image_shape)


def box_means(
    boxes: jax.Array, glimpse_shape: Sequence[int], image_shape: Sequence[int]
) -> jax.Array:
    """Spans an even grid over a box, out to its edges.

    Args:
      boxes: float [*B, 4], the centre's row and column, half the height and half the width.
      glimpse_shape: rows and columns of the grid.
      image_shape: rows and columns of the image.

    Returns:
      Means [*B, *glimpse_shape, 2] in indices, clipped at the border of the image.

    Raises:
      ValueError: an argument has the wrong shape or dtype.
    """
    _check_last("boxes", boxes, (4,))
    centre, half = jnp.split(boxes[..., None, None, :], 2, axis=-1)
    unit = UNIT_CORNERS.astype(boxes.dtype).reshape((1,) * (boxes.ndim - 1) + (2, 2, 2))
    return quad_means(centre + half * unit, glimpse_shape, image_shape)


def bilinear(means: jax.Array, shape: Sequence[int]) -> tuple[jax.Array, jax.Array]:
    """The four pixels around every mean and their weights, as bilinear interpolation has them.

    Args:
      means: float [*B, n, 2], in [0, s - 1].
      shape: rows and columns of the image.

    Returns:
      Indices int32 [*B, n, 4, 2] and values [*B, n, 4], which sum to 1: entries of a
      `RowSparseTensor`. Gradients reach the means through the values.

    Raises:
      ValueError: an argument has the wrong shape or dtype.
    """
    checks.check_float("means", means, 2, "[*B, n, 2]")
    if means.shape[-1] != 2:
        raise ValueError(f"means: got shape {means.shape}, want [*B, n, 2]")
    shape = checks.check_shape("shape", shape, 2)
    last = last_indices(shape, means.dtype).reshape((1,) * (means.ndim - 1) + (2,))
    low = jax.lax.stop_gradient(jnp.clip(jnp.floor(means), 0, np.maximum(last - 1, 0)))
    beyond = means - low
    weights = jnp.stack([1 - beyond, beyond], -2)
    corners = jnp.stack([low, jnp.minimum(low + 1, last)], -2).astype(jnp.int32)
    rows = jnp.repeat(corners[..., 0], 2, axis=-1)
    columns = jnp.concatenate([corners[..., 1]] * 2, -1)
    values = jnp.repeat(weights[..., 0], 2, axis=-1) * jnp.concatenate([weights[..., 1]] * 2, -1)
    return jnp.stack([rows, columns], -1), values


def _check_last(name, x, axes):
    checks.check_float(name, x, len(axes), f"[*B, {', '.join(map(str, axes))}]")
    if x.shape[-len(axes) :] != axes:
        raise ValueError(f"{name}: got shape {x.shape}, want [*B, {', '.join(map(str, axes))}]")
