"""Settings of the whole suite: strict dtypes and ranks, so that a silent promotion is a failure,
eight host devices to shard over, the same drawn examples in every run, and, where jax is that of
Python 3.11, quick compilation, since nearly all of the suite's time is XLA's. The newest jax
compiles as it does for users."""

import importlib.metadata
import os

if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):
    quick = (
        "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
        "--xla_cpu_parallel_codegen_split_count=1 --xla_cpu_use_fusion_emitters=false"
    )
    os.environ["XLA_FLAGS"] = f"{quick} {os.environ.get('XLA_FLAGS', '')}"

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
