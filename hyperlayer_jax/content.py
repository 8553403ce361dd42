"""Where attention looks that goes by content: keys that lie near a query on learned lines.

Keys have coordinates on a few lines, and queries a mean on each. The keys next to the mean, in the
order of a line, are the points of the query: it is enough that one line finds a key. The weight of
a point is the product of its densities on all lines, of Cauchy rather than Gauss, whose tails pull
the other lines after the one that has found it. So gradients reach coordinates, means and sigmas,
and nothing is compared with everything: see docs/content.md.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from hyperlayer_jax import checks
from hyperlayer_jax.kernels import accumulator
from hyperlayer_jax.lift import lift, reshape

# Squares of distances in sigmas must be finite.
_MIN_SIGMA, _MAX_DISTANCE = 1e-6, 1e12
# The places of a tree over more keys, a power of two of them, would not be counted by int32.
_MAX_KEYS = 2**30


def content_points(
    coordinates: jax.Array,
    means: jax.Array,
    sigmas: jax.Array,
    *,
    num_nearest: int,
    limits: jax.Array | None = None,
    mask: jax.Array | None = None,
    in_order: "InOrder | None" = None,
) -> tuple[jax.Array, jax.Array]:
    """The keys next to each query on every line, and the products of their densities on all.

    Args:
      coordinates: float [*B, s, l], of every key on every line.
      means: float [*B, t, l], of every query.
      sigmas: float [*B, l] >= 0, of every line.
      num_nearest: the keys that a query has on each line: as many of lower as of higher rank than
        its mean, if there are.
      limits: int32 [t] in 0 to s, how many of the keys, the first ones, each query may have; all
        where None.
      mask: bool [*B, s], the keys that exist; all where None.
      in_order: of each line, [*B, l, s], the keys that all queries may have, in place of limits and
        mask: they need not be sorted again.

    Returns:
      Indices int32 [*B, t, l num_nearest, 1] and weights [*B, t, l num_nearest]: what
      `RowSparseTensor` takes. A density is 1 / (1 + z^2), z sigmas from its mean; a weight is 0
      where a query has found a key on another line before, or no more keys. No gradient goes
      through the choice of keys.

    Raises:
      ValueError: an argument has the wrong shape, dtype or range.
    """
    coordinates, means, sigmas = checks.as_arrays((coordinates, means, sigmas))
    for name, x in (("coordinates", coordinates), ("means", means)):
        checks.check_float(name, x, 2, "[*B, length, l]")
    *leading, size, lines = coordinates.shape
    if means.shape[:-2] != tuple(leading) or means.shape[-1] != lines:
        raise ValueError(f"means: got shape {means.shape}, want {(*leading, 't', lines)}")
    checks.check_float("sigmas", sigmas, 1, "[*B, l]")
    if sigmas.shape != (*leading, lines):
        raise ValueError(f"sigmas: got shape {sigmas.shape}, want {(*leading, lines)}")
    num_nearest = checks.check_count("num_nearest", num_nearest)
    if mask is not None:
        checks.check_mask("mask", mask, (*leading, size))
        mask = jnp.broadcast_to(mask[..., None, :], (*leading, lines, size))
    if in_order is not None:
        if limits is not None or mask is not None:
            raise ValueError("in_order: got limits or a mask as well, want one or the other")
        if in_order.keys.shape != (*leading, lines, size):
            raise ValueError(
                f"in_order: got shape {in_order.keys.shape}, want {(*leading, lines, size)}"
            )
    dtype = accumulator(coordinates.dtype)
    coordinates, means, sigmas = (x.astype(dtype) for x in (coordinates, means, sigmas))
    if size == 0:
        shape = *means.shape[:-1], lines * num_nearest
        return jnp.zeros((*shape, 1), jnp.int32), jnp.zeros(shape, dtype)
    by_line = jnp.moveaxis(means, -1, -2)
    if in_order is None:
        keys_by_line = jnp.moveaxis(coordinates, -1, -2)
        nearest = nearest_keys(keys_by_line, by_line, num_nearest, limits=limits, mask=mask)
    else:
        nearest = in_order.nearest(by_line, num_nearest)
    nearest = jnp.moveaxis(nearest, -3, -2)
    nearest = reshape(nearest, (*means.shape[:-1], lines * num_nearest), leading=len(leading))
    weights = _densities(coordinates, means, sigmas, nearest)
    return jnp.maximum(nearest, 0)[..., None], weights


@lift("(s,l),(t,l),(l),(t,p)->(t,p)")
def _densities(coordinates, means, sigmas, indices):
    """The products of densities of the keys at `indices`, 0 for copies and where there is none."""
    found = _at(coordinates, jnp.maximum(indices, 0))
    distances = jnp.where((indices < 0)[..., None], 0, found - means[:, None])
    distances = jnp.clip(distances, -_MAX_DISTANCE, _MAX_DISTANCE)
    z = distances / jnp.maximum(sigmas, _MIN_SIGMA)[None, None]
    weights = jnp.exp(-jnp.log1p(z**2).sum(-1))
    earlier = jnp.tril(jnp.ones((indices.shape[-1],) * 2, bool), -1)
    copies = ((indices[:, :, None] == indices[:, None]) & earlier[None]).any(-1)
    return jnp.where((indices < 0) | copies, 0, weights)


def nearest_keys(
    coordinates: jax.Array,
    means: jax.Array,
    count: int,
    *,
    limits: jax.Array | None = None,
    mask: jax.Array | None = None,
) -> jax.Array:
    """The keys whose coordinates are next to each mean, of the first few keys or of all.

    As if the first `limits[i]` keys were sorted anew for each query i. It costs s log s to build
    and log s for each key that is found (a wavelet tree, Grossi, Gupta and Vitter 2003, of the
    ranks of all keys).

    Args:
      coordinates: float [*B, s]. Equal ones are in the order of the keys.
      means: float [*B, t].
      count: how many keys are wanted: half of them below the mean, half (or one more) not. Near an
        end they are the first or last ones.
      limits: int32 [t] in 0 to s, see above; s where None.
      mask: bool [*B, s], the keys that exist; all where None.

    Returns:
      int32 [*B, t, count], in ascending order of coordinates; -1 where there are no more keys.

    Raises:
      ValueError: an argument has the wrong shape, dtype or range.
    """
    coordinates, means = map(jax.lax.stop_gradient, checks.as_arrays((coordinates, means)))
    checks.check_float("coordinates", coordinates, 1, "[*B, s]")
    checks.check_float("means", means, 1, "[*B, t]")
    count = checks.check_count("count", count)
    leading, size = coordinates.shape[:-1], coordinates.shape[-1]
    if size > _MAX_KEYS:
        raise ValueError(f"coordinates: got {size} keys, want at most 2^30")
    if means.shape[:-1] != leading:
        raise ValueError(f"means: got shape {means.shape}, want {(*leading, 't')}")
    if mask is not None:
        checks.check_mask("mask", mask, coordinates.shape)
        # Sorting puts NaN last: what does not exist behind what is infinite, or not a number.
        last = jnp.where(jnp.isnan(coordinates), jnp.inf, coordinates)
        coordinates = jnp.where(mask, last, jnp.nan)
    if size == 0:
        return jnp.full((*means.shape, count), -1, jnp.int32)
    if limits is None:
        number = jnp.full(means.shape, size, jnp.int32)
        if mask is not None:
            number = jnp.broadcast_to(mask.sum(-1, keepdims=True, dtype=jnp.int32), means.shape)
        search = lift("(s),(t),(t)->(t,p)")(functools.partial(_among_all, count))
        return search(coordinates, means, number)
    checks.check_indices("limits", limits, 1, "[t]")
    if limits.shape != means.shape[-1:]:
        raise ValueError(f"limits: got shape {limits.shape}, want {means.shape[-1:]}")
    limits = jnp.broadcast_to(limits, means.shape)
    number = limits if mask is None else _of_the_first(mask, limits)
    search = lift("(s),(t),(t),(t)->(t,p)")(functools.partial(_among_first, count))
    return search(coordinates, means, limits, number)


@lift("(s),(t)->(t)")
def _of_the_first(exists, limits):
    """How many of the first few keys exist."""
    return _at(jnp.pad(jnp.cumsum(exists, dtype=jnp.int32), (1, 0)), limits)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InOrder:
    """The first few keys in the order of their coordinates, to which the next one can be added.

    Attributes:
      values: float [*B, s], their coordinates in ascending order, then NaN.
      keys: int32 [*B, s], which they are.
      number: int32 [], how many.
    """

    values: jax.Array
    keys: jax.Array
    number: jax.Array

    @classmethod
    def of(cls, coordinates: jax.Array, number: jax.Array) -> "InOrder":
        """Sorts the first int32 [] of the keys at coordinates float [*B, s]."""
        keys = jax.lax.broadcasted_iota(jnp.int32, coordinates.shape, coordinates.ndim - 1)
        values = jnp.where(keys < number, jax.lax.stop_gradient(coordinates), jnp.nan)
        return cls(*jax.lax.sort_key_val(values, keys), number)

    def add(self, coordinates: jax.Array) -> "InOrder":
        """With the next key, at coordinates float [*B]: a step for each key, and no sort."""
        added = lift("(s),(s),(),()->(s),(s)")(_added)
        coordinates = jax.lax.stop_gradient(coordinates)
        values, keys = added(self.values, self.keys, coordinates, self.number)
        return InOrder(values, keys, self.number + 1)

    def nearest(self, means: jax.Array, count: int) -> jax.Array:
        """What `nearest_keys` returns of these keys, for means float [*B, t]."""
        search = lift("(s),(s),(t),()->(t,p)")(functools.partial(_among_sorted, count))
        return search(self.values, self.keys, jax.lax.stop_gradient(means), self.number)


def _added(values, keys, coordinate, number):
    after = jnp.searchsorted(values, coordinate, side="right").astype(jnp.int32)
    after = jnp.minimum(after, number)
    place = jnp.arange(values.size, dtype=jnp.int32)

    def insert(x, new):
        return jnp.where(place < after, x, jnp.where(place == after, new, jnp.roll(x, 1)))

    return insert(values, coordinate), insert(keys, number)


def _at(table, places):
    """What a table says at places that are known to be inside of it."""
    return table.at[places].get(mode="promise_in_bounds")


def _wanted(below, number, count):
    """The ranks of `count` keys around a mean that `below` of `number` keys are below: [t, p].

    And which of them there are.
    """
    first = jnp.clip(below - count // 2, 0, jnp.maximum(number - count, 0))
    ranks = first[:, None] + jnp.arange(count, dtype=jnp.int32)[None]
    exists = ranks < number[:, None]
    return jnp.where(exists, ranks, 0), exists


def _among_all(count, coordinates, means, number):
    keys = jnp.arange(coordinates.size, dtype=jnp.int32)
    values, order = jax.lax.sort_key_val(coordinates, keys)
    return _among_sorted(count, values, order, means, number)


def _among_sorted(count, values, order, means, number):
    below = jnp.searchsorted(values, means).astype(jnp.int32)
    number = jnp.broadcast_to(number, below.shape)
    ranks, found = _wanted(jnp.minimum(below, number), number, count)
    return jnp.where(found, _at(order, ranks), -1)


def _among_first(count, coordinates, means, limits, number):
    """By a tree over ranks: a node has the keys of 2^b consecutive ranks, in their own order.

    All nodes of a level are one array of keys, and one of how many of the keys before each place
    go to the left, which have lower ranks. So the first keys of a node are the first keys of its
    children, and how many they are is looked up.
    """
    bits = max(1, (coordinates.size - 1).bit_length())
    size = 2**bits
    place = jnp.arange(size, dtype=jnp.int32)
    padded = jnp.pad(coordinates, (0, size - coordinates.size), constant_values=jnp.inf)
    values, order = jax.lax.sort_key_val(padded, place)
    ranks = jnp.zeros_like(order).at[order].set(place, unique_indices=True)

    def step(lefts, half, state, goes_right):
        """From nodes of 2 half ranks to their children, for queries with so many keys in them."""
        node, inside, rank = state
        left = _at(lefts, node + inside) - node // 2
        right = goes_right(left)
        return (
            node + jnp.where(right, half, 0),
            jnp.where(right, inside - left, left),
            rank + jnp.where(right, left, 0),
        )

    def descend(carry, half):
        ranks, state = carry
        left = ranks & half == 0
        lefts = jnp.pad(jnp.cumsum(left, dtype=jnp.int32), (1, 0))
        node = place & -(2 * half)
        earlier = lefts[:-1] - node // 2
        target = node + jnp.where(left, earlier, half + place - node - earlier)
        ranks = jnp.zeros_like(ranks).at[target].set(ranks, unique_indices=True)
        # All ranks of the left child are below the mean if its last one is.
        state = step(lefts, half, state, lambda _: _at(values, state[0] + half - 1) < means)
        return (ranks, state), lefts

    halves = 2 ** jnp.arange(bits - 1, -1, -1, dtype=jnp.int32)
    zeros = jnp.zeros_like(limits)
    (_, (leaf, inside, below)), tables = jax.lax.scan(
        descend, (ranks, (zeros, limits, zeros)), halves
    )
    below = below + jnp.where(_at(values, leaf) < means, inside, 0)
    wanted, found = _wanted(jnp.minimum(below, number), number, count)

    def select(state, level):
        lefts, half = level
        state = step(lefts, half, state, lambda left: wanted >= state[2] + left)
        return state, None

    zeros = jnp.zeros_like(wanted)
    (rank, _, _), _ = jax.lax.scan(
        select, (zeros, zeros + limits[:, None], zeros), (tables, halves)
    )
    return jnp.where(found, _at(order, rank), -1)
