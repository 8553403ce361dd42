"""Linear layers of tokens."""

import math
from typing import Any

import jax
from flax import nnx

from hyperlayer_jax.lift import spec_of


class TokenLinear(nnx.Linear):
    """`nnx.Linear` that multiplies all tokens as the rows of one matrix.

    The gradient of its kernel is then one product of two matrices as they are, and nothing is
    transposed for it. On a mesh tokens stay as they are: they may be divided along several axes.
    """

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Maps float [*B, in_features] to [*B, out_features], sharded as `nnx.Linear` would."""
        on_mesh = not jax.sharding.get_abstract_mesh().empty
        if out_sharding is not None or on_mesh or any(spec_of(inputs)):
            return super().__call__(inputs, out_sharding)
        rows = super().__call__(inputs.reshape(math.prod(inputs.shape[:-1]), self.in_features))
        return rows.reshape(*inputs.shape[:-1], self.out_features)
