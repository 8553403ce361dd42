"""Settings of the whole suite: strict dtypes and ranks, so that a silent promotion is a failure,
eight host devices to shard over, the same drawn examples in every run, and, where jax is that of
Python 3.11, quick compilation, since nearly all of the suite's time is XLA's. The newest jax
compiles as it does for users."""

import collections
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
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 8)
if jax.default_backend() == "gpu":
    # By default a GPU rounds the operands of float32 products to 10 bits.
    jax.config.update("jax_default_matmul_precision", "highest")

hypothesis.settings.register_profile(
    "laws", max_examples=5, deadline=None, derandomize=True, database=None
)
hypothesis.settings.load_profile("laws")

_QUICK_CASES = 2


def pytest_addoption(parser):
    parser.addoption(
        "--quick",
        action="store_true",
        help=f"leave out slow tests, and run {_QUICK_CASES} cases of each other test at most",
    )


def _needs_a_cpu(item):
    """Why a test can only run where no accelerator is; empty where it can run on one."""
    if item.path.name.startswith("test_aot"):
        return "compiles for what is not there"
    values = item.callspec.params.values() if hasattr(item, "callspec") else ()
    forced = any(isinstance(value, str) and value == "tpu" for value in values)
    return "interprets TPU kernels" if forced or item.path.name == "test_tpu.py" else ""


def pytest_collection_modifyitems(config, items):
    if jax.default_backend() != "cpu":
        for item in items:
            if reason := _needs_a_cpu(item):
                item.add_marker(pytest.mark.skip(reason=f"needs a CPU: {reason}"))
    if not config.getoption("--quick"):
        return
    cases = collections.defaultdict(list)
    for item in items:
        if not item.get_closest_marker("slow"):
            cases[item.path, item.originalname].append(item)
    kept = set()
    for all_of_one in cases.values():
        step = max(1, (len(all_of_one) - 1) / (_QUICK_CASES - 1))
        spread = (round(n * step) for n in range(_QUICK_CASES))
        kept.update(all_of_one[n] for n in spread if n < len(all_of_one))
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]
