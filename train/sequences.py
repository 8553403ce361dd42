"""Attention whose tokens are divided over the devices of `--mesh=seq:N`."""

import jax

from hyperlayer_jax.nn import SparseSelfAttention
from hyperlayer_jax.nn.pattern import Tokens
from train import devices


class DividedAttention(SparseSelfAttention):
    """Every device has the queries of its own tokens, and the keys and values of all.

    On one device, and on a mesh without `seq`, it is a `SparseSelfAttention`. Points are drawn
    alike on any mesh.
    """

    def _tokens(self, x: jax.Array, *rest) -> Tokens:
        tokens = super()._tokens(x, *rest)
        key, value = devices.gather_sequences((tokens.key, tokens.value))
        query = devices.shard_sequences(tokens.query)
        return tokens._replace(query=query, key=key, value=value)
