"""Mosaic GPU: ELL products on Hopper (sm_90), by a TMA copy for each row that an entry selects.

A warpgroup owns 64 rows of the sparse matrix and walks their entries: the 64 rows of the dense
operand that entry q of each selects come to shared memory while those of entry q - 1 are summed.
In registers a row belongs to one warp, each of whose lanes holds 4 bytes of every 128, so that
banks do not conflict; sums are float32, in the order of the entries.

What bytes say, for 256 matrices of 784 rows with 10 entries in 10 000 columns, and 64 features in
float32, on an H200 (4.8 TB/s). A row of entries selects 5430 different rows of 256 bytes, 356 MB in
all; the other dense operand or result has 51 MB, positions and values 16 MB:

                         bytes     floor      gather + einsum, measured
    ell_spmm             423 MB    .088 ms    .103 ms
    ell_sddmm            423 MB    .088 ms    .293 ms (in slices of 8 features .133)
    ell_spmm_transposed  1.4 GB    .29 ms     .485 ms, of which .194 clear the result

So the gradient of values, `ell_sddmm`, is what a kernel can win; the value cannot be more than 15%
faster. The TMA unit is asked for 16 000 rows on each multiprocessor, one in 10 cycles at the floor,
and the compiled loop issues about 9 instructions a row on each of its schedulers: near that limit
at 64 features, half of it at 128. None of this has been timed, and nothing takes these kernels by
default. The transposed product is plain JAX: TMA can add rows to memory, but in any order, as a
scatter does, and no interpreter of this knows it.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu.fragmented_array import Tiling
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..numerics import in_bounds
from . import reference

_TILE, _WARPS, _LANES = 64, 4, 32
_STAGES = 2
# Copies that are issued in a row.
_UNROLL = 8
# Bytes that the address of a copy is a multiple of, and that a block may have of shared memory.
_ALIGNMENT, _SHARED = 128, 220 * 2**10
_MAX_FEATURES = 128
_MAX_BATCH = 65535
_CAPABILITY = "9.0"


def lacks(operation, indices, *operands, **sizes):
    """Why `operation` cannot be served on these operands, in words; "" where it can."""
    del sizes
    (b, _, p), dense, device = indices.shape, operands[-1], jax.devices()[0]
    row = dense.shape[2] * dense.dtype.itemsize
    shared = _TILE * ((_STAGES + 1) * row + 2 * 4 * p)
    reasons = {
        f"it needs compute capability {_CAPABILITY}": (
            device.platform == "gpu" and device.compute_capability != _CAPABILITY
        ),
        f"it sums bfloat16 and float32, got {dense.dtype}": (
            dense.dtype not in (jnp.bfloat16, jnp.float32)
        ),
        f"it copies rows of a multiple of {_ALIGNMENT} bytes, got {row}": row % _ALIGNMENT,
        f"it holds at most {_MAX_FEATURES} features, got {dense.shape[2]}": (
            dense.shape[2] > _MAX_FEATURES
        ),
        f"p = {p} needs {shared} bytes of shared memory, of {_SHARED}": shared > _SHARED,
        f"its grid holds a batch of at most {_MAX_BATCH}, got {b}": (
            isinstance(b, int) and b > _MAX_BATCH
        ),
    }
    return "" if operation == "ell_spmm_transposed" else next(filter(reasons.get, reasons), "")


def ell_spmm(indices, values, dense, *, interpret):
    """out[i] = sum over q of values[i, q] dense[indices[i, q]]."""
    del interpret
    (b, i, p), d = indices.shape, dense.shape[2]
    return _call(
        _spmm_kernel,
        indices,
        _columns(values.astype(jnp.float32)),
        dense,
        out_shape=(b, i, d),
        own=plgpu.SMEM((p, _TILE), jnp.float32),
        result=plgpu.SMEM((_TILE, d), dense.dtype),
    )


def ell_sddmm(indices, lhs, rhs, *, interpret):
    """out[i, q] = lhs[i] . rhs[indices[i, q]]."""
    del interpret
    (b, i, p), d = indices.shape, rhs.shape[2]
    out = _call(
        _sddmm_kernel,
        indices,
        lhs,
        rhs,
        out_shape=(b, p, pl.cdiv(i, _TILE) * _TILE),
        own=plgpu.SMEM((_TILE, d), lhs.dtype),
        result=plgpu.SMEM((p, _TILE), jnp.float32),
    )
    out = jnp.swapaxes(out, 1, 2)[:, :i]
    return jnp.where(in_bounds(indices, rhs.shape[1]), out, 0).astype(rhs.dtype)


def ell_spmm_transposed(indices, values, dense, *, num_cols, interpret):
    """out[j] = sum of values[i, q] dense[i] over the entries with indices[i, q] = j."""
    del interpret
    return reference.ell_spmm_transposed(indices, values, dense, num_cols=num_cols)


def _columns(x):
    """[b,i,p] as [b,p,i], zeros up to a multiple of the tile."""
    return jnp.swapaxes(jnp.pad(x, [(0, 0), (0, -x.shape[1] % _TILE), (0, 0)]), 1, 2)


def _call(kernel, indices, operand, dense, *, out_shape, own, result):
    """`kernel` for each tile of rows of each member of the batch.

    The kernel gets refs of the numbers of all entries [b,p,i], `operand` and the result; buffers of
    its own part of each; the barrier of those that it loads; and `gather`, which is `_gather`.
    """
    b, i, p = indices.shape
    # One more than the index: 0 is absent, and so is what `_columns` appends.
    present = in_bounds(indices, dense.shape[1])
    numbers = _columns(jnp.where(present, indices + 1, 0))

    def run(numbers_ref, operand_ref, dense_ref, out_ref, numbers, own, loaded, rows, arrived, out):
        gather = functools.partial(_gather, numbers, dense_ref, rows, arrived)
        kernel(numbers_ref, operand_ref, out_ref, numbers, own, out, loaded, gather)
        plgpu.wait_smem_to_gmem(0)

    run.__name__ = kernel.__name__.strip("_")
    varying = jax.typeof(dense).manual_axis_type
    return plgpu.kernel(
        run,
        out_type=jax.ShapeDtypeStruct(out_shape, result.dtype, manual_axis_type=varying),
        scratch_types=[
            plgpu.SMEM((p, _TILE), jnp.int32),
            own,
            plgpu.Barrier(num_arrivals=2),
            plgpu.SMEM((_STAGES, _TILE, dense.shape[2]), dense.dtype),
            plgpu.Barrier(num_arrivals=_TILE, num_barriers=_STAGES),
            result,
        ],
        grid=(pl.cdiv(i, _TILE), b),
        grid_names=("row", "batch"),
        compiler_params=plgpu.CompilerParams(),
    )(numbers, operand, dense)


def _own_rows(ref):
    """The part of this program of an array [b,i,d]; beyond its end are zeros."""
    return ref.at[lax.axis_index("batch"), pl.ds(lax.axis_index("row") * _TILE, _TILE)]


def _own_columns(ref):
    """The same of an array [b,p,i]."""
    return ref.at[lax.axis_index("batch"), :, pl.ds(lax.axis_index("row") * _TILE, _TILE)]


def _layout(dtype):
    """Of [64,d] in registers: a row in one warp, each 128 bytes of it across the lanes."""
    width = 4 // jnp.dtype(dtype).itemsize
    tiling = Tiling(((_WARPS, _LANES * width), (width,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)


def _gather(numbers, dense_ref, buffer, barriers, step, carry):
    """Folds step(carry, q, rows) over the entries of the rows of this program.

    `rows` are those of the dense operand at entry q of each, [64,d] in registers, float32; any row
    where that is absent.
    """
    batch, p = lax.axis_index("batch"), numbers.shape[0]

    def fetch(q):
        slot = lax.rem(q, jnp.int32(_STAGES))

        def copy(n, _):
            for m in range(_UNROLL):
                row = n * _UNROLL + m
                source = jnp.maximum(numbers[q, row] - 1, 0)
                plgpu.copy_gmem_to_smem(
                    dense_ref.at[batch, pl.ds(source, 1)],
                    buffer.at[slot, pl.ds(row, 1)],
                    barriers.at[slot],
                )

        lax.fori_loop(0, _TILE // _UNROLL, copy, None)

    for q in range(min(_STAGES, p)):
        fetch(jnp.int32(q))

    def body(q, carry):
        slot = lax.rem(q, jnp.int32(_STAGES))
        plgpu.barrier_wait(barriers.at[slot])
        rows = plgpu.layout_cast(buffer.at[slot][...], _layout(buffer.dtype))
        carry = step(carry, q, rows.astype(jnp.float32))
        # Waits for all warps, so that none reads what is overwritten next.
        plgpu.commit_smem()
        pl.when(q + _STAGES < p)(functools.partial(fetch, q + _STAGES))
        return carry

    return lax.fori_loop(0, p, body, carry)


def _spmm_kernel(numbers_ref, values_ref, out_ref, numbers, values, out, loaded, gather):
    plgpu.copy_gmem_to_smem(_own_columns(numbers_ref), numbers, loaded)
    plgpu.copy_gmem_to_smem(_own_columns(values_ref), values, loaded)
    plgpu.barrier_wait(loaded)
    layout = _layout(out.dtype)

    def step(total, q, rows):
        def across(x):
            column = plgpu.layout_cast(x.at[q][...], layout.reduce(1))
            return plgpu.layout_cast(lax.broadcast_in_dim(column, rows.shape, [0]), layout)

        return total + jnp.where(across(numbers) > 0, across(values) * rows, 0.0)

    total = gather(step, plgpu.layout_cast(jnp.zeros(out.shape, jnp.float32), layout))
    out[...] = total.astype(out.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out, _own_rows(out_ref))


def _sddmm_kernel(numbers_ref, lhs_ref, out_ref, numbers, lhs, out, loaded, gather):
    plgpu.copy_gmem_to_smem(_own_columns(numbers_ref), numbers, loaded)
    plgpu.copy_gmem_to_smem(_own_rows(lhs_ref), lhs, loaded)
    plgpu.barrier_wait(loaded)
    left = plgpu.layout_cast(lhs[...], _layout(lhs.dtype)).astype(jnp.float32)

    def step(carry, q, rows):
        out.at[q][...] = (left * rows).sum(axis=1)
        return carry

    gather(step, jnp.int32(0))
    plgpu.copy_smem_to_gmem(out, _own_columns(out_ref))
