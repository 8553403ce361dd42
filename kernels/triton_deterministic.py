"""`triton` with scatters in a fixed order: the same bits every time, for the price of a sort."""

import functools

from . import triton
from .triton import (
    ell_sddmm,
    ell_spmm,
    gathered_attention,
    lacks,
    redistribute,
    redistribute_grad,
    sddmm,
)

__all__ = [
    "ell_sddmm",
    "ell_spmm",
    "ell_spmm_transposed",
    "gathered_attention",
    "gathered_attention_grad",
    "lacks",
    "redistribute",
    "redistribute_grad",
    "sddmm",
    "spmm",
]

ell_spmm_transposed = functools.partial(triton.ell_spmm_transposed, deterministic=True)
gathered_attention_grad = functools.partial(triton.gathered_attention_grad, deterministic=True)
spmm = functools.partial(triton.spmm, deterministic=True)
