"""Redistribution where XLA on CPU needs help: with the axes of the index space apart.

Proportions are laid out as [b,k,m], with the batch axes as one, b; or where there are few points to
a chunk as [m,k,*B], since CPUs compute several numbers at once along the last axis.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from ..numerics import sum_all, sum_list
from .blocks import scan_tuples

# What is summed over tuples is summed in blocks of so many, unrolled.
_UNROLL = 8
# Below so many points in a chunk, batch axes are the last of proportions (measured).
FEW_POINTS = 16
# Up to this many points, comparing all pairs beats hashing: at once, or point by point (measured).
_MAX_PAIRWISE, _MAX_LOOP = 32, 256
_SLOTS_PER_POINT = 4

_einsum = functools.partial(jnp.einsum, precision="highest")


def redistribute(
    points: jax.Array, means: jax.Array, sigmas: jax.Array, values: jax.Array, where: jax.Array
) -> tuple[jax.Array]:
    """out[i] = sum over j of values[j] softmax_i(-|(points[i] - means[j]) / sigmas[j]|^2 / 2)."""
    shape = where.shape
    axis, points, where, tuples = _chunks(points, where, means, sigmas, values)

    def add_block(total, block):
        means, inverse_sigmas, values = block
        density = _densities(_distances(points, means, inverse_sigmas), where, axis)
        weights = values * _inverse(density.sum(axis, keepdims=True))
        return total + _combine_tuples(weights, density, axis), None

    zeros = jnp.zeros_like(where, values.dtype)
    total, _ = scan_tuples(add_block, zeros, tuples, axis=1, num_points=where.size)
    return (_arrange_back(total, axis, shape),)


def redistribute_grad(
    points: jax.Array,
    means: jax.Array,
    sigmas: jax.Array,
    values: jax.Array,
    where: jax.Array,
    out: jax.Array,
    grad: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As the reference; products with distances are summed in a single pass."""
    del out
    shapes = (means.shape, sigmas.shape, values.shape)
    axis, points, where, tuples = _chunks(points, where, means, sigmas, values)
    grad = _arrange(grad[..., None, :], axis)

    def block_gradients(_, block):
        means, inverse_sigmas, values = block
        distances = _distances(points, means, inverse_sigmas)
        density = _densities(distances, where, axis)
        total, product = _total_and_product(density, grad, axis)
        normaliser = _inverse(total)
        mean_grad = product * normaliser
        deviation = density * (grad - mean_grad)
        scale = values * normaliser
        grads = _gradients_of_positions(deviation, distances, inverse_sigmas, scale, axis)
        return None, (*grads, mean_grad)

    _, grads = scan_tuples(block_gradients, None, tuples, axis=1, num_points=where.size)
    return tuple(_arrange_back(x, axis, shape) for x, shape in zip(grads, shapes, strict=True))


def shares(
    points: jax.Array, means: jax.Array, sigmas: jax.Array, where: jax.Array
) -> tuple[jax.Array]:
    """As `redistribute`, for one tuple of value 1."""
    return redistribute(points, means, sigmas, jnp.ones_like(means[..., 0]), where)


