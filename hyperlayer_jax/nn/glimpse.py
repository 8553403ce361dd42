"""Glimpses: a few small patches of an image, read at points that a network chose.

Positions in an image are (row, column) in [-1, 1]: -1 is the centre of the first pixel of an axis,
1 that of its last, whatever the resolution.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hyperlayer_jax import checks
from hyperlayer_jax.hyperlayer import discretize
from hyperlayer_jax.kernels import serving
from hyperlayer_jax.sampling import round_means
from hyperlayer_jax.tensors import contract
from hyperlayer_jax.transforms import last_indices, transform_means, transform_sigmas
from hyperlayer_jax.types import IndexTuples, RowSparseTensor

# The last of several glimpses begins with this part of the first's size. Glimpses that begin alike
# stay alike, and read the same pixels twice.
_SMALLEST = 0.5
_UNIT_CORNERS = np.stack(np.meshgrid([-1.0, 1.0], [-1.0, 1.0], indexing="ij"), -1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Glimpses:
    """What was read from an image, and where.

    Attributes:
      patches: [*B, g, h, w, C], of the dtype of the image.
      means: float32 [*B, g, h, w, 2], the points that were aimed at, in indices of the image.
      sigmas: float32 [*B, g, 2], how far around them was read, in indices; 0 where nothing was
        sampled.
      log_prob: float32 [*B], of the places looked at, where a policy drew them; else None.
      baseline: float32 [*B], the reward that the policy expects, with `log_prob`; else None.
    """

    patches: jax.Array
    means: jax.Array
    sigmas: jax.Array
    log_prob: jax.Array | None = dataclasses.field(default=None, kw_only=True)
    baseline: jax.Array | None = dataclasses.field(default=None, kw_only=True)


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
    unit = np.concatenate([_UNIT_CORNERS, np.ones((2, 2, 1))], -1).astype(matrices.dtype)
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
    unit = _UNIT_CORNERS.astype(boxes.dtype).reshape((1,) * (boxes.ndim - 1) + (2, 2, 2))
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


def _quad_from_raw(raw, glimpse_shape, image_shape):
    corners = jnp.tanh(raw).reshape(*raw.shape[:-1], 2, 2, 2)
    return quad_means(corners, glimpse_shape, image_shape)


def _affine_from_raw(raw, glimpse_shape, image_shape):
    linear, centre = raw[..., :4].reshape(*raw.shape[:-1], 2, 2), jnp.tanh(raw[..., 4:, None])
    return affine_means(jnp.concatenate([linear, centre], -1), glimpse_shape, image_shape)


def _box_from_raw(raw, glimpse_shape, image_shape):
    boxes = jnp.concatenate([jnp.tanh(raw[..., :2]), jax.nn.sigmoid(raw[..., 2:])], -1)
    return box_means(boxes, glimpse_shape, image_shape)


# By shape: from raw numbers [*B, n] to means, and the raw numbers of a centred square of half
# width s. Centres and corners cannot leave the image, beyond which means have no gradient.
_SHAPES = {
    "box": (_box_from_raw, lambda s: np.array([0, 0, *[np.log(s / (1 - s))] * 2])),
    "quad": (_quad_from_raw, lambda s: np.arctanh(s * _UNIT_CORNERS).ravel()),
    "affine": (_affine_from_raw, lambda s: np.array([s, 0, 0, s, 0, 0])),
}


class GlimpseAttention(nnx.Module):
    """Reads glimpses of an image through an adaptive sparse hyperlayer (section 3.2 of the paper).

    Features of the image decide on one shape and one sigma for each glimpse. Every output pixel
    owns one index tuple over the pixels of the image, of value 1 and with its mean on a grid over
    the shape. In training, points are sampled around the means and shared by all channels; an
    output pixel is their weighted mean. Deterministic, as many points are fixed by the mean and
    sigma: rounding, as the paper has it, would read the glimpse half a pixel off.
    """

    def __init__(
        self,
        num_features: int,
        glimpse_shape: Sequence[int],
        num_glimpses: int,
        *,
        shape: str = "box",
        initial_size: float = 0.75,
        sigma_scale: float = 0.07,
        min_sigma: float = 0.0,
        num_global: int = 0,
        num_local: int = 0,
        region: int | Sequence[int] | None = None,
        implementation: str | None = None,
        deterministic: bool = False,
        rngs: nnx.Rngs,
    ):
        """Makes the layer.

        Args:
          num_features: F, of the features that decide.
          glimpse_shape: rows and columns of a glimpse.
          num_glimpses: g.
          shape: "box", "quad" or "affine": 4, 8 or 6 numbers.
          initial_size: in (0, 1), the part of each axis that the first glimpse covers at the start,
            centred; the others cover less, down to half of it.
          sigma_scale: see `transform_sigmas`.
          min_sigma: the smallest sigma, in indices.
          num_global: points per output pixel drawn from the whole image; deterministic, quantiles
            of its Gaussian.
          num_local: points per output pixel drawn from the region; deterministic, spread evenly
            over it.
          region: the axes of the region around a mean; needed when num_local > 0.
          implementation: the kernel backend for what it serves, chosen by device where None.
          deterministic: takes fixed points instead of drawing them; for evaluation,
            `nnx.view(model, deterministic=True)`.
          rngs: the streams `params` and `sample`.

        Raises:
          ValueError: an argument is out of range.
        """
        self.aim = _Aim(
            num_features,
            glimpse_shape,
            num_glimpses,
            shape=shape,
            initial_size=initial_size,
            rngs=rngs,
        )
        self.sigma_scale = sigma_scale
        self.min_sigma = min_sigma
        self.num_global = num_global
        self.num_local = num_local
        self.region = region
        self.implementation = implementation
        self.deterministic = deterministic
        self.rngs = rngs["sample"].fork()

    def __call__(self, images: jax.Array, features: jax.Array) -> Glimpses:
        """Reads images [*B, H, W, C] where features [*B, F] say."""
        means, sigma = self.aim(images, features)
        shape = images.shape[-3:-1]
        sigmas = transform_sigmas(sigma, shape, scale=self.sigma_scale, minimum=self.min_sigma)
        rows = _rows(means)[..., None, :]
        tuples = IndexTuples(
            rows,
            _rows(jnp.broadcast_to(sigmas[..., None, None, :], means.shape))[..., None, :],
            jnp.ones_like(rows[..., 0]),
        )
        indices, values = discretize(
            None if self.deterministic else self.rngs(),
            tuples,
            shape,
            num_global=self.num_global,
            num_local=self.num_local,
            region=self.region,
            implementation=serving(self.implementation, "redistribute"),
        )
        implementation = serving(self.implementation, "ell_spmm")
        patches = _read(images, indices, values, means, implementation=implementation)
        return Glimpses(patches, means, sigmas)

    def set_view(self, *, deterministic: bool | None = None):
        """Called by `nnx.view`.

        Args:
          deterministic: takes fixed points instead of drawing them.
        """
        if deterministic is not None:
            self.deterministic = deterministic


class SpatialTransformer(nnx.Module):
    """Reads glimpses by bilinear interpolation on an affine grid (Jaderberg et al., 1506.02025)."""

    def __init__(
        self,
        num_features: int,
        glimpse_shape: Sequence[int],
        num_glimpses: int,
        *,
        initial_size: float = 0.75,
        rngs: nnx.Rngs,
    ):
        """Makes the layer.

        Args:
          num_features: F, of the features that decide.
          glimpse_shape: rows and columns of a glimpse.
          num_glimpses: g.
          initial_size: in (0, 1), the part of each axis that the first glimpse covers at the start,
            centred; the others cover less, down to half of it.
          rngs: the stream `params`.

        Raises:
          ValueError: an argument is out of range.
        """
        self.aim = _Aim(
            num_features,
            glimpse_shape,
            num_glimpses,
            shape="affine",
            initial_size=initial_size,
            rngs=rngs,
        )

    def __call__(self, images: jax.Array, features: jax.Array) -> Glimpses:
        """Reads images [*B, H, W, C] where features [*B, F] say."""
        means, _ = self.aim(images, features)
        indices, values = bilinear(_rows(means), images.shape[-3:-1])
        return Glimpses(_read(images, indices, values, means), means, _no_sigmas(means))


class ReinforceGlimpses(nnx.Module):
    """Reads glimpses of fixed size at places that a Gaussian policy draws (Mnih et al., 1406.6247).

    Reading gives no gradient to the places: they learn from `reinforce_loss`. Deterministic, they
    are the means of the policy.
    """

    def __init__(
        self,
        num_features: int,
        glimpse_shape: Sequence[int],
        num_glimpses: int,
        *,
        policy_sigma: float = 0.2,
        deterministic: bool = False,
        rngs: nnx.Rngs,
    ):
        """Makes the layer.

        Args:
          num_features: F, of the features that decide.
          glimpse_shape: rows and columns of a glimpse.
          num_glimpses: g.
          policy_sigma: > 0, of the Gaussian around every centre, in raw numbers (tanh of them is
            a position).
          deterministic: looks at the means; `nnx.view(model, deterministic=True)` for evaluation.
          rngs: the streams `params` and `sample`.

        Raises:
          ValueError: an argument is out of range.
        """
        self.glimpse_shape = checks.check_shape("glimpse_shape", glimpse_shape, 2)
        self.num_glimpses = num_glimpses
        self.policy_sigma = policy_sigma
        self.deterministic = deterministic
        self.policy = _small_linear(num_features, num_glimpses * 2, rngs)
        self.baseline = nnx.Linear(num_features, 1, rngs=rngs)
        self.rngs = rngs["sample"].fork()

    def __call__(self, images: jax.Array, features: jax.Array) -> Glimpses:
        """Reads images [*B, H, W, C] at full resolution, where features [*B, F] say."""
        _check_inputs(images, features)
        means = self.policy(features.astype(jnp.float32))
        drawn, log_prob, baseline = means, None, None
        if not self.deterministic:
            noise = jax.random.normal(self.rngs(), means.shape)
            drawn = jax.lax.stop_gradient(means + self.policy_sigma * noise)
            log_prob = -(((drawn - means) / self.policy_sigma) ** 2).sum(-1) / 2
            baseline = self.baseline(jax.lax.stop_gradient(features.astype(jnp.float32)))[..., 0]
        centres = jnp.tanh(drawn).reshape(*drawn.shape[:-1], self.num_glimpses, 2)
        shape = images.shape[-3:-1]
        half = [(n - 1) / max(s - 1, 1) for n, s in zip(self.glimpse_shape, shape, strict=True)]
        sizes = jnp.broadcast_to(np.asarray(half, np.float32), centres.shape)
        means = box_means(jnp.concatenate([centres, sizes], -1), self.glimpse_shape, shape)
        indices = round_means(_rows(means), shape)[..., None, :]
        values = jnp.ones(indices.shape[:-1], means.dtype)
        patches = _read(images, indices, values, means)
        return Glimpses(patches, means, _no_sigmas(means), log_prob=log_prob, baseline=baseline)

    def set_view(self, *, deterministic: bool | None = None):
        """Called by `nnx.view`.

        Args:
          deterministic: looks at the means of the policy.
        """
        if deterministic is not None:
            self.deterministic = deterministic


def reinforce_loss(glimpses: Glimpses, reward: jax.Array) -> jax.Array:
    """The loss whose gradient is that of the expected reward, less a learned baseline.

    Args:
      glimpses: from `ReinforceGlimpses` in training.
      reward: float [*B], as large as the glimpses were good. No gradient flows into it.

    Returns:
      A scalar to add to the loss: the score-function estimate (REINFORCE) and the squared error of
      the baseline, both means over the batch.

    Raises:
      ValueError: the glimpses are those of a deterministic view, which have no chances.
    """
    if glimpses.log_prob is None or glimpses.baseline is None:
        raise ValueError("glimpses: got those of a deterministic view, want those of training")
    advantage = jax.lax.stop_gradient(reward) - glimpses.baseline
    policy_loss = -(glimpses.log_prob * jax.lax.stop_gradient(advantage)).mean()
    return policy_loss + (advantage**2).mean()


class _Aim(nnx.Module):
    """From features to the means of a grid over each glimpse's shape, and to raw sigmas."""

    def __init__(self, num_features, glimpse_shape, num_glimpses, *, shape, initial_size, rngs):
        if shape not in _SHAPES:
            raise ValueError(f"shape: got {shape!r}, want one of {', '.join(map(repr, _SHAPES))}")
        if not 0 < initial_size < 1:
            raise ValueError(f"initial_size: got {initial_size}, want a number between 0 and 1")
        self.glimpse_shape = checks.check_shape("glimpse_shape", glimpse_shape, 2)
        self.shape = shape
        sizes = np.geomspace(initial_size, _SMALLEST * initial_size, num_glimpses)
        starts = np.float32([[*_SHAPES[shape][1](size), 0] for size in sizes])
        self.start = nnx.Param(jnp.asarray(starts))
        self.linear = _small_linear(num_features, starts.size, rngs)

    def __call__(self, images, features):
        """Returns means [*B, g, h, w, 2] and raw sigmas [*B, g], in float32."""
        _check_inputs(images, features)
        raw = self.linear(features.astype(jnp.float32)).reshape(
            *features.shape[:-1], *self.start.shape
        )
        raw = raw + self.start[...].reshape((1,) * (raw.ndim - 2) + self.start.shape)
        means = _SHAPES[self.shape][0](raw[..., :-1], self.glimpse_shape, images.shape[-3:-1])
        return means, raw[..., -1]


