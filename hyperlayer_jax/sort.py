"""Differentiable quicksort: a sorted sequence as a product of sparse, soft permutations."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from hyperlayer_jax import checks
from hyperlayer_jax.density import duplicate_mask
from hyperlayer_jax.kernels import accumulator
from hyperlayer_jax.tensors import contract
from hyperlayer_jax.types import RowSparseTensor

# Beyond it a split is certain, and sums over a bucket are still finite.
_MAX_LOG_ODDS = 1e30


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SoftSort:
    """A sequence on its way from unsorted to sorted; level 0 is the input, the last the result.

    Attributes:
      items: one [*B, s, d] for each level, 1 + ceil(log2(s)) of them.
      scores: one [*B, s] for each level.
      permutations: one `RowSparseTensor` (s,) x (s,) for each step from a level to the next, whose
        rows and columns sum to 1: items[t + 1] = contract(permutations[t], items[t]).
    """

    items: tuple[jax.Array, ...]
    scores: tuple[jax.Array, ...]
    permutations: tuple[RowSparseTensor, ...]


def soft_quicksort(
    key: jax.Array,
    x: jax.Array,
    scores: jax.Array,
    *,
    num_samples: int,
    certainty: float,
    proposal: str = "local",
) -> SoftSort:
    """Sorts items by ascending score, softly enough to learn the scores.

    Quicksort with exact halves: at each level, every bucket is split around its median score, the
    pivot (equations 10 and 11 of docs/method.md). An item goes up with probability
    sigmoid(certainty * (score - pivot)). Candidates are
    the split by score and `num_samples` random ones, copies counted once. Each is a permutation,
    weighted by its probability among the candidates of its bucket: the split by score puts the
    lower half before the upper half and keeps the order in both; in the others, items that change
    sides exchange places. The weighted sum is applied to the items and the scores. With
    num_samples=0 the result is the exact, stable sort.

    Two departures from the paper: buckets weigh their candidates apart from each other, where the
    paper weighs whole sequences; and candidates are drawn near the split by score, where the
    paper draws uniform ones (`proposal="uniform"`), of which nearly all have no weight.

    Args:
      key: a PRNG key.
      x: float [*B, s, d], the items.
      scores: float [*B, s], finite; where scores tie at magnitudes whose square overflows, their
        gradient is not.
      num_samples: random splits per bucket.
      certainty: > 0, how soon a difference in score decides.
      proposal: "local" adds logistic noise to the items' log odds and splits by the sum; "uniform"
        splits at random.

    Returns:
      The levels of the sort and the permutations between them, of the dtypes of x and scores.
      Gradients reach x and scores.

    Raises:
      ValueError: an argument has the wrong shape, dtype or range.
    """
    checks.check_float("x", x, 2, "[*B, s, d]")
    checks.check_float("scores", scores, 1, "[*B, s]")
    if scores.shape != x.shape[:-1] or scores.shape[-1] == 0:
        raise ValueError(f"scores: got shape {scores.shape}, want one for each item of {x.shape}")
    num_samples = checks.check_count("num_samples", num_samples)
    if not certainty > 0:
        raise ValueError(f"certainty: got {certainty}, want > 0")
    if proposal not in ("local", "uniform"):
        raise ValueError(f'proposal: got {proposal!r}, want "local" or "uniform"')

    items, levels, permutations = [x], [scores], []
    starts = bucket_starts(scores.shape[-1])
    for level_key, start, next_start in zip(
        jax.random.split(key, max(len(starts) - 1, 1)), starts, starts[1:], strict=False
    ):
        noise_shape = (*scores.shape[:-1], num_samples, scores.shape[-1])
        noise = jax.random.logistic(level_key, noise_shape, accumulator(scores.dtype))
        permutation = _split(noise, levels[-1], start, next_start, certainty, proposal)
        permutations.append(permutation)
        items.append(_apply(permutation, items[-1]))
        levels.append(_apply(permutation, levels[-1][..., None])[..., 0])
    return SoftSort(tuple(items), tuple(levels), tuple(permutations))


def bucket_starts(size: int) -> list[np.ndarray]:
    """Where the buckets of a sequence begin, level by level.

    Every bucket is halved from a level to the next, the lower half no larger than the upper, until
    all have one item.

    Args:
      size: the items in the sequence, s.

    Returns:
      One int array [buckets] for each level, 1 + ceil(log2(s)) of them.
    """
    levels = [np.array([0])]
    while len(levels[-1]) < size:
        starts = levels[-1]
        middles = starts + np.diff(np.append(starts, size)) // 2
        levels.append(np.unique(np.concatenate([starts, middles])))
    return levels


def _split(noise, scores, start, next_start, certainty, proposal):
    """The soft permutation that splits the buckets at `start` into those at `next_start`."""
    size = scores.shape[-1]
    positions = np.arange(size, dtype=np.int32)
    bucket = np.searchsorted(start, positions, side="right").astype(np.int32) - 1
    half = np.searchsorted(next_start, positions, side="right").astype(np.int32) - 1
    stop = np.append(start[1:], size)
    middle = (start + stop) // 2

    def order(by):
        """Stable sort within each bucket: which item comes to each position."""
        fixed = [jnp.broadcast_to(_align(a, by), by.shape) for a in (bucket, positions)]
        return jax.lax.sort((fixed[0], by, fixed[1]), num_keys=2, is_stable=True)[2]

    scores = scores.astype(accumulator(scores.dtype))
    by_score = order(jax.lax.stop_gradient(scores))
    ordered = jnp.take_along_axis(scores, by_score, axis=-1)
    below = np.where((stop - start) % 2, middle, np.maximum(middle - 1, 0))
    pivot = ordered[..., below] / 2 + ordered[..., middle] / 2
    log_odds = (scores - pivot[..., bucket]) * certainty
    log_odds = jnp.clip(log_odds, -_MAX_LOG_ODDS, _MAX_LOG_ODDS)

    # Rows are the items after the split by score, in which both halves keep the order they had.
    split = jnp.sort(by_score + _align(half * size, by_score), axis=-1) % size
    log_odds = jnp.take_along_axis(log_odds, split, axis=-1)
    drawn = noise
    if proposal == "local":
        drawn += jax.lax.stop_gradient(log_odds)[..., None, :]
    unchanged = jnp.broadcast_to(_align(positions, noise), (*noise.shape[:-2], 1, size))
    rows = jnp.concatenate([unchanged, _exchange(order(drawn), half)], axis=-2)
    sign = np.where(np.isin(next_start[half], start), -1, 1).astype(scores.dtype)
    odds = jnp.take_along_axis(log_odds[..., None, :], rows, axis=-1)
    membership = (bucket[:, None] == np.arange(len(start))).astype(scores.dtype)
    log_weight = jnp.matmul(
        jax.nn.log_sigmoid(odds * _align(sign, odds)), membership, precision="highest"
    )

    # A candidate is known by its lower half; short rows repeat their last item.
    width = np.arange(max(1, (middle - start).max()))
    lower = np.minimum(start[:, None] + width, np.maximum(middle - 1, start)[:, None])
    copies = duplicate_mask(jnp.moveaxis(rows[..., lower], -3, -2))
    log_weight = jnp.where(jnp.moveaxis(copies, -1, -2), -jnp.inf, log_weight)
    weight = jax.nn.softmax(log_weight, axis=-2)[..., bucket]
    source = jnp.take_along_axis(split[..., None, :], rows, axis=-1)
    return RowSparseTensor(
        jnp.moveaxis(source, -1, -2)[..., None], jnp.moveaxis(weight, -1, -2), (size,), (size,)
    )


def _exchange(order, half):
    """Turns candidate orders of rows [..., s] into permutations that move as few rows as they can.

    The row at position i of an order belongs in half[i]. Rows that are there already stay, and the
    others of a half, in order, take the places of those that leave it.
    """
    size = len(half)
    halves = jnp.asarray(half, order.dtype)
    home = halves[order]
    goal = jnp.broadcast_to(_align(half, order), order.shape)
    # Sorting by row inverts the order: where each row goes.
    rows = _align(np.arange(size, dtype=half.dtype), order)
    goal_of_row = halves[jnp.sort(order * size + rows, axis=-1) % size]
    row = jnp.broadcast_to(rows, order.shape)

    def arrange(half, moves, row):
        """By half: the rows that stay, then those that move, each in ascending order."""
        return jnp.sort((2 * half + moves.astype(half.dtype)) * size + row, axis=-1) % size

    arriving = arrange(goal, home != goal, order)
    leaving = arrange(goal, goal_of_row != goal, row)
    return jnp.sort(leaving * size + arriving, axis=-1) % size


def _apply(permutation, x):
    values = permutation.values.astype(x.dtype)
    return contract(dataclasses.replace(permutation, values=values), x)


def _align(row, x):
    """A static [s] with as many axes as `x` [..., s]."""
    return row.reshape((1,) * (x.ndim - 1) + row.shape)
