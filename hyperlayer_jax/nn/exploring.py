"""Looks for places where a weight would help, on the way back through a layer."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

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
    seeds = tuples.looks[...]
    known, structure = jax.tree.flatten((seeds, tuples.indices(), x))

    def look(dy, *known):
        dy, *known = map(jax.lax.stop_gradient, (dy, *known))
        seeds, places, x = jax.tree.unflatten(structure, known)
        seed = seeds.ravel()[0] if seeds.size else jnp.zeros(())

        def find():
            key = jax.random.key(jax.lax.bitcast_convert_type(seed, jnp.uint32))
            return best(places, *propose(key, places, x, dy))

        nothing = jnp.zeros((*places.shape[:-1], places.shape[-1] + 1)), jnp.zeros_like(seeds)
        return jax.lax.cond(seed != 0, find, lambda: tuple(map(vary, nothing)))

    # Inside `shard_map` a gradient varies as its operand does.
    axes = frozenset().union(*map(_varying, (y, *known)))

    def vary(a):
        return jax.lax.pcast(a, tuple(axes - _varying(a)), to="varying")

    linear = map(vary, (tuples.jumped[...], seeds, y))
    return _explore.bind(*linear, *known, look=look)


def _varying(array):
    return jax.typeof(array).manual_axis_type.varying


# The identity of its third operand, linear in the first three; what a look finds is returned by the
# transpose in place of the zeros that would be right. A `custom_vjp` would forbid forward mode.
_explore = Primitive("explore")
_explore.def_impl(lambda jumped, looks, y, *known, look: y)
_explore.def_abstract_eval(lambda jumped, looks, y, *known, look: y)
mlir.register_lowering(_explore, lambda context, jumped, looks, y, *known, look: [y])


def _jvp(primals, tangents, *, look):
    tangents = map(ad.instantiate_zeros, tangents[:3])
    return _explore.bind(*primals, look=look), _explore.bind(*tangents, *primals[3:], look=look)


def _transpose(dy, jumped, looks, y, *known, look):
    gradients = [None] * 3 if isinstance(dy, ad.Zero) else [*look(dy, *known), dy]
    asked = map(ad.is_undefined_primal, (jumped, looks, y))
    return [g if a else None for g, a in zip(gradients, asked, strict=True)] + [None] * len(known)


def _batch(operands, axes, *, look):
    size = next(x.shape[a] for x, a in zip(operands, axes, strict=True) if a is not None)
    linear = [
        jnp.broadcast_to(x, (size, *x.shape)) if a is None else jnp.moveaxis(x, a, 0)
        for x, a in zip(operands[:3], axes[:3], strict=True)
    ]
    look = jax.vmap(look, in_axes=(0, *axes[3:]))
    return _explore.bind(*linear, *operands[3:], look=look), 0


ad.primitive_jvps[_explore] = _jvp
ad.primitive_transposes[_explore] = _transpose
batching.primitive_batchers[_explore] = _batch


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
