"""From index tuples to the points and values of a sparse tensor."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from hyperlayer_jax import checks
from hyperlayer_jax.density import redistribute
from hyperlayer_jax.lift import lift
from hyperlayer_jax.sampling import fixed_indices, round_means, sample_indices
from hyperlayer_jax.types import IndexTuples

Predicate = Callable[[jax.Array], jax.Array]


def discretize(
    key: jax.Array | None,
    tuples: IndexTuples,
    shape: Sequence[int],
    *,
    num_global: int = 0,
    num_local: int = 0,
    region: int | Sequence[int] | None = None,
    where: Predicate | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Turns tuples into integer points and values (docs/method.md, equations 4 to 6).

    Samples points around the means and redistributes the values over them, chunk by chunk.
    Gradients reach means, sigmas and values through the values of the points.

    Args:
      key: a PRNG key, for training; or None, for evaluation: as many points, without chance (in
        docs/method.md, section "Evaluation").
      tuples: means and sigmas [*B, k, r], values [*B, k].
      shape: the r axes of the index space.
      num_global: points per tuple drawn from the whole space; without a key, quantiles of the
        Gaussian.
      num_local: points per tuple drawn from the region; without a key, spread evenly over it.
      region: the axes of the region around a mean; needed when num_local > 0.
      where: a predicate, int32 [*B, m, r] -> bool [*B, m], of the points that are allowed; the
        others take no part in the normalisation and get 0. It must be a function of the
        coordinates, so that copies agree.
      implementation: the kernel backend, chosen by device where None.

    Returns:
      Indices int32 [*B, m, r] and values [*B, m], m = k * (2^r + num_global + num_local). Copies
      are kept as entries of value 0.

    Raises:
      ValueError: an argument has the wrong shape, dtype or range.
    """
    tuples = checks.as_arrays(tuples)
    checks.check_tuples(tuples)
    shape = checks.check_shape("shape", shape)
    checks.check_countable("shape", shape, checks.accumulator_of(tuples))
    counts: dict[str, Any] = {"num_global": num_global, "num_local": num_local, "region": region}
    if key is None:
        indices = fixed_indices(tuples.means, tuples.sigmas, shape, **counts)
    else:
        indices = sample_indices(key, tuples.means, shape, **counts)
    allowed = None if where is None else where(indices)
    return indices, redistribute(indices, tuples, where=allowed, implementation=implementation)


def round_tuples(
    tuples: IndexTuples, shape: Sequence[int], *, where: Predicate | None = None
) -> tuple[jax.Array, jax.Array]:
    """Turns tuples into points and values for evaluation: rounds (equation 8 of docs/method.md).

    Args:
      tuples: means and sigmas [*B, k, r], values [*B, k].
      shape: the r axes of the index space.
      where: a predicate, int32 [*B, k, r] -> bool [*B, k], of the points that are allowed.

    Returns:
      Indices int32 [*B, k, r] in [0, shape), and values [*B, k]: those of the tuples, 0 where
      the point is not allowed. Tuples that round to the same point are entries that add up.

    Raises:
      ValueError: an argument has the wrong shape, dtype or range.
    """
    tuples = checks.as_arrays(tuples)
    checks.check_tuples(tuples)
    shape = checks.check_shape("shape", shape, tuples.means.shape[-1])
    indices = round_means(tuples.means, shape)
    if where is None:
        return indices, tuples.values
    allowed = where(indices)
    checks.check_mask("where", allowed, tuples.values.shape)
    return indices, jnp.where(allowed, tuples.values, 0)


def apply_template(template: jax.Array, indices: jax.Array, *, columns: Sequence[int]) -> jax.Array:
    """Stitches learned columns into the fixed columns of a template.

    Fixed columns are the same for all points of a chunk, since its points share one index space.

    Args:
      template: int32 [*B, R], one row of coordinates for each chunk.
      indices: int32 [*B, m, r], the learned coordinates.
      columns: the r different columns of the template that `indices` replaces, in its order.

    Returns:
      int32 [*B, m, R].

    Raises:
      ValueError: shapes or dtypes do not fit, or `columns` are not r columns of the template.
    """
    checks.check_indices("template", template, 1, "[*B, R]")
    checks.check_indices("indices", indices, 2, "[*B, m, r]")
    *leading, m, r = indices.shape
    width = template.shape[-1]
    if template.shape[:-1] != tuple(leading):
        raise ValueError(f"template: got shape {template.shape}, want [*B, R], *B = {leading}")
    columns = checks.check_columns("columns", columns, width)
    if len(columns) != r:
        raise ValueError(
            f"columns: got {columns}, want {r} different columns, one for each of the indices"
        )

    @lift("(R),(m,r)->(m,R)")
    def stitch(template, indices):
        parts = list(jnp.broadcast_to(template[:, None], (width, m)))
        for a, column in enumerate(columns):
            parts[column] = indices[:, a]
        return jnp.stack(parts, -1)

    return stitch(template, indices)
