"""Sparse operations on raw arrays: one meaning in plain JAX, faster kernels where proven."""

from .attention import block_attention, gathered_attention
from .dispatch import implementations, serving
from .numerics import accumulator, in_bounds, materialize
from .products import ell_sddmm, ell_spmm, ell_spmm_transposed, row_max, sddmm, spmm
from .redistribution import duplicate_mask, materialize_points, redistribute

__all__ = [
    "accumulator",
    "block_attention",
    "duplicate_mask",
    "ell_sddmm",
    "ell_spmm",
    "ell_spmm_transposed",
    "gathered_attention",
    "implementations",
    "in_bounds",
    "materialize",
    "materialize_points",
    "redistribute",
    "row_max",
    "sddmm",
    "serving",
    "spmm",
]
