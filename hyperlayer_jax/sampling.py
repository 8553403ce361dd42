"""Integer points around real-valued means."""

import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from hyperlayer_jax import checks
from hyperlayer_jax.kernels import accumulator, materialize_points
from hyperlayer_jax.transforms import last_indices

# Where in its cell a fixed point lies: about the middle, but irrational, so that the quantiles of a
# flat Gaussian are not halfway between indices, where compilers may round to either.
_OFFSET = 5**0.5 / 4


def sample_indices(
    key: jax.Array,
    means: jax.Array,
    shape: Sequence[int],
    *,
    num_global: int = 0,
    num_local: int = 0,
    region: int | Sequence[int] | None = None,
) -> jax.Array:
    """Draws the integer points over which the tuples of each chunk spread their values.

    Around each mean: its 2^r floor/ceil neighbours, `num_global` points uniform over the whole
    index space, and `num_local` points uniform over a box of `region` indices centred on the
    rounded mean and shifted back inside at the borders (equation 4 of docs/method.md).
    Means outside the space are clipped to it.

    Args:
      key: a PRNG key.
      means: float [*B, k, r], any finite values.
      shape: the r axes of the index space.
      num_global: points per tuple drawn from the whole space.
      num_local: points per tuple drawn from the region.
      region: the axes of the box, or one int for all of them; an axis longer than that of the
        space is clipped to it. Needed when num_local > 0.

    Returns:
      int32 [*B, m, r] in [0, shape), m = k * (2^r + num_global + num_local), tuple by tuple:
      neighbours, global points, local points. No gradient reaches the means through it.

    Raises:
      ValueError: an argument has the wrong shape, dtype or range.
    """
    shape, num_global, num_local = _check(means, shape, num_global, num_local)
    *leading, k, r = means.shape
    global_key, local_key = jax.random.split(key)
    means = jax.lax.stop_gradient(means)[..., None, :]
    points = [_neighbours(means, shape)]
    if num_global:
        sizes = np.reshape(shape, (1,) * (means.ndim - 1) + (r,)).astype(np.int32)
        points.append(_draw(global_key, (*leading, k, num_global, r), sizes))
    if num_local:
        start, region = _box(means, shape, region)
        points.append(start + _draw(local_key, (*leading, k, num_local, r), region))
    return _join(points)


def fixed_indices(
    means: jax.Array,
    sigmas: jax.Array,
    shape: Sequence[int],
    *,
    num_global: int = 0,
    num_local: int = 0,
    region: int | Sequence[int] | None = None,
) -> jax.Array:
    """What `sample_indices` draws, without chance, for evaluation.

    Around each mean: its neighbours, `num_global` points at quantiles of its Gaussian, which is cut
    off at the borders, and `num_local` points that divide the region evenly (equation 14 of
    docs/method.md).

    Args:
      means: float [*B, k, r], any finite values.
      sigmas: float [*B, k, r].
      shape: the r axes of the index space.
      num_global: see above.
      num_local: see above.
      region: see `sample_indices`.

    Returns:
      int32 [*B, m, r], like `sample_indices`.

    Raises:
      ValueError: an argument has the wrong shape, dtype or range.
    """
    shape, num_global, num_local = _check(means, shape, num_global, num_local)
    r = means.shape[-1]
    means, sigmas = (jax.lax.stop_gradient(x)[..., None, :] for x in (means, sigmas))
    points = [_neighbours(means, shape)]
    aligned = (1,) * (means.ndim - 2) + (-1, r)
    if num_global:
        dtype = accumulator(means.dtype)
        shares = _even(num_global, r).astype(dtype).reshape(aligned)
        spread = _quantiles(shares, means.astype(dtype), sigmas.astype(dtype), shape)
        points.append(_to_indices(jnp.round(spread), shape))
    if num_local:
        start, region = _box(means, shape, region)
        points.append(start + (_even(num_local, r).reshape(aligned) * region).astype(np.int32))
    return _join(points)


def _check(means, shape, num_global, num_local):
    checks.check_float("means", means, 2, "[*B, k, r]")
    shape = checks.check_shape("shape", shape, means.shape[-1])
    num_global = checks.check_count("num_global", num_global)
    return shape, num_global, checks.check_count("num_local", num_local)


