"""Redistribution: each tuple spreads its value over the points of its chunk."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from hyperlayer_jax import checks
from hyperlayer_jax.sampling import duplicate_mask
from hyperlayer_jax.types import IndexTuples, compute_dtype, vary_alike

# Below this sigma, in indices, a Gaussian is a point; and beyond this coordinate there is no index.
# Together they keep squared distances, and their products with 1 / sigma^2, inside float32.
_MIN_SIGMA = 1e-5
_MAX_COORDINATE = 2.0**32
# Proportions are [*B, k, m]; larger ones are made and used up in blocks of tuples.
_MAX_BLOCK = 2**23

# In full float32, also where a device would rather multiply shorter numbers.
_einsum = functools.partial(jnp.einsum, precision="highest")


def redistribute(
    indices: jax.Array, tuples: IndexTuples, *, where: jax.Array | None = None
) -> jax.Array:
    """Spreads the value of every tuple over the points of its chunk, by Gaussian density.

    Tuple j gives point i the share softmax_i(-|(i - mean_j) / sigma_j|^2 / 2) of its value, over
    the allowed points of the chunk, copies counted once; a point gets the sum of its shares
    (section 2 of the paper, "redistribution", with densities normalised in log space). So the
    points of a chunk sum to its tuples, and a tuple with no allowed point adds nothing. A sigma
    of 0 is a point: all goes to the nearest points.

    The gradient is written by hand and recomputes the shares; chunks too large for an [m, k] array
    are walked in blocks of tuples.

    Args:
      indices: int32 [*B, m, r], the points.
      tuples: means and sigmas [*B, k, r] (sigmas >= 0), values [*B, k].
      where: bool [*B, m], the allowed points; all where None.

    Returns:
      [*B, m], of the dtype of `tuples.values`. Computed in float32 (float64 for float64 tuples).
      0 at copies and at points that are not allowed.

    Raises:
      ValueError: an argument has the wrong shape or dtype.
    """
    checks.check_tuples(tuples)
    checks.check_indices("indices", indices, 2, "[*B, m, r]")
    *leading, m, r = indices.shape
    if tuples.means.shape[:-2] != tuple(leading) or tuples.means.shape[-1] != r:
        raise ValueError(
            f"indices: got shape {indices.shape}, want [*B, m, r] with the *B and r of "
            f"tuples.means, {tuples.means.shape}"
        )
    allowed = ~duplicate_mask(indices)
    if where is not None:
        checks.check_where(where, (*leading, m))
        allowed &= where

    k = tuples.values.shape[-1]
    chunks = math.prod(leading)
    dtype = compute_dtype(tuples.values.dtype)
    means = jnp.clip(tuples.means.astype(dtype), -_MAX_COORDINATE, _MAX_COORDINATE)
    sigmas = jnp.maximum(tuples.sigmas.astype(dtype), _MIN_SIGMA)
    points = jnp.moveaxis(indices.reshape(chunks, m, r), -1, 0).astype(dtype)
    shares = _redistribute(
        *vary_alike(
            points,
            allowed.reshape(chunks, m),
            means.reshape(chunks, k, r),
            sigmas.reshape(chunks, k, r),
            tuples.values.astype(dtype).reshape(chunks, k),
        )
    )
    return shares.reshape(*leading, m).astype(tuples.values.dtype)


@jax.custom_vjp
def _redistribute(points, allowed, means, sigmas, values):
    """points [r, B, m], allowed [B, m], means and sigmas [B, k, r], values [B, k] -> [B, m]."""

    def add_block(total, block):
        means, sigmas, values = block
        density, normaliser = _densities(_distances(points, means, sigmas), allowed)
        return total + _einsum("bk,bkm->bm", values * normaliser, density), None

    total = vary_alike(jnp.zeros(allowed.shape, values.dtype), values)[0]
    return _scan_tuples(add_block, total, (means, sigmas, values), allowed.shape)[0]


def _redistribute_fwd(points, allowed, means, sigmas, values):
    arguments = (points, allowed, means, sigmas, values)
    return _redistribute(*arguments), arguments


def _redistribute_bwd(arguments, gradient):
    points, allowed, means, sigmas, values = arguments

    def block_gradients(_, block):
        means, sigmas, values = block
        distances = _distances(points, means, sigmas)
        density, normaliser = _densities(distances, allowed)
        # A tuple's value gets the mean of the gradient under its shares; what its shares get is
        # the deviation from that mean. Products with distances are summed in a single pass.
        mean_gradient = _einsum("bkm,bm->bk", density, gradient) * normaliser
        deviation = density * (gradient[:, None, :] - mean_gradient[..., None])
        moments = _sums([deviation * d for d in distances] + [deviation * d * d for d in distances])
        first, second = jnp.split(jnp.stack(moments, axis=-1), 2, axis=-1)
        weight = (values * normaliser)[..., None] / sigmas
        return None, (first * weight, second * weight, mean_gradient)

    blocks = (means, sigmas, values)
    _, gradients = _scan_tuples(block_gradients, None, blocks, allowed.shape)
    return None, None, *gradients


_redistribute.defvjp(_redistribute_fwd, _redistribute_bwd)


def _distances(points, means, sigmas):
    """The r arrays [B, k, m] of (point - mean) / sigma: axes apart, which CPUs fuse far better."""
    inverse = 1 / sigmas
    return [
        (p[:, None, :] - means[..., a, None]) * inverse[..., a, None] for a, p in enumerate(points)
    ]


def _densities(distances, allowed):
    """Densities [B, k, m] relative to the densest allowed point, and 1 / their sums [B, k]."""
    squares = functools.reduce(jnp.add, [d * d for d in distances])
    squares = jnp.where(allowed[:, None, :], squares, jnp.inf)
    limits = jnp.finfo(squares.dtype)
    nearest = squares.min(-1, keepdims=True, initial=limits.max / 2)
    # Compilers may compute the squares twice and round them differently; where they are large, that
    # could lose the nearest point. Squares that agree to rounding are as near as the nearest.
    slack = 1 + 2 * len(distances) * limits.eps
    density = jnp.exp(jnp.minimum(nearest * slack - squares, 0) / 2)
    total = density.sum(-1)
    return density, jnp.where(total > 0, 1 / jnp.maximum(total, 1), 0)


def _sums(terms):
    """Sums several arrays over their last axis in one pass."""
    zeros = [np.zeros((), t.dtype) for t in terms]
    add = lambda a, b: tuple(x + y for x, y in zip(a, b, strict=True))  # noqa: E731
    return jax.lax.reduce(tuple(terms), tuple(zeros), add, (terms[0].ndim - 1,))


def _scan_tuples(step, carry, tuples, points_shape):
    """`lax.scan` over blocks of tuples, their axis 1; a single call where they fit at once."""
    means, sigmas, values = tuples
    chunks, k = values.shape
    num_blocks = min(k, -(-chunks * k * points_shape[-1] // _MAX_BLOCK))
    if num_blocks <= 1:
        return step(carry, tuples)
    size = -(-k // num_blocks)
    num_blocks = -(-k // size)

    def split(x, fill):
        padding = [(0, 0), (0, num_blocks * size - k)] + [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x, padding, constant_values=fill)
        return jnp.moveaxis(x.reshape(chunks, num_blocks, size, *x.shape[2:]), 1, 0)

    def join(x):
        return jnp.moveaxis(x, 0, 1).reshape(chunks, num_blocks * size, *x.shape[3:])[:, :k]

    carry, out = jax.lax.scan(step, carry, (split(means, 0), split(sigmas, 1), split(values, 0)))
    return carry, jax.tree.map(join, out)
