"""Settings of the whole suite: strict dtypes and ranks, so that a silent promotion is a failure."""

import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
