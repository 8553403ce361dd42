"""Settings of the whole suite: strict dtypes and ranks, so that a silent promotion is a failure,
eight host devices to shard over, and the same drawn examples in every run."""

import os

# Without it the CUDA plugin refuses to load where there is no GPU to compile for.
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

import hypothesis
import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 8)

hypothesis.settings.register_profile(
    "laws", max_examples=5, deadline=None, derandomize=True, database=None
)
hypothesis.settings.load_profile("laws")
