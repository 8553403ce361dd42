"""Glimpses that find: candidates drawn by a map of scores, each weighed by its chance."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hyperlayer_jax import checks
from hyperlayer_jax.kernels import accumulator, serving
from hyperlayer_jax.nn.glimpse import Glimpses, read
from hyperlayer_jax.nn.sampler import Sampler, stream
from hyperlayer_jax.nn.tiles import TiledImages
from hyperlayer_jax.transforms import transform_means
from hyperlayer_jax.types import IndexTuples

# More than scores differ by.
_MUCH = np.float32(2**16)


class FindingGlimpses(nnx.Module):
    """Reads glimpses where a map of scores leads, and a few elsewhere (docs/finding.md).

    A network of the user's maps an overview of the image to four numbers for each of its cells: a
    score, two that say where in the cell to look, and one for how far around that. If it treats all
    places alike, as convolutions do, what it learns at one place it knows at all of them, and on
    canvases of any size. Some cells are drawn by their scores and some from all; each is an index
    tuple over the places of a glimpse, whose value, spread over the points that the sampler draws
    around its mean, weighs what is read there. So where to look within a cell learns from the
    neighbours of the mean, and the scores learn from how useful each of the candidates is: weigh
    what was made of them with `mixture` or `average`.

    Deterministic, the cells of the largest scores are read. Time and memory depend on the points
    that are read and on the overview, not on the image.
    """

    def __init__(
        self,
        glimpse_shape: Sequence[int],
        num_candidates: int,
        *,
        num_anywhere: int = 2,
        apart: int = 1,
        sigma_scale: float = 0.12,
        min_sigma: float = 0.0,
        sampler: Sampler | None = None,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        """Makes the layer, which has no parameters.

        Args:
          glimpse_shape: rows and columns of a glimpse, read pixel by pixel.
          num_candidates: k, cells that are read of each image.
          num_anywhere: how many of them are drawn from all cells alike rather than by scores, in
            training. Without any, what scores overlook is never found.
          apart: candidates that scores lead to are so many cells apart, by rows or by columns: one
            after the other, each keeps the next ones away. At 1 they are different cells.
          sigma_scale: of the sigma of a raw 1 after softplus, in cells.
          min_sigma: the smallest sigma, in indices.
          sampler: draws the places around a candidate's mean, and in evaluation should fix them.
            Where None, the four neighbours alone. Where it is deterministic, the cells of the
            largest scores are read; for evaluation, `nnx.view(model, deterministic=True)`, to which
            `num_candidates=` may be given as well.
          implementation: the kernel backend for what it serves, chosen by device where None.
          rngs: the stream `sample`.

        Raises:
          ValueError: an argument is out of range.
        """
        self.glimpse_shape = checks.check_shape("glimpse_shape", glimpse_shape, 2)
        self.num_candidates = checks.check_positive("num_candidates", num_candidates)
        self.num_anywhere = checks.check_count("num_anywhere", num_anywhere)
        if self.num_anywhere > self.num_candidates:
            raise ValueError(
                f"num_anywhere: got {num_anywhere}, want at most num_candidates={num_candidates}"
            )
        self.apart = checks.check_positive("apart", apart)
        checks.check_sigmas(sigma_scale, min_sigma)
        self.sigma_scale = sigma_scale
        self.min_sigma = min_sigma
        self.implementation = implementation
        self.rngs = stream(rngs, "sample")
        if sampler is None:
            sampler = Sampler(num_global=0, num_local=0, rngs=rngs)
        self.sampler = sampler

    def __call__(
        self,
        images: jax.Array | TiledImages,
        maps: jax.Array,
        *,
        cells: jax.Array | None = None,
        grid_shape: Sequence[int] | None = None,
    ) -> Glimpses:
        """Reads images where maps of their overviews lead.

        Args:
          images: [*B, H, W, C]; outside them there is nothing, 0. `TiledImages` are read by index.
          maps: float [*B, h, w, 4], of the cells that the image is divided into: scores, two raw
            numbers for the mean (row, column; zeros are the middle of the cell, which it cannot
            leave), and raw sigmas.
          cells: int32 [*B, n, 2], rows and columns of the only cells that are scored, where maps is
            [*B, n, 4]: on a very large image, those that something cheaper led to.
          grid_shape: with `cells`, the h and w that the image is divided into.

        Returns:
          Glimpses, k of each image, with `log_chances`.

        Raises:
          ValueError: an argument has the wrong shape or dtype, or there are fewer cells than k.
        """
        images, maps, cells = checks.as_arrays((images, maps, cells))
        if cells is None:
            checks.check_float("maps", maps, 3, "[*B, h, w, 4]")
            *leading, rows, columns, _ = maps.shape
            maps = maps.reshape(*leading, rows * columns, maps.shape[-1])
            every = np.stack(list(np.indices((rows, columns), np.int32)), -1).reshape(-1, 2)
            places = jnp.broadcast_to(every, (*leading, *every.shape))
        else:
            checks.check_float("maps", maps, 2, "[*B, n, 4]")
            checks.check_indices("cells", cells, 2, "[*B, n, 2]")
            rows, columns = checks.check_shape("grid_shape", grid_shape or (), 2)
            leading, places = list(maps.shape[:-2]), cells
        _check_maps(images, maps, cells, self.num_candidates)
        maps = maps.astype(jnp.float32)
        chosen = self.candidates(maps[..., 0], places)
        log_chances = self.log_chances(maps[..., 0], chosen)
        of_cells = jnp.take_along_axis(maps, chosen[..., None], -2)
        corners = jnp.take_along_axis(places, chosen[..., None], -2)
        offsets, raw_sigmas = of_cells[..., 1:3], of_cells[..., 3:]
        shape = images.shape[-3:-1]
        size = np.divide(shape, (rows, columns))
        place = corners.astype(jnp.float32) + 0.5 + jnp.tanh(offsets) / 2
        centres = transform_means(
            place * _expanded(np.float32(size), place) - 0.5, shape, method="clip"
        )
        sigmas = jax.nn.softplus(raw_sigmas) * _expanded(np.float32(self.sigma_scale * size), place)
        sigmas = sigmas + self.min_sigma
        tuples = IndexTuples(centres[..., None, :], sigmas[..., None, :], jnp.ones_like(raw_sigmas))
        points, values = self.sampler(tuples, shape, implementation=self.implementation)
        h, w = self.glimpse_shape
        grid = np.stack(list(np.indices((h, w), np.int32)), -1) - np.array(
            [h // 2, w // 2], np.int32
        )
        # One row of entries for every pixel of a glimpse, of the same values for all.
        k, m = values.shape[-2:]
        indices = points[..., None, :, :] + _expanded(grid.reshape(h * w, 1, 2), centres)
        values = jnp.broadcast_to(values[..., None, :], indices.shape[:-1])
        means = centres[..., None, None, :] + _expanded(grid.astype(np.float32), centres)
        if isinstance(images, TiledImages):
            pixels = images.read(indices)
            patches = (values[..., None].astype(pixels.dtype) * pixels).sum(-2)
            patches = patches.reshape(*leading, k, h, w, pixels.shape[-1])
        else:
            patches = read(
                images,
                indices.reshape(*leading, k * h * w, m, 2),
                values.reshape(*leading, k * h * w, m),
                means,
                implementation=serving(self.implementation, "ell_spmm"),
            )
        return Glimpses(patches, means, sigmas, log_chances=log_chances)

    def candidates(self, scores: jax.Array, cells: jax.Array) -> jax.Array:
        """Different ones [*B, k] of `cells` [*B, n, 2] by scores [*B, n], the led ones first."""
        scores = jax.lax.stop_gradient(scores)
        if self.sampler.deterministic:
            return self.best(scores, cells, self.num_candidates)
        led_key, anywhere_key = jax.random.split(self.rngs())
        num_led = self.num_candidates - self.num_anywhere
        if num_led < 0:
            raise ValueError(
                f"num_candidates: got {self.num_candidates}, want at least num_anywhere="
                f"{self.num_anywhere} where not deterministic"
            )
        drawn = scores + jax.random.gumbel(led_key, scores.shape)
        led = self.best(drawn, cells, num_led)
        order = jax.random.uniform(anywhere_key, scores.shape)
        numbers = np.expand_dims(np.arange(scores.shape[-1]), (*range(scores.ndim - 1), -1))
        order = jnp.where((led[..., None, :] == numbers).any(-1), -1.0, order)
        return jnp.concatenate([led, jax.lax.top_k(order, self.num_anywhere)[1]], -1)

    def best(self, scores: jax.Array, cells: jax.Array, count: int) -> jax.Array:
        """So many of `cells` [*B, n, 2], [*B, count], of the largest scores [*B, n] and `apart`.

        Where there are not enough that far apart, nearer ones come last.
        """
        if self.apart == 1:
            return jax.lax.top_k(scores, count)[1]

        numbers = _expanded(np.arange(scores.shape[-1], dtype=np.int32), scores)

        def pick(scores, _):
            chosen = scores.argmax(-1, keepdims=True)
            place = jnp.take_along_axis(cells, chosen[..., None], -2)
            near = (jnp.abs(cells - place) < self.apart).all(-1)
            scores = scores - jnp.where(near, _MUCH, np.float32(0))
            scores = jnp.where(numbers == chosen, -jnp.inf, scores)
            return scores, chosen[..., 0]

        # What was chosen is below all others, even those of no chance.
        scores = jnp.maximum(scores, jnp.finfo(scores.dtype).min)
        chosen = jax.lax.scan(pick, scores, length=count)[1]
        return jnp.moveaxis(chosen, 0, -1)

    def log_chances(self, scores: jax.Array, cells: jax.Array) -> jax.Array:
        """What each of `cells` [*B, k] weighs, given scores [*B, n]: log [*B, k]."""
        return jax.nn.log_softmax(jnp.take_along_axis(scores, cells, -1))

    def set_view(self, *, num_candidates: int | None = None):
        """Called by `nnx.view`.

        Args:
          num_candidates: how many cells are read; in training at least `num_anywhere`.
        """
        if num_candidates is not None:
            self.num_candidates = checks.check_positive("num_candidates", num_candidates)


def mixture(glimpses: Glimpses, logits: jax.Array) -> jax.Array:
    """Each glimpse answers by itself, and answers are weighed: log sum_k chance_k p(. | patch_k).

    Args:
      glimpses: k of each image, with chances.
      logits: float [*B, k, n], of what was read in each.

    Returns:
      Log probabilities [*B, n], in float32 at least.

    Raises:
      ValueError: the glimpses have no chances, or logits the wrong shape or dtype.
    """
    log_chances, logits = _of_chances(glimpses, "logits", logits)
    return jax.nn.logsumexp(log_chances + jax.nn.log_softmax(logits), axis=-2)


def average(glimpses: Glimpses, features: jax.Array) -> jax.Array:
    """What was made of each glimpse, weighed by its chance: sum_k chance_k features_k.

    Args:
      glimpses: k of each image, with chances.
      features: float [*B, k, n].

    Returns:
      [*B, n], in float32 at least.

    Raises:
      ValueError: the glimpses have no chances, or features the wrong shape or dtype.
    """
    log_chances, features = _of_chances(glimpses, "features", features)
    return (jnp.exp(log_chances) * features).sum(-2)


def _of_chances(glimpses, name, x):
    """Log chances [*B, k, 1] of glimpses, and x [*B, k, n], of one dtype."""
    if glimpses.log_chances is None:
        raise ValueError("glimpses: got some without chances, want those of FindingGlimpses")
    x = checks.as_arrays(x)
    checks.check_float(name, x, 2, "[*B, k, n]")
    if x.shape[:-1] != glimpses.log_chances.shape:
        raise ValueError(f"{name}: got {x.shape}, want {glimpses.log_chances.shape} and an axis")
    x = x.astype(accumulator(x.dtype))
    return glimpses.log_chances[..., None].astype(x.dtype), x


def _check_maps(images, maps, cells, num_candidates):
    """Checks maps [*B, n, 4] of cells [*B, n, 2], if any."""
    if not isinstance(images, TiledImages):
        checks.check_float("images", images, 3, "[*B, H, W, C]")
    if images.shape[:-3] != maps.shape[:-2] or maps.shape[-1] != 4:
        raise ValueError(
            f"maps: got shape {maps.shape}, want 4 numbers for each cell, and the *B of the "
            f"images, {images.shape}"
        )
    if cells is not None and cells.shape != (*maps.shape[:-1], 2):
        raise ValueError(f"cells: got shape {cells.shape}, want [*B, n, 2] for maps {maps.shape}")
    if maps.shape[-2] < num_candidates:
        raise ValueError(f"maps: got {maps.shape[-2]} cells, want at least {num_candidates}")


def _expanded(array, x):
    """The array behind as many axes of 1 as `x` has before its last."""
    return np.expand_dims(array, tuple(range(x.ndim - 1)))
