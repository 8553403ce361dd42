"""Sparse training of dense layers under masks: what a layer that learns its places has to beat.

Weights are kept 0 where they do not exist, but stored, as are their gradients and moments.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

Method = Literal["set", "rigl", "magnitude"]


class MaskState(NamedTuple):
    """What `masked` remembers.

    Attributes:
      key: a PRNG key; with the number of the step, it decides what is random.
      step: int32, how many updates there have been.
      masks: like the parameters, 1 where they exist.
      inner: state of the optimizer.
    """

    key: jax.Array
    step: jax.Array
    masks: Any
    inner: Any


def masked(
    key: jax.Array,
    optimizer: optax.GradientTransformation,
    method: Method,
    counts: dict[tuple[int, ...], int],
    *,
    until: int,
    every: int,
    fraction: float,
) -> optax.GradientTransformation:
    """Keeps all but a few weights of every matrix at 0.

    - "set" (Mocanu et al., arXiv 1707.04780): from time to time the smallest weights go, and as
      many come where chance wants them.
    - "rigl" (Evci et al., arXiv 1911.11134): they come where the gradient is largest.
    - "magnitude" (Zhu and Gupta, arXiv 1710.01878): all weights exist at first, and the smallest go
      step by step, until as many are left as should be.

    Args:
      key: a PRNG key; with the number of the step, it decides what is random.
      optimizer: for what exists.
      method: see above. Of the first two, weights that are not 0 at first are those that exist.
      counts: how many weights a matrix has in the end, by its shape.
      until: the step after which nothing comes or goes.
      every: steps from one change to the next.
      fraction: the part of the weights that goes at first; it decays to 0 like half a cosine.
    """

    def count(shape, time):
        """How many weights of a matrix exist at a part of the time."""
        final, size = counts[shape], shape[0] * shape[1]
        if method != "magnitude":
            return final
        return jnp.round(final + (size - final) * (1 - time) ** 3).astype(jnp.int32)

    def first_mask(param):
        if param.ndim < 2 or method == "magnitude":
            return jnp.ones_like(param)
        return jnp.where(param != 0, 1, 0).astype(param.dtype)

    def change(key, weight, gradient, mask, time):
        if weight.ndim < 2:
            return mask
        kept = count(weight.shape, time)
        if method != "magnitude":
            kept = kept - jnp.floor(fraction / 2 * (1 + jnp.cos(jnp.pi * time)) * kept)
        old = _largest(jnp.where(mask > 0, jnp.abs(weight), -1), kept)
        if method == "magnitude":
            return old.astype(mask.dtype)
        come = jax.random.uniform(key, mask.shape) if method == "set" else jnp.abs(gradient)
        new = _largest(jnp.where(mask > 0, -1, come), count(weight.shape, time) - kept)
        return (old | new).astype(mask.dtype)

    def init(params):
        masks = jax.tree.map(first_mask, params)
        return MaskState(jnp.copy(key), jnp.zeros((), jnp.int32), masks, optimizer.init(params))

    def update(updates, state, params):
        step, masks = state.step, state.masks
        leaves, structure = jax.tree.flatten(params)
        keys = jax.random.split(jax.random.fold_in(state.key, step), len(leaves))
        keys = jax.tree.unflatten(structure, list(keys))
        time = jnp.minimum(step / until, 1.0)
        due = (step > 0) & (step % every == 0) & (step <= until)
        existing = jax.tree.map(jnp.multiply, updates, masks)
        changes, inner = optimizer.update(existing, state.inner, params)
        masks = jax.lax.cond(
            due,
            lambda: jax.tree.map(lambda *leaf: change(*leaf, time), keys, params, updates, masks),
            lambda: masks,
        )
        # What has gone stays 0, and so do its moments: what comes starts at 0.
        changes = jax.tree.map(lambda c, p, m: m * (p + c) - p, changes, params, masks)
        inner = optax.tree_utils.tree_map_params(optimizer, jnp.multiply, inner, masks)
        return changes, MaskState(state.key, step + 1, masks, inner)

    return optax.GradientTransformation(init, update)


def _largest(scores: jax.Array, count: jax.Array | int) -> jax.Array:
    """Where the `count` largest of the scores are."""
    order = jnp.argsort(-scores.ravel())
    rank = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=order.dtype))
    return (rank < count).reshape(scores.shape)