def _neighbours(means, shape):
    """The 2^r integer points around means [*B, k, 1, r]."""
    low, high = _to_indices(jnp.floor(means), shape), _to_indices(jnp.ceil(means), shape)
    corners = np.array(list(itertools.product([False, True], repeat=len(shape))))
    return jnp.where(corners.reshape((1,) * (means.ndim - 2) + corners.shape), high, low)


def _box(means, shape, region):
    """Where the regions around means [*B, k, 1, r] start, and the axes that they have."""
    if region is None:
        raise ValueError("region: got None, want the axes of the region when num_local > 0")
    region = (region,) * len(shape) if np.ndim(region) == 0 else region
    region = checks.check_shape("region", region, len(shape))
    aligned = (1,) * (means.ndim - 1) + (-1,)
    sizes = np.reshape(shape, aligned).astype(np.int32)
    region = np.minimum(np.reshape(region, aligned), sizes).astype(np.int32)
    return jnp.clip(round_means(means, shape) - region // 2, 0, sizes - region), region


def _join(points):
    """Points [*B, k, n, r] of several kinds, tuple by tuple: [*B, m, r]."""
    points = jnp.concatenate(points, axis=-2)
    *leading, k, n, r = points.shape
    return materialize_points(points.reshape(*leading, k * n, r))


def _quantiles(shares, means, sigmas, shape):
    """Quantiles, at shares in [0, 1), of Gaussians that are cut off at the borders of the space."""
    sigmas = jnp.maximum(sigmas, jnp.finfo(sigmas.dtype).tiny)
    last = last_indices(shape, means.dtype).reshape((1,) * (means.ndim - 1) + (-1,))
    low, high = (-0.5 - means) / sigmas, (last + 0.5 - means) / sigmas
    # Turned around where the mean lies below the space: only lower tails keep their digits.
    below = low > 0
    low, high = jnp.where(below, -high, low), jnp.where(below, -low, high)
    start, stop = (jax.scipy.special.ndtr(x) for x in (low, high))
    # Too far away for any digits, the space is the border that is nearest.
    scores = jnp.where(stop > 0, jax.scipy.special.ndtri(start + shares * (stop - start)), high)
    return means + sigmas * jnp.where(below, -1, 1) * jnp.clip(scores, low, high)


def _even(count: int, r: int) -> np.ndarray:
    """Points that fill the unit cube evenly, [count, r] in [0, 1).

    The first axis is divided evenly. The others are additive recurrences by powers of the root of
    x^r = x + 1 (for r = 2 the golden ratio, and the points a Fibonacci lattice).
    """
    root = 1.0
    for _ in range(64):
        root = (1 + root) ** (1 / r)
    turns = np.arange(count)[:, None] + _OFFSET
    rates = np.concatenate([[1 / count], root ** -np.arange(1.0, r)])
    return turns * rates % 1


def _draw(key: jax.Array, shape: tuple[int, ...], sizes: np.ndarray) -> jax.Array:
    """Draws integers, int32 of `shape`, uniformly from [0, sizes); sizes int32 broadcast with it.

    They are the upper words of the products of `sizes` and 32 random bits, made of halves: exact in
    32 bits, always in bounds, and no integer more likely than another by more than one word in
    2^32. (`jax.random.randint` draws twice as many bits and takes remainders, which CPUs do one at
    a time.) Bits are drawn as one flat array, since counting them along several axes costs as much
    as drawing them.
    """
    bits = jax.random.bits(key, (math.prod(shape),), jnp.uint32).reshape(shape)
    high, low = bits >> 16, bits & 0xFFFF
    size_high, size_low = np.uint32(sizes >> 16), np.uint32(sizes & 0xFFFF)
    middle = high * size_low + (low * size_low >> 16)
    carry = (low * size_high + (middle & 0xFFFF)) >> 16
    return (high * size_high + (middle >> 16) + carry).astype(jnp.int32)


def round_means(means: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Rounds means [*B, k, r] to int32 indices in [0, shape), halves to even."""
    return _to_indices(jnp.round(jax.lax.stop_gradient(means)), shape)


def _to_indices(whole: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Clips whole numbers, floating [..., r], to [0, shape) and makes them int32."""
    whole = whole.astype(accumulator(whole.dtype))
    last = last_indices(shape, whole.dtype).reshape((1,) * (whole.ndim - 1) + (-1,))
    return jnp.clip(whole, 0, last).astype(jnp.int32)
