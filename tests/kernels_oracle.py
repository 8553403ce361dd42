"""NumPy float64 meaning of the kernels, entry by entry, absent entries skipped."""

import numpy as np


def spmm(rows, cols, values, dense, num_rows):
    values, dense = (np.asarray(a, np.float64) for a in (values, dense))
    out = np.zeros((*rows.shape[:-1], num_rows, dense.shape[-1]))
    for (*batch, n), value in np.ndenumerate(values):
        row, col, b = rows[*batch, n], cols[*batch, n], tuple(batch)
        if 0 <= row < num_rows and 0 <= col < dense.shape[-2]:
            out[b][row] += value * dense[b][col]
    return out


def sddmm(rows, cols, lhs, rhs):
    lhs, rhs = (np.asarray(a, np.float64) for a in (lhs, rhs))
    out = np.zeros(rows.shape)
    for *batch, n in np.ndindex(rows.shape):
        row, col, b = rows[*batch, n], cols[*batch, n], tuple(batch)
        if 0 <= row < lhs.shape[-2] and 0 <= col < rhs.shape[-2]:
            out[b][n] = lhs[b][row] @ rhs[b][col]
    return out


def ell_entries(indices):
    """ELL [*B,i,p] as COO: rows and cols [*B,i*p]."""
    *batch, i, p = indices.shape
    rows = np.broadcast_to(np.arange(i)[:, None], indices.shape)
    return rows.reshape(*batch, i * p), indices.reshape(*batch, i * p)
