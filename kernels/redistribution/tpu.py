"""Pallas-Mosaic for TPU v5e and v6e: the shares of 8 tuples in all points of a chunk, in VMEM.

A chunk costs 8 tuples and 128 points at least: plain JAX serves small chunks better.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .. import tpu

# Points that the vector core works on at a time.
_POINTS = 512


def lacks(_, points, *operands):
    """Why these operands cannot be served, in words; "" where they can."""
    _, m, r = points.shape
    # Points and results have two buffers, densities one.
    rows = 2 * tpu.round_up(r + 2, tpu.SUBLANES) + 3 * tpu.SUBLANES
    return tpu.lacks_memory(operands, 4 * rows * tpu.round_up(m, _POINTS))


def redistribute(points, means, sigmas, values, where, *, interpret):
    """out[i] = sum over j of values[j] softmax_i(-|(points[i] - means[j]) / sigmas[j]|^2 / 2)."""
    b, m, rank = points.shape
    points, tuples = _points(points, where), _tuples(means, sigmas, values)
    size = points[0].shape[-1]
    (out,) = tpu.call(
        functools.partial(_redistribute_kernel, rank=rank),
        (b, tuples[0].shape[1] // tpu.SUBLANES),
        [points, tuples],
        [((b, 1, size), pl.BlockSpec((None, 1, size), lambda b, i: (b, 0, 0)))],
        scratch=[pltpu.VMEM((tpu.SUBLANES, size), jnp.float32)],
        interpret=interpret,
    )
    return (out[:, 0, :m],)


def _redistribute_kernel(points, tuples, out, density, *, rank):
    nearest = _nearest(points, tuples, rank)
    first = pl.program_id(1) == 0

    def densities(at, total):
        _, squares = _distances(points, tuples, at, rank)
        density[:, at] = jnp.exp((nearest - squares) / 2)
        return total + density[:, at]

    total = _for_points(points, densities, jnp.zeros((tpu.SUBLANES, _tile(points)), out.dtype))
    total = jnp.sum(total, axis=1, keepdims=True)
    weight = tuples[:, 2 * rank :] * _normaliser(total)

    def add(at, _):
        shares = jnp.sum(weight * density[:, at], axis=0, keepdims=True)
        out[:, at] = jnp.where(first, 0, out[:, at]) + shares

    _for_points(points, add, None)


def redistribute_grad(points, means, sigmas, values, where, out, grad, *, interpret):
    """Gradients of means, sigmas and values."""
    del out
    b, _, rank = points.shape
    k = values.shape[-1]
    points, tuples = _points(points, where, grad), _tuples(means, sigmas, values)
    (out,) = tpu.call(
        functools.partial(_redistribute_grad_kernel, rank=rank),
        (b, tuples[0].shape[1] // tpu.SUBLANES),
        [points, tuples],
        [(tuples[0].shape, tuples[1])],
        interpret=interpret,
    )
    return out[:, :k, :rank], out[:, :k, rank : 2 * rank], out[:, :k, 2 * rank]


def _redistribute_grad_kernel(points, tuples, out, *, rank):
    nearest = _nearest(points, tuples, rank)
    zeros = jnp.zeros((tpu.SUBLANES, _tile(points)), out.dtype)

    def densities(at):
        distances, squares = _distances(points, tuples, at, rank)
        return distances, jnp.exp((nearest - squares) / 2), points[pl.ds(rank + 1, 1), at]

    def add(at, state):
        total, weighted = state
        _, density, grad = densities(at)
        return total + density, weighted + density * grad

    total, weighted = (
        jnp.sum(x, axis=1, keepdims=True) for x in _for_points(points, add, (zeros, zeros))
    )
    mean_grad = weighted * _normaliser(total)

    def add_moments(at, moments):
        distances, density, grad = densities(at)
        deviation = density * (grad - mean_grad)
        terms = [deviation * d for d in distances] + [deviation * d * d for d in distances]
        return [x + term for x, term in zip(moments, terms, strict=True)]

    moments = _for_points(points, add_moments, [zeros] * (2 * rank))
    weight = tuples[:, 2 * rank :] * _normaliser(total)
    for a, moment in enumerate(moments):
        inverse = tuples[:, rank + a % rank : rank + a % rank + 1]
        out[:, a : a + 1] = jnp.sum(moment, axis=1, keepdims=True) * weight * inverse
    out[:, 2 * rank :] = mean_grad


def _points(points, where, *more):
    """[b,r+1+...,m] in VMEM: coordinates, 0 where allowed and inf elsewhere, and what more."""
    m = where.shape[-1]
    padding = -m % (tpu.LANES if m <= _POINTS else _POINTS)
    where = jnp.pad(where, ((0, 0), (0, padding)))
    absent = jnp.where(where, 0, jnp.inf).astype(jnp.float32)
    rows = [*jnp.moveaxis(points.astype(jnp.float32), -1, 0), *more]
    rows = [jnp.pad(x, ((0, 0), (0, padding))) for x in rows]
    rank = points.shape[-1]
    rows = jnp.stack([*rows[:rank], absent, *rows[rank:]], axis=1)
    return rows, pl.BlockSpec((None, *rows.shape[1:]), lambda b, i: (b, 0, 0))


def _tuples(means, sigmas, values):
    """[b,k,2r+1], 8 tuples in a block: means, 1 / sigmas, values."""
    k = values.shape[-1]
    tuples = jnp.concatenate([means, 1 / sigmas, values[..., None]], axis=-1)
    tuples = jnp.pad(tuples, ((0, 0), (0, -k % tpu.SUBLANES), (0, 0)))
    return tuples, tpu.row_block(tpu.SUBLANES, tuples.shape[-1])


def _for_points(points, step, init):
    """`step(at, state)` for each slice `at` of points."""
    tile = _tile(points)

    def body(t, state):
        return step(pl.ds(pl.multiple_of(t * tile, tile), tile), state)

    return lax.fori_loop(0, points.shape[1] // tile, body, init)


def _tile(points):
    return min(points.shape[1], _POINTS)


def _distances(points, tuples, at, rank):
    """The r arrays [8,n] of (point - mean) / sigma, and the sum of their squares, inf if absent."""
    distances = [
        (points[pl.ds(a, 1), at] - tuples[:, a : a + 1]) * tuples[:, rank + a : rank + a + 1]
        for a in range(rank)
    ]
    squares = functools.reduce(jnp.add, [d * d for d in distances])
    return distances, squares + points[pl.ds(rank, 1), at]


def _nearest(points, tuples, rank):
    """The smallest squared distance [8,1] of each tuple."""

    def lower(at, nearest):
        return jnp.minimum(nearest, _distances(points, tuples, at, rank)[1])

    nearest = _for_points(points, lower, jnp.full((tpu.SUBLANES, _tile(points)), tpu.LARGEST))
    return jnp.min(nearest, axis=1, keepdims=True)


def _normaliser(total):
    """1 / total: the nearest point adds 1 to it, or there is no point."""
    return jnp.where(total > 0, 1 / jnp.maximum(total, 1), 0)
