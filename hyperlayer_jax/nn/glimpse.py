"""Glimpses: a few small patches of an image, read at points that a network chose."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hyperlayer_jax import checks
from hyperlayer_jax.grids import UNIT_CORNERS, affine_means, box_means, quad_means
from hyperlayer_jax.kernels import serving
from hyperlayer_jax.nn.sampler import Sampler
from hyperlayer_jax.tensors import contract
from hyperlayer_jax.transforms import transform_sigmas
from hyperlayer_jax.types import IndexTuples, RowSparseTensor

# The last of several glimpses begins with this part of the first's size. Glimpses that begin alike
# stay alike, and read the same pixels twice.
_SMALLEST = 0.5


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
      log_chances: float32 [*B, g], how much to make of each glimpse, chances that sum to 1; None
        where all are wanted.
    """

    patches: jax.Array
    means: jax.Array
    sigmas: jax.Array
    log_prob: jax.Array | None = dataclasses.field(default=None, kw_only=True)
    baseline: jax.Array | None = dataclasses.field(default=None, kw_only=True)
    log_chances: jax.Array | None = dataclasses.field(default=None, kw_only=True)


class Shape(Protocol):
    """Where the grid of a glimpse lies, as a few raw numbers say; zeros are in the middle.

    Centres and corners cannot leave the image, beyond which means have no gradient.
    """

    @staticmethod
    def means(
        raw: jax.Array, glimpse_shape: Sequence[int], image_shape: Sequence[int]
    ) -> jax.Array:
        """Maps float [*B, n] to means [*B, *glimpse_shape, 2] in indices."""

    @staticmethod
    def start(size: float) -> np.ndarray:
        """The raw numbers [n] of a centred square that covers this part of each axis."""


class _Box:
    @staticmethod
    def means(raw, glimpse_shape, image_shape):
        boxes = jnp.concatenate([jnp.tanh(raw[..., :2]), jax.nn.sigmoid(raw[..., 2:])], -1)
        return box_means(boxes, glimpse_shape, image_shape)

    @staticmethod
    def start(size):
        return np.array([0, 0, *[np.log(size / (1 - size))] * 2])


class _Quad:
    @staticmethod
    def means(raw, glimpse_shape, image_shape):
        corners = jnp.tanh(raw).reshape(*raw.shape[:-1], 2, 2, 2)
        return quad_means(corners, glimpse_shape, image_shape)

    @staticmethod
    def start(size):
        return np.arctanh(size * UNIT_CORNERS).ravel()


class _Affine:
    @staticmethod
    def means(raw, glimpse_shape, image_shape):
        linear, centre = raw[..., :4].reshape(*raw.shape[:-1], 2, 2), jnp.tanh(raw[..., 4:, None])
        return affine_means(jnp.concatenate([linear, centre], -1), glimpse_shape, image_shape)

    @staticmethod
    def start(size):
        return np.array([size, 0, 0, size, 0, 0])


_SHAPES: dict[str, type[Shape]] = {"box": _Box, "quad": _Quad, "affine": _Affine}


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
        sampler: Sampler | None = None,
        implementation: str | None = None,
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
          sampler: draws the points around the mean of every output pixel, and in evaluation should
            fix them (`evaluation="fixed"`). Where None, the four neighbours alone: the means of
            other output pixels are near, so that no region is out of reach.
          implementation: the kernel backend for what it serves, chosen by device where None.
          rngs: the streams `params` and `sample`.

        Raises:
          ValueError: an argument is out of range.
        """
        self.aim = Aim(
            num_features,
            glimpse_shape,
            num_glimpses,
            shape=shape,
            initial_size=initial_size,
            rngs=rngs,
        )
        checks.check_sigmas(sigma_scale, min_sigma)
        self.sigma_scale = sigma_scale
        self.min_sigma = min_sigma
        self.implementation = implementation
        if sampler is None:
            sampler = Sampler(num_global=0, num_local=0, rngs=rngs)
        self.sampler = sampler

    def __call__(self, images: jax.Array, features: jax.Array) -> Glimpses:
        """Reads images [*B, H, W, C] where features [*B, F] say."""
        means, sigma = self.aim(images, features)
        shape = images.shape[-3:-1]
        sigmas = transform_sigmas(sigma, shape, scale=self.sigma_scale, minimum=self.min_sigma)
        rows = rows_of(means)[..., None, :]
        tuples = IndexTuples(
            rows,
            rows_of(jnp.broadcast_to(sigmas[..., None, None, :], means.shape))[..., None, :],
            jnp.ones_like(rows[..., 0]),
        )
        # By name: `nnx.tabulate` takes no dataclass by position.
        indices, values = self.sampler(
            tuples=tuples, shape=shape, implementation=self.implementation
        )
        implementation = serving(self.implementation, "ell_spmm")
        patches = read(images, indices, values, means, implementation=implementation)
        return Glimpses(patches, means, sigmas)


class Aim(nnx.Module):
    """From features to the means of a grid over each glimpse's shape, and to raw sigmas."""

    def __init__(self, num_features, glimpse_shape, num_glimpses, *, shape, initial_size, rngs):
        if shape not in _SHAPES:
            raise ValueError(f"shape: got {shape!r}, want one of {', '.join(map(repr, _SHAPES))}")
        if not 0 < initial_size < 1:
            raise ValueError(f"initial_size: got {initial_size}, want a number between 0 and 1")
        self.glimpse_shape = checks.check_shape("glimpse_shape", glimpse_shape, 2)
        self.shape = shape
        checks.check_positive("num_glimpses", num_glimpses)
        sizes = np.geomspace(initial_size, _SMALLEST * initial_size, num_glimpses)
        starts = np.float32([[*_SHAPES[shape].start(size), 0] for size in sizes])
        self.start = nnx.Param(jnp.asarray(starts))
        self.linear = small_linear(num_features, starts.size, rngs)

    def __call__(self, images, features):
        """Returns means [*B, g, h, w, 2] and raw sigmas [*B, g], in float32."""
        check_inputs(images, features, self.linear.in_features)
        raw = self.linear(features.astype(jnp.float32)).reshape(
            *features.shape[:-1], *self.start.shape
        )
        raw = raw + self.start[...].reshape((1,) * (raw.ndim - 2) + self.start.shape)
        means = _SHAPES[self.shape].means(raw[..., :-1], self.glimpse_shape, images.shape[-3:-1])
        return means, raw[..., -1]


def small_linear(num_features, num_outputs, rngs):
    """A layer whose first outputs are next to nothing and differ a little from image to image."""
    scale = nnx.initializers.variance_scaling(1e-2, "fan_in", "normal")
    return nnx.Linear(num_features, num_outputs, kernel_init=scale, rngs=rngs)


def rows_of(means):
    """[*B, g, h, w, 2] -> [*B, g * h * w, 2]."""
    return means.reshape(*means.shape[:-4], math.prod(means.shape[-4:-1]), 2)


def read(images, indices, values, means, *, implementation=None):
    """Contracts images with one row of entries for each output pixel: [*B, g, h, w, C]."""
    images = checks.as_arrays(images)
    tensor = RowSparseTensor(
        indices, values.astype(images.dtype), means.shape[-4:-1], images.shape[-3:-1]
    )
    return contract(tensor, images, implementation=implementation)


def check_inputs(images, features, num_features):
    checks.check_float("images", images, 3, "[*B, H, W, C]")
    checks.check_float("features", features, 1, "[*B, F]")
    if features.shape != (*images.shape[:-3], num_features):
        raise ValueError(
            f"features: got shape {features.shape}, want [*B, {num_features}] with the *B of the "
            f"images, {images.shape}"
        )
