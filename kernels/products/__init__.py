"""Products of a sparse matrix and dense ones, in two layouts, ELL and COO."""

from .api import ell_sddmm, ell_spmm, ell_spmm_transposed, row_max, sddmm, spmm

__all__ = ["ell_sddmm", "ell_spmm", "ell_spmm_transposed", "row_max", "sddmm", "spmm"]
