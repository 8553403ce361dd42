"""Jumps: weights of little use move to places where a weight would help (docs/sparse.md).

Layers with `PlacedTuples` pass what they compute through `explore`, which in the steps that `jumps`
asks for finds good places on the way back, from the gradient at places that are likely to be good.
`jumps`, around an optimizer, then moves the weakest tuples there.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hyperlayer_jax import checks
from hyperlayer_jax.sampling import duplicate_mask
from hyperlayer_jax.types import IndexTuples

# The largest axis whose indices float32 tells apart.
_LONGEST = 2**24
# Candidates for each tuple of a chunk, and random sums by which a gradient is measured.
CANDIDATES, SUMS = 4, 8
# What is added to the chance of a place, as a part of the mean one.
_FLOOR = 1e-3
# Of the mean of squared gradients from step to step.
_DECAY = 0.98


class PlacedTuples(nnx.Module):
    """Index tuples at integer places, which are parameters: only `jumps` moves them."""

    def __init__(
        self,
        chunks: Sequence[int],
        num_tuples: int,
        shape: Sequence[int],
        *,
        scale: float = 1.0,
        rngs: nnx.Rngs,
    ):
        """Spreads places evenly over the index space, all different, each at random in its part.

        Args:
          chunks: the chunk axes of the tuples, () for a single chunk.
          num_tuples: k, the tuples in a chunk.
          shape: the r axes of the index space.
          scale: the standard deviation of the first values.
          rngs: the stream `params`.

        Raises:
          ValueError: there are fewer places than tuples, or an axis is too long for float32.
        """
        self.shape = checks.check_shape("shape", shape)
        space = checks.check_size("shape", self.shape)
        count = checks.check_count("num_tuples", num_tuples)
        if count > space:
            raise ValueError(f"num_tuples: got {count}, want at most {space}, one for each place")
        if max(self.shape) > _LONGEST:
            raise ValueError(f"shape: got {self.shape}, want axes of at most {_LONGEST}")
        size = (*chunks, count)
        edges = np.arange(count + 1, dtype=np.int64) * space // max(count, 1)
        first, last = (
            jnp.broadcast_to(jnp.asarray(e, jnp.int32), size) for e in (edges[:-1], edges[1:])
        )
        flat = jax.random.randint(rngs.params(), size, first, last, jnp.int32)
        self.places = nnx.Param(unravel(flat, self.shape).astype(jnp.float32))
        self.values = nnx.Param(jax.random.normal(rngs.params(), size) * scale)
        # Not 0 in steps in which better places are looked for: a seed.
        self.seed = nnx.Param(jnp.zeros(()))

    def __call__(self, x: jax.Array | None = None) -> IndexTuples:
        """Returns means [*chunks, k, r], sigmas of 0 and values [*chunks, k], whatever x is."""
        places = jax.lax.stop_gradient(self.places[...])
        return IndexTuples(places, jnp.zeros_like(places), self.values[...])


Propose = Callable[[jax.Array, jax.Array, Any, jax.Array], tuple[jax.Array, jax.Array]]


def explore(propose: Propose, tuples: PlacedTuples, x: Any, y: jax.Array) -> jax.Array:
    """Returns y, a layer's output for x; where asked to, looks for better places on the way back.

    What it finds is the "gradient" of `tuples.places`: places [*chunks, k, r], the best first, and
    -1 where there is none. (Flax hands on the scales of 8-bit floats in the same way.) It costs
    nothing while `tuples.seed` is 0.

    Args:
      propose: `(key, places, x, gradient of y) -> (candidates int32 [*chunks, c, r], gradients
        [*chunks, c])`, the gradients those of weights at the candidates; c >= k.
      tuples: of the layer.
      x: arrays that the gradients depend on.
      y: float array.
    """
    return _explore(propose, tuples.places[...], tuples.seed[...], x, y)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _explore(propose, places, seed, x, y):
    return y


def _explore_fwd(propose, places, seed, x, y):
    return y, (places, seed, x)


def _explore_bwd(propose, residuals, dy):
    places, seed, x = residuals

    def look():
        key = jax.random.key(jax.lax.bitcast_convert_type(seed, jnp.uint32))
        return best(places, *propose(key, places, x, dy))

    better = jax.lax.cond(seed != 0, look, lambda: jnp.zeros_like(places))
    return better, jnp.zeros_like(seed), None, dy


_explore.defvjp(_explore_fwd, _explore_bwd)


def best(places: jax.Array, candidates: jax.Array, gradients: jax.Array) -> jax.Array:
    """The candidates of the largest gradients, chunk by chunk.

    Args:
      places: float32 [*B, k, r], taken: no candidate.
      candidates: int32 [*B, c, r], c >= k.
      gradients: float [*B, c].

    Returns:
      float32 [*B, k, r], all different, those of the largest gradients first; -1 where there are
      no more whose gradient is not 0.
    """
    k = places.shape[-2]
    points = jnp.concatenate([places.astype(jnp.int32), candidates], -2)
    copies = duplicate_mask(points)[..., k:]
    size = jnp.where(copies, 0, jnp.abs(gradients.astype(jnp.float32)))
    size, order = jax.lax.top_k(size, k)
    chosen = jnp.take_along_axis(candidates, order[..., None], -2)
    return jnp.where(size[..., None] > 0, chosen, -1).astype(jnp.float32)


def jump(
    key: jax.Array,
    places: jax.Array,
    values: jax.Array,
    usefulness: jax.Array,
    better: jax.Array,
    fraction: jax.Array | float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Moves the least useful tuples of every chunk to better places, where their values are 0.

    Args:
      key: a PRNG key, which decides where a fraction of k is not whole.
      places: float32 [*B, k, r].
      values: float [*B, k].
      usefulness: float [*B, k].
      better: float32 [*B, k, r], the best first, -1 where there are no more.
      fraction: of the tuples, in [0, 1]; fewer move if there are not so many better places.

    Returns:
      Places and values as they are then, and which have moved, bool [*B, k].
    """
    k = values.shape[-1]
    chance = jax.random.uniform(key, (*values.shape[:-1], 1))
    count = jnp.floor(jnp.asarray(fraction, jnp.float32) * k + chance)
    rank = jnp.argsort(jnp.argsort(usefulness, -1), -1)
    target = jnp.take_along_axis(better, rank[..., None], -2)
    moved = (rank < count.astype(jnp.int32)) & (target[..., 0] >= 0)
    return jnp.where(moved[..., None], target, places), jnp.where(moved, 0, values), moved


