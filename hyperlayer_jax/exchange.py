"""The steps of a soft sort: items on both sides of a split exchange places, softly.

A sequence of s items, sorted beforehand, goes through ceil(log2(s)) levels. At the level of bit b,
counted down to 0, its buckets are the aligned ranges of 2^(b + 1) places, and each is split in its
middle.

States are stored in the order of the reflected binary code: place i is in slot i ^ (i >> 1). Two
items equally far from a split then differ in one bit of their slots, that of the level, so that no
item has to be looked for, and all levels are one program.
"""

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Beyond it an exchange is certain, and sums over a block are still finite.
_MAX_LOG_ODDS = 30.0
# The same for sums of log odds over a bucket.
_CERTAIN = 1e30
_product = functools.partial(jnp.einsum, precision="highest")


class Step(NamedTuple):
    """What a level does to s places.

    Attributes:
      sources: int32 [*B, s, p] or [s, p], the places that each place takes from.
      values: float [*B, s, p], how much it takes from each; they sum to 1.
      state: float [*B, s, F], the features at all places afterwards.
    """

    sources: jax.Array
    values: jax.Array
    state: jax.Array


class Level(NamedTuple):
    """What a level has left behind.

    Attributes:
      state: float [*B, blocks, F, h], features by slot afterwards.
      rates: float [*B, pairs of blocks, h, h], how much two items exchange.
    """

    state: jax.Array
    rates: jax.Array


def slot_of_place(size: int) -> jax.Array:
    """int32 [size]: the slot of each place."""
    place = jax.lax.iota(jnp.uint32, size)
    return (place ^ (place >> 1)).astype(jnp.int32)


def place_of_slot(size: int) -> jax.Array:
    """int32 [2^ceil(log2(size))]: the place in each slot, `size` or more where there is none."""
    place = jax.lax.iota(jnp.uint32, 1 << (size - 1).bit_length())
    for shift in (1, 2, 4, 8, 16):
        place ^= place >> shift
    return place.astype(jnp.int32)


