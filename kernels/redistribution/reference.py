"""The meaning of redistribution, chunk by chunk (equations 4 to 7 of docs/method.md)."""

import functools

import jax
import jax.numpy as jnp

from ..numerics import dot
from .blocks import scan_tuples

# Up to this many points of a chunk are compared in pairs.
_MAX_PAIRS = 128


@functools.partial(jnp.vectorize, signature="(m,r)->(m)")
def _duplicate_mask(points):
    m = points.shape[0]
    position = jnp.arange(m, dtype=jnp.int32)
    if m <= _MAX_PAIRS:
        same = (points[:, None] == points[None]).all(-1)
        return (same & (position[:, None] > position[None])).any(-1)
    # Sorted, copies are neighbours, the first of them first.
    *columns, position = jax.lax.sort((*points.T, position), num_keys=points.shape[1])
    same = [x[1:] == x[:-1] for x in columns]
    copy = jnp.pad(functools.reduce(jnp.logical_and, same), (1, 0))
    return jax.lax.sort((position, copy.astype(jnp.int32)), num_keys=1)[1] > 0


def duplicate_mask(points: jax.Array) -> tuple[jax.Array]:
    """Marks every copy of a point of [*B,m,r] but the first: bool [*B,m]."""
    return (_duplicate_mask(points),)


def redistribute(
    points: jax.Array, means: jax.Array, sigmas: jax.Array, values: jax.Array, where: jax.Array
) -> tuple[jax.Array]:
    """out[i] = sum over j of values[j] softmax_i(-|(points[i] - means[j]) / sigmas[j]|^2 / 2)."""

    @functools.partial(jnp.vectorize, signature="(m,r),(k,r),(k,r),(k),(m)->(m)")
    def spread(points, means, sigmas, values, where):
        def add_block(total, block):
            means, inverse_sigmas, values = block
            distances = _distances(points, means, inverse_sigmas)
            return total + dot("k,km->m", values, _shares(distances, where)), None

        zeros = jnp.zeros_like(where, values.dtype)
        tuples = means, 1 / sigmas, values
        return scan_tuples(add_block, zeros, tuples, axis=0, num_points=where.size)[0]

    return (spread(points, means, sigmas, values, where),)


def redistribute_grad(
    points: jax.Array,
    means: jax.Array,
    sigmas: jax.Array,
    values: jax.Array,
    where: jax.Array,
    out: jax.Array,
    grad: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of means, sigmas and values; the shares are made anew.

    A tuple's value gets the mean of the gradient under its shares; what its shares get is the
    deviation from that mean.
    """
    del out

    @functools.partial(jnp.vectorize, signature="(m,r),(k,r),(k,r),(k),(m),(m)->(k,r),(k,r),(k)")
    def gradients(points, means, sigmas, values, where, grad):
        def of_block(_, block):
            means, inverse_sigmas, values = block
            distances = _distances(points, means, inverse_sigmas)
            shares = _shares(distances, where)
            mean_grad = dot("km,m->k", shares, grad)
            deviation = shares * (grad[None] - mean_grad[:, None])
            return None, (*_of_positions(deviation, distances, inverse_sigmas, values), mean_grad)

        tuples = means, 1 / sigmas, values
        return scan_tuples(of_block, None, tuples, axis=0, num_points=where.size)[1]

    return gradients(points, means, sigmas, values, where, grad)


def shares(
    points: jax.Array, means: jax.Array, sigmas: jax.Array, where: jax.Array
) -> tuple[jax.Array]:
    """What a chunk's only tuple gives to the points [*B,m], for a value of 1."""
    return redistribute(points, means, sigmas, jnp.ones_like(means[..., 0]), where)


def shares_grad(
    points: jax.Array,
    means: jax.Array,
    sigmas: jax.Array,
    where: jax.Array,
    shares: jax.Array,
    grad: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Gradients of means and sigmas: as for any softmax, its result is all that is needed of it."""
    del where

    @functools.partial(jnp.vectorize, signature="(m,r),(k,r),(k,r),(m),(m)->(k,r),(k,r)")
    def gradients(points, means, sigmas, shares, grad):
        distances = _distances(points, means, 1 / sigmas)
        deviation = shares * (grad - (shares * grad).sum())
        ones = jnp.ones_like(means[:, 0])
        return _of_positions(deviation[None], distances, 1 / sigmas, ones)

    return gradients(points, means, sigmas, shares, grad)


def _distances(points, means, inverse_sigmas):
    """(point - mean) / sigma: [k,m,r]."""
    return (points.astype(means.dtype)[None] - means[:, None]) * inverse_sigmas[:, None]


def _shares(distances, where):
    """Shares [k,m] of the allowed points.

    Densities are relative to that of the nearest point, which adds 1, or there is no point.
    """
    halves = (distances * distances).sum(-1) / 2
    halves = jnp.where(where[None], halves, jnp.inf)
    largest = jnp.finfo(halves.dtype).max / 4
    nearest = jnp.minimum(jax.lax.stop_gradient(halves.min(-1, keepdims=True)), largest)
    # Compilers may compute the squares twice and round them differently: where they are large, that
    # could lose the nearest point. Squares that agree to rounding are as near as the nearest.
    slack = 1 + 2 * distances.shape[-1] * jnp.finfo(halves.dtype).eps
    excess = halves - nearest
    near = halves <= nearest * slack
    density = jnp.exp(-jnp.where(near, excess - jax.lax.stop_gradient(excess), excess))
    total = density.sum(-1, keepdims=True)
    return density / jnp.where(total > 0, total, 1)


def _of_positions(deviation, distances, inverse_sigmas, values):
    """Gradients of means and sigmas [k,r], from what the shares [k,m] get beside the mean."""
    scale = values[:, None] * inverse_sigmas
    first = dot("km,kmr->kr", deviation, distances)
    second = dot("km,kmr->kr", deviation, distances * distances)
    return first * scale, second * scale
