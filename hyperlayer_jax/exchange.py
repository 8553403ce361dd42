"""The steps of a soft sort: items on both sides of a split exchange places, softly.

A sequence of s items, sorted beforehand, goes through ceil(log2(s)) levels. At the level of bit b,
counted down to 0, its buckets are the aligned ranges of 2^(b + 1) places, and each is split in its
middle.

Blocks of places are stored in the order of the reflected binary code: block i is in slot
i ^ (i >> 1). Two blocks equally far from a split then differ in one bit of their slots, that of the
level, so that no item has to be looked for, and all levels above a block are one program. Within a
block, places are in order.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# Beyond it an exchange is certain, and sums over a block are still finite.
_MAX_LOG_ODDS = 30.0
# The same for sums of log odds over a bucket.
_CERTAIN = 1e30
_product = functools.partial(jnp.einsum, precision="highest")


class Step(NamedTuple):
    """What a level does to s places.

    Attributes:
      sources: int32 [*B, s, p] or [s, p], the places that each place takes from, itself first.
      values: float [*B, s, p], how much it takes from each; they sum to 1, and what i takes from j
        is what j takes from i.
      scores: float [*B, s] at all places afterwards.
      items: float [*B, s, d] at all places afterwards.
    """

    sources: jax.Array
    values: jax.Array
    scores: jax.Array
    items: jax.Array


class Level(NamedTuple):
    """What a level, or each of several, does to blocks of h slots.

    Attributes:
      scores: float [*B, blocks, h], by slot afterwards.
      rates: float [*B, blocks / 2, h, h], how much two items of a pair of blocks exchange.
    """

    scores: jax.Array
    rates: jax.Array


class Levels(NamedTuple):
    """Those between blocks, stacked, if any; and those within a block, of halving widths."""

    above: Any
    below: list[Level]


def block_size(size: int, partners: int) -> int:
    """How many items a block of a sequence of `size` has, `partners` a power of two."""
    return min(partners, max((1 << (size - 1).bit_length()) // 2, 1))


def place_of_slot(size: int, block: int) -> jax.Array:
    """int32 [2^ceil(log2(size))]: the place in each slot, `size` or more where there is none."""
    slot = jax.lax.iota(jnp.uint32, 1 << (size - 1).bit_length())
    place = slot // block
    for shift in (1, 2, 4, 8, 16):
        place ^= place >> shift
    return (place * block + slot % block).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames="block")
def loosen(
    scores: jax.Array, present: jax.Array | None, block: int, certainty: jax.Array
) -> Levels:
    """Lets sorted items exchange places with others across the split, level by level.

    Each item may exchange with those that share the upper bits of its distance from the split: a
    block on each side. Odds a = exp(-certainty * gap) become rates a / (1 + the odds of all
    exchanges that either of the two might make), equation 11 of docs/method.md.

    Args:
      scores: float [*B, N] by slot, N a power of two, 0 where absent.
      present: bool [*B, N] or [N] by slot; None if all are.
      block: see `block_size`.
      certainty: see above.

    Returns:
      All levels.
    """
    *batch, size = scores.shape
    blocks = size // block
    certainty = jnp.asarray(certainty).astype(scores.dtype)
    scores = scores.reshape(*batch, blocks, block)
    seen = None if present is None else present.reshape(*present.shape[:-1], blocks, block)

    def upper(carry, level):
        scores, seen = carry
        path = jax.lax.iota(jnp.uint32, blocks // 2) & ((jnp.uint32(1) << level) - 1)
        # The bits that lead to a bucket say which side is the upper one.
        sign = 1 - 2 * (jax.lax.population_count(path) & 1).astype(scores.dtype)
        low, high = _halves(scores, -2)
        both = None if seen is None else _halves(seen, -2)
        low, high, rates = _exchange(low, high, both, certainty * sign)
        # The bit of the next level becomes the first.
        scores = jnp.stack([low, high], -2).reshape(scores.shape)
        seen = None if both is None else jnp.stack(both, -2).reshape(seen.shape)
        return (scores, seen), Level(scores, rates)

    above, below, width = None, [], block
    if blocks > 1:
        count = jax.lax.iota(jnp.uint32, blocks.bit_length() - 1)
        (scores, seen), above = jax.lax.scan(upper, (scores, seen), count, unroll=_unroll(blocks))
    while width > 1:
        low, high = _halves(scores, -1)
        both = None if seen is None else _halves(seen, -1)
        low, high, rates = _exchange(low, high, both, jnp.full(size // width, certainty))
        width //= 2
        scores = jnp.stack([low, high], -2).reshape(*batch, size // width, width)
        if both is not None:
            seen = jnp.stack(both, -2).reshape(*both[0].shape[:-2], size // width, width)
        below.append(Level(scores.reshape(*batch, blocks, block), rates))
    return Levels(above, below)


def _halves(x, axis):
    return jnp.split(x, 2, axis)


def _unroll(blocks):
    """Few levels are a program without a loop; many are one whose length does not grow."""
    return blocks.bit_length() <= 4


def _exchange(low, high, present, certainty):
    """Scores [*B, m, h] on both sides of m splits after exchanging, and the rates [*B, m, h, h]."""
    gaps = high[..., None, :] - low[..., :, None]
    log_odds = -jnp.broadcast_to(certainty[:, None, None], gaps.shape) * gaps
    odds = jnp.exp(jnp.minimum(log_odds, _MAX_LOG_ODDS))
    if present is not None:
        there = present[0][..., :, None] & present[1][..., None, :]
        odds = jnp.where(jnp.broadcast_to(there, odds.shape), odds, 0)
    rates = odds / (1 + odds.sum(-1, keepdims=True) + odds.sum(-2, keepdims=True) - odds)
    up = (1 - rates.sum(-1)) * low + (rates * high[..., None, :]).sum(-1)
    down = (1 - rates.sum(-2)) * high + (rates * low[..., :, None]).sum(-2)
    return up, down, rates


class States(NamedTuple):
    """Items by slot, float [*B, blocks, h, d], on one side of all levels; those above stacked."""

    above: Any
    below: list[jax.Array]


@jax.jit
def carry(levels: Levels, items: jax.Array) -> States:
    """What becomes of sorted items that exchange places as `levels` say.

    Args:
      levels: what `loosen` returned.
      items: float [*B, blocks, h, d] by slot.

    Returns:
      The items after each level.
    """
    *batch, blocks, block, features = items.shape

    def upper(items, rates):
        pairs = jnp.swapaxes(items.reshape(*batch, 2, blocks // 2, block, features), -4, -3)
        pairs = pairs.reshape(*batch, blocks // 2, 2 * block, features)
        items = _multiply(_dense(rates), pairs).reshape(*batch, blocks, block, features)
        return items, items

    above, below = None, []
    if levels.above is not None:
        rates = levels.above.rates
        items, above = jax.lax.scan(upper, items, rates, unroll=_unroll(blocks))
    for _, rates in levels.below:
        items = _within(rates, items)
        below.append(items)
    return States(above, below)


@jax.jit
def carry_back(levels: Levels, items: jax.Array) -> States:
    """The transpose of `carry`: each level is its own.

    Args:
      levels: what `loosen` returned.
      items: float [*B, blocks, h, d] by slot, after all levels.

    Returns:
      What they were before each level.
    """
    *batch, blocks, block, features = items.shape

    def upper(items, rates):
        pairs = items.reshape(*batch, blocks // 2, 2 * block, features)
        pairs = _multiply(_dense(rates), pairs).reshape(*batch, blocks // 2, 2, block, features)
        items = jnp.swapaxes(pairs, -4, -3).reshape(*batch, blocks, block, features)
        return items, items

    above, below = None, []
    for _, rates in levels.below[::-1]:
        items = _within(rates, items)
        below.append(items)
    if levels.above is not None:
        rates = levels.above.rates
        _, above = jax.lax.scan(upper, items, rates, reverse=True, unroll=_unroll(blocks))
    return States(above, below[::-1])


@jax.custom_jvp
def _multiply(matrices, items):
    """Symmetric matrices [..., n, n] times items [..., n, d]."""
    return _product("...ij,...jd->...id", matrices, items)


@_multiply.defjvp
def _multiply_jvp(primals, tangents):
    matrices, items = primals
    by_matrices = _product("...ij,...jd->...id", tangents[0], items)
    # The transpose of this is a product with the matrices as they are stored.
    by_items = _product("...ji,...jd->...id", matrices, tangents[1])
    return _multiply(matrices, items), by_matrices + by_items


def _within(rates, items):
    """Items [*B, blocks, h, d] after exchanges of rates [*B, m, w, w] within parts of blocks."""
    *batch, m, width, _ = rates.shape
    parts = items.reshape(*batch, m, 2 * width, items.shape[-1])
    return _multiply(_dense(rates), parts).reshape(items.shape)


def _dense(rates):
    """The permutation [*B, m, 2h, 2h] of both sides of splits, of rates [*B, m, h, h]."""
    eye = jnp.broadcast_to(jnp.eye(rates.shape[-1], dtype=bool), rates.shape)
    stay = [jnp.where(eye, 1 - rates.sum(axis)[..., None], 0) for axis in (-1, -2)]
    low = jnp.concatenate([stay[0], rates], -1)
    high = jnp.concatenate([jnp.swapaxes(rates, -1, -2), stay[1]], -1)
    return jnp.concatenate([low, high], -2)


def last(levels: Levels, states: States, size: int) -> tuple[jax.Array, jax.Array]:
    """The scores [*B, size] and items [*B, size, d] by place, of several, after all levels."""
    if levels.below:
        scores, items = levels.below[-1].scores, states.below[-1]
    else:
        scores, items = jax.tree.map(lambda x: x[-1], (levels.above.scores, states.above))
    axis = scores.ndim - 2
    bits = scores.shape[axis].bit_length() - 1
    return by_place(scores, axis, bits, size), by_place(items, axis, bits, size)


def first(states: States, size: int) -> list[jax.Array]:
    """Items [*B, size, d] by place before each level, of what `carry_back` returned."""
    axis = states.above.ndim - 4
    stacked = [by_place(x, axis, turns, size) for turns, x in enumerate(states.above)]
    return [*stacked, *(by_place(x, axis, len(stacked), size) for x in states.below)]


def steps(levels: Levels, states: States, size: int) -> Iterator[Step]:
    """The steps of a sequence of `size` places, from what `loosen` and `carry` return."""
    bits = (size - 1).bit_length()
    stacked = bits - len(levels.below)
    place = jax.lax.iota(jnp.int32, size)[:, None]
    for t in range(bits):
        if t < stacked:
            level, items = jax.tree.map(lambda x: x[t], (levels.above, states.above))  # noqa: B023
        else:
            level, items = levels.below[t - stacked], states.below[t - stacked]
        width = level.rates.shape[-1]
        near = jax.lax.broadcasted_iota(jnp.int32, (1, width), 1)
        if t < stacked:
            partner = (place // width ^ ((2 << (stacked - 1 - t)) - 1)) * width + near
        else:
            partner = (place // width ^ 1) * width + near
        values = jnp.stack([level.rates, jnp.swapaxes(level.rates, -1, -2)], -3)
        values = values.reshape(*level.scores.shape, width)
        values, scores, items = (
            by_place(x, level.scores.ndim - 2, t + 1, size) for x in (values, level.scores, items)
        )
        values = jnp.concatenate([1 - values.sum(-1, keepdims=True), values], -1)
        sources = jnp.concatenate([place, jnp.where(partner < size, partner, place)], -1)
        yield Step(sources, values, scores, items)


def by_slot(items: jax.Array, block: int) -> jax.Array:
    """Items [*B, s, d] by place as blocks [*B, blocks, h, d] by slot; 0 where there is none."""
    *batch, size, features = items.shape
    slots = place_of_slot(size, block)
    nothing = [(0, 0)] * len(batch)
    items = jnp.pad(items, [*nothing, (0, len(slots) - size), (0, 0)])
    items = items.reshape(*batch, len(slots) // block, block, features)
    place = slots[::block] // block
    return jnp.take(items, place, axis=-3, unique_indices=True, mode="clip")


def by_place(x: jax.Array, axis: int, turns: int, size: int) -> jax.Array:
    """Blocks of slots [*B, blocks, h, ...] after `turns` levels as places [*B, size, ...]."""
    bits = x.shape[axis].bit_length() - 1
    turns = min(turns, bits)
    block = np.arange(-(-size // x.shape[axis + 1]))
    block ^= block >> 1
    # Numbers of `bits` bits, the upper `turns` of which have become the lower ones.
    block = ((block << turns) | (block >> (bits - turns))) & ((1 << bits) - 1)
    x = jnp.take(x, block, axis=axis, unique_indices=True, mode="clip") if bits > 1 else x
    x = x.reshape(*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :])
    return jax.lax.slice_in_dim(x, 0, size, axis=axis)


def split_at_random(
    key: jax.Array,
    scores: jax.Array,
    items: jax.Array,
    lengths: jax.Array,
    num_samples: int,
    certainty: jax.Array,
) -> Iterator[Step]:
    """The paper's steps: weighs splits of every bucket that are drawn uniformly.

    Args:
      key: a PRNG key.
      scores: float [*B, s] by place.
      items: float [*B, s, d] by place.
      lengths: int32 [*B], how many items there are.
      num_samples: splits drawn for every bucket.
      certainty: see `loosen`.
    """
    *batch, size = scores.shape
    bits = (size - 1).bit_length()

    def level(state, level_key_and_bit):
        level_key, bit = level_key_and_bit
        noise = jax.random.uniform(level_key, (*batch, num_samples, size), state.dtype)
        lift = jnp.vectorize(
            functools.partial(_weigh_splits, bit=bit, certainty=certainty),
            signature="(c,s),(s,f),()->(s,p),(s,p),(s,f)",
        )
        sources, values, state = lift(noise, state, lengths)
        return state, Step(sources, values, state[..., 0], state[..., 1:])

    if bits:
        down = jax.lax.iota(jnp.int32, bits)[::-1]
        state = jnp.concatenate([scores[..., None], items], -1)
        _, stacked = jax.lax.scan(level, state, (jax.random.split(key, bits), down))
    for t in range(bits):
        yield jax.tree.map(lambda x: x[t], stacked)  # noqa: B023


def _weigh_splits(noise, state, length, *, bit, certainty):
    """A step of a sequence [s, F] by splits as `noise` [c, s] orders them, equation 15."""
    size = state.shape[0]
    place = jax.lax.iota(jnp.int32, size)
    start = (place >> (bit + 1)) << (bit + 1)
    middle = start + (1 << bit)
    is_high = place >= middle
    add = lambda x: jnp.zeros_like(x).at[start].add(x)[start]  # noqa: E731

    scores = state[:, 0]
    pivot = scores[middle - 1] / 2 + scores[jnp.minimum(middle, size - 1)] / 2
    log_odds = certainty * (scores - jax.lax.stop_gradient(pivot)) * jnp.where(is_high, -1, 1)
    log_odds = jnp.clip(log_odds, -_CERTAIN, _CERTAIN)
    own, across = jnp.where(is_high, middle, start), jnp.where(is_high, start, middle)

    def draw(noise):
        """Which items change sides, with whom, and the log of how much that weighs."""
        order = jax.lax.sort((start, place >= length, noise, place), num_keys=3)[3]
        moves = jnp.zeros(size, bool).at[order].set(is_high) != is_high
        # Those that leave a half, in order, take the places of those that leave the other.
        before = jnp.cumsum(moves, dtype=jnp.int32) - moves.astype(jnp.int32)
        rank = before - before[jnp.minimum(own, size - 1)]
        movers = jnp.zeros(size, jnp.int32)
        movers = movers.at[jnp.where(moves, own + rank, size)].set(place, mode="drop")
        partner = jnp.where(moves, movers[jnp.minimum(across + rank, size - 1)], place)
        return moves, partner, add(jnp.where(moves, log_odds, 0))

    stay = (place < 0, place, jnp.zeros_like(scores))
    drawn = jax.vmap(draw)(noise)
    moves, partner, log_weight = (
        jnp.concatenate([a[None], b]) for a, b in zip(stay, drawn, strict=True)
    )

    def mark(c, copies):
        earlier = moves[c]
        same = jax.vmap(lambda moves: add((moves != earlier).astype(jnp.int32)) == 0)(moves)
        return copies | (same & (jax.lax.broadcasted_iota(jnp.int32, moves.shape, 0) > c))

    copies = jax.lax.fori_loop(0, len(moves), mark, moves & False)
    weight = jax.nn.softmax(jnp.where(copies, -jnp.inf, log_weight), axis=0)
    return partner.T, weight.T, _product("cs,csf->sf", weight, state[partner])
