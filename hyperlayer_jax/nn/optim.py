"""What stands behind an optimizer where positions are learned."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from hyperlayer_jax.nn.positions import PositionParam


def shorten_steps(model: nnx.Module) -> Callable[[Any, Any], Any]:
    """Keeps found positions of a model's attention where they are, also with long steps.

    To stand behind an optimizer like Adam, as `optax.stateless(shorten_steps(model))`. Steps of
    Adam are equally long, in parts of the space, all along: they throw a mean whose sigma has
    become small off its place, and the farther the longer the space is. So a distance moves by no
    more than three of its sigmas per unit of step size. Nor does a sigma: one that shrinks faster
    than its distance can follow leaves it behind, out of reach of where it was going. Networks of
    positions take steps a tenth as long: what they say of single tokens is noise while the distance
    that tokens share is not found (docs/offset.md). `learned2d`, which has no distances, is left as
    it is.

    Args:
      model: the module that is optimized, or one like it.

    Returns:
      A function of the updates and the values of all parameters of the model, trees of any
      structure with the leaves of `nnx.state(model, nnx.Param)`, that returns the updates with
      those of distances and networks made shorter. It raises a ValueError where the leaves are
      others.
    """
    params = nnx.to_flat_state(jax.eval_shape(lambda: nnx.state(model, nnx.Param))).leaves
    wanted = [param.shape for param in params]

    def shorten(updates, values):
        leaves, structure = jax.tree.flatten(updates)
        shapes = [leaf.shape for leaf in leaves]
        if shapes != wanted:
            raise ValueError(
                f"updates: got leaves of shapes {shapes}, want those of the model, {wanted}"
            )
        shortened = [
            update * param.step_factors(value) if isinstance(param, PositionParam) else update
            for param, update, value in zip(params, leaves, jax.tree.leaves(values), strict=True)
        ]
        return structure.unflatten(shortened)

    return shorten
