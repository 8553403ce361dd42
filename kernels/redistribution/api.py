"""Redistribution on raw arrays: what it takes, and which primitive it is."""

from typing import Any

import jax
import jax.numpy as jnp

from ..arguments import check, check_axis
from ..dispatch import serving
from ..numerics import accumulator, materialize
from ..primitives import function
from . import cpu

# Below this sigma, in indices, a Gaussian is a point; and beyond this coordinate there is no index.
# Together they keep squared distances, and their products with 1 / sigma^2, inside float32.
_MIN_SIGMA = 1e-5
_MAX_COORDINATE = 2.0**32


def duplicate_mask(points: jax.Array, *, implementation: str | None = None) -> jax.Array:
    """Marks every copy of a point but the first, exactly, for all int32 coordinates.

    Args:
      points: int32 [*B,m,r], r >= 1.
      implementation: backend by name, or None to choose.

    Returns:
      bool [*B,m], True where an earlier point of the same chunk has the same coordinates.

    Raises:
      ValueError: on a shape, dtype or implementation other than these.
    """
    (points,) = check(implementation, points=(points, "mr"))
    check_axis("points", points, "r")
    results = [(points.shape[-2:-1], bool)]
    return function(
        "duplicate_mask",
        points,
        leading=points.ndim - 2,
        results=results,
        implementation=implementation,
    )


def materialize_points(points: jax.Array) -> jax.Array:
    """The same points, which CPUs keep in memory as what is made of them is laid out.

    Args:
      points: int32 [*B,m,r].

    Returns:
      The points.
    """
    # Few points have the chunks last.
    if points.ndim == 2 or points.shape[-2] >= cpu.FEW_POINTS:
        return materialize(points)
    return jnp.moveaxis(materialize(jnp.moveaxis(points, -3, -1)), -1, -3)


def redistribute(
    points: jax.Array,
    means: jax.Array,
    sigmas: jax.Array,
    values: jax.Array,
    *,
    where: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Spreads the value of each tuple over the points, in proportion to its Gaussian density.

    out[i] = sum over j of values[j] softmax_i(-|(points[i] - means[j]) / sigmas[j]|^2 / 2), over
    the points that `where` allows, copies counted once. Densities are taken relative to the densest
    point, so nothing overflows; a tuple without an allowed point adds nothing. No array of size
    m x k is formed where m and k are large.

    Args:
      points: int32 [*B,m,r], r >= 1.
      means: float [*B,k,r], taken to lie within 2^32 of 0.
      sigmas: float [*B,k,r], of the dtype of `means`; below 1e-5 they count as 1e-5.
      values: float [*B,k], of the dtype of `means`.
      where: bool [*B,m], the allowed points; all where None.
      implementation: backend by name, or None to choose.

    Returns:
      [*B,m], of the dtype of `values`; 0 at copies, and where `where` is False.

    Raises:
      ValueError: on a shape, dtype or implementation other than these.
    """
    if where is None:
        where = jnp.ones(jnp.shape(points)[:-1], bool)
    points, means, sigmas, values, where = check(
        implementation,
        points=(points, "mr"),
        means=(means, "kr"),
        sigmas=(sigmas, "kr"),
        values=(values, "k"),
        where=(where, "m"),
    )
    where &= ~duplicate_mask(points, implementation=serving(implementation, "duplicate_mask"))
    dtype = accumulator(values.dtype)
    means = jnp.clip(means.astype(dtype), -_MAX_COORDINATE, _MAX_COORDINATE)
    # The gradient of `maximum`, which shares ties, takes longer.
    sigmas = jnp.where(sigmas < _MIN_SIGMA, _MIN_SIGMA, sigmas.astype(dtype))
    options: dict[str, Any] = {
        "leading": where.ndim - 1,
        "results": [(where.shape[-1:], dtype)],
        "implementation": implementation,
    }
    weights = values.astype(dtype)
    if values.shape[-1] == 1 and implementation in (None, "reference", "cpu"):
        out = weights * function("shares", points, means, sigmas, where, **options)
    else:
        out = function("redistribute", points, means, sigmas, weights, where, **options)
    return out.astype(values.dtype)