def _small_linear(num_features, num_outputs, rngs):
    """A layer whose first outputs are next to nothing and differ a little from image to image."""
    scale = nnx.initializers.variance_scaling(1e-2, "fan_in", "normal")
    return nnx.Linear(num_features, num_outputs, kernel_init=scale, rngs=rngs)


def _rows(means):
    """[*B, g, h, w, 2] -> [*B, g * h * w, 2]."""
    return means.reshape(*means.shape[:-4], math.prod(means.shape[-4:-1]), 2)


def _read(images, indices, values, means, *, implementation=None):
    """Contracts images with one row of entries for each output pixel: [*B, g, h, w, C]."""
    tensor = RowSparseTensor(
        indices, values.astype(images.dtype), means.shape[-4:-1], images.shape[-3:-1]
    )
    return contract(tensor, images, implementation=implementation)


def _no_sigmas(means):
    return jnp.zeros((*means.shape[:-3], 2), means.dtype)


def _check_inputs(images, features):
    checks.check_float("images", images, 3, "[*B, H, W, C]")
    checks.check_float("features", features, 1, "[*B, F]")
    if images.shape[:-3] != features.shape[:-1]:
        raise ValueError(
            f"features: got shape {features.shape}, want [*B, F] with the *B of the images, "
            f"{images.shape}"
        )


def _check_last(name, x, axes):
    checks.check_float(name, x, len(axes), f"[*B, {', '.join(map(str, axes))}]")
    if x.shape[-len(axes) :] != axes:
        raise ValueError(f"{name}: got shape {x.shape}, want [*B, {', '.join(map(str, axes))}]")
