"""What people want from a differentiable sort: sorted scores, ranks, the top k, quantiles."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hyperlayer_jax import checks
from hyperlayer_jax.kernels import accumulator
from hyperlayer_jax.sort import (
    SoftPermutation,
    check_scores,
    restore,
    soft_quicksort,
    sort_softly,
)


def soft_sort(
    scores: jax.Array,
    *,
    num_samples: int = 8,
    certainty: float | jax.Array = 10.0,
    lengths: jax.Array | None = None,
) -> jax.Array:
    """Sorts scores in ascending order, softly; see `soft_quicksort` for what is not said here.

    docs/sorting.md says how to choose `num_samples` and `certainty`.

    Args:
      scores: float [*B, s].
      num_samples: partners of an item at a level; 0 sorts exactly.
      certainty: > 0, how soon a difference in score decides.
      lengths: int32 [*B], how many scores of each set are there; the others stay where they are.

    Returns:
      float [*B, s], of the same sums as the scores.

    Raises:
      ValueError: an argument has the wrong shape, dtype or range.
    """
    scores, lengths = checks.as_arrays((scores, lengths))
    num_samples = check_scores(scores, num_samples, certainty, lengths)
    nothing = scores[..., None][..., :0]
    state, *_ = sort_softly(None, nothing, scores, num_samples, certainty, "local", lengths)
    return restore(state, scores, lengths)


def soft_rank(
    scores: jax.Array,
    *,
    num_samples: int = 8,
    certainty: float | jax.Array = 10.0,
    lengths: jax.Array | None = None,
) -> jax.Array:
    """The expected place of each score in the ascending order, from 0.

    Args:
      scores: float [*B, s].
      num_samples: see `soft_sort`.
      certainty: see `soft_sort`.
      lengths: see `soft_sort`.

    Returns:
      float [*B, s] in [0, s - 1], of the dtype of the scores. The ranks of a set sum to what the
      exact ones do. What is beyond the length of a set keeps its own index.

    Raises:
      ValueError: an argument has the wrong shape, dtype or range.
    """
    scores, lengths = checks.as_arrays((scores, lengths))
    num_samples = check_scores(scores, num_samples, certainty, lengths)
    _, carry_back, _ = _final(scores, num_samples, certainty, lengths)
    places = jax.lax.iota(accumulator(scores.dtype), scores.shape[-1])
    return carry_back(places).astype(scores.dtype)


def soft_argsort(
    scores: jax.Array,
    *,
    num_samples: int = 8,
    certainty: float | jax.Array = 10.0,
    lengths: jax.Array | None = None,
) -> SoftPermutation:
    """The permutation that sorts scores in ascending order, softly, as a product of sparse ones.

    Args:
      scores: float [*B, s].
      num_samples: see `soft_sort`.
      certainty: see `soft_sort`.
      lengths: see `soft_sort`.

    Returns:
      ceil(log2(s)) factors, each with num_samples + 1 entries in a row at most (num_samples rounded
      up to a power of two).

    Raises:
      ValueError: an argument has the wrong shape, dtype or range.
    """
    return soft_quicksort(
        None,
        scores[..., None],
        scores,
        num_samples=num_samples,
        certainty=certainty,
        lengths=lengths,
    ).permutation


class TopK(NamedTuple):
    """The largest k of a set of scores.

    Attributes:
      values: float [*B, k], in descending order, softly.
      mask: float [*B, s] in [0, 1], how much each score is among them; sums to k.
      indices: int32 [*B, k], where they are, exactly; ties in the order of the scores.
    """

    values: jax.Array
    mask: jax.Array
    indices: jax.Array


def soft_top_k(
    scores: jax.Array,
    k: int,
    *,
    num_samples: int = 8,
    certainty: float | jax.Array = 10.0,
    lengths: jax.Array | None = None,
) -> TopK:
    """The k largest scores: their values, a soft mask, and their indices.

    Args:
      scores: float [*B, s].
      k: how many, 1 to s.
      num_samples: see `soft_sort`.
      certainty: see `soft_sort`.
      lengths: see `soft_sort`. Sets of fewer than k scores fill up with values of -inf and indices
        of s, and their mask sums to their length.

    Returns:
      Values, mask and indices.

    Raises:
      ValueError: an argument has the wrong shape, dtype or range.
    """
    scores, lengths = checks.as_arrays((scores, lengths))
    num_samples = check_scores(scores, num_samples, certainty, lengths)
    size = scores.shape[-1]
    k = checks.check_count("k", k)
    if not 1 <= k <= size:
        raise ValueError(f"k: got {k}, want 1 to {size}, the number of scores")
    values, carry_back, order = _final(-scores, num_samples, certainty, lengths)
    place = jax.lax.iota(jnp.int32, size)
    mask = carry_back((place < k).astype(accumulator(scores.dtype)))
    values, indices = -values[..., :k], order[..., :k]
    if lengths is not None:
        there = jnp.broadcast_to(place, scores.shape) < lengths[..., None]
        mask = jnp.where(there, mask, 0)
        values = jnp.where(there[..., :k], values, -jnp.inf)
        indices = jnp.where(there[..., :k], indices, size)
    return TopK(values, mask.astype(scores.dtype), indices)


def soft_quantile(
    scores: jax.Array,
    q: float | jax.Array,
    *,
    num_samples: int = 8,
    certainty: float | jax.Array = 10.0,
    lengths: jax.Array | None = None,
) -> jax.Array:
    """Quantiles of scores, interpolated between places of the soft sort; 0.5 is the median.

    Args:
      scores: float [*B, s].
      q: in [0, 1], a number or an array [*Q]; not checked where traced.
      num_samples: see `soft_sort`.
      certainty: see `soft_sort`.
      lengths: see `soft_sort`, at least 1 each.

    Returns:
      float [*Q, *B].

    Raises:
      ValueError: an argument has the wrong shape, dtype or range.
    """
    if not isinstance(q, jax.core.Tracer) and not np.all(
        (np.asarray(q) >= 0) & (np.asarray(q) <= 1)
    ):
        raise ValueError(f"q: got {q}, want numbers in [0, 1]")
    scores, lengths = checks.as_arrays((scores, lengths))
    ordered = soft_sort(scores, num_samples=num_samples, certainty=certainty, lengths=lengths)
    dtype = accumulator(scores.dtype)
    count = jnp.full(scores.shape[:-1], scores.shape[-1]) if lengths is None else lengths
    q = jnp.asarray(q, dtype)
    count = jnp.broadcast_to(count, (*q.shape, *count.shape))
    place = q.reshape(*q.shape, *[1] * (count.ndim - q.ndim)) * (count - 1).astype(dtype)
    below = jnp.floor(place).astype(jnp.int32)
    ordered = jnp.broadcast_to(ordered.astype(dtype), (*q.shape, *ordered.shape))
    at = lambda i: jnp.take_along_axis(ordered, i[..., None], axis=-1)[..., 0]  # noqa: E731
    low, high = at(below), at(jnp.minimum(below + 1, count - 1))
    part = place - below.astype(dtype)
    return (low + jnp.where(part > 0, high - low, 0) * part).astype(scores.dtype)


def _final(scores, num_samples, certainty, lengths):
    """Sorted scores; what carries numbers [s] of places back to the items; the exact order."""

    def sort(x):
        values, items, order, *_ = sort_softly(
            None, x, scores, num_samples, certainty, "local", lengths
        )
        return restore(items, x, lengths)[..., 0], (restore(values, scores, lengths), order)

    # The sort is linear in the items: its transpose is its gradient, wherever that is taken.
    zeros = jnp.zeros((*scores.shape, 1), accumulator(scores.dtype))
    _, transpose_sort, (values, order) = jax.vjp(sort, zeros, has_aux=True)

    def carry_back(places):
        like_values = jnp.zeros_like(values, places.dtype)
        return transpose_sort(like_values + jnp.broadcast_to(places, values.shape))[0][..., 0]

    return values, carry_back, order
