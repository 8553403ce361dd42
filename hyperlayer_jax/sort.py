"""Differentiable sorting: a sorted sequence as a product of sparse, soft permutations."""

import dataclasses
import functools
import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from hyperlayer_jax import checks, exchange
from hyperlayer_jax.kernels import accumulator
from hyperlayer_jax.lift import automatic, lift, spec_of
from hyperlayer_jax.tensors import contract
from hyperlayer_jax.types import RowSparseTensor


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SoftPermutation:
    """A soft permutation of s items: an exact sort, then doubly stochastic sparse matrices.

    Attributes:
      order: int32 [*B, s], the item that the exact sort brings to each place.
      factors: one `RowSparseTensor` (s,) x (s,) for each step from there, of values [*B, s, p]; the
        first is applied first. What place i takes from j is what j takes from i: each is its own
        transpose, so that nothing is ever scattered.
      levels: the factors as products of blocks, where they are that. Internal.
    """

    order: jax.Array
    factors: tuple[RowSparseTensor, ...]
    levels: exchange.Levels | None = None

    def apply(self, x: jax.Array) -> jax.Array:
        """Sorts x, float [*B, s, *D]: what is at place i of the result, softly."""
        x = _pick(self.order, x)
        if self.levels is None:
            return functools.reduce(_contract, self.factors, x)
        states = exchange.carry(self.levels, self._by_slot(x))
        _, y = exchange.last(self.levels, states, self.order.shape[-1])
        return y.astype(x.dtype).reshape(x.shape)

    def apply_transpose(self, y: jax.Array) -> jax.Array:
        """Carries y, float [*B, s, *D], from the places of the sorted items back to the items."""
        return self.carry_back(y)[0]

    def carry_back(self, y: jax.Array) -> tuple[jax.Array, ...]:
        """Carries y, float [*B, s, *D], back from the result through all levels to the items.

        Returns:
          One [*B, s, *D] for each level of the sort: the first is `apply_transpose(y)`, the last y.
        """
        size = self.order.shape[-1]
        back = [y]
        if self.levels is None:
            for factor in self.factors[::-1]:
                back.insert(0, _contract(back[0], factor))
        else:
            states = exchange.carry_back(self.levels, self._by_slot(y))
            back = [x.astype(y.dtype).reshape(y.shape) for x in exchange.first(states, size)] + back
        places = lift("(s)->(s)")(jnp.argsort)(self.order)
        return _pick(places, back[0]), *back[1:]

    def _by_slot(self, x):
        rates = self.levels.above.rates
        x = x.reshape(*self.order.shape, math.prod(x.shape[self.order.ndim :]))
        return exchange.by_slot(x.astype(rates.dtype), rates.shape[-1])

    def ranks(self) -> jax.Array:
        """The expected place of every item: float [*B, s] in [0, s - 1]."""
        dtype = accumulator(self.factors[0].values.dtype) if self.factors else jnp.float32
        zeros = jnp.zeros_like(self.order, dtype)
        return self.apply_transpose(jax.lax.broadcasted_iota(dtype, zeros.shape, zeros.ndim - 1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SoftSort:
    """A sequence on its way from unsorted to sorted; level 0 is the input, the last the result.

    Attributes:
      items: one [*B, s, d] for each level, 1 + ceil(log2(s)) of them.
      scores: one [*B, s] for each level.
      permutation: all steps as one: `permutation.apply(items[0])` is `items[-1]`.
    """

    items: tuple[jax.Array, ...]
    scores: tuple[jax.Array, ...]
    permutation: SoftPermutation

    @property
    def permutations(self) -> tuple[RowSparseTensor, ...]:
        """One (s,) x (s,) for each step: items[t + 1] = contract(permutations[t], items[t])."""
        if not self.permutation.factors:
            return ()
        first, *others = self.permutation.factors
        sources = lift("(s),(s,p)->(s,p)")(lambda order, sources: order[sources])
        indices = sources(self.permutation.order, first.indices[..., 0])[..., None]
        return dataclasses.replace(first, indices=indices), *others


def soft_quicksort(
    key: jax.Array | None,
    x: jax.Array,
    scores: jax.Array,
    *,
    num_samples: int,
    certainty: float | jax.Array,
    proposal: str = "local",
    lengths: jax.Array | None = None,
) -> SoftSort:
    """Sorts items by ascending score, softly enough to learn the scores.

    Quicksort whose pivots are known beforehand: the items are sorted, stably, and then loosened
    level by level. At each level every bucket of the sequence is split in the middle, and items on
    both sides of the split exchange places with some probability.

    By default, an item may exchange with any of `num_samples` on the other side (rounded up to a
    power of two): those about as far from the split as itself, and all of them where there are no
    more. Each exchange is weighed by its odds, exp(certainty * (lower score - upper score)),
    against all others that its two items might make (equations 10 and 11 of docs/method.md).

    `proposal="uniform"` is the paper's: each bucket has as candidates the split as it is and
    `num_samples` random ones, copies counted once. Items that change sides exchange places, first
    with first, and a candidate weighs its probability (equation 15), one draw for all.

    With num_samples=0 the result is the exact, stable sort. Memory is linear in s * num_samples,
    for every level whose permutation is used; time is that of a sort and s * num_samples for each
    level.

    Args:
      key: a PRNG key for the splits of `proposal="uniform"`; else nothing is left to chance, and
        it may be None.
      x: float [*B, s, d], the items.
      scores: float [*B, s]. NaN sorts last, and makes NaN of what is mixed with it; infinite ones
        sort first and last, and softly come back as at most a quarter of the largest number.
      num_samples: partners of an item at a level, or random splits of a bucket.
      certainty: > 0, how soon a difference in score decides; an array is taken as it is.
      proposal: "local" or "uniform".
      lengths: int32 [*B], how many items there are in each set, the first ones; what follows them
        has no influence and stays where it is. By default s.

    Returns:
      The levels of the sort and the permutations between them, of the dtypes of x and scores.
      Gradients reach x and scores.

    Raises:
      ValueError: an argument has the wrong shape, dtype or range.
    """
    x, scores, lengths = checks.as_arrays((x, scores, lengths))
    checks.check_float("x", x, 2, "[*B, s, d]")
    num_samples = check_scores(scores, num_samples, certainty, lengths)
    if scores.shape != x.shape[:-1]:
        raise ValueError(f"scores: got shape {scores.shape}, want one for each item of {x.shape}")
    if proposal not in ("local", "uniform"):
        raise ValueError(f'proposal: got {proposal!r}, want "local" or "uniform"')
    if proposal == "uniform" and key is None:
        raise ValueError('key: got None, want a PRNG key for proposal="uniform"')
    _, _, order, steps, exchanges = sort_softly(
        key, x, scores, num_samples, certainty, proposal, lengths
    )
    size = scores.shape[-1:]
    items, levels, factors = [x], [scores], []
    for step in steps:
        sources = jnp.broadcast_to(step.sources, step.values.shape)
        factors.append(RowSparseTensor(sources[..., None], step.values.astype(x.dtype), size, size))
        items.append(restore(step.items, x, lengths))
        levels.append(restore(step.scores, scores, lengths))
    permutation = SoftPermutation(order, tuple(factors), exchanges)
    return SoftSort(tuple(items), tuple(levels), permutation)


def check_scores(
    scores: jax.Array,
    num_samples: int,
    certainty: float | jax.Array,
    lengths: jax.Array | None,
) -> int:
    """Checks what all soft sorts take; returns `num_samples` as an int."""
    checks.check_float("scores", scores, 1, "[*B, s]")
    if scores.shape[-1] == 0:
        raise ValueError(f"scores: got shape {scores.shape}, want at least one item")
    if not isinstance(certainty, jax.Array) and not certainty > 0:
        raise ValueError(f"certainty: got {certainty}, want > 0")
    if lengths is not None and (
        getattr(lengths, "dtype", None) != jnp.int32 or lengths.shape != scores.shape[:-1]
    ):
        got = f"{getattr(lengths, 'dtype', type(lengths))}{list(getattr(lengths, 'shape', ()))}"
        raise ValueError(f"lengths: got {got}, want int32{list(scores.shape[:-1])}")
    return checks.check_count("num_samples", num_samples)


def sort_softly(
    key: jax.Array | None,
    x: jax.Array,
    scores: jax.Array,
    num_samples: int,
    certainty: float | jax.Array,
    proposal: str,
    lengths: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array, Iterable[exchange.Step], exchange.Levels | None]:
    """Scores [*B, s] and items [*B, s, d] at the end, the exact order, all steps, and the levels.

    There are no levels on meshes of explicit axes, without samples or exchanges of blocks.
    """
    if not any(spec_of(scores) + spec_of(x)):
        # The steps are not computed before they are asked for.
        return _sort_softly(key, x, scores, num_samples, certainty, proposal, lengths)
    return _sort_on_mesh(key, x, scores, lengths, certainty, num_samples, proposal)


@functools.partial(jax.jit, static_argnums=(5, 6))
def _sort_on_mesh(key, x, scores, lengths, certainty, num_samples, proposal):
    """The same on a mesh of explicit axes, compiled once."""

    def run(key, x, scores, lengths, certainty):
        *results, steps, _ = _sort_softly(key, x, scores, num_samples, certainty, proposal, lengths)
        every = [s._replace(sources=jnp.broadcast_to(s.sources, s.values.shape)) for s in steps]
        return *results, every

    certainty = jnp.asarray(certainty, accumulator(scores.dtype))
    results = automatic(run, key, x, scores, lengths, certainty, leading=scores.ndim - 1)
    return *results, None


def _sort_softly(key, x, scores, num_samples, certainty, proposal, lengths):
    size = scores.shape[-1]
    dtype = accumulator(x.dtype if x.dtype == jnp.float64 else scores.dtype)
    fixed = jax.lax.stop_gradient(scores)
    place = jnp.broadcast_to(jax.lax.iota(jnp.int32, size), scores.shape)
    if lengths is None:
        order = jax.lax.sort((fixed, place), num_keys=1, is_stable=True)[1]
    else:
        absent = place >= lengths[..., None]
        order = jax.lax.sort((absent, jnp.where(absent, 0, fixed), place), num_keys=2)[2]
    keys = scores.astype(dtype)
    if num_samples:
        # Infinite scores have no differences.
        largest = jnp.finfo(dtype).max / 4
        keys = jnp.clip(keys, -largest, largest)

    def at(places, count):
        """Scores and items at sorted places, and which of them there are."""
        source = order[..., jnp.minimum(places, size - 1)]
        sorted_scores = jnp.take_along_axis(keys, source, axis=-1)
        items = jnp.take_along_axis(x.astype(dtype), source[..., None], axis=-2)
        if count is None:
            return sorted_scores, items, None
        present = jnp.broadcast_to(places, (*jnp.shape(count)[:-1], len(places))) < count
        sorted_scores = jnp.where(present, sorted_scores, 0)
        return sorted_scores, jnp.where(present[..., None], items, 0), present

    count = None if lengths is None else lengths[..., None]
    if num_samples == 0 or proposal == "uniform":
        sorted_scores, items, _ = at(jax.lax.iota(jnp.int32, size), count)
        if num_samples == 0:
            ones = jnp.ones((*scores.shape, 1), dtype)
            here = jax.lax.iota(jnp.int32, size)[:, None]
            steps = [exchange.Step(here, ones, sorted_scores, items)] * (size - 1).bit_length()
            return sorted_scores, items, order, steps, None
        full = jnp.full(scores.shape[:-1], size, jnp.int32) if lengths is None else lengths
        steps = list(
            exchange.split_at_random(key, sorted_scores, items, full, num_samples, certainty)
        )
        last = (steps[-1].scores, steps[-1].items) if steps else (sorted_scores, items)
        return *last, order, steps, None
    block = exchange.block_size(size, 1 << (num_samples - 1).bit_length())
    slots = exchange.place_of_slot(size, block)
    if count is None and len(slots) > size:
        count = size
    sorted_scores, items, present = at(slots, count)
    levels = exchange.loosen(sorted_scores, present, block, certainty)
    if size == 1:
        return sorted_scores, items, order, [], None
    blocks = len(slots) // block
    items = items.reshape(*scores.shape[:-1], blocks, block, items.shape[-1])
    states = exchange.carry(levels, items)
    last = exchange.last(levels, states, size)
    return *last, order, exchange.steps(levels, states, size), levels


def restore(state: jax.Array, like: jax.Array, lengths: jax.Array | None) -> jax.Array:
    """A level [*B, s, ...] as it is returned: of the dtype of `like`, absent as it is there."""
    state = state.astype(like.dtype)
    if lengths is None:
        return state
    place = jax.lax.broadcasted_iota(jnp.int32, like.shape, lengths.ndim)
    lengths = lengths.reshape(*lengths.shape, *[1] * (like.ndim - lengths.ndim))
    return jnp.where(place < lengths, state, like)


def bucket_starts(size: int) -> list[np.ndarray]:
    """Where the buckets of a sequence begin, level by level.

    Buckets are aligned ranges of a power of two, halved from a level to the next until all have one
    item; the last one may be cut off.

    Args:
      size: the items in the sequence, s.

    Returns:
      One int array [buckets] for each level, 1 + ceil(log2(s)) of them.

    Raises:
      ValueError: `size` is not an int >= 1.
    """
    size = checks.check_count("size", size)
    if size == 0:
        raise ValueError("size: got 0, want at least one item")
    bits = (size - 1).bit_length()
    return [np.arange(0, size, 1 << bit) for bit in reversed(range(bits + 1))]


def _contract(x, permutation):
    values = permutation.values.astype(x.dtype)
    return contract(dataclasses.replace(permutation, values=values), x)


def _pick(places, x):
    """What x [*B, s, *D] has at places [*B, s]."""
    ones = jnp.ones_like(places, x.dtype)[..., None]
    size = places.shape[-1:]
    return contract(RowSparseTensor(places[..., None, None], ones, size, size), x)
