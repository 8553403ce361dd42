"""Images of which most is empty, kept as the tiles that are not."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from hyperlayer_jax import checks


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TiledImages:
    """Images [*B, H, W, C] as tiles, which are read by index: what is empty takes no memory.

    `FindingGlimpses` takes them in place of images, and never forms an image.

    Attributes:
      table: int32 [*B, H / t, W / t], which tile is there; none where there is no such tile.
      tiles: [n, t, t, C] of all images, n >= 1: floating, or uint8, of which 255 means 1.
    """

    table: jax.Array
    tiles: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the images, [*B, H, W, C]."""
        *leading, rows, columns = self.table.shape
        _, height, width, channels = self.tiles.shape
        return (*leading, rows * height, columns * width, channels)

    @property
    def dtype(self) -> jnp.dtype:
        """Of what is read."""
        return jnp.dtype(jnp.float32) if self.tiles.dtype == jnp.uint8 else self.tiles.dtype

    def read(self, indices: jax.Array) -> jax.Array:
        """The pixels at int32 indices [*B, ..., 2]: [*B, ..., C], 0 where empty or outside."""
        checks.check_indices("indices", indices, 2, "[*B, ..., 2]")
        leading = self.table.shape[:-2]
        if indices.shape[: len(leading)] != leading or indices.shape[-1] != 2:
            raise ValueError(
                f"indices: got shape {indices.shape}, want [*B, ..., 2] with the *B of the "
                f"table, {self.table.shape}"
            )
        rows, columns = self.table.shape[-2:]
        size = np.array(self.tiles.shape[1:3], np.int32).reshape((1,) * (indices.ndim - 1) + (2,))
        place, within = indices // size, indices % size
        inside = (place >= 0).all(-1) & (place[..., 0] < rows) & (place[..., 1] < columns)
        flat = jnp.where(inside, place[..., 0] * columns + place[..., 1], 0)
        table = self.table.reshape(*leading, rows * columns)
        each = flat.reshape(*leading, math.prod(flat.shape[len(leading) :]))
        tile = jnp.take_along_axis(table, each, -1).reshape(flat.shape)
        return self._pixels(jnp.where(inside, tile, -1), within[..., 0], within[..., 1])

    def whole(self) -> jax.Array:
        """The images [*B, H, W, C], with all that is empty: for pictures, or small parts."""
        return self._pixels(self.table).swapaxes(-4, -3).reshape(self.shape)

    def _pixels(self, tile, *place):
        """Of tiles int32 [...] the pixels at `place`, or all: 0 where there is no such tile."""
        there = (tile >= 0) & (tile < len(self.tiles))
        pixels = self.tiles[(jnp.where(there, tile, 0), *place)]
        there = jnp.expand_dims(there, tuple(range(there.ndim, pixels.ndim)))
        pixels = jnp.where(there, pixels, jnp.zeros((), pixels.dtype))
        return pixels.astype(self.dtype) / 255 if pixels.dtype == jnp.uint8 else pixels
