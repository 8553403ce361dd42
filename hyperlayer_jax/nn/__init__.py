"""Flax NNX modules on top of the functional API."""

from hyperlayer_jax.nn.glimpse import (
    GlimpseAttention,
    Glimpses,
    ReinforceGlimpses,
    SpatialTransformer,
    affine_means,
    bilinear,
    box_means,
    quad_means,
    reinforce_loss,
)
from hyperlayer_jax.nn.hyperlayer import FreeTuples, HyperLayer, SparseLinear
from hyperlayer_jax.nn.sort import SoftQuicksort

__all__ = [
    "FreeTuples",
    "GlimpseAttention",
    "Glimpses",
    "HyperLayer",
    "ReinforceGlimpses",
    "SoftQuicksort",
    "SparseLinear",
    "SpatialTransformer",
    "affine_means",
    "bilinear",
    "box_means",
    "quad_means",
    "reinforce_loss",
]
