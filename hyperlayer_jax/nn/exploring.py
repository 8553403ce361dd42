"""Looks for places where a weight would help, on the way back through a layer."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hyperlayer_jax.density import duplicate_mask
from hyperlayer_jax.nn.tuples import PlacedTuples

Propose = Callable[[jax.Array, jax.Array, Any, jax.Array], tuple[jax.Array, jax.Array]]


def explore(propose: Propose, tuples: PlacedTuples, x: Any, y: jax.Array) -> jax.Array:
    """Returns y, a layer's output for x; where asked to, looks for better places on the way back.

    What it finds are the "gradients" of `tuples.jumped`, places [*chunks, k, r] with a 1 behind,
    the best first, and of `tuples.looks`, the sizes [*chunks, k] of the gradients of weights there,
    0 where there is no place. (Flax hands on the scales of 8-bit floats in the same way.) While
    `tuples.looks` is 0, or where deterministic, it does nothing.

    Args:
      propose: `(key, places, x, gradient of y) -> (candidates int32 [*chunks, c, r], gradients
        [*chunks, c])`, the gradients those of weights at the candidates; c >= k.
      tuples: of the layer.
      x: arrays that the gradients depend on.
      y: float array.
    """
    if tuples.deterministic:
        return y
    return _explore(propose, tuples.jumped[...], tuples.looks[...], tuples.indices(), x, y)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _explore(propose, jumped, looks, places, x, y):
    return y


def _explore_fwd(propose, jumped, looks, places, x, y):
    return y, (looks, places, x)


def _explore_bwd(propose, residuals, dy):
    looks, places, x = residuals
    seed = looks.ravel()[0] if looks.size else jnp.zeros(())

    def look():
        key = jax.random.key(jax.lax.bitcast_convert_type(seed, jnp.uint32))
        return best(places, *propose(key, places, x, dy))

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
