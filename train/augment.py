"""Small random distortions of images, made on the device."""

import jax
import jax.numpy as jnp
import numpy as np

from hyperlayer_jax import RowSparseTensor, bilinear, contract


def warp(images: jax.Array, matrices: jax.Array, shifts: jax.Array | None = None) -> jax.Array:
    """Reads images at A (u - c) + c + b instead of u, c their centres, bilinearly.

    Args:
      images: float [n, h, w, c]; what lies outside is 0.
      matrices: float [n, 2, 2], the A, in pixels.
      shifts: float [n, 2], the b, in pixels; none where None.

    Returns:
      [n, h, w, c].
    """
    # A margin of zeros is what is found outside.
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    _, *shape, _ = padded.shape
    last = np.array(shape, np.float32) - 1
    pixels = np.stack(np.indices(shape, np.float32), -1)[1:-1, 1:-1].reshape(-1, 2) - last / 2
    points = jnp.einsum("nij,pj->npi", matrices, pixels, precision="highest")
    points += np.expand_dims(last / 2, (0, 1))
    if shifts is not None:
        points += shifts[:, None]
    indices, values = bilinear(jnp.clip(points, 0, np.expand_dims(last, (0, 1))), shape)
    return contract(RowSparseTensor(indices, values, images.shape[1:3], tuple(shape)), padded)


def rotations(angles: jax.Array) -> jax.Array:
    """Matrices [n, 2, 2] that turn by angles [n], in radians."""
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.stack([jnp.stack([cos, -sin], -1), jnp.stack([sin, cos], -1)], -2)


def distort(
    key: jax.Array, images: jax.Array, *, shift: float, rotation: float, scale: float
) -> jax.Array:
    """Moves, turns and scales every image by a little.

    Args:
      key: a PRNG key.
      images: float [n, h, w, c]; what lies outside is 0.
      shift: the largest shift, in eighths of the image.
      rotation: standard deviation of the angle, in radians.
      scale: standard deviation of the logarithm of the scale, on each axis.

    Returns:
      [n, h, w, c].
    """
    n, height, width, _ = images.shape
    angle_key, scale_key, shift_key = jax.random.split(key, 3)
    size = jnp.array([height, width], jnp.float32)
    turn = rotations(rotation * jax.random.normal(angle_key, (n,)))
    stretch = jnp.exp(scale * jax.random.normal(scale_key, (n, 2, 1)))
    offset = jax.random.uniform(shift_key, (n, 2), minval=-1, maxval=1) * (shift / 8 * size)[None]
    return warp(images, turn * stretch, offset)
