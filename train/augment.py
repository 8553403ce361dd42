"""Small random distortions of images, made on the device."""

import jax
import jax.numpy as jnp


def distort(
    key: jax.Array, images: jax.Array, *, shift: float, rotation: float, scale: float
) -> jax.Array:
    """Moves, turns and scales every image by a little, with bilinear interpolation.

    The interpolation is a product with two narrow matrices per image, which CPUs and TPUs do much
    faster than a gather.

    Args:
      key: a PRNG key.
      images: float [n, h, w, c]; what lies outside is 0.
      shift: the largest shift, in eighths of the image.
      rotation: standard deviation of the angle, in radians.
      scale: standard deviation of the logarithm of the scale, on each axis.

    Returns:
      [n, h, w, c].
    """
    n, height, width, channels = images.shape
    angle_key, scale_key, shift_key = jax.random.split(key, 3)
    size = jnp.array([height, width], jnp.float32)
    angle = rotation * jax.random.normal(angle_key, (n,))
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    turn = jnp.stack([jnp.stack([cos, -sin], -1), jnp.stack([sin, cos], -1)], -2)
    stretch = jnp.exp(scale * jax.random.normal(scale_key, (n, 2, 1)))
    offset = jax.random.uniform(shift_key, (n, 2), minval=-1, maxval=1) * (shift / 8 * size)[None]

    axes = [jnp.arange(s, dtype=jnp.float32) for s in (height, width)]
    grid = jnp.stack(jnp.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 2)
    centre = (size - 1) / 2
    points = jnp.einsum("nij,pj->npi", turn * stretch, grid - centre[None])
    points = points + (centre[None] + offset)[:, None]
    rows, columns = (
        jnp.maximum(0, 1 - jnp.abs(points[..., a, None] - axes[a][None, None])) for a in (0, 1)
    )
    moved = jnp.einsum("npy,nyxc,npx->npc", rows, images, columns)
    return moved.reshape(n, height, width, channels)
