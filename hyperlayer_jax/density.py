"""Redistribution: each tuple spreads its value over the points of its chunk."""

import jax

from hyperlayer_jax import checks, kernels
from hyperlayer_jax.types import IndexTuples


def redistribute(
    indices: jax.Array,
    tuples: IndexTuples,
    *,
    where: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Spreads the value of every tuple over the points of its chunk, by Gaussian density.

    Tuple j gives point i the share softmax_i(-|(i - mean_j) / sigma_j|^2 / 2) of its value, over
    the allowed points of the chunk, copies counted once; a point gets the sum of its shares
    (equations 5 to 7 of docs/method.md, densities normalised in log space). So the points of a
    chunk sum to its tuples, and a tuple with no allowed point adds nothing. A sigma of 0 is
    a point: all goes to the nearest points.

    The gradient is written by hand and recomputes the shares, unless there is but one tuple in a
    chunk; chunks too large for an [m, k] array are walked in blocks of tuples.

    Args:
      indices: int32 [*B, m, r], the points.
      tuples: means and sigmas [*B, k, r] (sigmas >= 0), values [*B, k].
      where: bool [*B, m], the allowed points; all where None.
      implementation: the kernel backend, chosen by device where None.

    Returns:
      [*B, m], of the dtype of `tuples.values`. Computed in float32 (float64 for float64 tuples).
      0 at copies and at points that are not allowed.

    Raises:
      ValueError: an argument has the wrong shape or dtype.
    """
    indices, tuples = checks.as_arrays((indices, tuples))
    checks.check_tuples(tuples)
    checks.check_indices("indices", indices, 2, "[*B, m, r]")
    *leading, m, r = indices.shape
    if tuples.means.shape[:-2] != tuple(leading) or tuples.means.shape[-1] != r:
        raise ValueError(
            f"indices: got shape {indices.shape}, want [*B, m, r] with the *B and r of "
            f"tuples.means, {tuples.means.shape}"
        )
    if where is not None:
        checks.check_mask("where", where, (*leading, m))
    dtype = checks.accumulator_of(tuples)
    means, sigmas, values = (x.astype(dtype) for x in (tuples.means, tuples.sigmas, tuples.values))
    shares = kernels.redistribute(
        indices, means, sigmas, values, where=where, implementation=implementation
    )
    return shares.astype(tuples.values.dtype)


def duplicate_mask(indices: jax.Array) -> jax.Array:
    """Marks every copy of a point but the first, exactly, for all int32 coordinates.

    Args:
      indices: int32 [*B, m, r].

    Returns:
      bool [*B, m], True where an earlier point of the same chunk has the same coordinates.

    Raises:
      ValueError: `indices` is not int32 [*B, m, r].
    """
    indices = checks.as_arrays(indices)
    checks.check_indices("indices", indices, 2, "[*B, m, r]")
    return kernels.duplicate_mask(indices)
