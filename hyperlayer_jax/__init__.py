"""Learned sparse transformations in JAX (P. Bloem, arXiv 1810.09184)."""