class JumpState(NamedTuple):
    """What `jumps` remembers.

    Attributes:
      step: int32, how many updates there have been.
      squares: for each `PlacedTuples`, the mean of the squared gradients of its values.
      inner: state of the optimizer.
    """

    step: jax.Array
    squares: tuple[jax.Array, ...]
    inner: Any


def jumps(
    model: nnx.Module,
    optimizer: Any,
    *,
    until: int,
    every: int = 50,
    fraction: float = 0.5,
    seed: int = 0,
) -> Any:
    """Makes an optimizer of Optax move weights of little use to places where they would help.

    Every so many steps, the `fraction` of the tuples of each chunk that matter least (by the size
    of the value times the root mean square of its gradient) jump to the places that the layers'
    `explore` has found. Their values, and the optimizer's moments of these, start at 0. The
    fraction decays to 0 like half a cosine.

    It sees to the places by itself: `optimizer` gets neither them nor their gradients. Gradients
    must be those of one batch as they come, so averages over several (`optax.MultiSteps`) belong
    inside.

    Args:
      model: the module that is optimized, or one like it; it has layers with `PlacedTuples`.
      optimizer: an `optax.GradientTransformation` for the parameters of the model.
      until: the step after which all stay; the rest of the training is for values alone.
      every: steps between jumps.
      fraction: the part of the tuples that moves at first.
      seed: of what is random.

    Returns:
      An optimizer of the same kind.

    Raises:
      ValueError: an argument is out of range, or there is nothing in the model that could jump.
    """
    if checks.check_count("every", every) < 1:
        raise ValueError(f"every: got {every}, want at least 1")
    checks.check_count("until", until)
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction: got {fraction}, want a number in (0, 1]")
    modules = nnx.iter_modules(model)
    paths = [tuple(map(str, path)) for path, m in modules if isinstance(m, PlacedTuples)]
    if not paths:
        raise ValueError("model: got none with `PlacedTuples`, want a layer whose weights can jump")
    own = {(*path, name) for path in paths for name in ("places", "seed")}

    def hide(tree):
        """The tree without the parameters that the optimizer does not see."""
        return _replace(tree, dict.fromkeys(own))

    def explores(step):
        return (step > 0) & (step < until) & (step % every == 0)

    def init(params):
        leaves = _leaves(params)
        squares = tuple(jnp.zeros_like(leaves[*path, "values"], jnp.float32) for path in paths)
        return JumpState(jnp.zeros((), jnp.int32), squares, optimizer.init(hide(params)))

    def update(updates, state, params, **extra):
        gradients, leaves = _leaves(updates), _leaves(params)
        step = state.step
        inner_updates, inner = optimizer.update(hide(updates), state.inner, hide(params), **extra)
        inner_updates = _leaves(inner_updates)
        squares = tuple(
            _DECAY * square + (1 - _DECAY) * gradients[*path, "values"].astype(jnp.float32) ** 2
            for square, path in zip(state.squares, paths, strict=True)
        )
        part = fraction / 2 * (1 + jnp.cos(math.pi * step.astype(jnp.float32) / max(until, 1)))
        key = jax.random.fold_in(jax.random.key(seed), step)
        keys = jax.random.split(key, len(paths) + 1)

        def move():
            new, masks = {}, {}
            for path, square, key in zip(paths, squares, keys[1:], strict=True):
                places, values = leaves[*path, "places"], leaves[*path, "values"]
                usefulness = jnp.abs(values.astype(jnp.float32)) * jnp.sqrt(square)
                better = gradients[*path, "places"]
                to, _, moved = jump(key, places, values, usefulness, better, part)
                masks[*path, "values"] = moved
                new[*path, "places"] = to - places
                change = inner_updates[*path, "values"]
                new[*path, "values"] = jnp.where(moved, -values, change).astype(change.dtype)
            fresh = tuple(
                jnp.where(masks[*path, "values"], 0, square)
                for path, square in zip(paths, squares, strict=True)
            )
            return new, fresh, _reset(inner, masks)

        def stay():
            new = {}
            for path in paths:
                new[*path, "places"] = jnp.zeros_like(leaves[*path, "places"])
                new[*path, "values"] = inner_updates[*path, "values"]
            return new, squares, inner

        new, squares, inner = jax.lax.cond(explores(step), move, stay)
        numbers = jax.random.uniform(keys[0], (len(paths),), minval=0.5)
        numbers = jnp.where(explores(step + 1), numbers, 0)
        for path, number in zip(paths, numbers, strict=True):
            new[*path, "seed"] = number - leaves[*path, "seed"]
        return _replace(updates, inner_updates | new), JumpState(step + 1, squares, inner)

    return type(optimizer)(init, update)


