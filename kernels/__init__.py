"""Sparse products on raw arrays, with one meaning in plain JAX and faster kernels where proven."""

from .api import ell_sddmm, ell_spmm, ell_spmm_transposed, sddmm, spmm

__all__ = ["ell_sddmm", "ell_spmm", "ell_spmm_transposed", "sddmm", "spmm"]
