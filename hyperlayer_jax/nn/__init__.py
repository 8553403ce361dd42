"""Flax NNX modules on top of the functional API."""

from hyperlayer_jax.nn.attention import AttentionCache, SparseSelfAttention
from hyperlayer_jax.nn.conv import SparseConv
from hyperlayer_jax.nn.exploring import explore
from hyperlayer_jax.nn.finding import FindingGlimpses, average, mixture
from hyperlayer_jax.nn.glimpse import GlimpseAttention, Glimpses
from hyperlayer_jax.nn.glimpse_baselines import (
    ReinforceGlimpses,
    SpatialTransformer,
    reinforce_loss,
)
from hyperlayer_jax.nn.hyperlayer import HyperLayer
from hyperlayer_jax.nn.hypernetworks import AdaptiveTuples
from hyperlayer_jax.nn.jumping import jump, jumps, weakest
from hyperlayer_jax.nn.optim import shorten_steps
from hyperlayer_jax.nn.sampler import Sampler
from hyperlayer_jax.nn.sort import SoftQuicksort
from hyperlayer_jax.nn.sparse import SparseLinear
from hyperlayer_jax.nn.tiles import TiledImages
from hyperlayer_jax.nn.transformer import TransformerLM, generate
from hyperlayer_jax.nn.tuples import FixedTuples, FreeTuples, PlacedTuples, freeze

__all__ = [
    "AdaptiveTuples",
    "AttentionCache",
    "FindingGlimpses",
    "FixedTuples",
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
    "TiledImages",
    "TransformerLM",
    "average",
    "explore",
    "freeze",
    "generate",
    "jump",
    "jumps",
    "mixture",
    "reinforce_loss",
    "shorten_steps",
    "weakest",
]
