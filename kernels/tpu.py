"""What the kernels for TPUs share: Pallas-Mosaic, for v5e and v6e.

A TPU has no gather from a vector of positions. It has a load of any row of VMEM, whose number the
scalar core reads from SMEM. So what entries point into, or the result they add to, is kept in VMEM
whole, once for each matrix of the batch, and the scalar core walks the entries, which pass through
SMEM in blocks. HBM moves every operand once, and 96 MiB of VMEM keep 196608 rows. None of this is
measured: no kernel here has run on a TPU.

Sums are float32 and run in the order of the entries: the same operands give the same bits. Absent
entries are masked; blocks of SMEM are padded with absent entries, ragged blocks of VMEM are not
padded but ignored.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

SUBLANES, LANES = 8, 128
# Of 128 MiB of VMEM: what a kernel may use, and how much of that for operands kept whole.
VMEM = 112 * 2**20
KEPT = 96 * 2**20
LARGEST = float(jnp.finfo(jnp.float32).max)


def lacks_memory(operands, kept: int) -> str:
    """Why a kernel that keeps so many bytes cannot serve these operands, in words, or ""."""
    if any(x.dtype == jnp.float64 for x in operands):
        return "a TPU has no float64"
    if kept > KEPT:
        return f"VMEM keeps {KEPT >> 20} MiB of operands, not the {kept / 2**20:.0f} MiB of these"
    return ""


def kept_bytes(array, itemsize=4, rows=None):
    """What VMEM takes for one matrix [rows,d] of a batch of them."""
    rows, features = rows or array.shape[-2], array.shape[-1]
    return round_up(rows, 2 * SUBLANES) * round_up(features, LANES) * itemsize


def round_up(size, multiple):
    return -(-size // multiple) * multiple


def call(kernel, grid, operands, results, *, interpret, scratch=()):
    """`kernel` on pairs (array, spec), into pairs (shape, spec) of float32; returns a list."""
    arrays, in_specs = zip(*operands, strict=True)
    shapes, out_specs = zip(*results, strict=True)
    varying = jax.typeof(arrays[-1]).manual_axis_type
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=[
            jax.ShapeDtypeStruct(shape, jnp.float32, manual_axis_type=varying) for shape in shapes
        ],
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=VMEM),
        interpret=interpret,
        name=kernel.func.__name__.strip("_"),
    )(*arrays)


def whole(shape, kept):
    """One matrix of [b,rows,d] in VMEM, of `kept` bytes in all; two buffers if they fit."""
    buffers = pl.Buffered(1 if 2 * kept > KEPT else 2)
    return pl.BlockSpec((None, *shape[1:]), lambda b, i: (b, 0, 0), pipeline_mode=buffers)


def row_block(rows, features):
    """Block i of rows of [b,i,d] in VMEM."""
    return pl.BlockSpec((None, rows, features), lambda b, i: (b, i, 0))


def scalars(blocks):
    """Blocks [b,i,1,n] of scalars, with the spec that has block i in SMEM."""
    spec = pl.BlockSpec(
        (None, None, *blocks.shape[2:]), lambda b, i: (b, i, 0, 0), memory_space=pltpu.SMEM
    )
    return blocks, spec


def present(indices, size):
    return jnp.where((indices >= 0) & (indices < size), indices, -1)


def unroll(interpret):
    """Entries of a row written out one by one, half as many across rows; few to interpret."""
    return 2 if interpret else 16


def clear(ref):
    """Zeros, a tile at a time: an assignment of the whole would be unrolled."""
    size = ref.shape[0]
    tile = min(size, 256)

    def clear(t, _):
        at = pl.ds(pl.multiple_of(t * tile, tile), tile)
        ref[at] = jnp.zeros((tile, ref.shape[1]), ref.dtype)

    lax.fori_loop(0, size // tile, clear, None)
    if rest := size % tile:
        ref[pl.ds(size - rest, rest)] = jnp.zeros((rest, ref.shape[1]), ref.dtype)
