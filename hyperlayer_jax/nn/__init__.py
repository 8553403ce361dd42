"""Flax NNX modules on top of the functional API."""

from hyperlayer_jax.nn.hyperlayer import FreeTuples, HyperLayer, SparseLinear
from hyperlayer_jax.nn.sort import SoftQuicksort

__all__ = ["FreeTuples", "HyperLayer", "SoftQuicksort", "SparseLinear"]
