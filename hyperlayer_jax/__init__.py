"""Learned sparse transformations in JAX: the adaptive sparse hyperlayer.

P. Bloem, "Learning sparse transformations through backpropagation", arXiv 1810.09184.
"""

from hyperlayer_jax.attention import sparse_attention
from hyperlayer_jax.content import InOrder, content_points, nearest_keys
from hyperlayer_jax.density import duplicate_mask, redistribute
from hyperlayer_jax.grids import affine_means, bilinear, box_means, quad_means
from hyperlayer_jax.hyperlayer import apply_template, discretize, round_tuples
from hyperlayer_jax.ranks import (
    TopK,
    soft_argsort,
    soft_quantile,
    soft_rank,
    soft_sort,
    soft_top_k,
)
from hyperlayer_jax.sampling import sample_indices
from hyperlayer_jax.sort import SoftPermutation, SoftSort, bucket_starts, soft_quicksort
from hyperlayer_jax.tensors import contract, sparse_softmax, todense, transpose
from hyperlayer_jax.transforms import transform_means, transform_sigmas
from hyperlayer_jax.types import IndexTuples, RowSparseTensor, SparseTensor

__version__ = "0.2.0"

__all__ = [
    "InOrder",
    "IndexTuples",
    "RowSparseTensor",
    "SoftPermutation",
    "SoftSort",
    "SparseTensor",
    "TopK",
    "affine_means",
    "apply_template",
    "bilinear",
    "box_means",
    "bucket_starts",
    "content_points",
    "contract",
    "discretize",
    "duplicate_mask",
    "nearest_keys",
    "quad_means",
    "redistribute",
    "round_tuples",
    "sample_indices",
    "soft_argsort",
    "soft_quantile",
    "soft_quicksort",
    "soft_rank",
    "soft_sort",
    "soft_top_k",
    "sparse_attention",
    "sparse_softmax",
    "todense",
    "transform_means",
    "transform_sigmas",
    "transpose",
]
