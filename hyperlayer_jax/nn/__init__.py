"""Flax NNX modules on top of the functional API."""

from hyperlayer_jax.nn.attention import AttentionCache, SparseSelfAttention
from hyperlayer_jax.nn.conv import SparseConv
from hyperlayer_jax.nn.finding import FindingGlimpses, average, mixture
from hyperlayer_jax.nn.glimpse import GlimpseAttention, Glimpses
from hyperlayer_jax.nn.glimpse_baselines import (
    ReinforceGlimpses,
    SpatialTransformer,
    reinforce_loss,
)
from hyperlayer_jax.nn.hyperlayer import HyperLayer
from hyperlayer_jax.nn.jumping import PlacedTuples, explore, jump, jumps, weakest
from hyperlayer_jax.nn.positions import shorten_steps
from hyperlayer_jax.nn.sampler import Sampler
from hyperlayer_jax.nn.sort import SoftQuicksort
from hyperlayer_jax.nn.sparse import FreeTuples, SparseLinear
from hyperlayer_jax.nn.transformer import TransformerLM, generate

__all__ = [
    "AttentionCache",
    "FindingGlimpses",
    "FreeTuples",
    "GlimpseAttention",
    "Glimpses",
    "HyperLayer",
    "PlacedTuples",
    "ReinforceGlimpses",
    "Sampler",
    "SoftQuicksort",
    "SparseConv",
    "SparseLinear",
    "SparseSelfAttention",
    "SpatialTransformer",
    "TransformerLM",
    "average",
    "explore",
    "generate",
    "jump",
    "jumps",
    "mixture",
    "reinforce_loss",
    "shorten_steps",
    "weakest",
]
