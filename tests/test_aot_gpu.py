"""Every GPU kernel, forward and backward, compiled for an H200 that need not be there.

A kernel that the interpreter accepts may use what the hardware lacks, or more shared memory than it
has; the compiler says so. Needs the extra `aot`: `pytest -k aot`.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import (
    AbstractDevice,
    AbstractMesh,
    Mesh,
    NamedSharding,
    PartitionSpec,
    SingleDeviceSharding,
)

from hyperlayer_jax import kernels

pytestmark = pytest.mark.slow

TARGET = pathlib.Path(__file__).with_name("h200.txtpb")
GATHERS = (
    "ell_spmm",
    "ell_spmm_transposed",
    "ell_sddmm",
    "spmm",
    "sddmm",
    "redistribute",
    "gathered_attention",
)
# Rows, columns, entries, features and so on, by the letters of the public functions.
SIZES = {
    "ragged": (
        (2, 3),
        jnp.float32,
        {"i": 5, "j": 7, "p": 3, "n": 11, "d": 1, "e": 9, "m": 13, "k": 5, "r": 1},
    ),
    "usual": (
        (64,),
        jnp.bfloat16,
        {"i": 784, "j": 10000, "p": 10, "n": 7840, "d": 64, "e": 64, "m": 64, "k": 8, "r": 2},
    ),
    "large": (
        (),
        jnp.float32,
        {"i": 4096, "j": 4096, "p": 64, "n": 9999, "d": 256, "e": 200, "m": 5000, "k": 999, "r": 3},
    ),
}
# Members of the batch, queries, keys, features, features of values; block, entries, and whether
# causal.
BLOCKS = {
    "one tile to a block": (2, 512, 1024, 64, 64, 64, 3, False),
    "four tiles to a block": (1, 512, 512, 128, 128, 128, 2, True),
    "long": (8, 65536, 65536, 64, 128, 64, 16, True),
}


@pytest.fixture(scope="module")
def device():
    """A description of the device that compilers accept in its place."""
    try:
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=TARGET.read_text(), topology="1x1x1"
        )
    except NotImplementedError:
        pytest.skip("jax has no CUDA plugin here: install the extra `aot`")
    return topology.devices[0]


def compile_for(device, function, operands, spec=None):
    """Compiles a function and its gradients for the device; returns the program in StableHLO.

    `function` takes positions and floats, tuples of arrays; only floats have gradients. With a
    `spec`, operands are laid out so over the mesh axis "data".
    """
    sharding = SingleDeviceSharding(device)
    if spec is not None:
        sharding = NamedSharding(Mesh(np.array([device]), "data"), spec)

    def value_and_vjp(positions, floats):
        out, vjp = jax.vjp(functools.partial(function, positions), floats)
        return out, vjp(out)

    operands = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), operands
    )
    abstract = AbstractDevice(device_kind=device.device_kind, num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=abstract)):
        traced = jax.jit(value_and_vjp).trace(*operands)
        lowered = traced.lower(lowering_platforms=("cuda",))
    lowered.compile()
    return lowered.as_text()


def gather_case(name, batch, dtype, sizes):
    """(function of positions and floats, (positions, floats)) of one operation."""

    def array(axes, dtype=dtype):
        return jax.ShapeDtypeStruct((*batch, *(sizes[axis] for axis in axes)), dtype)

    indices, entries = array("ip", jnp.int32), array("n", jnp.int32)
    static = {"ell_spmm_transposed": {"num_cols": sizes["j"]}, "spmm": {"num_rows": sizes["i"]}}
    positions, floats = {
        "ell_spmm": ((indices,), (array("ip"), array("jd"))),
        "ell_spmm_transposed": ((indices,), (array("ip"), array("id"))),
        "ell_sddmm": ((indices,), (array("id"), array("jd"))),
        "spmm": ((entries, entries), (array("n"), array("jd"))),
        "sddmm": ((entries, entries), (array("id"), array("jd"))),
        "redistribute": (
            (array("mr", jnp.int32), array("m", jnp.bool)),
            (array("kr"), array("kr"), array("k")),
        ),
        "gathered_attention": ((indices,), (array("id"), array("jd"), array("je"), array("ip"))),
    }[name]

    def function(implementation, positions, floats):
        options = {"implementation": implementation, **static.get(name, {})}
        operation = getattr(kernels, name)
        if name == "redistribute":
            points, where = positions
            return operation(points, *floats, where, **options)
        if name == "gathered_attention":
            *qkv, log_weights = floats
            return operation(*qkv, *positions, log_weights, **options)
        return operation(*positions, *floats, **options)

    return function, (positions, floats)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", GATHERS)
def test_triton(device, name, size):
    function, operands = gather_case(name, *SIZES[size])
    program = compile_for(device, functools.partial(function, "triton"), operands)
    assert "triton" in program


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["ell_spmm", "spmm", "gathered_attention"])
def test_triton_deterministic(device, name, size):
    function, operands = gather_case(name, *SIZES[size])
    program = compile_for(device, functools.partial(function, "triton_deterministic"), operands)
    assert "sum_rows_kernel" in program
    assert "scatter_kernel" not in program


def test_triton_reaches_the_last_int32_column(device):
    sizes = {"i": 8, "j": 2**31 - 1, "p": 4, "d": 1, "n": 1, "e": 1, "m": 1, "k": 1, "r": 1}
    function, operands = gather_case("ell_spmm", (), jnp.float32, sizes)
    compile_for(device, functools.partial(function, "triton"), operands)


@pytest.mark.parametrize("name", ["ell_spmm", "gathered_attention"])
def test_triton_under_shard_map(device, name):
    function, operands = gather_case(name, *SIZES["usual"])
    sharded = jax.shard_map(
        functools.partial(function, "triton"),
        mesh=Mesh(np.array([device]), "data"),
        in_specs=PartitionSpec("data"),
        out_specs=PartitionSpec("data"),
    )
    assert "triton" in compile_for(device, sharded, operands, PartitionSpec("data"))


@pytest.mark.parametrize("shape", BLOCKS)
def test_mosaic_gpu(device, shape):
    b, t, s, d, e, block, p, causal = BLOCKS[shape]

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct((b, *shape), dtype)

    def function(positions, floats):
        q, k, v, log_weights = floats
        return kernels.block_attention(
            q,
            k,
            v,
            *positions,
            log_weights,
            block=block,
            causal=causal,
            implementation="mosaic_gpu",
        )

    rows = t // block
    floats = array(t, d), array(s, d), array(s, e), array(rows, p)
    program = compile_for(device, function, ((array(rows, p, dtype=jnp.int32),), floats))
    assert program.count("mosaic_gpu") >= 3
