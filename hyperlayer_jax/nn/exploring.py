"""Looks for places where a weight would help, on the way back through a layer."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hyperlayer_jax.density import duplicate_mask
from hyperlayer_jax.nn.tuples import MeetingTuples, PlacedTuples

Propose = Callable[[jax.Array, jax.Array, Any, jax.Array], tuple[jax.Array, jax.Array]]


def explore(
    propose: Propose, tuples: PlacedTuples | MeetingTuples, x: Any, y: jax.Array
) -> jax.Array:
    """Returns y, a layer's output for x; where asked to, looks for better places on the way back.

    What it finds are the "gradients" of `tuples.jumped`, places [*chunks, k, r] with a 1 behind,
    the best first, and of `tuples.looks`, the sizes [*chunks, k] of the gradients of weights there,
    0 where there is no place. (Flax hands on the scales of 8-bit floats in the same way.) While
    `tuples.looks` is 0, or where deterministic, it does nothing. Of `MeetingTuples` it finds what
    `meet` says.

    Args:
      propose: `(key, places, x, gradient of y) -> (candidates int32 [*chunks, c, r], gradients
        [*chunks, c])`, the gradients those of weights at the candidates; c >= k. For
        `MeetingTuples`, the
        last k candidates are the places themselves.
      tuples: of the layer.
      x: arrays that the gradients depend on.
      y: float array.
    """
    if tuples.deterministic:
        return y
    choose = best
    if isinstance(tuples, MeetingTuples):
        choose = functools.partial(meet, tuples.value)
    return _explore(propose, choose, tuples.jumped[...], tuples.looks[...], tuples.indices(), x, y)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _explore(propose, choose, jumped, looks, places, x, y):
    return y


def _explore_fwd(propose, choose, jumped, looks, places, x, y):
    return y, (looks, places, x)


def _explore_bwd(propose, choose, residuals, dy):
    looks, places, x = residuals
    seed = looks.ravel()[0] if looks.size else jnp.zeros(())

    def look():
        key = jax.random.key(jax.lax.bitcast_convert_type(seed, jnp.uint32))
        return choose(places, *propose(key, places, x, dy))

    nothing = jnp.zeros((*places.shape[:-1], places.shape[-1] + 1)), jnp.zeros_like(looks)
    found = jax.lax.cond(seed != 0, look, lambda: nothing)
    return *found, None, None, dy


_explore.defvjp(_explore_fwd, _explore_bwd)


def best(
    places: jax.Array, candidates: jax.Array, gradients: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The candidates of the largest gradients, chunk by chunk.

    Args:
      places: int32 [*B, k, r], taken: no candidate.
      candidates: int32 [*B, c, r], c >= k.
      gradients: float [*B, c].

    Returns:
      Different candidates with a 1 behind, float32 [*B, k, r + 1], and the sizes of their
      gradients, float32 [*B, k], the largest first. Where there are no more whose gradient is not
      0, sizes are 0.
    """
    k = places.shape[-2]
    points = jnp.concatenate([places, candidates], -2)
    copies = duplicate_mask(points)[..., k:]
    sizes = jnp.where(copies, 0, jnp.abs(gradients.astype(jnp.float32)))
    sizes, order = jax.lax.top_k(sizes, k)
    chosen = jnp.take_along_axis(candidates, order[..., None], -2)
    chosen = jnp.pad(chosen, [(0, 0)] * (chosen.ndim - 1) + [(0, 1)], constant_values=1)
    return chosen.astype(jnp.float32), sizes


def meet(
    value: float, places: jax.Array, candidates: jax.Array, gradients: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Where tuples should jump that share a place with another: where their value would help.

    A tuple leaves if there is one before it at its place and the loss wants less there; it goes
    where the loss wants more. Chance and tuples that are still wide ask for little: what counts
    is at least half of the largest gradient that asks for more. The largest come first.

    Args:
      value: of every tuple.
      places: int32 [*B, k, r].
      candidates: int32 [*B, c, r]; the last k are the places.
      gradients: float [*B, c].

    Returns:
      New places with a 1 behind, float32 [*B, k, r + 1], all 0 for tuples that stay; and 0 [*B, k].
    """
    k = places.shape[-2]
    gradients = gradients.astype(jnp.float32) * value
    harm = jnp.where(duplicate_mask(places), gradients[..., -k:], 0)
    better, sizes = best(places, candidates, jnp.minimum(gradients, 0))
    order = jnp.argsort(-harm, -1)
    harm = jnp.take_along_axis(harm, order, -1)
    least = sizes[..., :1] / 2
    moves = (harm > least) & (sizes > jnp.maximum(least, harm / 2))
    new = jnp.where(moves[..., None], better, 0)
    order = jnp.broadcast_to(order[..., None], new.shape)
    new = jnp.put_along_axis(jnp.zeros_like(new), order, new, axis=-2, inplace=False)
    return new, jnp.zeros_like(sizes)