def _names(path: tuple) -> tuple[str, ...]:
    """The names along a path of a tree of parameters, without that of a variable's content."""
    names = tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
    return names[:-1] if names[-1:] == ("value",) else names


def _leaves(tree: Any) -> dict[tuple[str, ...], jax.Array]:
    return {_names(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _replace(tree: Any, leaves: dict[tuple[str, ...], Any]) -> Any:
    """The tree with other leaves at some paths."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: leaves.get(_names(path), leaf), tree)


def _reset(state: Any, masks: dict[tuple[str, ...], jax.Array]) -> Any:
    """The state of an optimizer, with what it keeps of some parameters 0 where masks say so."""

    def reset(path, leaf):
        names = _names(path)
        for name, mask in masks.items():
            if names[-len(name) :] == name and jnp.shape(leaf) == mask.shape:
                return jnp.where(mask, jnp.zeros_like(leaf), leaf)
        return leaf

    return jax.tree_util.tree_map_with_path(reset, state)


def unravel(flat: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Coordinates int32 [..., r] of numbers int32 [...] in row-major order."""
    coordinates = []
    for size in reversed(shape):
        coordinates.append(flat % size)
        flat = flat // size
    return jnp.stack(coordinates[::-1], -1)


def chances(key: jax.Array, *shapes: Sequence[int]) -> list[jax.Array]:
    """Arrays of those shapes of numbers in [0, 1), drawn at once: every draw has to be compiled."""
    sizes = [math.prod(shape) for shape in shapes]
    parts = jnp.split(jax.random.uniform(key, (sum(sizes),)), np.cumsum(sizes)[:-1])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def norms(chance: jax.Array, x: jax.Array, dy: jax.Array) -> jax.Array:
    """Estimates the norms of the rows of x dy^T, which is not formed, from a few random sums of dy.

    Args:
      chance: float32 [q, o] in [0, 1): the signs of q sums.
      x: float [i, n].
      dy: float [o, n].

    Returns:
      float32 [i].
    """
    signs = jnp.where(chance < 0.5, -1.0, 1.0)
    sums = x.astype(jnp.float32) @ (signs @ dy.astype(jnp.float32)).T
    return jnp.sqrt((sums**2).mean(-1))


def draw(chance: jax.Array, weights: jax.Array) -> jax.Array:
    """Draws indices int32 [...] in proportion to weights [n] >= 0, and a little uniformly.

    Args:
      chance: float32 [...] in [0, 1).
      weights: float32 [n].
    """
    floor = _FLOOR * weights.mean() + jnp.finfo(jnp.float32).tiny
    edges = jnp.cumsum(weights + floor)
    found = jnp.searchsorted(edges, chance * edges[-1], side="right")
    return jnp.minimum(found, weights.shape[0] - 1).astype(jnp.int32)
