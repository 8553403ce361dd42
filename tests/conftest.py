"""Settings of the whole suite: strict dtypes and ranks, so that a silent promotion is a failure."""

import os

# Without it the CUDA plugin refuses to load where there is no GPU to compile for.
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
