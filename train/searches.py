"""What finding glimpses are compared with: other ways to read patches by a map of scores.

Each takes images [B, H, W, C] and maps [B, h, w, 4], and returns `Glimpses`, as `FindingGlimpses`
does.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hyperlayer_jax import RowSparseTensor, bilinear, contract
from hyperlayer_jax.nn import FindingGlimpses, Glimpses


class TopK(FindingGlimpses):
    """The patches of the largest scores, in training as well: nothing is drawn.

    As in iterative patch selection (Bergner et al., arXiv 2210.13007), but by an overview.
    """

    def candidates(self, scores: jax.Array, cells: jax.Array) -> jax.Array:
        """Which [B, k] of `cells` [B, n, 2] by scores [B, n]."""
        return self.best(jax.lax.stop_gradient(scores), cells, self.num_candidates)


class AttentionSampling(FindingGlimpses):
    """Patches drawn from the map with replacement (Katharopoulos, Fleuret, arXiv 1905.03711).

    Each has weight 1 / k, and the gradient of its logarithm: the mean over draws, and its gradient,
    are those of the mean over all cells. Deterministic, the cells of the largest scores have the
    weights that the map gives them.
    """

    def candidates(self, scores: jax.Array, cells: jax.Array) -> jax.Array:
        """Which [B, k] of `cells` [B, n, 2] by scores [B, n], some more than once."""
        if self.sampler.deterministic:
            return super().candidates(scores, cells)
        shape = (self.num_candidates, len(scores))
        return jax.random.categorical(self.rngs(), scores, shape=shape).T

    def log_chances(self, scores: jax.Array, cells: jax.Array) -> jax.Array:
        """What each of `cells` [B, k] weighs, given scores [B, n]: log [B, k]."""
        if self.sampler.deterministic:
            return super().log_chances(scores, cells)
        log_prob = jnp.take_along_axis(jax.nn.log_softmax(scores), cells, -1)
        return log_prob - jax.lax.stop_gradient(log_prob) - np.log(self.num_candidates)


class SoftArgmax(nnx.Module):
    """One patch around the mean of the map, read by bilinear interpolation.

    A spatial transformer (Jaderberg et al., arXiv 1506.02025) that moves by a map of scores.
    """

    def __init__(self, window: int):
        self.window = window

    def __call__(self, images: jax.Array, maps: jax.Array) -> Glimpses:
        """Reads images where the maps lead on average."""
        b, rows, columns, _ = maps.shape
        shape = images.shape[1:3]
        chances = jax.nn.softmax(maps[..., 0].reshape(b, -1)).reshape(b, rows, columns)
        cells = jnp.stack(
            [
                chances.sum(2) @ np.arange(rows, dtype=np.float32),
                chances.sum(1) @ np.arange(columns, dtype=np.float32),
            ],
            -1,
        )
        size = np.array(shape, np.float32) / (rows, columns)
        centres = (cells + 0.5) * size[None] - 0.5
        grid = np.stack(np.indices((self.window, self.window), np.float32), -1) - self.window // 2
        means = centres[:, None, None, None] + grid[None, None]
        # A margin of zeros is what is found outside.
        margin = self.window // 2 + 1
        padded = jnp.pad(images, ((0, 0), (margin, margin), (margin, margin), (0, 0)))
        indices, values = bilinear(means.reshape(b, -1, 2) + margin, padded.shape[1:3])
        tensor = RowSparseTensor(indices, values, means.shape[1:4], padded.shape[1:3])
        sure = jnp.zeros((b, 1))
        return Glimpses(contract(tensor, padded), means, jnp.zeros((b, 1, 2)), log_chances=sure)