@functools.partial(jax.jit, static_argnames="partners")
def loosen(
    state: jax.Array, present: jax.Array | None, partners: int, certainty: jax.Array
) -> tuple[jax.Array, tuple[Level | None, list[Level]]]:
    """Lets sorted items exchange places with others across the split, level by level.

    Each item may exchange with those that share the upper bits of its distance from the split: a
    block on each side. Odds a = exp(-certainty * gap) become rates a / (1 + the odds of all
    exchanges that either of the two might make), equation 11 of docs/method.md.

    Args:
      state: float [*B, N, F] by slot, N a power of two, 0 where absent. The score comes first.
      present: bool [*B, N] or [N] by slot; None if all are.
      partners: items in a block at most, a power of two.
      certainty: see above.

    Returns:
      The state by slot after all levels; and the levels, those of upper bits stacked into one.
    """
    *batch, size, features = state.shape
    block = min(partners, max(size // 2, 1))
    blocks = size // block
    state = jnp.swapaxes(state.reshape(*batch, blocks, block, features), -1, -2)
    seen = None if present is None else present.reshape(*present.shape[:-1], blocks, block)

    def upper(carry, level):
        state, seen = carry
        path = jax.lax.iota(jnp.uint32, blocks // 2) & ((jnp.uint32(1) << level) - 1)
        halves = _halves(state.reshape(*batch, 2, blocks // 2, features, block), -4)
        both = (
            None
            if seen is None
            else _halves(seen.reshape(*seen.shape[:-2], 2, blocks // 2, block), -3)
        )
        low, high, rates = _exchange(halves[0], halves[1], both, path, certainty)
        # The bit of the next level becomes the first.
        state = jnp.stack([low, high], -3).reshape(state.shape)
        seen = None if both is None else jnp.stack(both, -2).reshape(seen.shape)
        return (state, seen), Level(state, rates)

    above, below = None, []
    if blocks > 1:
        count = jax.lax.iota(jnp.uint32, blocks.bit_length() - 1)
        (state, seen), above = jax.lax.scan(upper, (state, seen), count)
    while block > 1:
        path = jax.lax.iota(jnp.uint32, blocks)
        halves = _halves(state.reshape(*batch, blocks, features, 2, block // 2), -2)
        both = None
        if seen is not None:
            both = _halves(seen.reshape(*seen.shape[:-1], 2, block // 2), -2)
        low, high, rates = _exchange(halves[0], halves[1], both, path, certainty)
        blocks, block = 2 * blocks, block // 2
        state = jnp.stack([low, high], -3).reshape(*batch, blocks, features, block)
        if both is not None:
            seen = jnp.stack(both, -2).reshape(*both[0].shape[:-2], blocks, block)
        below.append(Level(state, rates))
    return state.reshape(*batch, size, features), (above, below)


def _halves(x, axis):
    return [jax.lax.index_in_dim(x, side, axis, keepdims=False) for side in (0, 1)]


def _exchange(low, high, present, path, certainty):
    """Blocks [*B, blocks, F, h] on both sides of splits after exchanging, and the rates.

    The bits of a path that lead to a bucket say which side is the upper one: that of 1 after an
    even number of ones.
    """
    shape = low.shape
    *lead, features, width = shape
    flat = (math.prod(lead), features, width)
    low, high = low.reshape(flat), high.reshape(flat)
    sign = 1 - 2 * (jax.lax.population_count(path) & 1).astype(low.dtype)
    scale = -certainty * jnp.broadcast_to(sign, lead).reshape(flat[0], 1, 1)
    log_odds = scale * (high[:, 0, None, :] - low[:, 0, :, None])
    odds = jnp.exp(jnp.minimum(log_odds, _MAX_LOG_ODDS))
    if present is not None:
        rows, columns = (
            jnp.broadcast_to(p, (*lead, width)).reshape(flat[0], width) for p in present
        )
        odds = jnp.where(rows[:, :, None] & columns[:, None, :], odds, 0)
    rates = odds / (1 + odds.sum(2, keepdims=True) + odds.sum(1, keepdims=True) - odds)
    ones = jnp.ones_like(low[:, :1])
    up = _product("mdj,mij->mdi", jnp.concatenate([ones, high], 1), rates)
    down = _product("mdi,mij->mdj", jnp.concatenate([ones, low], 1), rates)
    low, high = ((1 - y[:, :1]) * x + y[:, 1:] for x, y in ((low, up), (high, down)))
    return low.reshape(shape), high.reshape(shape), rates.reshape(*lead, width, width)


def steps(above: Level | None, below: list[Level], size: int) -> Iterator[Step]:
    """The steps that `loosen` took with a sequence of `size` places, from what it returns."""
    place = jax.lax.iota(jnp.uint32, size)[:, None]
    bits = (size - 1).bit_length()
    stacked = bits - len(below)
    for t in range(bits):
        level = below[t - stacked] if t >= stacked else jax.tree.map(lambda x: x[t], above)  # noqa: B023
        bit, width = bits - 1 - t, level.rates.shape[-1]
        inner = width.bit_length() - 1
        near = jax.lax.broadcasted_iota(jnp.uint32, (1, width), 1)
        partner = place ^ ((2 << bit) - 1) ^ near
        slot, other = place ^ (place >> 1), partner ^ (partner >> 1)
        block = slot >> inner
        pair = _rotate(block, t, bits - inner) & ((1 << (bits - inner - 1)) - 1)
        is_high = (slot >> bit) & 1 == 1
        here, there = slot & (width - 1), other & (width - 1)
        row, column = jnp.where(is_high, there, here), jnp.where(is_high, here, there)
        pair, row, column = (x.astype(jnp.int32) for x in (pair, row, column))
        values = level.rates[..., pair, row, column]
        values = jnp.concatenate([1 - values.sum(-1, keepdims=True), values], -1)
        sources = jnp.concatenate([place, jnp.where(partner < size, partner, place)], -1)
        *batch, blocks, features, _ = level.state.shape
        state = jnp.swapaxes(level.state, -1, -2).reshape(*batch, blocks * width, features)
        found = _rotate(block, t + 1, bits - inner) * width + here
        state = state[..., found[:, 0].astype(jnp.int32), :]
        yield Step(sources.astype(jnp.int32), values, state)


def _rotate(x, turns, bits):
    """Numbers of `bits` bits, the upper `turns` of which become the lower ones."""
    return ((x << turns) | (x >> (bits - turns))) & ((1 << bits) - 1)


def split_at_random(
    key: jax.Array, state: jax.Array, lengths: jax.Array, num_samples: int, certainty: jax.Array
) -> Iterator[Step]:
    """The paper's steps: weighs splits of every bucket that are drawn uniformly.

    Args:
      key: a PRNG key.
      state: float [*B, s, F] by place. The score comes first.
      lengths: int32 [*B], how many items there are.
      num_samples: splits drawn for every bucket.
      certainty: see `loosen`.
    """
    *batch, size, _ = state.shape
    bits = (size - 1).bit_length()

    def level(state, level_key_and_bit):
        level_key, bit = level_key_and_bit
        noise = jax.random.uniform(level_key, (*batch, num_samples, size), state.dtype)
        lift = jnp.vectorize(
            functools.partial(_weigh_splits, bit=bit, certainty=certainty),
            signature="(c,s),(s,f),()->(s,p),(s,p),(s,f)",
        )
        step = Step(*lift(noise, state, lengths))
        return step.state, step

    if bits:
        down = jax.lax.iota(jnp.int32, bits)[::-1]
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
