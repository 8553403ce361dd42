"""Every GPU kernel, forward and backward, compiled for an H200 that need not be there.

A kernel that the interpreter accepts may use what the hardware lacks, or more shared memory than it
has; the compiler says so. Needs the extra `aot`: `pytest -k aot`.
"""

import functools
import pathlib
import re

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
# Members of the batch, queries, keys, entries, features of keys and of values.
GATHERED = {
    "ragged": ((2, 3), jnp.float32, 5, 7, 3, 1, 9),
    "usual": ((64,), jnp.bfloat16, 784, 10000, 10, 64, 64),
    "large": ((), jnp.float32, 4096, 4096, 64, 256, 200),
}
# Members of the batch, queries, keys, features, features of values; block, entries, whether causal
# and masked.
BLOCKS = {
    "one tile to a block": (2, 512, 1024, 64, 64, 64, 3, False, False),
    "four tiles to a block": (1, 512, 512, 128, 128, 128, 2, True, False),
    "long": (8, 65536, 65536, 64, 128, 64, 16, True, False),
    "masked": (8, 4096, 4096, 128, 64, 64, 16, True, True),
}
# What a device launches nothing for.
FREE = ("parameter", "constant", "get-tuple-element", "tuple", "bitcast")


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
    """A function and its gradients for the device: lowered, and compiled.

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
    return lowered, lowered.compile()


def launches(compiled):
    """The operations of a compiled program that a device runs, those of a sort as one."""
    program = re.search(r"^ENTRY .*?^}", compiled.as_text(), re.MULTILINE | re.DOTALL)[0]
    lines = program.splitlines()[1:-1]
    kinds = [re.match(r"\s*(?:ROOT )?\S+ = (?:\(.*?\)|\S+) ([\w-]+)\(", x)[1] for x in lines]
    assert "while" not in kinds
    return [kind for kind in kinds if kind not in FREE]


def gathered_case(batch, dtype, t, s, p, d, e):
    """(function of positions and floats, (positions, floats)) of gathered attention on Triton."""

    def array(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct((*batch, *shape), dtype)

    def function(positions, floats):
        *qkv, log_weights = floats
        return kernels.gathered_attention(*qkv, *positions, log_weights, implementation="triton")

    floats = array(t, d), array(s, d), array(s, e), array(t, p, dtype=jnp.float32)
    return function, ((array(t, p, dtype=jnp.int32),), floats)


@pytest.mark.parametrize("size", GATHERED)
def test_triton(device, size):
    assert "triton" in compile_for(device, *gathered_case(*GATHERED[size]))[0].as_text()


def test_triton_under_shard_map(device):
    function, operands = gathered_case(*GATHERED["ragged"])
    sharded = jax.shard_map(
        function,
        mesh=Mesh(np.array([device]), "data"),
        in_specs=PartitionSpec("data"),
        out_specs=PartitionSpec("data"),
    )
    lowered, _ = compile_for(device, sharded, operands, PartitionSpec("data"))
    assert "triton" in lowered.as_text()


@pytest.mark.parametrize("shape", BLOCKS)
def test_mosaic_gpu(device, shape):
    b, t, s, d, e, block, p, causal, masked = BLOCKS[shape]

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct((b, *shape), dtype)

    def function(positions, floats):
        (indices, *mask), (*qkv, log_weights) = positions, floats
        return kernels.block_attention(
            *qkv,
            indices,
            log_weights,
            block=block,
            causal=causal,
            scale=d**-0.5,
            mask=mask[0] if mask else None,
            implementation="mosaic_gpu",
        )

    rows = t // block
    positions = [array(rows, p, dtype=jnp.int32), *[array(s, dtype=jnp.bool_)] * masked]
    floats = array(t, d), array(s, d), array(s, e), array(rows, p, dtype=jnp.float32)
    _, compiled = compile_for(device, function, (positions, floats))
    kinds = launches(compiled)
    # The three kernels; what scales the query, makes the lists, and sums up around them.
    assert kinds.count("custom-call") == 3
    assert len(kinds) <= (13 if not masked else 15)
