"""Jumps: weights of little use move to places where a weight would help (docs/sparse.md).

Layers with `PlacedTuples` pass what they compute through `explore`, which in the
steps that `jumps` asks for finds good places on the way back, from the gradient at places that are
likely to be good. `jumps`, around an optimizer, then moves tuples there.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from hyperlayer_jax import checks
from hyperlayer_jax.nn.tuples import PlacedTuples

# Of the mean of squared gradients from step to step.
_DECAY = 0.98


def weakest(key: jax.Array, usefulness: jax.Array, fraction: jax.Array | float) -> jax.Array:
    """Marks the least useful tuples of every chunk.

    Args:
      key: a PRNG key, which decides where a fraction of k is not whole.
      usefulness: float [*B, k].
      fraction: in [0, 1].

    Returns:
      bool [*B, k].
    """
    k = usefulness.shape[-1]
    chance = jax.random.uniform(key, (*usefulness.shape[:-1], 1))
    count = jnp.floor(jnp.asarray(fraction, jnp.float32) * k + chance).astype(jnp.int32)
    shape = usefulness.shape
    among = jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1) < count
    order = jnp.argsort(usefulness, -1)
    return jnp.put_along_axis(jnp.zeros_like(among), order, among, axis=-1, inplace=False)


def jump(
    places: jax.Array,
    gradients: jax.Array,
    doubtful: jax.Array,
    better: jax.Array,
    sizes: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Moves doubtful tuples to where a weight would help more than where they are.

    Doubtful tuples have a value of 0, so that all places are on an equal footing: those of the
    largest gradients win, be they old or new.

    Args:
      places: float32 [*B, k, r].
      gradients: float [*B, k], of the values.
      doubtful: bool [*B, k].
      better: float32 [*B, k, r], other places.
      sizes: float32 [*B, k], of the gradients of values there, the largest first.

    Returns:
      The places, float32 [*B, k, r], and which are new, bool [*B, k].
    """
    own = jnp.where(doubtful, jnp.abs(gradients.astype(jnp.float32)), jnp.inf)
    order = jnp.argsort(own, -1)
    whole = (better == jnp.round(better)).all(-1)
    moves = whole & (sizes > jnp.take_along_axis(own, order, -1))
    old = jnp.take_along_axis(places, order[..., None], -2)
    new = jnp.where(moves[..., None], better, old)
    put = functools.partial(jnp.put_along_axis, inplace=False)
    return (
        put(places, jnp.broadcast_to(order[..., None], new.shape), new, axis=-2),
        put(jnp.zeros_like(doubtful), order, moves, axis=-1),
    )