def shares_grad(
    points: jax.Array,
    means: jax.Array,
    sigmas: jax.Array,
    where: jax.Array,
    shares: jax.Array,
    grad: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """As the reference, in one pass."""
    del where
    shapes = (means.shape, sigmas.shape)
    values = jnp.ones_like(means[..., 0])
    axis, points, shares, tuples = _chunks(points, shares, means, sigmas, values)
    means, inverse_sigmas, values = tuples
    grad = _arrange(grad[..., None, :], axis)
    total, product = _total_and_product(shares, grad, axis)
    deviation = shares * (grad - product / jnp.where(total > 0, total, 1))
    distances = _distances(points, means, inverse_sigmas)
    grads = _gradients_of_positions(deviation, distances, inverse_sigmas, values, axis)
    return tuple(_arrange_back(x, axis, shape) for x, shape in zip(grads, shapes, strict=True))


def _gradients_of_positions(deviation, distances, inverse_sigmas, scale, axis):
    """Gradients of means and sigmas, their r axes along `axis`."""
    terms = [deviation * d for d in distances] + [deviation * d * d for d in distances]
    weights = 2 * [scale * inverse_sigma for inverse_sigma in inverse_sigmas]
    grads = [x * weight for x, weight in zip(sum_all(terms, axis), weights, strict=True)]
    r = len(distances)
    return jnp.concatenate(grads[:r], axis), jnp.concatenate(grads[r:], axis)


def _chunks(points, where, means, sigmas, values):
    """The axes of the index space apart, which CPUs fuse far better, and batches where they suit.

    Proportions are laid out as [b,k,m], with the batch axes as one, b; or where there are few
    points to a chunk as [m,k,*B], since CPUs compute several numbers at once along the last axis.

    Returns:
      The axis of the points, 2 or 0, and the arguments with axes of size 1 to broadcast with
      proportions: r arrays of points in the dtype of the others; where, or other marks of points;
      and the tuples (r arrays of means, r arrays of 1 / sigmas, values).
    """
    m, r = points.shape[-2:]
    axis = 0 if m < FEW_POINTS else 2
    points = points.astype(means.dtype)
    points, means, sigmas = ([x[..., a] for a in range(r)] for x in (points, means, sigmas))
    return (
        axis,
        [_arrange(x[..., None, :], axis) for x in points],
        _arrange(where[..., None, :], axis),
        (
            [_arrange(x[..., None], axis) for x in means],
            [_arrange(1 / x[..., None], axis) for x in sigmas],
            _arrange(values[..., None], axis),
        ),
    )


def _arrange(x, axis):
    """From [*B,k,m] to the layout whose points are along `axis`."""
    return x.reshape(-1, *x.shape[-2:]) if axis == 2 else jnp.moveaxis(x, (-1, -2), (0, 1))


def _arrange_back(x, axis, shape):
    """From that layout to `shape`: that of [*B,k,m], of which k or m may be 1 and left out."""
    return (x if axis == 2 else jnp.moveaxis(x, (0, 1), (-1, -2))).reshape(shape)


def _distances(points, means, inverse_sigmas):
    """(point - mean) / sigma: r arrays of the size of proportions."""
    tuples = zip(points, means, inverse_sigmas, strict=True)
    return [(point - mean) * inverse_sigma for point, mean, inverse_sigma in tuples]


def _densities(distances, where, axis):
    """Densities relative to the densest allowed point.

    Every operand of the size of proportions is an array: XLA on CPU hands minimum and exponential
    to a library, and makes whole arrays of the constants that it hands over.
    """
    halves = sum_list([d * d for d in distances]) / 2
    halves = jnp.where(where, halves, jnp.inf)
    limits = jnp.finfo(halves.dtype)
    # Compilers may compute the squares twice and round them differently; where they are large, that
    # could lose the nearest point. Squares that agree to rounding are as near as the nearest.
    slack = 1 + 2 * len(distances) * limits.eps
    nearest = jnp.minimum(_least(halves, axis), limits.max / 4) * slack
    return jnp.exp(nearest - jnp.maximum(halves, nearest))


def _inverse(total):
    """1 / total of a tuple's densities: either the densest point adds 1, or there is no point."""
    return jnp.where(total > 0, 1 / jnp.maximum(total, 1), 0)


def _least(x, axis):
    """The minimum over `axis`, which is kept.

    Not as `min` over few points: XLA on CPU would hand that to a library of reductions, together
    with the exponential that follows, which takes the library several times as long as XLA.
    """
    if axis == 2:
        return x.min(axis, keepdims=True)
    least = lambda a, b: jnp.where(b < a, b, a)  # noqa: E731
    return jnp.expand_dims(jax.lax.reduce(x, np.array(np.inf, x.dtype), least, (axis,)), axis)


def _total_and_product(density, grad, axis):
    """The sums over the points of density and of density * grad."""
    if axis == 0:
        return sum_all([density, density * grad], axis)
    return density.sum(axis, keepdims=True), _einsum("bkm,bxm->bkx", density, grad)


def _combine_tuples(weights, density, axis):
    """The sum over the tuples of weights * density."""
    if axis == 2:
        return _einsum("bkx,bkm->bxm", weights, density)

    def term(j):
        weight, row = (jax.lax.dynamic_slice_in_dim(x, j, 1, 1) for x in (weights, density))
        return weight * row

    k, first = weights.shape[1], term(0)
    add = lambda j, total: total + term(j)  # noqa: E731
    return first if k == 1 else jax.lax.fori_loop(1, k, add, first, unroll=_UNROLL)


def duplicate_mask(points: jax.Array) -> tuple[jax.Array]:
    """Few points are compared in pairs. Others are hashed into a table.

    Where two different points meet in a slot, the earlier one is settled and the others are hashed
    anew. No arithmetic is done on coordinates; memory, and for many points time, is linear in m.
    """
    *leading, m, r = points.shape
    if m <= _MAX_PAIRWISE:
        axis = 0 if m < FEW_POINTS else len(leading)
        columns = [jnp.moveaxis(points[..., a], -1, axis) for a in range(r)]
        pairs = [jnp.expand_dims(x, axis + 1) == jnp.expand_dims(x, axis) for x in columns]
        same = functools.reduce(jnp.logical_and, pairs)
        position = jax.lax.broadcasted_iota(jnp.int32, columns[0].shape, axis)
        first = jnp.where(same, jnp.expand_dims(position, axis), m).min(axis + 1, initial=m)
        return (jnp.moveaxis(first < position, axis, -1),)

    if m <= _MAX_LOOP:
        columns = [jnp.moveaxis(points[..., a], -1, 0) for a in range(r)]
        position = jax.lax.broadcasted_iota(jnp.int32, columns[0].shape, 0)

        def compare(j, first):
            pairs = [x == jax.lax.dynamic_slice_in_dim(x, j, 1) for x in columns]
            same = functools.reduce(jnp.logical_and, pairs)
            return jnp.where(same, jnp.minimum(first, j), first)

        first = jax.lax.fori_loop(0, m, compare, jnp.full_like(columns[0], m), unroll=_UNROLL)
        return (jnp.moveaxis(first < position, 0, -1),)

    points = points.reshape(math.prod(leading), m, r)
    chunks = points.shape[0]
    chunk = jnp.arange(chunks, dtype=jnp.int32)[:, None]
    position = jnp.broadcast_to(jnp.arange(m, dtype=jnp.int32)[None], (chunks, m))
    num_bits = (_SLOTS_PER_POINT * m - 1).bit_length()

    def settle(state):
        salt, open_, copy = state
        slot = jnp.where(open_, _hash(points, salt, num_bits), 2**num_bits)
        table = jnp.full((chunks, 2**num_bits), m, jnp.int32)
        table = table.at[chunk, slot].min(position, mode="drop")
        winner = jnp.where(open_, table.at[chunk, slot].get(mode="clip"), 0)
        same = open_ & (points == points.at[chunk, winner].get(mode="clip")).all(-1)
        return salt + 1, open_ & ~same, copy | (same & (winner != position))

    # All True, and inside `shard_map` varying over the mesh axes that the points vary over.
    open_ = points[..., 0] == points[..., 0]
    state = (jnp.uint32(1), open_, jnp.zeros_like(open_))
    _, _, copy = jax.lax.while_loop(lambda state: state[1].any(), settle, state)
    return (copy.reshape(*leading, m),)


def _hash(points, salt, num_bits):
    """Hashes int32 [..., r] to int32 [...] in [0, 2^num_bits): rounds of multiply and xor-shift."""
    state = salt * jnp.uint32(0x85EBCA6B)
    for a in range(points.shape[-1]):
        state = (state ^ points[..., a].astype(jnp.uint32)) * jnp.uint32(0x9E3779B1)
        state = state ^ (state >> 15)
    return ((state * jnp.uint32(0x85EBCA6B)) >> (32 - num_bits)).astype(jnp.int32)
