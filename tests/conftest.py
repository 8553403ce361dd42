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
hypothesis.settings.register_profile(
    "quick", hypothesis.settings.get_profile("laws"), max_examples=1
)
hypothesis.settings.load_profile("laws")

# In the quick part: more cases of what a new version of jax may break in ways of its own, and none
# of what runs programs or trains for long. Of all other tests one case.
_QUICK_CASES = {
    "test_derivatives.py": 4,
    "test_meshes.py": 4,
    **dict.fromkeys(
        [
            "test_docs.py",
            "test_launcher.py",
            "test_loop.py",
            "test_train_sort.py",
            "test_train_transformer.py",
            "test_benchmarks.py",
            "test_kernels_mosaic_gpu.py",
        ],
        0,
    ),
}


def pytest_addoption(parser):
    parser.addoption(
        "--quick",
        action="store_true",
        help="leave out slow tests, and run one case of most other tests",
    )


def pytest_configure(config):
    if config.getoption("--quick"):
        hypothesis.settings.load_profile("quick")


def pytest_make_parametrize_id(val, argname):
    """Processes that share a run have to give a test the same name: bytes may hold the time."""
    if isinstance(val, bytes):
        raise pytest.UsageError(f"{argname}: bytes name no test, want an id")


def _needs_a_cpu(item):
    """Why a test can only run where no accelerator is; empty where it can run on one."""
    if item.path.name.startswith("test_aot"):
        return "compiles for what is not there"
    values = item.callspec.params.values() if hasattr(item, "callspec") else ()
    forced = any(isinstance(value, str) and value == "tpu" for value in values)
    return "interprets TPU kernels" if forced or item.path.name == "test_tpu.py" else ""


def pytest_collection_modifyitems(config, items):
    if unstable := [item.nodeid for item in items if " at 0x" in item.nodeid]:
        raise pytest.UsageError(f"names of tests hold addresses: {', '.join(unstable)}")
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
    for (path, _), all_of_one in cases.items():
        wanted = min(len(all_of_one), _QUICK_CASES.get(path.name, 1))
        kept.update(all_of_one[len(all_of_one) * n // wanted] for n in range(wanted))
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]
