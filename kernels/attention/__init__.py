"""Attention over the entries of a sparse matrix, of single keys or of blocks of them."""

from .api import block_attention, gathered_attention

__all__ = ["block_attention", "gathered_attention"]
