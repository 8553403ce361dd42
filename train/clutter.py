"""Cluttered and translated digits, drawn on the device by key: as many as one likes.

The task of Mnih et al., "Recurrent models of visual attention", arXiv 1406.6247: find the whole
digit among pieces of others.
"""

import jax
import jax.numpy as jnp
import numpy as np

from train.augment import rotations, warp


def clutter(
    key: jax.Array,
    images: jax.Array,
    chosen: jax.Array,
    *,
    canvas: int,
    num_patches: int = 0,
    patch_size: int = 8,
    rotation: float = 0.0,
    scaling: float = 0.0,
) -> jax.Array:
    """Places digits at random on empty canvases, and pieces of other digits over them.

    Everything is drawn uniformly: the place of the digit and of each piece, whole on the canvas;
    of each piece also the digit it comes from, never the one on its canvas, and where it is cut
    out. What overlaps adds up and is clipped to 1.

    Args:
      key: a PRNG key; the same key, the same canvases.
      images: float32 [n, h, w, c] in [0, 1], of one split, n >= 2 with pieces.
      chosen: int32 [B], which images to place.
      canvas: rows and columns of a canvas, at least h and w. At h = w = canvas without pieces,
        images are only rotated and scaled.
      num_patches: pieces on each canvas.
      patch_size: rows and columns of a piece, at most h and w.
      rotation: digits are rotated by up to this angle in degrees, either way.
      scaling: digits are scaled by a factor of 1 - scaling to 1 + scaling, cut off at h x w.

    Returns:
      float32 [B, canvas, canvas, c] in [0, 1].

    Raises:
      ValueError: the sizes do not fit each other.
    """
    images = jnp.asarray(images)
    n, h, w, channels = images.shape
    if canvas < max(h, w):
        raise ValueError(f"canvas: got {canvas}, want at least the digits' {h} x {w}")
    if num_patches and (patch_size > min(h, w) or n < 2):
        raise ValueError(
            f"patch_size: got {patch_size}, want at most the digits' {h} x {w}, and two digits"
        )
    batch = len(chosen)
    warp_key, place_key, other_key, cut_key, patch_key = jax.random.split(key, 5)

    digits = images[chosen]
    if rotation or scaling:
        digits = _warp(warp_key, digits, rotation, scaling)
    room = np.array([[[canvas - h + 1, canvas - w + 1]]], np.int32)
    start = jax.random.randint(place_key, (batch, 1, 2), 0, room)
    canvases = jnp.zeros((batch, canvas, canvas, channels), images.dtype)
    canvases = canvases.at[_window(start, h, w)].add(digits[:, None])
    if num_patches:
        size = (batch, num_patches)
        other = (chosen[:, None] + jax.random.randint(other_key, size, 1, n)) % n
        room = np.array([[[h, w]]], np.int32) - patch_size + 1
        cut = jax.random.randint(cut_key, (*size, 2), 0, room)
        _, rows, columns = _window(cut, patch_size, patch_size)
        pieces = images[other[..., None, None], rows, columns]
        start = jax.random.randint(patch_key, (*size, 2), 0, np.int32(canvas - patch_size + 1))
        canvases = canvases.at[_window(start, patch_size, patch_size)].add(pieces)
    return jnp.minimum(canvases, 1)


def _window(start: jax.Array, h: int, w: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Indices into [B, H, W] that take h x w windows at `start` [B, n, 2]: [B, n, h, w]."""
    rows = start[..., 0, None, None] + np.arange(h, dtype=np.int32)[None, None, :, None]
    columns = start[..., 1, None, None] + np.arange(w, dtype=np.int32)[None, None, None, :]
    return np.arange(len(start), dtype=np.int32)[:, None, None, None], rows, columns


def _warp(key: jax.Array, digits: jax.Array, rotation: float, scaling: float) -> jax.Array:
    """Rotates and scales digits [B, h, w, c] about their centres; what comes in is 0."""
    angle_key, scale_key = jax.random.split(key)
    batch = len(digits)
    limit = np.radians(rotation)
    angle = jax.random.uniform(angle_key, (batch,), minval=-limit, maxval=limit)
    scale = jax.random.uniform(scale_key, (batch,), minval=1 - scaling, maxval=1 + scaling)
    return warp(digits, rotations(angle) / scale[:, None, None])
