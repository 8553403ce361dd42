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


def redistribute(points, means, sigmas, values, where):
    points, means, sigmas, values = (
        np.asarray(a, np.float64) for a in (points, means, sigmas, values)
    )
    where = where & ~duplicates(points)
    out = np.zeros(where.shape)
    for *batch, j in np.ndindex(values.shape):
        b = tuple(batch)
        distances = (points[b][where[b]] - means[b][j]) / sigmas[b][j]
        logits = -(distances**2).sum(-1) / 2
        if logits.size:
            shares = np.exp(logits - logits.max())
            out[b][where[b]] += values[b][j] * shares / shares.sum()
    return out


def duplicates(points):
    """Every copy of a point of [*B,m,r] but the first."""
    same = (points[..., :, None, :] == points[..., None, :, :]).all(-1)
    return np.tril(same, -1).any(-1)


def gathered_attention(q, k, v, indices, log_weights):
    q, k, v, log_weights = (np.asarray(a, np.float64) for a in (q, k, v, log_weights))
    out = np.zeros((*q.shape[:-1], v.shape[-1]))
    for *batch, i in np.ndindex(q.shape[:-1]):
        b = tuple(batch)
        present = (indices[b][i] >= 0) & (indices[b][i] < k.shape[-2])
        present &= log_weights[b][i] > -np.inf
        keys = indices[b][i][present]
        logits = k[b][keys] @ q[b][i] + log_weights[b][i][present]
        if logits.size:
            weights = np.exp(logits - logits.max())
            out[b][i] = weights @ v[b][keys] / weights.sum()
    return out


def block_attention(q, k, v, block_indices, log_weights, block, causal, mask=None):
    """Every key of a block as an entry of its own, of every query of the row."""
    keys = np.repeat(block_indices * block, block, axis=-1)
    keys = np.repeat(keys + np.tile(np.arange(block), block_indices.shape[-1]), block, axis=-2)
    log_weights = np.repeat(np.repeat(log_weights, block, axis=-1), block, axis=-2)
    if causal:
        later = keys > np.arange(q.shape[-2])[:, None]
        log_weights = np.where(later, -np.inf, log_weights)
    if mask is not None:
        rows = np.broadcast_to(mask[..., None, :], (*keys.shape[:-1], mask.shape[-1]))
        seen = np.take_along_axis(rows, np.clip(keys, 0, mask.shape[-1] - 1), -1)
        keys = np.where(seen, keys, -1)
    return gathered_attention(q, k, v, keys, log_weights)
