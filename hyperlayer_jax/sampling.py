"""Integer points around real-valued means."""

import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from hyperlayer_jax import checks
from hyperlayer_jax.kernels import accumulator, materialize_points
from hyperlayer_jax.lift import lift
from hyperlayer_jax.transforms import last_indices, per_axis

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
    means = checks.as_arrays(means)
    shape, counts, region = _check(means, shape, num_global, num_local, region)
    keys = jax.random.split(key)
    anywhere, within = (
        _draw(key, (*means.shape[:-1], count, len(shape)), axes)
        for key, count, axes in zip(keys, counts, (shape, region), strict=True)
    )
    return _around(means, anywhere, within, shape, region)


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
    means, sigmas = checks.as_arrays((means, sigmas))
    shape, counts, region = _check(means, shape, num_global, num_local, region)
    shares, places = (_even(count, len(shape)) for count in counts)
    means, sigmas = (jax.lax.stop_gradient(x).astype(accumulator(x.dtype)) for x in (means, sigmas))

    @lift("(r),(r)->(g,r)")
    def spread(mean, sigma):
        return _to_indices(jnp.round(_quantiles(shares, mean[None], sigma[None], shape)), shape)

    within = jnp.asarray(places * region, jnp.int32)
    within = jnp.broadcast_to(within, (*means.shape[:-1], *within.shape))
    return _around(means, spread(means, sigmas), within, shape, region)


def _check(means, shape, num_global, num_local, region):
    """The shape, how many points are global and local, and the axes of the region."""
    checks.check_float("means", means, 2, "[*B, k, r]")
    shape = checks.check_shape("shape", shape, means.shape[-1])
    counts = (
        checks.check_count("num_global", num_global),
        checks.check_count("num_local", num_local),
    )
    if counts[1] == 0:
        return shape, counts, shape
    if region is None:
        raise ValueError("region: got None, want the axes of the region when num_local > 0")
    region = (region,) * len(shape) if np.ndim(region) == 0 else region
    return shape, counts, tuple(map(min, checks.check_shape("region", region, len(shape)), shape))


def _around(means, anywhere, within, shape, region):
    """Neighbours of means [*B,k,r], points anywhere and points within the region of each mean.

    `anywhere` and `within` are int32 [*B,k,n,r], the latter counted from the start of the region.
    Returns int32 [*B,m,r], tuple by tuple.
    """
    corners = np.array(list(itertools.product([False, True], repeat=len(shape))))

    @lift("(k,r),(k,g,r),(k,l,r)->(m,r)")
    def join(means, anywhere, within):
        low, high = (_to_indices(f(means), shape)[:, None] for f in (jnp.floor, jnp.ceil))
        middle = round_means(means, shape)
        start = [
            jnp.clip(middle[:, a] - box // 2, 0, size - box)
            for a, (size, box) in enumerate(zip(shape, region, strict=True))
        ]
        neighbours = jnp.where(corners[None], high, low)
        near = within + jnp.stack(start, -1)[:, None]
        return jnp.concatenate([neighbours, anywhere, near], axis=1).reshape(-1, len(shape))

    return materialize_points(join(jax.lax.stop_gradient(means), anywhere, within))


def _quantiles(shares, mean, sigma, shape):
    """Quantiles, at shares [n,r] in [0, 1), of a Gaussian [1,r] that is cut off at the borders."""
    sigma = jnp.maximum(sigma, jnp.finfo(sigma.dtype).tiny)
    last = last_indices(shape, mean.dtype)[None]
    low, high = (-0.5 - mean) / sigma, (last + mean.dtype.type(0.5) - mean) / sigma
    # Turned around where the mean lies below the space: only lower tails keep their digits.
    below = low > 0
    low, high = jnp.where(below, -high, low), jnp.where(below, -low, high)
    start, stop = (jax.scipy.special.ndtr(x) for x in (low, high))
    # Too far away for any digits, the space is the border that is nearest.
    inside = jax.scipy.special.ndtri(start + shares.astype(mean.dtype) * (stop - start))
    scores = jnp.clip(jnp.where(stop > 0, inside, high), low, high)
    return mean + sigma * jnp.where(below, -1, 1) * scores


def _even(count: int, r: int) -> np.ndarray:
    """Points that fill the unit cube evenly, [count, r] in [0, 1).

    The first axis is divided evenly. The others are additive recurrences by powers of the root of
    x^r = x + 1 (for r = 2 the golden ratio, and the points a Fibonacci lattice).
    """
    root = 1.0
    for _ in range(64):
        root = (1 + root) ** (1 / r)
    turns = np.arange(count)[:, None] + _OFFSET
    rates = np.concatenate([[1 / max(count, 1)], root ** -np.arange(1.0, r)])
    return turns * rates % 1


def _draw(key, shape, sizes):
    """Draws integers, int32 of `shape` [...,r], uniformly from [0, sizes[r]).

    They are the upper words of the products of `sizes` and 32 random bits, made of halves: exact in
    32 bits, always in bounds, and no integer more likely than another by more than one word in
    2^32. (`jax.random.randint` draws twice as many bits and takes remainders, one at a time.) Bits
    are drawn as one flat array, since counting them along several axes costs as much as drawing
    them.
    """

    bits = jax.random.bits(key, (math.prod(shape),), jnp.uint32).reshape(shape)
    high, low = bits >> 16, bits & 0xFFFF
    sizes = per_axis(sizes, bits).astype(np.uint32)
    size_high, size_low = sizes >> 16, sizes & 0xFFFF
    middle = high * size_low + (low * size_low >> 16)
    carry = (low * size_high + (middle & 0xFFFF)) >> 16
    return (high * size_high + (middle >> 16) + carry).astype(jnp.int32)


def round_means(means: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Rounds means [*B, k, r] to int32 indices in [0, shape), halves to even."""
    return _to_indices(jnp.round(jax.lax.stop_gradient(means)), shape)


def _to_indices(whole, shape):
    """Clips whole numbers, floating [..., r], to [0, shape) and makes them int32."""
    whole = whole.astype(accumulator(whole.dtype))
    last = per_axis(last_indices(shape, whole.dtype), whole)
    return jnp.clip(whole, 0, last).astype(jnp.int32)
