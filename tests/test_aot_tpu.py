"""Every TPU kernel, forward and backward, compiled ahead of time for TPUs that are not there.

Interpret mode accepts what the compiler refuses: here it shows that a kernel exists. Serial, as one
process at a time may hold libtpu.
"""

import functools
import os

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import (
    AbstractDevice,
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    SingleDeviceSharding,
)

from hyperlayer_jax import kernels

pytest.importorskip("libtpu", reason="libtpu is not installed, it comes with the extra aot")

# The last shape of each fills what VMEM keeps: of the operands, or of their gradients.
PRODUCTS = [  # b, i, p, j, d
    (2, 5, 3, 7, 4, "float32"),
    (3, 784, 10, 10000, 64, "bfloat16"),
    (1, 1000, 33, 98304, 256, "float32"),
]
REDISTRIBUTE = [(2, 5, 3, 1), (64, 700, 33, 2), (1, 600000, 1000, 3)]  # b, m, k, r
BLOCK_ATTENTION = [  # b, t, p, block, d
    (2, 40, 3, 8, 64, "bfloat16"),
    (2, 2048, 40, 16, 128, "bfloat16"),
    (1, 4096, 16, 128, 128, "float32"),
    (2, 65536, 16, 64, 64, "bfloat16"),
]
TARGETS = ("v5e:2x2", "v6e:2x2")
targets = pytest.mark.parametrize("target", TARGETS)
array = jax.ShapeDtypeStruct


def shapes_on_targets(axes, shapes):
    """The last shape on both targets, of the others one on each in turn."""
    pairs = [
        (target, *shape)
        for n, shape in enumerate(shapes)
        for target in (TARGETS if n == len(shapes) - 1 else (TARGETS[1 - n % 2],))
    ]
    return pytest.mark.parametrize(f"target, {axes}", pairs)


@functools.cache
def devices(target):
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    return topologies.get_topology_desc(target, platform="tpu").devices


def count_kernels(target, name, positions, *floats, **sizes):
    """The kernels in the compiled value and gradients of an operation on these operands."""

    def run(positions, floats):
        operation = functools.partial(getattr(kernels, name), implementation="tpu", **sizes)
        out, vjp = jax.vjp(lambda floats: operation(**positions, **floats), floats)
        return out, vjp(out)

    device = devices(target)[0]
    sharding = SingleDeviceSharding(device)
    arguments = jax.tree.map(lambda x: x.update(sharding=sharding), (positions, *floats))
    chip = AbstractDevice(device_kind=device.device_kind, num_cores=1, platform="tpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=chip)):
        traced = jax.jit(run, out_shardings=sharding).trace(*arguments)
        compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    return compiled.as_text().count("tpu_custom_call")


@shapes_on_targets("b, i, p, j, d, dtype", PRODUCTS)
class TestProducts:
    """Row-wise products and their gradients are one kernel each, others are made of them."""

    def test_ell_spmm(self, target, b, i, p, j, d, dtype):
        positions = {"indices": array((b, i, p), jnp.int32)}
        floats = {"values": array((b, i, p), dtype), "dense": array((b, j, d), dtype)}
        assert count_kernels(target, "ell_spmm", positions, floats) == 3

    def test_ell_spmm_transposed(self, target, b, i, p, j, d, dtype):
        positions = {"indices": array((b, i, p), jnp.int32)}
        floats = {"values": array((b, i, p), dtype), "dense": array((b, i, d), dtype)}
        assert count_kernels(target, "ell_spmm_transposed", positions, floats, num_cols=j) == 3

    def test_ell_sddmm(self, target, b, i, p, j, d, dtype):
        positions = {"indices": array((b, i, p), jnp.int32)}
        floats = {"lhs": array((b, i, d), dtype), "rhs": array((b, j, d), dtype)}
        assert count_kernels(target, "ell_sddmm", positions, floats) == 3

    def test_spmm(self, target, b, i, p, j, d, dtype):
        positions = dict.fromkeys(("rows", "cols"), array((b, i * p), jnp.int32))
        floats = {"values": array((b, i * p), dtype), "dense": array((b, j, d), dtype)}
        assert count_kernels(target, "spmm", positions, floats, num_rows=i) == 6

    def test_sddmm(self, target, b, i, p, j, d, dtype):
        positions = dict.fromkeys(("rows", "cols"), array((b, i * p), jnp.int32))
        floats = {"lhs": array((b, i, d), dtype), "rhs": array((b, j, d), dtype)}
        assert count_kernels(target, "sddmm", positions, floats) == 6

    def test_gathered_attention(self, target, b, i, p, j, d, dtype):
        positions = {"indices": array((b, i, p), jnp.int32)}
        floats = dict.fromkeys(("k", "v"), array((b, j, d), dtype))
        floats |= {"q": array((b, i, d), dtype), "log_weights": array((b, i, p), jnp.float32)}
        assert count_kernels(target, "gathered_attention", positions, floats) == 7


@shapes_on_targets("b, m, k, r", REDISTRIBUTE)
def test_redistribute(target, b, m, k, r):
    positions = {"points": array((b, m, r), jnp.int32), "where": array((b, m), jnp.bool_)}
    floats = dict.fromkeys(("means", "sigmas"), array((b, k, r), jnp.float32))
    floats |= {"values": array((b, k), jnp.float32)}
    assert count_kernels(target, "redistribute", positions, floats) == 2


@shapes_on_targets("b, t, p, block, d, dtype", BLOCK_ATTENTION)
def test_block_attention(target, b, t, p, block, d, dtype):
    positions = {"block_indices": array((b, t // block, p), jnp.int32)}
    floats = dict.fromkeys("qkv", array((b, t, d), dtype))
    floats |= {"log_weights": array((b, t // block, p), jnp.float32)}
    sizes = {"block": block, "causal": block != 16}
    assert count_kernels(target, "block_attention", positions, floats, **sizes) == 2


@targets
def test_shard_map_checks_what_varies(target):
    """A kernel on each of four chips, over shards of the batch; the gradient of what they share."""
    mesh = Mesh(devices(target), ("data",), axis_types=(AxisType.Auto,))
    split, shared = PartitionSpec("data"), PartitionSpec()

    def run(indices, values, dense):
        def loss(dense):
            def product(indices, values):
                return kernels.ell_spmm(indices, values, dense, implementation="tpu")

            return (jax.vmap(product)(indices, values) ** 2).sum()

        return jax.grad(loss)(dense)

    sharded = jax.shard_map(run, mesh=mesh, in_specs=(split, split, shared), out_specs=shared)
    arguments = (
        array((8, 50, 3), jnp.int32, sharding=NamedSharding(mesh, split)),
        array((8, 50, 3), jnp.float32, sharding=NamedSharding(mesh, split)),
        array((40, 16), jnp.float32, sharding=NamedSharding(mesh, shared)),
    )
    compiled = jax.jit(sharded).trace(*arguments).lower(lowering_platforms=("tpu",)).compile()
    text = compiled.as_text()
    assert text.count("tpu_custom_call") == 2 and text.count("all-reduce(") == 1
