"""Pallas-Mosaic for TPU v5e and v6e: products row by row, with the dense operand in VMEM.

Bundles that libtpu schedules for v5e, float32 and 64 features, for an entry of a row of 10, and for
one that is alone in its row:

    ell_spmm                5.5 and 5.4
    ell_spmm_transposed     5.0 and 6.4
    ell_sddmm               3.2 and 2.6

whatever the number of columns. The alternative, a one-hot tile of the sparse matrix times the dense
operand on the MXU, does the work of a dense product: by a count of operations 1.2 cycles an entry
for each 1000 columns, so less below some 4000 columns and without bound above. COO products are ELL
products with one entry in a row, there and back.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .. import tpu

# Entries and numbers in a block of rows. SMEM has 1 MiB, for two buffers of positions and values.
BLOCK_ENTRIES = 4096
_BLOCK_NUMBERS = 2**17


def lacks(operation, *operands, **sizes):
    """Why `operation` cannot be served on these operands, in words; "" where it can."""
    entries = operands[0].shape[-1] if operation.startswith("ell") else 1
    if entries > BLOCK_ENTRIES:
        return f"p = {entries} is above {BLOCK_ENTRIES}, what SMEM holds of a row"
    match operation:
        case "ell_spmm" | "ell_sddmm":
            kept = tpu.kept_bytes(operands[2])
        case "ell_spmm_transposed":
            kept = tpu.kept_bytes(operands[2], rows=sizes["num_cols"])
        case "spmm":
            dense = operands[3]
            kept = max(tpu.kept_bytes(dense), tpu.kept_bytes(dense, rows=sizes["num_rows"]))
        case "sddmm":
            kept = max(tpu.kept_bytes(x) for x in operands[2:4])
    return tpu.lacks_memory(operands, kept)


def _entries(array, rows, absent):
    """[b,i,p] in blocks of `rows` rows, scalar after scalar; `absent` fills the last one."""
    b, i, p = array.shape
    array = jnp.pad(array, ((0, 0), (0, -i % rows), (0, 0)), constant_values=absent)
    return tpu.scalars(array.reshape(b, -1, 1, rows * p))


def _block_rows(i, p, features):
    """Rows of a block: a multiple of 8, few enough entries for SMEM and numbers for VMEM."""
    rows = min(BLOCK_ENTRIES // p, _BLOCK_NUMBERS // tpu.round_up(features, tpu.LANES))
    return min(
        max(tpu.SUBLANES, rows // tpu.SUBLANES * tpu.SUBLANES), tpu.round_up(i, tpu.SUBLANES)
    )


def _for(count, step, init, unroll):
    return lax.fori_loop(0, count, step, init, unroll=max(1, min(count, unroll)))


def _ell_spmm_kernel(indices, values, dense, out, *, entries, unroll):
    def reduce_row(i, _):
        def add(q, total):
            n = i * entries + q
            row = dense[pl.ds(jnp.maximum(indices[0, n], 0), 1)]
            return total + jnp.where(indices[0, n] >= 0, values[0, n] * row, 0)

        zeros = jnp.zeros((1, out.shape[1]), out.dtype)
        out[pl.ds(i, 1)] = _for(entries, add, zeros, unroll)

    _for(out.shape[0], reduce_row, None, unroll // 2 // entries)


def ell_spmm(indices, values, dense, *, interpret):
    """out[i] = sum over q of values[i, q] dense[indices[i, q]]."""
    b, i, p = indices.shape
    features = dense.shape[-1]
    rows = _block_rows(i, p, features)
    (out,) = tpu.call(
        functools.partial(_ell_spmm_kernel, entries=p, unroll=tpu.unroll(interpret)),
        (b, pl.cdiv(i, rows)),
        [
            _entries(tpu.present(indices, dense.shape[1]), rows, -1),
            _entries(values.astype(jnp.float32), rows, 0),
            (dense.astype(jnp.float32), tpu.whole(dense.shape, tpu.kept_bytes(dense))),
        ],
        [((b, i, features), tpu.row_block(rows, features))],
        interpret=interpret,
    )
    return out.astype(dense.dtype)


def _ell_spmm_transposed_kernel(indices, values, dense, out, *, entries, unroll):
    pl.when(pl.program_id(1) == 0)(lambda: tpu.clear(out))

    def spread_row(i, _):
        row = dense[pl.ds(i, 1)]

        def add(q, _):
            n = i * entries + q
            at = pl.ds(jnp.maximum(indices[0, n], 0), 1)
            out[at] += jnp.where(indices[0, n] >= 0, values[0, n] * row, 0)

        _for(entries, add, None, unroll)

    _for(dense.shape[0], spread_row, None, unroll // 2 // entries)


def ell_spmm_transposed(indices, values, dense, *, num_cols, interpret):
    """out[j] = sum of values[i, q] dense[i] over the entries with indices[i, q] = j."""
    b, i, p = indices.shape
    features = dense.shape[-1]
    rows = _block_rows(i, p, features)
    shape = (b, num_cols, features)
    (out,) = tpu.call(
        functools.partial(_ell_spmm_transposed_kernel, entries=p, unroll=tpu.unroll(interpret)),
        (b, pl.cdiv(i, rows)),
        [
            _entries(tpu.present(indices, num_cols), rows, -1),
            _entries(values.astype(jnp.float32), rows, 0),
            (dense.astype(jnp.float32), tpu.row_block(rows, features)),
        ],
        [(shape, tpu.whole(shape, tpu.kept_bytes(dense, rows=num_cols)))],
        interpret=interpret,
    )
    return out.astype(dense.dtype)


def _ell_sddmm_kernel(indices, lhs, rhs, out, gathered, *, entries, unroll):
    rows = lhs.shape[0]
    column = lax.broadcasted_iota(jnp.int32, out.shape, 1)

    def fill_column(q, _):
        def gather(i, _):
            gathered[pl.ds(i, 1)] = rhs[pl.ds(indices[0, i * entries + q], 1)]

        _for(rows, gather, None, unroll // 2)
        dots = jnp.sum(lhs[...] * gathered[...], axis=1, keepdims=True)
        out[...] = jnp.where(column == q, dots, out[...])

    lax.fori_loop(0, entries, fill_column, None)


def ell_sddmm(indices, lhs, rhs, *, interpret):
    """out[i, q] = lhs[i] . rhs[indices[i, q]]."""
    b, i, p = indices.shape
    features = lhs.shape[-1]
    rows = _block_rows(i, p, features)
    present = tpu.present(indices, rhs.shape[1])
    (out,) = tpu.call(
        functools.partial(_ell_sddmm_kernel, entries=p, unroll=tpu.unroll(interpret)),
        (b, pl.cdiv(i, rows)),
        [
            _entries(jnp.maximum(present, 0), rows, 0),
            (lhs.astype(jnp.float32), tpu.row_block(rows, features)),
            (rhs.astype(jnp.float32), tpu.whole(rhs.shape, tpu.kept_bytes(rhs))),
        ],
        [((b, i, p), tpu.row_block(rows, p))],
        scratch=[pltpu.VMEM((rows, features), jnp.float32)],
        interpret=interpret,
    )
    return jnp.where(present >= 0, out, 0).astype(rhs.dtype)


def spmm(rows, cols, values, dense, *, num_rows, interpret):
    """out[r] = sum of values[n] dense[cols[n]] over the entries with rows[n] = r."""
    dtype, dense = dense.dtype, dense.astype(jnp.float32)
    gathered = ell_spmm(cols[..., None], values[..., None], dense, interpret=interpret)
    ones = jnp.ones((*rows.shape, 1), jnp.float32)
    out = ell_spmm_transposed(
        rows[..., None], ones, gathered, num_cols=num_rows, interpret=interpret
    )
    return out.astype(dtype)


def sddmm(rows, cols, lhs, rhs, *, interpret):
    """out[n] = lhs[rows[n]] . rhs[cols[n]]."""
    dtype, lhs, rhs = lhs.dtype, lhs.astype(jnp.float32), rhs.astype(jnp.float32)
    rows = tpu.present(rows, lhs.shape[1])
    cols = jnp.where(rows >= 0, cols, -1)
    ones = jnp.ones((*rows.shape, 1), jnp.float32)
    gathered = ell_spmm(rows[..., None], ones, lhs, interpret=interpret)
    return ell_sddmm(cols[..., None], gathered, rhs, interpret=interpret)[..., 0].astype(dtype)
