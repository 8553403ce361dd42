"""Sparse operations on raw arrays: one meaning in plain JAX, faster kernels where proven."""

from .api import (
    block_attention,
    ell_sddmm,
    ell_spmm,
    ell_spmm_transposed,
    gathered_attention,
    redistribute,
    sddmm,
    spmm,
)

__all__ = [
    "block_attention",
    "ell_sddmm",
    "ell_spmm",
    "ell_spmm_transposed",
    "gathered_attention",
    "redistribute",
    "sddmm",
    "spmm",
]