def is_look(step: Any, *, until: int, every: int) -> Any:
    """Whether doubtful values are 0 after so many steps, an int or an array, of `jumps`."""
    return (step % every == every // 2) & (step < until)


class JumpState(NamedTuple):
    """What `jumps` remembers; lists have an entry for each `PlacedTuples`.

    Attributes:
      key: a PRNG key; with the number of the step, it decides what is random.
      step: int32, how many updates there have been.
      squares: means of the squared gradients of values.
      doubtful: which tuples had their values taken away for the next step.
      values: what those were.
      inner: state of the optimizer.
    """

    key: jax.Array
    step: jax.Array
    squares: list[jax.Array]
    doubtful: list[jax.Array]
    values: list[jax.Array]
    inner: Any


def jumps(
    key: jax.Array,
    model: nnx.Module,
    optimizer: Any,
    *,
    until: int,
    every: int = 50,
    fraction: float = 0.3,
) -> Any:
    """Makes an optimizer of Optax move weights of little use to places where they would help.

    Every so many steps, of each chunk [k] of `PlacedTuples` the `fraction` that matters least (by
    the size of the value times the root mean square of its gradient) has no value for one step. In
    this step the layers' `explore` finds other places, and gradients decide: those of the largest
    have the tuples from then on. Tuples that stay get their values back. Those that jump start at
    0, as do the optimizer's moments of their values. The fraction decays to 0 like half a cosine.

    It sees to the places by itself: `optimizer` gets neither them nor their gradients. Gradients
    must come as they are: whatever changes them (clipping, scaling, `optax.MultiSteps`) belongs
    inside, `jumps(key, model, optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)), ...)`,
    never before it in a chain, where places would no longer be whole, and nothing jumps.

    Args:
      key: a PRNG key; with the number of the step, it decides what is random.
      model: the module that is optimized, or one like it; it has layers whose tuples can jump.
      optimizer: an `optax.GradientTransformation` for the parameters of the model.
      until: the step after which all stay; the rest of the training is for values alone.
      every: steps between looks. For one step in the middle of these, `every // 2` steps after a
        multiple, doubtful values are 0: do not evaluate or export then.
      fraction: the part of the tuples that is in doubt at first.

    Returns:
      An optimizer of the same kind.

    Raises:
      ValueError: an argument is out of range, or there is nothing in the model that could jump.
    """
    checks.check_positive("every", every)
    checks.check_count("until", until)
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction: got {fraction}, want a number in (0, 1]")
    modules = nnx.iter_modules(model)
    paths = [tuple(map(str, path)) for path, m in modules if isinstance(m, PlacedTuples)]
    if not paths:
        raise ValueError("model: got none with `PlacedTuples`, want weights that can jump")
    hidden = dict.fromkeys((*path, name) for path in paths for name in ("jumped", "looks"))

    def select(tree, name):
        leaves = _leaves(tree)
        return [leaves[*path, name] for path in paths]

    def at(name, leaves):
        return {(*path, name): leaf for path, leaf in zip(paths, leaves, strict=True)}

    looks = functools.partial(is_look, until=until, every=every)

    def init(params):
        values = select(params, "values")
        return JumpState(
            key=jnp.copy(key),
            step=jnp.zeros((), jnp.int32),
            squares=[jnp.zeros_like(value, jnp.float32) for value in values],
            doubtful=[jnp.zeros_like(value, bool) for value in values],
            values=[jnp.zeros_like(value) for value in values],
            inner=optimizer.init(_replace(params, hidden)),
        )

    def update(updates, state, params, **extra):
        step, doubtful, leaves = state.step, state.doubtful, _leaves(params)
        places, values = select(params, "jumped"), select(params, "values")
        gradients = select(updates, "values")
        known = [jnp.where(d, 0, g) for d, g in zip(doubtful, gradients, strict=True)]
        changes, inner = optimizer.update(
            _replace(updates, hidden | at("values", known)),
            state.inner,
            _replace(params, hidden),
            **extra,
        )
        changes = select(changes, "values"), _leaves(changes)
        squares = [
            jnp.where(d, s, _DECAY * s + (1 - _DECAY) * g.astype(jnp.float32) ** 2)
            for d, s, g in zip(doubtful, state.squares, gradients, strict=True)
        ]

        def decide():
            better, sizes = select(updates, "jumped"), select(updates, "looks")
            found = list(map(jump, places, gradients, doubtful, better, sizes))
            to, moved = ([pair[i] for pair in found] for i in range(2))
            back = [
                jnp.where(m, 0, jnp.where(d, kept, value + change)).astype(value.dtype)
                for m, d, kept, value, change in zip(
                    moved, doubtful, state.values, values, changes[0], strict=True
                )
            ]
            fresh = [jnp.where(m, 0, s) for m, s in zip(moved, squares, strict=True)]
            return to, back, fresh, _reset(inner, at("values", moved))

        def proceed():
            new = [
                (value + change).astype(value.dtype)
                for value, change in zip(values, changes[0], strict=True)
            ]
            return places, new, squares, inner

        to, values_, squares, inner = jax.lax.cond(looks(step), decide, proceed)
        first, *keys = jax.random.split(jax.random.fold_in(state.key, step), 1 + len(paths))
        next_ = looks(step + 1)

        def doubt():
            time = (step + 1).astype(jnp.float32) / max(until, 1)
            part = fraction / 2 * (1 + jnp.cos(math.pi * time))
            uses = [
                jnp.abs(value.astype(jnp.float32)) * jnp.sqrt(square)
                for value, square in zip(values_, squares, strict=True)
            ]
            return [weakest(k, use, part) for k, use in zip(keys, uses, strict=True)]

        doubtful = jax.lax.cond(next_, doubt, lambda: list(map(jnp.zeros_like, doubtful)))
        seeds = jnp.where(next_, jax.random.uniform(first, (len(paths),), minval=0.5), 0)
        seeds = dict(zip(paths, seeds, strict=True))
        own = (
            at("jumped", map(jnp.subtract, to, places))
            | at(
                "values",
                [
                    jnp.where(d, 0, new) - old
                    for d, new, old in zip(doubtful, values_, values, strict=True)
                ],
            )
            | {(*path, "looks"): seed - leaves[*path, "looks"] for path, seed in seeds.items()}
        )
        updates = _replace(updates, changes[1] | own)
        return updates, JumpState(state.key, step + 1, squares, doubtful, values_, inner)

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
